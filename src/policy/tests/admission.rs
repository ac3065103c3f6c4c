//! Who is let in: loads, room, victims, refusals.

use std::time::Duration;

use super::super::testing::{World, gone, granted, name, refused, spawned, spec};
use super::super::*;

#[test]
fn a_request_for_a_stopped_model_loads_it_and_is_granted_when_it_is_ready() {
    let mut world = World::new(1000, &[("a", 400)]);
    let (ticket, effects) = world.acquire("a");
    assert_eq!(spawned(&effects), ["a"]);
    assert!(!granted(&effects, ticket));
    let effects = world.ready("a");
    assert!(granted(&effects, ticket));
}

#[test]
fn a17_two_clients_that_want_one_cold_model_cause_one_load() {
    let mut world = World::new(1000, &[("a", 400)]);
    let (first, effects) = world.acquire("a");
    assert_eq!(spawned(&effects), ["a"]);
    let (second, effects) = world.acquire("a");
    assert_eq!(effects, []);
    let effects = world.ready("a");
    assert!(granted(&effects, first) && granted(&effects, second));
}

#[test]
fn a17_two_loads_racing_for_the_last_room_never_overcommit() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    assert_eq!(spawned(&world.acquire("a").1), ["a"]);
    let (b, effects) = world.acquire("b");
    assert_eq!(effects, [], "b has to wait: a is promised 600 of 1000");
    world.ready("a");
    let effects = world.leave("a");
    assert_eq!(gone(&effects), ["a"]);
    let effects = world.exit("a");
    assert_eq!(spawned(&effects), ["b"]);
    assert!(granted(&world.ready("b"), b));
}

#[test]
fn a02_the_least_recently_used_goes_and_the_next_starts_when_its_bytes_are_back() {
    let mut world = World::new(1000, &[("a", 400), ("b", 400), ("c", 400)]);
    world.use_once("a");
    world.use_once("b");
    let (_, effects) = world.acquire("a");
    assert!(spawned(&effects).is_empty());
    world.leave("a");
    let (_, effects) = world.acquire("c");
    assert_eq!(gone(&effects), ["b"]);
    assert_eq!(spawned(&effects), [] as [&str; 0]);
    let b = world.worker("b");
    let effects = world.exit_unmeasured(&b);
    assert_eq!(spawned(&effects), [] as [&str; 0], "not measured back yet");
    assert_eq!(spawned(&world.measure()), ["c"]);
}

#[test]
fn a13_a_model_larger_than_the_budget_is_refused_with_both_numbers_and_evicts_nobody() {
    let mut world = World::new(1000, &[("a", 400), ("huge", 1200)]);
    world.use_once("a");
    let (ticket, effects) = world.acquire("huge");
    assert_eq!(gone(&effects), [] as [&str; 0]);
    assert_eq!(
        refused(&effects, ticket),
        Some(Refusal::TooLarge {
            model: name("huge"),
            domain: Domain::Host,
            need: Bytes::mib(1200),
            budget: Bytes::mib(1000)
        })
    );
}

#[test]
fn a13_when_all_idle_workers_together_would_not_suffice_nobody_is_evicted() {
    let mut pinned = spec("pinned", Some(500));
    pinned.pinned = true;
    let specs = vec![pinned, spec("idle", Some(200)), spec("big", Some(800))];
    let mut world = World::with(1000, specs, &[("pinned", 500), ("idle", 200), ("big", 800)]);
    world.use_once("pinned");
    world.use_once("idle");
    let (ticket, effects) = world.acquire("big");
    assert_eq!(gone(&effects), [] as [&str; 0]);
    assert_eq!(
        refused(&effects, ticket),
        Some(Refusal::NoRoom {
            model: name("big"),
            domain: Domain::Host,
            need: Bytes::mib(800),
            room: Bytes::mib(500)
        })
    );
}

