//! What a changed configuration does to models and workers (A44).

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test picks the few effects it looks for"
)]

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use super::super::testing::{World, gone, granted, name, refused, spawned, spec};
use super::super::*;

impl World {
    /// The configuration changes: these models are added or changed, those are
    /// removed.
    fn configure(&mut self, models: Vec<(ModelSpec, bool)>, removed: &[&str]) -> Vec<Effect> {
        let models = models.into_iter().map(|(spec, new_worker)| ModelChange {
            setup: Setup {
                spec: Arc::new(spec),
                weights: Bytes::ZERO,
                footprint: BTreeMap::new(),
            },
            new_worker,
        });
        let change = Change {
            settings: self.policy.settings.clone(),
            models: models.collect(),
            removed: removed.iter().map(|model| name(model)).collect(),
        };
        self.step(Event::Configure(Box::new(change)))
    }

    fn phase(&self, model: &str) -> Phase {
        self.policy.models()[model].phase
    }
}

/// The same model with another command.
fn other(model: &str, declared: u64) -> ModelSpec {
    ModelSpec {
        command: vec!["other".into()],
        ..spec(model, Some(declared))
    }
}

fn reasons(effects: &[Effect]) -> Vec<&'static str> {
    let of = |effect: &Effect| match effect {
        Effect::Drain { reason, .. } | Effect::Terminate { reason, .. } => Some(reason.as_str()),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

#[test]
fn a44_who_is_not_named_by_a_change_is_left_alone() {
    let mut world = World::new(2000, &[("a", 400), ("b", 400), ("c", 400)]);
    for model in ["a", "b", "c"] {
        world.use_once(model);
    }
    let effects = world.configure(vec![(other("b", 400), true)], &[]);
    assert_eq!(gone(&effects), ["b"]);
    assert_eq!(world.phase("a"), Phase::Ready);
    assert_eq!(world.phase("c"), Phase::Ready);
    assert_eq!(spawned(&world.exit("b")), ["b"], "it is there again");
    assert_eq!(world.worker("b").generation, 2);
}

#[test]
fn a44_a_busy_worker_that_changed_drains_and_who_comes_meanwhile_waits_for_the_next() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    let effects = world.configure(vec![(other("a", 400), true)], &[]);
    assert_eq!(reasons(&effects), ["changed"]);
    assert_eq!(world.phase("a"), Phase::Draining);
    let (ticket, effects) = world.acquire("a");
    assert!(!granted(&effects, ticket) && refused(&effects, ticket).is_none());
    assert_eq!(gone(&world.leave("a")), ["a"]);
    assert_eq!(spawned(&world.exit("a")), ["a"]);
    assert_eq!(world.policy.models()["a"].spec.command, ["other"]);
    assert!(granted(&world.ready("a"), ticket));
    assert_eq!(
        world.policy.models()["a"].history.evictions.len(),
        0,
        "that was no eviction"
    );
}

#[test]
fn a44_a_load_that_changed_is_ended_and_begun_anew_and_its_waiters_stay() {
    let mut world = World::new(1000, &[("a", 400)]);
    let (ticket, _) = world.acquire("a");
    let effects = world.configure(vec![(other("a", 400), true)], &[]);
    assert_eq!(
        (gone(&effects), reasons(&effects)),
        (vec!["a".to_owned()], vec!["changed"])
    );
    assert_eq!(refused(&effects, ticket), None);
    assert_eq!(spawned(&world.exit("a")), ["a"]);
    assert!(granted(&world.ready("a"), ticket));
}

#[test]
fn a44_what_an_outdated_worker_used_teaches_nothing_of_the_new_one() {
    let mut world = World::with(2000, vec![spec("a", None)], &[("a", 400)]);
    world.use_once("a");
    world.measure();
    let before = world.policy.models()["a"].clone();
    assert!(before.peak()[&Domain::Host] > Bytes::ZERO);
    let changed = ModelSpec {
        memory: None,
        ..other("a", 0)
    };
    world.configure(vec![(changed, true)], &[]);
    let effects = world.exit("a");
    let learns = |effect: &Effect| matches!(effect, Effect::Learn { .. });
    assert!(!effects.iter().any(learns), "{effects:?}");
    assert!(world.policy.models()["a"].footprint.is_empty());
}

#[test]
fn a44_a_removed_model_refuses_its_waiters_drains_and_is_forgotten_with_its_bytes() {
    let mut world = World::new(1000, &[("a", 400), ("b", 400)]);
    world.acquire("a");
    world.ready("a");
    let (waits, _) = world.acquire("b");
    let effects = world.configure(Vec::new(), &["a", "b"]);
    let unknown = Some(Refusal::UnknownModel(name("b")));
    assert_eq!(refused(&effects, waits), unknown);
    assert_eq!(gone(&effects), ["b"], "it was loading");
    let (late, effects) = world.acquire("a");
    assert!(matches!(
        refused(&effects, late),
        Some(Refusal::UnknownModel(_))
    ));
    assert_eq!(gone(&world.leave("a")), ["a"]);
    assert_eq!(world.policy.usage(Domain::Host), Bytes::mib(400));
    let a = world.worker("a");
    let effects = world.exit_unmeasured(&a);
    assert!(world.policy.charged(Domain::Host) >= Bytes::mib(400));
    let forgets =
        |effect: &Effect| matches!(effect, Effect::Forget { model, .. } if model.as_str() == "a");
    assert!(!effects.iter().any(forgets), "its bytes are not back");
    let effects = world.measure();
    assert!(effects.iter().any(forgets), "{effects:?}");
    assert!(!world.policy.models().contains_key("a"));
}

