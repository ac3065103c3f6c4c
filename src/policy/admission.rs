//! Who waits, who is granted, who is turned away, and what is loaded next.
//!
//! Models that are wanted are looked at in the order of their oldest waiter.
//! A model for which victims were told to go keeps its claim on their bytes:
//! whoever comes later plans with what is left. A model that has to wait for
//! busy workers does not hold up those behind it.

use super::Policy;
use super::event::{Activity, Effect, Ticket};
use super::ledger::{self, Need};
use super::lifecycle::{ModelState, Waiter};
use super::verdict::{Claims, Verdict, Victim, least};
use super::words::{Expected, Phase, Refusal};
use crate::clock::Timestamp;
use crate::model::{Domain, Gaps, ModelName, WorkerId};

impl Policy {
    pub(super) fn acquire(
        &mut self,
        now: Timestamp,
        (ticket, deadline, wants_lease): (Ticket, Timestamp, bool),
        name: &ModelName,
        out: &mut Vec<Effect>,
    ) {
        let reject = |refusal| Effect::Reject { ticket, refusal };
        if self.shutdown.is_some() {
            out.push(reject(Refusal::ShuttingDown));
            return;
        }
        let Some(model) = self.models.get_mut(name).filter(|m| !m.removed) else {
            out.push(reject(Refusal::UnknownModel(name.clone())));
            return;
        };
        let waiter = Waiter {
            ticket,
            since: now,
            deadline,
            wants_lease,
        };
        match model.phase {
            Phase::Ready if !wants_lease || (model.queue.is_empty() && !model.is_full()) => {
                out.push(grant(now, model, waiter));
            }
            Phase::Backoff | Phase::Failed if !model.may_start(now) => {
                out.push(reject(model.backing_off(now)));
            }
            Phase::Stopped
            | Phase::Starting
            | Phase::Ready
            | Phase::Parking
            | Phase::Parked
            | Phase::Unparking
            | Phase::Draining
            | Phase::Stopping
            | Phase::Backoff
            | Phase::Failed => {
                let queued = model.queue.iter().filter(|w| w.wants_lease).count();
                if wants_lease && queued >= model.spec.max_queue {
                    out.push(reject(Refusal::QueueFull {
                        model: name.clone(),
                        queued,
                    }));
                    return;
                }
                if matches!(model.phase, Phase::Backoff | Phase::Failed) {
                    model.enter(Phase::Stopped, now);
                }
                model.queue.push_back(waiter);
            }
        }
    }

    pub(super) fn clear_failures(&mut self, name: &ModelName) {
        if let Some(model) = self.models.get_mut(name) {
            model.failures.recent.clear();
            model.failures.retry_at = None;
        }
    }

    pub(super) fn cancel(&mut self, ticket: Ticket) {
        for model in self.models.values_mut() {
            model.queue.retain(|w| w.ticket != ticket);
            model.unloading.retain(|t| *t != ticket);
        }
        self.cleanups.retain(|c| c.ticket != ticket);
    }

    pub(super) fn ready(&mut self, now: Timestamp, worker: &WorkerId, out: &mut Vec<Effect>) {
        let Some(model) = self.current(worker).filter(|m| m.phase == Phase::Starting) else {
            return;
        };
        if !model.adopted {
            let took = now.since(model.since);
            model.history.last_load = Some(took);
            model.reuse.loaded(took);
            model.history.loads += 1;
        }
        model.served = true;
        if std::mem::take(&mut model.history.evicted) {
            model.history.reloads += 1;
        }
        model.failures.last = None;
        // One that was taken back has been idle since it was before.
        if !model.adopted {
            model.activity = Activity::opened(now);
        }
        model.loaded_at = now;
        model.enter(Phase::Ready, now);
        self.grant_waiters(worker, out);
    }

    /// Answers whoever waits for a ready worker, as many as fit into it.
    pub(super) fn grant_waiters(&mut self, worker: &WorkerId, out: &mut Vec<Effect>) {
        let now = self.now;
        let Some(model) = self.current(worker) else {
            return;
        };
        for waiter in std::mem::take(&mut model.queue) {
            if waiter.wants_lease && model.is_full() {
                model.queue.push_back(waiter);
            } else {
                out.push(grant(now, model, waiter));
            }
        }
    }

    /// Lets in whoever waits for a place in a ready worker.
    pub(super) fn fill_places(&mut self, out: &mut Vec<Effect>) {
        let has_place = |m: &&ModelState| m.phase == Phase::Ready && !m.is_full();
        let models = self.models.values().filter(has_place);
        let waited_for = models.filter(|m| !m.queue.is_empty());
        let workers: Vec<_> = waited_for.map(ModelState::worker).collect();
        for worker in workers {
            self.grant_waiters(&worker, out);
        }
    }

    pub(super) fn expire_waiters(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let mut late = Vec::new();
        for model in self.models.values_mut().filter(|m| !m.queue.is_empty()) {
            let (expired, rest): (Vec<_>, Vec<_>) =
                model.queue.drain(..).partition(|w| w.deadline <= now);
            model.queue = rest.into();
            late.extend(expired.into_iter().map(|w| (model.name().clone(), w)));
        }
        for (name, waiter) in late {
            let refusal = self.too_late(now, &name, waiter);
            out.push(Effect::Reject {
                ticket: waiter.ticket,
                refusal,
            });
        }
    }

