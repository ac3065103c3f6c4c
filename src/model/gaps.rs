//! How long it takes from one request for a model to the next, in classes that
//! double.

use std::time::Duration;

/// How many classes there are. The first that is used begins at a quarter of a
/// second, each reaches twice as far as the one before, the last holds the rest.
pub const GAP_CLASSES: usize = 32;

/// The end of the shortest class, which has all shorter gaps in it, is half a
/// second.
const SHORTEST: f64 = 0.25;

/// Times between requests by class: how often each was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gaps(pub [u32; GAP_CLASSES]);

impl Gaps {
    /// Returns one gap.
    #[must_use]
    pub fn one(gap: Duration) -> Self {
        let mut gaps = Self::default();
        gaps.0[Self::class(gap)] = 1;
        gaps
    }

    /// Returns the class of a gap.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the logarithm of a positive number of seconds is small"
    )]
    pub fn class(gap: Duration) -> usize {
        let doublings = (gap.as_secs_f64().max(SHORTEST) / SHORTEST).log2();
        (doublings as usize + 1).min(GAP_CLASSES - 1)
    }

    /// Returns where a class begins, in seconds.
    #[must_use]
    pub fn begin(class: usize) -> f64 {
        let doublings = i32::try_from(class).unwrap_or(i32::MAX).saturating_sub(1);
        SHORTEST * 2_f64.powi(doublings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_what_lies_between_its_begin_and_the_next_ones() {
        for millis in [250, 499, 500, 999, 1000, 1500, 60_000, 3_600_000] {
            let gap = Duration::from_millis(millis);
            let class = Gaps::class(gap);
            let seconds = gap.as_secs_f64();
            assert!(Gaps::begin(class) <= seconds, "{millis} ms");
            assert!(seconds < Gaps::begin(class + 1), "{millis} ms");
        }
        assert_eq!(Gaps::class(Duration::ZERO), 1);
        assert_eq!(Gaps::class(Duration::MAX), GAP_CLASSES - 1);
        assert_eq!(Gaps::one(Duration::from_secs(1)).0[3], 1);
    }
}
