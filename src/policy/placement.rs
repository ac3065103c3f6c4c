//! Which GPUs a model goes to.
//!
//! A model that names its GPUs has no choice. One that wants a number of them
//! gets those that fit best: where its need fits without ending anybody, the
//! ones on which the least is left over; else those on which memory is on its
//! way back; else those on which room is made most cheaply. All of them are
//! needed at once: admission then looks at every domain together.

use super::event::GpuFacts;
use super::ledger::{Constraint, Need};
use super::lifecycle::ModelState;
use super::verdict::{less, missing};
use super::words::{Expected, ExpectedSource, Refusal};
use super::{Policy, eviction};
use crate::clock::Timestamp;
use crate::model::{DeviceRef, Domain, GpuRequest};

/// How well a GPU suits a load; the least suits best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// It fits now; what would be left over. Of an unknown need everything is
    /// used, so the most room counts: it is kept negative.
    Now(i128),
    /// It fits when what loads or dies there is done.
    Soon(i128),
    /// Idle workers have to go: how many, and when the most recently used of
    /// them was used.
    Evict(usize, Timestamp),
    /// Busy workers are in the way: room that is missing.
    Busy(i128),
}

impl Policy {
    /// Returns what the worker of a model has been promised, or what a load of
    /// it is expected to need. A model that may choose its GPUs is shown with
    /// the emptiest ones: where it really goes is planned when it is loaded.
    #[must_use]
    pub fn expected(&self, model: &ModelState) -> Expected {
        if model.is_live() {
            return model.reservation.clone();
        }
        let gpus = match &model.spec.gpus {
            GpuRequest::None => Vec::new(),
            GpuRequest::These(_) => self.place(model, &Need::new()).unwrap_or_default(),
            GpuRequest::Count(_) => {
                let mut emptiest: Vec<u32> = self.ledger.gpus.keys().copied().collect();
                let headroom = |index: &u32| {
                    let books = self.ledger.domains.get(&Domain::Gpu(*index));
                    books.map(|books| books.measured.headroom)
                };
                emptiest.sort_by_key(|index| std::cmp::Reverse(headroom(index)));
                emptiest.truncate(model.spec.gpus.count());
                emptiest
            }
        };
        self.expected_on(model, &gpus)
    }

    /// Returns what a load on these GPUs is expected to need of the domains
    /// that bound it.
    ///
    /// A GPU without memory of its own takes the host's: what is declared for
    /// it counts there. One that does not tell its memory bounds nothing.
    pub(super) fn expected_on(&self, model: &ModelState, gpus: &[u32]) -> Expected {
        let mut expected = model.expected_on(gpus);
        let is_bound = |domain: &Domain| self.ledger.domains.contains_key(domain);
        let unbound: Vec<_> = expected.domains().filter(|d| !is_bound(d)).collect();
        for domain in unbound {
            let need = expected.0.remove(&domain).unwrap_or_default();
            let host = expected.0.get_mut(&Domain::Host);
            let unified = self.gpu(domain).is_some_and(|gpu| gpu.unified);
            // A learned need of the host has this in it, and weights are there
            // once.
            if let Some(host) = host
                && unified
                && need.source == ExpectedSource::Declared
                && host.source != ExpectedSource::Learned
            {
                host.bytes += need.bytes;
            }
        }
        expected
    }

    fn gpu(&self, domain: Domain) -> Option<&GpuFacts> {
        match domain {
            Domain::Gpu(index) => self.ledger.gpus.get(&index),
            Domain::Host => None,
        }
    }

    /// Chooses the GPUs for a model, in the order of their indexes.
    pub(super) fn place(&self, model: &ModelState, claims: &Need) -> Result<Vec<u32>, Refusal> {
        let present = &self.ledger.gpus;
        let lacking = || Refusal::NoDevice {
            model: model.name().clone(),
            wanted: model.spec.gpus.clone(),
            present: present.len(),
        };
        let mut gpus = match &model.spec.gpus {
            GpuRequest::None => Vec::new(),
            GpuRequest::These(names) => {
                let find = |name: &DeviceRef| {
                    let mut all = present.iter();
                    all.find(|(index, gpu)| name.is(**index, &gpu.uuid))
                        .map(|(index, _)| *index)
                };
                let found: Option<Vec<u32>> = names.iter().map(find).collect();
                found.ok_or_else(lacking)?
            }
            GpuRequest::Count(_) => {
                let count = model.spec.gpus.count();
                self.best(model, count, claims).ok_or_else(lacking)?
            }
        };
        gpus.sort_unstable();
        gpus.dedup();
        Ok(gpus)
    }

    /// Chooses the GPUs that suit best, all of one vendor; `None` when there are
    /// not as many. Those that bound nothing, as an integrated one beside large
    /// ones, are taken only where there are no others.
    fn best(&self, model: &ModelState, count: usize, claims: &Need) -> Option<Vec<u32>> {
        let all = || self.ledger.gpus.iter();
        let is_bound = |index: &u32| self.ledger.domains.contains_key(&Domain::Gpu(*index));
        let any_bound = all().any(|(index, _)| is_bound(index));
        let eligible = all().filter(|(index, _)| is_bound(index) || !any_bound);
        let mut ranked: Vec<_> = eligible
            .map(|(index, gpu)| (self.fit(model, *index, claims), *index, gpu.vendor))
            .collect();
        ranked.sort_unstable_by_key(|(fit, index, _)| (*fit, *index));
        let of = |vendor| ranked.iter().filter(move |(_, _, v)| *v == vendor);
        let (_, _, vendor) = ranked.iter().find(|(_, _, v)| of(*v).count() >= count)?;
        Some(
            of(*vendor)
                .take(count)
                .map(|(_, index, _)| *index)
                .collect(),
        )
    }

    fn fit(&self, model: &ModelState, index: u32, claims: &Need) -> Fit {
        let domain = Domain::Gpu(index);
        if !self.ledger.domains.contains_key(&domain) {
            return Fit::Now(i128::MAX);
        }
        let peak = model.peak();
        let alone = model.known(&peak).on_gpu(index);
        let expected = Expected([(domain, alone)].into());
        let unknown = expected.is_unknown(domain);
        let need = self.need(&expected);
        let (now_there, later) = self.rooms([domain].into_iter());
        let later = less(&later, claims);
        let left = |room: &Need| {
            let least = [Constraint::Limit, Constraint::Physics]
                .iter()
                .filter_map(|constraint| {
                    let key = (domain, *constraint);
                    let needed = if unknown { 0 } else { *need.get(&key)? };
                    Some(room.get(&key)? - needed)
                })
                .min()
                .unwrap_or(0);
            if unknown { -least } else { least }
        };
        let short = missing(&need, &later);
        if short.is_empty() {
            let fits = missing(&need, &now_there).is_empty() && self.is_still(domain);
            return match fits {
                true => Fit::Now(left(&now_there)),
                false => Fit::Soon(left(&later)),
            };
        }
        match eviction::choose_victims(
            self.settings.eviction,
            self.candidates(model.name()),
            &short,
        ) {
            Some(victims) => {
                let used = victims.iter().map(|victim| victim.idle_since).max();
                Fit::Evict(victims.len(), used.unwrap_or_default())
            }
            None => Fit::Busy(short.values().copied().max().unwrap_or(0)),
        }
    }
}

#[cfg(test)]
mod tests;
