//! Plays long random sequences to both, and holds their deeds side by side.

use std::num::NonZeroU32;
use std::time::Duration;

use proptest::prelude::*;

use super::super::super::testing::{World, spec};
use super::super::super::*;
use super::super::court::Court;
use super::super::{MODELS, Move};
use super::{Deed, Life, Model, Naive};

const GIVES_UP: Duration = Duration::from_secs(20);
const LIMIT: u64 = 1000;

/// One model: its size in MiB, and how many requests its worker takes at once.
type Shape = (u64, Option<u32>);

#[derive(Clone, Copy, Debug)]
enum Both {
    Request(usize),
    SlipIn(usize),
    Load(usize),
    Gone(usize),
    Unload(usize),
    Pin(usize, bool),
    Ready(usize),
    Ends(usize),
    Leaves(usize),
    Time(u64),
}

/// What is played: models, patience in seconds, and what happens.
fn plays() -> impl Strategy<Value = (Vec<Shape>, u64, Vec<Both>)> {
    let at_once = prop_oneof![3 => Just(None), 1 => (1..3_u32).prop_map(Some)];
    let shape = (50..750_u64, at_once);
    let model = 0..MODELS.len();
    let one = prop_oneof![
        8 => model.clone().prop_map(Both::Request),
        2 => model.clone().prop_map(Both::SlipIn),
        1 => model.clone().prop_map(Both::Load),
        1 => (0..8_usize).prop_map(Both::Gone),
        1 => model.clone().prop_map(Both::Unload),
        1 => (model.clone(), prop::bool::weighted(0.3)).prop_map(|(m, on)| Both::Pin(m, on)),
        8 => model.clone().prop_map(Both::Ready),
        8 => model.clone().prop_map(Both::Ends),
        8 => model.prop_map(Both::Leaves),
        5 => (1..4000_u64).prop_map(Both::Time),
        1 => (4000..40_000_u64).prop_map(Both::Time),
    ];
    let shapes = prop::collection::vec(shape, MODELS.len());
    (shapes, 0..8_u64, prop::collection::vec(one, 1..500))
}

/// The policy in its world, and the naive rules beside it.
struct Pair {
    court: Court,
    naive: Naive,
}

impl Pair {
    fn new(shapes: &[Shape], patience: Duration) -> Self {
        let sizes: Vec<_> = MODELS
            .into_iter()
            .zip(shapes.iter().map(|(size, _)| *size))
            .collect();
        let specs = MODELS
            .into_iter()
            .zip(shapes)
            .map(|(model, (size, at_once))| ModelSpec {
                concurrency: at_once.and_then(NonZeroU32::new),
                ..spec(model, Some(*size))
            });
        let mut world = World::with(LIMIT, specs.collect(), &sizes);
        world.policy.settings.patience = patience;
        let now = world.now;
        let mut court = Court::over(world);
        court.gives_up = GIVES_UP;
        court.journal = Some(Vec::new());
        let model = |(size, at_once): &Shape| Model {
            size: *size,
            at_once: *at_once,
            pinned: false,
            life: Life::Gone,
            inside: 0,
            used: now,
            asked: now,
            line: Vec::new(),
            operators: Vec::new(),
        };
        let naive = Naive {
            limit: LIMIT,
            patience,
            gives_up: GIVES_UP,
            models: shapes.iter().map(model).collect(),
            now,
            deeds: Vec::new(),
        };
        Self { court, naive }
    }

    fn play_all(&mut self, plays: impl IntoIterator<Item = Both>) {
        plays.into_iter().for_each(|both| self.play(both));
    }

