//! A small world for tests: models of known size, and a machine that does
//! what the policy says when the test tells it to.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test picks the few effects it looks for"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::{
    Activity, DomainMeasure, Effect, Event, GpuFacts, Measure, Measured, Policy, Settings, Setup,
    Threshold, Ticket,
};
use crate::clock::Timestamp;
use crate::model::{
    Bytes, Domain, EvictionPolicy, GpuVendor, ModelName, ModelSpec, ParkCall, ParkSpec, WorkerId,
};

pub(crate) fn name(text: &str) -> ModelName {
    ModelName::new(text).expect("a good name")
}

/// A model that declares its need in MiB.
pub(crate) fn spec(model: &str, declared: Option<u64>) -> ModelSpec {
    ModelSpec {
        memory: declared.map(Bytes::mib),
        max_queue: 4,
        ..ModelSpec::plain(name(model), vec!["worker".into()])
    }
}

/// A park that says nothing of what is held then.
pub(crate) fn park() -> Arc<ParkSpec> {
    let call = |path: &str| ParkCall {
        method: "POST".into(),
        path: path.into(),
        body: None,
    };
    Arc::new(ParkSpec {
        park: vec![call("/sleep")],
        unpark: vec![call("/wake_up")],
        timeout: Duration::from_secs(30),
        memory: None,
        vram: None,
    })
}

/// The policy, and the truth of the machine around it.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) policy: Policy,
    pub(crate) now: Timestamp,
    /// What each model's worker holds once it is ready, in MiB.
    pub(crate) size: BTreeMap<ModelName, u64>,
    /// Workers that hold their bytes now.
    pub(crate) holding: BTreeSet<WorkerId>,
    /// Requests inside each ready worker.
    pub(crate) inside: BTreeMap<WorkerId, Activity>,
    /// Size of each GPU, in MiB.
    pub(crate) gpus: Vec<u64>,
    /// What each model's worker holds on each of its GPUs, in MiB.
    pub(crate) vram: BTreeMap<ModelName, u64>,
    /// VRAM of ended workers that the driver has not given back yet, in MiB.
    pub(crate) late: BTreeMap<u32, u64>,
    /// Workers that are parked, or on their way there.
    pub(crate) parked: BTreeSet<WorkerId>,
    /// What a parked worker keeps of each of its GPUs, in MiB.
    pub(crate) keeps: u64,
    /// Where each worker was placed.
    pub(crate) placed: BTreeMap<WorkerId, Vec<u32>>,
    total: Bytes,
    next_ticket: Ticket,
}

impl World {
    /// A machine of 16 GiB with this limit in MiB, and models by name and
    /// declared size.
    pub(crate) fn new(limit: u64, models: &[(&str, u64)]) -> Self {
        Self::with(
            limit,
            models
                .iter()
                .map(|(model, size)| spec(model, Some(*size)))
                .collect(),
            models,
        )
    }

    pub(crate) fn with(limit: u64, specs: Vec<ModelSpec>, sizes: &[(&str, u64)]) -> Self {
        let settings = Settings {
            limit: Bytes::mib(limit),
            reserve: Bytes::mib(512),
            gpu_limits: BTreeMap::new(),
            soft: Threshold::Percent(10),
            hard: Threshold::Percent(5),
            auto_cleanup: true,
            emergency: true,
            drain_timeout: Duration::from_secs(30),
            eviction: EvictionPolicy::Lru,
            patience: Duration::from_secs(5),
        };
        let setups = specs.into_iter().map(|spec| Setup {
            spec: Arc::new(spec),
            weights: Bytes::ZERO,
            footprint: BTreeMap::new(),
        });
        let mut world = Self {
            policy: Policy::new(settings, setups),
            now: Timestamp::START,
            size: sizes
                .iter()
                .map(|(model, size)| (name(model), *size))
                .collect(),
            holding: BTreeSet::new(),
            inside: BTreeMap::new(),
            gpus: Vec::new(),
            vram: BTreeMap::new(),
            late: BTreeMap::new(),
            parked: BTreeSet::new(),
            keeps: 0,
            placed: BTreeMap::new(),
            total: Bytes::gib(16),
            next_ticket: 1,
        };
        world.measure();
        world
    }

