//! How workers go: evicted, unloaded, drained, crashed, shut down; and when
//! their bytes count as back.

use std::time::Duration;

use super::Policy;
use super::event::{Effect, Ticket};
use super::lifecycle::ModelState;
use super::reason::EvictReason;
use super::words::{Phase, Refusal};
use crate::clock::Timestamp;
use crate::model::{Ailment, Domain, ModelName, WorkerId};

impl Policy {
    /// Tells an idle worker to go. The gate has the last word: if somebody
    /// came in meanwhile, `EvictRefused` comes back.
    pub(super) fn evict(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        reason: EvictReason,
        kill: bool,
        out: &mut Vec<Effect>,
    ) {
        self.leave(now, worker, (Phase::Stopping, kill), &reason);
        out.push(Effect::Evict {
            worker: worker.clone(),
            reason,
            kill,
        });
    }

    /// Ends a worker whoever is inside.
    pub(super) fn terminate(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        reason: EvictReason,
        kill: bool,
        out: &mut Vec<Effect>,
    ) {
        self.leave(now, worker, (Phase::Stopping, kill), &reason);
        out.push(Effect::Terminate {
            worker: worker.clone(),
            reason,
            kill,
        });
    }

    /// Takes the grace from a worker that is on its way out. One that was told
    /// to go in this very step may still be refused by its gate, and then stays.
    pub(super) fn hasten(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        reason: &EvictReason,
        out: &mut Vec<Effect>,
    ) {
        let unanswered = out.iter_mut().find_map(|effect| {
            let Effect::Evict {
                worker: of, kill, ..
            } = effect
            else {
                return None;
            };
            (of == worker).then_some(kill)
        });
        match unanswered {
            Some(kill) => {
                *kill = true;
                self.leave(now, worker, (Phase::Stopping, true), reason);
            }
            None => self.terminate(now, worker, reason.clone(), true, out),
        }
    }

    /// Lets those inside finish and nobody new in.
    pub(super) fn drain(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        reason: EvictReason,
        out: &mut Vec<Effect>,
    ) {
        self.leave(now, worker, (Phase::Draining, false), &reason);
        let makes_room = matches!(reason, EvictReason::MakeRoom { .. });
        let until = (!makes_room).then(|| now + self.settings.drain_timeout);
        if let Some(model) = self.current(worker) {
            model.drain_until = until;
        }
        out.push(Effect::Drain {
            worker: worker.clone(),
            reason,
        });
    }

    fn leave(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        (phase, kill): (Phase, bool),
        reason: &EvictReason,
    ) {
        if let Some(model) = self.models.get(&worker.model) {
            self.ledger.begin_reclaim(&self.models, model);
        }
        if let Some(model) = self.current(worker) {
            model.leaving.get_or_insert_with(|| reason.clone());
            model.killed |= kill;
            model.enter(phase, now);
        }
    }

    pub(super) fn evict_refused(&mut self, worker: &WorkerId, inside: u32) {
        if self
            .current(worker)
            .is_some_and(|m| m.phase == Phase::Parking)
        {
            self.park_refused(worker, inside);
            return;
        }
        let Some(model) = self.current(worker).filter(|m| m.phase == Phase::Stopping) else {
            return;
        };
        // The worker never left, and is in use at this moment.
        model.phase = Phase::Ready;
        model.leaving = None;
        model.killed = false;
        model.activity.inside = inside;
        self.ledger.cancel_reclaim(worker);
        self.refused_in_cleanups(worker);
    }

    pub(super) fn unload(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        name: &ModelName,
        out: &mut Vec<Effect>,
    ) {
        let Some(model) = self.models.get_mut(name) else {
            out.push(Effect::Reject {
                ticket,
                refusal: Refusal::UnknownModel(name.clone()),
            });
            return;
        };
        model.wanted = false;
        let worker = model.worker();
        match model.phase {
            Phase::Stopped | Phase::Backoff | Phase::Failed => {
                self.refuse_all(name, &Refusal::Unloaded(name.clone()), out);
                self.clear_failures(name);
                if let Some(model) = self.models.get_mut(name) {
                    model.enter(Phase::Stopped, now);
                }
                out.push(Effect::Done { ticket });
            }
            Phase::Starting | Phase::Parking | Phase::Parked | Phase::Unparking => {
                model.unloading.push(ticket);
                self.refuse_all(name, &Refusal::Unloaded(name.clone()), out);
                self.terminate(now, &worker, EvictReason::Unload, false, out);
            }
            Phase::Ready => {
                model.unloading.push(ticket);
                self.drain(now, &worker, EvictReason::Unload, out);
            }
            Phase::Draining => {
                model.unloading.push(ticket);
                if model.drains_for().is_some() {
                    // From now on it goes whoever else finds room.
                    model.leaving = Some(EvictReason::Unload);
                    model.drain_until = Some(now + self.settings.drain_timeout);
                }
            }
            Phase::Stopping => model.unloading.push(ticket),
        }
    }

