//! What it would cost that a worker goes: how soon its model is likely to be
//! asked for again, times how long it takes to load.
//!
//! When nobody has asked for a model for a time x, somebody does within another
//! x with probability P(gap ≤ 2x | gap > x), by the times between requests that
//! were seen. So its reload is expected at a rate r = P / x, and the worker is
//! worth r · C, where C is how long a load takes. Gaps are counted in classes
//! that double, older ones for less and less, together with what is usual for
//! all models, so that one of which little is known is taken to be as others
//! are. Where gaps of all lengths are as likely, r is about 1 / x: least
//! recently used.

use std::time::Duration;

use crate::model::{GAP_CLASSES, Gaps};

/// What an older gap still counts when a newer one of the same model came.
const OWN_DECAY: f64 = 0.99;
/// The same for gaps of all models together.
const COMMON_DECAY: f64 = 0.9998;
/// What is usual counts as much as so many gaps of the model itself.
const COMMON_WEIGHT: f64 = 4.0;
/// How likely any class is before anything was seen.
const UNSEEN: f64 = 1e-3;
/// So many gaps never end: the model is not used again.
const NEVER_AGAIN: f64 = 0.5;
/// Shorter times since the last request are taken for this one.
const SHORTEST_IDLE: f64 = 0.5;
/// How much a new load time counts against those before.
const NEW_LOAD_PERCENT: u32 = 30;
/// A load takes some time, however short.
const SHORTEST_LOAD: Duration = Duration::from_millis(1);

/// What a worker is worth, in millionths of a millionth of a second of loading
/// per second: whole numbers, so that sums are exact.
pub(super) type Worth = u64;
const WORTH_PER_SECOND: f64 = 1e12;

/// Times between requests, each counted for what it is still worth.
#[derive(Clone, Debug)]
pub(super) struct Weights([f64; GAP_CLASSES]);

impl Weights {
    /// Takes in gaps that came since the last time. Those of one call count as
    /// if they had come mixed.
    fn learn(&mut self, gaps: &Gaps, decay: f64) {
        let count: u32 = gaps.0.iter().sum();
        if count == 0 {
            return;
        }
        let left = decay.powi(i32::try_from(count).unwrap_or(i32::MAX));
        let each = (1.0 - left) / (1.0 - decay) / f64::from(count);
        for (weight, gaps) in self.0.iter_mut().zip(gaps.0) {
            *weight = *weight * left + each * f64::from(gaps);
        }
    }
}

/// What is usual for all models.
#[derive(Clone, Debug)]
pub(super) struct Common(Weights);

impl Default for Common {
    fn default() -> Self {
        Self(Weights([UNSEEN; GAP_CLASSES]))
    }
}

impl Common {
    pub(super) fn learn(&mut self, gaps: &Gaps) {
        self.0.learn(gaps, COMMON_DECAY);
    }
}

/// What is known of one model's use and loads.
#[derive(Clone, Debug)]
pub(super) struct Reuse {
    /// Its idle times.
    pub own: Weights,
    /// How long a load takes, smoothed.
    pub load: Duration,
}

impl Default for Reuse {
    fn default() -> Self {
        Self {
            own: Weights([0.0; GAP_CLASSES]),
            load: Duration::ZERO,
        }
    }
}

impl Reuse {
    pub(super) fn learn(&mut self, gaps: &Gaps) {
        self.own.learn(gaps, OWN_DECAY);
    }

    /// Takes in how long a load took, from its start to ready.
    pub(super) fn loaded(&mut self, took: Duration) {
        let took = took.max(SHORTEST_LOAD);
        self.load = if self.load.is_zero() {
            took
        } else {
            (self.load * (100 - NEW_LOAD_PERCENT) + took * NEW_LOAD_PERCENT) / 100
        };
    }

    /// Returns what a worker is worth that nobody has asked for so long.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a worth is no less than zero and far from the largest number"
    )]
    pub(super) fn worth(&self, idle: Duration, common: &Common) -> Worth {
        (self.rate(idle, common) * self.load.as_secs_f64() * WORTH_PER_SECOND) as Worth
    }

    /// Returns how often per second it is expected to be asked for again.
    pub(super) fn rate(&self, idle: Duration, common: &Common) -> f64 {
        let idle = idle.as_secs_f64().max(SHORTEST_IDLE);
        let usual = COMMON_WEIGHT / common.0.0.iter().sum::<f64>();
        let weight = |class: usize| self.own.0[class] + common.0.0[class] * usual;
        let class = Gaps::class(Duration::from_secs_f64(idle));
        // How far it is into its class, and so into the next when doubled.
        let into = (idle / Gaps::begin(class)).log2().clamp(0.0, 1.0);
        let rest = weight(class) * (1.0 - into);
        let longer: f64 = (class + 1..GAP_CLASSES).map(weight).sum();
        let next = if class + 1 < GAP_CLASSES {
            weight(class + 1) * into
        } else {
            0.0
        };
        (rest + next) / (rest + longer + NEVER_AGAIN) / idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn used_every(gap: Duration, times: usize, common: &mut Common) -> Reuse {
        let mut reuse = Reuse::default();
        reuse.loaded(seconds(10));
        for _ in 0..times {
            reuse.learn(&Gaps::one(gap));
            common.learn(&Gaps::one(gap));
        }
        reuse
    }

    #[test]
    fn with_nothing_known_the_longest_idle_is_worth_least_and_a_slow_load_more() {
        let common = Common::default();
        let mut reuse = Reuse::default();
        reuse.loaded(seconds(10));
        let worth: Vec<_> = [1, 10, 100, 1000]
            .map(|idle| reuse.worth(seconds(idle), &common))
            .into();
        assert!(worth.is_sorted_by(|a, b| a > b), "{worth:?}");
        let mut slow = Reuse::default();
        slow.loaded(seconds(20));
        let (slow, fast) = (
            slow.worth(seconds(9), &common),
            reuse.worth(seconds(9), &common),
        );
        assert!(slow.abs_diff(2 * fast) <= 1, "{slow} {fast}");
    }

    #[test]
    fn a_model_that_comes_each_hour_is_worth_more_than_one_that_comes_by_the_minute_and_is_late() {
        let mut common = Common::default();
        let hourly = used_every(seconds(3600), 50, &mut common);
        let busy = used_every(seconds(60), 50, &mut common);
        let idle = seconds(2000);
        assert!(hourly.worth(idle, &common) > busy.worth(idle, &common));
        assert!(hourly.worth(seconds(50), &common) < busy.worth(seconds(50), &common));
    }

    #[test]
    fn many_gaps_at_once_count_as_much_as_one_by_one() {
        let mut at_once = Weights([0.0; GAP_CLASSES]);
        let mut one_by_one = at_once.clone();
        let mut gaps = Gaps::default();
        gaps.0[5] = 40;
        at_once.learn(&gaps, OWN_DECAY);
        for _ in 0..40 {
            one_by_one.learn(&Gaps::one(seconds(4)), OWN_DECAY);
        }
        assert!(
            (at_once.0[5] - one_by_one.0[5]).abs() < 1e-9,
            "{one_by_one:?}"
        );
    }

    #[test]
    fn load_times_are_smoothed() {
        let mut reuse = Reuse::default();
        reuse.loaded(seconds(10));
        assert_eq!(reuse.load, seconds(10));
        reuse.loaded(seconds(20));
        assert_eq!(reuse.load, seconds(13));
    }
}
