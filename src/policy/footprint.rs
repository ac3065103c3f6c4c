//! What a load is expected to need, and what each life teaches.
//!
//! In order of trust: declared in the configuration, the peak of past lives,
//! the size of the weight files, unknown.

use std::collections::BTreeMap;

use super::words::{Expected, ExpectedSource};
use crate::model::{Bytes, Domain, ModelSpec};

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

/// Returns the best expectation there is for one model.
#[must_use]
pub(super) fn expect(spec: &ModelSpec, weights: Bytes, peak: &BTreeMap<Domain, Bytes>) -> Expected {
    let host = |bytes, source| Expected {
        bytes: BTreeMap::from([(Domain::Host, bytes)]),
        source,
    };
    if let Some(declared) = spec.memory {
        return host(declared, ExpectedSource::Declared);
    }
    if let Some(learned) = peak
        .get(&Domain::Host)
        .filter(|bytes| **bytes > Bytes::ZERO)
    {
        return host(*learned, ExpectedSource::Learned);
    }
    if weights > Bytes::ZERO {
        return host(from_weights(weights), ExpectedSource::Weights);
    }
    Expected::default()
}

/// Merges the peak of one life into what is known.
pub(super) fn merge(known: &mut BTreeMap<Domain, Bytes>, life: &BTreeMap<Domain, Bytes>) {
    for (domain, bytes) in life {
        let entry = known.entry(*domain).or_default();
        *entry = (*entry).max(*bytes);
    }
}
