//! The only place that reads a clock.
//!
//! Everything that decides works with [`Timestamp`], the time since a clock's
//! zero. For residentd that is when the machine came up, so that what the
//! residentd before it noted compares with what it notes itself. The wall clock
//! appears once, at start, so that a time can be shown to people as Unix seconds;
//! a later jump of the wall clock changes no decision.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

use tokio::time::Instant;

/// A moment, as the time since the zero of its clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(Duration);

impl Timestamp {
    /// The zero of the clock.
    pub const START: Self = Self(Duration::ZERO);

    /// Returns the moment `since_start` after the zero.
    #[must_use]
    pub const fn from_start(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// Returns the moment `millis` milliseconds after the zero.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// Returns the moment `micros` microseconds after the zero.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Self(Duration::from_micros(micros))
    }

    /// Returns the time since the zero.
    #[must_use]
    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// Returns how long after `earlier` this is, or zero when it is not after.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Returns whole milliseconds since the zero, saturating.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns whole microseconds since the zero, saturating.
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

/// Reads the time. Copies share one zero, so their timestamps compare.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    zero: Instant,
    unix_at_zero: f64,
    began: Timestamp,
}

impl Clock {
    /// Starts a clock at [`Timestamp::START`].
    #[must_use]
    pub fn start() -> Self {
        Self::start_at(unix_now())
    }

    /// Returns a clock whose zero is when the machine came up: `CLOCK_MONOTONIC`,
    /// `clock_gettime(2)`, which other processes of the machine read too.
    #[must_use]
    pub fn of_machine() -> Self {
        let read = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let up = Duration::try_from(read).unwrap_or_default();
        let clock = Self::start();
        // It is the zero of the runtime's own clock too, which cannot go below it.
        match clock.zero.checked_sub(up) {
            Some(zero) => Self {
                zero,
                unix_at_zero: clock.unix_at_zero - up.as_secs_f64(),
                began: Timestamp(up),
            },
            None => clock,
        }
    }

    /// Starts a clock that takes this moment for `unix` seconds, so that a
    /// recorded answer can be compared.
    #[must_use]
    pub fn start_at(unix: f64) -> Self {
        Self {
            zero: Instant::now(),
            unix_at_zero: unix,
            began: Timestamp::START,
        }
    }

    /// Returns the moment from which on it was read.
    #[must_use]
    pub const fn began(&self) -> Timestamp {
        self.began
    }

    /// Returns the current moment.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp(self.zero.elapsed())
    }

    /// Returns the runtime's own instant for `at`, for use with its timers.
    #[must_use]
    pub fn instant(&self, at: Timestamp) -> Instant {
        self.zero + at.0
    }

    /// Returns `at` as Unix seconds.
    #[must_use]
    pub fn unix(&self, at: Timestamp) -> f64 {
        self.unix_at_zero + at.0.as_secs_f64()
    }
}

fn unix_now() -> f64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the wall clock"
    )]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_clocks_of_the_machine_agree_on_a_moment() {
        let (first, second) = (Clock::of_machine(), Clock::of_machine());
        assert!(first.began() > Timestamp::START && first.began() <= second.began());
        let at = first.now();
        let apart = second.now().since(at);
        assert!(apart < Duration::from_secs(5), "{apart:?}");
        let unix = (first.unix(at) - second.unix(at)).abs();
        assert!(unix < 1.0, "{unix}");
        assert!((first.unix(at) - unix_now()).abs() < 5.0);
    }

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