    /// Why a waiter's time was not enough: no room, or a slow load.
    fn too_late(&self, now: Timestamp, name: &ModelName, waiter: Waiter) -> Refusal {
        let model = &self.models[name];
        let slow = Refusal::QueueTimeout {
            model: name.clone(),
            waited: now.since(waiter.since),
        };
        if model.phase != Phase::Stopped {
            return slow;
        }
        let expected = self.expected(model);
        let room = |domain| least(&self.room_with_idle_gone(domain));
        let tightest = expected
            .domains()
            .filter_map(|domain| Some((domain, expected.known(domain)?, room(domain))))
            .max_by_key(|(_, need, room)| ledger::signed(*need) - ledger::signed(*room));
        match tightest {
            Some((domain, need, room)) => Refusal::NoRoom {
                model: name.clone(),
                domain,
                need,
                room,
            },
            None => slow,
        }
    }

    fn room_with_idle_gone(&self, domain: Domain) -> Need {
        let mut room = self.ledger.room(&self.models, domain);
        for model in self.models.values().filter(|m| m.is_candidate()) {
            ledger::add(&mut room, &self.ledger.gives(model));
        }
        room.retain(|(of, _), _| *of == domain);
        room
    }

    /// Looks at every wanted model and starts, unparks, waits, parks, evicts or
    /// refuses.
    pub(super) fn plan(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let mut claims = Claims::default();
        self.blocked = false;
        self.patience_at = None;
        for name in self.wanted_in_order(now) {
            match self.admit(&name, &claims) {
                Verdict::Spawn(expected, gpus) => self.spawn(now, &name, expected, gpus, out),
                Verdict::Wait(need) => claims.add(&need),
                Verdict::WaitForDrains(need) => ledger::add(&mut claims.all, &need),
                Verdict::Unpark(expected) => {
                    let worker = self.models[&name].worker();
                    self.unpark(now, &worker, expected, out);
                }
                Verdict::Evict(victims, need, short) => {
                    for Victim { worker, parks } in victims {
                        let reason = short.reason(&name);
                        match parks {
                            true => self.park(now, &worker, reason, out),
                            false => self.evict(now, &worker, reason, false, out),
                        }
                    }
                    claims.add(&need);
                }
                Verdict::Blocked(need, short) => {
                    self.blocked = true;
                    match self.drains_at(&name, &short) {
                        Some(ends) if ends > now => {
                            let next = self.patience_at.map_or(ends, |at| at.min(ends));
                            self.patience_at = Some(next);
                        }
                        Some(_) if self.drain_for(now, &name, &claims.all, out) => {
                            ledger::add(&mut claims.all, &need);
                        }
                        Some(_) | None => {}
                    }
                }
                Verdict::Refuse(refusal) => self.refuse_all(&name, &refusal, out),
            }
        }
    }

    /// Models that someone wants and that may start, oldest waiter first;
    /// those that only the configuration wants come last, pinned ones first.
    pub(super) fn wanted_in_order(&self, now: Timestamp) -> Vec<ModelName> {
        let mut wanted: Vec<_> = self
            .models
            .values()
            .filter(|m| (m.wanted || !m.queue.is_empty()) && !m.removed)
            .filter(|m| m.may_start(now) || m.phase == Phase::Parked)
            .filter(|m| !self.ledger.is_held(&m.worker()))
            .map(|m| {
                (
                    m.queue.is_empty(),
                    m.queue.front().map(|w| (w.since, w.ticket)),
                    !m.pinned,
                    m.name().clone(),
                )
            })
            .collect();
        wanted.sort();
        wanted.into_iter().map(|(.., name)| name).collect()
    }

    fn spawn(
        &mut self,
        now: Timestamp,
        name: &ModelName,
        expected: Expected,
        gpus: Vec<u32>,
        out: &mut Vec<Effect>,
    ) {
        let model = self
            .models
            .get_mut(name)
            .expect("a wanted model is configured");
        let first = model.queue.front();
        let gap = first.and_then(|first| Some(first.since.since(model.asked_at?)));
        model.begin_life(expected.clone(), now);
        out.push(Effect::Spawn {
            worker: model.worker(),
            expected,
            gpus,
        });
        if let Some(gap) = gap {
            self.learn_gaps(name, &Gaps::one(gap));
        }
    }

    /// Turns away everyone who waits for a model.
    pub(super) fn refuse_all(
        &mut self,
        name: &ModelName,
        refusal: &Refusal,
        out: &mut Vec<Effect>,
    ) {
        let model = self
            .models
            .get_mut(name)
            .expect("a wanted model is configured");
        model.wanted = false;
        for waiter in model.queue.drain(..) {
            out.push(Effect::Reject {
                ticket: waiter.ticket,
                refusal: refusal.clone(),
            });
        }
    }
}

/// Answers one waiter of a ready model.
fn grant(now: Timestamp, model: &mut ModelState, waiter: Waiter) -> Effect {
    if !waiter.wants_lease {
        return Effect::Done {
            ticket: waiter.ticket,
        };
    }
    model.activity.inside = model.activity.inside.saturating_add(1);
    model.activity.last_entered = now;
    model.asked_at = Some(now);
    Effect::Grant {
        ticket: waiter.ticket,
        worker: model.worker(),
    }
}
