//! Why a model is not ready, what would go for it, and when it would be ready.

use std::time::Duration;

use super::super::testing::{World, gone, name, refused, spec};
use super::super::*;

fn explain(world: &World, model: &str) -> Explanation {
    let explanation = world.policy.explain(&name(model), world.now);
    explanation.expect("it is configured")
}

fn holders(holders: &[Holder]) -> Vec<(&str, Option<Protection>)> {
    let each = holders.iter();
    each.map(|holder| (holder.model.as_str(), holder.protection))
        .collect()
}

#[test]
fn a_model_that_nobody_loaded_fits_and_is_ready_after_a_load_of_unknown_length() {
    let world = World::new(1000, &[("a", 400)]);
    let told = explain(&world, "a");
    assert_eq!(
        (told.why, told.outlook),
        (Why::NeverLoaded, Outlook::Starts)
    );
    assert_eq!(told.ready_in, None);
    assert_eq!(world.policy.explain(&name("nobody"), world.now), None);
}

#[test]
fn an_evicted_model_tells_for_whom_and_who_would_go_for_it_now() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.use_once("a");
    world.acquire("b");
    world.exit("a");
    world.ready("b");
    world.leave("b");
    let told = explain(&world, "a");
    let Why::Evicted(EvictReason::MakeRoom { for_model, .. }) = &told.why else {
        panic!("{told:?}");
    };
    assert_eq!(*for_model, name("b"));
    let Outlook::Evicts { victims, shortage } = &told.outlook else {
        panic!("{told:?}");
    };
    assert_eq!(holders(victims), [("b", None)]);
    assert_eq!(victims[0].holds[&Domain::Host], Bytes::mib(600));
    assert_eq!(
        (shortage.domain, shortage.need, shortage.room),
        (Domain::Host, Bytes::mib(600), Bytes::mib(400))
    );
    assert_eq!(told.ready_in, told.last_load);
    assert!(told.last_load.is_some(), "it was loaded once");
}

#[test]
fn what_is_explained_is_what_then_happens() {
    let models = [("a", 300), ("b", 300), ("c", 300), ("d", 500)];
    let mut world = World::new(1000, &models);
    for model in ["a", "b", "c"] {
        world.use_once(model);
    }
    let told = explain(&world, "d");
    let Outlook::Evicts { victims, .. } = &told.outlook else {
        panic!("{told:?}");
    };
    let named: Vec<_> = victims.iter().map(|v| v.model.to_string()).collect();
    assert_eq!(gone(&world.acquire("d").1), named);
}

#[test]
fn a_model_that_waits_for_busy_workers_names_them_and_what_is_missing() {
    let mut world = World::new(1000, &[("busy", 600), ("other", 200), ("late", 700)]);
    world.acquire("busy");
    world.ready("busy");
    world.use_once("other");
    let before = explain(&world, "late");
    assert_eq!(before.why, Why::NeverLoaded);
    world.acquire("late");
    let told = explain(&world, "late");
    assert_eq!(told.why, Why::Waiting);
    let Outlook::Waits {
        holders: who,
        shortage: Some(shortage),
        drains_in,
        ..
    } = &told.outlook
    else {
        panic!("{told:?}");
    };
    assert_eq!(holders(who), [("busy", Some(Protection::Busy))]);
    assert_eq!(who[0].inside, 1);
    assert_eq!(
        (shortage.need, shortage.room),
        (Bytes::mib(700), Bytes::mib(200))
    );
    let patience = world.policy.settings.patience;
    assert_eq!(*drains_in, Some(patience));
    assert_eq!(told.ready_in, None, "nobody knows when a request ends");
    assert!(told.outlook.is_blocked());
    // Asking has changed nothing, and patience runs from the request on.
    assert!(before.outlook.is_blocked());
    world.pass(Duration::from_secs(1));
    let later = explain(&world, "late").outlook;
    let Outlook::Waits {
        drains_in: Some(left),
        ..
    } = later
    else {
        panic!("{later:?}");
    };
    assert_eq!(left + Duration::from_secs(1), patience);
    world.pass(patience);
    let Outlook::Evicts { victims, .. } = explain(&world, "late").outlook else {
        panic!("{:?}", explain(&world, "late"));
    };
    assert_eq!(holders(&victims), [("busy", Some(Protection::Busy))]);
}

#[test]
fn a_ready_model_that_is_full_waits_for_those_inside() {
    let mut narrow = spec("a", Some(300));
    narrow.concurrency = std::num::NonZeroU32::new(1);
    let mut world = World::with(1000, vec![narrow], &[("a", 300)]);
    world.acquire("a");
    world.ready("a");
    let told = explain(&world, "a");
    let Outlook::Waits { holders: who, .. } = &told.outlook else {
        panic!("{told:?}");
    };
    assert_eq!((&told.why, who[0].inside), (&Why::Ready, 1));
    assert_eq!(holders(who), [("a", Some(Protection::Busy))]);
    world.leave("a");
    assert_eq!(
        explain(&world, "a").to_string(),
        "a is ready; a request is served at once"
    );
}

