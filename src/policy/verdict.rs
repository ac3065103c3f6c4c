//! What admission says of one model: start, wait, evict, or never.

use super::Policy;
use super::eviction::{self, Candidate};
use super::ledger::{self, Constraint, Need};
use super::lifecycle::ModelState;
use super::words::{Expected, ExpectedSource, Phase, Refusal, Shortage};
use crate::model::{Bytes, Domain, ModelName, WorkerId};

/// The least room an unknown model is started in: a quarter of the limit, at
/// most this.
const UNKNOWN_ROOM: Bytes = Bytes::mib(512);

/// What admission says of one model.
pub(super) enum Verdict {
    /// There is room: spawn with this promise, on these GPUs.
    Spawn(Expected, Vec<u32>),
    /// Bytes are on their way back that will suffice.
    Wait(Need),
    /// The same, when workers that drain to make room are done, if they are.
    WaitForDrains(Need),
    /// There is room for what a parked worker held: make it ready again with this
    /// promise.
    Unpark(Expected),
    /// Park or end these, then wait.
    Evict(Vec<Victim>, Need, Shortage),
    /// Busy workers have to become idle first, for this need; this is missing.
    Blocked(Need, Need),
    /// It cannot be, however long it waits.
    Refuse(Refusal),
}

/// A worker that makes room.
pub(super) struct Victim {
    pub(super) worker: WorkerId,
    /// It is parked, which is enough, and not ended.
    pub(super) parks: bool,
}

/// What is meant for models that were looked at before.
#[derive(Default)]
pub(super) struct Claims {
    /// All of it.
    pub(super) all: Need,
    /// What does not depend on workers that drain to make room.
    pub(super) sure: Need,
}

impl Claims {
    /// Means so much for a model that waits for what surely comes.
    pub(super) fn add(&mut self, need: &Need) {
        ledger::add(&mut self.all, need);
        ledger::add(&mut self.sure, need);
    }
}

/// What it takes to have a model ready.
pub(super) struct Plan {
    /// What its worker is expected to hold.
    pub(super) expected: Expected,
    /// What must be found for that: of a parked worker, what it does not hold yet.
    pub(super) need: Need,
    gpus: Vec<u32>,
}

impl Policy {
    pub(super) fn admit(&self, name: &ModelName, claims: &Claims) -> Verdict {
        let model = &self.models[name];
        let Plan {
            expected,
            need,
            gpus,
        } = match self.plan_of(model, &claims.all) {
            Ok(plan) => plan,
            Err(refusal) => return Verdict::Refuse(refusal),
        };
        if expected
            .domains()
            .any(|domain| self.must_load_alone(&expected, domain))
        {
            return Verdict::Wait(Need::new());
        }
        if let Some(refusal) = self.never(model, &expected) {
            return Verdict::Refuse(refusal);
        }
        let (now_there, unclaimed) = self.rooms(expected.domains());
        let later = less(&unclaimed, &claims.all);
        let still = expected.domains().all(|domain| self.is_still(domain));
        let fits = missing(&need, &now_there).is_empty();
        let drains = self.draining_for(|_| true);
        // Who surely gets room keeps it: nobody starts in it because others
        // drain, whenever they are done.
        let without = less(&less(&unclaimed, &claims.sure), &drains);
        let others_keep = missing(&need, &without).is_empty();
        // What drains for this model stays when it starts, and was no help to them.
        let own = self.draining_for(|whom| whom == name);
        let without = less(&later, &own);
        if fits && still && others_keep && missing(&need, &without).is_empty() {
            if model.phase == Phase::Parked {
                return Verdict::Unpark(expected);
            }
            return Verdict::Spawn(promise(expected, &now_there), gpus);
        }
        // Whoever drains may take long, and stays when it is not needed: idle
        // workers are the better victims as soon as there are enough of them.
        let sure = less(&later, &drains);
        let short = missing(&need, &sure);
        if short.is_empty() {
            return Verdict::Wait(need);
        }
        if model.queue.is_empty() {
            // Only the configuration wants it: nobody is ended for that.
            return Verdict::Blocked(need, short);
        }
        if gpus
            .iter()
            .any(|index| self.is_unmeasured(Domain::Gpu(*index)))
        {
            // One transition at a time; what loads there may be idle then, and what it
            // takes is known when it is measured.
            return Verdict::Wait(need);
        }
        let policy = self.settings.eviction;
        match eviction::choose_victims(policy, self.candidates(name), &short) {
            Some(victims) => {
                if victims
                    .iter()
                    .any(|victim| self.awaits_measure(&victim.worker))
                {
                    return Verdict::Wait(need);
                }
                let shortage = self.shortage(&expected, &short);
                let parked = self.choose_parked(&victims, &need, (&now_there, &sure));
                let victims = victims.into_iter().map(|victim| Victim {
                    parks: parked.contains(&victim.worker),
                    worker: victim.worker,
                });
                Verdict::Evict(victims.collect(), need, shortage)
            }
            None if missing(&need, &later).is_empty() => Verdict::WaitForDrains(need),
            // Whom to drain is decided when the memory of this GPU is known again.
            None if gpus.iter().any(|index| !self.is_still(Domain::Gpu(*index))) => {
                Verdict::Wait(Need::new())
            }
            None => Verdict::Blocked(need, short),
        }
    }

