//! Models on machines with GPUs.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::event::{Event, GpuFacts};
use super::super::testing::{World, drained, gone, name, refused, spawned, spec};
use super::super::words::Refusal;
use super::super::{Activity, Effect, EvictReason, PressureLevel};
use crate::model::{Bytes, DeviceRef, Domain, GpuRequest, GpuVendor, ModelSpec};

/// A model that declares this much VRAM on each of its GPUs, and little RAM.
fn on(gpus: GpuRequest, model: &str, vram: Option<u64>) -> ModelSpec {
    ModelSpec {
        gpus,
        vram: vram.map(Bytes::mib),
        ..spec(model, Some(10))
    }
}

/// A machine with these GPUs and models; each declares what it holds.
fn machine(gpus: &[u64], models: &[(&str, GpuRequest, u64)]) -> World {
    let specs = models
        .iter()
        .map(|(model, gpus, vram)| on(gpus.clone(), model, Some(*vram)))
        .collect();
    world(gpus, specs, models)
}

fn world(gpus: &[u64], specs: Vec<ModelSpec>, models: &[(&str, GpuRequest, u64)]) -> World {
    let sizes: Vec<_> = models.iter().map(|(model, ..)| (*model, 10)).collect();
    let mut world = World::with(8000, specs, &sizes);
    world.gpus = gpus.to_vec();
    world.vram = models
        .iter()
        .map(|(model, _, vram)| (name(model), *vram))
        .collect();
    world.measure();
    world
}

const ONE: GpuRequest = GpuRequest::Count(1);

fn placed(effects: &[Effect]) -> Option<Vec<u32>> {
    effects.iter().find_map(|effect| {
        if let Effect::Spawn { gpus, .. } = effect {
            Some(gpus.clone())
        } else {
            None
        }
    })
}

#[test]
fn the_gpu_on_which_least_is_left_over_is_taken() {
    let mut world = machine(
        &[24_000, 8_000, 16_000],
        &[("a", ONE, 6_000), ("b", ONE, 6_000)],
    );
    assert_eq!(placed(&world.acquire("a").1), Some(vec![1]));
    world.ready("a");
    assert_eq!(placed(&world.acquire("b").1), Some(vec![2]));
}

#[test]
fn without_room_anywhere_the_cheapest_eviction_decides() {
    let mut world = machine(
        &[10_000, 10_000],
        &[
            ("small", ONE, 4_000),
            ("other", ONE, 4_000),
            ("large", ONE, 8_000),
            ("new", ONE, 9_000),
        ],
    );
    // Two small ones share gpu:0, the large one has gpu:1.
    for model in ["small", "other", "large"] {
        world.use_once(model);
    }
    assert_eq!(world.placed[&world.worker("large")], [1]);
    let (_, effects) = world.acquire("new");
    assert_eq!(gone(&effects), ["large"]);
    assert_eq!(placed(&world.exit("large")), Some(vec![1]));
}

#[test]
fn a_tensor_parallel_model_needs_all_its_gpus_at_once() {
    let two = GpuRequest::Count(2);
    let mut world = machine(
        &[10_000, 10_000],
        &[("single", ONE, 7_000), ("wide", two, 6_000)],
    );
    world.use_once("single");
    let (_, effects) = world.acquire("wide");
    assert_eq!(gone(&effects), ["single"]);
    assert_eq!(placed(&effects), None);
    assert_eq!(placed(&world.exit("single")), Some(vec![0, 1]));
}

#[test]
fn named_gpus_are_taken_by_index_or_uuid_and_missing_ones_are_told() {
    let named = |list: &[&str]| {
        GpuRequest::These(list.iter().map(|n| DeviceRef::Uuid((*n).into())).collect())
    };
    let by_index = GpuRequest::These(vec![DeviceRef::Index(0)]);
    let mut world = machine(
        &[10_000, 10_000],
        &[
            ("uuid", named(&["GPU-1"]), 100),
            ("index", by_index, 100),
            ("nowhere", named(&["GPU-7"]), 100),
            ("three", GpuRequest::Count(3), 100),
        ],
    );
    assert_eq!(placed(&world.acquire("uuid").1), Some(vec![1]));
    assert_eq!(placed(&world.acquire("index").1), Some(vec![0]));
    for model in ["nowhere", "three"] {
        let (ticket, effects) = world.acquire(model);
        let refusal = refused(&effects, ticket).expect("it is refused");
        assert_eq!(refusal.code(), "no_device", "{refusal}");
    }
}

