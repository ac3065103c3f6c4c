//! When idle workers do not suffice.
//!
//! A request waits `patience` for busy workers to become idle. Then the least
//! valuable set of all that may go is chosen, and the busy ones of it are
//! drained: those inside finish, new requests queue behind. So overlapping
//! traffic on one model does not starve another. Idle ones of the set are left
//! alone until the drains are over, since only then is there use for their
//! bytes; and a drain that nobody needs any more is called off.
//!
//! In one domain one set drains at a time, for whoever has waited longest: with
//! several, workers stand idle with closed gates until the slowest of each set
//! is done. Only when that takes long may the next begin beside it, so that one
//! endless request holds up no one but its own worker.

use super::Policy;
use super::event::Effect;
use super::eviction::{self, Candidate};
use super::ledger::{self, Need};
use super::lifecycle::ModelState;
use super::reason::EvictReason;
use super::verdict::{Plan, less, missing};
use super::words::Phase;
use crate::clock::Timestamp;
use crate::model::ModelName;

/// A victim is wanted back after the load it went for has failed when it was
/// used within this time before it went.
const RESTORE_WITHIN: std::time::Duration = std::time::Duration::from_secs(300);

/// A set that drains keeps others from draining in its domain for so many times
/// the patience.
pub(super) const ALONE_PATIENCES: u32 = 12;

impl ModelState {
    /// Returns for whom it drains, when that is to make room.
    pub(super) fn drains_for(&self) -> Option<&ModelName> {
        match &self.leaving {
            Some(EvictReason::MakeRoom { for_model, .. }) if self.phase == Phase::Draining => {
                Some(for_model)
            }
            Some(_) | None => None,
        }
    }
}

impl Policy {
    /// Returns when busy workers drain for a model to which this is missing: it has
    /// lost patience, and it is its turn. `None` when nobody waits who could.
    pub(super) fn drains_at(&self, name: &ModelName, missing: &Need) -> Option<Timestamp> {
        let waiter = self.models[name].queue.front()?;
        let patience = waiter.since + self.settings.patience;
        let drains = |m: &&ModelState| m.drains_for().is_some_and(|other| other != name);
        let here = |m: &&ModelState| {
            let domains = m.domains();
            missing.keys().any(|(domain, _)| domains.contains(domain))
        };
        let others = self.models.values().filter(drains).filter(here);
        let turn = others.map(|m| m.since + self.settings.patience * ALONE_PATIENCES);
        Some(turn.fold(patience, Timestamp::max))
    }

    /// Returns what workers hold that drain to make room for such models, and so
    /// come back whenever their requests are done, or never.
    pub(super) fn draining_for(&self, whom: impl Fn(&ModelName) -> bool) -> Need {
        let mut held = Need::new();
        let draining = self.models.values();
        for model in draining.filter(|m| m.drains_for().is_some_and(&whom)) {
            ledger::add(&mut held, &self.ledger.gives(model));
        }
        held
    }

    /// Returns every worker that may go for another, busy ones too.
    fn all_candidates(&self, name: &ModelName) -> Vec<Candidate> {
        let may_go = |m: &&ModelState| {
            (m.phase == Phase::Ready && !m.pinned) || self.is_candidate_for(m, name)
        };
        let models = self.models.values().filter(may_go);
        models.map(|m| self.candidate(m)).collect()
    }

    /// Drains the busy workers of the least valuable set whose bytes suffice.
    /// Returns whether room is on its way for this model.
    pub(super) fn drain_for(
        &mut self,
        now: Timestamp,
        name: &ModelName,
        claims: &Need,
        out: &mut Vec<Effect>,
    ) -> bool {
        let Ok(Plan { expected, need, .. }) = self.plan_of(&self.models[name], claims) else {
            return false;
        };
        let (_, later) = self.rooms(expected.domains());
        let short = missing(&need, &less(&later, claims));
        let policy = self.settings.eviction;
        let Some(victims) = eviction::choose_victims(policy, self.all_candidates(name), &short)
        else {
            return false;
        };
        let shortage = self.shortage(&expected, &short);
        for victim in victims.iter().filter(|victim| victim.busy) {
            let reason = shortage.reason(name);
            self.drain(now, &victim.worker, reason, out);
        }
        true
    }

    /// Lets workers stay that drain for a model that needs no room any more: it
    /// found some elsewhere, or whoever waited for it has left. Returns whether
    /// there was any.
    pub(super) fn call_off_drains(&mut self, now: Timestamp, out: &mut Vec<Effect>) -> bool {
        let waits = |name: &ModelName| {
            let model = self.models.get(name);
            model.is_some_and(|m| m.is_without_memory() && !m.queue.is_empty())
        };
        let unneeded = |m: &&ModelState| m.drains_for().is_some_and(|name| !waits(name));
        let workers: Vec<_> = self
            .models
            .values()
            .filter(unneeded)
            .map(ModelState::worker)
            .collect();
        for worker in &workers {
            self.ledger.cancel_reclaim(worker);
            out.push(Effect::Resume {
                worker: worker.clone(),
            });
            if let Some(model) = self.current(worker) {
                model.leaving = None;
                model.enter(Phase::Ready, now);
            }
            self.grant_waiters(worker, out);
        }
        !workers.is_empty()
    }

    /// Wants back, as far as there is room, who went for a load that failed.
    pub(super) fn restore_victims(&mut self, now: Timestamp, failed: &ModelName) {
        for model in self.models.values_mut() {
            let Some((EvictReason::MakeRoom { for_model, .. }, went)) =
                &model.history.last_eviction
            else {
                continue;
            };
            let used = model
                .asked_at
                .is_some_and(|at| went.since(at) < RESTORE_WITHIN);
            model.wanted |= for_model == failed
                && used
                && now.since(*went) < RESTORE_WITHIN
                && model.history.evicted
                && !model.is_live();
        }
    }
}
