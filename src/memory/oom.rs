//! Was it the kernel's OOM killer?
//!
//! The kernel does not tell a parent why its child got SIGKILL; it counts its
//! kills. A count that grew around the end of a process is the best evidence
//! there is: of our own cgroup, where a worker's cgroup is ours too, else of
//! the whole system. See `memory.events` in the kernel's cgroup v2 document,
//! `memory.oom_control` in that of version 1, and `oom_kill` of `/proc/vmstat`.

use std::path::Path;
use std::time::Duration;

use super::cgroup::{self, Cgroup};
use super::kept::KeptFile;
use crate::clock::Timestamp;

/// A kill and the exit it caused are noticed within this time of each other.
const WINDOW: Duration = Duration::from_secs(2);

/// The kernel's counts of its kills, where they can be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OomCounters {
    /// Processes of our cgroup, and with version 2 of those below it.
    pub cgroup: Option<u64>,
    /// Processes of the whole machine, those of every cgroup among them.
    pub system: Option<u64>,
}

/// The files that hold these counts.
#[derive(Debug)]
pub(super) struct OomFiles {
    cgroup: Option<KeptFile>,
    system: KeptFile,
}

impl OomFiles {
    /// Looks below `root`.
    pub(super) fn new(root: &Path, cgroup: Option<&Cgroup>) -> Self {
        Self {
            cgroup: cgroup.map(|cgroup| KeptFile::new(cgroup.oom_file())),
            system: KeptFile::new(root.join("proc/vmstat")),
        }
    }

    pub(super) fn read(&mut self, text: &mut Vec<u8>) -> OomCounters {
        let mut count = |file: &mut KeptFile| cgroup::number(file.read(text)?, "oom_kill");
        OomCounters {
            cgroup: self.cgroup.as_mut().and_then(&mut count),
            system: count(&mut self.system),
        }
    }
}

/// Who ended a worker that nobody here had told to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Killer {
    /// Most likely the OOM killer, in our cgroup.
    OomInCgroup,
    /// Most likely the OOM killer, because the whole machine was short.
    OomInSystem,
    /// Somebody sent SIGKILL.
    Stranger,
}

impl Killer {
    /// Returns the word used in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OomInCgroup => "oom_cgroup_likely",
            Self::OomInSystem => "oom_system_likely",
            Self::Stranger => "killed_external",
        }
    }
}

/// Remembers when the counts last grew.
#[derive(Clone, Copy, Debug, Default)]
pub struct OomWatch {
    seen: Option<OomCounters>,
    cgroup_at: Option<Timestamp>,
    system_at: Option<Timestamp>,
}

impl OomWatch {
    /// Takes in newer counts.
    pub fn notice(&mut self, now: Timestamp, counters: OomCounters) {
        let Some(seen) = self.seen.replace(counters) else {
            return;
        };
        let grew = |before: Option<u64>, after: Option<u64>| before.is_some() && after > before;
        if grew(seen.cgroup, counters.cgroup) {
            self.cgroup_at = Some(now);
        }
        if grew(seen.system, counters.system) {
            self.system_at = Some(now);
        }
    }

    /// Returns who most likely ended a worker that is gone now; `None` when it
    /// ended by itself. A worker that is not killed itself may still end
    /// because one of its processes was.
    #[must_use]
    pub fn killer(&self, now: Timestamp, by_sigkill: bool) -> Option<Killer> {
        let lately = |at: Option<Timestamp>| at.is_some_and(|at| now.since(at) < WINDOW);
        if lately(self.cgroup_at) {
            Some(Killer::OomInCgroup)
        } else if lately(self.system_at) {
            Some(Killer::OomInSystem)
        } else {
            by_sigkill.then_some(Killer::Stranger)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    fn counters(cgroup: Option<u64>, system: Option<u64>) -> OomCounters {
        OomCounters { cgroup, system }
    }

    #[test]
    fn a_count_that_grows_around_the_end_of_a_worker_tells_who_it_was() {
        let mut watch = OomWatch::default();
        watch.notice(at(1), counters(Some(3), Some(10)));
        assert_eq!(watch.killer(at(2), true), Some(Killer::Stranger));
        assert_eq!(watch.killer(at(2), false), None);
        watch.notice(at(10), counters(Some(3), Some(11)));
        assert_eq!(watch.killer(at(11), true), Some(Killer::OomInSystem));
        watch.notice(at(20), counters(Some(4), Some(12)));
        assert_eq!(watch.killer(at(21), false), Some(Killer::OomInCgroup));
        // Long after it nobody is to blame for it.
        assert_eq!(watch.killer(at(30), true), Some(Killer::Stranger));
    }

    #[test]
    fn counts_that_were_high_before_we_came_or_cannot_be_read_say_nothing() {
        let mut watch = OomWatch::default();
        watch.notice(at(1), counters(Some(7), None));
        watch.notice(at(2), counters(None, Some(9)));
        watch.notice(at(3), counters(Some(9), Some(9)));
        assert_eq!(watch.killer(at(3), false), None);
    }
}
