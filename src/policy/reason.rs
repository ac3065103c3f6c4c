//! Why a worker is ended or parked.

use std::fmt;
use std::time::Duration;

use super::parking::ParkFault;
use super::words::PressureLevel;
use crate::model::{Ailment, Bytes, Domain, ModelName};

/// Why a worker is ended, with the numbers that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvictReason {
    /// Another model needs its bytes.
    MakeRoom {
        /// Who needs them.
        for_model: ModelName,
        /// Where most is missing.
        domain: Domain,
        /// How much that model is expected to need there.
        need: Bytes,
        /// How much room there was.
        room: Bytes,
    },
    /// Nobody used it for as long as its `idle_timeout`.
    Idle {
        /// How long nobody used it.
        after: Duration,
    },
    /// Usage over the limit, or headroom too small.
    Pressure {
        /// How tight it was.
        level: PressureLevel,
        /// Where.
        domain: Domain,
        /// Workers' usage there.
        usage: Bytes,
        /// What physics still gave.
        headroom: Bytes,
    },
    /// It holds more than its own ceiling.
    Ceiling {
        /// What it held.
        usage: Bytes,
        /// Its `max_memory`.
        ceiling: Bytes,
    },
    /// It runs and is of no use.
    Unhealthy {
        /// What is wrong with it.
        why: Ailment,
    },
    /// An operator's cleanup.
    Cleanup,
    /// An operator's unload.
    Unload,
    /// It runs under a configuration that no longer holds.
    Changed,
    /// It is no longer configured.
    Removed,
    /// It could not be parked or unparked, so it is worth nothing.
    ParkFailed(ParkFault),
    /// residentd itself ends.
    Shutdown,
}

impl EvictReason {
    /// Returns the word used in metrics and the API.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::MakeRoom { .. } => "make_room",
            Self::Idle { .. } => "idle",
            Self::Pressure { .. } => "pressure",
            Self::Ceiling { .. } => "max_memory",
            Self::Unhealthy { .. } => "unhealthy",
            Self::Cleanup => "cleanup",
            Self::Unload => "unload",
            Self::Changed => "changed",
            Self::Removed => "removed",
            Self::ParkFailed(fault) => fault.as_str(),
            Self::Shutdown => "shutdown",
        }
    }
}

impl fmt::Display for EvictReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeRoom {
                for_model,
                domain,
                need,
                room,
            } => {
                write!(
                    f,
                    "make room for {for_model}: it needs {need} on {domain}, there was room for {room}"
                )
            }
            Self::Idle { after } => write!(f, "idle for {:.0} s", after.as_secs_f64()),
            Self::Pressure {
                level,
                domain,
                usage,
                headroom,
            } => write!(
                f,
                "{} pressure on {domain}: usage {usage}, headroom {headroom}",
                level.as_str()
            ),
            Self::Ceiling { usage, ceiling } => {
                write!(f, "it holds {usage}, over its max_memory of {ceiling}")
            }
            Self::Unhealthy { why } => write!(f, "unhealthy: {why}"),
            Self::Cleanup => f.write_str("cleanup by an operator"),
            Self::Unload => f.write_str("unload by an operator"),
            Self::Changed => f.write_str("its configuration changed"),
            Self::Removed => f.write_str("it is no longer configured"),
            Self::ParkFailed(fault) => write!(f, "{fault}"),
            Self::Shutdown => f.write_str("residentd ends"),
        }
    }
}
