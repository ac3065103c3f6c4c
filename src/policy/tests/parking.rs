//! Parks: when they are chosen, what they need, and how they fail.

use std::sync::Arc;
use std::time::Duration;

use super::super::testing::{
    World, gone, granted, name, park, parked, refused, spawned, spec, unparked,
};
use super::super::*;
use crate::model::{GpuRequest, ParkSpec};

const GPU: Domain = Domain::Gpu(0);
const NOBODY: [&str; 0] = [];

/// Models by what they hold of host RAM and of the one GPU of 1000 MiB, in MiB;
/// all but those whose names begin with `plain` can be parked.
fn world(limit: u64, models: &[(&str, u64, u64)]) -> World {
    let spec = |(model, host, vram): &(&str, u64, u64)| ModelSpec {
        gpus: GpuRequest::Count(u32::from(*vram > 0)),
        vram: (*vram > 0).then_some(Bytes::mib(*vram)),
        park: (!model.starts_with("plain")).then(park),
        ..spec(model, Some(*host))
    };
    let sizes: Vec<_> = models
        .iter()
        .map(|(model, host, _)| (*model, *host))
        .collect();
    let mut world = World::with(limit, models.iter().map(spec).collect(), &sizes);
    world.gpus = vec![1000];
    let vram = models.iter().map(|(model, _, vram)| (name(model), *vram));
    world.vram = vram.collect();
    world.measure();
    world
}

/// Two models that fill most of the GPU each, the first parked for the second,
/// which is ready and idle.
fn one_parked(limit: u64) -> World {
    let mut world = world(limit, &[("a", 50, 600), ("b", 50, 600)]);
    world.use_once("a");
    world.acquire("b");
    world.moved("a");
    world.ready("b");
    world.leave("b");
    world
}

fn phase(world: &World, model: &str) -> Phase {
    world.policy.models()[model].phase
}

fn charged(world: &World, domain: Domain) -> Bytes {
    world.policy.charged(domain)
}

#[test]
fn a_victim_that_can_be_parked_is_parked_and_its_bytes_go_to_whoever_waits() {
    let mut world = world(2000, &[("a", 50, 600), ("b", 50, 600)]);
    world.use_once("a");
    let worker = world.worker("a");
    let (ticket, effects) = world.acquire("b");
    assert_eq!(
        (parked(&effects), gone(&effects)),
        (vec!["a".into()], vec![])
    );
    let holds = BTreeMap::from([(Domain::Host, Bytes::mib(650)), (GPU, Bytes::ZERO)]);
    let told = effects.iter().any(|effect| {
        matches!(effect, Effect::Park { reason: EvictReason::MakeRoom { .. }, holds: of, .. } if *of == holds)
    });
    assert!(told, "{effects:?}");
    assert!(spawned(&effects).is_empty(), "its bytes are not back");
    // What it is going to hold is charged before it does.
    assert_eq!(charged(&world, Domain::Host), Bytes::mib(650));
    assert_eq!(charged(&world, GPU), Bytes::mib(600));

    let effects = world.moved("a");
    assert_eq!(spawned(&effects), ["b"]);
    assert_eq!(phase(&world, "a"), Phase::Parked);
    assert_eq!(world.worker("a"), worker);
    assert_eq!(world.policy.models()["a"].charge(GPU), Bytes::ZERO);
    assert!(granted(&world.ready("b"), ticket));
    assert_eq!(world.policy.models()["a"].history.parks["make_room"], 1);
    assert!(!world.policy.models()["a"].history.evicted);
}

#[test]
fn a_parked_model_that_is_asked_for_is_ready_again_without_a_new_worker() {
    let mut world = one_parked(3000);
    let worker = world.worker("a");
    let (ticket, effects) = world.acquire("a");
    assert_eq!(parked(&effects), ["b"], "the GPU has room for one of them");
    assert!(unparked(&effects).is_empty());
    let effects = world.moved("b");
    assert_eq!(unparked(&effects), ["a"]);
    assert_eq!(charged(&world, GPU), Bytes::mib(600));
    let effects = world.moved("a");
    assert!(granted(&effects, ticket));
    assert_eq!(world.worker("a"), worker);
    assert_eq!(phase(&world, "a"), Phase::Ready);
    assert_eq!(phase(&world, "b"), Phase::Parked);
    assert_eq!(world.policy.models()["a"].history.unparks, 1);
    assert_eq!(world.policy.models()["a"].history.loads, 1);
}

#[test]
fn one_that_cannot_be_parked_is_evicted_as_ever() {
    let mut world = world(2000, &[("plain", 50, 600), ("b", 50, 600)]);
    world.use_once("plain");
    let (_, effects) = world.acquire("b");
    assert_eq!(
        (parked(&effects), gone(&effects)),
        (vec![], vec!["plain".into()])
    );
}

