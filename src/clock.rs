//! The only place that reads a clock.
//!
//! Everything that decides works with [`Timestamp`], the time since this
//! process started. The wall clock appears once, at start, so that a time can
//! be shown to people as Unix seconds; a later jump of the wall clock changes
//! no decision.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

use tokio::time::Instant;

/// A moment, as the time since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(Duration);

impl Timestamp {
    /// The moment the process started.
    pub const START: Self = Self(Duration::ZERO);

    /// Returns the moment `since_start` after the start.
    #[must_use]
    pub const fn from_start(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// Returns the moment `millis` milliseconds after the start.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// Returns the time since the process started.
    #[must_use]
    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// Returns how long after `earlier` this is, or zero when it is not after.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Returns whole milliseconds since the start, saturating.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns whole microseconds since the start, saturating.
    #[must_use]
    pub fn as_micros(self) -> u64 {
        u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX)
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(rhs))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}s", self.0.as_secs_f64())
    }
}

/// Reads the time. Copies share one start, so their timestamps compare.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    unix_at_start: f64,
}

impl Clock {
    /// Starts a clock at [`Timestamp::START`].
    #[must_use]
    pub fn start() -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the one place that reads the wall clock"
        )]
        let unix = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0.0, |d| d.as_secs_f64());
        Self::start_at(unix)
    }

    /// Starts a clock that takes this moment for `unix` seconds, so that a
    /// recorded answer can be compared.
    #[must_use]
    pub fn start_at(unix: f64) -> Self {
        Self {
            start: Instant::now(),
            unix_at_start: unix,
        }
    }

    /// Returns the current moment.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp(self.start.elapsed())
    }

    /// Returns the runtime's own instant for `at`, for use with its timers.
    #[must_use]
    pub fn instant(&self, at: Timestamp) -> Instant {
        self.start + at.0
    }

    /// Returns `at` as Unix seconds.
    #[must_use]
    pub fn unix(&self, at: Timestamp) -> f64 {
        self.unix_at_start + at.0.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_never_goes_below_zero() {
        let early = Timestamp::from_millis(10);
        let late = Timestamp::from_millis(25);
        assert_eq!(late.since(early), Duration::from_millis(15));
        assert_eq!(early.since(late), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_follows_the_runtime_so_tests_can_move_it() {
        let clock = Clock::start();
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(clock.now(), Timestamp::from_millis(3000));
        assert!(clock.unix(clock.now()) > 1.7e9);
    }
}