    fn play(&mut self, both: Both) {
        self.court.world.pass(Duration::from_millis(1));
        self.naive.now = self.court.world.now;
        match both {
            Both::Request(m) => {
                self.court.play(&Move::Acquire(m));
                self.naive.ask(m, self.newest(), true);
            }
            Both::Load(m) => {
                self.court.play(&Move::Load(m));
                self.naive.ask(m, self.newest(), false);
            }
            Both::SlipIn(m) => {
                self.court.play(&Move::Enter(m));
                self.naive.slips_in(m);
            }
            Both::Gone(nth) => {
                let ticket = self.court.open().nth(nth);
                if let Some(ticket) = ticket {
                    self.court.play(&Move::Cancel(nth));
                    self.naive.gone(ticket);
                }
            }
            Both::Unload(m) => {
                self.court.play(&Move::Unload(m));
                self.naive.unload(m, self.newest());
            }
            Both::Pin(m, pinned) => {
                self.court.play(&Move::Pin(m, pinned));
                self.naive.pin(m, pinned);
            }
            Both::Ready(m) if self.naive.models[m].life == Life::Loading => {
                self.court.play(&Move::Ready(m));
                self.naive.ready(m);
                self.measure();
                self.naive.look();
            }
            Both::Ends(m) if self.naive.models[m].life == Life::Ending => {
                self.court.play(&Move::Exit(m));
                self.naive.look();
                self.measure();
                self.naive.bytes_are_back(m);
            }
            Both::Leaves(m) if self.naive.models[m].inside > 0 => {
                self.court.play(&Move::Leave(m));
                self.wake();
                self.naive.leaves(m);
            }
            Both::Time(millis) => self.pass(Duration::from_millis(millis)),
            Both::Ready(_) | Both::Ends(_) | Both::Leaves(_) => {}
        }
        self.compare(both);
        self.settle(both);
    }

    /// What is decided may itself make something possible: a pinned model that
    /// starts leaves no room for another to wait for. That is done at the next
    /// measurement, and then nothing is left to do.
    fn settle(&mut self, both: Both) {
        for _ in 0..MODELS.len() {
            let mut trial = self.naive.clone();
            trial.look();
            if trial.deeds.is_empty() {
                return;
            }
            self.measure();
            self.naive.look();
            self.compare(both);
        }
        panic!("the rules come to no rest after {both:?}");
    }

    fn newest(&self) -> Ticket {
        *self.court.asked.keys().next_back().expect("somebody asked")
    }

    fn measure(&mut self) {
        self.court.measure();
        self.naive.now = self.court.world.now;
    }

    /// Wakes the policy where it wants that by now. It does not hear of everybody
    /// who leaves, and what is due at that very moment is done all the same.
    fn wake(&mut self) {
        let wake = self.court.world.policy.next_wake();
        if wake.is_some_and(|at| at <= self.court.world.now) {
            self.court.step(Event::Tick);
        }
    }

    /// Lets time pass: the policy is woken when it wants to be, and no sooner.
    fn pass(&mut self, time: Duration) {
        let until = self.court.world.now + time;
        loop {
            let wake = self.court.world.policy.next_wake();
            let due = wake.into_iter().chain(self.naive.next_moment()).min();
            let Some(due) = due.filter(|at| *at <= until) else {
                break;
            };
            self.court.world.now = self.court.world.now.max(due);
            self.naive.now = self.court.world.now;
            self.wake();
            self.naive.look();
            self.compare(Both::Time(0));
            self.settle(Both::Time(0));
        }
        self.court.world.now = until;
        self.naive.now = until;
    }

    /// The same answers, ends, drains and starts, and starts in the same order.
    /// What else happens at one moment happens in no order that anybody sees.
    fn compare(&mut self, both: Both) {
        let effects = self.court.journal.replace(Vec::new()).unwrap_or_default();
        let mut told: Vec<_> = effects.iter().filter_map(deed).collect();
        let mut expected = std::mem::take(&mut self.naive.deeds);
        let starts = |deeds: &[Deed]| -> Vec<Deed> {
            let is_start = |deed: &&Deed| matches!(deed, Deed::Start(_));
            deeds.iter().filter(is_start).cloned().collect()
        };
        assert_eq!(starts(&told), starts(&expected), "starts after {both:?}");
        told.sort();
        expected.sort();
        assert_eq!(told, expected, "policy, and naive rules, after {both:?}");
    }
}

