//! Parked workers: how they end, and what is told of them.

use std::sync::Arc;
use std::time::Duration;

use super::super::testing::{World, gone, granted, name, park, parked, refused, spawned, unparked};
use super::super::*;
use super::parking::{GPU, one_parked, phase, world};
use crate::model::ParkSpec;

const NOBODY: [&str; 0] = [];

#[test]
fn a_parked_worker_is_ended_by_unload_idleness_cleanup_and_shutdown() {
    let unload = |world: &mut World| {
        let ticket = world.ticket();
        world.step(Event::Unload {
            ticket,
            model: name("a"),
        })
    };
    let mut parked = one_parked(3000);
    assert_eq!(gone(&unload(&mut parked)), ["a"]);
    assert_eq!(phase(&parked, "a"), Phase::Stopping);
    parked.exit("a");
    assert_eq!(phase(&parked, "a"), Phase::Stopped);

    let mut idle = one_parked(3000);
    let model = idle.policy.models.get_mut("a").expect("configured");
    let timeout = Some(Duration::from_secs(60));
    model.spec = Arc::new(ModelSpec {
        idle_timeout: timeout,
        ..(*model.spec).clone()
    });
    idle.pass(Duration::from_secs(60));
    assert_eq!(gone(&idle.step(Event::Tick)), ["a"]);

    let mut cleaned = one_parked(3000);
    let ticket = cleaned.ticket();
    let order = CleanupOrder {
        target: Some(Bytes::mib(100)),
        ..CleanupOrder::default()
    };
    let deadline = cleaned.now + Duration::from_secs(9);
    let effects = cleaned.step(Event::Cleanup {
        ticket,
        order,
        deadline,
    });
    assert_eq!(gone(&effects), ["a"]);

    let mut ends = one_parked(3000);
    let until = ends.now + Duration::from_secs(9);
    let effects = ends.step(Event::Shutdown { until });
    assert!(gone(&effects).contains(&"a".to_owned()), "{effects:?}");
    ends.exit("a");
    assert!(ends.exit("b").contains(&Effect::Finished));
}

#[test]
fn unloads_while_a_worker_moves_end_it_and_answer_those_who_wait() {
    for arrive in [false, true] {
        let mut world = one_parked(3000);
        let (waits, _) = world.acquire("a");
        if arrive {
            world.moved("b");
            assert_eq!(phase(&world, "a"), Phase::Unparking);
        }
        let ticket = world.ticket();
        let model = name(if arrive { "a" } else { "b" });
        let effects = world.step(Event::Unload {
            ticket,
            model: model.clone(),
        });
        assert_eq!(gone(&effects), [model.as_str()]);
        assert_eq!(refused(&effects, waits).is_some(), arrive);
        let effects = world.exit(model.as_str());
        assert!(effects.contains(&Effect::Done { ticket }));
        assert_eq!(unparked(&effects).is_empty(), arrive);
    }
}

#[test]
fn a_parked_worker_that_dies_is_a_crash_and_the_next_request_loads_anew() {
    let mut world = one_parked(3000);
    let effects = world.exit("a");
    assert_eq!(gone(&effects), NOBODY);
    let model = &world.policy.models()["a"];
    assert_eq!(model.history.crashes, 1);
    assert_eq!(
        model.failures.last.as_deref(),
        Some("exit code 1 while it was parked")
    );
    assert_eq!(
        model.footprint[&Domain::Host].peak,
        Bytes::mib(50),
        "its own need"
    );
    assert_eq!(model.footprint[&GPU].settled, Bytes::mib(600));
    world.acquire("a");
    assert_eq!(spawned(&world.moved("b")), ["a"]);
}

