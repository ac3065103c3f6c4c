//! Pressure levels with hysteresis, per domain.
//!
//! `soft` comes when usage is over the limit, or when headroom is under its
//! threshold in two measurements running; `hard` when headroom is under its
//! own threshold once. A level by headroom is left only above 1.5 times the
//! threshold, so that it does not flutter.

use std::collections::BTreeMap;

use super::Policy;
use super::words::PressureLevel;
use crate::model::{Bytes, Domain};

/// How far headroom must rise above a threshold to leave its level, percent.
const LEAVE_PERCENT: u64 = 150;
/// Measurements under the soft threshold before it counts.
const SOFT_SAMPLES: u32 = 2;

/// No program is known to take memory faster than this each second; earlyoom
/// counts with it too.
const FASTEST: Bytes = Bytes::gib(6);

/// A size, or a share of the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threshold {
    /// Hundredths of the domain's size.
    Percent(u64),
    /// Bytes.
    Size(Bytes),
}

impl Threshold {
    /// Returns the threshold in a domain of this size.
    #[must_use]
    pub(super) fn of(self, total: Bytes) -> Bytes {
        match self {
            Self::Percent(percent) => total.percent(percent),
            Self::Size(bytes) => bytes,
        }
    }
}

/// On a GPU this little headroom is soft pressure, whatever is configured for
/// more: engines fill a GPU on purpose, and nothing there ends a process for
/// want of memory, so there is no hard pressure either.
const GPU_SOFT: Bytes = Bytes::mib(512);

/// Where the levels of one domain lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thresholds {
    /// Headroom under this is soft pressure.
    pub(super) soft: Bytes,
    /// Headroom under this is hard pressure.
    hard: Bytes,
}

impl Thresholds {
    /// Returns those of a domain of this size.
    #[must_use]
    pub(super) fn of(domain: Domain, total: Bytes, (soft, hard): (Threshold, Threshold)) -> Self {
        match domain {
            Domain::Host => Self {
                soft: soft.of(total),
                hard: hard.of(total),
            },
            Domain::Gpu(_) => Self {
                soft: soft.of(total).min(GPU_SOFT),
                hard: Bytes::ZERO,
            },
        }
    }
}

/// What one domain looks like in one measurement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// What physics still gives.
    pub headroom: Bytes,
    /// Measured use by workers.
    pub usage: Bytes,
    /// The user's limit on it.
    pub limit: Bytes,
}

/// The level of every domain.
#[derive(Clone, Debug, Default)]
pub(super) struct Levels {
    domains: BTreeMap<Domain, State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    by_headroom: PressureLevel,
    over_limit: bool,
    under_soft: u32,
}

impl Levels {
    /// Takes in one measurement of one domain.
    pub(super) fn update(&mut self, domain: Domain, look: Look, thresholds: Thresholds) {
        let Thresholds { soft, hard } = thresholds;
        let state = self.domains.entry(domain).or_default();
        state.over_limit = look.usage > look.limit;
        state.under_soft = if look.headroom < soft {
            state.under_soft.saturating_add(1)
        } else {
            0
        };
        let entered = if look.headroom < hard {
            PressureLevel::Hard
        } else if state.under_soft >= SOFT_SAMPLES {
            PressureLevel::Soft
        } else {
            PressureLevel::None
        };
        let kept = match state.by_headroom {
            PressureLevel::Hard if look.headroom < hard.percent(LEAVE_PERCENT) => {
                PressureLevel::Hard
            }
            PressureLevel::Hard | PressureLevel::Soft
                if look.headroom < soft.percent(LEAVE_PERCENT) =>
            {
                PressureLevel::Soft
            }
            PressureLevel::None | PressureLevel::Soft | PressureLevel::Hard => PressureLevel::None,
        };
        state.by_headroom = entered.max(kept);
    }

    /// Sets whether a domain's usage is over its limit, when a limit changes
    /// between two measurements.
    pub(super) fn set_over_limit(&mut self, domain: Domain, over: bool) {
        self.domains.entry(domain).or_default().over_limit = over;
    }

    /// Returns one domain's level.
    #[must_use]
    pub(super) fn of(&self, domain: Domain) -> PressureLevel {
        let Some(state) = self.domains.get(&domain) else {
            return PressureLevel::None;
        };
        if state.over_limit {
            state.by_headroom.max(PressureLevel::Soft)
        } else {
            state.by_headroom
        }
    }

    /// Returns the worst level of all domains.
    #[must_use]
    pub(super) fn worst(&self) -> PressureLevel {
        let levels = self.domains.keys().map(|domain| self.of(*domain));
        levels.max().unwrap_or(PressureLevel::None)
    }

