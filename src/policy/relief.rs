//! Who goes without another model needing the room: for idleness, under
//! pressure, or because an operator asks.

use std::collections::BTreeSet;

use super::Policy;
use super::event::{CleanupOrder, CleanupReport, Effect, Skipped, Ticket};
use super::ledger::Reclaimed;
use super::lifecycle::ModelState;
use super::words::{EvictReason, Phase, PressureLevel, Protection, Skip};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, WorkerId};

/// A cleanup that waits for bytes.
#[derive(Clone, Debug)]
pub(super) struct Cleanup {
    pub(super) ticket: Ticket,
    pub(super) deadline: Timestamp,
    waiting: BTreeSet<WorkerId>,
    target: Bytes,
    report: CleanupReport,
}

impl Policy {
    /// Returns when the model's idle time is over, as far as is known.
    pub(super) fn idle_deadline(&self, model: &ModelState) -> Option<Timestamp> {
        let timeout = model.spec.idle_timeout?;
        model.is_candidate().then(|| model.idle_since() + timeout)
    }

    pub(super) fn end_idle(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let due: Vec<_> = self
            .models
            .values()
            .filter(|m| self.idle_deadline(m).is_some_and(|at| at <= now))
            .map(|m| (m.worker(), now.since(m.idle_since())))
            .collect();
        for (worker, after) in due {
            self.evict(now, &worker, EvictReason::Idle { after }, false, out);
        }
    }

    /// Under soft pressure one idle worker goes at a time; under hard pressure
    /// the least valuable one goes at once, idle first, then loading, then
    /// busy, and a pinned one only when no other is left.
    pub(super) fn relieve(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let (level, Some(domain)) = self.levels.worst() else {
            return;
        };
        let under_way =
            self.models.values().any(ModelState::is_leaving) || self.ledger.is_settling(domain);
        let reason = || {
            let look = self.look(domain);
            EvictReason::Pressure {
                level,
                domain,
                usage: look.usage,
                headroom: look.headroom,
            }
        };
        match level {
            PressureLevel::None => {}
            PressureLevel::Soft if !self.settings.auto_cleanup || under_way => {}
            PressureLevel::Soft => {
                if let Some(worker) = self.candidates_in_order().first().map(|m| m.worker()) {
                    let reason = reason();
                    self.evict(now, &worker, reason, false, out);
                }
            }
            PressureLevel::Hard if !self.settings.emergency => {}
            PressureLevel::Hard => {
                let leaving: Vec<_> = self.models.values().filter(|m| m.is_leaving()).collect();
                let in_grace: Vec<_> = leaving
                    .iter()
                    .filter(|m| !m.killed)
                    .map(|m| m.worker())
                    .collect();
                if !leaving.is_empty() {
                    // Memory is being given back: at once now, without grace.
                    let reason = reason();
                    for worker in in_grace {
                        self.terminate(now, &worker, reason.clone(), true, out);
                    }
                    return;
                }
                if self.ledger.is_settling(domain) {
                    return;
                }
                let reason = reason();
                if let Some(worker) = self.candidates_in_order().first().map(|m| m.worker()) {
                    self.evict(now, &worker, reason, true, out);
                } else if let Some(worker) = self.least_valuable() {
                    self.terminate(now, &worker, reason, true, out);
                }
            }
        }
    }

    /// Returns idle unpinned workers, the first to go first.
    #[must_use]
    pub fn candidates_in_order(&self) -> Vec<&ModelState> {
        let mut all: Vec<_> = self.models.values().filter(|m| m.is_candidate()).collect();
        all.sort_by_key(|m| (m.idle_since(), m.worker()));
        all
    }

    /// Returns the models that would go to end the pressure there is, in
    /// order; empty when there is none.
    #[must_use]
    pub fn recommended(&self) -> Vec<ModelName> {
        let (level, Some(domain)) = self.levels.worst() else {
            return Vec::new();
        };
        if level == PressureLevel::None {
            return Vec::new();
        }
        let missing = self
            .levels
            .missing(domain, self.look(domain), self.thresholds());
        self.enough(missing)
            .into_iter()
            .map(|m| m.name().clone())
            .collect()
    }

    /// The first candidates whose resident bytes come to `target`.
    fn enough(&self, target: Bytes) -> Vec<&ModelState> {
        let mut freed = Bytes::ZERO;
        self.candidates_in_order()
            .into_iter()
            .take_while(|m| {
                let needed = freed < target;
                freed += m.used(Domain::Host);
                needed
            })
            .collect()
    }

    fn least_valuable(&self) -> Option<WorkerId> {
        let rank = |m: &&ModelState| {
            let class = match m.phase {
                Phase::Starting => 0,
                Phase::Ready | Phase::Draining | Phase::Stopping => 1,
                Phase::Stopped | Phase::Backoff | Phase::Failed => 2,
            };
            (m.pinned, class, m.idle_since(), m.worker())
        };
        self.models
            .values()
            .filter(|m| matches!(m.phase, Phase::Starting | Phase::Ready | Phase::Draining))
            .min_by_key(rank)
            .map(ModelState::worker)
    }

