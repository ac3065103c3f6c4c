//! Workers that an earlier residentd spawned and that run on: part of how things
//! stand at the start, before anything is decided.

use std::collections::BTreeMap;

use super::Policy;
use super::event::Measured;
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
        for Adopted { worker, gpus, peak } in workers {
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
            }
        }
    }
}
