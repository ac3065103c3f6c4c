//! Parking: a worker that gives most of its memory back and lives on.
//!
//! Cheaper than an eviction for engines that can do it, since the process, its
//! context and its compiled kernels stay. Weights mostly move to host RAM, so a
//! park *takes* there, and needs room for that.
//!
//! ```text
//! Ready     chosen as a victim, and what parking gives back is enough → Parking
//! Parking   calls answered and bytes measured back → Parked; a call fails, or
//!           less than 75 % is back in time → Stopping
//! Parked    wanted, and there is room for what it held → Unparking
//! Unparking calls answered → Ready; a call fails → Stopping
//! ```
//!
//! What parked workers of a model hold is declared, else learned from its parks
//! since residentd started, else reckoned: nothing of a GPU, and in host RAM the
//! size of the weight files more than now, at most what the GPUs give back. A
//! model whose park or unpark failed once is not parked again.

mod fault;

use std::collections::{BTreeMap, BTreeSet};

pub use fault::ParkFault;

use super::event::Effect;
use super::eviction::Candidate;
use super::ledger::{self, BACK_DEADLINE, BACK_PERCENT, Constraint, Need};
use super::lifecycle::ModelState;
use super::reason::EvictReason;
use super::verdict::least;
use super::words::{Expectation, Expected, ExpectedSource, Phase, PressureLevel};
use super::{Policy, footprint};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, WorkerId};

/// What the policy knows of parking one model.
#[derive(Clone, Debug, Default)]
pub(super) struct Parking {
    /// What its last parked worker held, and how much more that was than before.
    learned: BTreeMap<Domain, (Bytes, Bytes)>,
    /// It failed once.
    failed: bool,
    /// The park that its worker is in or was in last.
    last: Option<Park>,
}

/// One park of one worker.
#[derive(Clone, Debug)]
struct Park {
    reason: EvictReason,
    /// What was promised to the worker before.
    promised: Expected,
    /// What it was measured to hold before.
    before: BTreeMap<Domain, Bytes>,
    /// What it is expected to hold when it is parked.
    holds: BTreeMap<Domain, Bytes>,
    /// Since when it was ready before.
    ready_since: Timestamp,
    /// When the worker had answered every call.
    answered_at: Option<Timestamp>,
}

impl Parking {
    /// A new worker knows nothing of the one before.
    pub(super) fn begin_life(&mut self) {
        self.last = None;
    }
}

impl ModelState {
    /// Returns what the worker is expected to hold when it is parked, in every
    /// domain in which it is measured; `None` when it is not to be parked.
    fn when_parked(&self) -> Option<BTreeMap<Domain, Bytes>> {
        let park = self.spec.park.as_ref().filter(|_| !self.parking.failed)?;
        let learned = |domain| self.parking.learned.get(&domain).copied();
        let mut holds = BTreeMap::new();
        let mut freed = Bytes::ZERO;
        for (domain, measure) in &self.usage {
            if *domain == Domain::Host {
                continue;
            }
            let kept = park.vram.or_else(|| learned(*domain).map(|(held, _)| held));
            let kept = kept.unwrap_or_default().min(measure.usage);
            freed += measure.usage - kept;
            holds.insert(*domain, kept);
        }
        let used = self.used(Domain::Host);
        let on_host = park.memory.or_else(|| match learned(Domain::Host)? {
            (held, Bytes::ZERO) => Some(held.min(used)),
            (_, more) => Some(used + more),
        });
        let reckoned = || match self.weights {
            Bytes::ZERO => used + freed,
            weights => used + footprint::from_weights(weights).min(freed),
        };
        holds.insert(Domain::Host, on_host.unwrap_or_else(reckoned));
        Some(holds)
    }

    /// Returns what parking is expected to give back, by constraint; less than
    /// nothing where it takes.
    fn gives_parked(&self, holds: &BTreeMap<Domain, Bytes>) -> Need {
        let mut gives = Need::new();
        for (domain, held) in holds {
            let (used, held) = (self.used(*domain), *held);
            let of_limit = ledger::signed(self.charge(*domain)) - ledger::signed(held);
            let outstanding = ledger::signed(self.outstanding(*domain));
            let moves = match held >= used {
                true => -ledger::signed(held - used),
                false => ledger::signed((used - held).min(self.unreclaimable(*domain))),
            };
            gives.insert((*domain, Constraint::Limit), of_limit);
            gives.insert((*domain, Constraint::Physics), outstanding + moves);
        }
        gives
    }

