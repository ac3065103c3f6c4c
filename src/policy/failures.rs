//! Failures of one model: how long it rests, and when it is no longer tried.

use std::collections::VecDeque;
use std::time::Duration;

use super::lifecycle::ModelState;
use super::words::{Phase, Refusal};
use crate::clock::Timestamp;

/// First delay after a failed load; doubles with each further one.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest delay.
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);
/// This many failures within [`BREAKER_WINDOW`] open the breaker.
const BREAKER_FAILURES: usize = 5;
/// Failures older than this are forgotten; an open breaker lets one try
/// through after as long.
const BREAKER_WINDOW: Duration = Duration::from_secs(600);

/// Failures of one model.
#[derive(Clone, Debug, Default)]
pub struct Failures {
    /// When, oldest first, within the breaker's window.
    pub recent: VecDeque<Timestamp>,
    /// When the next try may be.
    pub retry_at: Option<Timestamp>,
    /// What the last one said.
    pub last: Option<String>,
}

impl ModelState {
    /// Books a failure and returns the phase it leads to: after a crash of a
    /// worker that had served, the first new try may be at once.
    pub fn fail(&mut self, cause: String, had_served: bool, now: Timestamp) {
        let recent = &mut self.failures.recent;
        recent.retain(|at| now.since(*at) < BREAKER_WINDOW);
        recent.push_back(now);
        let streak = recent.len();
        self.failures.last = Some(cause);
        if streak >= BREAKER_FAILURES {
            self.failures.retry_at = Some(now + BREAKER_WINDOW);
            self.enter(Phase::Failed, now);
            return;
        }
        let doublings = u32::try_from(streak - 1).unwrap_or(u32::MAX).min(16);
        let delay = if had_served && streak == 1 {
            Duration::ZERO
        } else {
            FIRST_BACKOFF
                .saturating_mul(1 << doublings)
                .min(LONGEST_BACKOFF)
        };
        self.failures.retry_at = Some(now + self.jitter(delay));
        self.enter(Phase::Backoff, now);
        self.wanted |= self.spec.preload;
    }

    /// Spreads a delay by up to a fifth, so that models that failed together
    /// do not come back together. Drawn from the name and the failure's
    /// number, since the policy has no source of chance.
    fn jitter(&self, delay: Duration) -> Duration {
        let seed = self
            .spec
            .name
            .as_str()
            .bytes()
            .fold(self.generation, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let thousandths = u32::try_from(seed % 200).unwrap_or(0);
        delay + delay * thousandths / 1000
    }

    /// Returns whether a new try may be made now.
    #[must_use]
    pub fn may_start(&self, now: Timestamp) -> bool {
        match self.phase {
            Phase::Stopped => true,
            Phase::Backoff | Phase::Failed => self.failures.retry_at.is_none_or(|at| now >= at),
            Phase::Starting
            | Phase::Ready
            | Phase::Parking
            | Phase::Parked
            | Phase::Unparking
            | Phase::Draining
            | Phase::Stopping => false,
        }
    }

    /// Returns what to tell a request that comes while the model backs off.
    #[must_use]
    pub fn backing_off(&self, now: Timestamp) -> Refusal {
        Refusal::BackingOff {
            model: self.spec.name.clone(),
            retry_in: self
                .failures
                .retry_at
                .map_or(Duration::ZERO, |at| at.since(now)),
            cause: self.failures.last.clone().unwrap_or_default(),
        }
    }
}