#[test]
fn a_model_that_waits_for_memory_on_its_way_back_names_only_whose_it_is() {
    let mut world = World::new(1000, &[("busy", 200), ("old", 600), ("new", 700)]);
    world.use_once("old");
    world.acquire("busy");
    world.ready("busy");
    assert_eq!(gone(&world.acquire("new").1), ["old"]);
    let told = explain(&world, "new");
    let Outlook::Waits { holders: who, .. } = &told.outlook else {
        panic!("{told:?}");
    };
    assert_eq!(holders(who), [("old", Some(Protection::Draining))]);
    assert!(!told.outlook.is_blocked());
    let old = world.worker("old");
    world.exit_unmeasured(&old);
    let told = explain(&world, "new");
    let Outlook::Waits { holders: who, .. } = &told.outlook else {
        panic!("{told:?}");
    };
    assert_eq!(holders(who), [], "gone, and not measured to be back");
}

#[test]
fn a_model_that_backs_off_tells_the_cause_and_until_when() {
    let mut world = World::new(1000, &[("a", 400)]);
    world.acquire("a");
    world.exit("a");
    let told = explain(&world, "a");
    let Why::BackingOff {
        cause,
        failures,
        until,
    } = &told.why
    else {
        panic!("{told:?}");
    };
    assert_eq!(
        (cause.as_str(), *failures),
        ("exit code 1 before it was ready", 1)
    );
    assert!(*until > world.now);
    assert!(matches!(
        told.outlook,
        Outlook::Refused(Refusal::BackingOff { .. })
    ));
    world.pass(Duration::from_secs(5));
    let told = explain(&world, "a");
    assert!(matches!(told.why, Why::Failed { .. }), "{told:?}");
    assert_eq!(told.outlook, Outlook::Starts);
}

#[test]
fn a_model_that_is_too_large_is_impossible_with_both_numbers() {
    let mut world = World::new(1000, &[("huge", 2000)]);
    let told = explain(&world, "huge");
    let Why::Impossible(refusal) = &told.why else {
        panic!("{told:?}");
    };
    let (ticket, effects) = world.acquire("huge");
    assert_eq!(refused(&effects, ticket).as_ref(), Some(refusal));
}

#[test]
fn idle_and_unloaded_and_leaving_are_told_apart() {
    let specs = vec![
        ModelSpec {
            idle_timeout: Some(Duration::from_secs(10)),
            ..spec("a", Some(300))
        },
        spec("b", Some(300)),
    ];
    let mut world = World::with(1000, specs, &[("a", 300), ("b", 300)]);
    world.use_once("a");
    world.use_once("b");
    assert_eq!(explain(&world, "a").why, Why::Ready);
    assert_eq!(explain(&world, "a").outlook, Outlook::Served);
    world.pass(Duration::from_secs(11));
    world.step(Event::Tick);
    let leaving = explain(&world, "a");
    assert!(
        matches!(leaving.why, Why::Leaving(Some(EvictReason::Idle { .. }))),
        "{leaving:?}"
    );
    world.exit("a");
    assert_eq!(explain(&world, "a").why.as_str(), "idle");
    let ticket = world.ticket();
    world.step(Event::Unload {
        ticket,
        model: name("b"),
    });
    world.exit("b");
    assert_eq!(explain(&world, "b").why, Why::Unloaded);
}

#[test]
fn while_it_loads_the_rest_of_the_last_load_is_told() {
    let mut world = World::new(1000, &[("a", 400), ("b", 900)]);
    world.use_once("a");
    world.exit("a");
    world.acquire("a");
    let told = explain(&world, "a");
    assert_eq!(
        (&told.why, &told.outlook),
        (&Why::Loading, &Outlook::Starts)
    );
    assert_eq!(told.ready_in, told.last_load);
    world.pass(Duration::from_millis(40));
    let later = explain(&world, "a").ready_in.expect("it is known");
    assert_eq!(told.ready_in, Some(later + Duration::from_millis(40)));
    world.pass(Duration::from_secs(60));
    assert_eq!(explain(&world, "a").ready_in, None, "longer than ever");
}

#[test]
fn a_sentence_holds_the_reason_the_numbers_and_what_would_go() {
    let mut world = World::new(1000, &[("a", 600), ("b", 600)]);
    world.use_once("a");
    let told = explain(&world, "b").to_string();
    assert_eq!(
        told,
        "b was not loaded since residentd started; for a request a (idle, host 600.00 MiB) would go: \
         it needs 600.00 MiB on host, there is room for 400.00 MiB"
    );
}
