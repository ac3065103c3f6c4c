//! When the policy wants to be woken: never again for a moment that has passed
//! and from which nothing came. The controller would not sleep then.

use std::time::Duration;

use super::super::testing::{World, spec};
use super::super::*;

/// Lets the time come when the policy wants to be woken, and wakes it.
#[track_caller]
fn wake(world: &mut World) {
    let due = world.policy.next_wake().expect("something is due");
    world.now = world.now.max(due);
    world.step(Event::Tick);
    let next = world.policy.next_wake();
    assert!(next.is_none_or(|at| at > world.now), "{next:?}");
}

/// Room for one of two; `a` is busy and somebody waits for `b`.
fn b_waits_for_a() -> World {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.acquire("a");
    world.ready("a");
    world.acquire("b");
    world
}

/// The end of the grace used to stay due for as long as workers took to end.
#[test]
fn a_shutdown_whose_grace_is_over_waits_for_workers_asleep() {
    let mut world = b_waits_for_a();
    let until = world.now + Duration::from_secs(3);
    world.step(Event::Shutdown { until });
    wake(&mut world);
    assert_eq!(world.now, until);
    assert_eq!(world.policy.next_wake(), None, "only workers' ends are due");
}

/// The end of its patience used to stay due until the shutdown was over.
#[test]
fn in_a_shutdown_nobody_loses_patience() {
    let mut world = b_waits_for_a();
    let until = world.now + Duration::from_secs(20);
    world.step(Event::Shutdown { until });
    assert_eq!(world.policy.next_wake(), Some(until));
}

/// The end of a rest used to stay due until the shutdown was over.
#[test]
fn in_a_shutdown_nothing_that_failed_is_tried_again() {
    let mut specs = vec![spec("a", Some(400)), spec("b", Some(400))];
    specs[0].preload = true;
    let mut world = World::with(1000, specs, &[("a", 400), ("b", 400)]);
    world.acquire("b");
    world.exit("a");
    let until = world.now + Duration::from_secs(20);
    world.step(Event::Shutdown { until });
    assert_eq!(world.policy.next_wake(), None, "only the end of b is due");
}

/// Their deadline used to stay due until the next measurement, however late
/// that came.
#[test]
fn bytes_that_were_not_looked_for_yet_are_not_given_up() {
    let mut world = World::new(1000, &[("a", 600)]);
    world.use_once("a");
    let worker = world.worker("a");
    world.exit_unmeasured(&worker);
    assert_eq!(world.policy.next_wake(), None);
}
