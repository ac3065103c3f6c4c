//! Carries out what the policy wants done. Here decisions are logged and
//! counted, and nowhere else.

use std::collections::HashMap;
use std::sync::Arc;

use tracing::{error, info, warn};

use super::task::{Live, Pending, Task};
use super::{Lease, Refusal};
use crate::memory::DeviceReading;
use crate::model::{PlacedGpu, WorkerId};
use crate::policy::{self, Effect, Event, Ticket};
use crate::worker::{SpawnOrder, Stop};

impl Task {
    pub(super) fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Grant { ticket, worker } => self.grant(ticket, &worker),
            Effect::Done { ticket } => {
                if let Some(Pending::Done(reply)) = self.waiting.remove(&ticket) {
                    let _ = reply.send(Ok(()));
                }
            }
            Effect::Reject { ticket, refusal } => self.reject(ticket, refusal),
            Effect::CleanedUp { ticket, report } => {
                info!(unloaded = report.unloaded.len(), freed = %report.freed, shortfall = %report.shortfall, "cleanup done");
                if let Some(Pending::Cleanup(reply)) = self.waiting.remove(&ticket) {
                    let _ = reply.send(Ok(report));
                }
            }
            Effect::Spawn {
                worker,
                expected,
                gpus,
            } => self.spawn(worker, &expected, gpus),
            Effect::Evict {
                worker,
                reason,
                kill,
            } => {
                let live = self.workers.get(&worker)?;
                let inside = live
                    .ready
                    .as_ref()
                    .map_or(0, |ready| ready.gate.read().inside);
                if live
                    .ready
                    .as_ref()
                    .is_some_and(|ready| !ready.gate.close_if_empty())
                {
                    return Some(Event::EvictRefused {
                        worker,
                        inside: inside.max(1),
                    });
                }
                info!(%worker, reason = reason.as_str(), why = %reason, charge = %self.charge(&worker), "evicting worker");
                self.end(&worker, kill);
            }
            Effect::Drain { worker, reason } => {
                info!(%worker, reason = reason.as_str(), why = %reason, "draining worker");
                let ready = self.workers.get(&worker)?.ready.as_ref()?;
                ready.gate.close();
                self.withdraw(&worker);
            }
            Effect::Resume { worker } => self.resume(&worker),
            Effect::Terminate {
                worker,
                reason,
                kill,
            } => {
                info!(%worker, reason = reason.as_str(), why = %reason, kill, charge = %self.charge(&worker), "terminating worker");
                self.end(&worker, kill);
            }
            Effect::ReclaimShortfall {
                worker,
                domain,
                missing,
            } => {
                warn!(%worker, %domain, %missing, "memory of an ended worker did not come back in time");
                self.counters.reclaim_shortfall += missing;
            }
            Effect::Learn { model, footprint } => self.store.learn(&model, &footprint),
            Effect::Finished => {
                self.finished = true;
                for reply in self.finishing.drain(..) {
                    let _ = reply.send(Ok(()));
                }
            }
        }
        None
    }

    fn spawn(&mut self, worker: WorkerId, expected: &policy::Expected, gpus: Vec<u32>) {
        info!(%worker, need = %expected, "spawning worker");
        let spec = Arc::clone(&self.policy.models()[&worker.model].spec);
        let handle = self.spawner.spawn(SpawnOrder {
            worker: worker.clone(),
            spec,
            gpus: placed(&self.reading.devices, &gpus),
            events: self.events.clone(),
        });
        let record = self.records.entry(worker.model.clone()).or_default();
        record.tail = Some((worker.generation, Arc::clone(&handle.tail)));
        self.workers.insert(
            worker,
            Live {
                handle,
                gpus,
                tree: None,
                ready: None,
            },
        );
    }

    fn grant(&mut self, ticket: Ticket, worker: &WorkerId) {
        // Whoever asked may have left: then nothing waits under the ticket.
        let Some(Pending::Lease { reply, late }) = self.waiting.remove(&ticket) else {
            return;
        };
        let ready = self.workers.get(worker).and_then(|live| live.ready.clone());
        let lease = ready.and_then(|ready| Lease::enter(ready, self.clock, self.signals.clone()));
        let Some(lease) = lease else {
            error!(%worker, "a granted worker has no open gate");
            let _ = reply.send(Err(Refusal::Overloaded));
            return;
        };
        self.granted_late += u64::from(late);
        // A lease that cannot be delivered drops, and so is given back.
        let _ = reply.send(Ok(lease));
    }

    /// The worker takes requests again.
    fn resume(&self, worker: &WorkerId) {
        info!(%worker, "nobody needs its memory any more: the worker stays");
        let ready = self.workers.get(worker).and_then(|live| live.ready.clone());
        if let (Some(ready), Some(route)) = (ready, self.routes.get(worker.model.as_str())) {
            ready.gate.reopen();
            route.set_ready(Some(ready));
        }
    }

    pub(super) fn reject(&mut self, ticket: Ticket, refusal: Refusal) {
        let Some(pending) = self.waiting.remove(&ticket) else {
            return;
        };
        *self.counters.refusals.entry(refusal.code()).or_default() += 1;
        info!(code = refusal.code(), why = %refusal, "refusing");
        match pending {
            Pending::Lease { reply, late } => {
                self.counters.misses += u64::from(!late);
                let _ = reply.send(Err(refusal));
            }
            Pending::Done(reply) => {
                let _ = reply.send(Err(refusal));
            }
            Pending::Cleanup(reply) => {
                let _ = reply.send(Err(refusal));
            }
        }
    }

    /// No new lease, connections closed, and the worker told to end.
    fn end(&mut self, worker: &WorkerId, kill: bool) {
        self.withdraw(worker);
        let Some(live) = self.workers.get(worker) else {
            return;
        };
        if let Some(ready) = &live.ready {
            ready.gate.close();
            ready.closing.cancel();
        }
        live.handle
            .stop(if kill { Stop::Kill } else { Stop::Graceful });
    }

    fn withdraw(&self, worker: &WorkerId) {
        let Some(route) = self.routes.get(worker.model.as_str()) else {
            return;
        };
        if route.ready().is_some_and(|ready| ready.id == *worker) {
            route.set_ready(None);
        }
    }

    /// Takes a gone worker off every table and keeps its counts.
    pub(super) fn bury(&mut self, worker: &WorkerId) {
        self.withdraw(worker);
        let Some(live) = self.workers.remove(worker) else {
            return;
        };
        let Some(ready) = live.ready else { return };
        ready.gate.close();
        ready.closing.cancel();
        let read = ready.gate.read();
        let record = self.records.entry(worker.model.clone()).or_default();
        record.accesses += read.entered;
        if read.entered > 0 {
            record.last_used = Some(read.last_left);
        }
    }

    /// What the worker is charged with, by domain, for the log.
    fn charge(&self, worker: &WorkerId) -> String {
        let model = &self.policy.models()[&worker.model];
        let charge = |domain| format!("{domain} {}", model.charge(domain));
        let all: Vec<_> = model.domains().into_iter().map(charge).collect();
        all.join(", ")
    }
}

/// Returns what a worker must be told of the devices it is placed on.
fn placed(devices: &[DeviceReading], gpus: &[u32]) -> Vec<PlacedGpu> {
    let mut ordinals: HashMap<&'static str, u32> = HashMap::new();
    let mut placed = Vec::with_capacity(gpus.len());
    for device in devices {
        let ordinal = ordinals.entry(device.vendor.as_str()).or_default();
        if gpus.contains(&device.index) {
            placed.push(PlacedGpu {
                index: device.index,
                uuid: device.uuid.clone(),
                vendor: device.vendor,
                ordinal: *ordinal,
            });
        }
        *ordinal += 1;
    }
    placed
}
