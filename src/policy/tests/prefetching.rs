//! Whose files are read ahead.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test picks the few effects it looks for"
)]

use std::time::Duration;

use super::super::testing::{World, gone, granted, name, spawned, spec};
use super::super::*;
use crate::model::{Prefetch, PrefetchReason};

/// Room for one of two models of 600 MiB, whose files are read `when`.
fn world(when: Prefetch) -> World {
    let models = [("a", 600), ("b", 600)];
    let specs = models.map(|(model, size)| ModelSpec {
        prefetch: when,
        ..spec(model, Some(size))
    });
    World::with(1000, specs.into(), &models)
}

fn read(effects: &[Effect]) -> Vec<String> {
    let of = |effect: &Effect| match effect {
        Effect::Prefetch { model, reason } => Some(format!("{model} {}", reason.as_str())),
        Effect::CallOff { model } => Some(format!("{model} no more")),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

fn call_off(model: &str) -> Effect {
    Effect::CallOff { model: name(model) }
}

#[test]
fn files_are_read_from_the_first_wait_until_the_worker_is_ready() {
    let mut world = world(Prefetch::Waiting);
    let (_, effects) = world.acquire("a");
    assert_eq!(read(&effects), ["a starting"]);
    assert!(world.ready("a").contains(&call_off("a")));
    world.leave("a");
    let (waiter, effects) = world.acquire("b");
    assert_eq!(gone(&effects), ["a"]);
    assert_eq!(read(&effects), ["b waiting"], "while the victim ends");
    let effects = world.exit("a");
    assert_eq!(spawned(&effects), ["b"]);
    assert!(read(&effects).is_empty(), "it goes on");
    let effects = world.ready("b");
    assert!(effects.contains(&call_off("b")) && granted(&effects, waiter));
}

#[test]
fn reading_is_called_off_when_whoever_waited_leaves_and_at_a_shutdown() {
    let mut world = world(Prefetch::Waiting);
    world.acquire("a");
    world.ready("a");
    let (waiter, effects) = world.acquire("b");
    assert!(gone(&effects).is_empty(), "a is busy");
    let reason = PrefetchReason::Waiting;
    let model = name("b");
    assert!(effects.contains(&Effect::Prefetch { model, reason }));
    let effects = world.step(Event::Cancel { ticket: waiter });
    assert_eq!(effects, [call_off("b")]);
    let (_, effects) = world.acquire("b");
    assert_eq!(read(&effects), ["b waiting"]);
    let until = world.now + Duration::from_secs(1);
    assert!(
        world
            .step(Event::Shutdown { until })
            .contains(&call_off("b"))
    );
}

#[test]
fn nothing_is_read_where_that_is_off() {
    let mut world = world(Prefetch::Off);
    assert!(read(&world.acquire("a").1).is_empty());
    world.ready("a");
    assert!(read(&world.acquire("b").1).is_empty());
}

#[test]
fn in_idle_time_the_model_that_was_used_last_is_likeliest_and_one_never_used_is_not_likely() {
    let mut world = world(Prefetch::Idle);
    world.acquire("a");
    world.ready("a");
    world.leave("a");
    world.acquire("b");
    world.exit("a");
    let likely = world.policy.likely_next(world.now);
    assert_eq!(likely, [name("a")], "b loads, and was never used");
    world.ready("b");
    world.pass(Duration::from_secs(60));
    world.leave("b");
    assert_eq!(
        world.policy.likely_next(world.now),
        [name("a")],
        "b is resident"
    );
    world.step(Event::Unload {
        ticket: 99,
        model: name("b"),
    });
    world.exit("b");
    assert_eq!(world.policy.likely_next(world.now), [name("b"), name("a")]);
}

#[test]
fn what_is_to_spare_is_beyond_pressure_the_reserve_the_need_and_mapped_files() {
    let mut world = world(Prefetch::Waiting);
    let spare = |world: &World, mapped| {
        let spare = world.policy.spare_for(&name("a"), Bytes::mib(mapped));
        let (spare, before) = spare.expect("it is known");
        (spare.get() >> 20, before.get() >> 20)
    };
    // 16 GiB less 10 % and 600 MiB.
    assert_eq!(spare(&world, 0), (14_145, 14_745));
    assert_eq!(spare(&world, 10_000), (4_145, 4_745));
    assert_eq!(spare(&world, 14_200), (0, 545));
    world.acquire("a");
    world.ready("a");
    world.step(Event::Tick);
    let (spare, before) = spare(&world, 0);
    assert_eq!(spare, before, "it has all it needs");
}
