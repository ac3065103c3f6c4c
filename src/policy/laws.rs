//! Laws of the policy over random event sequences (A15).
//!
//! - charges never exceed a budget by our own choice;
//! - no busy or pinned worker is ended to make room: a busy one is drained, after
//!   somebody has waited for as long as patience is, and ends when it is idle;
//! - no more requests are inside a worker than its model allows;
//! - every wish gets exactly one answer, unless whoever asked left;
//! - waiters of one model are served in the order they came;
//! - no effect names an old generation, and no model has two workers;
//! - one transition at a time on a GPU: nothing starts or leaves its park where
//!   something loads, dies or moves;
//! - nobody is parked that cannot be, or that is pinned or busy;
//! - nobody is cut because the configuration changed, unless a drain took too
//!   long, and what is no longer configured serves nobody new;
//! - what comes late of an old life changes nothing;
//! - what is explained is what then happens.
//!
//! `space` holds them in every state that small worlds can get into, and
//! `naive` tells the rules once more, to compare with.

mod court;
mod digest;
mod naive;
mod parks;
mod reload;
mod space;

use std::time::Duration;

use court::Court;
use proptest::prelude::*;
use reload::How;

use super::testing::{World, granted, refused};
use super::*;

const MODELS: [&str; 4] = ["a", "b", "c", "d"];

/// What the policy is set to.
fn settings() -> impl Strategy<Value = (EvictionPolicy, Duration)> {
    let policy = prop::sample::select(EvictionPolicy::ALL.to_vec());
    (policy, (0..8_u64).prop_map(Duration::from_secs))
}

/// A world in which nobody can be parked, or one in which many can.
fn court(parks: bool, (policy, patience): (EvictionPolicy, Duration)) -> Court {
    let court = Court::new(policy, patience);
    match parks {
        true => court.where_models_park(),
        false => court,
    }
}

#[derive(Clone, Debug)]
enum Move {
    Acquire(usize),
    Load(usize),
    Cancel(usize),
    Ready(usize),
    NeverReady(usize),
    /// A worker that parks or unparks has done so.
    Moved(usize),
    /// It says it is parked and holds as much as before.
    Pretends(usize),
    ParkFails(usize),
    /// A ready worker turns out to be of no use.
    Unhealthy(usize),
    Exit(usize),
    Leave(usize),
    /// A request comes in by the gate alone, as the proxy's fast path does.
    Enter(usize),
    Unload(usize),
    Pin(usize, bool),
    Limit(u64),
    /// The configuration of a model changes.
    Configure(usize, How),
    Grow(usize, u64),
    Neighbour(u64),
    /// A driver is slow to give this much of a GPU back.
    Late(u32, u64),
    Cleanup(bool, bool),
    Pass(u64),
    Measure,
    /// The next eviction finds somebody inside.
    Race,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let model = 0..MODELS.len();
    let how = prop_oneof![
        (0..4_u32).prop_map(How::Live),
        Just(How::Worker),
        Just(How::Gone),
    ];
    let one = prop_oneof![
        6 => model.clone().prop_map(Move::Acquire),
        1 => model.clone().prop_map(Move::Load),
        1 => (0..20_usize).prop_map(Move::Cancel),
        6 => model.clone().prop_map(Move::Ready),
        1 => model.clone().prop_map(Move::NeverReady),
        5 => model.clone().prop_map(Move::Moved),
        1 => model.clone().prop_map(Move::Pretends),
        1 => model.clone().prop_map(Move::ParkFails),
        1 => model.clone().prop_map(Move::Unhealthy),
        5 => model.clone().prop_map(Move::Exit),
        6 => model.clone().prop_map(Move::Leave),
        2 => model.clone().prop_map(Move::Enter),
        1 => model.clone().prop_map(Move::Unload),
        1 => (model.clone(), any::<bool>()).prop_map(|(m, on)| Move::Pin(m, on)),
        1 => (200..2000_u64).prop_map(Move::Limit),
        1 => (model.clone(), how).prop_map(|(m, how)| Move::Configure(m, how)),
        1 => (model, 50..900_u64).prop_map(|(m, size)| Move::Grow(m, size)),
        1 => (0..15_000_u64).prop_map(Move::Neighbour),
        1 => (0..2_u32, 0..1500_u64).prop_map(|(gpu, mib)| Move::Late(gpu, mib)),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(all, force)| Move::Cleanup(all, force)),
        3 => (1..20_000_u64).prop_map(Move::Pass),
        6 => Just(Move::Measure),
        1 => Just(Move::Race),
    ];
    prop::collection::vec(one, 1..120)
}

