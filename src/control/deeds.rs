//! Carries out what the policy wants done. Each deed is told, see `tell`.

use std::collections::HashMap;
use std::sync::Arc;

use tracing::error;

use super::task::{Live, Pending, Task};
use super::{CleanupReport, EvictReason, Lease, LoadReason, Refusal, What};
use crate::memory::DeviceReading;
use crate::model::{PlacedGpu, WorkerId};
use crate::policy::{self, Effect, Event, Ticket};
use crate::worker::{self, SpawnOrder, Stop};

impl Task {
    pub(super) fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Grant { ticket, worker } => self.grant(ticket, &worker),
            Effect::Done { ticket } => {
                if let Some(Pending::Done(reply)) = self.waiting.remove(&ticket) {
                    self.answers.put(reply, Ok(()));
                }
            }
            Effect::Reject { ticket, refusal } => self.reject(ticket, refusal),
            Effect::CleanedUp { ticket, report } => self.cleaned_up(ticket, report),
            Effect::Spawn {
                worker,
                expected,
                gpus,
            } => self.spawn(worker, &expected, gpus),
            Effect::Evict {
                worker,
                reason,
                kill,
            } => return self.evict(worker, reason, kill),
            Effect::Park {
                worker,
                reason,
                holds,
            } => return self.park(worker, reason, holds),
            Effect::Parked {
                worker,
                freed,
                took,
            } => self.parked(&worker, What::Parked { freed, took }),
            Effect::Unpark { worker, expected } => self.unpark(&worker, expected),
            Effect::Drain { worker, reason } => {
                let ready = self.workers.get(&worker)?.ready.as_ref()?;
                ready.gate.close();
                let inside = ready.gate.read().inside;
                self.tell(&worker, What::Drain { reason, inside });
                self.withdraw(&worker);
                // Only now nobody comes in any more.
                return Some(Event::Tick);
            }
            Effect::Resume { worker } => self.resume(&worker),
            Effect::Terminate {
                worker,
                reason,
                kill,
            } => {
                let charge = self.charge(&worker);
                let what = What::Terminate {
                    reason,
                    charge,
                    kill,
                };
                self.tell(&worker, what);
                self.end(&worker, kill);
            }
            Effect::Reclaimed {
                worker,
                domain,
                freed,
                missing,
            } => {
                let what = What::Reclaim {
                    domain,
                    freed,
                    missing,
                };
                self.tell(&worker, what);
                self.counters.reclaim_shortfall += missing;
            }
            Effect::Learn { model, footprint } => self.store.learn(&model, &footprint),
            Effect::Prefetch { model, reason } => self.prefetch(&model, reason),
            Effect::CallOff { model } => self.files.call_off(&model),
            Effect::Forget { model, history } => self.forget_model(&model, &history),
            Effect::Finished => {
                self.finished = true;
                for reply in self.finishing.drain(..) {
                    self.answers.put(reply, Ok(()));
                }
            }
        }
        None
    }

    fn cleaned_up(&mut self, ticket: Ticket, report: CleanupReport) {
        let what = What::Cleanup {
            unloaded: report.unloaded.clone(),
            freed: report.freed,
            missing: report.shortfall,
        };
        self.tell_of(None, what);
        if let Some(Pending::Cleanup(reply)) = self.waiting.remove(&ticket) {
            self.answers.put(reply, Ok(report));
        }
    }

    /// Ends a worker unless somebody is inside.
    fn evict(&mut self, worker: WorkerId, reason: EvictReason, kill: bool) -> Option<Event> {
        if let Some(inside) = self.close_if_empty(&worker)? {
            self.tell(&worker, What::Keep { reason, inside });
            return Some(Event::EvictRefused { worker, inside });
        }
        let charge = self.charge(&worker);
        let what = What::Evict {
            reason,
            charge,
            kill,
        };
        self.tell(&worker, what);
        self.end(&worker, kill);
        None
    }

    /// Closes a worker's gate unless somebody is inside: then returns how many.
    pub(super) fn close_if_empty(&self, worker: &WorkerId) -> Option<Option<u32>> {
        let live = self.workers.get(worker)?;
        let busy = live.ready.as_ref().filter(|r| !r.gate.close_if_empty());
        // Whoever was inside may have left a moment ago.
        Some(busy.map(|ready| ready.gate.read().inside.max(1)))
    }

    /// Returns for whom a worker is made ready, and how many requests wait.
    pub(super) fn load_reason(&self, worker: &WorkerId) -> (LoadReason, usize) {
        let queue = &self.policy.models()[&worker.model].queue;
        let reason = match queue.front() {
            Some(waiter) if waiter.wants_lease => LoadReason::Request,
            Some(_) => LoadReason::Operator,
            None => LoadReason::Preload,
        };
        let waiting = queue.iter().filter(|waiter| waiter.wants_lease).count();
        (reason, waiting)
    }

    fn spawn(&mut self, worker: WorkerId, expected: &policy::Expected, gpus: Vec<u32>) {
        let (reason, waiting) = self.load_reason(&worker);
        let what = What::Spawn {
            reason,
            waiting,
            expected: expected.clone(),
            gpus: gpus.clone(),
        };
        self.tell(&worker, what);
        let spec = Arc::clone(&self.policy.models()[&worker.model].spec);
        let files = self.store.fingerprint(&worker.model).unwrap_or_default();
        let handle = self.spawner.spawn(SpawnOrder {
            worker: worker.clone(),
            origin: worker::origin(&spec, &files),
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
                adoption: None,
                record: None,
            },
        );
    }

    fn grant(&mut self, ticket: Ticket, worker: &WorkerId) {
        // Whoever asked may have left: then nothing waits under the ticket.
        let Some(Pending::Lease { reply, late }) = self.waiting.remove(&ticket) else {
            return;
        };
        let ready = self.workers.get(worker).and_then(|live| live.ready.clone());
        let lease = ready.and_then(|r| Lease::enter_held(r, self.clock, self.signals.clone()));
        let Some(lease) = lease else {
            error!(%worker, "a granted worker has no open gate");
            let _ = reply.send(Err(Refusal::Overloaded));
            return;
        };
        self.counters.granted_late += u64::from(late);
        // A lease that cannot be delivered drops, and so is given back.
        let _ = reply.send(Ok(lease));
    }

    /// The worker takes requests again.
    fn resume(&self, worker: &WorkerId) {
        if let Some(inside) = self.admit_again(worker) {
            self.tell(worker, What::Resume { inside });
        }
    }

    /// Opens a worker's gate again, and returns how many are inside.
    pub(super) fn admit_again(&self, worker: &WorkerId) -> Option<u32> {
        let ready = self.workers.get(worker)?.ready.clone()?;
        let route = self.routes.get(worker.model.as_str())?;
        ready.gate.reopen();
        let inside = ready.gate.read().inside;
        route.set_ready(Some(ready));
        Some(inside)
    }

    pub(super) fn reject(&mut self, ticket: Ticket, refusal: Refusal) {
        let Some(pending) = self.waiting.remove(&ticket) else {
            return;
        };
        self.tell_refusal(&refusal);
        match pending {
            Pending::Lease { reply, late } => {
                self.counters.misses += u64::from(!late);
                self.counters.turned_away += u64::from(!found_worker(&refusal));
                self.answers.put(reply, Err(refusal));
            }
            Pending::Done(reply) => self.answers.put(reply, Err(refusal)),
            Pending::Cleanup(reply) => self.answers.put(reply, Err(refusal)),
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
            ready.opened.close();
        }
        live.handle
            .stop(if kill { Stop::Kill } else { Stop::Graceful });
    }

    pub(super) fn withdraw(&self, worker: &WorkerId) {
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
}

/// Returns whether a worker was there, or was started, for a request that is
/// turned away.
const fn found_worker(refusal: &Refusal) -> bool {
    match refusal {
        Refusal::WorkerFailed { .. }
        | Refusal::StartTimeout { .. }
        | Refusal::QueueTimeout { .. }
        | Refusal::Unloaded(_) => true,
        Refusal::UnknownModel(_)
        | Refusal::UnknownDomain(_)
        | Refusal::QueueFull { .. }
        | Refusal::TooLarge { .. }
        | Refusal::NoDevice { .. }
        | Refusal::NoRoom { .. }
        | Refusal::BackingOff { .. }
        | Refusal::Overloaded
        | Refusal::ShuttingDown => false,
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