    /// Ends drained workers, and those whose drain took too long. Who is told to
    /// drain in this very step is not ended yet: somebody may come in until the
    /// gate is closed.
    pub(super) fn finish_drains(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let done: Vec<_> = self
            .models
            .values()
            .filter(|m| m.phase == Phase::Draining && !is_new(m, out))
            .filter(|m| m.activity.inside == 0 || m.drain_until.is_some_and(|at| at <= now))
            .filter_map(|m| Some((m.worker(), m.leaving.clone()?)))
            .collect();
        for (worker, reason) in done {
            self.terminate(now, &worker, reason, false, out);
        }
    }

    pub(super) fn never_ready(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        after: Duration,
        last_lines: &[String],
        out: &mut Vec<Effect>,
    ) {
        let Some(model) = self.current(worker).filter(|m| m.phase == Phase::Starting) else {
            return;
        };
        let refusal = Refusal::StartTimeout {
            model: worker.model.clone(),
            after,
            last_lines: last_lines.to_vec(),
        };
        model.enter(Phase::Stopping, now);
        model.failures.last = Some(refusal.to_string());
        self.refuse_all(&worker.model, &refusal, out);
    }

    /// Ends a worker that runs and is of no use, whoever is inside: they get
    /// nothing from it. Who is on its way out goes for the reason it had.
    pub(super) fn unhealthy(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        why: Ailment,
        out: &mut Vec<Effect>,
    ) {
        let serves = |m: &&mut ModelState| {
            m.is_at_rest() || matches!(m.phase, Phase::Ready | Phase::Draining)
        };
        let Some(model) = self.current(worker).filter(serves) else {
            return;
        };
        *model.history.unhealthy.entry(why.as_str()).or_default() += 1;
        let kill = why.is_deaf();
        let reason = EvictReason::Unhealthy { why };
        model.failures.last = Some(reason.to_string());
        self.terminate(now, worker, reason, kill, out);
    }

    /// Takes in what a life that ended taught, and says to keep it.
    pub(super) fn learn(
        &mut self,
        worker: &WorkerId,
        out_of_memory: &[Domain],
        out: &mut Vec<Effect>,
    ) {
        let budgets = out_of_memory.iter().filter_map(|domain| {
            let books = self.ledger.domains.get(domain)?;
            Some((*domain, books.budget()))
        });
        let budgets = budgets.collect();
        let teaches = |m: &&mut ModelState| m.is_live() && !m.outdated && !m.removed;
        let Some(model) = self.current(worker).filter(teaches) else {
            return;
        };
        model.learn(&budgets);
        out.push(Effect::Learn {
            model: worker.model.clone(),
            footprint: model.footprint.clone(),
        });
    }

    pub(super) fn exited(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        status: &str,
        last_lines: &[String],
        out: &mut Vec<Effect>,
    ) {
        let Some(model) = self
            .models
            .get(&worker.model)
            .filter(|m| m.generation == worker.generation)
        else {
            return;
        };
        self.ledger.reaped(&self.models, model, now);
        let model = self.current(worker).expect("looked up a line above");
        model.usage.clear();
        model.activity.inside = 0;
        let leaving = model.leaving.take();
        match model.phase {
            Phase::Starting => {
                let cause = format!("{status} before it was ready");
                model.fail(cause.clone(), false, now);
                let refusal = failed(&worker.model, cause, last_lines);
                self.refuse_all(&worker.model, &refusal, out);
                self.want_preload(&worker.model);
                self.restore_victims(now, &worker.model);
            }
            Phase::Ready | Phase::Parking | Phase::Parked | Phase::Unparking => {
                model.history.crashes += 1;
                let cause = match model.is_at_rest() {
                    true => format!("{status} while it was {}", model.phase.as_str()),
                    false => format!("{status} while it served"),
                };
                self.gave_out(now, worker, cause, last_lines, out);
            }
            // It was told to go, or never got ready.
            Phase::Draining | Phase::Stopping => match leaving {
                Some(reason @ EvictReason::Unhealthy { .. }) => {
                    self.gave_out(now, worker, reason.to_string(), last_lines, out);
                }
                Some(reason) => {
                    // What was recycled is wanted as much as before.
                    model.wanted |= matches!(reason, EvictReason::Ceiling { .. })
                        && (model.pinned || model.spec.preload);
                    book_eviction(model, reason, now);
                    model.enter(Phase::Stopped, now);
                }
                None => {
                    let cause = model
                        .failures
                        .last
                        .clone()
                        .unwrap_or_else(|| status.to_owned());
                    model.fail(cause.clone(), false, now);
                    // Whoever came while it was being ended waits no longer.
                    let refusal = failed(&worker.model, cause, last_lines);
                    self.refuse_all(&worker.model, &refusal, out);
                    self.want_preload(&worker.model);
                    self.restore_victims(now, &worker.model);
                }
            },
            Phase::Stopped | Phase::Backoff | Phase::Failed => {}
        }
    }

