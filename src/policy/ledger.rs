//! Reserved and measured bytes in every domain: is there room, and what comes
//! back when.
//!
//! Two constraints hold in each domain. The **limit** is the user's: charges
//! of all workers, pages mapped by several counted once, stay under it.
//! **Physics** is what the machine still gives: its measured headroom, less a
//! reserve, less what was promised to workers and is not measured yet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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

/// Measured bytes have to be back to this many hundredths of what was
/// expected, as in Ollama's scheduler.
pub(super) const BACK_PERCENT: u64 = 75;
/// How long a device's headroom is watched for bytes of a reaped worker:
/// drivers give VRAM back after the process is gone.
pub(super) const BACK_DEADLINE: Duration = Duration::from_secs(5);
/// The same for host RAM, which the kernel gives back before a process can be
/// reaped: what is still missing was taken by a neighbour.
const HOST_BACK_DEADLINE: Duration = Duration::from_millis(500);
/// Headroom of a whole machine moves by itself; less than this is not missed.
const BACK_NOISE: Bytes = Bytes::mib(64);

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

/// Bytes of a reaped worker that are not measured back yet.
///
/// They are *held*, that is they count against the limit and no load starts
/// in the domain, until a measurement shows them gone. On a device that is its
/// headroom. In host RAM it is any measurement after the last process was
/// reaped: no process holds them, and whether the machine has enough headroom
/// for the next load is in the same measurement, whoever took some meanwhile.
#[derive(Clone, Debug)]
pub(super) struct Reclaim {
    pub worker: WorkerId,
    pub domain: Domain,
    pub held: bool,
    /// What counts against the limit while it is held.
    pub charge: Bytes,
    /// What physics should get back.
    pub expected: Bytes,
    /// Headroom and the other workers' unreclaimable bytes before the end.
    pub before: (Bytes, Bytes),
    pub reaped_at: Timestamp,
}

impl Reclaim {
    /// When its bytes are no longer watched for.
    pub(super) fn deadline(&self) -> Timestamp {
        match self.domain {
            Domain::Host => self.reaped_at + HOST_BACK_DEADLINE,
            Domain::Gpu(_) => self.reaped_at + BACK_DEADLINE,
        }
    }
}

/// What became of one worker's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reclaimed {
    /// Whose they were.
    pub worker: WorkerId,
    /// Where.
    pub domain: Domain,
    /// Resident bytes that are gone, measured.
    pub freed: Bytes,
    /// What did not come back in time.
    pub missing: Bytes,
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
    /// When the newest measurement began.
    pub measured_at: Timestamp,
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

    /// Notes how things stand when a worker is told to end.
    pub(super) fn begin_reclaim(
        &mut self,
        models: &BTreeMap<ModelName, ModelState>,
        model: &ModelState,
    ) {
        let worker = model.worker();
        for domain in model.domains() {
            let before = self.stand(models, domain, &worker);
            self.baselines.insert((worker.clone(), domain), before);
        }
    }

    /// Looks again at how things stand before workers that are told to go are
    /// gone. What counts is the least there was: when one was told to go right
    /// after its load, the measurement of that moment may be older than what it
    /// took.
    pub(super) fn follow_reclaims(&mut self, models: &BTreeMap<ModelName, ModelState>) {
        let workers: Vec<_> = self.baselines.keys().cloned().collect();
        for (worker, domain) in workers {
            let now = self.stand(models, domain, &worker);
            let before = self.baselines.entry((worker, domain)).or_insert(now);
            if now.0 + now.1 < before.0 + before.1 {
                *before = now;
            }
        }
    }

    /// Forgets how things stood: the worker stays after all.
    pub(super) fn cancel_reclaim(&mut self, worker: &WorkerId) {
        self.baselines.retain(|(of, _), _| of != worker);
    }

    /// Books a reaped worker's bytes as on their way back.
    pub(super) fn reaped(
        &mut self,
        models: &BTreeMap<ModelName, ModelState>,
        model: &ModelState,
        now: Timestamp,
    ) {
        let worker = model.worker();
        for domain in model.domains() {
            let before = self
                .baselines
                .remove(&(worker.clone(), domain))
                .unwrap_or_else(|| self.stand(models, domain, &worker));
            self.reclaims.push(Reclaim {
                worker: worker.clone(),
                domain,
                held: true,
                charge: model.used(domain),
                expected: model.unreclaimable(domain),
                before,
                reaped_at: now,
            });
        }
    }

    /// Returns the reclaims that the newest measurement settles: bytes back,
    /// or the deadline passed.
    pub(super) fn settle(
        &mut self,
        models: &BTreeMap<ModelName, ModelState>,
        now: Timestamp,
    ) -> Vec<Reclaimed> {
        let mut settled = Vec::new();
        let pending = std::mem::take(&mut self.reclaims);
        for mut reclaim in pending {
            if self.measured_at < reclaim.reaped_at {
                self.reclaims.push(reclaim);
                continue;
            }
            let (headroom, others) = self.stand(models, reclaim.domain, &reclaim.worker);
            // Others' growth took headroom that did come back.
            let back = (headroom + others) - (reclaim.before.0 + reclaim.before.1);
            let enough = back + BACK_NOISE >= reclaim.expected.percent(BACK_PERCENT);
            let late = now >= reclaim.deadline();
            if enough || late {
                let missing = if enough {
                    Bytes::ZERO
                } else {
                    reclaim.expected - back
                };
                settled.push(Reclaimed {
                    worker: reclaim.worker,
                    domain: reclaim.domain,
                    freed: reclaim.charge - missing,
                    missing,
                });
            } else {
                reclaim.held &= reclaim.domain != Domain::Host;
                self.reclaims.push(reclaim);
            }
        }
        settled
    }

    /// Returns whether bytes of this worker are still watched for.
    #[must_use]
    pub(super) fn is_reclaiming(&self, worker: &WorkerId) -> bool {
        self.reclaims.iter().any(|r| r.worker == *worker)
    }

    /// Returns whether bytes of a reaped worker are held in this domain.
    #[must_use]
    pub(super) fn is_settling(&self, domain: Domain) -> bool {
        self.reclaims.iter().any(|r| r.domain == domain && r.held)
    }

    /// Returns whether bytes of this worker are held anywhere.
    #[must_use]
    pub(super) fn is_held(&self, worker: &WorkerId) -> bool {
        self.reclaims.iter().any(|r| r.worker == *worker && r.held)
    }

    /// Returns when the first outstanding reclaim is given up. Before anything
    /// was measured since the worker ended there is nothing to judge by, at
    /// whatever time: the next measurement does that.
    #[must_use]
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        let is_measured = |r: &&Reclaim| self.measured_at >= r.reaped_at;
        let measured = self.reclaims.iter().filter(is_measured);
        measured.map(Reclaim::deadline).min()
    }

    /// Headroom, and what workers other than `except` hold and cannot give back:
    /// their growth takes headroom, their end gives some back.
    fn stand(
        &self,
        models: &BTreeMap<ModelName, ModelState>,
        domain: Domain,
        except: &WorkerId,
    ) -> (Bytes, Bytes) {
        let headroom = self
            .domains
            .get(&domain)
            .map_or(Bytes::ZERO, |b| b.measured.headroom);
        let others = models
            .values()
            .filter(|m| m.worker() != *except)
            .map(|m| m.unreclaimable(domain))
            .sum();
        (headroom, others)
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