/// Moves among which models find each other on the GPUs, are parked and come back.
fn park_moves() -> impl Strategy<Value = Vec<Move>> {
    let model = 0..MODELS.len();
    let one = prop_oneof![
        8 => model.clone().prop_map(Move::Acquire),
        1 => (0..20_usize).prop_map(Move::Cancel),
        8 => model.clone().prop_map(Move::Ready),
        10 => model.clone().prop_map(Move::Moved),
        1 => model.clone().prop_map(Move::Pretends),
        1 => model.clone().prop_map(Move::ParkFails),
        6 => model.clone().prop_map(Move::Exit),
        12 => model.clone().prop_map(Move::Leave),
        1 => model.clone().prop_map(Move::Unload),
        1 => (model, prop::bool::weighted(0.2)).prop_map(|(m, on)| Move::Pin(m, on)),
        1 => (200..2000_u64).prop_map(Move::Limit),
        1 => (0..2_u32, 0..1500_u64).prop_map(|(gpu, mib)| Move::Late(gpu, mib)),
        1 => (1..4_000_u64).prop_map(Move::Pass),
        10 => Just(Move::Measure),
        1 => Just(Move::Race),
    ];
    prop::collection::vec(one, 40..200)
}

/// Asks a copy of the policy and holds what happens against what was told.
fn holds_true(world: &World, model: &ModelName, told: &Explanation) {
    const TICKET: Ticket = 1 << 40;
    let mut trial = world.policy.clone();
    let effects = trial.step(
        world.now,
        Event::Acquire {
            ticket: TICKET,
            model: model.clone(),
            deadline: world.now + Duration::from_secs(60),
        },
    );
    let starts = trial.models()[model].phase == Phase::Starting;
    let unparks = trial.models()[model].phase == Phase::Unparking;
    let (granted, refused) = (granted(&effects, TICKET), refused(&effects, TICKET));
    match &told.outlook {
        Outlook::Served => assert!(granted),
        Outlook::Starts => assert!(starts && refused.is_none()),
        Outlook::Unparks => assert!(unparks && refused.is_none()),
        Outlook::Refused(refusal) => assert_eq!(refused.as_ref(), Some(refusal)),
        Outlook::Evicts { victims, shortage } => {
            for victim in victims {
                let model = &trial.models()[&victim.model];
                let parks = victim.parks && model.phase == Phase::Parking;
                assert!(parks || model.is_leaving(), "{told:?}");
                let idle_or_busy = [None, Some(Protection::Busy)];
                assert!(idle_or_busy.contains(&victim.protection), "{told:?}");
            }
            assert!(!victims.is_empty() && shortage.need > Bytes::ZERO);
        }
        Outlook::Waits { .. } => {
            assert!(
                !granted && !starts && !unparks && refused.is_none(),
                "{told:?}"
            );
        }
    }
}

#[test]
fn a15_the_laws_hold_where_models_park_and_come_back() {
    let unparks = std::cell::Cell::new(0);
    let config = ProptestConfig {
        cases: 300,
        source_file: Some(file!()),
        ..ProptestConfig::default()
    };
    proptest!(config, |(settings in settings(), moves in park_moves())| {
        let mut court = court(true, settings);
        for made in &moves {
            court.play(&court.aim(made));
        }
        unparks.set(unparks.get() + court.unparks);
        court.close();
    });
    assert!(
        unparks.get() > 40,
        "hardly anything came back: {}",
        unparks.get()
    );
}

