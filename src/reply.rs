//! What every listener answers with when something is wrong: the one table
//! from refusal to status.

use std::time::Duration;

use hyper::StatusCode;

use crate::control::Refusal;

/// How soon a client may try again when nobody knows better.
const RETRY_SOON: Duration = Duration::from_secs(1);

/// Returns the status of a refusal.
#[must_use]
pub const fn status_of(refusal: &Refusal) -> StatusCode {
    match refusal {
        Refusal::UnknownModel(_) | Refusal::UnknownDomain(_) => StatusCode::NOT_FOUND,
        Refusal::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
        Refusal::WorkerFailed { .. } => StatusCode::BAD_GATEWAY,
        Refusal::StartTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        Refusal::TooLarge { .. }
        | Refusal::NoRoom { .. }
        | Refusal::BackingOff { .. }
        | Refusal::QueueTimeout { .. }
        | Refusal::Unloaded(_)
        | Refusal::Overloaded
        | Refusal::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Returns when a client may try again; `None` when that would not help.
#[must_use]
pub const fn retry_after(refusal: &Refusal) -> Option<Duration> {
    match refusal {
        Refusal::BackingOff { retry_in, .. } => Some(*retry_in),
        Refusal::QueueFull { .. }
        | Refusal::NoRoom { .. }
        | Refusal::QueueTimeout { .. }
        | Refusal::Unloaded(_)
        | Refusal::Overloaded
        | Refusal::ShuttingDown => Some(RETRY_SOON),
        Refusal::UnknownModel(_)
        | Refusal::UnknownDomain(_)
        | Refusal::TooLarge { .. }
        | Refusal::WorkerFailed { .. }
        | Refusal::StartTimeout { .. } => None,
    }
}
