//! Plays random moves on a small world and judges every effect.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test names the moves it plays"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::time::Duration;

use super::super::testing::{World, name, spec};
use super::super::*;
use super::{MODELS, Move};
use crate::model::GpuRequest;

/// The world, and the book of who asked and was answered.
pub(super) struct Court {
    pub(super) world: World,
    pub(super) neighbour: u64,
    pub(super) race: bool,
    pub(super) asked: BTreeMap<Ticket, Option<String>>,
    pub(super) answered: BTreeSet<Ticket>,
    pub(super) left: BTreeSet<Ticket>,
    /// What the configuration says of each model, or said last.
    pub(super) specs: Vec<ModelSpec>,
    live: BTreeMap<ModelName, u64>,
    /// Workers that were told to drain.
    draining: BTreeSet<WorkerId>,
    /// Since when the first waiter of each model has waited, after each step.
    waits: BTreeMap<ModelName, Timestamp>,
    /// Workers that load or die.
    moving: BTreeSet<WorkerId>,
}

impl Court {
    pub(super) fn new(policy: EvictionPolicy, patience: Duration) -> Self {
        let mut specs: Vec<_> = [
            ("a", Some(300)),
            ("b", Some(500)),
            ("c", None),
            ("d", Some(900)),
        ]
        .map(|(m, s)| spec(m, s))
        .into();
        specs[1].idle_timeout = Some(Duration::from_secs(30));
        specs[0].preload = true;
        specs[0].max_memory = Some(Bytes::mib(500));
        // Two GPUs: b declares what it takes of one, c does not, d takes both.
        specs[1].gpus = GpuRequest::Count(1);
        specs[1].vram = Some(Bytes::mib(500));
        specs[2].gpus = GpuRequest::Count(1);
        specs[3].gpus = GpuRequest::Count(2);
        specs[3].vram = Some(Bytes::mib(700));
        // And takes one request at a time.
        specs[3].concurrency = NonZeroU32::new(1);
        let sizes = [("a", 300), ("b", 450), ("c", 400), ("d", 900)];
        let mut world = World::with(1000, specs.clone(), &sizes);
        world.policy.settings.eviction = policy;
        world.policy.settings.patience = patience;
        world.gpus = vec![1000, 1200];
        world.vram = [("b", 500), ("c", 600), ("d", 700)]
            .map(|(model, mib)| (name(model), mib))
            .into();
        world.measure();
        let mut court = Self {
            world,
            neighbour: 0,
            race: false,
            asked: BTreeMap::new(),
            answered: BTreeSet::new(),
            left: BTreeSet::new(),
            specs,
            live: BTreeMap::new(),
            draining: BTreeSet::new(),
            waits: BTreeMap::new(),
            moving: BTreeSet::new(),
        };
        // The world's first measurement has started what is preloaded.
        for state in court.world.policy.models().values().filter(|m| m.is_live()) {
            court.live.insert(state.name().clone(), state.generation);
            court.moving.insert(state.worker());
        }
        court
    }

    /// Steps, judges every effect, and plays the machine.
    pub(super) fn step(&mut self, event: Event) {
        let mut todo = vec![event];
        while let Some(event) = todo.pop() {
            let policy = &mut self.world.policy;
            policy.observe(
                self.world
                    .inside
                    .iter()
                    .map(|(id, activity)| (id, *activity)),
            );
            let effects = policy.step(self.world.now, event);
            let first = |m: &ModelState| Some((m.name().clone(), m.queue.front()?.since));
            self.waits = policy.models().values().filter_map(first).collect();
            let spawned = effects.iter().any(|e| matches!(e, Effect::Spawn { .. }));
            if spawned {
                for (domain, books) in policy.domains() {
                    assert!(
                        policy.charged(*domain) <= books.limit,
                        "charges over the limit of {domain} by our own choice"
                    );
                }
            }
            let mut last_grant: BTreeMap<ModelName, Ticket> = BTreeMap::new();
            for effect in effects {
                todo.extend(self.judge(effect, &mut last_grant));
            }
        }
    }

