//! Who goes without another model needing the room: for idleness, under
//! pressure, or because an operator asks.

use std::collections::{BTreeMap, BTreeSet};

use super::Policy;
use super::event::{CleanupOrder, CleanupReport, Effect, Skipped, Ticket};
use super::ledger::Reclaimed;
use super::lifecycle::ModelState;
use super::reason::EvictReason;
use super::words::{Phase, PressureLevel, Protection, Skip};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, WorkerId};

/// A busy worker over this many hundredths of its own ceiling is drained.
const FAR_OVER_PERCENT: u64 = 150;

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

    /// Ends workers that hold more than their own ceiling: idle ones at once,
    /// busy ones when they are far over it, after a drain. What was to be
    /// resident is loaded again.
    pub(super) fn hold_ceilings(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let over: Vec<_> = self
            .models
            .values()
            .filter_map(|m| Some((m.worker(), m.activity.inside, m.over_ceiling()?)))
            .collect();
        for (worker, inside, (usage, ceiling)) in over {
            let reason = EvictReason::Ceiling { usage, ceiling };
            if inside == 0 {
                self.evict(now, &worker, reason, false, out);
            } else if usage > ceiling.percent(FAR_OVER_PERCENT) {
                self.drain(now, &worker, reason, out);
            }
        }
    }

    /// Acts on pressure, each domain by itself: a worker that is slow to go in
    /// one does not hold up relief in another.
    pub(super) fn relieve(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        for (domain, level) in self.levels.pressed() {
            let look = self.look(domain);
            let reason = EvictReason::Pressure {
                level,
                domain,
                usage: look.usage,
                headroom: look.headroom,
            };
            match level {
                PressureLevel::Hard if self.settings.emergency => {
                    self.relieve_hard(now, domain, reason, out);
                }
                PressureLevel::Soft if self.settings.auto_cleanup => {
                    self.relieve_soft(now, domain, reason, out);
                }
                PressureLevel::None | PressureLevel::Soft | PressureLevel::Hard => {}
            }
        }
    }

    /// One idle worker goes at a time, or is parked where that is enough.
    fn relieve_soft(
        &mut self,
        now: Timestamp,
        domain: Domain,
        reason: EvictReason,
        out: &mut Vec<Effect>,
    ) {
        let parks = |m: &ModelState| m.phase == Phase::Parking && m.is_moving(domain);
        let gives_back = self.leaving(domain).next().is_some() || self.models.values().any(parks);
        if gives_back || self.ledger.is_settling(domain) {
            return;
        }
        let Some(model) = self.candidates_on(domain).first().copied() else {
            return;
        };
        let (look, thresholds) = (self.look(domain), self.thresholds(domain));
        let missing = self.levels.missing(domain, look, thresholds);
        let worker = model.worker();
        if self.parks_enough(model, domain, missing) {
            self.park(now, &worker, reason, out);
        } else {
            self.evict(now, &worker, reason, false, out);
        }
    }

    /// The least valuable worker goes at once, idle first, then loading, then
    /// busy, and a pinned one only when no other is left.
    fn relieve_hard(
        &mut self,
        now: Timestamp,
        domain: Domain,
        reason: EvictReason,
        out: &mut Vec<Effect>,
    ) {
        if self.leaving(domain).next().is_some() {
            // Memory is being given back: at once now, without grace.
            let in_grace = self.leaving(domain).filter(|m| !m.killed);
            let in_grace: Vec<_> = in_grace.map(ModelState::worker).collect();
            for worker in in_grace {
                self.hasten(now, &worker, &reason, out);
            }
            return;
        }
        if self.ledger.is_settling(domain) {
            return;
        }
        if let Some(worker) = self.candidates_on(domain).first().map(|m| m.worker()) {
            self.evict(now, &worker, reason, true, out);
        } else if let Some(worker) = self.least_valuable(domain) {
            self.terminate(now, &worker, reason, true, out);
        }
    }

    /// Returns the workers on their way out that have bytes in a domain.
    fn leaving(&self, domain: Domain) -> impl Iterator<Item = &ModelState> {
        let leaving = self.models.values().filter(|m| m.is_leaving());
        leaving.filter(move |m| m.domains().contains(&domain))
    }

    /// Returns idle unpinned workers, the first to go first.
    #[must_use]
    pub fn candidates_in_order(&self) -> Vec<&ModelState> {
        let mut all: Vec<_> = self.models.values().filter(|m| m.is_candidate()).collect();
        // Who is parked serves nobody, and goes first.
        let serves = |m: &ModelState| m.phase != Phase::Parked;
        all.sort_by_cached_key(|m| {
            (
                serves(m),
                self.worth_per_byte(m),
                m.idle_since(),
                m.worker(),
            )
        });
        all
    }

    /// What a worker is worth for each MiB that its end gives back; by `lru`
    /// nothing, so that recency alone decides.
    fn worth_per_byte(&self, model: &ModelState) -> u64 {
        let bytes: Bytes = model.domains().iter().map(|d| model.charge(*d)).sum();
        self.worth(model) / (bytes.get() >> 20).max(1)
    }

    /// The same, of those that have bytes in a domain.
    fn candidates_on(&self, domain: Domain) -> Vec<&ModelState> {
        let mut all = self.candidates_in_order();
        // A parked worker may hold nothing of it any more.
        let holds = |m: &ModelState| m.phase != Phase::Parked || m.charge(domain) > Bytes::ZERO;
        all.retain(|m| m.domains().contains(&domain) && holds(m));
        all
    }

    /// Returns the models that would go to end the pressure there is, in
    /// order; empty when there is none.
    #[must_use]
    pub fn recommended(&self) -> Vec<ModelName> {
        let mut needed = self.missing_to_calm();
        let going = self.candidates_in_order().into_iter();
        going
            .filter(|m| take_needed(&mut needed, m))
            .map(|m| m.name().clone())
            .collect()
    }

    fn least_valuable(&self, domain: Domain) -> Option<WorkerId> {
        let rank = |m: &&ModelState| {
            let class = match m.phase {
                Phase::Starting | Phase::Parking | Phase::Parked | Phase::Unparking => 0,
                Phase::Ready | Phase::Draining | Phase::Stopping => 1,
                Phase::Stopped | Phase::Backoff | Phase::Failed => 2,
            };
            (m.pinned, class, m.idle_since(), m.worker())
        };
        self.models
            .values()
            .filter(|m| m.is_live() && m.phase != Phase::Stopping)
            .filter(|m| m.domains().contains(&domain))
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
        let needed = match order.target {
            Some(target) => BTreeMap::from([(Domain::Host, target)]),
            None => self.missing_to_calm(),
        };
        let (chosen, skipped) = self.choose_for_cleanup(order, needed.clone());
        let mut report = CleanupReport {
            skipped,
            ..CleanupReport::default()
        };
        report.unloaded = chosen.iter().map(|w| w.model.clone()).collect();
        let mut goal = Bytes::ZERO;
        if order.models.is_none() && !order.all {
            goal = needed.get(&Domain::Host).copied().unwrap_or_default();
        }
        if order.dry_run || chosen.is_empty() {
            for model in chosen.iter().map(|w| &self.models[&w.model]) {
                for domain in model.domains() {
                    *freed_in(&mut report, domain) += model.used(domain);
                }
            }
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

    /// What is missing to the end of pressure, by domain.
    fn missing_to_calm(&self) -> BTreeMap<Domain, Bytes> {
        let pressed = self.levels.pressed().into_iter();
        pressed
            .map(|(domain, _)| {
                let (look, thresholds) = (self.look(domain), self.thresholds(domain));
                (domain, self.levels.missing(domain, look, thresholds))
            })
            .collect()
    }

    fn choose_for_cleanup(
        &self,
        order: &CleanupOrder,
        mut needed: BTreeMap<Domain, Bytes>,
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
            // And parked ones first of all.
            let serves = |m: &ModelState| m.phase != Phase::Parked;
            pool.sort_by_key(|m| (serves(m), m.activity.inside > 0, m.idle_since(), m.worker()));
        }
        let everything = order.all || order.models.is_some();
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
            let unneeded =
                || (!everything && !take_needed(&mut needed, model)).then_some(Skip::NotNeeded);
            let skip = skip.or_else(unneeded);
            match skip {
                Some(why) => skipped.push(Skipped {
                    model: model.name().clone(),
                    why,
                }),
                None => chosen.push(model.worker()),
            }
        }
        (chosen, skipped)
    }

    pub(super) fn freed_in_cleanups(&mut self, reclaimed: &Reclaimed) {
        for cleanup in &mut self.cleanups {
            if cleanup.waiting.contains(&reclaimed.worker) {
                *freed_in(&mut cleanup.report, reclaimed.domain) += reclaimed.freed;
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
                let state = models.get(&worker.model);
                let lives = state.is_some_and(|m| m.generation == worker.generation && m.is_live());
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

fn freed_in(report: &mut CleanupReport, domain: Domain) -> &mut Bytes {
    match domain {
        Domain::Host => &mut report.freed,
        Domain::Gpu(_) => &mut report.freed_vram,
    }
}

/// Takes what a model holds off what is needed; false, and nothing is taken,
/// when it holds nothing where anything is.
fn take_needed(needed: &mut BTreeMap<Domain, Bytes>, model: &ModelState) -> bool {
    let helps = |(domain, bytes): (&Domain, &Bytes)| {
        *bytes > Bytes::ZERO && model.used(*domain) > Bytes::ZERO
    };
    if !needed.iter().any(helps) {
        return false;
    }
    for (domain, bytes) in needed {
        *bytes -= model.used(*domain);
    }
    true
}
