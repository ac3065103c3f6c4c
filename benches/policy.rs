//! The pure policy with 512 models, half of them resident.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use residentd::clock::Timestamp;
use residentd::model::{Bytes, Domain, EvictionPolicy, ModelName, ModelSpec, WorkerId};
use residentd::policy::{
    Activity, DomainMeasure, Effect, Event, Measure, Measured, Policy, Settings, Setup, Threshold,
};

use crate::support::now;
use crate::{median, micros, print};

const MODELS: usize = 512;
const RESIDENT: usize = 256;
const ROUNDS: usize = 201;
/// A model that needs the room of twenty others; the last needs that of one.
const LARGE: usize = MODELS - 2;

fn name(index: usize) -> ModelName {
    ModelName::new(&format!("model-{index}")).expect("a good name")
}

/// A policy whose limit holds exactly half of its models, all of that half
/// ready and idle.
struct World {
    policy: Policy,
    now: Timestamp,
    workers: Vec<WorkerId>,
}

impl World {
    fn new(eviction: EvictionPolicy) -> Self {
        let half = u64::try_from(RESIDENT).expect("it fits");
        let settings = Settings {
            limit: Bytes::gib(half),
            reserve: Bytes::gib(1),
            gpu_limits: BTreeMap::new(),
            soft: Threshold::Percent(10),
            hard: Threshold::Percent(5),
            auto_cleanup: true,
            emergency: true,
            drain_timeout: Duration::from_secs(30),
            eviction,
            patience: Duration::from_secs(5),
        };
        let setups = (0..MODELS).map(|index| Setup {
            spec: Arc::new(ModelSpec {
                memory: Some(Bytes::gib(if index == LARGE { 20 } else { 1 })),
                ..ModelSpec::plain(name(index), vec!["worker".into()])
            }),
            weights: Bytes::ZERO,
            footprint: BTreeMap::new(),
        });
        let mut world = Self {
            policy: Policy::new(settings, setups),
            now: Timestamp::START,
            workers: Vec::new(),
        };
        world.step(world.measured());
        for index in 0..RESIDENT {
            let spawned = world.step(world.acquire(index));
            let worker = spawned.into_iter().find_map(|effect| match effect {
                Effect::Spawn { worker, .. } => Some(worker),
                _ => None,
            });
            let worker = worker.expect("there is room for it");
            world.step(Event::Ready {
                worker: worker.clone(),
            });
            world.workers.push(worker);
        }
        let idle = Activity::opened(world.now);
        let workers = world.workers.clone();
        world
            .policy
            .observe(workers.iter().map(|worker| (worker, idle)));
        world.step(world.measured());
        world
    }

    fn step(&mut self, event: Event) -> Vec<Effect> {
        self.now = self.now + Duration::from_millis(1);
        self.policy.step(self.now, event)
    }

    fn acquire(&self, index: usize) -> Event {
        Event::Acquire {
            ticket: u64::try_from(index).expect("it fits"),
            model: name(index),
            deadline: self.now + Duration::from_secs(600),
        }
    }

    fn measured(&self) -> Event {
        let held = Measure {
            usage: Bytes::gib(1),
            unreclaimable: Bytes::gib(1),
        };
        let host = DomainMeasure {
            total: Bytes::gib(2048),
            headroom: Bytes::gib(1500),
        };
        let of = |worker: &WorkerId| (worker.clone(), BTreeMap::from([(Domain::Host, held)]));
        Event::Measured(Measured {
            gpus: BTreeMap::new(),
            at: self.now,
            gpus_at: self.now,
            domains: BTreeMap::from([(Domain::Host, host)]),
            workers: self.workers.iter().map(of).collect(),
            counted_twice: Bytes::ZERO,
        })
    }
}

/// How long it takes to plan for a cold model, in microseconds.
fn plan(world: &World, model: usize, victims: usize) -> f64 {
    let cold = (0..ROUNDS).map(|_| {
        let mut copy = world.policy.clone();
        let event = world.acquire(model);
        let start = now();
        let effects = copy.step(world.now, event);
        let took = start.elapsed();
        let evicts = |effect: &&Effect| matches!(effect, Effect::Evict { .. });
        assert_eq!(effects.iter().filter(evicts).count(), victims);
        micros(took)
    });
    median(cold.collect())
}

/// S21: a step takes at most 50 µs at 512 models, a plan of victims 1 ms.
pub(crate) fn steps() {
    for eviction in EvictionPolicy::ALL {
        let world = World::new(eviction);
        let named = |of: &str| format!("S21-plan-{}-{of}", eviction.as_str());
        print(&named("1"), plan(&world, MODELS - 1, 1), 1000.0, "us");
        print(&named("20"), plan(&world, LARGE, 20), 1000.0, "us");
    }
    let mut world = World::new(EvictionPolicy::Lru);
    let tick: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let start = now();
            world.step(Event::Tick);
            micros(start.elapsed())
        })
        .collect();
    print("S21-tick", median(tick), 50.0, "us");
    let measured: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let event = world.measured();
            let start = now();
            world.step(event);
            micros(start.elapsed())
        })
        .collect();
    print("S21-measured", median(measured), 50.0, "us");
}
