//! Takes in a changed configuration while workers run.
//!
//! A model that is not named by the change is left alone, whatever it does.
//! What holds for any worker holds at once. A worker that was started under
//! what no longer holds is *outdated*: those inside finish, requests that come
//! meanwhile wait for its next life, and what it used teaches nothing. A model
//! that is gone from the configuration is *removed*: whoever waits is told so,
//! its worker ends likewise, and it is forgotten when its bytes are back; when
//! it is configured again before that, it has its next life.

use std::sync::Arc;

use super::event::Effect;
use super::failures::Failures;
use super::footprint::declared;
use super::lifecycle::ModelState;
use super::reason::EvictReason;
use super::words::{Phase, Refusal};
use super::{Policy, Settings, Setup};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName};

/// What a changed configuration means for the policy.
#[derive(Clone, Debug)]
pub struct Change {
    /// The settings from now on, changed or not. A limit that an operator set
    /// stays.
    pub settings: Settings,
    /// Models that are added or changed.
    pub models: Vec<ModelChange>,
    /// Models that are no longer configured.
    pub removed: Vec<ModelName>,
}

/// One model that is added or changed.
#[derive(Clone, Debug)]
pub struct ModelChange {
    /// What the configuration says now.
    pub setup: Setup,
    /// A worker that was started before has to go.
    pub new_worker: bool,
}

impl Policy {
    /// Takes in a changed configuration.
    pub(super) fn configure(&mut self, now: Timestamp, change: Change, out: &mut Vec<Effect>) {
        self.settings = change.settings;
        let limits = (self.settings.limit, self.settings.gpu_limits.clone());
        self.ledger.configure(limits, self.settings.reserve);
        for domain in self.ledger.domains.keys() {
            let look = self.look(*domain);
            self.levels.set_over_limit(*domain, look.usage > look.limit);
        }
        if self.shutdown.is_some() {
            // Nothing is started any more, and everything ends as it is.
            return;
        }
        for name in &change.removed {
            self.remove(now, name, out);
        }
        for changed in change.models {
            if self.models.contains_key(&changed.setup.spec.name) {
                self.change(now, changed, out);
            } else {
                self.add(changed.setup);
            }
        }
    }

    fn add(&mut self, setup: Setup) {
        let name = setup.spec.name.clone();
        let mut state = ModelState::new(setup.spec, setup.weights, setup.footprint);
        // A life of a model of the same name may still be told of.
        state.generation = self.past_lives.get(&name).copied().unwrap_or(0);
        self.models.insert(name, state);
    }

    fn change(&mut self, now: Timestamp, changed: ModelChange, out: &mut Vec<Effect>) {
        let ModelChange { setup, new_worker } = changed;
        let Some(model) = self.models.get_mut(&setup.spec.name) else {
            return;
        };
        let before = std::mem::replace(&mut model.spec, setup.spec);
        let spec = Arc::clone(&model.spec);
        let is_back = std::mem::take(&mut model.removed);
        model.weights = setup.weights;
        if is_back || before.pinned != spec.pinned {
            model.pinned = spec.pinned;
        }
        let stays = model.is_live() && !model.is_leaving();
        model.wanted |= spec.preload && (is_back || !before.preload) && !stays;
        if !spec.preload && before.preload {
            model.wanted = false;
        }
        // What failed may have been mended just now.
        model.failures = Failures::default();
        if matches!(model.phase, Phase::Backoff | Phase::Failed) {
            model.enter(Phase::Stopped, now);
        }
        if new_worker || is_back {
            model.footprint = setup.footprint;
            self.outdate(now, &spec.name, out);
        } else {
            promise_what_is_declared(model, (before.memory, before.vram));
        }
    }

    /// Has the model's worker replaced, if it has one.
    fn outdate(&mut self, now: Timestamp, name: &ModelName, out: &mut Vec<Effect>) {
        let Some(model) = self.models.get_mut(name).filter(|m| m.is_live()) else {
            return;
        };
        model.outdated = true;
        model.life.clear();
        // Who was there is to be there again, also when nobody asks.
        model.wanted |= matches!(model.phase, Phase::Starting | Phase::Ready);
        self.send_away(now, name, &EvictReason::Changed, out);
    }

    fn remove(&mut self, now: Timestamp, name: &ModelName, out: &mut Vec<Effect>) {
        let Some(model) = self.models.get_mut(name) else {
            return;
        };
        model.removed = true;
        model.life.clear();
        self.refuse_all(name, &Refusal::UnknownModel(name.clone()), out);
        self.send_away(now, name, &EvictReason::Removed, out);
    }

    /// Has a worker end that may not stay: after those inside have finished,
    /// or at once while it loads.
    fn send_away(
        &mut self,
        now: Timestamp,
        name: &ModelName,
        reason: &EvictReason,
        out: &mut Vec<Effect>,
    ) {
        let until = now + self.settings.drain_timeout;
        let Some(model) = self.models.get_mut(name) else {
            return;
        };
        let worker = model.worker();
        match model.phase {
            Phase::Starting | Phase::Parking | Phase::Parked | Phase::Unparking => {
                self.terminate(now, &worker, reason.clone(), false, out);
            }
            Phase::Ready => self.drain(now, &worker, reason.clone(), out),
            Phase::Draining if model.drains_for().is_some() => {
                // From now on it goes whoever else finds room.
                model.leaving = Some(reason.clone());
                model.drain_until = Some(until);
            }
            Phase::Draining | Phase::Stopping | Phase::Stopped | Phase::Backoff | Phase::Failed => {
            }
        }
    }

    /// Forgets removed models of which nothing is left.
    pub(super) fn forget_removed(&mut self, out: &mut Vec<Effect>) {
        let ledger = &self.ledger;
        let is_gone = |m: &&ModelState| m.removed && !m.is_live() && !ledger.is_held(&m.worker());
        let gone = self.models.values().filter(is_gone);
        let gone: Vec<_> = gone.map(|m| m.name().clone()).collect();
        for name in gone {
            let Some(model) = self.models.remove(&name) else {
                continue;
            };
            self.past_lives.insert(name.clone(), model.generation);
            out.push(Effect::Forget {
                model: name,
                history: model.history,
            });
        }
    }
}

/// What is declared anew of a model counts for the worker it has, too.
fn promise_what_is_declared(model: &mut ModelState, before: (Option<Bytes>, Option<Bytes>)) {
    let now = (model.spec.memory, model.spec.vram);
    for (domain, promised) in &mut model.reservation.0 {
        let (was, is) = match domain {
            Domain::Host => (before.0, now.0),
            Domain::Gpu(_) => (before.1, now.1),
        };
        if let Some(bytes) = is.filter(|_| was != is) {
            *promised = declared(bytes);
        }
    }
}
