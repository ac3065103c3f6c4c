//! Workers that an earlier residentd spawned and that run on: part of how things
//! stand at the start, before anything is decided.

use std::collections::BTreeMap;

use super::Policy;
use super::event::{Activity, Measured};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, WorkerId};

/// One such worker.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// Which life of which model; later lives count on from it.
    pub worker: WorkerId,
    /// The GPUs it is placed on, by index.
    pub gpus: Vec<u32>,
    /// The most it used so far, by domain.
    pub peak: BTreeMap<Domain, Bytes>,
    /// Since when nobody used it, as far as that is known.
    pub idle_since: Option<Timestamp>,
}

impl Policy {
    /// Takes in workers before the first step. Each is loading until it has
    /// answered, and is charged with the most it used until it is measured; what
    /// it taught so far counts.
    pub fn adopt(
        &mut self,
        now: Timestamp,
        measured: &Measured,
        workers: impl IntoIterator<Item = Adopted>,
    ) {
        self.measure(measured);
        for adopted in workers {
            let Adopted {
                worker,
                gpus,
                peak,
                idle_since,
            } = adopted;
            let Some(model) = self.models.get_mut(&worker.model) else {
                continue;
            };
            model.life.clone_from(&peak);
            let Some(model) = self.models.get(&worker.model) else {
                continue;
            };
            let expected = self.expected_on(model, &gpus);
            if let Some(model) = self.models.get_mut(&worker.model) {
                model.begin_life(expected, now);
                model.generation = worker.generation;
                model.adopted = true;
                model.life = peak;
                model.activity = Activity::opened(idle_since.unwrap_or(now));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::{World, granted, name, spec};
    use super::super::{Effect, ExpectedSource, Phase};
    use super::*;
    use crate::model::{ModelSpec, Prefetch};

    fn adopted(world: &mut World, generation: u64, peak: u64) -> WorkerId {
        adopt(world, ("a", generation), peak, None)
    }

    fn adopt(
        world: &mut World,
        (model, generation): (&str, u64),
        peak: u64,
        idle_since: Option<Timestamp>,
    ) -> WorkerId {
        let worker = WorkerId {
            model: name(model),
            generation,
        };
        let adopted = Adopted {
            worker: worker.clone(),
            gpus: Vec::new(),
            peak: [(Domain::Host, Bytes::mib(peak))].into(),
            idle_since,
        };
        world
            .policy
            .adopt(world.now, &Measured::default(), [adopted]);
        world.measure();
        worker
    }

    #[test]
    fn a_worker_that_is_taken_back_is_charged_waited_for_and_counts_as_no_load() {
        let spec = ModelSpec {
            prefetch: Prefetch::Waiting,
            ..spec("a", None)
        };
        let mut world = World::with(1000, vec![spec], &[("a", 300)]);
        let worker = adopted(&mut world, 7, 300);
        let model = &world.policy.models()[&worker.model];
        assert_eq!((model.phase, model.generation), (Phase::Starting, 7));
        let promised = model.reservation.0[&Domain::Host];
        assert_eq!(promised.bytes, Bytes::mib(300));
        assert_eq!(promised.source, ExpectedSource::Learned);
        let (ticket, effects) = world.acquire("a");
        let spawns = |effects: &[Effect]| {
            let mut all = effects.iter();
            all.any(|effect| matches!(effect, Effect::Spawn { .. }))
        };
        assert!(!spawns(&effects) && !granted(&effects, ticket), "it waits");
        let mut read = effects.iter();
        let read = read.any(|effect| matches!(effect, Effect::Prefetch { .. }));
        assert!(!read, "it has its files");
        let effects = world.ready("a");
        assert!(granted(&effects, ticket));
        let model = &world.policy.models()[&worker.model];
        assert_eq!((model.phase, model.history.loads), (Phase::Ready, 0));
        assert_eq!(model.history.last_load, None);
    }

    #[test]
    fn who_was_least_recently_used_before_goes_first() {
        let models = ["a", "b"].map(|model| spec(model, None));
        let mut world = World::with(1000, models.to_vec(), &[("a", 400), ("b", 400)]);
        world.pass(Duration::from_secs(100));
        // Ready in the other order.
        for (model, seconds) in [("b", 20), ("a", 10)] {
            let since = Timestamp::from_millis(seconds * 1000);
            adopt(&mut world, (model, 3), 400, Some(since));
        }
        for model in ["b", "a"] {
            world.ready(model);
        }
        let order = world.policy.candidates_in_order();
        let order: Vec<_> = order.iter().map(|m| m.name().as_str()).collect();
        assert_eq!(order, ["a", "b"]);
        let a = &world.policy.models()["a"];
        assert_eq!(a.idle_since(), Timestamp::from_millis(10_000));
    }

    #[test]
    fn the_life_after_it_counts_on_and_what_it_taught_is_kept() {
        let mut world = World::with(1000, vec![spec("a", None)], &[("a", 300)]);
        let worker = adopted(&mut world, 7, 400);
        world.ready("a");
        world.exit("a");
        let known = world.policy.models()[&worker.model].footprint[&Domain::Host];
        assert_eq!(known.peak, Bytes::mib(400));
        world.acquire("a");
        let model = &world.policy.models()[&worker.model];
        assert_eq!((model.generation, model.adopted), (8, false));
    }
}
