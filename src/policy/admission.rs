//! Who waits, who is granted, who is turned away, and what is loaded next.
//!
//! Models that are wanted are looked at in the order of their oldest waiter.
//! A model for which victims were told to go keeps its claim on their bytes:
//! whoever comes later plans with what is left. A model that has to wait for
//! busy workers does not hold up those behind it.

use super::Policy;
use super::event::{Effect, Ticket};
use super::eviction::{self, Candidate};
use super::explain::Shortage;
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
    /// There is room: spawn with this promise, on these GPUs.
    Spawn(Expected, Vec<u32>),
    /// Bytes are on their way back that will suffice.
    Wait(Need),
    /// End these, then wait.
    Evict(Vec<Candidate>, Need, Shortage),
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
        model.served = true;
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

    /// Looks at every wanted model and starts, waits, evicts or refuses.
    pub(super) fn plan(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let mut claims = Need::new();
        self.blocked = false;
        for name in self.wanted_in_order(now) {
            match self.admit(&name, &claims) {
                Verdict::Spawn(expected, gpus) => self.spawn(now, &name, expected, gpus, out),
                Verdict::Wait(need) => ledger::add(&mut claims, &need),
                Verdict::Evict(victims, need, short) => {
                    for victim in victims {
                        let reason = EvictReason::MakeRoom {
                            for_model: name.clone(),
                            domain: short.domain,
                            need: short.need,
                            room: short.room,
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
    pub(super) fn wanted_in_order(&self, now: Timestamp) -> Vec<ModelName> {
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
        let gpus = match self.place(model, claims) {
            Ok(gpus) => gpus,
            Err(refusal) => return Verdict::Refuse(refusal),
        };
        let expected = self.expected_on(model, &gpus);
        if expected
            .domains()
            .any(|domain| self.must_load_alone(&expected, domain))
        {
            return Verdict::Wait(Need::new());
        }
        if let Some(refusal) = self.never(model, &expected) {
            return Verdict::Refuse(refusal);
        }
        let need = self.need(&expected);
        let (now_there, later) = self.rooms(expected.domains(), claims);
        if missing(&need, &later).is_empty() {
            let still = expected.domains().all(|domain| self.is_still(domain));
            if missing(&need, &now_there).is_empty() && still {
                return Verdict::Spawn(promise(expected, &now_there), gpus);
            }
            return Verdict::Wait(need);
        }
        if model.queue.is_empty() {
            // Only the configuration wants it: nobody is ended for that.
            return Verdict::Blocked;
        }
        if gpus
            .iter()
            .any(|index| self.is_loading(Domain::Gpu(*index)))
        {
            // One transition at a time; what loads there may be idle then.
            return Verdict::Wait(need);
        }
        match eviction::choose_victims(self.candidates(), &missing(&need, &later)) {
            Some(victims) => {
                let shortage = self.shortage(&expected, &missing(&need, &later));
                Verdict::Evict(victims, need, shortage)
            }
            None => Verdict::Blocked,
        }
    }

    /// Returns where most is missing, what is needed and what is there.
    pub(super) fn shortage(&self, expected: &Expected, missing: &Need) -> Shortage {
        let tightest = missing.iter().max_by_key(|(_, bytes)| **bytes);
        let domain = tightest.map_or(Domain::Host, |((domain, _), _)| *domain);
        let mut floors = self.floors(expected);
        let need = floors.find(|(of, _)| *of == domain);
        Shortage {
            domain,
            need: need.map_or(Bytes::ZERO, |(_, bytes)| bytes),
            room: least(&self.ledger.room(&self.models, domain)),
        }
    }

    /// Returns idle unpinned workers with what their end would give back.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let idle = self.models.values().filter(|m| m.is_candidate());
        idle.map(|m| Candidate {
            worker: m.worker(),
            idle_since: m.idle_since(),
            gives: self.ledger.gives(m),
        })
        .collect()
    }

    /// Returns the room in these domains now, and the room when everything on
    /// its way back is there, less what others claim of that.
    pub(super) fn rooms(
        &self,
        domains: impl Iterator<Item = Domain>,
        claims: &Need,
    ) -> (Need, Need) {
        let mut now_there = Need::new();
        let mut later = Need::new();
        for domain in domains {
            let room = self.ledger.room(&self.models, domain);
            let incoming = self.ledger.incoming(&self.models, domain);
            ledger::add(&mut now_there, &room);
            ledger::add(&mut later, &room);
            ledger::add(&mut later, &incoming);
        }
        for (key, bytes) in claims {
            if let Some(total) = later.get_mut(key) {
                *total -= bytes;
            }
        }
        (now_there, later)
    }

    /// Who loads without a known need has all the room of the domain, and is
    /// waited for: what it takes is only known when it is ready.
    fn must_load_alone(&self, expected: &Expected, domain: Domain) -> bool {
        let alone = |m: &ModelState| m.reservation.is_unknown(domain);
        let loads = |m: &ModelState| m.phase == Phase::Starting && m.domains().contains(&domain);
        let mut loading = self.models.values().filter(|m| loads(m));
        loading.any(|m| expected.is_unknown(domain) || alone(m))
    }

    /// Returns whether a worker loads in this domain.
    pub(super) fn is_loading(&self, domain: Domain) -> bool {
        let loads = |m: &ModelState| m.phase == Phase::Starting && m.is_moving(domain);
        self.models.values().any(loads)
    }

    /// Returns whether a load may start in this domain: bytes of reaped workers
    /// are back, and on a GPU nothing else loads or dies, since its memory is
    /// only known between such transitions.
    pub(super) fn is_still(&self, domain: Domain) -> bool {
        let moving = || self.models.values().any(|m| m.is_moving(domain));
        !self.ledger.is_settling(domain) && (domain == Domain::Host || !moving())
    }

    /// Returns the bytes a load must find in each domain: what it is expected
    /// to need, or the least an unknown one is started in.
    pub(super) fn floors<'a>(
        &'a self,
        expected: &'a Expected,
    ) -> impl Iterator<Item = (Domain, Bytes)> + 'a {
        expected.domains().map(|domain| {
            let known = expected.known(domain);
            (domain, known.unwrap_or_else(|| self.unknown_floor(domain)))
        })
    }

    /// The same, for every constraint.
    pub(super) fn need(&self, expected: &Expected) -> Need {
        self.floors(expected)
            .flat_map(|(domain, bytes)| {
                [Constraint::Limit, Constraint::Physics]
                    .map(|constraint| ((domain, constraint), ledger::signed(bytes)))
            })
            .collect()
    }

    /// Why the model can never be: larger than its budget, or than what is
    /// left when everything that is not pinned is gone.
    fn never(&self, model: &ModelState, expected: &Expected) -> Option<Refusal> {
        for (domain, need) in self.floors(expected) {
            let budget = self.ledger.domains.get(&domain)?.budget();
            if !expected.is_unknown(domain) && need > budget {
                return Some(Refusal::TooLarge {
                    model: model.name().clone(),
                    domain,
                    need,
                    budget,
                });
            }
            let room = least(&self.ledger.possible(&self.models, domain));
            if need > room {
                return Some(Refusal::NoRoom {
                    model: model.name().clone(),
                    domain,
                    need,
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
        model.begin_life(expected.clone(), now);
        out.push(Effect::Spawn {
            worker: model.worker(),
            expected,
            gpus,
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

/// What is promised to a worker: its expected need; all the room there is in a
/// domain where that is unknown.
fn promise(mut expected: Expected, room: &Need) -> Expected {
    for (domain, need) in &mut expected.0 {
        if need.source == ExpectedSource::Unknown {
            let here = room.iter().filter(|((of, _), _)| of == domain);
            let least = here.map(|(_, bytes)| *bytes).min();
            need.bytes = ledger::unsigned(least.unwrap_or(0));
        }
    }
    expected
}

/// What is missing of `need` in `room`, where anything is.
pub(super) fn missing(need: &Need, room: &Need) -> Need {
    need.iter()
        .map(|(key, bytes)| (*key, bytes - room.get(key).copied().unwrap_or(0)))
        .filter(|(_, short)| *short > 0)
        .collect()
}

/// The smallest room of all constraints, as bytes.
fn least(room: &Need) -> Bytes {
    ledger::unsigned(room.values().copied().min().unwrap_or(0))
}