    /// Returns what the park that is going on will give back.
    pub(super) fn gives_by_park(&self) -> Need {
        match &self.parking.last {
            Some(park) if self.phase == Phase::Parking => self.gives_parked(&park.holds),
            Some(_) | None => Need::new(),
        }
    }

    /// Returns what a parked worker needs to be ready again: what it was promised
    /// or held before, whichever is more.
    pub(super) fn when_unparked(&self) -> Expected {
        let Some(park) = &self.parking.last else {
            return self.reservation.clone();
        };
        let domains = park.promised.domains().chain(park.before.keys().copied());
        let of = |domain: Domain| {
            let known = park.promised.known(domain).unwrap_or_default();
            let held = park.before.get(&domain).copied().unwrap_or_default();
            let promised = park.promised.0.get(&domain).filter(|_| known >= held);
            let source = promised.map_or(ExpectedSource::Learned, |promised| promised.source);
            let bytes = known.max(held);
            (domain, Expectation { bytes, source })
        };
        Expected(domains.map(of).collect())
    }

    /// Returns what the worker held last when it served: a parked one holds
    /// less.
    pub(super) fn settled(&self, domain: Domain) -> Bytes {
        let park = self.parking.last.as_ref();
        let before = park.and_then(|park| park.before.get(&domain).copied());
        before.unwrap_or_else(|| self.used(domain))
    }

    /// Returns whether its memory says nothing of a worker that serves, because
    /// it is parked or about to be or to be no more.
    pub(super) fn is_at_rest(&self) -> bool {
        match self.phase {
            Phase::Parking | Phase::Parked | Phase::Unparking => true,
            Phase::Stopped
            | Phase::Starting
            | Phase::Ready
            | Phase::Draining
            | Phase::Stopping
            | Phase::Backoff
            | Phase::Failed => false,
        }
    }

    /// Returns where a park gave back too little, how much it gave, and how much
    /// it should have; `None` when enough is back.
    fn too_little_back(&self, park: &Park) -> Option<(Domain, Bytes, Bytes)> {
        let of = |(domain, before): (&Domain, &Bytes)| {
            let expected = *before - park.holds.get(domain).copied().unwrap_or(*before);
            (*domain, *before - self.used(*domain), expected)
        };
        let mut all = park.before.iter().map(of);
        all.find(|(_, freed, expected)| *freed < expected.percent(BACK_PERCENT))
    }
}

impl Policy {
    /// Returns which of these victims are parked instead of ended: those that
    /// can be, as far as `need` is covered all the same and host RAM has room
    /// for what parks move there. `there` is the room now, `later` that with
    /// everything on its way back.
    pub(super) fn choose_parked(
        &self,
        victims: &[Candidate],
        need: &Need,
        (there, later): (&Need, &Need),
    ) -> BTreeSet<WorkerId> {
        let mut left = later.clone();
        for (key, bytes) in need {
            *left.entry(*key).or_default() -= bytes;
        }
        for victim in victims {
            ledger::add(&mut left, &victim.gives);
        }
        let mut host = there.clone();
        host.retain(|(domain, _), _| *domain == Domain::Host);
        let mut parked = BTreeSet::new();
        for victim in victims {
            let Some(gives) = self.parks(&self.models[&victim.worker.model]) else {
                continue;
            };
            let mut with = left.clone();
            for (key, bytes) in &victim.gives {
                *with.entry(*key).or_default() -= bytes;
            }
            ledger::add(&mut with, &gives);
            // What it takes it takes before anything is back.
            let mut host_with = host.clone();
            for (key, room) in &mut host_with {
                *room += gives.get(key).copied().unwrap_or(0).min(0);
            }
            let fits = |room: &Need| room.values().all(|bytes| *bytes >= 0);
            if fits(&with) && fits(&host_with) {
                (left, host) = (with, host_with);
                parked.insert(victim.worker.clone());
            }
        }
        parked
    }