fn deed(effect: &Effect) -> Option<Deed> {
    let index = |worker: &WorkerId| {
        let mut names = MODELS.into_iter();
        names
            .position(|name| name == worker.model.as_str())
            .expect("one of the models")
    };
    match effect {
        Effect::Grant { ticket, worker } => Some(Deed::Enters(*ticket, index(worker))),
        Effect::Done { ticket } => Some(Deed::Done(*ticket)),
        Effect::Reject { ticket, .. } => Some(Deed::Refused(*ticket)),
        Effect::Spawn { worker, .. } => Some(Deed::Start(index(worker))),
        Effect::Evict { worker, .. } | Effect::Terminate { worker, .. } => {
            Some(Deed::End(index(worker)))
        }
        Effect::Drain { worker, .. } => Some(Deed::Drain(index(worker))),
        Effect::Resume { worker } => Some(Deed::Reopen(index(worker))),
        Effect::Park { .. } | Effect::Unpark { .. } | Effect::Forget { .. } => {
            unreachable!("no model parks or is removed here: {effect:?}")
        }
        Effect::CleanedUp { .. }
        | Effect::Parked { .. }
        | Effect::Reclaimed { .. }
        | Effect::Learn { .. }
        | Effect::Prefetch { .. }
        | Effect::CallOff { .. }
        | Effect::Finished => None,
    }
}

/// A model that waits for room when a pinned one takes it for good: who waited
/// was refused a measurement later than by the naive rules, and may be.
#[test]
fn what_a_decision_makes_impossible_is_told_at_the_next_measurement() {
    let shapes = [(262, None), (739, None), (50, None), (262, None)];
    let mut pair = Pair::new(&shapes, Duration::from_secs(1));
    let plays = [
        Both::Request(3),
        Both::Pin(0, true),
        Both::Request(1),
        Both::Time(997),
        Both::Request(1),
        Both::Request(0),
        Both::Time(998),
    ];
    pair.play_all(plays);
    assert_eq!(
        pair.court.open().count(),
        2,
        "those for the models that load"
    );
}

/// A request left in the millisecond in which another had waited to its deadline.
/// The policy does not hear of that one, and the comparison did not wake it: only
/// the naive rules refused. Every move takes a millisecond.
#[test]
fn who_waits_to_the_moment_in_which_another_leaves_is_refused_then() {
    let shapes = [(50, None); MODELS.len()];
    let mut pair = Pair::new(&shapes, Duration::from_secs(5));
    let plays = [
        Both::Request(2),
        Both::Ready(2),
        Both::Request(0),
        Both::Time(19_998),
    ];
    pair.play_all(plays);
    assert_eq!(pair.court.open().count(), 1, "one millisecond is left");
    pair.play(Both::Leaves(2));
    assert_eq!(pair.court.open().count(), 0, "its time is over");
}

/// The same with patience, where one of two leaves and the gate is not empty.
#[test]
fn patience_that_ends_in_the_moment_in_which_another_leaves_ends_then() {
    let shapes = [(600, None); MODELS.len()];
    let mut pair = Pair::new(&shapes, Duration::from_secs(5));
    let plays = [
        Both::Request(0),
        Both::Ready(0),
        Both::Request(0),
        Both::Request(1),
        Both::Time(4998),
    ];
    pair.play_all(plays);
    assert_eq!(pair.naive.models[0].life, Life::Ready, "still patient");
    pair.play(Both::Leaves(0));
    let life = pair.naive.models[0].life;
    assert!(matches!(life, Life::DrainsFor(1, _)), "{life:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn a15_the_policy_does_what_the_naive_rules_say((shapes, patience, plays) in plays()) {
        let mut pair = Pair::new(&shapes, Duration::from_secs(patience));
        pair.play_all(plays);
    }
}