#[test]
fn a44_a_removed_model_that_comes_back_while_it_drains_has_its_next_life() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    world.configure(Vec::new(), &["a"]);
    world.configure(vec![(other("a", 400), true)], &[]);
    let (ticket, effects) = world.acquire("a");
    assert_eq!(refused(&effects, ticket), None);
    world.leave("a");
    assert_eq!(spawned(&world.exit("a")), ["a"]);
    assert_eq!(world.worker("a").generation, 2);
    assert!(granted(&world.ready("a"), ticket));
}

#[test]
fn a44_a_model_that_was_forgotten_comes_back_with_a_later_life() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.use_once("a");
    world.configure(Vec::new(), &["a"]);
    world.exit("a");
    assert!(world.policy.models().is_empty());
    world.configure(vec![(spec("a", Some(400)), true)], &[]);
    world.acquire("a");
    assert_eq!(world.worker("a").generation, 2);
}

#[test]
fn a44_an_added_model_is_preloaded_when_it_asks_for_that() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.size.insert(name("new"), 300);
    let added = ModelSpec {
        preload: true,
        ..spec("new", Some(300))
    };
    let effects = world.configure(vec![(added, true)], &[]);
    assert_eq!(spawned(&effects), ["new"]);
}

#[test]
fn a44_what_holds_for_any_worker_holds_at_once() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    let mut changed = spec("a", Some(300));
    changed.pinned = true;
    changed.concurrency = NonZeroU32::new(1);
    let effects = world.configure(vec![(changed.clone(), false)], &[]);
    assert_eq!(effects, []);
    let a = &world.policy.models()["a"];
    assert_eq!((a.phase, a.pinned, a.is_full()), (Phase::Ready, true, true));
    let (waits, effects) = world.acquire("a");
    assert!(!granted(&effects, waits));
    // With room for more, who waits is let in by the same step.
    changed.concurrency = None;
    let effects = world.configure(vec![(changed.clone(), false)], &[]);
    assert!(granted(&effects, waits));
    world.leave("a");
    world.leave("a");
    changed.pinned = false;
    changed.idle_timeout = Some(Duration::from_secs(5));
    world.configure(vec![(changed, false)], &[]);
    world.pass(Duration::from_secs(6));
    assert_eq!(gone(&world.step(Event::Tick)), ["a"]);
}

#[test]
fn a44_an_operators_pin_and_limit_stay_when_the_configuration_did_not_change_them() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.step(Event::Pin {
        model: name("a"),
        pinned: true,
    });
    let host = Domain::Host;
    world.step(Event::Limit {
        domain: host,
        limit: Bytes::mib(700),
    });
    let kind = ModelSpec {
        kind: "other".into(),
        ..spec("a", Some(400))
    };
    world.configure(vec![(kind, false)], &[]);
    assert!(world.policy.models()["a"].pinned);
    assert_eq!(world.policy.domains()[&host].limit, Bytes::mib(700));
}

#[test]
fn a44_a_smaller_limit_evicts_who_is_idle_and_patience_is_that_of_now() {
    let mut world = World::new(1000, &[("a", 400), ("b", 400)]);
    world.use_once("a");
    world.use_once("b");
    world.policy.settings.limit = Bytes::mib(500);
    let effects = world.configure(Vec::new(), &[]);
    assert_eq!(gone(&effects), ["a"]);
    world.exit("a");
    world.acquire("b");
    world.acquire("a");
    world.policy.settings.patience = Duration::ZERO;
    assert_eq!(reasons(&world.configure(Vec::new(), &[])), ["make_room"]);
}

#[test]
fn a44_a_mended_model_is_tried_again_at_once() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.exit("a");
    assert_eq!(world.phase("a"), Phase::Backoff);
    world.configure(vec![(other("a", 400), true)], &[]);
    assert_eq!(spawned(&world.acquire("a").1), ["a"]);
}

#[test]
fn a44_a_worker_that_drains_to_make_room_does_not_stay_once_it_is_outdated() {
    let mut world = World::new(500, &[("a", 400), ("b", 400)]);
    world.acquire("a");
    world.ready("a");
    let (waits, _) = world.acquire("b");
    world.pass(Duration::from_secs(6));
    world.step(Event::Tick);
    assert_eq!(world.phase("a"), Phase::Draining);
    world.configure(vec![(other("a", 400), true)], &[]);
    let effects = world.step(Event::Cancel { ticket: waits });
    assert_eq!(effects, [], "it is not called off");
    assert_eq!(gone(&world.leave("a")), ["a"]);
}

#[test]
fn a44_an_unload_of_a_worker_that_is_replaced_keeps_the_model_unloaded() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    world.configure(vec![(other("a", 400), true)], &[]);
    let ticket = world.ticket();
    world.step(Event::Unload {
        ticket,
        model: name("a"),
    });
    world.leave("a");
    let effects = world.exit("a");
    assert_eq!(spawned(&effects), [] as [&str; 0]);
    assert!(effects.contains(&Effect::Done { ticket }));
}

#[test]
fn a44_while_residentd_ends_a_change_starts_and_ends_nothing() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.ready("a");
    let until = world.now + Duration::from_secs(30);
    world.step(Event::Shutdown { until });
    assert_eq!(world.configure(vec![(other("a", 400), true)], &[]), []);
}