    /// Returns whether a worker that could be parked was not measured since it
    /// became ready, so that nobody knows what its park would give back. The next
    /// measurement is worth waiting for.
    pub(super) fn awaits_measure(&self, worker: &WorkerId) -> bool {
        let model = &self.models[&worker.model];
        let can_park = model.spec.park.is_some() && !model.parking.failed;
        can_park && model.phase == Phase::Ready && self.ledger.measured_at() < model.loaded_at
    }

    /// Returns what parking this idle worker gives back, when that is possible
    /// and gives anything.
    fn parks(&self, model: &ModelState) -> Option<Need> {
        if model.phase != Phase::Ready || !model.is_candidate() {
            return None;
        }
        let holds = model.when_parked()?;
        let ceiling = model.spec.max_memory;
        if ceiling.is_some_and(|ceiling| holds[&Domain::Host] > ceiling) {
            return None;
        }
        let frees = |(domain, held): (&Domain, &Bytes)| *held < model.used(*domain);
        holds.iter().any(frees).then(|| model.gives_parked(&holds))
    }

    /// Returns whether parking this worker is enough to end the pressure in a
    /// domain where so much is missing, and brings none to host RAM.
    pub(super) fn parks_enough(&self, model: &ModelState, domain: Domain, missing: Bytes) -> bool {
        let Some(gives) = self.parks(model) else {
            return false;
        };
        let given = gives.iter().filter(|((of, _), _)| *of == domain);
        let is_enough = given.map(|(_, bytes)| *bytes).min() >= Some(ledger::signed(missing));
        let takes = gives.iter().filter(|((of, _), _)| *of == Domain::Host);
        let takes = takes.map(|(_, bytes)| -bytes).max().unwrap_or(0);
        let room = least(&self.ledger.room(&self.models, Domain::Host));
        let has_room = takes <= 0
            || (self.level(Domain::Host) == PressureLevel::None && takes <= ledger::signed(room));
        is_enough && has_room
    }

    /// Tells an idle worker to park. The gate has the last word, as with an
    /// eviction.
    pub(super) fn park(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        reason: EvictReason,
        out: &mut Vec<Effect>,
    ) {
        let Some(model) = self.current(worker) else {
            return;
        };
        let Some(holds) = model.when_parked() else {
            return;
        };
        let measured = model.usage.iter();
        model.parking.last = Some(Park {
            reason: reason.clone(),
            promised: model.reservation.clone(),
            before: measured.map(|(domain, m)| (*domain, m.usage)).collect(),
            holds: holds.clone(),
            ready_since: model.since,
            answered_at: None,
        });
        let on_host = learned(holds[&Domain::Host]);
        model.reservation.0.insert(Domain::Host, on_host);
        model.enter(Phase::Parking, now);
        out.push(Effect::Park {
            worker: worker.clone(),
            reason,
            holds,
        });
    }

    /// The gate of a worker that was to park did not close.
    pub(super) fn park_refused(&mut self, worker: &WorkerId, inside: u32) {
        let Some(model) = self.current(worker) else {
            return;
        };
        model.phase = Phase::Ready;
        model.activity.inside = inside;
        if let Some(park) = model.parking.last.take() {
            model.reservation = park.promised;
            model.since = park.ready_since;
        }
    }

    /// The worker has answered every call: from now on its bytes are looked for.
    pub(super) fn park_answered(&mut self, now: Timestamp, worker: &WorkerId) {
        let model = self.current(worker).filter(|m| m.phase == Phase::Parking);
        if let Some(park) = model.and_then(|m| m.parking.last.as_mut()) {
            park.answered_at = Some(now);
        }
    }