#[test]
fn a_park_needs_room_in_host_ram_for_what_it_moves_there() {
    // 600 MiB of weights would come to the 50 it holds and the 50 of the other.
    let mut tight = world(690, &[("a", 50, 600), ("b", 50, 600)]);
    tight.use_once("a");
    let (_, effects) = tight.acquire("b");
    assert_eq!(
        (parked(&effects), gone(&effects)),
        (vec![], vec!["a".into()])
    );
    // Weight files tell how much that really is.
    let mut known = world(690, &[("a", 50, 600), ("b", 50, 600)]);
    known
        .policy
        .models
        .get_mut("a")
        .expect("configured")
        .weights = Bytes::mib(64);
    known.use_once("a");
    assert_eq!(parked(&known.acquire("b").1), ["a"]);
    assert_eq!(
        known.policy.models()["a"].charge(Domain::Host),
        Bytes::mib(50 + 64 + 8 + 32)
    );
}

#[test]
fn a_park_that_would_not_give_enough_is_an_eviction() {
    let mut world = world(3000, &[("a", 50, 600), ("b", 50, 900)]);
    let mut keeps = (*park()).clone();
    keeps.vram = Some(Bytes::mib(200));
    let model = world.policy.models.get_mut("a").expect("configured");
    model.spec = Arc::new(ModelSpec {
        park: Some(Arc::new(keeps)),
        ..(*model.spec).clone()
    });
    world.use_once("a");
    assert_eq!(gone(&world.acquire("b").1), ["a"]);
}

#[test]
fn what_a_parked_worker_keeps_is_learned_and_decides_the_next_time() {
    let mut world = world(5000, &[("a", 50, 500), ("b", 50, 600), ("c", 50, 950)]);
    world.keeps = 100;
    world.use_once("a");
    assert_eq!(parked(&world.acquire("b").1), ["a"]);
    world.moved("a");
    assert_eq!(phase(&world, "a"), Phase::Parked, "80 % came back");
    assert_eq!(world.policy.models()["a"].charge(GPU), Bytes::mib(100));
    world.ready("b");
    world.leave("b");
    // Beside what a and b keep of it there is no room for 950: they end.
    let (_, effects) = world.acquire("c");
    let mut ends = gone(&effects);
    ends.sort();
    assert_eq!(
        (ends, parked(&effects)),
        (vec!["a".into()], vec!["b".into()])
    );
}

