//! Reserved and measured bytes in every domain: is there room, and what comes
//! back when.
//!
//! Two constraints hold in each domain. The **limit** is the user's: charges
//! of all workers, pages mapped by several counted once, stay under it.
//! **Physics** is what the machine still gives: its measured headroom, less a
//! reserve, less what was promised to workers and is not measured yet.

mod reclaim;

use std::collections::{BTreeMap, BTreeSet};

pub(super) use reclaim::{BACK_DEADLINE, BACK_PERCENT, Reclaim, Reclaimed};

use super::event::{DomainMeasure, GpuFacts, Measured};
use super::lifecycle::ModelState;
use crate::clock::Timestamp;
use crate::model::{Bytes, DeviceRef, Domain, ModelName, WorkerId};

/// What bounds a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Constraint {
    /// The number a user set.
    Limit,
    /// What the machine has.
    Physics,
}

/// Bytes by constraint; signed, since room can be negative.
pub(super) type Need = BTreeMap<(Domain, Constraint), i128>;

/// One domain's books.
#[derive(Clone, Copy, Debug, Default)]
pub struct DomainBooks {
    /// The user's limit.
    pub limit: Bytes,
    /// Physical headroom never given to workers.
    pub reserve: Bytes,
    /// The newest measurement.
    pub measured: DomainMeasure,
}

impl DomainBooks {
    /// Returns the limit that counts: what a user allows, and no more than there
    /// is of a GPU on which nobody set any.
    #[must_use]
    pub fn shown_limit(&self, domain: Domain) -> Bytes {
        match domain {
            Domain::Host => self.limit,
            Domain::Gpu(_) => self.limit.min(self.measured.total),
        }
    }

    /// Returns the most that workers can have here at all.
    #[must_use]
    pub fn budget(&self) -> Bytes {
        self.limit.min(self.measured.total - self.reserve)
    }
}

/// The books of every domain.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    /// By domain.
    pub domains: BTreeMap<Domain, DomainBooks>,
    /// The GPUs there are, by index.
    pub gpus: BTreeMap<u32, GpuFacts>,
    /// Limits that the configuration sets on GPUs, by name.
    pub gpu_limits: BTreeMap<DeviceRef, Bytes>,
    /// Domains whose limit an operator set, which beats the configuration.
    pub set_by_operator: BTreeSet<Domain>,
    /// Bytes of host RAM that the sum of all workers counts more than once.
    pub counted_twice: Bytes,
    /// When the newest measurement of workers began.
    pub measured_at: Timestamp,
    /// When the GPUs' driver was asked for the newest.
    pub gpus_at: Timestamp,
    /// How things stood when a worker was told to end.
    pub baselines: BTreeMap<(WorkerId, Domain), (Bytes, Bytes)>,
    /// Bytes on their way back.
    pub reclaims: Vec<Reclaim>,
}

impl Ledger {
    /// Returns the books of a machine with host RAM only, and limits for GPUs
    /// that may be found.
    pub(super) fn new(host: DomainBooks, gpu_limits: BTreeMap<DeviceRef, Bytes>) -> Self {
        Self {
            domains: BTreeMap::from([(Domain::Host, host)]),
            gpu_limits,
            ..Self::default()
        }
    }

    /// Sets a limit as an operator wishes. Returns whether there is the domain.
    pub(super) fn set_limit(&mut self, domain: Domain, limit: Bytes) -> bool {
        let Some(books) = self.domains.get_mut(&domain) else {
            return false;
        };
        books.limit = limit;
        self.set_by_operator.insert(domain);
        true
    }

    /// Takes in what the configuration says now: the limit on host RAM, those
    /// on GPUs, and the reserve of host RAM.
    pub(super) fn configure(
        &mut self,
        (host, gpus): (Bytes, BTreeMap<DeviceRef, Bytes>),
        reserve: Bytes,
    ) {
        self.gpu_limits = gpus;
        let domains: Vec<_> = self.domains.keys().copied().collect();
        for domain in domains {
            let limit = match domain {
                Domain::Host => host,
                Domain::Gpu(_) => self.limit_of(domain),
            };
            let stays = self.set_by_operator.contains(&domain);
            let books = self.domains.entry(domain).or_default();
            if !stays {
                books.limit = limit;
            }
            if domain == Domain::Host {
                books.reserve = reserve;
            }
        }
    }

    /// Takes in a measurement of the domains.
    pub(super) fn measure(&mut self, measured: &Measured) {
        self.measured_at = measured.at;
        self.gpus_at = measured.gpus_at;
        self.counted_twice = measured.counted_twice;
        self.gpus.clone_from(&measured.gpus);
        for (domain, books) in &mut self.domains {
            if !measured.domains.contains_key(domain) {
                // A device that no longer tells has nothing to give.
                books.measured.headroom = Bytes::ZERO;
            }
        }
        for (domain, measure) in &measured.domains {
            let limit = self.limit_of(*domain);
            let new = || DomainBooks {
                limit,
                ..DomainBooks::default()
            };
            self.domains.entry(*domain).or_insert_with(new).measured = *measure;
        }
    }

    /// Returns the limit that a user set on a GPU by its name.
    fn limit_of(&self, domain: Domain) -> Bytes {
        let Domain::Gpu(index) = domain else {
            return Bytes::MAX;
        };
        let uuid = self.gpus.get(&index).map_or("", |gpu| gpu.uuid.as_str());
        let limits = self.gpu_limits.iter();
        let mut of_this = limits.filter(|(name, _)| name.is(index, uuid));
        of_this.next().map_or(Bytes::MAX, |(_, limit)| *limit)
    }