#[test]
fn a13_a_waiter_that_only_busy_workers_could_make_room_for_times_out_with_both_numbers() {
    let mut world = World::new(1000, &[("busy", 600), ("idle", 200), ("big", 800)]);
    world.acquire("busy");
    world.ready("busy");
    world.use_once("idle");
    let (ticket, effects) = world.acquire("big");
    assert_eq!(
        effects,
        [],
        "busy may end in time, so big waits, and idle stays"
    );
    world.pass(Duration::from_secs(61));
    let effects = world.step(Event::Tick);
    assert_eq!(gone(&effects), [] as [&str; 0]);
    assert_eq!(
        refused(&effects, ticket),
        Some(Refusal::NoRoom {
            model: name("big"),
            domain: Domain::Host,
            need: Bytes::mib(800),
            room: Bytes::mib(400)
        })
    );
}

#[test]
fn physics_bounds_a_load_that_the_limit_would_allow() {
    let mut world = World::new(12_000, &[("a", 4000), ("b", 4000)]);
    world.use_once("a");
    // A neighbour took memory: 5 GiB are left, less the reserve of 512 MiB.
    world.measure_headroom(Bytes::gib(4));
    let (_, effects) = world.acquire("b");
    assert_eq!(
        gone(&effects),
        ["a"],
        "4096 less 512 MiB is not enough for 4000"
    );
}

#[test]
fn bytes_that_a_new_worker_took_are_no_strangers_until_it_is_measured() {
    let mut world = World::new(15_000, &[("a", 10_000), ("b", 10_000)]);
    world.acquire("a");
    // Its bytes are missing of what is free, and nobody knows that they are its own.
    let headroom = Bytes::gib(16) - Bytes::mib(10_000);
    world.measure_headroom(headroom);
    let (b, effects) = world.acquire("b");
    assert_eq!(refused(&effects, b), None, "a loads");
    let a = world.worker("a");
    world.pass(Duration::from_millis(100));
    world.holding.insert(a.clone());
    world.inside.insert(a.clone(), Activity::opened(world.now));
    world.step(Event::Ready { worker: a });
    assert_eq!(world.leave("a"), [], "a is not measured yet");
    assert_eq!(gone(&world.measure()), ["a"]);
    world.exit("a");
    assert!(granted(&world.ready("b"), b));
    // A stranger's bytes are known as such once all workers are measured.
    world.leave("b");
    world.measure_headroom(Bytes::mib(100));
    let (a, effects) = world.acquire("a");
    assert!(matches!(
        refused(&effects, a),
        Some(Refusal::NoRoom { room, .. }) if room == Bytes::mib(10_000 + 100 - 512)
    ));
}

#[test]
fn a_busy_worker_is_never_evicted_to_make_room() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.acquire("a");
    world.ready("a");
    let (_, effects) = world.acquire("b");
    assert_eq!(effects, []);
    assert!(world.policy.awaits_idle(), "a's gate has to be watched");
    assert_eq!(gone(&world.leave("a")), ["a"]);
}

#[test]
fn a_gate_that_became_busy_at_the_last_moment_keeps_its_worker() {
    let mut world = World::new(1000, &[("a", 400), ("b", 400), ("c", 400)]);
    world.use_once("a");
    world.use_once("b");
    let (_, effects) = world.acquire("c");
    assert_eq!(gone(&effects), ["a"]);
    // The controller found somebody inside a's gate.
    let a = world.worker("a");
    world.inside.insert(
        a.clone(),
        Activity {
            inside: 1,
            last_left: world.now,
            last_entered: world.now,
        },
    );
    let effects = world.step(Event::EvictRefused {
        worker: a,
        inside: 1,
    });
    assert_eq!(gone(&effects), ["b"], "the policy plans anew");
    assert_eq!(world.policy.models()["a"].phase, Phase::Ready);
}

#[test]
fn a_request_for_a_model_being_evicted_waits_for_its_next_life() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.use_once("a");
    world.acquire("b");
    let (ticket, effects) = world.acquire("a");
    assert_eq!(effects, []);
    let effects = world.exit("a");
    assert_eq!(spawned(&effects), ["b"]);
    world.ready("b");
    assert_eq!(gone(&world.leave("b")), ["b"]);
    assert_eq!(spawned(&world.exit("b")), ["a"]);
    assert!(granted(&world.ready("a"), ticket));
    assert_eq!(world.worker("a").generation, 2);
}