    fn judge(
        &mut self,
        effect: Effect,
        last_grant: &mut BTreeMap<ModelName, Ticket>,
    ) -> Option<Event> {
        match effect {
            Effect::Grant { ticket, worker } => {
                self.answer(ticket);
                let before = last_grant.insert(worker.model.clone(), ticket);
                assert!(
                    before.is_none_or(|earlier| earlier < ticket),
                    "served out of order"
                );
                assert_eq!(self.live.get(&worker.model), Some(&worker.generation));
                let inside = self.world.inside.get_mut(&worker);
                let inside = inside.expect("only ready workers are granted");
                inside.inside += 1;
                let most = self.world.policy.models()[&worker.model].spec.concurrency;
                assert!(most.is_none_or(|most| inside.inside <= most.get()));
            }
            Effect::Done { ticket }
            | Effect::Reject { ticket, .. }
            | Effect::CleanedUp { ticket, .. } => {
                self.answer(ticket);
            }
            Effect::Spawn { worker, gpus, .. } => {
                let wanted = self.world.policy.models()[&worker.model].spec.gpus.count();
                assert_eq!(gpus.len(), wanted, "{worker} on {gpus:?}");
                self.judge_gpus(&worker, &gpus);
                self.world.placed.insert(worker.clone(), gpus);
                self.moving.insert(worker.clone());
                let before = self.live.insert(worker.model.clone(), worker.generation);
                assert_eq!(before, None, "{worker} is a second worker of its model");
            }
            Effect::Evict { worker, reason, .. } => {
                self.judge_generation(&worker);
                let pinned = self.world.policy.models()[&worker.model].pinned;
                let to_make_room = matches!(
                    reason,
                    EvictReason::MakeRoom { .. } | EvictReason::Idle { .. }
                );
                assert!(
                    !(pinned && to_make_room),
                    "{worker} is pinned and evicted for {reason:?}"
                );
                if std::mem::take(&mut self.race) {
                    self.world
                        .inside
                        .get_mut(&worker)
                        .expect("it was ready")
                        .inside += 1;
                }
                let inside = self.world.inside[&worker].inside;
                if inside > 0 {
                    return Some(Event::EvictRefused { worker, inside });
                }
                self.world.inside.remove(&worker);
                self.moving.insert(worker);
            }
            Effect::Drain { worker, reason } => {
                self.judge_drain(&worker, &reason);
                self.draining.insert(worker);
                return Some(Event::Tick);
            }
            Effect::Resume { worker } => {
                self.judge_generation(&worker);
                assert!(self.draining.remove(&worker), "{worker} does not drain");
            }
            Effect::Terminate { worker, reason, .. } => {
                self.judge_generation(&worker);
                self.judge_replaced(&worker, &reason);
                if matches!(reason, EvictReason::MakeRoom { .. }) {
                    let inside = self.world.inside.get(&worker).map_or(0, |a| a.inside);
                    assert_eq!(inside, 0, "{worker} is busy and ended to make room");
                }
                self.moving.insert(worker);
            }
            Effect::Prefetch { .. } => unreachable!("no model here has its files read"),
            Effect::CallOff { .. }
            | Effect::Reclaimed { .. }
            | Effect::Learn { .. }
            | Effect::Forget { .. }
            | Effect::Finished => {}
        }
        None
    }

    /// A worker that is drained to make room is not pinned, and somebody has
    /// waited for long enough.
    fn judge_drain(&self, worker: &WorkerId, reason: &EvictReason) {
        self.judge_generation(worker);
        if let EvictReason::MakeRoom { for_model, .. } = reason {
            let waits_since = self.waits[for_model];
            let patience = self.world.policy.settings.patience;
            assert!(self.world.now.since(waits_since) >= patience);
            assert!(!self.world.policy.models()[&worker.model].pinned);
        }
    }

    /// Nothing else may move memory on the GPUs of a worker that is started.
    fn judge_gpus(&self, worker: &WorkerId, gpus: &[u32]) {
        for other in &self.moving {
            let theirs = self.world.placed.get(other).into_iter().flatten();
            let shared = theirs.filter(|gpu| gpus.contains(gpu)).count();
            assert_eq!(shared, 0, "{worker} starts where {other} moves");
        }
    }

    fn judge_generation(&self, worker: &WorkerId) {
        let live = self.live.get(&worker.model);
        assert_eq!(live, Some(&worker.generation), "an old generation");
    }

    fn answer(&mut self, ticket: Ticket) {
        assert!(
            self.asked.contains_key(&ticket),
            "an answer nobody asked for"
        );
        assert!(
            !self.left.contains(&ticket),
            "an answer for someone who left"
        );
        assert!(self.answered.insert(ticket), "two answers for one ticket");
    }

    fn ask(&mut self, model: Option<&str>) -> Ticket {
        let ticket = self.world.ticket();
        self.asked.insert(ticket, model.map(str::to_owned));
        ticket
    }

    pub(super) fn measure(&mut self) {
        self.world.pass(Duration::from_millis(1));
        let held: u64 = self
            .world
            .holding
            .iter()
            .map(|w| self.world.size[&w.model])
            .sum();
        let headroom = Bytes::gib(16) - Bytes::mib(held + self.neighbour);
        let measured = self.world.measured(headroom);
        self.step(Event::Measured(measured));
    }