    /// Returns measured use by all workers, shared pages once.
    #[must_use]
    pub(super) fn usage(&self, models: &BTreeMap<ModelName, ModelState>, domain: Domain) -> Bytes {
        models.values().map(|m| m.used(domain)).sum::<Bytes>() - self.shared(domain)
    }

    /// Returns what counts against the limit: charges of all live workers,
    /// and of reaped ones while their bytes are held.
    #[must_use]
    pub(super) fn charged(
        &self,
        models: &BTreeMap<ModelName, ModelState>,
        domain: Domain,
    ) -> Bytes {
        let live: Bytes = models.values().map(|m| m.charge(domain)).sum();
        let gone: Bytes = self
            .reclaims
            .iter()
            .filter(|r| r.domain == domain && r.held)
            .map(|r| r.charge)
            .sum();
        live + gone - self.shared(domain)
    }

    /// Returns the room there is now, by constraint.
    #[must_use]
    pub(super) fn room(&self, models: &BTreeMap<ModelName, ModelState>, domain: Domain) -> Need {
        let Some(books) = self.domains.get(&domain) else {
            return Need::new();
        };
        let outstanding: Bytes = models.values().map(|m| m.outstanding(domain)).sum();
        let limit = signed(books.shown_limit(domain)) - signed(self.charged(models, domain));
        let physics = signed(books.measured.headroom) - signed(books.reserve) - signed(outstanding);
        Need::from([
            ((domain, Constraint::Limit), limit),
            ((domain, Constraint::Physics), physics),
        ])
    }

    /// Returns what is on its way back: workers that are told to go, and
    /// reaped ones whose bytes are not measured back.
    #[must_use]
    pub(super) fn incoming(
        &self,
        models: &BTreeMap<ModelName, ModelState>,
        domain: Domain,
    ) -> Need {
        let mut limit = Bytes::ZERO;
        let mut physics = Bytes::ZERO;
        for model in models.values().filter(|m| m.is_leaving()) {
            limit += model.charge(domain);
            physics += model.unreclaimable(domain) + model.outstanding(domain);
        }
        for reclaim in self.reclaims.iter().filter(|r| r.domain == domain) {
            if reclaim.held {
                limit += reclaim.charge;
            }
            physics += reclaim.expected;
        }
        let mut incoming = Need::from([
            ((domain, Constraint::Limit), signed(limit)),
            ((domain, Constraint::Physics), signed(physics)),
        ]);
        for model in models.values() {
            let mut gives = model.gives_by_park();
            gives.retain(|(of, _), _| *of == domain);
            add(&mut incoming, &gives);
        }
        incoming
    }

    /// Returns when the newest measurement began.
    #[must_use]
    pub(super) fn measured_at(&self) -> Timestamp {
        self.measured_at
    }

    /// Returns when what is known of a domain was measured. A GPU's driver may be
    /// slow to answer.
    #[must_use]
    pub(super) fn domain_measured_at(&self, domain: Domain) -> Timestamp {
        match domain {
            Domain::Host => self.measured_at,
            Domain::Gpu(_) => self.measured_at.min(self.gpus_at),
        }
    }

    /// Returns what a worker's end would give back.
    #[must_use]
    pub(super) fn gives(&self, model: &ModelState) -> Need {
        let mut gives = Need::new();
        for domain in model.domains() {
            gives.insert((domain, Constraint::Limit), signed(model.charge(domain)));
            let physics = model.unreclaimable(domain) + model.outstanding(domain);
            gives.insert((domain, Constraint::Physics), signed(physics));
        }
        gives
    }

    /// Returns the most room there can be once everything that may go is gone:
    /// pinned workers stay.
    #[must_use]
    pub(super) fn possible(
        &self,
        models: &BTreeMap<ModelName, ModelState>,
        domain: Domain,
    ) -> Need {
        let mut possible = self.room(models, domain);
        add(&mut possible, &self.incoming(models, domain));
        for model in models
            .values()
            .filter(|m| m.is_live() && !m.is_leaving() && !m.pinned)
        {
            // What its park gives is on its way already.
            let parks = model.gives_by_park();
            for (key, bytes) in self.gives(model) {
                if let Some(total) = possible.get_mut(&key) {
                    *total += bytes - parks.get(&key).copied().unwrap_or(0);
                }
            }
        }
        possible
    }

    fn shared(&self, domain: Domain) -> Bytes {
        match domain {
            Domain::Host => self.counted_twice,
            Domain::Gpu(_) => Bytes::ZERO,
        }
    }
}

/// Adds `part` to `total`, key by key.
pub(super) fn add(total: &mut Need, part: &Need) {
    for (key, bytes) in part {
        *total.entry(*key).or_default() += bytes;
    }
}

/// Returns bytes as a signed number that never overflows here.
#[must_use]
pub(super) fn signed(bytes: Bytes) -> i128 {
    i128::from(bytes.get())
}

/// Returns the positive part of a signed number as bytes.
#[must_use]
pub(super) fn unsigned(number: i128) -> Bytes {
    Bytes(u64::try_from(number.max(0)).unwrap_or(u64::MAX))
}
