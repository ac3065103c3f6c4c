//! Laws of the policy over random event sequences (A15).
//!
//! - charges never exceed a budget by our own choice;
//! - no busy or pinned worker is ended to make room: a busy one is drained, after
//!   somebody has waited for as long as patience is, and ends when it is idle;
//! - no more requests are inside a worker than its model allows;
//! - every wish gets exactly one answer, unless whoever asked left;
//! - waiters of one model are served in the order they came;
//! - no effect names an old generation, and no model has two workers;
//! - one transition at a time on a GPU: nothing starts where something loads or
//!   dies;
//! - nobody is cut because the configuration changed, unless a drain took too
//!   long, and what is no longer configured serves nobody new;
//! - what is explained is what then happens.

mod court;
mod reload;

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

#[derive(Clone, Debug)]
enum Move {
    Acquire(usize),
    Load(usize),
    Cancel(usize),
    Ready(usize),
    NeverReady(usize),
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
    let (granted, refused) = (granted(&effects, TICKET), refused(&effects, TICKET));
    match &told.outlook {
        Outlook::Served => assert!(granted),
        Outlook::Starts => assert!(starts && refused.is_none()),
        Outlook::Refused(refusal) => assert_eq!(refused.as_ref(), Some(refusal)),
        Outlook::Evicts { victims, shortage } => {
            for victim in victims {
                assert!(trial.models()[&victim.model].is_leaving(), "{told:?}");
                let idle_or_busy = [None, Some(Protection::Busy)];
                assert!(idle_or_busy.contains(&victim.protection), "{told:?}");
            }
            assert!(!victims.is_empty() && shortage.need > Bytes::ZERO);
        }
        Outlook::Waits { .. } => assert!(!granted && !starts && refused.is_none(), "{told:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn a15_the_laws_hold_over_random_sequences((policy, patience) in settings(), moves in moves()) {
        let mut court = Court::new(policy, patience);
        for made in &moves {
            court.play(made);
        }
        court.close();
    }

    #[test]
    fn a15_no_waiter_is_stuck_when_everyone_else_goes_home((policy, patience) in settings(), moves in moves()) {
        let mut court = Court::new(policy, patience);
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
        let open = court.asked.keys().filter(|t| !court.answered.contains(t) && !court.left.contains(t)).count();
        prop_assert_eq!(open, 0);
    }

    #[test]
    fn whatever_happened_the_explanation_is_what_then_happens((policy, patience) in settings(), moves in moves()) {
        let mut court = Court::new(policy, patience);
        for made in &moves {
            court.play(made);
            let (Move::Acquire(m) | Move::Ready(m) | Move::Exit(m) | Move::Leave(m)) = made else {
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
            prop_assert!(!told.to_string().is_empty());
            if state.queue.is_empty() {
                holds_true(world, state.name(), &told);
            }
        }
    }
}