#[test]
fn a13_a_model_larger_than_a_gpu_is_refused_with_both_numbers() {
    let mut world = machine(&[10_000], &[("idle", ONE, 5_000), ("huge", ONE, 12_000)]);
    world.use_once("idle");
    let (ticket, effects) = world.acquire("huge");
    assert_eq!(gone(&effects), Vec::<String>::new());
    assert_eq!(
        refused(&effects, ticket),
        Some(Refusal::TooLarge {
            model: name("huge"),
            domain: Domain::Gpu(0),
            need: Bytes::mib(12_000),
            budget: Bytes::mib(10_000),
        })
    );
}

#[test]
fn one_load_at_a_time_on_a_gpu_and_another_gpu_is_not_held_up() {
    let zero = GpuRequest::These(vec![DeviceRef::Index(0)]);
    let one = GpuRequest::These(vec![DeviceRef::Index(1)]);
    let mut world = machine(
        &[10_000, 10_000],
        &[
            ("a", zero.clone(), 1_000),
            ("b", zero, 1_000),
            ("c", one, 1_000),
        ],
    );
    assert_eq!(spawned(&world.acquire("a").1), ["a"]);
    // There is room for b on gpu:0, but a is loading there.
    assert_eq!(spawned(&world.acquire("b").1), Vec::<String>::new());
    assert_eq!(spawned(&world.acquire("c").1), ["c"]);
    assert_eq!(spawned(&world.ready("a")), ["b"]);
}

#[test]
fn a16_vram_that_returns_late_delays_only_its_own_gpu() {
    let zero = GpuRequest::These(vec![DeviceRef::Index(0)]);
    let one = GpuRequest::These(vec![DeviceRef::Index(1)]);
    let mut world = machine(
        &[10_000, 10_000],
        &[
            ("old", zero.clone(), 8_000),
            ("new", zero, 8_000),
            ("else", one, 8_000),
        ],
    );
    world.use_once("old");
    assert_eq!(gone(&world.acquire("new").1), ["old"]);
    // The process is gone, its memory is not back yet.
    world.late = BTreeMap::from([(0, 8_000)]);
    assert_eq!(spawned(&world.exit("old")), Vec::<String>::new());
    assert_eq!(spawned(&world.acquire("else").1), ["else"]);
    world.pass(Duration::from_millis(700));
    assert_eq!(spawned(&world.measure()), Vec::<String>::new());
    world.late.clear();
    assert_eq!(spawned(&world.measure()), ["new"]);
}

#[test]
fn a17_a_reading_torn_by_an_allocation_admits_no_second_worker() {
    let mut world = machine(&[10_000], &[("a", ONE, 8_000), ("b", ONE, 8_000)]);
    world.acquire("a");
    world.ready("a");
    // The GPU was read before the worker took its memory, the worker after.
    let mut measured = world.measured(Bytes::gib(16));
    let gpu = measured.domains.get_mut(&Domain::Gpu(0));
    gpu.expect("the machine has a GPU").headroom = Bytes::mib(10_000);
    world.step(Event::Measured(measured));
    assert_eq!(spawned(&world.acquire("b").1), Vec::<String>::new());
}

#[test]
fn nothing_starts_on_a_gpu_that_was_not_measured_since_a_load() {
    let sizes = [("a", ONE, 4_000), ("b", ONE, 4_000), ("c", ONE, 4_000)];
    let mut world = machine(&[10_000], &sizes);
    world.acquire("a");
    world.acquire("b");
    world.acquire("c");
    let a = world.worker("a");
    world.pass(Duration::from_millis(100));
    world.holding.insert(a.clone());
    world.inside.insert(a.clone(), Activity::opened(world.now));
    assert_eq!(
        spawned(&world.step(Event::Ready { worker: a })),
        [] as [&str; 0]
    );
    world.leave_at_once("a");
    // A driver that is slow to answer tells how things were before.
    let mut late = world.measured(Bytes::gib(15));
    late.gpus_at = crate::clock::Timestamp::START;
    let effects = world.step(Event::Measured(late));
    assert_eq!((spawned(&effects), gone(&effects)), (vec![], vec![]));
    let mut waits = world.clone();
    assert_eq!(spawned(&waits.measure()), ["b"]);
    // One that hangs is not waited for, and nobody gets what was promised to another.
    world.pass(Duration::from_secs(6));
    let mut late = world.measured(Bytes::gib(15));
    late.gpus_at = crate::clock::Timestamp::START;
    late.workers.clear();
    assert_eq!(spawned(&world.step(Event::Measured(late))), ["b"]);
    assert_eq!(spawned(&world.acquire("c").1), [] as [&str; 0]);
}

