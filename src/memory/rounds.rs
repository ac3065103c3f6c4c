//! When the sampler looks at what.
//!
//! | what | calm | watchful | busy, or asked to |
//! | --- | --- | --- | --- |
//! | host, cgroup | each second | every 100 ms | every 100 ms |
//! | GPUs, sizes of known processes | each second | each second | every 100 ms |
//! | new descendants, all parts of processes that changed or load | every 5 s, and when a size moved much | likewise | every 100 ms |
//! | full check: all parts of each process, our cgroup's place, who maps what | each `check_interval` | likewise | likewise |
//!
//! When nothing at all has moved for half a second, as while a worker that starts
//! thinks, busy is every 200 ms until something moves.
//!
//! A worker that is gone gets a pass over sizes at once: the next one may wait for
//! its bytes, and that is all it waits for.
//!
//! A `check_interval` below 5 s makes the second row as frequent, one below a
//! second the first. A pass that takes long is followed by a rest of four times
//! as long, so measuring never takes more than a fifth of one core.

use std::time::Duration;

use super::observer::Depth;
use super::{Pace, Reading};
use crate::clock::Timestamp;
use crate::model::Bytes;

const SIZES_EVERY: Duration = Duration::from_secs(1);
const PARTS_EVERY: Duration = Duration::from_secs(5);
const BUSY_EVERY: Duration = Duration::from_millis(100);
/// When nothing moved in so many busy passes in a row.
const QUIET_EVERY: Duration = Duration::from_millis(200);
const QUIET_AFTER: u32 = 5;
/// How far headroom wanders on a machine that does nothing.
const STILL: Bytes = Bytes::mib(16);
/// Rest after a pass, in multiples of what the pass took.
const REST: u32 = 4;

/// What is wanted of the next pass.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    pub(super) pace: Pace,
    /// A pass over all parts at once.
    pub(super) now: bool,
    /// A worker is gone: a pass over sizes at once, since the next one may wait for
    /// its bytes.
    pub(super) gone: bool,
    /// The walker found something: a pass over sizes.
    pub(super) found: bool,
    /// The kernel says that memory is tight: the host at once.
    pub(super) pressed: bool,
}

/// When what was last read.
#[derive(Debug)]
pub(super) struct Rounds {
    check_interval: Duration,
    host: Timestamp,
    sizes: Timestamp,
    parts: Timestamp,
    full: Timestamp,
    /// End of the rest after the last pass.
    rested: Timestamp,
    /// So many passes in a row showed that nothing moved.
    quiet: u32,
}

impl Rounds {
    pub(super) fn new(check_interval: Duration) -> Self {
        Self {
            check_interval: check_interval.max(BUSY_EVERY),
            host: Timestamp::START,
            sizes: Timestamp::START,
            parts: Timestamp::START,
            full: Timestamp::START,
            rested: Timestamp::START,
            quiet: 0,
        }
    }

    /// Notes a pass that has ended.
    pub(super) fn passed(&mut self, reading: &Reading, depth: Depth, ended: Timestamp) {
        self.host = reading.at;
        if depth >= Depth::Sizes {
            self.sizes = reading.at;
        }
        if depth >= Depth::Parts {
            self.parts = reading.at;
        }
        if depth == Depth::Full {
            self.full = reading.at;
        }
        let rest = ended.since(reading.at) * REST;
        self.rested = ended + rest.min(SIZES_EVERY);
    }

    /// Takes in whether anything moved between two readings.
    pub(super) fn compare(&mut self, before: &Reading, now: &Reading) {
        self.quiet = if has_moved(before, now) {
            0
        } else {
            self.quiet + 1
        };
    }

    /// Returns when to ask again whether a pass is due.
    pub(super) fn look_again(&self, wanted: &Wanted) -> Timestamp {
        if wanted.found {
            self.rested
        } else {
            self.next(wanted.pace)
        }
    }

