//! Workers outlive residentd: what is kept of those that live, and how those of
//! an earlier residentd are taken back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::What;
use super::task::{Live, Task};
use crate::clock::Timestamp;
use crate::memory::{DeviceReading, Subject};
use crate::model::{Bytes, Domain, WorkerId, WorkerRecord};
use crate::policy::Adopted;
use crate::procfs::ProcessTree;
use crate::store::Written;
use crate::worker::Adoptee;

/// A peak that grew by less than this share is not written down again.
const GROWTH_PERCENT: u64 = 105;

/// That a worker was used is written down when that is so long ago, so that one in
/// use is not written down with each request;
const USED_JUST_NOW: Duration = Duration::from_secs(1);
/// and this often while it is.
const USE_EVERY: Duration = Duration::from_secs(10);

/// How a worker came to be ours that we did not spawn.
#[derive(Clone, Debug)]
pub(super) struct Adoption {
    /// When it was taken back.
    at: Timestamp,
    /// How long it had run then.
    age: Duration,
    /// It had answered the earlier residentd.
    pub(super) was_ready: bool,
    /// Since when nobody used it, as far as that was written.
    pub(super) idle_since: Option<Timestamp>,
    /// The most it was known to hold of each GPU.
    held: BTreeMap<u32, Bytes>,
    told: bool,
}

impl Adoption {
    /// Returns how long it has run, spawn to now.
    pub(super) fn age(&self, now: Timestamp) -> Duration {
        self.age + now.since(self.at)
    }
}

impl Task {
    /// Takes back workers of an earlier residentd, before anything is decided.
    pub(super) fn take_back(&mut self, adoptees: Vec<Adoptee>) {
        if adoptees.is_empty() {
            return;
        }
        let at = self.clock.now();
        let devices = &self.reading.devices;
        let adopted = adoptees.iter().map(|adoptee| Adopted {
            worker: adoptee.record.worker.clone(),
            gpus: indexes(devices, &adoptee.record.gpus),
            peak: adoptee.record.peak.clone(),
            idle_since: idle_since(&adoptee.record).map(|since| since.min(at)),
        });
        let adopted: Vec<_> = adopted.collect();
        let measured = self.measured();
        self.policy.adopt(at, &measured, adopted.iter().cloned());
        for (adoptee, adopted) in adoptees.into_iter().zip(adopted) {
            let (worker, idle_since) = (adopted.worker, adopted.idle_since);
            let gpu = |(domain, bytes): (Domain, Bytes)| match domain {
                Domain::Gpu(index) => Some((index, bytes)),
                Domain::Host => None,
            };
            let adoption = Adoption {
                at,
                age: adoptee.age,
                was_ready: adoptee.record.ready,
                idle_since,
                held: adopted.peak.into_iter().filter_map(gpu).collect(),
                told: false,
            };
            let record = Some(Box::new(adoptee.record.clone()));
            let past = self.records.entry(worker.model.clone()).or_default();
            past.last_used = idle_since.filter(|_| adoptee.record.last_use.used);
            let handle = self.spawner.adopt(adoptee, self.events.clone());
            past.tail = Some((worker.generation, Arc::clone(&handle.tail)));
            let live = Live {
                handle,
                gpus: adopted.gpus,
                tree: None,
                ready: None,
                adoption: Some(adoption),
                record,
            };
            self.workers.insert(worker, live);
        }
    }

    /// A worker's processes run: they are measured from now on, and kept.
    pub(super) fn worker_runs(
        &mut self,
        worker: WorkerId,
        tree: Arc<ProcessTree>,
        record: Box<WorkerRecord>,
    ) {
        let Some(live) = self.workers.get_mut(&worker) else {
            return;
        };
        live.tree = Some(Arc::clone(&tree));
        let was_ready = live.adoption.as_ref().is_some_and(|a| a.was_ready);
        let subject = Subject {
            tree: Arc::clone(&tree),
            gpus: live.gpus.clone(),
            report: Some(record.report.clone()),
            loading: !was_ready,
            held: live.adoption.as_ref().map(|a| a.held.clone()),
        };
        if live.adoption.is_none() {
            info!(%worker, pid = tree.leader().pid, "worker spawned");
            self.store.keep_worker(&record);
            live.record = Some(record);
        }
        self.memory.follow(worker, subject);
        self.memory.sample_now();
    }

