//! The rules of the policy, one test each: build a state, step, compare.

use std::time::Duration;

use super::testing::{World, gone, granted, name, refused, spawned, spec};
use super::*;

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
        |e| matches!(e, Effect::Learn { peak, .. } if peak[&Domain::Host] == Bytes::mib(300))
    ));
    let expected = world.policy.models()["unknown"].expected();
    assert_eq!(expected.source, ExpectedSource::Learned);
    assert_eq!(expected.bytes[&Domain::Host], Bytes::mib(300));
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
fn a41_a_worker_that_dies_before_it_is_ready_tells_its_waiters_and_backs_off() {
    let mut world = World::new(1000, &[("a", 400)]);
    let (ticket, _) = world.acquire("a");
    let effects = world.exit("a");
    let Some(Refusal::WorkerFailed {
        cause, last_lines, ..
    }) = refused(&effects, ticket)
    else {
        panic!("{effects:?}");
    };
    assert_eq!(
        (cause.as_str(), last_lines),
        (
            "exit code 1 before it was ready",
            vec!["out of cheese".into()]
        )
    );
    let (ticket, effects) = world.acquire("a");
    assert!(matches!(
        refused(&effects, ticket),
        Some(Refusal::BackingOff { .. })
    ));
    world.pass(Duration::from_secs(2));
    assert_eq!(spawned(&world.acquire("a").1), ["a"]);
}

#[test]
fn a41_after_a_crash_the_next_request_starts_a_new_worker() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.use_once("a");
    world.exit("a");
    assert_eq!(world.policy.models()["a"].history.crashes, 1);
    assert_eq!(spawned(&world.acquire("a").1), ["a"]);
}

#[test]
fn a41_a_crash_loop_opens_the_breaker_and_evicts_nobody() {
    let mut world = World::new(1000, &[("good", 600), ("bad", 600)]);
    let mut loads = 0;
    for _ in 0..40 {
        let (_, effects) = world.acquire("bad");
        if !spawned(&effects).is_empty() {
            loads += 1;
            world.exit("bad");
        }
        world.pass(Duration::from_secs(5));
    }
    assert_eq!(loads, 5);
    assert_eq!(world.policy.models()["bad"].phase, Phase::Failed);
    world.use_once("good");
    let (ticket, effects) = world.acquire("bad");
    assert_eq!(gone(&effects), [] as [&str; 0]);
    assert!(matches!(
        refused(&effects, ticket),
        Some(Refusal::BackingOff { .. })
    ));
    // An operator's load tries again.
    let ticket = world.ticket();
    let deadline = world.now + Duration::from_secs(9);
    let effects = world.step(Event::Load {
        ticket,
        model: name("bad"),
        deadline,
    });
    assert_eq!(gone(&effects), ["good"]);
}

#[test]
fn an_event_of_an_older_life_changes_nothing() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.use_once("a");
    let old = world.worker("a");
    world.exit("a");
    world.acquire("a");
    assert_eq!(
        world.step(Event::Ready {
            worker: old.clone()
        }),
        []
    );
    let status = "exit code 0".to_owned();
    assert_eq!(
        world.step(Event::Exited {
            worker: old,
            status,
            last_lines: Vec::new()
        }),
        []
    );
    assert_eq!(world.policy.models()["a"].phase, Phase::Starting);
}

#[test]
fn a_model_unused_for_its_idle_timeout_is_unloaded_and_idles_from_ready() {
    let mut model = spec("a", Some(400));
    model.idle_timeout = Some(Duration::from_secs(10));
    let mut world = World::with(1000, vec![model], &[("a", 400)]);
    let (ticket, _) = world.acquire("a");
    world.step(Event::Cancel { ticket });
    world.pass(Duration::from_secs(60));
    world.ready("a");
    let wake = world.policy.next_wake().expect("an idle deadline");
    world.now = wake;
    let effects = world.step(Event::Tick);
    assert_eq!(gone(&effects), ["a"]);
    assert!(
        matches!(&effects[0], Effect::Evict { reason: EvictReason::Idle { after }, .. } if *after >= Duration::from_secs(10))
    );
}