#[test]
fn pressure_on_a_gpu_parks_one_on_the_host_ends_it() {
    let mut world = world(3000, &[("a", 50, 600)]);
    world.use_once("a");
    let effects = world.step(Event::Limit {
        domain: GPU,
        limit: Bytes::mib(500),
    });
    assert_eq!(parked(&effects), ["a"]);
    world.moved("a");
    assert_eq!(phase(&world, "a"), Phase::Parked);
    let effects = world.step(Event::Limit {
        domain: Domain::Host,
        limit: Bytes::mib(600),
    });
    assert_eq!(gone(&effects), ["a"]);
}

#[test]
fn hard_pressure_ends_a_worker_on_its_way_into_its_park() {
    let mut world = world(3000, &[("a", 50, 600), ("b", 50, 600)]);
    world.use_once("a");
    world.acquire("b");
    let effects = world.measure_headroom(Bytes::mib(100));
    assert_eq!(gone(&effects), ["a"]);
}

#[test]
fn a_model_on_the_host_alone_is_parked_when_it_says_what_it_holds_then() {
    let mut says = world(1000, &[("a", 600, 0), ("b", 600, 0)]);
    says.use_once("a");
    assert_eq!(
        gone(&says.acquire("b").1),
        ["a"],
        "nothing is known to come back"
    );
    let mut says = world(1000, &[("a", 600, 0), ("b", 600, 0)]);
    let model = says.policy.models.get_mut("a").expect("configured");
    let holds = ParkSpec {
        memory: Some(Bytes::mib(60)),
        ..(*park()).clone()
    };
    model.spec = Arc::new(ModelSpec {
        park: Some(Arc::new(holds)),
        ..(*model.spec).clone()
    });
    says.use_once("a");
    assert_eq!(parked(&says.acquire("b").1), ["a"]);
    says.size.insert(name("a"), 60);
    assert_eq!(spawned(&says.moved("a")), ["b"]);
    assert_eq!(
        says.policy.models()["a"].charge(Domain::Host),
        Bytes::mib(60)
    );
}

#[test]
fn a_pinned_model_is_never_parked_and_a_pinned_parked_one_stays() {
    let mut world = world(3000, &[("a", 50, 600), ("b", 50, 600)]);
    world.use_once("a");
    world.step(Event::Pin {
        model: name("a"),
        pinned: true,
    });
    let (_, effects) = world.acquire("b");
    assert_eq!((parked(&effects), gone(&effects)), (vec![], vec![]));

    let mut stays = one_parked(3000);
    stays.step(Event::Pin {
        model: name("a"),
        pinned: true,
    });
    let limit = Bytes::mib(600);
    let effects = stays.step(Event::Limit {
        domain: Domain::Host,
        limit,
    });
    assert_eq!(gone(&effects), ["b"]);
    let (ticket, _) = stays.acquire("a");
    assert_eq!(unparked(&stays.exit("b")), ["a"]);
    assert!(granted(&stays.moved("a"), ticket));
}

#[test]
fn it_is_told_that_a_request_would_unpark_and_whom_that_parks() {
    let mut world = one_parked(3000);
    let told = world
        .policy
        .explain(&name("a"), world.now)
        .expect("configured");
    let Outlook::Evicts { victims, .. } = &told.outlook else {
        panic!("{told:?}");
    };
    assert!(victims[0].parks && victims[0].model == name("b"));
    assert!(
        told.to_string().contains("b (idle, to be parked, "),
        "{told}"
    );
    let ticket = world.ticket();
    world.step(Event::Unload {
        ticket,
        model: name("b"),
    });
    world.leave_at_once("b");
    world.exit("b");
    let told = world
        .policy
        .explain(&name("a"), world.now)
        .expect("configured");
    assert_eq!(
        (told.why.as_str(), told.outlook.as_str()),
        ("parked", "unparks")
    );
}

#[test]
fn pressure_on_a_gpu_leaves_those_alone_that_hold_nothing_of_it() {
    let mut world = one_parked(3000);
    let limit = Bytes::mib(500);
    let effects = world.step(Event::Limit { domain: GPU, limit });
    assert_eq!(
        (parked(&effects), gone(&effects)),
        (vec!["b".into()], vec![])
    );
}
