//! Busy workers that are drained, and who comes back.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test picks the few effects it looks for"
)]

use std::time::Duration;

use super::super::testing::{World, drained, gone, granted, name, refused, spawned, spec};
use super::super::*;

fn resumed(effects: &[Effect]) -> Vec<String> {
    let of = |effect: &Effect| match effect {
        Effect::Resume { worker } => Some(worker.model.to_string()),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

fn tick_after(world: &mut World, millis: u64) -> Vec<Effect> {
    world.pass(Duration::from_millis(millis));
    world.step(Event::Tick)
}

/// Room for one of two; `a` is busy and `b` has waited out its patience.
fn a_drains_for_b() -> (World, Ticket) {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.acquire("a");
    world.ready("a");
    let (waiter, effects) = world.acquire("b");
    assert!(drained(&effects).is_empty() && gone(&effects).is_empty());
    let wake = world.policy.next_wake().expect("patience ends");
    assert_eq!(wake.since(world.now), Duration::from_secs(5));
    assert!(drained(&tick_after(&mut world, 4_999)).is_empty());
    assert_eq!(drained(&tick_after(&mut world, 1)), ["a"]);
    (world, waiter)
}

#[test]
fn a33_a_waiter_that_lost_patience_gets_the_room_of_a_busy_worker_when_it_is_done() {
    let (mut world, waiter) = a_drains_for_b();
    // A request for the draining model queues for its next life.
    let (late, effects) = world.acquire("a");
    assert!(!granted(&effects, late));
    // Requests inside finish, however long they take.
    assert!(gone(&tick_after(&mut world, 50_000)).is_empty());
    let effects = world.leave("a");
    assert_eq!(gone(&effects), ["a"]);
    assert_eq!(spawned(&world.exit("a")), ["b"]);
    assert!(granted(&world.ready("b"), waiter));
    // And then it is the other's turn, after as much patience.
    assert_eq!(world.policy.models()["a"].queue.len(), 1);
    world.leave("b");
    assert_eq!(spawned(&world.exit("b")), ["a"]);
    assert!(granted(&world.ready("a"), late));
}

#[test]
fn a_drain_is_called_off_when_whoever_waited_has_left_and_the_queue_is_served() {
    let (mut world, waiter) = a_drains_for_b();
    let (late, _) = world.acquire("a");
    let effects = world.step(Event::Cancel { ticket: waiter });
    assert_eq!(resumed(&effects), ["a"]);
    assert!(granted(&effects, late));
    assert_eq!(world.policy.models()["a"].phase, Phase::Ready);
    assert!(gone(&world.leave("a")).is_empty());
}

#[test]
fn a_drain_is_called_off_when_the_wait_is_over() {
    let (mut world, waiter) = a_drains_for_b();
    let effects = tick_after(&mut world, 60_000);
    assert!(matches!(
        refused(&effects, waiter),
        Some(Refusal::NoRoom { .. })
    ));
    assert_eq!(resumed(&effects), ["a"]);
}

#[test]
fn an_idle_worker_goes_in_place_of_one_that_still_drains() {
    let mut world = World::new(1300, &[("a", 600), ("b", 600), ("c", 600)]);
    for model in ["a", "b"] {
        world.acquire(model);
        world.ready(model);
    }
    world.acquire("c");
    // The one that was used longest ago is the first to go.
    assert_eq!(drained(&tick_after(&mut world, 5_000)), ["a"]);
    let effects = world.leave("b");
    assert_eq!(gone(&effects), ["b"]);
    let effects = world.exit("b");
    assert_eq!(spawned(&effects), ["c"]);
    assert_eq!(resumed(&effects), ["a"]);
}

#[test]
fn idle_workers_of_the_set_stay_until_the_busy_ones_are_done() {
    let mut world = World::new(1000, &[("idle", 400), ("busy", 500), ("big", 900)]);
    world.use_once("idle");
    world.acquire("busy");
    world.ready("busy");
    world.acquire("big");
    let effects = tick_after(&mut world, 5_000);
    assert_eq!(
        (drained(&effects), gone(&effects)),
        (vec!["busy".into()], vec![])
    );
    assert!(gone(&tick_after(&mut world, 1_000)).is_empty());
    // Now both are wanted.
    let effects = world.leave("busy");
    assert_eq!(gone(&effects), ["busy", "idle"]);
}

/// Two busy workers, and two more models that have waited out their patience.
fn two_wait_for_two() -> (World, [Ticket; 2]) {
    let mut world = World::new(1000, &[("a", 500), ("b", 500), ("c", 500), ("d", 500)]);
    world.policy.settings.patience = Duration::from_secs(2);
    for model in ["a", "b"] {
        world.acquire(model);
        world.ready(model);
        world.pass(Duration::from_millis(10));
    }
    let waiters = [world.acquire("c").0, world.acquire("d").0];
    // Whoever was asked for the longest ago, for whoever waits the longest.
    assert_eq!(drained(&tick_after(&mut world, 2_000)), ["a"]);
    (world, waiters)
}

#[test]
fn one_set_drains_at_a_time_and_the_next_when_that_is_done() {
    let (mut world, [c, d]) = two_wait_for_two();
    assert!(drained(&tick_after(&mut world, 10_000)).is_empty());
    // Now it is the turn of `d`, which has waited long enough.
    let effects = world.leave("a");
    assert_eq!(
        (gone(&effects), drained(&effects)),
        (vec!["a".into()], vec!["b".into()])
    );
    assert_eq!(spawned(&world.exit("a")), ["c"]);
    assert!(granted(&world.ready("c"), c));
    world.leave("b");
    assert_eq!(spawned(&world.exit("b")), ["d"]);
    assert!(granted(&world.ready("d"), d));
}

#[test]
fn a_drain_that_takes_long_does_not_hold_up_the_next_for_ever() {
    let (mut world, [_, d]) = two_wait_for_two();
    let turn = world.now + Duration::from_secs(24);
    assert_eq!(world.policy.next_wake(), Some(turn));
    assert!(drained(&tick_after(&mut world, 23_999)).is_empty());
    assert_eq!(drained(&tick_after(&mut world, 1)), ["b"]);
    world.leave("b");
    // The room goes to whoever waited longer, and the other drain to the next.
    assert_eq!(spawned(&world.exit("b")), ["c"]);
    assert_eq!(world.policy.models()["a"].drains_for(), Some(&name("d")));
    assert!(!granted(&world.ready("c"), d));
    world.leave("a");
    assert_eq!(spawned(&world.exit("a")), ["d"]);
}

#[test]
fn what_only_the_configuration_wants_drains_nobody() {
    let mut preloaded = spec("b", Some(600));
    preloaded.preload = true;
    let specs = vec![spec("a", Some(600)), preloaded];
    let mut world = World::with(1000, specs, &[("a", 600), ("b", 600)]);
    world.ready("b");
    world.acquire("a");
    world.exit("b");
    world.ready("a");
    for _ in 0..10 {
        let effects = tick_after(&mut world, 10_000);
        assert!(drained(&effects).is_empty() && gone(&effects).is_empty());
    }
}

#[test]
fn an_operator_who_unloads_a_draining_worker_gets_his_answer_whoever_leaves() {
    let (mut world, waiter) = a_drains_for_b();
    let ticket = world.ticket();
    world.step(Event::Unload {
        ticket,
        model: name("a"),
    });
    let effects = world.step(Event::Cancel { ticket: waiter });
    assert!(resumed(&effects).is_empty());
    world.leave("a");
    let effects = world.exit("a");
    assert!(effects.contains(&Effect::Done { ticket }), "{effects:?}");
}

#[test]
fn a_victim_of_a_load_that_failed_is_loaded_again() {
    let mut world = World::new(1000, &[("good", 600), ("broken", 600)]);
    world.use_once("good");
    world.acquire("broken");
    world.exit("good");
    assert_eq!(spawned(&world.exit("broken")), ["good"]);
}

#[test]
fn a_victim_that_nobody_used_for_long_stays_away() {
    let mut world = World::new(1000, &[("good", 600), ("broken", 600)]);
    world.use_once("good");
    world.pass(Duration::from_secs(600));
    world.acquire("broken");
    world.exit("good");
    assert!(spawned(&world.exit("broken")).is_empty());
}

#[test]
fn by_cost_the_worker_that_loads_fast_goes_before_an_older_one_that_loads_slowly() {
    for (policy, first) in [
        (EvictionPolicy::Cost, "fast"),
        (EvictionPolicy::Lru, "slow"),
    ] {
        let mut world = World::new(1300, &[("slow", 600), ("fast", 600), ("new", 600)]);
        world.policy.settings.eviction = policy;
        world.acquire("slow");
        world.pass(Duration::from_secs(120));
        world.ready("slow");
        world.leave("slow");
        world.use_once("fast");
        world.pass(Duration::from_secs(20));
        let (_, effects) = world.acquire("new");
        assert_eq!(gone(&effects), [first]);
    }
}

/// As soon as a busy worker drained, a younger waiter used to start in room that
/// was coming for an older one, who then had to wait for that drain.
#[test]
fn a_drain_does_not_let_a_younger_waiter_take_what_an_older_one_surely_gets() {
    let sizes = [("a", 300), ("big", 620), ("small", 190), ("u", 280)];
    let mut world = World::new(1000, &sizes);
    for model in ["a", "u"] {
        world.acquire(model);
        world.ready(model);
    }
    let (older, _) = world.acquire("big");
    world.step(Event::Unload {
        ticket: 99,
        model: name("u"),
    });
    // What is there and what u gives back suffice for big, and for no more.
    world.acquire("small");
    assert_eq!(drained(&tick_after(&mut world, 5_000)), ["a"]);
    assert_eq!(spawned(&tick_after(&mut world, 1)), [] as [&str; 0]);
    assert_eq!(gone(&world.leave("u")), ["u"]);
    assert_eq!(spawned(&world.exit("u")), ["big"]);
    assert!(granted(&world.ready("big"), older));
}