#[test]
fn unload_drains_those_inside_and_answers_when_the_bytes_are_back() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    let ticket = world.ticket();
    let effects = world.step(Event::Unload {
        ticket,
        model: name("a"),
    });
    assert!(matches!(&effects[..], [Effect::Drain { .. }]));
    assert_eq!(gone(&world.leave("a")), ["a"]);
    let a = world.worker("a");
    assert!(!world.exit_unmeasured(&a).contains(&Effect::Done { ticket }));
    assert!(world.measure().contains(&Effect::Done { ticket }));
}

#[test]
fn soft_pressure_ends_one_idle_worker_at_a_time_oldest_first() {
    let mut world = World::new(1200, &[("a", 400), ("b", 400), ("c", 400)]);
    for model in ["a", "b", "c"] {
        world.use_once(model);
    }
    world.size.insert(name("c"), 900);
    let effects = world.measure();
    assert_eq!(
        gone(&effects),
        ["a"],
        "usage of 1700 is over the limit of 1200"
    );
    assert_eq!(gone(&world.measure()), [] as [&str; 0], "one at a time");
    assert_eq!(gone(&world.exit("a")), ["b"]);
    assert_eq!(gone(&world.exit("b")), [] as [&str; 0]);
}

#[test]
fn without_auto_cleanup_soft_pressure_only_recommends() {
    let mut world = World::new(1000, &[("a", 400), ("b", 400)]);
    world.policy.settings.auto_cleanup = false;
    world.use_once("a");
    world.use_once("b");
    let effects = world.step(Event::Limit {
        domain: Domain::Host,
        limit: Bytes::mib(500),
    });
    assert_eq!(gone(&effects), [] as [&str; 0]);
    assert_eq!(world.policy.recommended(), [name("a")]);
    assert_eq!(world.policy.level(Domain::Host), PressureLevel::Soft);
}

#[test]
fn hard_pressure_ends_the_least_valuable_at_once_and_a_pinned_one_last() {
    let mut pinned = spec("pinned", Some(400));
    pinned.pinned = true;
    let specs = vec![pinned, spec("busy", Some(400))];
    let mut world = World::with(4000, specs, &[("pinned", 400), ("busy", 400)]);
    world.use_once("pinned");
    world.acquire("busy");
    world.ready("busy");
    let effects = world.measure_headroom(Bytes::mib(100));
    assert!(matches!(
        &effects[..],
        [Effect::Terminate { kill: true, .. }]
    ));
    assert_eq!(gone(&effects), ["busy"]);
}

#[test]
fn a_limit_set_below_usage_evicts_at_once() {
    let mut world = World::new(1000, &[("a", 400), ("b", 400)]);
    world.use_once("a");
    world.use_once("b");
    let effects = world.step(Event::Limit {
        domain: Domain::Host,
        limit: Bytes::mib(500),
    });
    assert_eq!(gone(&effects), ["a"]);
}

#[test]
fn cleanup_answers_with_measured_bytes_and_says_who_stays() {
    let mut world = World::new(2000, &[("a", 400), ("b", 300), ("c", 200)]);
    world.use_once("a");
    world.use_once("b");
    world.acquire("c");
    world.ready("c");
    let ticket = world.ticket();
    let order = CleanupOrder {
        all: true,
        ..CleanupOrder::default()
    };
    let deadline = world.now + Duration::from_secs(30);
    let effects = world.step(Event::Cleanup {
        ticket,
        order,
        deadline,
    });
    assert_eq!(gone(&effects), ["a", "b"]);
    world.exit("a");
    let effects = world.exit("b");
    let report = CleanupReport {
        unloaded: vec![name("a"), name("b")],
        freed: Bytes::mib(700),
        skipped: vec![Skipped {
            model: name("c"),
            why: Skip::Protected(Protection::Busy),
        }],
        ..CleanupReport::default()
    };
    assert!(
        effects.contains(&Effect::CleanedUp { ticket, report }),
        "{effects:?}"
    );
}