    pub(crate) fn step(&mut self, event: Event) -> Vec<Effect> {
        self.policy
            .observe(self.inside.iter().map(|(id, activity)| (id, *activity)));
        let mut effects = self.policy.step(self.now, event);
        let drains = |effect: &Effect| matches!(effect, Effect::Drain { .. });
        if effects.iter().any(drains) {
            effects.extend(self.policy.step(self.now, Event::Tick));
        }
        for effect in &effects {
            match effect {
                Effect::Grant { worker, .. } => {
                    let gate = self.inside.get_mut(worker);
                    let gate = gate.expect("granted workers are ready");
                    gate.inside += 1;
                    gate.last_entered = self.now;
                }
                Effect::Evict { worker, .. } => {
                    let inside = self.inside.remove(worker).map_or(0, |a| a.inside);
                    assert_eq!(inside, 0, "{worker} was chosen though requests are inside");
                }
                Effect::Terminate { worker, .. } => {
                    self.inside.remove(worker);
                }
                Effect::Park { worker, .. } => {
                    let inside = self.inside.get(worker).map_or(0, |a| a.inside);
                    assert_eq!(inside, 0, "{worker} is parked though requests are inside");
                }
                Effect::Parked { .. } | Effect::Unpark { .. } => {}
                Effect::Spawn { worker, gpus, .. } => {
                    self.placed.insert(worker.clone(), gpus.clone());
                }
                Effect::Done { .. }
                | Effect::Reject { .. }
                | Effect::CleanedUp { .. }
                | Effect::Drain { .. }
                | Effect::Reclaimed { .. }
                | Effect::Resume { .. }
                | Effect::Learn { .. }
                | Effect::Forget { .. }
                | Effect::Prefetch { .. }
                | Effect::CallOff { .. }
                | Effect::Finished => {}
            }
        }
        effects
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    pub(crate) fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        self.next_ticket
    }

    /// A request for the model, with the deadline a minute away.
    pub(crate) fn acquire(&mut self, model: &str) -> (Ticket, Vec<Effect>) {
        self.pass(Duration::from_millis(1));
        let ticket = self.ticket();
        let deadline = self.now + Duration::from_secs(60);
        let effects = self.step(Event::Acquire {
            ticket,
            model: name(model),
            deadline,
        });
        (ticket, effects)
    }

    /// The worker becomes ready and holds its bytes.
    pub(crate) fn ready(&mut self, model: &str) -> Vec<Effect> {
        let worker = self.worker(model);
        self.pass(Duration::from_millis(100));
        self.holding.insert(worker.clone());
        let state = &self.policy.models()[&worker.model];
        let gate = match state.adopted {
            true => state.activity,
            false => Activity::opened(self.now),
        };
        self.inside.insert(worker.clone(), gate);
        let mut effects = self.step(Event::Ready { worker });
        effects.extend(self.measure());
        effects
    }

    /// The worker answers what it was told last, to park or to be ready again,
    /// and its bytes have moved.
    pub(crate) fn moved(&mut self, model: &str) -> Vec<Effect> {
        let worker = self.worker(model);
        self.pass(Duration::from_millis(50));
        let event = match self.parked.remove(&worker) {
            true => Event::Unparked { worker },
            false => {
                self.parked.insert(worker.clone());
                Event::Parked { worker }
            }
        };
        let mut effects = self.step(event);
        effects.extend(self.measure());
        effects
    }

    /// A request leaves the model's worker.
    pub(crate) fn leave(&mut self, model: &str) -> Vec<Effect> {
        self.pass(Duration::from_millis(1));
        let worker = self.worker(model);
        let activity = self.inside.get_mut(&worker).expect("the worker is ready");
        activity.inside -= 1;
        activity.last_left = self.now;
        self.step(Event::Tick)
    }

    /// Whoever was granted at ready has left before anything was measured.
    pub(crate) fn leave_at_once(&mut self, model: &str) {
        let worker = self.worker(model);
        if let Some(activity) = self.inside.get_mut(&worker) {
            activity.inside = 0;
        }
        self.step(Event::Tick);
    }

    /// The worker's tree is gone, and its bytes are measured back.
    pub(crate) fn exit(&mut self, model: &str) -> Vec<Effect> {
        let worker = self.worker(model);
        let mut effects = self.exit_unmeasured(&worker);
        effects.extend(self.measure());
        effects
    }

    pub(crate) fn exit_unmeasured(&mut self, worker: &WorkerId) -> Vec<Effect> {
        self.pass(Duration::from_millis(1));
        self.holding.remove(worker);
        self.parked.remove(worker);
        self.inside.remove(worker);
        self.step(Event::Exited {
            worker: worker.clone(),
            status: "exit code 1".into(),
            out_of_memory: Vec::new(),
            last_lines: vec!["out of cheese".into()],
        })
    }

    /// Loads the model, uses it once and leaves it idle.
    pub(crate) fn use_once(&mut self, model: &str) {
        self.acquire(model);
        self.ready(model);
        self.leave(model);
    }

    pub(crate) fn measure(&mut self) -> Vec<Effect> {
        self.pass(Duration::from_millis(1));
        let held: u64 = self.holding.iter().map(|worker| self.on_host(worker)).sum();
        let headroom = self.total - Bytes::mib(held);
        self.measure_headroom(headroom)
    }

    pub(crate) fn measure_headroom(&mut self, headroom: Bytes) -> Vec<Effect> {
        let measured = self.measured(headroom);
        self.step(Event::Measured(measured))
    }

