//! Who waits, who is granted, who is turned away, and what is loaded next.
//!
//! Models that are wanted are looked at in the order of their oldest waiter.
//! A model for which victims were told to go keeps its claim on their bytes:
//! whoever comes later plans with what is left. A model that has to wait for
//! busy workers does not hold up those behind it.

use std::collections::BTreeMap;

use super::Policy;
use super::event::{Effect, Ticket};
use super::eviction::{self, Candidate};
use super::ledger::{self, Constraint, Need};
use super::lifecycle::{ModelState, Waiter};
use super::words::{EvictReason, Expected, ExpectedSource, Phase, Refusal};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, WorkerId};

/// The least room an unknown model is started in: a quarter of the limit, at
/// most this.
const UNKNOWN_ROOM: Bytes = Bytes::mib(512);

/// What admission says of one model.
enum Verdict {
    /// There is room: spawn with this promise.
    Spawn(Expected),
    /// Bytes are on their way back that will suffice.
    Wait(Need),
    /// End these, then wait.
    Evict(Vec<Candidate>, Need, (Bytes, Bytes)),
    /// Busy workers have to become idle first.
    Blocked,
    /// It cannot be, however long it waits.
    Refuse(Refusal),
}

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
        let Some(model) = self.models.get_mut(name) else {
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
            Phase::Ready => out.push(grant(model, waiter)),
            Phase::Backoff | Phase::Failed if !model.may_start(now) => {
                out.push(reject(model.backing_off(now)));
            }
            Phase::Stopped
            | Phase::Starting
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
        model.history.last_load = Some(now.since(model.since));
        model.history.loads += 1;
        if std::mem::take(&mut model.history.evicted) {
            model.history.reloads += 1;
        }
        model.failures.last = None;
        model.activity.last_left = now;
        model.enter(Phase::Ready, now);
        while let Some(waiter) = model.queue.pop_front() {
            out.push(grant(model, waiter));
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
        let need = model.expected().bytes.get(&Domain::Host).copied();
        match (model.phase, need) {
            (Phase::Stopped, Some(need)) => {
                let room = least(&self.room_with_idle_gone());
                Refusal::NoRoom {
                    model: name.clone(),
                    domain: Domain::Host,
                    need,
                    room,
                }
            }
            _ => Refusal::QueueTimeout {
                model: name.clone(),
                waited: now.since(waiter.since),
            },
        }
    }

    fn room_with_idle_gone(&self) -> Need {
        let mut room = self.ledger.room(&self.models, Domain::Host);
        for model in self.models.values().filter(|m| m.is_candidate()) {
            ledger::add(&mut room, &self.ledger.gives(model));
        }
        room.retain(|(domain, _), _| *domain == Domain::Host);
        room
    }

    /// Looks at every wanted model and starts, waits, evicts or refuses.
    pub(super) fn plan(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let mut claims = Need::new();
        self.blocked = false;
        for name in self.wanted_in_order(now) {
            match self.admit(&name, &claims) {
                Verdict::Spawn(expected) => self.spawn(now, &name, expected, out),
                Verdict::Wait(need) => ledger::add(&mut claims, &need),
                Verdict::Evict(victims, need, (wanted, room)) => {
                    for victim in victims {
                        let reason = EvictReason::MakeRoom {
                            for_model: name.clone(),
                            need: wanted,
                            room,
                        };
                        self.evict(now, &victim.worker, reason, false, out);
                    }
                    ledger::add(&mut claims, &need);
                }
                Verdict::Blocked => self.blocked = true,
                Verdict::Refuse(refusal) => self.refuse_all(&name, &refusal, out),
            }
        }
    }

    /// Models that someone wants and that may start, oldest waiter first;
    /// those that only the configuration wants come last.
    fn wanted_in_order(&self, now: Timestamp) -> Vec<ModelName> {
        let mut wanted: Vec<_> = self
            .models
            .values()
            .filter(|m| (m.wanted || !m.queue.is_empty()) && m.may_start(now))
            .filter(|m| !self.ledger.is_held(&m.worker()))
            .map(|m| {
                (
                    m.queue.is_empty(),
                    m.queue.front().map(|w| (w.since, w.ticket)),
                    m.name().clone(),
                )
            })
            .collect();
        wanted.sort();
        wanted.into_iter().map(|(_, _, name)| name).collect()
    }

    fn admit(&self, name: &ModelName, claims: &Need) -> Verdict {
        let model = &self.models[name];
        let expected = model.expected();
        let unknown = expected.source == ExpectedSource::Unknown;
        // Who loads without a known need has all the room there is, and is
        // waited for: what it takes is only known when it is ready.
        let alone = |m: &ModelState| {
            m.phase == Phase::Starting && m.reservation.source == ExpectedSource::Unknown
        };
        let loading = |m: &ModelState| m.phase == Phase::Starting;
        if self.models.values().any(alone) || (unknown && self.models.values().any(loading)) {
            return Verdict::Wait(Need::new());
        }
        let bytes = if unknown {
            BTreeMap::from([(Domain::Host, self.unknown_floor(Domain::Host))])
        } else {
            expected.bytes.clone()
        };
        if let Some(refusal) = self.never(model, &bytes, unknown) {
            return Verdict::Refuse(refusal);
        }
        let need: Need = bytes
            .iter()
            .flat_map(|(domain, bytes)| {
                [Constraint::Limit, Constraint::Physics]
                    .map(|c| ((*domain, c), ledger::signed(*bytes)))
            })
            .collect();
        let mut now_there = Need::new();
        let mut later = Need::new();
        for domain in bytes.keys() {
            let room = self.ledger.room(&self.models, *domain);
            let incoming = self.ledger.incoming(&self.models, *domain);
            ledger::add(&mut now_there, &room);
            ledger::add(&mut later, &room);
            ledger::add(&mut later, &incoming);
        }
        for (key, bytes) in claims {
            if let Some(total) = later.get_mut(key) {
                *total -= bytes;
            }
        }
        let settling = bytes.keys().any(|domain| self.ledger.is_settling(*domain));
        if missing(&need, &later).is_empty() {
            if missing(&need, &now_there).is_empty() && !settling {
                return Verdict::Spawn(self.promise(expected, &now_there));
            }
            return Verdict::Wait(need);
        }
        if model.queue.is_empty() {
            // Only the configuration wants it: nobody is ended for that.
            return Verdict::Blocked;
        }
        let candidates = self
            .models
            .values()
            .filter(|m| m.is_candidate())
            .map(|m| Candidate {
                worker: m.worker(),
                idle_since: m.idle_since(),
                gives: self.ledger.gives(m),
            })
            .collect();
        match eviction::choose_victims(candidates, &missing(&need, &later)) {
            Some(victims) => {
                let wanted = bytes.values().copied().sum();
                Verdict::Evict(victims, need, (wanted, least(&now_there)))
            }
            None => Verdict::Blocked,
        }
    }

    /// Why the model can never be: larger than its budget, or than what is
    /// left when everything that is not pinned is gone.
    fn never(
        &self,
        model: &ModelState,
        bytes: &BTreeMap<Domain, Bytes>,
        unknown: bool,
    ) -> Option<Refusal> {
        for (domain, need) in bytes {
            let budget = self.ledger.domains.get(domain)?.budget();
            if !unknown && *need > budget {
                return Some(Refusal::TooLarge {
                    model: model.name().clone(),
                    domain: *domain,
                    need: *need,
                    budget,
                });
            }
            let room = least(&self.ledger.possible(&self.models, *domain));
            if *need > room {
                return Some(Refusal::NoRoom {
                    model: model.name().clone(),
                    domain: *domain,
                    need: *need,
                    room,
                });
            }
        }
        None
    }

    fn unknown_floor(&self, domain: Domain) -> Bytes {
        let budget = self
            .ledger
            .domains
            .get(&domain)
            .map_or(Bytes::ZERO, |b| b.budget());
        Bytes(budget.get() / 4).min(UNKNOWN_ROOM)
    }

    /// What is promised to a worker: its expected need; all the room there is
    /// when that is unknown.
    fn promise(&self, mut expected: Expected, room: &Need) -> Expected {
        if expected.source == ExpectedSource::Unknown {
            expected.bytes = BTreeMap::from([(Domain::Host, least(room))]);
        }
        expected
    }

    fn spawn(
        &mut self,
        now: Timestamp,
        name: &ModelName,
        expected: Expected,
        out: &mut Vec<Effect>,
    ) {
        let model = self
            .models
            .get_mut(name)
            .expect("a wanted model is configured");
        model.begin_life(expected.clone(), now);
        out.push(Effect::Spawn {
            worker: model.worker(),
            expected,
        });
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
fn grant(model: &mut ModelState, waiter: Waiter) -> Effect {
    if !waiter.wants_lease {
        return Effect::Done {
            ticket: waiter.ticket,
        };
    }
    model.activity.inside = model.activity.inside.saturating_add(1);
    Effect::Grant {
        ticket: waiter.ticket,
        worker: model.worker(),
    }
}

/// What is missing of `need` in `room`, where anything is.
fn missing(need: &Need, room: &Need) -> Need {
    need.iter()
        .map(|(key, bytes)| (*key, bytes - room.get(key).copied().unwrap_or(0)))
        .filter(|(_, short)| *short > 0)
        .collect()
}

/// The smallest room of all constraints, as bytes.
fn least(room: &Need) -> Bytes {
    ledger::unsigned(room.values().copied().min().unwrap_or(0))
}