    pub(super) fn cleanup(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        order: &CleanupOrder,
        deadline: Timestamp,
        out: &mut Vec<Effect>,
    ) {
        let target = order.target.unwrap_or_else(|| self.missing_to_calm());
        let (chosen, skipped) = self.choose_for_cleanup(order, target);
        let mut report = CleanupReport {
            skipped,
            ..CleanupReport::default()
        };
        report.unloaded = chosen.iter().map(|w| w.model.clone()).collect();
        let mut goal = Bytes::ZERO;
        if order.models.is_none() && !order.all {
            goal = target;
        }
        if order.dry_run || chosen.is_empty() {
            report.freed = chosen
                .iter()
                .map(|w| self.models[&w.model].used(Domain::Host))
                .sum();
            report.shortfall = goal - report.freed;
            out.push(Effect::CleanedUp { ticket, report });
            return;
        }
        self.cleanups.push(Cleanup {
            ticket,
            deadline,
            waiting: chosen.iter().cloned().collect(),
            target: goal,
            report,
        });
        for worker in chosen {
            let model = &self.models[&worker.model];
            if model.activity.inside > 0 {
                self.drain(now, &worker, EvictReason::Cleanup, out);
            } else {
                self.evict(now, &worker, EvictReason::Cleanup, false, out);
            }
        }
    }

    /// What is missing to the end of pressure in host RAM.
    fn missing_to_calm(&self) -> Bytes {
        match self.levels.of(Domain::Host) {
            PressureLevel::None => Bytes::ZERO,
            PressureLevel::Soft | PressureLevel::Hard => {
                self.levels
                    .missing(Domain::Host, self.look(Domain::Host), self.thresholds())
            }
        }
    }

    fn choose_for_cleanup(
        &self,
        order: &CleanupOrder,
        target: Bytes,
    ) -> (Vec<WorkerId>, Vec<Skipped>) {
        let mut pool: Vec<&ModelState> = match &order.models {
            Some(names) => names
                .iter()
                .filter_map(|name| self.models.get(name))
                .collect(),
            None => self.models.values().filter(|m| m.is_live()).collect(),
        };
        if order.models.is_none() {
            // The policy's order: oldest first, busy ones after all idle ones.
            pool.sort_by_key(|m| (m.activity.inside > 0, m.idle_since(), m.worker()));
        }
        let everything = order.all || order.models.is_some();
        let mut freed = Bytes::ZERO;
        let mut chosen = Vec::new();
        let mut skipped = Vec::new();
        for model in pool {
            let skip = match model.protection() {
                None if !model.is_live() => Some(Skip::NotLoaded),
                Some(Protection::Busy) if order.force => None,
                Some(Protection::Pinned) if order.force && order.models.is_some() => None,
                Some(why) => Some(Skip::Protected(why)),
                None => None,
            };
            let skip = skip.or((!everything && freed >= target).then_some(Skip::NotNeeded));
            match skip {
                Some(why) => skipped.push(Skipped {
                    model: model.name().clone(),
                    why,
                }),
                None => {
                    freed += model.used(Domain::Host);
                    chosen.push(model.worker());
                }
            }
        }
        (chosen, skipped)
    }

    pub(super) fn freed_in_cleanups(&mut self, reclaimed: &Reclaimed) {
        for cleanup in &mut self.cleanups {
            if cleanup.waiting.contains(&reclaimed.worker) && reclaimed.domain == Domain::Host {
                cleanup.report.freed += reclaimed.freed;
            }
        }
    }

    /// A worker that was to be cleaned up turned out to be busy.
    pub(super) fn refused_in_cleanups(&mut self, worker: &WorkerId) {
        for cleanup in &mut self.cleanups {
            if cleanup.waiting.remove(worker) {
                cleanup.report.unloaded.retain(|name| *name != worker.model);
                let why = Skip::Protected(Protection::Busy);
                cleanup.report.skipped.push(Skipped {
                    model: worker.model.clone(),
                    why,
                });
            }
        }
    }

    pub(super) fn finish_cleanups(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let (models, ledger) = (&self.models, &self.ledger);
        for cleanup in &mut self.cleanups {
            cleanup.waiting.retain(|worker| {
                let state = &models[&worker.model];
                let lives = state.generation == worker.generation && state.is_live();
                lives || ledger.is_reclaiming(worker)
            });
        }
        let (done, rest): (Vec<_>, Vec<_>) = self
            .cleanups
            .drain(..)
            .partition(|c| c.waiting.is_empty() || c.deadline <= now);
        self.cleanups = rest;
        for mut cleanup in done {
            cleanup.report.timed_out = !cleanup.waiting.is_empty();
            cleanup.report.shortfall = cleanup.target - cleanup.report.freed;
            out.push(Effect::CleanedUp {
                ticket: cleanup.ticket,
                report: cleanup.report,
            });
        }
    }
}