    pub(crate) fn measured(&self, headroom: Bytes) -> Measured {
        let workers = self
            .holding
            .iter()
            .map(|worker| {
                let mut domains = BTreeMap::from([(Domain::Host, self.on_host(worker))]);
                domains.extend(
                    self.vram_of(worker)
                        .map(|(gpu, mib)| (Domain::Gpu(gpu), mib)),
                );
                let measure = |mib| Measure {
                    usage: Bytes::mib(mib),
                    unreclaimable: Bytes::mib(mib),
                };
                let domains = domains.into_iter().map(|(d, mib)| (d, measure(mib)));
                (worker.clone(), domains.collect())
            })
            .collect();
        let host = DomainMeasure {
            total: self.total,
            headroom,
        };
        let mut domains = BTreeMap::from([(Domain::Host, host)]);
        for (index, total) in (0..).zip(&self.gpus) {
            let workers = self.holding.iter().flat_map(|worker| self.vram_of(worker));
            let held: u64 = workers
                .filter(|(gpu, _)| *gpu == index)
                .map(|(_, mib)| mib)
                .sum();
            let late = self.late.get(&index).copied().unwrap_or(0);
            let measure = DomainMeasure {
                total: Bytes::mib(*total),
                headroom: Bytes::mib(*total) - Bytes::mib(held + late),
            };
            domains.insert(Domain::Gpu(index), measure);
        }
        let gpus = (0..).zip(&self.gpus).map(|(index, _)| {
            let uuid = format!("GPU-{index}");
            let facts = GpuFacts {
                uuid,
                unified: false,
                vendor: GpuVendor::Nvidia,
            };
            (index, facts)
        });
        Measured {
            gpus: gpus.collect(),
            at: self.now,
            gpus_at: self.now,
            domains,
            workers,
            counted_twice: Bytes::ZERO,
        }
    }

    /// Returns the GPUs a worker was placed on and what it holds on each.
    fn vram_of(&self, worker: &WorkerId) -> impl Iterator<Item = (u32, u64)> {
        let full = self.vram.get(&worker.model).copied().unwrap_or(0);
        let mib = match self.parked.contains(worker) {
            true => full.min(self.keeps),
            false => full,
        };
        let gpus = self.placed.get(worker).into_iter().flatten();
        gpus.map(move |gpu| (*gpu, mib))
    }

    /// Returns what a worker holds of host RAM: a parked one also what it gave
    /// back on its GPUs.
    pub(crate) fn on_host(&self, worker: &WorkerId) -> u64 {
        let own = self.size[&worker.model];
        if !self.parked.contains(worker) {
            return own;
        }
        let full = self.vram.get(&worker.model).copied().unwrap_or(0);
        own + self.vram_of(worker).map(|(_, mib)| full - mib).sum::<u64>()
    }

    pub(crate) fn worker(&self, model: &str) -> WorkerId {
        let state = self.policy.models().get(model);
        let generation = state.map_or(0, |state| state.generation);
        WorkerId {
            model: name(model),
            generation,
        }
    }
}

/// The names of models that are told to go, in order.
pub(crate) fn gone(effects: &[Effect]) -> Vec<String> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Evict { worker, .. } | Effect::Terminate { worker, .. } => {
                Some(worker.model.to_string())
            }
            _ => None,
        })
        .collect()
}

/// The names of models whose workers are drained, in order.
pub(crate) fn drained(effects: &[Effect]) -> Vec<String> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Drain { worker, .. } => Some(worker.model.to_string()),
            _ => None,
        })
        .collect()
}

/// The names of models that are told to park, in order.
pub(crate) fn parked(effects: &[Effect]) -> Vec<String> {
    let told = effects.iter().filter_map(|effect| match effect {
        Effect::Park { worker, .. } => Some(worker.model.to_string()),
        _ => None,
    });
    told.collect()
}

/// The names of models whose parked workers are told to be ready again.
pub(crate) fn unparked(effects: &[Effect]) -> Vec<String> {
    let told = effects.iter().filter_map(|effect| match effect {
        Effect::Unpark { worker, .. } => Some(worker.model.to_string()),
        _ => None,
    });
    told.collect()
}

/// The names of models that are spawned, in order.
pub(crate) fn spawned(effects: &[Effect]) -> Vec<String> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Spawn { worker, .. } => Some(worker.model.to_string()),
            _ => None,
        })
        .collect()
}

/// The code a ticket is turned away with.
pub(crate) fn refused(effects: &[Effect], of: Ticket) -> Option<super::Refusal> {
    effects.iter().find_map(|effect| match effect {
        Effect::Reject { ticket, refusal } if *ticket == of => Some(refusal.clone()),
        _ => None,
    })
}

/// Whether a ticket is granted a lease.
pub(crate) fn granted(effects: &[Effect], of: Ticket) -> bool {
    effects
        .iter()
        .any(|effect| matches!(effect, Effect::Grant { ticket, .. } if *ticket == of))
}
