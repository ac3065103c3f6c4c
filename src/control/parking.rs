//! Carries out parks and unparks.

use std::collections::BTreeMap;

use super::task::Task;
use super::{EvictReason, Expected, What};
use crate::model::{Bytes, Domain, WorkerId};
use crate::policy::{Event, Phase};
use crate::worker::Residence;

impl Task {
    /// Parks a worker unless somebody is inside.
    pub(super) fn park(
        &mut self,
        worker: WorkerId,
        reason: EvictReason,
        holds: BTreeMap<Domain, Bytes>,
    ) -> Option<Event> {
        if let Some(inside) = self.close_if_empty(&worker)? {
            self.tell(&worker, What::Keep { reason, inside });
            return Some(Event::EvictRefused { worker, inside });
        }
        let charge = self.charge(&worker);
        let what = What::Park {
            reason,
            charge,
            holds,
        };
        self.tell(&worker, what);
        self.withdraw(&worker);
        self.order_residence(&worker, Residence::Parked);
        None
    }

    /// The worker's bytes are back.
    pub(super) fn parked(&self, worker: &WorkerId, what: What) {
        self.tell(worker, what);
        // From here on its memory stands still.
        self.memory.loaded(worker);
    }

    /// Has a parked worker take its memory again.
    pub(super) fn unpark(&self, worker: &WorkerId, expected: Expected) {
        let (reason, waiting) = self.load_reason(worker);
        let what = What::Unpark {
            reason,
            waiting,
            expected,
        };
        self.tell(worker, what);
        self.order_residence(worker, Residence::Ready);
    }

    fn order_residence(&self, worker: &WorkerId, residence: Residence) {
        if let Some(live) = self.workers.get(worker) {
            self.memory.moves(worker);
            live.handle.residence.send_replace(residence);
        }
    }

    /// Opens the gate of a worker that has its memory again.
    pub(super) fn worker_unparked(&mut self, worker: WorkerId) {
        let model = &self.policy.models()[&worker.model];
        if model.phase != Phase::Unparking || model.generation != worker.generation {
            return;
        }
        let took = self.clock.now().since(model.since);
        self.tell(&worker, What::Unparked { took });
        self.memory.loaded(&worker);
        self.admit_again(&worker);
        self.feed(Event::Unparked { worker });
        self.memory.sample_now();
    }
}
