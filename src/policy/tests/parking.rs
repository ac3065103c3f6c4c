//! Parks: when they are chosen, what they need, and how they fail.

use std::sync::Arc;
use std::time::Duration;

use super::super::testing::{
    World, gone, granted, name, park, parked, refused, spawned, spec, unparked,
};
use super::super::*;
use crate::model::GpuRequest;

pub(super) const GPU: Domain = Domain::Gpu(0);

/// Models by what they hold of host RAM and of the one GPU of 1000 MiB, in MiB;
/// all but those whose names begin with `plain` can be parked.
pub(super) fn world(limit: u64, models: &[(&str, u64, u64)]) -> World {
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
pub(super) fn one_parked(limit: u64) -> World {
    let mut world = world(limit, &[("a", 50, 600), ("b", 50, 600)]);
    world.use_once("a");
    world.acquire("b");
    world.moved("a");
    world.ready("b");
    world.leave("b");
    world
}

pub(super) fn phase(world: &World, model: &str) -> Phase {
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
fn a_worker_that_was_not_measured_since_it_became_ready_is_measured_first() {
    let mut world = world(3000, &[("a", 50, 600), ("b", 50, 600)]);
    world.acquire("a");
    let worker = world.worker("a");
    world.holding.insert(worker.clone());
    world.inside.insert(worker.clone(), Activity::default());
    world.step(Event::Ready { worker });
    world.leave_at_once("a");
    let (_, effects) = world.acquire("b");
    assert_eq!((parked(&effects), gone(&effects)), (vec![], vec![]));
    assert_eq!(parked(&world.measure()), ["a"]);
}
