//! How workers go: crashes, idleness, pressure, unloads, shutdown, and when
//! their bytes are back.

use std::time::Duration;

use super::super::testing::{World, gone, name, refused, spawned, spec};
use super::super::*;

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
            out_of_memory: Vec::new(),
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
fn under_hard_pressure_a_gate_still_has_the_last_word_on_an_eviction() {
    let mut world = World::new(1000, &[("a", 400), ("b", 400)]);
    world.use_once("a");
    world.use_once("b");
    assert_eq!(gone(&world.measure_headroom(Bytes::mib(100))), ["a"]);
    let order = CleanupOrder {
        all: true,
        ..CleanupOrder::default()
    };
    let (ticket, deadline) = (world.ticket(), world.now + Duration::from_secs(30));
    let effects = world.step(Event::Cleanup {
        ticket,
        order,
        deadline,
    });
    // One order without grace, and not a second that asks no gate.
    assert!(
        matches!(&effects[..], [Effect::Evict { worker, kill: true, .. }] if worker.model == name("b")),
        "{effects:?}"
    );
    let effects = world.step(Event::EvictRefused {
        worker: world.worker("b"),
        inside: 1,
    });
    assert_eq!(gone(&effects), [] as [&str; 0]);
    let b = &world.policy.models()["b"];
    assert_eq!((b.phase, b.killed), (Phase::Ready, false));
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
        matches!(&effects[0], Effect::Reclaimed { missing, .. } if *missing == Bytes::mib(600))
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

/// Its deadline used to stay in the past, so that the controller never slept.
#[test]
fn a_preloaded_model_whose_rest_is_over_waits_for_room_without_a_deadline() {
    let mut specs = vec![spec("p", Some(600)), spec("q", Some(600))];
    specs[0].preload = true;
    let mut world = World::with(1000, specs, &[("p", 600), ("q", 600)]);
    world.step(Event::Tick);
    world.exit("p");
    world.acquire("q");
    world.ready("q");
    world.pass(Duration::from_secs(2));
    assert_eq!(gone(&world.step(Event::Tick)), Vec::<String>::new());
    let wake = world.policy.next_wake();
    assert!(wake.is_none_or(|at| at > world.now), "{wake:?}");
    world.leave("q");
    world.step(Event::Unload {
        ticket: 99,
        model: name("q"),
    });
    assert_eq!(spawned(&world.exit("q")), ["p"], "there is room now");
}
