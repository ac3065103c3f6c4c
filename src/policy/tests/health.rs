//! Workers that run and are of no use.

use std::time::Duration;

use super::super::testing::{World, gone, granted, refused, spawned};
use super::super::*;
use crate::model::Ailment;

fn hung() -> Ailment {
    Ailment::Silent {
        waiting: 2,
        silent: Duration::from_secs(300),
    }
}

fn unhealthy(world: &mut World, model: &str, why: Ailment) -> Vec<Effect> {
    let worker = world.worker(model);
    world.step(Event::Unhealthy { worker, why })
}

#[test]
fn a46_an_unhealthy_worker_is_ended_with_requests_inside_and_who_comes_gets_the_next_life() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    let effects = unhealthy(&mut world, "a", hung());
    let ended = Effect::Terminate {
        worker: world.worker("a"),
        reason: EvictReason::Unhealthy { why: hung() },
        kill: false,
    };
    assert_eq!(effects, [ended]);
    let last = world.policy.models()["a"].failures.last.clone();
    assert_eq!(
        last.as_deref(),
        Some("unhealthy: no byte for 300.0 s while requests wait (2)")
    );
    assert_eq!(unhealthy(&mut world, "a", hung()), [], "it is told once");
    let (ticket, effects) = world.acquire("a");
    assert_eq!(refused(&effects, ticket), None);
    assert_eq!(spawned(&world.exit("a")), ["a"]);
    assert!(granted(&world.ready("a"), ticket));
    let history = &world.policy.models()["a"].history;
    assert_eq!(history.unhealthy["silent"], 1);
    assert_eq!((history.crashes, history.evictions.len()), (0, 0));
}

#[test]
fn a46_one_that_a_signal_stopped_is_killed_at_once() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.use_once("a");
    let why = Ailment::Stopped {
        times: 3,
        over: Duration::from_secs(32),
    };
    let effects = unhealthy(&mut world, "a", why);
    assert!(matches!(
        effects[..],
        [Effect::Terminate { kill: true, .. }]
    ));
}

#[test]
fn a46_a_model_that_is_unhealthy_again_and_again_opens_the_breaker() {
    let mut world = World::new(1000, &[("a", 400)]);
    let mut loads = 0;
    for _ in 0..40 {
        let (_, effects) = world.acquire("a");
        if !spawned(&effects).is_empty() {
            loads += 1;
            world.ready("a");
            unhealthy(&mut world, "a", hung());
            world.exit("a");
        }
        world.pass(Duration::from_secs(5));
    }
    assert_eq!(loads, 5);
    assert_eq!(world.policy.models()["a"].phase, Phase::Failed);
    let (ticket, effects) = world.acquire("a");
    let refusal = refused(&effects, ticket);
    let Some(Refusal::BackingOff { cause, .. }) = refusal else {
        panic!("{refusal:?}");
    };
    assert!(cause.contains("no byte for 300.0 s"), "{cause}");
}

#[test]
fn a_worker_that_hangs_while_it_drains_holds_up_nobody() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.acquire("a");
    world.ready("a");
    let (ticket, _) = world.acquire("b");
    world.pass(Duration::from_secs(6));
    world.measure();
    assert_eq!(world.policy.models()["a"].phase, Phase::Draining);
    assert_eq!(gone(&unhealthy(&mut world, "a", hung())), ["a"]);
    assert_eq!(spawned(&world.exit("a")), ["b"]);
    assert!(granted(&world.ready("b"), ticket));
    // It went to make room, as it was to.
    let state = &world.policy.models()["a"];
    assert_eq!(state.phase, Phase::Stopped);
    assert_eq!(state.history.evictions["make_room"], 1);
}

#[test]
fn an_unhealthy_life_that_is_over_changes_nothing() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.use_once("a");
    let older = world.worker("a");
    world.exit("a");
    let why = hung();
    let worker = older.clone();
    assert_eq!(world.step(Event::Unhealthy { worker, why }), []);
    world.use_once("a");
    let why = hung();
    assert_eq!(world.step(Event::Unhealthy { worker: older, why }), []);
    assert_eq!(world.policy.models()["a"].phase, Phase::Ready);
}
