//! Bytes of ended workers: when they are back.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::lifecycle::ModelState;
use super::Ledger;
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, WorkerId};

/// Measured bytes have to be back to this many hundredths of what was
/// expected, as in Ollama's scheduler.
pub(in super::super) const BACK_PERCENT: u64 = 75;
/// How long a device's headroom is watched for bytes of a reaped worker:
/// drivers give VRAM back after the process is gone.
pub(in super::super) const BACK_DEADLINE: Duration = Duration::from_secs(5);
/// The same for host RAM, which the kernel gives back before a process can be
/// reaped: what is still missing was taken by a neighbour.
const HOST_BACK_DEADLINE: Duration = Duration::from_millis(500);
/// Headroom of a whole machine moves by itself; less than this is not missed.
const BACK_NOISE: Bytes = Bytes::mib(64);

/// Bytes of a reaped worker that are not measured back yet.
///
/// They are *held*, that is they count against the limit and no load starts
/// in the domain, until a measurement shows them gone. On a device that is its
/// headroom. In host RAM it is any measurement after the last process was
/// reaped: no process holds them, and whether the machine has enough headroom
/// for the next load is in the same measurement, whoever took some meanwhile.
#[derive(Clone, Debug)]
pub(in super::super) struct Reclaim {
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
    pub(in super::super) fn deadline(&self) -> Timestamp {
        match self.domain {
            Domain::Host => self.reaped_at + HOST_BACK_DEADLINE,
            Domain::Gpu(_) => self.reaped_at + BACK_DEADLINE,
        }
    }
}

/// What became of one worker's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Reclaimed {
    /// Whose they were.
    pub worker: WorkerId,
    /// Where.
    pub domain: Domain,
    /// Resident bytes that are gone, measured.
    pub freed: Bytes,
    /// What did not come back in time.
    pub missing: Bytes,
}

impl Ledger {
    /// Notes how things stand when a worker is told to end.
    pub(in super::super) fn begin_reclaim(
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
    /// after its load, a driver may not tell yet what it took.
    pub(in super::super) fn follow_reclaims(&mut self, models: &BTreeMap<ModelName, ModelState>) {
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
    pub(in super::super) fn cancel_reclaim(&mut self, worker: &WorkerId) {
        self.baselines.retain(|(of, _), _| of != worker);
    }

    /// Books a reaped worker's bytes as on their way back.
    pub(in super::super) fn reaped(
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
    pub(in super::super) fn settle(
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
    pub(in super::super) fn is_reclaiming(&self, worker: &WorkerId) -> bool {
        self.reclaims.iter().any(|r| r.worker == *worker)
    }

    /// Returns whether bytes of a reaped worker are held in this domain.
    #[must_use]
    pub(in super::super) fn is_settling(&self, domain: Domain) -> bool {
        self.reclaims.iter().any(|r| r.domain == domain && r.held)
    }

    /// Returns whether bytes of this worker are held anywhere.
    #[must_use]
    pub(in super::super) fn is_held(&self, worker: &WorkerId) -> bool {
        self.reclaims.iter().any(|r| r.worker == *worker && r.held)
    }

    /// Returns when the first outstanding reclaim is given up. Before anything
    /// was measured since the worker ended there is nothing to judge by, at
    /// whatever time: the next measurement does that.
    #[must_use]
    pub(in super::super) fn next_deadline(&self) -> Option<Timestamp> {
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
}
