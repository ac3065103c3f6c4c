//! The two clocks a bench compares with its own.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Returns `CLOCK_MONOTONIC`, the same in every process, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let nanos = now.tv_sec * 1_000_000_000 + now.tv_nsec;
    u64::try_from(nanos).unwrap_or(0)
}

/// Returns the wall clock as nanoseconds since 1970.
pub(crate) fn unix_ns() -> u64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "a program of its own, whose stamps are compared with others'"
    )]
    let now = SystemTime::now();
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