#[test]
fn parked_workers_are_the_first_to_go_when_more_is_needed() {
    let mut world = one_parked(1500);
    // The limit on host RAM would be met by either.
    let mut more = world.clone();
    let effects = more.step(Event::Limit {
        domain: Domain::Host,
        limit: Bytes::mib(690),
    });
    assert_eq!(gone(&effects), ["a"]);
    // However lately it was used.
    world
        .policy
        .models
        .get_mut("a")
        .expect("configured")
        .activity
        .last_left = world.now;
    let order = world.policy.candidates_in_order();
    let names: Vec<_> = order.iter().map(|m| m.name().as_str()).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn an_unpark_waits_until_the_gpu_is_still_and_there_is_room() {
    let mut world = one_parked(3000);
    world.acquire("b");
    let (ticket, effects) = world.acquire("a");
    assert!(unparked(&effects).is_empty() && gone(&effects).is_empty());
    assert_eq!(refused(&effects, ticket), None, "b is busy");
    let told = world
        .policy
        .explain(&name("a"), world.now)
        .expect("configured");
    assert_eq!(told.why, Why::Parked);
    let Outlook::Waits { holders, .. } = &told.outlook else {
        panic!("{told:?}");
    };
    assert_eq!(holders.len(), 1);
    assert_eq!(holders[0].model, name("b"));
    let effects = world.leave("b");
    assert_eq!(parked(&effects), ["b"]);
    let effects = world.moved("b");
    assert_eq!(unparked(&effects), ["a"]);
}

#[test]
fn patience_drains_busy_workers_for_a_parked_model_too() {
    let mut world = one_parked(3000);
    world.acquire("b");
    world.acquire("a");
    world.pass(Duration::from_secs(6));
    let effects = world.step(Event::Tick);
    let drained = effects
        .iter()
        .any(|e| matches!(e, Effect::Drain { worker, .. } if worker.model == name("b")));
    assert!(drained, "{effects:?}");
    assert_eq!(gone(&world.leave("b")), ["b"]);
    assert_eq!(unparked(&world.exit("b")), ["a"]);
}

#[test]
fn a_park_that_frees_too_little_ends_the_worker_and_is_not_tried_again() {
    let mut world = world(3000, &[("a", 50, 600), ("b", 50, 600)]);
    world.keeps = 400;
    world.use_once("a");
    let (ticket, _) = world.acquire("b");
    let effects = world.moved("a");
    assert!(
        gone(&effects).is_empty() && spawned(&effects).is_empty(),
        "it may come late"
    );
    assert!(
        world
            .policy
            .next_wake()
            .is_some_and(|at| at <= world.now + Duration::from_secs(5))
    );
    world.pass(Duration::from_secs(5));
    let effects = world.measure();
    let reason = EvictReason::ParkFailed(ParkFault::TooLittle {
        domain: GPU,
        freed: Bytes::mib(200),
        expected: Bytes::mib(600),
    });
    let worker = world.worker("a");
    let ends = Effect::Terminate {
        worker,
        reason: reason.clone(),
        kill: false,
    };
    assert!(effects.contains(&ends), "{effects:?}");
    assert_eq!(
        reason.to_string(),
        "its park gave back 200.00 MiB of 600.00 MiB on gpu:0, too little in time"
    );
    assert_eq!(spawned(&world.exit("a")), ["b"]);
    assert!(granted(&world.ready("b"), ticket));
    world.leave("b");
    let history = &world.policy.models()["a"].history;
    assert_eq!(history.evictions["park_freed_too_little"], 1);
    // The other one still can.
    world.keeps = 0;
    assert_eq!(parked(&world.acquire("a").1), ["b"]);
    world.moved("b");
    world.ready("a");
    world.leave("a");
    assert_eq!(gone(&world.acquire("b").1), ["a"]);
}

#[test]
fn a_call_that_fails_ends_the_worker_and_its_waiters_wait_for_the_next_life() {
    let mut world = one_parked(3000);
    let (ticket, _) = world.acquire("a");
    world.moved("b");
    let worker = world.worker("a");
    let said = "POST /wake_up answered 500".to_owned();
    let effects = world.step(Event::ParkFailed {
        worker: worker.clone(),
        said,
    });
    assert_eq!(gone(&effects), ["a"]);
    assert_eq!(refused(&effects, ticket), None);
    let effects = world.exit("a");
    assert_eq!(spawned(&effects), ["a"]);
    assert_ne!(world.worker("a"), worker);
    assert!(granted(&world.ready("a"), ticket));
    assert_eq!(
        world.policy.models()["a"].history.evictions["unpark_failed"],
        1
    );
}

#[test]
fn a_gate_that_does_not_close_keeps_the_worker_as_it_was() {
    let mut world = world(2000, &[("a", 50, 600), ("b", 50, 600)]);
    world.use_once("a");
    let before = world.policy.models()["a"].reservation.clone();
    world.acquire("b");
    let worker = world.worker("a");
    world.inside.get_mut(&worker).expect("it is ready").inside = 1;
    let effects = world.step(Event::EvictRefused { worker, inside: 1 });
    assert_eq!((parked(&effects), gone(&effects)), (vec![], vec![]));
    assert_eq!(phase(&world, "a"), Phase::Ready);
    assert_eq!(world.policy.models()["a"].reservation, before);
    // Once it is idle it is parked all the same.
    assert_eq!(parked(&world.leave("a")), ["a"]);
}

#[test]
fn whoever_asks_while_a_worker_parks_waits_and_is_served_by_the_same_worker() {
    let mut world = world(3000, &[("a", 50, 600), ("b", 50, 600)]);
    world.use_once("a");
    let worker = world.worker("a");
    let (_, _) = world.acquire("b");
    let (ticket, effects) = world.acquire("a");
    assert!(refused(&effects, ticket).is_none() && !granted(&effects, ticket));
    // Who waited longer comes first.
    assert_eq!(spawned(&world.moved("a")), ["b"]);
    world.ready("b");
    assert_eq!(parked(&world.leave("b")), ["b"]);
    assert_eq!(unparked(&world.moved("b")), ["a"]);
    assert!(granted(&world.moved("a"), ticket));
    assert_eq!(world.worker("a"), worker);
}

#[test]
fn whoever_leaves_while_a_worker_unparks_leaves_it_ready_and_idle() {
    let mut world = one_parked(3000);
    let (ticket, _) = world.acquire("a");
    world.moved("b");
    world.step(Event::Cancel { ticket });
    let effects = world.moved("a");
    assert!(!granted(&effects, ticket));
    assert_eq!(phase(&world, "a"), Phase::Ready);
    assert_eq!(world.policy.models()["a"].activity.inside, 0);
}

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