    pub(super) fn play(&mut self, made: &Move) {
        match *made {
            Move::Acquire(m) => {
                let ticket = self.ask(Some(MODELS[m]));
                let deadline = self.world.now + Duration::from_secs(60);
                self.step(Event::Acquire {
                    ticket,
                    model: name(MODELS[m]),
                    deadline,
                });
            }
            Move::Load(m) => {
                let ticket = self.ask(Some(MODELS[m]));
                let deadline = self.world.now + Duration::from_secs(60);
                self.step(Event::Load {
                    ticket,
                    model: name(MODELS[m]),
                    deadline,
                });
            }
            Move::Cancel(nth) => {
                let open = self
                    .asked
                    .keys()
                    .filter(|t| !self.answered.contains(t) && !self.left.contains(t));
                if let Some(ticket) = open.copied().nth(nth) {
                    self.left.insert(ticket);
                    self.step(Event::Cancel { ticket });
                }
            }
            Move::Unload(m) => {
                let ticket = self.ask(None);
                self.step(Event::Unload {
                    ticket,
                    model: name(MODELS[m]),
                });
            }
            Move::Pin(m, pinned) => self.step(Event::Pin {
                model: name(MODELS[m]),
                pinned,
            }),
            Move::Limit(mib) => self.step(Event::Limit {
                domain: Domain::Host,
                limit: Bytes::mib(mib),
            }),
            Move::Configure(m, how) => self.reconfigure(m, how),
            Move::Cleanup(all, force) => {
                let ticket = self.ask(None);
                let order = CleanupOrder {
                    all,
                    force,
                    ..CleanupOrder::default()
                };
                let deadline = self.world.now + Duration::from_secs(30);
                self.step(Event::Cleanup {
                    ticket,
                    order,
                    deadline,
                });
            }
            _ => self.play_machine(made),
        }
    }

    /// What workers, neighbours and time do.
    fn play_machine(&mut self, made: &Move) {
        let phase = |court: &Self, m: usize| {
            let state = court.world.policy.models().get(MODELS[m]);
            state.map_or(Phase::Stopped, |state| state.phase)
        };
        match *made {
            Move::Ready(m) if phase(self, m) == Phase::Starting => {
                let worker = self.world.worker(MODELS[m]);
                self.world.holding.insert(worker.clone());
                self.moving.remove(&worker);
                let activity = Activity {
                    inside: 0,
                    last_left: self.world.now,
                    last_entered: self.world.now,
                };
                self.world.inside.insert(worker.clone(), activity);
                self.step(Event::Ready { worker });
            }
            Move::NeverReady(m) if phase(self, m) == Phase::Starting => {
                let worker = self.world.worker(MODELS[m]);
                let after = Duration::from_secs(120);
                self.step(Event::NeverReady {
                    worker,
                    after,
                    last_lines: Vec::new(),
                });
            }
            Move::Exit(m) if self.live.contains_key(MODELS[m]) => {
                let worker = self.world.worker(MODELS[m]);
                self.live.remove(MODELS[m]);
                self.moving.remove(&worker);
                self.world.holding.remove(&worker);
                self.world.inside.remove(&worker);
                let status = "exit code 1".into();
                self.step(Event::Exited {
                    worker,
                    status,
                    out_of_memory: Vec::new(),
                    last_lines: Vec::new(),
                });
            }
            Move::Leave(m) => {
                let worker = self.world.worker(MODELS[m]);
                let now = self.world.now;
                if let Some(activity) = self.world.inside.get_mut(&worker).filter(|a| a.inside > 0)
                {
                    *activity = Activity {
                        inside: activity.inside - 1,
                        last_left: now,
                        ..*activity
                    };
                    self.step(Event::Tick);
                }
            }
            Move::Enter(m) if phase(self, m) == Phase::Ready => {
                let worker = self.world.worker(MODELS[m]);
                let model = &self.world.policy.models()[MODELS[m]];
                let inside = self.world.inside.get_mut(&worker);
                let inside = inside.expect("a ready worker has a gate");
                // Its gate is held while somebody waits for a place.
                let most = model
                    .spec
                    .concurrency
                    .filter(|most| inside.inside >= most.get());
                if most.is_none() && model.queue.is_empty() {
                    inside.inside += 1;
                }
            }
            Move::Grow(m, mib) => {
                self.world.size.insert(name(MODELS[m]), mib);
            }
            Move::Neighbour(mib) => self.neighbour = mib,
            Move::Late(gpu, mib) => {
                self.world.late.insert(gpu, mib);
            }
            Move::Pass(millis) => {
                self.world.pass(Duration::from_millis(millis));
                self.step(Event::Tick);
            }
            Move::Measure => self.measure(),
            Move::Race => self.race = true,
            _ => {}
        }
    }

    /// Lets everything run out, then every wish must have been answered.
    pub(super) fn close(&mut self) {
        self.race = false;
        self.neighbour = 0;
        self.world.late.clear();
        let until = self.world.now;
        self.step(Event::Shutdown { until });
        for _ in 0..8 {
            for m in 0..MODELS.len() {
                self.play(&Move::Exit(m));
            }
            self.world.pass(Duration::from_secs(100));
            self.measure();
        }
        let open: Vec<_> = self
            .asked
            .keys()
            .filter(|t| !self.answered.contains(t) && !self.left.contains(t))
            .collect();
        assert!(open.is_empty(), "no answer for tickets {open:?}");
    }
}
