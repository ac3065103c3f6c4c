//! The small worlds that are explored.

use std::num::NonZeroU32;
use std::time::Duration;

use super::super::super::testing::{World, name, spec};
use super::super::super::*;
use super::super::MODELS;
use super::super::court::Court;
use super::{Budget, State, explore};
use crate::model::GpuRequest;

/// Half a second over whole ones: due when nothing else is.
fn seconds_and_a_half(seconds: u64) -> Duration {
    Duration::from_millis(seconds * 1000 + 500)
}

/// A small world.
struct Case {
    /// The limit on host RAM, in MiB.
    room: u64,
    specs: Vec<ModelSpec>,
    /// What each model's worker holds, in MiB.
    sizes: Vec<(&'static str, u64)>,
    policy: EvictionPolicy,
    patience: Duration,
    /// The size of its GPU in MiB, on which each worker holds as much as in RAM.
    gpu: Option<u64>,
}

impl Case {
    /// Models a, b and c that declare these sizes and hold as much.
    fn new(room: u64, sizes: &[u64]) -> Self {
        let sizes: Vec<_> = MODELS.into_iter().zip(sizes.iter().copied()).collect();
        let specs = sizes.iter().map(|(model, size)| spec(model, Some(*size)));
        Self {
            room,
            specs: specs.collect(),
            sizes,
            policy: EvictionPolicy::Lru,
            patience: seconds_and_a_half(1),
            gpu: None,
        }
    }

    fn world(&self) -> World {
        let mut world = World::with(self.room, self.specs.clone(), &self.sizes);
        world.policy.settings.eviction = self.policy;
        world.policy.settings.patience = self.patience;
        world.policy.settings.drain_timeout = seconds_and_a_half(3);
        if let Some(total) = self.gpu {
            world.gpus = vec![total];
            let sizes = self.sizes.iter();
            world.vram = sizes.map(|(model, mib)| (name(model), *mib)).collect();
            world.measure();
        }
        world
    }

    /// Plays everything that can happen with so many requests and unusual
    /// things. There are `at_least` so many states: fewer would mean that less
    /// is tried than was.
    fn holds(&self, (requests, unusual): (u8, u8), at_least: usize) {
        let more = std::env::var_os("RESIDENTD_SPACE");
        let more = more.map_or(0, |more| {
            let number = more.to_str().and_then(|text| text.parse().ok());
            number.expect("RESIDENTD_SPACE says how many more unusual things are played: a number")
        });
        let left = Budget {
            requests,
            unusual: unusual + more,
        };
        let mut court = Court::over(self.world());
        court.gives_up = seconds_and_a_half(99);
        let found = explore(&State { court, left });
        println!(
            "{} states by {} steps; an answer after at most {}",
            found.states, found.steps, found.longest
        );
        assert!(found.states >= at_least, "only {} states", found.states);
        assert!(found.longest < 40, "{} steps to an answer", found.longest);
    }
}

#[test]
fn a15_every_order_of_two_models_in_room_for_one() {
    let case = Case::new(1000, &[600, 600]);
    case.holds((3, 1), 6000);
}

#[test]
fn a15_every_order_of_two_models_in_room_for_one_without_patience() {
    let mut case = Case::new(1000, &[600, 600]);
    case.patience = Duration::ZERO;
    case.holds((2, 1), 1200);
}

#[test]
fn a15_every_order_of_two_models_of_which_one_takes_one_request_at_a_time() {
    let mut case = Case::new(1000, &[600, 600]);
    case.specs[0].concurrency = NonZeroU32::new(1);
    case.holds((3, 0), 330);
    case.holds((2, 1), 1380);
}

#[test]
fn a15_every_order_of_two_models_on_one_gpu_whose_memory_comes_back_late() {
    let mut case = Case::new(2000, &[600, 600]);
    case.gpu = Some(1000);
    for (spec, (_, mib)) in case.specs.iter_mut().zip(&case.sizes) {
        spec.gpus = GpuRequest::Count(1);
        spec.vram = Some(Bytes::mib(*mib));
    }
    case.holds((2, 1), 1200);
}

#[test]
fn a15_every_order_of_two_models_of_which_nobody_knows_the_size_of_one() {
    // The least room that one of an unknown size is started in suffices for it.
    let mut case = Case::new(1000, &[250, 800]);
    case.specs[0].memory = None;
    case.holds((2, 1), 1400);
}

#[test]
fn a15_every_order_of_two_models_of_which_one_is_preloaded_and_both_go_when_idle() {
    let mut case = Case::new(1000, &[600, 600]);
    case.specs[0].preload = true;
    for spec in &mut case.specs {
        spec.idle_timeout = Some(seconds_and_a_half(2));
    }
    case.holds((2, 1), 3900);
}

#[test]
fn a15_every_order_of_three_models_in_room_for_two() {
    let case = Case::new(1000, &[500, 500, 500]);
    case.holds((2, 1), 6900);
}

#[test]
fn a15_every_order_of_three_models_in_room_for_two_by_cost() {
    let mut case = Case::new(1000, &[500, 500, 500]);
    case.policy = EvictionPolicy::Cost;
    case.holds((3, 0), 5400);
}

#[test]
fn a15_every_order_of_two_small_models_and_one_that_takes_the_room_of_both() {
    let case = Case::new(1000, &[300, 500, 900]);
    case.holds((2, 1), 5200);
}

#[test]
fn a15_every_order_of_a_pinned_model_and_two_in_the_room_beside_it() {
    let mut case = Case::new(1000, &[400, 500, 500]);
    case.specs[0].pinned = true;
    case.holds((3, 0), 2000);
}
