//! Requests that are inside of workers over there, in the residentd that this one
//! has replaced: each holds its worker here as if it had come here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::{Lease, ReadyWorker, Signal};
use crate::clock::Clock;
use crate::gate::Visit;
use crate::model::WorkerId;

/// All of them, by worker. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Guests(Arc<Mutex<BTreeMap<WorkerId, Group>>>);

/// Those of one worker.
#[derive(Debug, Default)]
struct Group {
    /// How many there are; fewer are held while the worker does not answer yet.
    count: usize,
    held: Vec<Guest>,
}

/// The gate counts it, and so does whoever judges the worker by what requests
/// hear.
#[derive(Debug)]
struct Guest {
    visit: Visit,
    _lease: Lease,
}

impl Guests {
    /// Returns so many of each worker.
    #[must_use]
    pub fn new(counts: impl IntoIterator<Item = (WorkerId, u32)>) -> Self {
        let group = |count: u32| Group {
            count: count as usize,
            held: Vec::new(),
        };
        let groups = counts.into_iter();
        let groups = groups.map(|(worker, count)| (worker, group(count)));
        Self(Arc::new(Mutex::new(groups.collect())))
    }

    /// Lets those of a worker in, before anybody can decide about it.
    pub(super) fn enter(
        &self,
        ready: &Arc<ReadyWorker>,
        clock: Clock,
        signals: &mpsc::UnboundedSender<Signal>,
    ) {
        let mut groups = self.lock();
        let Some(group) = groups.get_mut(&ready.id) else {
            return;
        };
        while group.held.len() < group.count {
            let lease = Lease::enter_held(Arc::clone(ready), clock, signals.clone());
            let Some(lease) = lease else { break };
            group.held.push(Guest {
                visit: Visit::begin(Arc::clone(&ready.pulse)),
                _lease: lease,
            });
        }
    }

    /// Notes how many of a worker are left, how many of them wait for it, and
    /// whether any heard of it since the last time.
    pub fn note(&self, worker: &WorkerId, count: u32, waiting: u32, heard: bool) {
        let mut groups = self.lock();
        let Some(group) = groups.get_mut(worker) else {
            return;
        };
        // Nobody comes in over there any more.
        group.count = group.count.min(count as usize);
        group.held.truncate(group.count);
        let waiting = group.held.len().min(waiting as usize);
        let (wait, rest) = group.held.split_at(waiting);
        for guest in rest.iter().chain(wait.iter().filter(|_| heard)) {
            guest.visit.hears();
        }
        for guest in wait {
            guest.visit.waits();
        }
    }

    /// Lets all of them go.
    pub fn leave(&self) {
        // Dropped when the lock is free again: a lease tells the controller.
        let all = std::mem::take(&mut *self.lock());
        drop(all);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<WorkerId, Group>> {
        // Counts and leases are as good as they were, whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
