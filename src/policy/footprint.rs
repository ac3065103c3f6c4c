//! What a load is expected to need, and what each life teaches.
//!
//! In order of trust: declared in the configuration, the peak of past lives,
//! the size of the weight files, unknown. Each domain by itself.

use std::collections::BTreeMap;

use super::words::{Expectation, Expected, ExpectedSource};
use crate::model::{Bytes, Domain, Footprint, ModelSpec};

/// Part of the difference by which a peak comes down when a life stayed below
/// it: one exceptional request is forgotten after some lives, not at once.
const DECAY: u64 = 4;
/// After a worker died for want of memory its next life is expected to need
/// this many hundredths of what the dead one had held.
const AFTER_OOM_PERCENT: u64 = 125;

/// Returns what a worker with weight files of this size is expected to use.
///
/// Measured on llama.cpp with mapped f16 weights of 5 MB to 1 GB: resident
/// memory at ready is the file plus 20 to 40 MiB, plus the context's buffers.
/// An eighth of the file and 32 MiB cover these; what a life really uses is
/// learned from it.
#[must_use]
pub fn from_weights(weights: Bytes) -> Bytes {
    weights + Bytes(weights.get() / 8) + Bytes::mib(32)
}

/// Returns the same for each of `count` GPUs that share the weights: a part of
/// them, an eighth for buffers, and a context of the driver, which is of the
/// class of 250 MiB and larger on big GPUs.
#[must_use]
pub fn from_weights_on_gpus(weights: Bytes, count: usize) -> Bytes {
    let count = u64::try_from(count).unwrap_or(u64::MAX).max(1);
    let part = Bytes(weights.get().div_ceil(count));
    part + Bytes(part.get() / 8) + Bytes::mib(512)
}

/// What is known of a model before it is loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    pub(super) spec: &'a ModelSpec,
    /// Size of its weight files.
    pub(super) weights: Bytes,
    /// The most it used so far, by domain.
    pub(super) peak: &'a BTreeMap<Domain, Bytes>,
}

impl Known<'_> {
    /// Returns the best expectation there is for a worker on these GPUs.
    ///
    /// A model that is placed on none and was seen on some all the same is
    /// expected there again.
    pub(super) fn expect(&self, gpus: &[u32]) -> Expected {
        let mut needs = BTreeMap::from([(Domain::Host, self.on_host())]);
        if self.spec.gpus.count() == 0 {
            let seen = self.peak.iter().filter(|(domain, bytes)| {
                matches!(domain, Domain::Gpu(_)) && **bytes > Bytes::ZERO
            });
            needs.extend(seen.map(|(domain, bytes)| (*domain, learned(*bytes))));
        }
        let placed = gpus
            .iter()
            .map(|index| (Domain::Gpu(*index), self.on_gpu(*index)));
        needs.extend(placed);
        Expected(needs)
    }

    fn on_host(&self) -> Expectation {
        if let Some(bytes) = self.spec.memory {
            return declared(bytes);
        }
        match self.peak.get(&Domain::Host) {
            Some(bytes) if *bytes > Bytes::ZERO => learned(*bytes),
            _ => by_weights(self.weights, from_weights(self.weights)),
        }
    }

    /// What it needs on this GPU; what it used on another one counts when it
    /// was never here.
    pub(super) fn on_gpu(&self, index: u32) -> Expectation {
        if let Some(bytes) = self.spec.vram {
            return declared(bytes);
        }
        let elsewhere = || {
            let gpus = self
                .peak
                .iter()
                .filter(|(domain, _)| **domain != Domain::Host);
            gpus.map(|(_, bytes)| *bytes).max()
        };
        let peak = self
            .peak
            .get(&Domain::Gpu(index))
            .copied()
            .or_else(elsewhere);
        match peak {
            Some(bytes) if bytes > Bytes::ZERO => learned(bytes),
            _ => {
                let count = self.spec.gpus.count();
                by_weights(self.weights, from_weights_on_gpus(self.weights, count))
            }
        }
    }
}

pub(super) fn declared(bytes: Bytes) -> Expectation {
    Expectation {
        bytes,
        source: ExpectedSource::Declared,
    }
}

fn learned(bytes: Bytes) -> Expectation {
    Expectation {
        bytes,
        source: ExpectedSource::Learned,
    }
}

fn by_weights(weights: Bytes, bytes: Bytes) -> Expectation {
    if weights == Bytes::ZERO {
        return Expectation::default();
    }
    Expectation {
        bytes,
        source: ExpectedSource::Weights,
    }
}

/// What one life taught of one domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lesson {
    /// The most it used.
    pub(super) peak: Bytes,
    /// What it held when last measured.
    pub(super) last: Bytes,
    /// It served: its peak is that of a whole life.
    pub(super) served: bool,
    /// It died for want of memory here, where a budget of this size is.
    pub(super) out_of_memory: Option<Bytes>,
}