#[test]
fn a_later_small_load_is_not_held_up_by_one_that_waits_for_busy_workers() {
    let mut world = World::new(1000, &[("busy", 600), ("big", 900), ("small", 100)]);
    world.acquire("busy");
    world.ready("busy");
    assert_eq!(world.acquire("big").1, []);
    assert_eq!(spawned(&world.acquire("small").1), ["small"]);
}

#[test]
fn bytes_promised_to_one_waiter_are_not_given_to_the_next() {
    let mut world = World::new(1000, &[("a", 500), ("b", 500), ("c", 500), ("d", 500)]);
    world.use_once("a");
    world.use_once("b");
    assert_eq!(gone(&world.acquire("c").1), ["a"]);
    assert_eq!(gone(&world.acquire("d").1), ["b"]);
    assert_eq!(spawned(&world.exit("a")), ["c"]);
    assert_eq!(spawned(&world.exit("b")), ["d"]);
}

#[test]
fn an_unknown_model_loads_alone_and_has_all_the_room_until_it_is_ready() {
    let specs = vec![spec("unknown", None), spec("b", Some(100))];
    let mut world = World::with(1000, specs, &[("unknown", 300), ("b", 100)]);
    let (_, effects) = world.acquire("unknown");
    assert_eq!(spawned(&effects), ["unknown"]);
    assert_eq!(
        world.policy.models()["unknown"].charge(Domain::Host),
        Bytes::mib(1000)
    );
    let (_, effects) = world.acquire("b");
    assert_eq!(effects, [], "b waits and evicts nobody");
    let effects = world.ready("unknown");
    assert_eq!(spawned(&effects), ["b"]);
    assert_eq!(
        world.policy.models()["unknown"].charge(Domain::Host),
        Bytes::mib(300)
    );
}

#[test]
fn a12_the_second_load_expects_what_the_first_used() {
    let specs = vec![spec("unknown", None)];
    let mut world = World::with(1000, specs, &[("unknown", 300)]);
    world.use_once("unknown");
    let effects = world.exit("unknown");
    assert!(effects.iter().any(
        |e| matches!(e, Effect::Learn { footprint, .. } if footprint[&Domain::Host].peak == Bytes::mib(300))
    ));
    let expected = world.policy.expected(&world.policy.models()["unknown"]);
    let learned = Expectation {
        bytes: Bytes::mib(300),
        source: ExpectedSource::Learned,
    };
    assert_eq!(expected.0, BTreeMap::from([(Domain::Host, learned)]));
}

#[test]
fn a34_a_client_that_leaves_while_its_model_loads_wastes_nothing() {
    let mut world = World::new(1000, &[("a", 400)]);
    let (ticket, _) = world.acquire("a");
    assert_eq!(world.step(Event::Cancel { ticket }), []);
    let effects = world.ready("a");
    assert_eq!(
        gone(&effects),
        [] as [&str; 0],
        "the load is completed and stays"
    );
    assert!(!granted(&effects, ticket));
    assert_eq!(world.policy.models()["a"].activity.inside, 0);
    assert!(granted(&world.acquire("a").1, ticket + 1));
}

#[test]
fn a35_over_the_queue_bound_requests_are_turned_away() {
    let mut world = World::new(1000, &[("a", 400)]);
    for _ in 0..4 {
        let (ticket, effects) = world.acquire("a");
        assert_eq!(refused(&effects, ticket), None);
    }
    let (ticket, effects) = world.acquire("a");
    assert_eq!(
        refused(&effects, ticket),
        Some(Refusal::QueueFull {
            model: name("a"),
            queued: 4
        })
    );
}

