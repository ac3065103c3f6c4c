//! One model: its phases, failures and history.
//!
//! ```text
//! Stopped    spawn, or taken back from an earlier residentd → Starting
//! Starting   ready → Ready; exit → Backoff; never ready, or unload → Stopping
//! Ready      evict or idle (no leases) → Stopping; unload, or room for a patient
//!            waiter → Draining; unhealthy → Stopping; exit → Backoff; park (no
//!            leases) → Parking
//! Parking    bytes are back → Parked; failed, or freed too little, or unload →
//!            Stopping; gate did not close → Ready; exit → Backoff
//! Parked     unpark → Unparking; evict, unload or idle → Stopping; exit → Backoff
//! Unparking  ready again → Ready; failed, or unload → Stopping; exit → Backoff
//! Draining   last lease, deadline, or unhealthy → Stopping; exit → Stopped; not needed any more → Ready
//! Stopping   reaped → Stopped, or Backoff if it was unhealthy or never ready
//! Backoff    delay over → Stopped, and from there as any; too many → Failed; unload → Stopped
//! Failed     operator loads, or ten minutes over → Starting
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::sync::Arc;

use super::event::{Activity, Measure, Ticket};
use super::failures::Failures;
use super::footprint::{self, Known, Lesson};
use super::history::History;
use super::ledger::BACK_DEADLINE;
use super::parking::Parking;
use super::reason::EvictReason;
use super::reuse::Reuse;
use super::words::{Expected, Phase, Protection};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, Footprint, ModelName, ModelSpec, WorkerId};

/// Everything the policy knows of one model.
#[derive(Clone, Debug)]
pub struct ModelState {
    /// What the configuration says.
    pub spec: Arc<ModelSpec>,
    /// Size of its weight files.
    pub weights: Bytes,
    /// Never evicted to make room.
    pub pinned: bool,
    /// Which life this is.
    pub generation: u64,
    /// Where it is in that life.
    pub phase: Phase,
    /// Since when it is in this phase.
    pub since: Timestamp,
    /// Who waits for it, first come first.
    pub queue: VecDeque<Waiter>,
    /// To be loaded though nobody waits.
    pub wanted: bool,
    /// Why it is on its way out.
    pub leaving: Option<EvictReason>,
    /// Told to go without grace.
    pub killed: bool,
    /// When a drain is over, whoever is inside; one that makes room lasts as long
    /// as there is somebody to make it for.
    pub drain_until: Option<Timestamp>,
    /// Its files are to be read ahead.
    pub prefetches: bool,
    /// Its worker was started under a configuration that no longer holds.
    pub outdated: bool,
    /// No longer configured; known until its worker is gone.
    pub removed: bool,
    /// Bytes promised to the worker, from spawn to reap.
    pub reservation: Expected,
    /// Measured, while a worker lives.
    pub usage: BTreeMap<Domain, Measure>,
    /// A copy of its gate.
    pub activity: Activity,
    /// Operators who wait for it to be gone.
    pub unloading: Vec<Ticket>,
    /// What past lives used, by domain.
    pub footprint: BTreeMap<Domain, Footprint>,
    /// Peak use of this life, by domain.
    pub life: BTreeMap<Domain, Bytes>,
    /// This life was ready once.
    pub served: bool,
    /// It was measured since it was ready.
    pub weighed: bool,
    /// When it had taken its memory: was ready, or ready again.
    pub loaded_at: Timestamp,
    /// This life was spawned by an earlier residentd.
    pub adopted: bool,
    /// Failures and what they said.
    pub failures: Failures,
    /// What happened to it.
    pub history: History,
    /// When a request last came into one of its workers.
    pub asked_at: Option<Timestamp>,
    /// How soon it is asked for again, and how long a load takes.
    pub(super) reuse: Reuse,
    /// What is known of parking it.
    pub(super) parking: Parking,
}

/// Who waits for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Under which ticket.
    pub ticket: Ticket,
    /// Since when.
    pub since: Timestamp,
    /// Until when.
    pub deadline: Timestamp,
    /// For a lease, or only for the model to be ready.
    pub wants_lease: bool,
}

impl ModelState {
    /// Returns a stopped model with nothing learned but `peak`.
    #[must_use]
    pub fn new(
        spec: Arc<ModelSpec>,
        weights: Bytes,
        footprint: BTreeMap<Domain, Footprint>,
    ) -> Self {
        Self {
            pinned: spec.pinned,
            wanted: spec.preload,
            spec,
            weights,
            generation: 0,
            phase: Phase::Stopped,
            since: Timestamp::START,
            queue: VecDeque::new(),
            leaving: None,
            killed: false,
            drain_until: None,
            prefetches: false,
            outdated: false,
            removed: false,
            reservation: Expected::default(),
            usage: BTreeMap::new(),
            activity: Activity::default(),
            unloading: Vec::new(),
            footprint,
            life: BTreeMap::new(),
            served: false,
            weighed: false,
            loaded_at: Timestamp::START,
            adopted: false,
            failures: Failures::default(),
            history: History::default(),
            asked_at: None,
            reuse: Reuse::default(),
            parking: Parking::default(),
        }
    }