#[test]
fn a16_a_worker_told_to_go_right_after_its_load_gives_back_what_it_took_since() {
    let mut world = machine(&[10_000], &[("old", ONE, 8_000), ("new", ONE, 8_000)]);
    // Ready and idle before the driver tells anything of it.
    world.acquire("old");
    let worker = world.worker("old");
    let idle = Activity::opened(world.now);
    world.inside.insert(worker.clone(), idle);
    world.step(Event::Ready {
        worker: worker.clone(),
    });
    world.leave_at_once("old");
    let (_, effects) = world.acquire("new");
    assert_eq!(gone(&effects), [] as [&str; 0], "it is measured first");
    assert_eq!(gone(&world.measure()), ["old"]);
    // What it holds is seen for the first time while it is dying.
    world.holding.insert(worker);
    world.measure();
    assert_eq!(spawned(&world.exit("old")), ["new"]);
}

#[test]
fn a16_a_victim_that_is_slow_to_die_on_a_gpu_delays_no_load_elsewhere() {
    let zero = GpuRequest::These(vec![DeviceRef::Index(0)]);
    let one = GpuRequest::These(vec![DeviceRef::Index(1)]);
    let mut world = machine(
        &[10_000, 10_000],
        &[
            ("slow", zero.clone(), 8_000),
            ("next", zero, 8_000),
            ("else", one, 8_000),
            ("host", GpuRequest::None, 0),
        ],
    );
    world.use_once("slow");
    world.acquire("next");
    for _ in 0..5 {
        world.pass(Duration::from_secs(1));
        world.measure();
    }
    assert_eq!(spawned(&world.acquire("else").1), ["else"]);
    assert_eq!(spawned(&world.acquire("host").1), ["host"]);
    assert_eq!(spawned(&world.exit("slow")), ["next"]);
}

#[test]
fn what_never_comes_back_is_reported_and_waited_for_no_longer_than_its_deadline() {
    let mut world = machine(&[10_000], &[("old", ONE, 6_000), ("new", ONE, 5_000)]);
    world.use_once("old");
    world.acquire("new");
    world.late = BTreeMap::from([(0, 3_000)]);
    world.exit("old");
    world.pass(Duration::from_secs(6));
    let effects = world.measure();
    assert!(effects.contains(&Effect::Reclaimed {
        worker: crate::model::WorkerId {
            model: name("old"),
            generation: 1
        },
        domain: Domain::Gpu(0),
        freed: Bytes::mib(3_000),
        missing: Bytes::mib(3_000),
    }));
    assert_eq!(spawned(&effects), ["new"]);
}

#[test]
fn a_model_of_unknown_need_has_its_gpu_alone_until_it_is_ready_and_is_then_known() {
    let specs = vec![on(ONE, "known", Some(1_000)), on(ONE, "unknown", None)];
    let models = [("known", ONE, 1_000), ("unknown", ONE, 3_000)];
    let mut world = world(&[10_000], specs, &models);
    assert_eq!(spawned(&world.acquire("unknown").1), ["unknown"]);
    assert_eq!(world.policy.charged(Domain::Gpu(0)), Bytes::mib(10_000));
    assert_eq!(spawned(&world.acquire("known").1), Vec::<String>::new());
    assert_eq!(spawned(&world.ready("unknown")), ["known"]);
    let state = &world.policy.models()["unknown"];
    assert_eq!(state.peak()[&Domain::Gpu(0)], Bytes::mib(3_000));
}

#[test]
fn a_lost_gpu_gets_no_load_and_the_others_go_on() {
    let mut world = machine(&[10_000, 9_000], &[("a", ONE, 1_000)]);
    let mut measured = world.measured(Bytes::gib(15));
    measured.domains.remove(&Domain::Gpu(1));
    world.step(Event::Measured(measured));
    assert_eq!(placed(&world.acquire("a").1), Some(vec![0]));
}