#[test]
fn cleanup_with_nothing_to_do_is_success_with_an_empty_list() {
    let mut world = World::new(2000, &[("a", 400)]);
    let deadline = world.now + Duration::from_secs(30);
    let effects = world.step(Event::Cleanup {
        ticket: 7,
        order: CleanupOrder::default(),
        deadline,
    });
    assert_eq!(
        effects,
        [Effect::CleanedUp {
            ticket: 7,
            report: CleanupReport::default()
        }]
    );
}

#[test]
fn a_preloaded_model_is_loaded_without_a_request_and_evicts_nobody() {
    let mut preload = spec("a", Some(600));
    preload.preload = true;
    let mut world = World::with(
        1000,
        vec![preload, spec("b", Some(600))],
        &[("a", 600), ("b", 600)],
    );
    assert_eq!(world.policy.models()["a"].phase, Phase::Starting);
    world.ready("a");
    world.acquire("b");
    world.exit("a");
    assert_eq!(world.policy.models()["b"].phase, Phase::Starting);
    assert!(world.policy.models()["a"].queue.is_empty());
}

#[test]
fn shutdown_refuses_waiters_drains_and_finishes_when_nothing_lives() {
    let mut world = World::new(1000, &[("busy", 300), ("idle", 300), ("loading", 300)]);
    world.acquire("busy");
    world.ready("busy");
    world.use_once("idle");
    let (waiter, _) = world.acquire("loading");
    let until = world.now + Duration::from_secs(10);
    let effects = world.step(Event::Shutdown { until });
    assert_eq!(refused(&effects, waiter), Some(Refusal::ShuttingDown));
    let mut going = gone(&effects);
    going.sort();
    assert_eq!(going, ["idle", "loading"]);
    world.exit("idle");
    world.exit("loading");
    assert_eq!(gone(&world.leave("busy")), ["busy"]);
    assert!(world.exit("busy").contains(&Effect::Finished));
}

#[test]
fn host_memory_of_a_reaped_worker_holds_up_the_next_load_until_it_is_measured() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.use_once("a");
    world.acquire("b");
    let a = world.worker("a");
    assert_eq!(spawned(&world.exit_unmeasured(&a)), [] as [&str; 0]);
    world.pass(Duration::from_millis(1));
    // A neighbour took as much as came back, but enough is left.
    let before = Bytes::gib(16) - Bytes::mib(600);
    assert_eq!(spawned(&world.measure_headroom(before)), ["b"]);
}

#[test]
fn headroom_that_a_neighbour_took_is_waited_for_and_the_loss_is_reported() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.use_once("a");
    // Under the need of b, over what counts as pressure.
    let short = Bytes::mib(1000);
    world.measure_headroom(short);
    let (waiter, _) = world.acquire("b");
    let a = world.worker("a");
    world.exit_unmeasured(&a);
    world.pass(Duration::from_millis(1));
    let effects = world.measure_headroom(short);
    assert_eq!(
        (spawned(&effects), refused(&effects, waiter)),
        (vec![], None)
    );
    world.pass(Duration::from_secs(1));
    let effects = world.measure_headroom(short);
    assert!(
        matches!(&effects[0], Effect::ReclaimShortfall { missing, .. } if *missing == Bytes::mib(600))
    );
    assert_eq!(spawned(&effects), [] as [&str; 0]);
    // There is nobody left whose end would help.
    let refusal = refused(&effects, waiter).expect("an answer");
    assert_eq!(refusal.code(), "no_room");
}

#[test]
fn a_dying_worker_that_shows_less_and_less_memory_is_charged_until_it_is_reaped() {
    let specs = vec![spec("a", None), spec("b", Some(600))];
    let mut world = World::with(1000, specs, &[("a", 600), ("b", 600)]);
    world.use_once("a");
    assert_eq!(gone(&world.acquire("b").1), ["a"]);
    // Its pages are being freed, but it is not gone.
    world.size.insert(name("a"), 1);
    assert_eq!(spawned(&world.measure()), [] as [&str; 0]);
    assert_eq!(world.policy.charged(Domain::Host), Bytes::mib(600));
    assert_eq!(spawned(&world.exit("a")), ["b"]);
}
