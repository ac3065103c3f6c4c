//! Whose files should be read ahead: of models that are waited for or start,
//! and, when nothing else happens, of those that are likely to come next. How
//! much memory there is for it.

use super::Policy;
use super::event::Effect;
use super::lifecycle::ModelState;
use super::words::{Phase, PressureLevel};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, Prefetch, PrefetchReason};

impl Policy {
    /// Has files read for whoever waits for them, and calls off what nobody
    /// waits for any more.
    pub(super) fn prefetch(&mut self, out: &mut Vec<Effect>) {
        let ends = self.shutdown.is_some();
        for state in self.models.values_mut() {
            let reason = awaits_files(state).filter(|_| !ends);
            if reason.is_some() == state.prefetches {
                continue;
            }
            state.prefetches = reason.is_some();
            let model = state.name().clone();
            out.push(match reason {
                Some(reason) => Effect::Prefetch { model, reason },
                None => Effect::CallOff { model },
            });
        }
    }

    /// Returns the models without a worker whose files may be read in idle
    /// time, the likeliest to be asked for first. One that nobody has asked for
    /// is not likely.
    #[must_use]
    pub fn likely_next(&self, now: Timestamp) -> Vec<ModelName> {
        let stopped = self.models.values().filter(|m| {
            let may = m.spec.prefetch == Prefetch::Idle && !m.removed;
            may && m.phase == Phase::Stopped && m.queue.is_empty()
        });
        let asked = stopped.filter_map(|m| Some((m, now.since(m.asked_at?))));
        let mut all: Vec<_> = asked
            .map(|(m, idle)| (m.reuse.rate(idle, &self.common), m.name().clone()))
            .collect();
        all.sort_by(|(a, first), (b, second)| b.total_cmp(a).then_with(|| first.cmp(second)));
        all.into_iter().map(|(_, name)| name).collect()
    }

    /// Returns how much memory of the host is to spare once this model has what
    /// it still needs, and how much before: beyond soft pressure and the reserve, and beyond
    /// `mapped`, the files that other workers have mapped, which physics counts
    /// as headroom. Nothing under pressure.
    #[must_use]
    pub fn spare_for(&self, model: &ModelName, mapped: Bytes) -> Option<(Bytes, Bytes)> {
        let state = self.models.get(model)?;
        if self.level(Domain::Host) != PressureLevel::None {
            return Some((Bytes::ZERO, Bytes::ZERO));
        }
        let books = self.ledger.domains.get(&Domain::Host)?;
        let kept = self.thresholds(Domain::Host).soft.max(books.reserve);
        let before = books.measured.headroom - kept - mapped;
        let expected = self.expected(state);
        let need = expected.known(Domain::Host).unwrap_or(state.weights);
        let has = match state.phase {
            Phase::Starting | Phase::Ready | Phase::Parking | Phase::Parked | Phase::Unparking => {
                state.used(Domain::Host)
            }
            Phase::Stopped | Phase::Draining | Phase::Stopping | Phase::Backoff | Phase::Failed => {
                Bytes::ZERO
            }
        };
        Some((before - (need - has), before))
    }
}

/// Why the files of a model should be read now.
fn awaits_files(model: &ModelState) -> Option<PrefetchReason> {
    if model.spec.prefetch == Prefetch::Off {
        return None;
    }
    match model.phase {
        // One that an earlier residentd started has mostly read its files.
        Phase::Starting => (!model.adopted).then_some(PrefetchReason::Starting),
        Phase::Stopped | Phase::Draining | Phase::Stopping => {
            (!model.queue.is_empty()).then_some(PrefetchReason::Waiting)
        }
        // Whoever parks has read its files.
        Phase::Ready
        | Phase::Parking
        | Phase::Parked
        | Phase::Unparking
        | Phase::Backoff
        | Phase::Failed => None,
    }
}
