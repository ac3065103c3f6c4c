//! What happened to one model since residentd started.

use std::collections::BTreeMap;
use std::time::Duration;

use super::reason::EvictReason;
use crate::clock::Timestamp;

/// What happened to one model since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Lives that became ready.
    pub loads: u64,
    /// Of those, loads after an eviction.
    pub reloads: u64,
    /// Lives that ended by themselves after they were ready.
    pub crashes: u64,
    /// Lives that were ended because they were of no use, by what was wrong.
    pub unhealthy: BTreeMap<&'static str, u64>,
    /// Evictions by reason.
    pub evictions: BTreeMap<&'static str, u64>,
    /// The last eviction.
    pub last_eviction: Option<(EvictReason, Timestamp)>,
    /// Spawn to ready of the last life that got there.
    pub last_load: Option<Duration>,
    /// Evicted since it was last ready.
    pub evicted: bool,
    /// Parks that gave back what they should, by reason.
    pub parks: BTreeMap<&'static str, u64>,
    /// Parked workers that became ready again.
    pub unparks: u64,
    /// How long the last of these took.
    pub last_unpark: Option<Duration>,
}