    /// Returns the model's name.
    #[must_use]
    pub fn name(&self) -> &ModelName {
        &self.spec.name
    }

    /// Returns the current life.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        WorkerId {
            model: self.spec.name.clone(),
            generation: self.generation,
        }
    }

    /// Returns whether a process of it may exist.
    #[must_use]
    pub fn is_live(&self) -> bool {
        match self.phase {
            Phase::Starting
            | Phase::Ready
            | Phase::Parking
            | Phase::Parked
            | Phase::Unparking
            | Phase::Draining
            | Phase::Stopping => true,
            Phase::Stopped | Phase::Backoff | Phase::Failed => false,
        }
    }

    /// Returns whether it loads, anew or out of its park.
    pub(super) fn is_loading(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Unparking)
    }

    /// Returns whether it would have to find memory before it could serve.
    #[must_use]
    pub fn is_without_memory(&self) -> bool {
        matches!(self.phase, Phase::Stopped | Phase::Parked)
    }

    /// Returns whether it is on its way out.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        matches!(self.phase, Phase::Draining | Phase::Stopping)
    }

    /// Returns why it may not be evicted to make room; `None` when it may. A
    /// model without a worker is no matter of protection.
    #[must_use]
    pub fn protection(&self) -> Option<Protection> {
        match self.phase {
            Phase::Starting | Phase::Unparking => Some(Protection::Loading),
            Phase::Parking => Some(Protection::Parking),
            Phase::Draining | Phase::Stopping => Some(Protection::Draining),
            Phase::Ready | Phase::Parked if self.pinned => Some(Protection::Pinned),
            Phase::Ready if self.activity.inside > 0 => Some(Protection::Busy),
            Phase::Ready | Phase::Parked | Phase::Stopped | Phase::Backoff | Phase::Failed => None,
        }
    }

    /// Returns whether no more requests fit into its worker.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let most = self.spec.concurrency.map(NonZeroU32::get);
        most.is_some_and(|most| self.activity.inside >= most)
    }

    /// Returns whether it may be ended to make room.
    #[must_use]
    pub fn is_candidate(&self) -> bool {
        matches!(self.phase, Phase::Ready | Phase::Parked) && self.protection().is_none()
    }

    /// Returns since when nobody used it: its last completion, or when it
    /// became ready.
    #[must_use]
    pub fn idle_since(&self) -> Timestamp {
        self.activity.last_left
    }

    /// Returns when it was last asked for, or became ready.
    #[must_use]
    pub fn asked_since(&self) -> Timestamp {
        self.activity.last_entered
    }

    /// Returns the most it used in each domain, this life included.
    #[must_use]
    pub fn peak(&self) -> BTreeMap<Domain, Bytes> {
        let mut peak = self.life.clone();
        for (domain, footprint) in &self.footprint {
            let entry = peak.entry(*domain).or_default();
            *entry = (*entry).max(footprint.peak);
        }
        peak
    }

    /// Returns what a load of it on these GPUs is expected to need.
    #[must_use]
    pub fn expected_on(&self, gpus: &[u32]) -> Expected {
        let peak = self.peak();
        self.known(&peak).expect(gpus)
    }

    /// Returns what is known of it, with the peak of all its lives.
    pub(super) fn known<'a>(&'a self, peak: &'a BTreeMap<Domain, Bytes>) -> Known<'a> {
        Known {
            spec: &self.spec,
            weights: self.weights,
            peak,
        }
    }

    /// Merges what this life taught into what is known, at its end. Domains in
    /// `out_of_memory` are those it died in for want of memory, with their
    /// budgets.
    pub(super) fn learn(&mut self, out_of_memory: &BTreeMap<Domain, Bytes>) {
        for (domain, peak) in std::mem::take(&mut self.life) {
            let lesson = Lesson {
                peak,
                last: self.settled(domain),
                served: self.served,
                out_of_memory: out_of_memory.get(&domain).copied(),
            };
            let known = self.footprint.entry(domain).or_default();
            *known = footprint::merge(*known, lesson);
        }
    }

    /// Returns the larger of reservation and usage.
    #[must_use]
    pub fn charge(&self, domain: Domain) -> Bytes {
        if self.is_live() {
            self.reserved(domain).max(self.used(domain))
        } else {
            Bytes::ZERO
        }
    }

    /// Returns bytes promised to it and not yet measured.
    #[must_use]
    pub fn outstanding(&self, domain: Domain) -> Bytes {
        self.charge(domain) - self.used(domain)
    }

    /// Returns the bytes measured in this domain.
    #[must_use]
    pub fn used(&self, domain: Domain) -> Bytes {
        self.usage.get(&domain).map_or(Bytes::ZERO, |m| m.usage)
    }

    /// Returns its use of host RAM and its own ceiling when it serves and is
    /// over that.
    #[must_use]
    pub fn over_ceiling(&self) -> Option<(Bytes, Bytes)> {
        let ceiling = self.spec.max_memory?;
        let usage = self.used(Domain::Host);
        (self.phase == Phase::Ready && usage > ceiling).then_some((usage, ceiling))
    }

    /// Returns the bytes measured on all GPUs together.
    #[must_use]
    pub fn vram(&self) -> Bytes {
        let gpus = self
            .usage
            .iter()
            .filter(|(domain, _)| **domain != Domain::Host);
        gpus.map(|(_, measure)| measure.usage).sum()
    }

    /// Returns the bytes that only come back when it ends.
    #[must_use]
    pub fn unreclaimable(&self, domain: Domain) -> Bytes {
        self.usage
            .get(&domain)
            .map_or(Bytes::ZERO, |m| m.unreclaimable)
    }

    /// Returns the domains it has bytes in.
    #[must_use]
    pub fn domains(&self) -> Vec<Domain> {
        let mut all: Vec<Domain> = self
            .usage
            .keys()
            .copied()
            .chain(self.reservation.domains())
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn reserved(&self, domain: Domain) -> Bytes {
        // What was promised to a model nobody knew ends when it is ready and
        // was measured since: from then on its measured bytes are the truth. One
        // that is told to go before may still take more.
        let promised = self.reservation.0.get(&domain);
        if self.reservation.is_unknown(domain) && self.weighed {
            return Bytes::ZERO;
        }
        promised.map_or(Bytes::ZERO, |promised| promised.bytes)
    }

    /// Returns whether it loads here, or had loaded after the newest measurement
    /// began. That may have seen its bytes missing of what is free and not known
    /// them as its own, or the other way round. A driver that hangs is not waited
    /// for: what was promised to the worker is taken then.
    #[must_use]
    pub(super) fn is_unmeasured(
        &self,
        domain: Domain,
        (measured_at, now): (Timestamp, Timestamp),
    ) -> bool {
        let serves = matches!(self.phase, Phase::Ready | Phase::Draining);
        let is_due = || now < self.loaded_at + BACK_DEADLINE;
        let unseen = self.is_loading() || serves && measured_at < self.loaded_at && is_due();
        unseen && self.domains().contains(&domain)
    }

    /// Returns whether it moves memory in this domain: loads, is dying, or on its
    /// way into its park or out of it.
    #[must_use]
    pub fn is_moving(&self, domain: Domain) -> bool {
        let moves = match self.phase {
            Phase::Starting | Phase::Stopping | Phase::Parking | Phase::Unparking => true,
            Phase::Stopped
            | Phase::Ready
            | Phase::Parked
            | Phase::Draining
            | Phase::Backoff
            | Phase::Failed => false,
        };
        moves && self.domains().contains(&domain)
    }

    /// Moves to `phase` at `now`.
    pub fn enter(&mut self, phase: Phase, now: Timestamp) {
        self.phase = phase;
        self.since = now;
    }

    /// Starts a new life with this promise.
    pub fn begin_life(&mut self, reservation: Expected, now: Timestamp) {
        self.generation += 1;
        self.reservation = reservation;
        self.usage.clear();
        self.life.clear();
        self.served = false;
        self.weighed = false;
        self.adopted = false;
        self.leaving = None;
        self.killed = false;
        self.outdated = false;
        self.wanted = false;
        self.parking.begin_life();
        self.activity = Activity::opened(now);
        self.enter(Phase::Starting, now);
    }

    /// Takes in a measurement of the current life, that began at `at`. Of a
    /// worker that is being ended the most counts: what a dying tree no longer
    /// shows is not back before the tree is reaped.
    pub fn measure(&mut self, usage: &BTreeMap<Domain, Measure>, at: Timestamp) {
        if self.phase == Phase::Stopping {
            for (domain, measure) in usage {
                let kept = self.usage.entry(*domain).or_default();
                kept.usage = kept.usage.max(measure.usage);
                kept.unreclaimable = kept.unreclaimable.max(measure.unreclaimable);
            }
            return;
        }
        self.weighed |= self.served && at >= self.since;
        let same = self.usage.keys().eq(usage.keys());
        if same {
            for (kept, measure) in self.usage.values_mut().zip(usage.values()) {
                *kept = *measure;
            }
        } else {
            self.usage.clone_from(usage);
        }
        if self.outdated || self.removed || self.is_at_rest() {
            // It says nothing of what the configuration names now, and what a
            // parked one holds, as weights in host RAM, is no load's need.
            return;
        }
        for (domain, measure) in usage {
            let peak = self.life.entry(*domain).or_default();
            *peak = (*peak).max(measure.usage);
        }
    }
}
