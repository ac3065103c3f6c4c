//! Why a park or an unpark failed.

use std::fmt;

use crate::model::{Bytes, Domain};

/// Why a worker could not be parked, or not be made ready again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParkFault {
    /// A call of the park failed.
    Park(String),
    /// A call of the unpark failed.
    Unpark(String),
    /// The calls were answered, and the memory did not come back.
    TooLittle {
        /// Where.
        domain: Domain,
        /// How much came back.
        freed: Bytes,
        /// How much should have.
        expected: Bytes,
    },
}

impl ParkFault {
    /// Returns the word used in metrics and the API.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Park(_) => "park_failed",
            Self::Unpark(_) => "unpark_failed",
            Self::TooLittle { .. } => "park_freed_too_little",
        }
    }
}

impl fmt::Display for ParkFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Park(said) => write!(f, "its park failed: {said}"),
            Self::Unpark(said) => write!(f, "its unpark failed: {said}"),
            Self::TooLittle {
                domain,
                freed,
                expected,
            } => write!(
                f,
                "its park gave back {freed} of {expected} on {domain}, too little in time"
            ),
        }
    }
}
