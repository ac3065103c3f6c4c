//! How a worker is parked: made to give memory back while it lives.

use std::fmt;
use std::time::Duration;

use super::Bytes;

/// What parks a model's worker, and what it is expected to hold then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParkSpec {
    /// Calls that make it give memory back, in this order; never none.
    pub park: Vec<ParkCall>,
    /// Calls that make it ready again, in this order; never none.
    pub unpark: Vec<ParkCall>,
    /// Longest that all calls of one of the two lists may take together.
    pub timeout: Duration,
    /// What it holds of host RAM while it is parked, as declared.
    pub memory: Option<Bytes>,
    /// What it holds of each of its GPUs while it is parked, as declared.
    pub vram: Option<Bytes>,
}

/// One call over HTTP to a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParkCall {
    /// `POST`, as a rule.
    pub method: String,
    /// Path and query, from a slash on.
    pub path: String,
    /// JSON; no body when absent.
    pub body: Option<String>,
}

impl ParkCall {
    /// Returns the path without its query.
    #[must_use]
    pub fn route(&self) -> &str {
        self.path.split('?').next().unwrap_or(&self.path)
    }
}

/// Shows the line of the request.
impl fmt::Display for ParkCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

impl ParkSpec {
    /// Returns whether a path is one of those that park or unpark, which are
    /// residentd's alone to call.
    #[must_use]
    pub fn is_control(&self, path: &str) -> bool {
        let mut calls = self.park.iter().chain(&self.unpark);
        calls.any(|call| call.route() == path)
    }
}