    /// Keeps that a worker has answered, with what its load took.
    pub(super) fn keep_ready(&mut self, worker: &WorkerId) {
        self.update(worker, |record, peak| {
            record.ready = true;
            record.peak.clone_from(peak);
            true
        });
    }

    /// Keeps that a worker is about to be parked: from then on until it is ready
    /// again it cannot be taken back. Returns what tells when that is written.
    pub(super) fn keep_parked(&mut self, worker: &WorkerId) -> Option<Written> {
        let record = self.workers.get_mut(worker)?.record.as_mut()?;
        record.parked = true;
        self.store.keep_worker(record);
        Some(self.store.written())
    }

    /// Keeps that a worker has its memory again.
    pub(super) fn keep_unparked(&mut self, worker: &WorkerId) {
        self.update(worker, |record, _| std::mem::take(&mut record.parked));
    }

    /// Keeps peaks that grew and who was used, and tells of workers taken back that
    /// are measured now.
    pub(super) fn follow_workers(&mut self) {
        let workers: Vec<_> = self.workers.keys().cloned().collect();
        for worker in workers {
            self.update(&worker, |record, peak| {
                let grew = peak.iter().any(|(domain, bytes)| {
                    let before = record.peak.get(domain).copied().unwrap_or_default();
                    *bytes > before.percent(GROWTH_PERCENT)
                });
                if grew {
                    record.peak.clone_from(peak);
                }
                grew
            });
            self.follow_use(&worker, false);
            self.tell_adoption(&worker);
        }
    }

    /// Keeps since when nobody used any worker, as of now: another residentd goes on
    /// from there.
    pub(super) fn keep_use(&mut self) {
        let workers: Vec<_> = self.workers.keys().cloned().collect();
        for worker in workers {
            self.follow_use(&worker, true);
        }
    }

    /// Keeps since when nobody used a worker: soon after it was used, at times while
    /// it is, or now.
    fn follow_use(&mut self, worker: &WorkerId, at_once: bool) {
        let live = self.workers.get(worker);
        let Some(ready) = live.and_then(|live| live.ready.as_ref()) else {
            return;
        };
        let (read, now) = (ready.gate.read(), self.clock.now());
        self.update(worker, |record, _| {
            let written = idle_since(record).unwrap_or(Timestamp::START);
            let rests = read.inside == 0 && now.since(read.last_left) >= USED_JUST_NOW;
            let is_time = at_once || rests || read.last_left.since(written) >= USE_EVERY;
            let is_news = is_time && read.last_left > written;
            if is_news {
                record.last_use.idle_since = Some(read.last_left.as_micros());
                record.last_use.used |= read.entered > 0;
            }
            is_news
        });
    }

    fn update(
        &mut self,
        worker: &WorkerId,
        change: impl FnOnce(&mut WorkerRecord, &BTreeMap<Domain, Bytes>) -> bool,
    ) {
        let Some(model) = self.policy.models().get(&worker.model) else {
            return;
        };
        let live = self.workers.get_mut(worker);
        let Some(record) = live.and_then(|live| live.record.as_mut()) else {
            return;
        };
        if model.generation == worker.generation && change(record, &model.life) {
            self.store.keep_worker(record);
        }
    }

    fn tell_adoption(&mut self, worker: &WorkerId) {
        let Some(live) = self.workers.get_mut(worker) else {
            return;
        };
        let (Some(pid), Some(adoption)) = (live.pid(), live.adoption.as_mut()) else {
            return;
        };
        if adoption.told || !self.reading.workers.contains_key(worker) {
            return;
        }
        adoption.told = true;
        let (age, ready) = (adoption.age, adoption.was_ready);
        let usage = &self.policy.models()[&worker.model].usage;
        let held = usage.iter().map(|(domain, m)| (*domain, m.usage));
        let held = held.collect();
        let what = What::Adopt {
            pid,
            age,
            ready,
            held,
        };
        self.tell(worker, what);
    }
}

fn idle_since(record: &WorkerRecord) -> Option<Timestamp> {
    record.last_use.idle_since.map(Timestamp::from_micros)
}

/// Returns the indexes of the devices with these UUIDs.
fn indexes(devices: &[DeviceReading], uuids: &[String]) -> Vec<u32> {
    let placed = devices.iter().filter(|d| uuids.contains(&d.uuid));
    placed.map(|device| device.index).collect()
}
