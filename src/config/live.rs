//! `live = { … }`: how a ready worker is watched.

use std::num::NonZeroU32;
use std::time::Duration;

use super::context::given;
use super::problem::Problems;
use super::section::{Section, Setting};
use super::value::Value;
use crate::model::Live;

/// The table, of which a source may say any part.
#[derive(Clone, Debug, Default)]
pub(super) struct RawLive {
    probe: Option<Setting<Duration>>,
    timeout: Option<Setting<Duration>>,
    failures: Option<Setting<usize>>,
    still: Option<Setting<Duration>>,
    silent: Option<Setting<Duration>>,
    errors: Option<Setting<Option<NonZeroU32>>>,
}

impl RawLive {
    pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let s = &mut section;
        let raw = Self {
            probe: s.get("probe", Value::duration, problems),
            timeout: s.get("timeout", Value::duration_over_zero, problems),
            failures: s.get("failures", Value::count, problems),
            still: s.get("still", Value::duration, problems),
            silent: s.get("silent", Value::duration, problems),
            errors: s.get("errors", Value::bound, problems),
        };
        section.finish(&[], problems);
        raw
    }

    pub(super) fn over(self, weaker: Self) -> Self {
        Self {
            probe: self.probe.or(weaker.probe),
            timeout: self.timeout.or(weaker.timeout),
            failures: self.failures.or(weaker.failures),
            still: self.still.or(weaker.still),
            silent: self.silent.or(weaker.silent),
            errors: self.errors.or(weaker.errors),
        }
    }

    /// Returns what all sources together say.
    pub(super) fn given(self) -> Live {
        Live {
            probe: given(self.probe),
            timeout: given(self.timeout),
            failures: u32::try_from(given(self.failures)).unwrap_or(u32::MAX),
            still: given(self.still),
            silent: given(self.silent),
            errors: given(self.errors).map_or(0, NonZeroU32::get),
        }
    }
}
