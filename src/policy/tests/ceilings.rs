//! A model's own ceiling, and what a death for want of memory teaches.

use std::time::Duration;

use super::super::testing::{World, gone, name, spawned, spec};
use super::super::*;

/// A model that needs 100 MiB and may have 200.
fn leaky(change: impl FnOnce(&mut ModelSpec)) -> World {
    let mut leaky = ModelSpec {
        max_memory: Some(Bytes::mib(200)),
        ..spec("leaky", Some(100))
    };
    change(&mut leaky);
    World::with(1000, vec![leaky], &[("leaky", 100)])
}

fn grows_to(world: &mut World, mib: u64) -> Vec<Effect> {
    world.size.insert(name("leaky"), mib);
    world.measure()
}

#[test]
fn over_its_ceiling_a_model_is_recycled_when_it_is_idle_and_not_before() {
    let mut world = leaky(|_| {});
    world.acquire("leaky");
    world.ready("leaky");
    assert_eq!(gone(&grows_to(&mut world, 250)), Vec::<String>::new());
    assert!(world.policy.awaits_idle(), "its end is not to be missed");
    let effects = world.leave("leaky");
    assert_eq!(gone(&effects), ["leaky"]);
    let Some(Effect::Evict { reason, kill, .. }) = effects.first() else {
        panic!("{effects:?}");
    };
    assert!(!kill);
    assert_eq!(reason.as_str(), "max_memory");
    assert_eq!(
        reason.to_string(),
        "it holds 250.00 MiB, over its max_memory of 200.00 MiB"
    );
    // Nobody waits for it, so it is not loaded again before it is asked for.
    assert_eq!(spawned(&world.exit("leaky")), Vec::<String>::new());
    world.size.insert(name("leaky"), 100);
    assert_eq!(spawned(&world.acquire("leaky").1), ["leaky"]);
}

#[test]
fn far_over_its_ceiling_a_busy_model_is_drained_and_then_ended() {
    let mut world = leaky(|_| {});
    world.acquire("leaky");
    world.ready("leaky");
    let effects = grows_to(&mut world, 301);
    assert!(
        matches!(effects.first(), Some(Effect::Drain { .. })),
        "{effects:?}"
    );
    assert_eq!(gone(&world.leave("leaky")), ["leaky"]);
}

#[test]
fn a_pinned_or_preloaded_model_that_is_recycled_comes_back_by_itself() {
    let changes: [fn(&mut ModelSpec); 2] = [|s| s.pinned = true, |s| s.preload = true];
    for change in changes {
        let mut world = leaky(change);
        if world.policy.models()["leaky"].phase == Phase::Starting {
            world.ready("leaky");
        } else {
            world.use_once("leaky");
        }
        assert_eq!(gone(&grows_to(&mut world, 250)), ["leaky"]);
        world.size.insert(name("leaky"), 100);
        assert_eq!(spawned(&world.exit("leaky")), ["leaky"]);
    }
}

#[test]
fn a_model_that_died_for_want_of_memory_is_expected_to_need_more_next_time() {
    let specs = vec![spec("greedy", None)];
    let mut world = World::with(1000, specs, &[("greedy", 400)]);
    world.acquire("greedy");
    let worker = world.worker("greedy");
    world.holding.insert(worker.clone());
    world.measure();
    world.holding.clear();
    let effects = world.step(Event::Exited {
        worker,
        status: "signal SIGKILL".into(),
        out_of_memory: vec![Domain::Host],
        last_lines: Vec::new(),
    });
    let learned = effects.iter().find_map(|effect| match effect {
        Effect::Learn { footprint, .. } => Some(footprint[&Domain::Host].peak),
        Effect::Grant { .. }
        | Effect::Done { .. }
        | Effect::Reject { .. }
        | Effect::CleanedUp { .. }
        | Effect::Spawn { .. }
        | Effect::Evict { .. }
        | Effect::Park { .. }
        | Effect::Parked { .. }
        | Effect::Unpark { .. }
        | Effect::Drain { .. }
        | Effect::Resume { .. }
        | Effect::Forget { .. }
        | Effect::Prefetch { .. }
        | Effect::CallOff { .. }
        | Effect::Terminate { .. }
        | Effect::Reclaimed { .. }
        | Effect::Finished => None,
    });
    assert_eq!(learned, Some(Bytes::mib(500)));
    world.measure();
    world.pass(Duration::from_secs(2));
    world.acquire("greedy");
    assert_eq!(world.policy.charged(Domain::Host), Bytes::mib(500));
}