#[test]
fn a_full_worker_makes_others_wait_and_lets_them_in_one_by_one_in_their_order() {
    let mut narrow = spec("a", Some(400));
    narrow.concurrency = std::num::NonZeroU32::new(2);
    let mut world = World::with(1000, vec![narrow], &[("a", 400)]);
    let tickets: Vec<_> = (0..4).map(|_| world.acquire("a").0).collect();
    let effects = world.ready("a");
    let let_in = |effects: &[Effect]| -> Vec<_> {
        let tickets = tickets.iter().copied();
        tickets.filter(|t| granted(effects, *t)).collect()
    };
    assert_eq!(let_in(&effects), tickets[..2]);
    let ticket = world.ticket();
    let deadline = world.now + Duration::from_secs(60);
    let load = Event::Load {
        ticket,
        model: name("a"),
        deadline,
    };
    assert!(world.step(load).contains(&Effect::Done { ticket }));
    assert_eq!(let_in(&world.leave("a")), tickets[2..3]);
    world.step(Event::Cancel { ticket: tickets[3] });
    assert!(let_in(&world.leave("a")).is_empty());
    assert_eq!(world.policy.models()["a"].activity.inside, 1);
}

#[test]
fn who_waits_for_a_place_in_a_worker_that_crashes_is_served_by_the_next_one() {
    let mut narrow = spec("a", Some(400));
    narrow.concurrency = std::num::NonZeroU32::new(1);
    let mut world = World::with(1000, vec![narrow], &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    let (waiting, _) = world.acquire("a");
    assert_eq!(spawned(&world.exit("a")), ["a"]);
    assert!(granted(&world.ready("a"), waiting));
}

#[test]
fn of_what_only_the_configuration_wants_the_pinned_come_first() {
    let mut specs: Vec<_> = ["a", "b"].map(|model| spec(model, Some(600))).into();
    for spec in &mut specs {
        spec.preload = true;
    }
    specs[1].pinned = true;
    let world = World::with(1000, specs, &[("a", 600), ("b", 600)]);
    let phase = |model: &str| world.policy.models()[model].phase;
    assert_eq!((phase("a"), phase("b")), (Phase::Stopped, Phase::Starting));
}

/// A model whose need nobody knows, loading in all the room there is, and a
/// waiter for another.
fn b_waits_while_an_unknown_model_loads() -> World {
    let specs = vec![spec("a", None), spec("b", Some(600))];
    let mut world = World::with(1000, specs, &[("a", 600), ("b", 600)]);
    assert_eq!(spawned(&world.acquire("a").1), ["a"]);
    assert_eq!(spawned(&world.acquire("b").1), [] as [&str; 0]);
    world
}

/// Its bytes used to count as free before its tree was gone, though nobody knew
/// how many they were and it may have taken more.
#[test]
fn an_unknown_model_that_is_unloaded_while_it_loads_keeps_all_room_until_it_is_gone() {
    let mut world = b_waits_while_an_unknown_model_loads();
    let effects = world.step(Event::Unload {
        ticket: 99,
        model: name("a"),
    });
    assert_eq!(spawned(&effects), [] as [&str; 0]);
    assert_eq!(world.policy.charged(Domain::Host), Bytes::mib(1000));
    assert_eq!(spawned(&world.measure()), [] as [&str; 0]);
    assert_eq!(spawned(&world.exit("a")), ["b"]);
}

/// Another used to start in the room that was left when it was last measured,
/// while it still loaded.
#[test]
fn an_unknown_model_keeps_all_room_until_it_is_measured_after_it_was_ready() {
    let mut world = b_waits_while_an_unknown_model_loads();
    let worker = world.worker("a");
    world.pass(Duration::from_millis(100));
    world.holding.insert(worker.clone());
    let activity = Activity::opened(world.now);
    world.inside.insert(worker.clone(), activity);
    let effects = world.step(Event::Ready { worker });
    assert_eq!(spawned(&effects), [] as [&str; 0]);
    assert_eq!(world.policy.charged(Domain::Host), Bytes::mib(1000));
    world.measure();
    assert_eq!(world.policy.charged(Domain::Host), Bytes::mib(600));
}