    /// Returns what it takes to have the model ready: a load, or the unpark of
    /// its parked worker.
    pub(super) fn plan_of(&self, model: &ModelState, claims: &Need) -> Result<Plan, Refusal> {
        if model.phase == Phase::Parked {
            let expected = model.when_unparked();
            let mut need = self.need(&expected);
            for ((domain, _), bytes) in &mut need {
                *bytes -= ledger::signed(model.charge(*domain));
            }
            // Where it gives back there is nothing to be found.
            need.retain(|_, bytes| *bytes > 0);
            let gpus = expected.gpus();
            return Ok(Plan {
                expected,
                need,
                gpus,
            });
        }
        let gpus = self.place(model, claims)?;
        let expected = self.expected_on(model, &gpus);
        Ok(Plan {
            need: self.need(&expected),
            expected,
            gpus,
        })
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

    /// Returns idle unpinned workers that may go for a model, with what their end
    /// would give back.
    pub(super) fn candidates(&self, name: &ModelName) -> Vec<Candidate> {
        let models = self.models.values();
        let idle = models.filter(|m| self.is_candidate_for(m, name));
        idle.map(|m| self.candidate(m)).collect()
    }

    /// Returns whether an idle worker may go for a model: a parked one that is
    /// waited for only for whoever has waited longer.
    pub(super) fn is_candidate_for(&self, model: &ModelState, name: &ModelName) -> bool {
        let since = |m: &ModelState| m.queue.front().map(|w| (w.since, w.ticket));
        let yields = || match (since(model), since(&self.models[name])) {
            (Some(own), Some(theirs)) => theirs < own,
            (own, _) => own.is_none(),
        };
        model.is_candidate() && model.name() != name && (model.phase != Phase::Parked || yields())
    }

    pub(super) fn candidate(&self, model: &ModelState) -> Candidate {
        let parked = model.phase == Phase::Parked;
        let busy = model.activity.inside > 0;
        Candidate {
            worker: model.worker(),
            busy,
            parked,
            idle_since: if busy {
                model.asked_since()
            } else {
                model.idle_since()
            },
            // Who serves nobody goes before all who do.
            worth: if parked { 0 } else { self.worth(model) },
            gives: self.ledger.gives(model),
        }
    }

    /// Returns the room in these domains now, and the room when everything on
    /// its way back is there.
    pub(super) fn rooms(&self, domains: impl Iterator<Item = Domain>) -> (Need, Need) {
        let mut now_there = Need::new();
        let mut later = Need::new();
        for domain in domains {
            let room = self.ledger.room(&self.models, domain);
            let incoming = self.ledger.incoming(&self.models, domain);
            ledger::add(&mut now_there, &room);
            ledger::add(&mut later, &room);
            ledger::add(&mut later, &incoming);
        }
        (now_there, later)
    }

    /// Who loads without a known need has all the room of the domain, and is
    /// waited for: what it takes is only known when it is ready.
    fn must_load_alone(&self, expected: &Expected, domain: Domain) -> bool {
        let alone = |m: &ModelState| m.reservation.is_unknown(domain);
        let loads = |m: &ModelState| m.is_loading() && m.domains().contains(&domain);
        let mut loading = self.models.values().filter(|m| loads(m));
        loading.any(|m| expected.is_unknown(domain) || alone(m))
    }

    /// Returns whether a worker loads here, or leaves its park, or was not measured
    /// since: nobody knows yet what it holds.
    fn is_unmeasured(&self, domain: Domain) -> bool {
        let times = (self.ledger.domain_measured_at(domain), self.now);
        let mut models = self.models.values();
        models.any(|m| m.is_unmeasured(domain, times))
    }

    /// Returns whether a load may start in this domain: bytes of reaped workers
    /// are back, and on a GPU nothing else loads or dies, and was measured since
    /// the last load: its memory is only known between such transitions.
    pub(super) fn is_still(&self, domain: Domain) -> bool {
        let moving = || self.models.values().any(|m| m.is_moving(domain));
        let is_known = || !moving() && !self.is_unmeasured(domain);
        !self.ledger.is_settling(domain) && (domain == Domain::Host || is_known())
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
            let mut possible = self.ledger.possible(&self.models, domain);
            if self.is_unmeasured(domain) {
                possible.retain(|(_, constraint), _| *constraint == Constraint::Limit);
            }
            let mut room = least(&possible);
            if model.pinned {
                // A parked one holds some of it already, and keeps it.
                room += model.charge(domain);
            }
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

/// Room without a part of it.
pub(super) fn less(room: &Need, part: &Need) -> Need {
    let part = |key| part.get(key).copied().unwrap_or(0);
    room.iter()
        .map(|(key, bytes)| (*key, bytes - part(key)))
        .collect()
}

/// The smallest room of all constraints, as bytes.
pub(super) fn least(room: &Need) -> Bytes {
    ledger::unsigned(room.values().copied().min().unwrap_or(0))
}