/// What a copy of the policy does about an event, and what it is then.
fn comes_to(world: &World, event: Event) -> (Vec<Effect>, String) {
    let mut trial = world.policy.clone();
    let effects = trial.step(world.now, event);
    (effects, format!("{trial:?}"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn a15_what_comes_late_of_an_old_life_changes_nothing((policy, patience) in settings(), moves in moves()) {
        let mut court = Court::new(policy, patience);
        for made in &moves {
            court.play(made);
            let (Move::Acquire(m) | Move::Ready(m) | Move::Exit(m) | Move::Unload(m)) = made else {
                continue;
            };
            let mut worker = court.world.worker(MODELS[*m]);
            if worker.generation < 2 {
                continue;
            }
            worker.generation -= 1;
            let nothing = comes_to(&court.world, Event::Tick);
            let (after, inside, last_lines) = (Duration::from_secs(9), 1, Vec::new());
            let late = [
                Event::Ready { worker: worker.clone() },
                Event::NeverReady { worker: worker.clone(), after, last_lines: last_lines.clone() },
                Event::EvictRefused { worker: worker.clone(), inside },
                Event::Exited { worker, status: "late".into(), out_of_memory: Vec::new(), last_lines },
            ];
            for event in late {
                prop_assert_eq!(&comes_to(&court.world, event), &nothing);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn a15_the_laws_hold_over_random_sequences(parks: bool, settings in settings(), moves in moves()) {
        let mut court = court(parks, settings);
        for made in &moves {
            court.play(made);
        }
        court.close();
    }

    #[test]
    fn a15_no_waiter_is_stuck_when_everyone_else_goes_home(parks: bool, settings in settings(), moves in moves()) {
        let mut court = court(parks, settings);
        for made in &moves {
            court.play(made);
        }
        // Nobody new comes, workers do what they are told: within the time
        // that a request may wait everyone has an answer.
        court.race = false;
        court.neighbour = 0;
        court.world.late.clear();
        for _ in 0..40 {
            for (m, model) in MODELS.into_iter().enumerate() {
                court.play(&Move::Ready(m));
                court.play(&Move::Moved(m));
                while court.world.inside.get(&court.world.worker(model)).is_some_and(|a| a.inside > 0) {
                    court.play(&Move::Leave(m));
                }
                let state = court.world.policy.models().get(model);
                if state.is_some_and(|state| state.phase == Phase::Stopping) {
                    court.play(&Move::Exit(m));
                }
            }
            court.world.pass(Duration::from_secs(3));
            court.measure();
        }
        let open = court.open().count();
        prop_assert_eq!(open, 0);
    }

    #[test]
    fn whatever_happened_the_explanation_is_what_then_happens(parks: bool, settings in settings(), moves in moves()) {
        let mut court = court(parks, settings);
        for made in &moves {
            court.play(made);
            let (Move::Acquire(m) | Move::Ready(m) | Move::Moved(m) | Move::Exit(m) | Move::Leave(m)) = made else {
                continue;
            };
            let world = &court.world;
            let known = world.policy.models().get(MODELS[*m]);
            let Some(state) = known.filter(|state| !state.removed) else {
                continue;
            };
            let told = world.policy.explain(state.name(), world.now).expect("it is configured");
            prop_assert_eq!(told.why == Why::Ready, state.phase == Phase::Ready);
            prop_assert_eq!(told.why == Why::Loading, state.phase == Phase::Starting);
            prop_assert_eq!(told.why == Why::Parked, state.phase == Phase::Parked);
            prop_assert!(!told.to_string().is_empty());
            if state.queue.is_empty() {
                holds_true(world, state.name(), &told);
            }
        }
    }
}