/// Merges one life into what is known of a domain.
pub(super) fn merge(known: Footprint, lesson: Lesson) -> Footprint {
    let mut peak = if lesson.peak >= known.peak || !lesson.served {
        known.peak.max(lesson.peak)
    } else {
        known.peak - Bytes((known.peak - lesson.peak).get() / DECAY)
    };
    if let Some(budget) = lesson.out_of_memory {
        // Never to more than there can be: the model would be refused for good,
        // for what may have been a neighbour's doing.
        let raised = lesson.peak.percent(AFTER_OOM_PERCENT).min(budget);
        peak = peak.max(raised);
    }
    Footprint {
        peak,
        settled: if lesson.served {
            lesson.last
        } else {
            known.settled
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::spec;
    use super::*;
    use crate::model::GpuRequest;

    const GPU: Domain = Domain::Gpu(1);

    fn expect(spec: &ModelSpec, weights: u64, peak: &[(Domain, u64)]) -> Expected {
        let peak = peak.iter().map(|(d, mib)| (*d, Bytes::mib(*mib))).collect();
        let known = Known {
            spec,
            weights: Bytes::mib(weights),
            peak: &peak,
        };
        let gpus: Vec<u32> = if spec.gpus.count() > 0 {
            vec![1]
        } else {
            vec![]
        };
        known.expect(&gpus)
    }

    fn on_gpus(vram: Option<u64>) -> ModelSpec {
        ModelSpec {
            gpus: GpuRequest::Count(1),
            vram: vram.map(Bytes::mib),
            ..spec("m", None)
        }
    }

    #[test]
    fn a_declared_need_beats_a_learned_one_and_that_the_weights() {
        let declared = ModelSpec {
            memory: Some(Bytes::mib(7)),
            ..on_gpus(Some(70))
        };
        let peaks = [(Domain::Host, 5), (GPU, 50)];
        let all = expect(&declared, 800, &peaks);
        assert_eq!(all.known(Domain::Host), Some(Bytes::mib(7)));
        assert_eq!(all.known(GPU), Some(Bytes::mib(70)));
        let learned = expect(&on_gpus(None), 800, &peaks);
        assert_eq!(learned.known(Domain::Host), Some(Bytes::mib(5)));
        assert_eq!(learned.known(GPU), Some(Bytes::mib(50)));
        let weights = expect(&on_gpus(None), 800, &[]);
        assert_eq!(weights.known(Domain::Host), Some(Bytes::mib(932)));
        assert_eq!(weights.known(GPU), Some(Bytes::mib(1412)));
        let unknown = expect(&on_gpus(None), 0, &[]);
        assert!(unknown.is_unknown(Domain::Host) && unknown.is_unknown(GPU));
    }

    #[test]
    fn what_was_used_on_another_gpu_counts_on_this_one() {
        let all = expect(&on_gpus(None), 0, &[(Domain::Gpu(0), 900)]);
        assert_eq!(all.known(GPU), Some(Bytes::mib(900)));
        assert_eq!(all.gpus(), [1]);
    }

    #[test]
    fn a_model_that_was_seen_on_a_gpu_uncalled_for_is_expected_there() {
        let all = expect(&spec("m", Some(10)), 0, &[(Domain::Gpu(0), 900)]);
        assert_eq!(all.known(Domain::Gpu(0)), Some(Bytes::mib(900)));
    }

    fn lesson(peak: u64, served: bool) -> Lesson {
        Lesson {
            peak: Bytes::mib(peak),
            last: Bytes::mib(peak / 2),
            served,
            out_of_memory: None,
        }
    }

    #[test]
    fn a_peak_rises_at_once_and_comes_down_by_quarters_of_lives_that_served() {
        let first = merge(Footprint::default(), lesson(100, true));
        assert_eq!(first.peak, Bytes::mib(100));
        assert_eq!(first.settled, Bytes::mib(50));
        assert_eq!(merge(first, lesson(300, true)).peak, Bytes::mib(300));
        let lower = merge(first, lesson(60, true));
        assert_eq!(lower.peak, Bytes::mib(90));
        // A load that failed half way says nothing of a whole life.
        let failed = merge(first, lesson(60, false));
        assert_eq!(failed, first);
    }

    #[test]
    fn a_death_for_want_of_memory_raises_the_peak_but_not_over_the_budget() {
        let died = |budget| Lesson {
            out_of_memory: Some(Bytes::mib(budget)),
            ..lesson(100, false)
        };
        let known = Footprint::default();
        assert_eq!(merge(known, died(1000)).peak, Bytes::mib(125));
        assert_eq!(merge(known, died(110)).peak, Bytes::mib(110));
        assert_eq!(merge(known, died(50)).peak, Bytes::mib(100));
    }
}