    /// Returns when the next pass is due without an order.
    fn next(&self, pace: Pace) -> Timestamp {
        let next = match pace {
            Pace::Calm => self.sizes + self.sizes_every(),
            Pace::Busy if self.quiet >= QUIET_AFTER => self.host + QUIET_EVERY,
            Pace::Watchful | Pace::Busy => self.host + BUSY_EVERY,
        };
        next.max(self.rested)
    }

    fn sizes_every(&self) -> Duration {
        SIZES_EVERY.min(self.check_interval)
    }

    /// Returns how deep the pass is to be that is due now.
    pub(super) fn due(&self, now: Timestamp, wanted: &Wanted) -> Option<Depth> {
        let asked = wanted.now || wanted.gone || (wanted.found && now >= self.rested);
        let in_turn = now >= self.next(wanted.pace);
        if !asked && !wanted.pressed && !in_turn {
            return None;
        }
        let parts_every = PARTS_EVERY.min(self.check_interval);
        let depth = if wanted.gone && !wanted.now && !in_turn {
            Depth::Sizes
        } else if now.since(self.full) >= self.check_interval {
            Depth::Full
        } else if wanted.now || wanted.pace == Pace::Busy || now.since(self.parts) >= parts_every {
            Depth::Parts
        } else if asked || now.since(self.sizes) >= self.sizes_every() {
            Depth::Sizes
        } else {
            Depth::Host
        };
        Some(depth)
    }
}