    /// Returns the domains under pressure, with their levels.
    #[must_use]
    pub(super) fn pressed(&self) -> Vec<(Domain, PressureLevel)> {
        let levels = self
            .domains
            .keys()
            .map(|domain| (*domain, self.of(*domain)));
        levels
            .filter(|(_, level)| *level != PressureLevel::None)
            .collect()
    }

    /// Returns whether soft pressure could be there within a second.
    #[must_use]
    pub(super) fn is_near(look: Look, thresholds: Thresholds) -> bool {
        look.headroom - thresholds.soft < FASTEST
    }

    /// Returns how many bytes are missing to the end of pressure in a domain.
    #[must_use]
    pub(super) fn missing(&self, domain: Domain, look: Look, thresholds: Thresholds) -> Bytes {
        let over = look.usage - look.limit;
        let by_headroom = self
            .domains
            .get(&domain)
            .map_or(PressureLevel::None, |s| s.by_headroom);
        let short = match by_headroom {
            PressureLevel::None => Bytes::ZERO,
            PressureLevel::Soft | PressureLevel::Hard => {
                thresholds.soft.percent(LEAVE_PERCENT) - look.headroom
            }
        };
        over.max(short)
    }
}

impl Policy {
    pub(super) fn thresholds(&self, domain: Domain) -> Thresholds {
        let books = self.ledger.domains.get(&domain);
        let total = books.map_or(Bytes::ZERO, |books| books.measured.total);
        Thresholds::of(domain, total, (self.settings.soft, self.settings.hard))
    }

    pub(super) fn look(&self, domain: Domain) -> Look {
        let books = self
            .ledger
            .domains
            .get(&domain)
            .copied()
            .unwrap_or_default();
        Look {
            headroom: books.measured.headroom,
            usage: self.usage(domain),
            limit: books.limit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRESHOLDS: Thresholds = Thresholds {
        soft: Bytes::mib(1024),
        hard: Bytes::mib(512),
    };

    fn look(headroom: u64) -> Look {
        Look {
            headroom: Bytes::mib(headroom),
            usage: Bytes::gib(1),
            limit: Bytes::gib(8),
        }
    }

    fn levels(headrooms: &[u64]) -> Vec<PressureLevel> {
        let mut levels = Levels::default();
        headrooms
            .iter()
            .map(|mib| {
                levels.update(Domain::Host, look(*mib), THRESHOLDS);
                levels.of(Domain::Host)
            })
            .collect()
    }

    #[test]
    fn soft_takes_two_measurements_and_hard_takes_one() {
        use PressureLevel::{Hard, None, Soft};
        assert_eq!(levels(&[5000, 1000, 1000]), [None, None, Soft]);
        assert_eq!(levels(&[5000, 500]), [None, Hard]);
    }

    #[test]
    fn a_level_is_left_only_well_above_its_threshold() {
        use PressureLevel::{Hard, None, Soft};
        assert_eq!(levels(&[1000, 1000, 1500, 1600]), [None, Soft, Soft, None]);
        assert_eq!(levels(&[500, 700, 800, 1600]), [Hard, Hard, Soft, None]);
    }

    #[test]
    fn usage_over_the_limit_is_soft_at_once_and_ends_at_once() {
        let mut levels = Levels::default();
        let over = Look {
            usage: Bytes::gib(9),
            ..look(5000)
        };
        levels.update(Domain::Host, over, THRESHOLDS);
        assert_eq!(levels.pressed(), [(Domain::Host, PressureLevel::Soft)]);
        assert_eq!(
            levels.missing(Domain::Host, over, THRESHOLDS),
            Bytes::gib(1)
        );
        levels.update(Domain::Host, look(5000), THRESHOLDS);
        assert_eq!(levels.of(Domain::Host), PressureLevel::None);
        assert_eq!(levels.worst(), PressureLevel::None);
    }

    #[test]
    fn an_engine_may_fill_a_gpu_nearly_to_its_end() {
        let configured = (Threshold::Percent(10), Threshold::Percent(5));
        let host = Thresholds::of(Domain::Host, Bytes::gib(80), configured);
        assert_eq!((host.soft, host.hard), (Bytes::gib(8), Bytes::gib(4)));
        let gpu = Thresholds::of(Domain::Gpu(0), Bytes::gib(80), configured);
        assert_eq!((gpu.soft, gpu.hard), (Bytes::mib(512), Bytes::ZERO));
    }
}
