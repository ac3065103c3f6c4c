//! Parks on the virtual machine: a parked worker holds nothing of a GPU, and in
//! host RAM what it held of GPUs besides its own.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use super::{Happening, Machine, Worker};
use crate::model::{Bytes, Domain, WorkerId};
use crate::policy::{Event, EvictReason};

/// A park, and an unpark, take this part of a load: measured on engines that
/// can, a load takes 20 to 200 times as long.
const SHARE_OF_LOAD: u32 = 20;

impl Machine {
    pub(super) fn park(&mut self, id: WorkerId, reason: &EvictReason) -> Option<Event> {
        let inside = self.inside(&id);
        if inside > 0 {
            self.tell(&id, || format!("is busy and stays, {inside} inside"));
            return Some(Event::EvictRefused { worker: id, inside });
        }
        self.tell(&id, || format!("is told to park: {reason}"));
        self.close(&id);
        let time = self.moving(&id);
        self.after(time, Happening::Parked(id));
        None
    }

    pub(super) fn unpark(&mut self, id: WorkerId) {
        self.tell(&id, || "is told to leave its park".to_owned());
        let time = self.moving(&id);
        self.after(time, Happening::Unparked(id));
    }

    fn moving(&self, id: &WorkerId) -> Duration {
        self.programs[&id.model].load / SHARE_OF_LOAD
    }

    pub(super) fn parked(&mut self, id: &WorkerId) {
        let Some(worker) = self.worker(id).filter(|worker| !worker.ending) else {
            return;
        };
        worker.parked = true;
        self.tell(id, || "is parked".to_owned());
        self.feed(Event::Parked { worker: id.clone() });
        self.measure();
    }

    pub(super) fn unparked(&mut self, id: &WorkerId) {
        let Some(worker) = self.worker(id).filter(|worker| !worker.ending) else {
            return;
        };
        worker.parked = false;
        worker.open = true;
        self.tell(id, || "is ready again".to_owned());
        self.feed(Event::Unparked { worker: id.clone() });
        self.measure();
    }

    /// Returns what a worker holds that was ready once.
    pub(super) fn held(&self, worker: &Worker) -> Cow<'_, BTreeMap<Domain, Bytes>> {
        let holds = &self.programs[&worker.id.model].holds;
        if !worker.parked {
            return Cow::Borrowed(holds);
        }
        let vram = holds.iter().filter(|(domain, _)| match domain {
            Domain::Host => false,
            Domain::Gpu(index) => worker.gpus.contains(index),
        });
        let moved: Bytes = vram.map(|(_, bytes)| *bytes).sum();
        let host = holds.get(&Domain::Host).copied().unwrap_or_default();
        Cow::Owned(BTreeMap::from([(Domain::Host, host + moved)]))
    }
}