/// Returns whether memory is not where it was: of a worker, or so much of the
/// host's or of a GPU that something is going on.
fn has_moved(before: &Reading, now: &Reading) -> bool {
    let (was, is) = (before.host.headroom, now.host.headroom);
    before.workers != now.workers
        || before.devices != now.devices
        || was.max(is) - was.min(is) > STILL
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Usage;
    use crate::model::{ModelName, WorkerId};

    fn rounds_after(depth: Depth, at: u64, took: u64) -> Rounds {
        let mut rounds = Rounds::new(Duration::from_secs(60));
        let reading = Reading {
            at: Timestamp::from_millis(at),
            ..Reading::default()
        };
        rounds.passed(&reading, depth, Timestamp::from_millis(at + took));
        rounds
    }

    fn wanted(pace: Pace) -> Wanted {
        Wanted {
            pace,
            ..Wanted::default()
        }
    }

    fn due(rounds: &Rounds, millis: u64, wanted: &Wanted) -> Option<Depth> {
        rounds.due(Timestamp::from_millis(millis), wanted)
    }

    #[test]
    fn calm_is_sizes_each_second_parts_every_five_and_a_full_check_each_interval() {
        let calm = wanted(Pace::Calm);
        let rounds = rounds_after(Depth::Full, 1_000, 1);
        assert_eq!(due(&rounds, 1_999, &calm), None);
        assert_eq!(due(&rounds, 2_000, &calm), Some(Depth::Sizes));
        assert_eq!(due(&rounds, 6_000, &calm), Some(Depth::Parts));
        assert_eq!(due(&rounds, 61_000, &calm), Some(Depth::Full));
    }

    #[test]
    fn a_short_check_interval_makes_everything_as_frequent() {
        let mut rounds = rounds_after(Depth::Full, 1_000, 1);
        rounds.check_interval = Duration::from_millis(500);
        let calm = wanted(Pace::Calm);
        assert_eq!(due(&rounds, 1_499, &calm), None);
        assert_eq!(due(&rounds, 1_500, &calm), Some(Depth::Full));
    }

    #[test]
    fn busy_is_all_parts_every_hundred_milliseconds() {
        let rounds = rounds_after(Depth::Full, 1_000, 1);
        let busy = wanted(Pace::Busy);
        assert_eq!(due(&rounds, 1_099, &busy), None);
        assert_eq!(due(&rounds, 1_100, &busy), Some(Depth::Parts));
    }

    #[test]
    fn busy_is_less_often_when_nothing_has_moved_for_a_while_until_something_does() {
        let mut rounds = rounds_after(Depth::Parts, 1_000, 1);
        let mut busy = wanted(Pace::Busy);
        rounds.quiet = QUIET_AFTER;
        assert_eq!(due(&rounds, 1_199, &busy), None);
        assert_eq!(due(&rounds, 1_200, &busy), Some(Depth::Parts));
        busy.gone = true;
        assert_eq!(due(&rounds, 1_010, &busy), Some(Depth::Sizes));
        let reading = |headroom, rss| {
            let worker = WorkerId {
                model: ModelName::new("m").expect("a good name"),
                generation: 1,
            };
            let mut reading = Reading::default();
            reading.host.headroom = Bytes::mib(headroom);
            let usage = Usage {
                rss: Bytes::mib(rss),
                ..Default::default()
            };
            reading.workers.insert(worker, usage);
            reading
        };
        assert!(!has_moved(&reading(100, 5), &reading(110, 5)));
        assert!(has_moved(&reading(100, 5), &reading(117, 5)));
        assert!(has_moved(&reading(100, 5), &reading(100, 6)));
        assert!(has_moved(&reading(100, 5), &Reading::default()));
    }

    #[test]
    fn watchful_is_the_host_every_hundred_milliseconds_and_the_rest_as_when_calm() {
        let mut rounds = rounds_after(Depth::Full, 1_000, 1);
        let watchful = wanted(Pace::Watchful);
        assert_eq!(due(&rounds, 1_099, &watchful), None);
        assert_eq!(due(&rounds, 1_100, &watchful), Some(Depth::Host));
        let reading = Reading {
            at: Timestamp::from_millis(1_950),
            ..Reading::default()
        };
        rounds.passed(&reading, Depth::Host, Timestamp::from_millis(1_950));
        assert_eq!(due(&rounds, 2_050, &watchful), Some(Depth::Sizes));
    }

    #[test]
    fn an_order_is_obeyed_at_once_and_a_find_after_the_rest() {
        // The pass took 50 ms, so it is followed by 200 ms of rest.
        let rounds = rounds_after(Depth::Full, 1_000, 50);
        let mut calm = wanted(Pace::Calm);
        calm.found = true;
        assert_eq!(due(&rounds, 1_249, &calm), None);
        assert_eq!(due(&rounds, 1_250, &calm), Some(Depth::Sizes));
        calm.now = true;
        assert_eq!(due(&rounds, 1_051, &calm), Some(Depth::Parts));
    }

    #[test]
    fn a_worker_that_is_gone_gets_a_look_at_sizes_at_once_which_puts_nothing_else_off() {
        let rounds = rounds_after(Depth::Full, 1_000, 50);
        let mut busy = wanted(Pace::Busy);
        busy.gone = true;
        assert_eq!(due(&rounds, 1_051, &busy), Some(Depth::Sizes));
        assert_eq!(due(&rounds, 1_250, &busy), Some(Depth::Parts));
        busy.now = true;
        assert_eq!(due(&rounds, 1_051, &busy), Some(Depth::Parts));
        let mut calm = wanted(Pace::Calm);
        calm.gone = true;
        assert_eq!(due(&rounds, 60_500, &calm), Some(Depth::Parts));
        assert_eq!(due(&rounds, 61_000, &calm), Some(Depth::Full));
    }

    #[test]
    fn a_kernel_that_says_memory_is_tight_gets_a_look_at_the_host_at_once() {
        let rounds = rounds_after(Depth::Full, 1_000, 1);
        let mut calm = wanted(Pace::Calm);
        calm.pressed = true;
        assert_eq!(due(&rounds, 1_010, &calm), Some(Depth::Host));
    }

    #[test]
    fn a_slow_pass_is_followed_by_a_rest_that_is_bounded() {
        let busy = wanted(Pace::Busy);
        let rounds = rounds_after(Depth::Parts, 1_000, 60);
        assert_eq!(due(&rounds, 1_299, &busy), None);
        assert_eq!(due(&rounds, 1_300, &busy), Some(Depth::Parts));
        let rounds = rounds_after(Depth::Parts, 1_000, 5_000);
        assert_eq!(due(&rounds, 7_000, &busy), Some(Depth::Parts));
    }
}
