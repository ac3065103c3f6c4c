//! Carries out parks and unparks.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::task::Task;
use super::{EvictReason, Expected, What};
use crate::model::{Bytes, Domain, WorkerId};
use crate::policy::{Event, Phase};
use crate::telemetry;
use crate::worker::{Residence, WorkerEvent};

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
        self.memory.moves(&worker);
        self.order_park(worker);
        None
    }

    /// Has a worker make its calls once it is written down that it is about to: a
    /// later residentd that took it for a ready one would have it asked.
    fn order_park(&mut self, worker: WorkerId) {
        let written = self.keep_parked(&worker);
        let Some(live) = self.workers.get(&worker) else {
            return;
        };
        let residence = Arc::clone(&live.handle.residence);
        let events = self.events.clone();
        telemetry::spawn("park", async move {
            let done = match written {
                Some(written) => written.wait().await,
                None => Ok(()),
            };
            match done {
                Ok(()) => drop(residence.send_replace(Residence::Parked)),
                Err(why) => {
                    let said = format!("that it is parked cannot be written down: {why}");
                    // Nobody listens any more when residentd is ending.
                    let _ = events.send(WorkerEvent::ParkFailed { worker, said });
                }
            }
        });
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
        if let Some(live) = self.workers.get(worker) {
            self.memory.moves(worker);
            live.handle.residence.send_replace(Residence::Ready);
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
        self.keep_unparked(&worker);
        self.admit_again(&worker);
        self.feed(Event::Unparked { worker });
        self.memory.sample_now();
    }
}