    /// Books the end of a worker that had served. Who waits gets the next life,
    /// if that may come at once, and is no worse off.
    fn gave_out(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        cause: String,
        last_lines: &[String],
        out: &mut Vec<Effect>,
    ) {
        let Some(model) = self.current(worker) else {
            return;
        };
        model.fail(cause.clone(), true, now);
        if model.queue.is_empty() {
            return;
        }
        if model.may_start(now) {
            model.enter(Phase::Stopped, now);
        } else {
            let refusal = failed(&worker.model, cause, last_lines);
            self.refuse_all(&worker.model, &refusal, out);
            self.want_preload(&worker.model);
        }
    }

    fn want_preload(&mut self, name: &ModelName) {
        if let Some(model) = self.models.get_mut(name) {
            model.wanted = model.spec.preload;
        }
    }

    /// Counts bytes as back, and answers who waited for that.
    pub(super) fn settle(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        for reclaimed in self.ledger.settle(&self.models, now) {
            out.push(Effect::Reclaimed {
                worker: reclaimed.worker.clone(),
                domain: reclaimed.domain,
                freed: reclaimed.freed,
                missing: reclaimed.missing,
            });
            self.freed_in_cleanups(&reclaimed);
        }
        for model in self.models.values_mut() {
            let gone = !model.is_live() && !self.ledger.is_held(&model.worker());
            if gone {
                out.extend(
                    model
                        .unloading
                        .drain(..)
                        .map(|ticket| Effect::Done { ticket }),
                );
            }
        }
    }

    pub(super) fn begin_shutdown(&mut self, until: Timestamp, out: &mut Vec<Effect>) {
        self.shutdown = Some(self.shutdown.map_or(until, |earlier| earlier.min(until)));
        // Nobody is planned for any more.
        self.blocked = false;
        self.patience_at = None;
        let names: Vec<_> = self.models.keys().cloned().collect();
        for name in names {
            self.refuse_all(&name, &Refusal::ShuttingDown, out);
        }
    }

    /// Drains what is busy, ends what is idle, and when the grace is over ends
    /// everything; finished when nothing lives.
    pub(super) fn proceed_shutdown(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let Some(until) = self.shutdown else { return };
        let live: Vec<_> = self
            .models
            .values()
            .filter(|m| m.is_live() && m.phase != Phase::Stopping)
            .map(|m| (m.worker(), m.phase, m.activity.inside))
            .collect();
        for (worker, phase, inside) in live {
            let busy = inside > 0 && now < until;
            match phase {
                Phase::Ready => self.drain(now, &worker, EvictReason::Shutdown, out),
                Phase::Draining if busy => {}
                Phase::Starting
                | Phase::Parking
                | Phase::Parked
                | Phase::Unparking
                | Phase::Draining => {
                    self.terminate(now, &worker, EvictReason::Shutdown, false, out);
                }
                Phase::Stopped | Phase::Stopping | Phase::Backoff | Phase::Failed => {}
            }
        }
        self.finish_drains(now, out);
        if !self.finished && !self.models.values().any(ModelState::is_live) {
            self.finished = true;
            out.push(Effect::Finished);
        }
    }
}

fn failed(model: &ModelName, cause: String, last_lines: &[String]) -> Refusal {
    Refusal::WorkerFailed {
        model: model.clone(),
        cause,
        last_lines: last_lines.to_vec(),
    }
}

/// Returns whether the model's worker is told to drain by one of these effects.
fn is_new(model: &ModelState, out: &[Effect]) -> bool {
    let worker = model.worker();
    let told =
        |effect: &Effect| matches!(effect, Effect::Drain { worker: of, .. } if *of == worker);
    out.iter().any(told)
}

/// Notes why a worker went. What an operator unloads by name or configures
/// otherwise, what was of no use, or residentd's own end takes along, is no
/// eviction.
fn book_eviction(model: &mut ModelState, reason: EvictReason, now: Timestamp) {
    match reason {
        EvictReason::Unload
        | EvictReason::Unhealthy { .. }
        | EvictReason::Changed
        | EvictReason::Removed
        | EvictReason::Shutdown => {}
        EvictReason::MakeRoom { .. }
        | EvictReason::Idle { .. }
        | EvictReason::Pressure { .. }
        | EvictReason::Ceiling { .. }
        | EvictReason::ParkFailed(_)
        | EvictReason::Cleanup => {
            *model.history.evictions.entry(reason.as_str()).or_default() += 1;
            model.history.evicted = true;
            model.history.last_eviction = Some((reason, now));
        }
    }
}