#[test]
fn a_filled_gpu_is_no_pressure_but_a_lowered_limit_is_and_only_there() {
    let mut world = machine(
        &[10_000, 10_000],
        &[("full", ONE, 9_300), ("host", GpuRequest::None, 0)],
    );
    world.use_once("full");
    world.use_once("host");
    assert_eq!(gone(&world.measure()), Vec::<String>::new());
    let effects = world.step(Event::Limit {
        domain: Domain::Gpu(0),
        limit: Bytes::mib(5_000),
    });
    assert_eq!(gone(&effects), ["full"]);
    assert!(effects.iter().any(|effect| matches!(
        effect,
        Effect::Evict {
            reason: EvictReason::Pressure {
                level: PressureLevel::Soft,
                domain: Domain::Gpu(0),
                ..
            },
            ..
        }
    )));
}

#[test]
fn a_gpu_without_memory_of_its_own_takes_the_hosts_and_one_that_does_not_tell_bounds_nothing() {
    for (unified, needed) in [(true, 4_010), (false, 10)] {
        let mut world = machine(&[], &[("a", ONE, 4_000)]);
        let mut measured = world.measured(Bytes::gib(15));
        let gpu = GpuFacts {
            uuid: "GPU-0".into(),
            unified,
            vendor: GpuVendor::Nvidia,
        };
        measured.gpus.insert(0, gpu);
        world.step(Event::Measured(measured));
        let (_, effects) = world.acquire("a");
        assert_eq!(placed(&effects), Some(vec![0]));
        assert_eq!(world.policy.charged(Domain::Host), Bytes::mib(needed));
    }
}

#[test]
fn a_worker_gets_gpus_of_one_vendor_and_no_integrated_one_beside_large_ones() {
    let two = GpuRequest::Count(2);
    let mut world = machine(
        &[10_000, 4_000, 10_000],
        &[("wide", two, 3_000), ("busy", ONE, 9_900)],
    );
    let mut measured = world.measured(Bytes::gib(15));
    let mut facts = |index: u32, unified, vendor| {
        let uuid = format!("GPU-{index}");
        let gpu = GpuFacts {
            uuid,
            unified,
            vendor,
        };
        measured.gpus.insert(index, gpu);
    };
    // The middle one would fit best, but is the only one of its kind.
    facts(1, false, GpuVendor::Amd);
    facts(3, true, GpuVendor::Intel);
    world.step(Event::Measured(measured));
    assert_eq!(placed(&world.acquire("wide").1), Some(vec![0, 2]));
    // Every large GPU is loading: the integrated one is not a way out.
    assert_eq!(placed(&world.acquire("busy").1), None);
}

#[test]
fn busy_workers_of_one_gpu_drain_whatever_drains_on_another() {
    let on_gpu = |index| GpuRequest::These(vec![DeviceRef::Index(index)]);
    let mut world = machine(
        &[8_000, 8_000],
        &[
            ("a", on_gpu(0), 6_000),
            ("b", on_gpu(1), 6_000),
            ("c", on_gpu(0), 6_000),
            ("d", on_gpu(1), 6_000),
        ],
    );
    for model in ["a", "b"] {
        world.acquire(model);
        world.ready(model);
    }
    world.acquire("c");
    world.acquire("d");
    world.pass(Duration::from_secs(5));
    assert_eq!(drained(&world.step(Event::Tick)), ["a", "b"]);
}

#[test]
fn nobody_drains_on_a_gpu_where_memory_moves_for_another() {
    let mut world = machine(
        &[8_000],
        &[
            ("a", ONE, 4_000),
            ("b", ONE, 4_000),
            ("c", ONE, 4_000),
            ("d", ONE, 4_000),
        ],
    );
    for model in ["a", "b"] {
        world.acquire(model);
        world.ready(model);
    }
    world.leave("a");
    assert_eq!(gone(&world.acquire("c").1), ["a"]);
    world.acquire("d");
    // `a` dies and `c` loads, which may be idle soon: only then is known who
    // has to go for `d`.
    world.pass(Duration::from_secs(20));
    assert!(drained(&world.step(Event::Tick)).is_empty());
    assert_eq!(spawned(&world.exit("a")), ["c"]);
    world.pass(Duration::from_secs(20));
    assert!(drained(&world.step(Event::Tick)).is_empty());
    assert_eq!(drained(&world.ready("c")), ["b"]);
}
