//! Plays random moves on a small world and judges every effect.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test names the moves it plays"
)]

mod play;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::time::Duration;

use super::super::testing::{World, name, spec};
use super::super::*;
use crate::model::GpuRequest;

/// The world, and the book of who asked and was answered.
#[derive(Clone)]
pub(super) struct Court {
    pub(super) world: World,
    pub(super) neighbour: u64,
    /// The next eviction finds somebody inside.
    pub(super) race: bool,
    /// How long whoever asks waits.
    pub(super) gives_up: Duration,
    /// What the policy did since somebody last looked, for whoever wants to know.
    pub(super) journal: Option<Vec<Effect>>,
    pub(super) asked: BTreeMap<Ticket, Option<String>>,
    pub(super) answered: BTreeSet<Ticket>,
    pub(super) left: BTreeSet<Ticket>,
    /// What the configuration says of each model, or said last.
    pub(super) specs: Vec<ModelSpec>,
    /// The processes there are.
    pub(super) live: BTreeMap<ModelName, u64>,
    /// Workers that were told to drain.
    pub(super) draining: BTreeSet<WorkerId>,
    /// Since when the first waiter of each model has waited, after each step.
    waits: BTreeMap<ModelName, Timestamp>,
    /// Workers that load or die.
    pub(super) moving: BTreeSet<WorkerId>,
    /// How much higher limits on host RAM are than moves say, in MiB, so that
    /// there is room for parks.
    pub(super) higher: u64,
    /// Workers that left their park.
    pub(super) unparks: u64,
}

impl Court {
    /// Four models on a machine with two GPUs, with room for some of them.
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
        Self {
            specs,
            ..Self::over(world)
        }
    }

    /// Judges what happens in this world from now on.
    pub(super) fn over(world: World) -> Self {
        let mut court = Self {
            world,
            neighbour: 0,
            race: false,
            gives_up: Duration::from_secs(60),
            journal: None,
            asked: BTreeMap::new(),
            answered: BTreeSet::new(),
            left: BTreeSet::new(),
            specs: Vec::new(),
            live: BTreeMap::new(),
            draining: BTreeSet::new(),
            waits: BTreeMap::new(),
            moving: BTreeSet::new(),
            higher: 0,
            unparks: 0,
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
            assert_eq!(policy.check(), Ok(()), "between two steps");
            if let Some(journal) = &mut self.journal {
                journal.extend(effects.iter().cloned());
            }
            let first = |m: &ModelState| Some((m.name().clone(), m.queue.front()?.since));
            self.waits = policy.models().values().filter_map(first).collect();
            // Who is promised more than it holds takes room by our own choice.
            let takers = effects.iter().filter_map(|effect| match effect {
                Effect::Spawn { worker, .. }
                | Effect::Park { worker, .. }
                | Effect::Unpark { worker, .. } => policy.models().get(&worker.model),
                _ => None,
            });
            let takers: Vec<_> = takers.collect();
            for (domain, books) in policy.domains() {
                let takes = |m: &&ModelState| m.outstanding(*domain) > Bytes::ZERO;
                assert!(
                    !takers.iter().any(takes) || policy.charged(*domain) <= books.limit,
                    "charges over the limit of {domain} by our own choice: {effects:?}"
                );
            }
            for effect in effects {
                todo.extend(self.judge(effect));
            }
        }
    }

    fn judge(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Grant { ticket, worker } => {
                self.answer(ticket);
                let model = worker.model.as_str();
                let waits_longer =
                    |t: &Ticket| *t < ticket && self.asked[t].as_deref() == Some(model);
                let passed = self.open().find(waits_longer);
                assert_eq!(passed, None, "who came later for {model} is served first");
                assert_eq!(self.live.get(&worker.model), Some(&worker.generation));
                let inside = self.world.inside.get_mut(&worker);
                let inside = inside.expect("only ready workers are granted");
                inside.inside += 1;
                inside.last_entered = self.world.now;
                let most = self.world.policy.models()[&worker.model].spec.concurrency;
                assert!(most.is_none_or(|most| inside.inside <= most.get()));
            }
            Effect::Done { ticket }
            | Effect::Reject { ticket, .. }
            | Effect::CleanedUp { ticket, .. } => {
                self.answer(ticket);
            }
            Effect::Spawn { worker, gpus, .. } => self.judge_spawn(worker, gpus),
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
            park => return self.judge_park(park),
        }
        None
    }

    fn judge_spawn(&mut self, worker: WorkerId, gpus: Vec<u32>) {
        let wanted = self.world.policy.models()[&worker.model].spec.gpus.count();
        assert_eq!(gpus.len(), wanted, "{worker} on {gpus:?}");
        self.judge_gpus(&worker, &gpus);
        self.world.placed.insert(worker.clone(), gpus);
        self.moving.insert(worker.clone());
        let before = self.live.insert(worker.model.clone(), worker.generation);
        assert_eq!(before, None, "{worker} is a second worker of its model");
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
    pub(super) fn judge_gpus(&self, worker: &WorkerId, gpus: &[u32]) {
        for other in &self.moving {
            let theirs = self.world.placed.get(other).into_iter().flatten();
            let shared = theirs.filter(|gpu| gpus.contains(gpu)).count();
            assert_eq!(shared, 0, "{worker} starts where {other} moves");
        }
    }

    pub(super) fn judge_generation(&self, worker: &WorkerId) {
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

    /// Returns the tickets that have no answer yet and whose owners wait.
    pub(super) fn open(&self) -> impl Iterator<Item = Ticket> {
        let waits = |t: &&Ticket| !self.answered.contains(t) && !self.left.contains(t);
        self.asked.keys().filter(waits).copied()
    }

    fn ask(&mut self, model: Option<&str>) -> Ticket {
        let ticket = self.world.ticket();
        self.asked.insert(ticket, model.map(str::to_owned));
        ticket
    }
}