    /// Takes workers as parked whose bytes are measured back, and ends those
    /// whose bytes are not in time.
    pub(super) fn settle_parks(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let measured_at = self.ledger.measured_at();
        let answered = |m: &&ModelState| {
            let park = m.parking.last.as_ref()?;
            let at = park.answered_at.filter(|at| *at <= measured_at)?;
            Some((m.worker(), at, m.too_little_back(park)))
        };
        let parking = self.models.values().filter(|m| m.phase == Phase::Parking);
        let answered: Vec<_> = parking.filter_map(|m| answered(&m)).collect();
        for (worker, at, too_little) in answered {
            match too_little {
                None => self.parked(now, &worker, out),
                Some((domain, freed, expected)) if now >= at + BACK_DEADLINE => {
                    let fault = ParkFault::TooLittle {
                        domain,
                        freed,
                        expected,
                    };
                    self.give_up_parking(now, &worker, fault, out);
                }
                Some(_) => {}
            }
        }
    }

    /// Returns when the bytes of the next park are no longer waited for.
    pub(super) fn next_park_deadline(&self) -> Option<Timestamp> {
        let parking = self.models.values().filter(|m| m.phase == Phase::Parking);
        let answered = parking.filter_map(|m| m.parking.last.as_ref()?.answered_at);
        answered.min().map(|at| at + BACK_DEADLINE)
    }

    fn parked(&mut self, now: Timestamp, worker: &WorkerId, out: &mut Vec<Effect>) {
        let Some(model) = self.current(worker) else {
            return;
        };
        let Some(park) = &model.parking.last else {
            return;
        };
        let mut freed = BTreeMap::new();
        for (domain, before) in &park.before {
            let used = model.used(*domain);
            freed.insert(*domain, *before - used);
            let more = used - *before;
            model.parking.learned.insert(*domain, (used, more));
            // It is charged with what it is measured to hold.
            model.reservation.0.insert(*domain, learned(Bytes::ZERO));
        }
        let reason = park.reason.as_str();
        *model.history.parks.entry(reason).or_default() += 1;
        let took = now.since(model.since);
        model.enter(Phase::Parked, now);
        out.push(Effect::Parked {
            worker: worker.clone(),
            freed,
            took,
        });
    }

    /// Has a parked worker made ready again; there is room for it.
    pub(super) fn unpark(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        expected: Expected,
        out: &mut Vec<Effect>,
    ) {
        let Some(model) = self.current(worker) else {
            return;
        };
        model.wanted = false;
        model.reservation.clone_from(&expected);
        model.enter(Phase::Unparking, now);
        out.push(Effect::Unpark {
            worker: worker.clone(),
            expected,
        });
    }

    /// A worker is ready again.
    pub(super) fn unparked(&mut self, now: Timestamp, worker: &WorkerId, out: &mut Vec<Effect>) {
        let Some(model) = self.current(worker).filter(|m| m.phase == Phase::Unparking) else {
            return;
        };
        if let Some(park) = model.parking.last.take() {
            model.reservation = park.promised;
        }
        model.history.unparks += 1;
        model.history.last_unpark = Some(now.since(model.since));
        model.loaded_at = now;
        model.enter(Phase::Ready, now);
        self.grant_waiters(worker, out);
    }

    /// A call of a park or of an unpark failed: the worker is ended, which gives
    /// its bytes back, and whoever waits for it waits for the next life.
    pub(super) fn park_failed(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        said: String,
        out: &mut Vec<Effect>,
    ) {
        let fault = match self.current(worker).map(|m| m.phase) {
            Some(Phase::Parking) => ParkFault::Park(said),
            Some(Phase::Unparking) => ParkFault::Unpark(said),
            // It was told to end meanwhile.
            Some(
                Phase::Stopped
                | Phase::Starting
                | Phase::Ready
                | Phase::Draining
                | Phase::Parked
                | Phase::Stopping
                | Phase::Backoff
                | Phase::Failed,
            )
            | None => return,
        };
        self.give_up_parking(now, worker, fault, out);
    }

    fn give_up_parking(
        &mut self,
        now: Timestamp,
        worker: &WorkerId,
        fault: ParkFault,
        out: &mut Vec<Effect>,
    ) {
        if let Some(model) = self.current(worker) {
            model.parking.failed = true;
        }
        self.terminate(now, worker, EvictReason::ParkFailed(fault), false, out);
    }
}

fn learned(bytes: Bytes) -> Expectation {
    Expectation {
        bytes,
        source: ExpectedSource::Learned,
    }
}
