//! The sampler's thread: when to measure, and publishing what was measured.
//!
//! | what | calm | watchful | busy, or asked to |
//! | --- | --- | --- | --- |
//! | host, cgroup | each second | every 100 ms | every 100 ms |
//! | GPUs, sizes of known processes | each second | each second | every 100 ms |
//! | new descendants, all parts of processes that changed or load | every 5 s, and when a size moved much | likewise | every 100 ms |
//! | full check: all parts of each process, our cgroup's place, who maps what | each `check_interval` | likewise | likewise |
//!
//! A worker that is gone gets a pass over sizes at once: the next one may wait for
//! its bytes, and that is all it waits for.
//!
//! A `check_interval` below 5 s makes the second row as frequent, one below a
//! second the first. A pass that takes long is followed by a rest of four times
//! as long, so measuring never takes more than a fifth of one core.

use std::collections::BTreeSet;
use std::mem;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::watch;

use super::cgroup::Cgroup;
use super::drm::Drm;
use super::host::Host;
use super::nvml::Gpus;
use super::observer::{Depth, Followed, Observer};
use super::oom::OomFiles;
use super::wake::Wake;
use super::walker::Walker;
use super::{MemorySource, OomCounters, Pace, Reading, Subject};
use crate::clock::{Clock, Timestamp};
use crate::model::WorkerId;

const SIZES_EVERY: Duration = Duration::from_secs(1);
const PARTS_EVERY: Duration = Duration::from_secs(5);
const BUSY_EVERY: Duration = Duration::from_millis(100);
/// Rest after a pass, in multiples of what the pass took.
const REST: u32 = 4;

/// How the sampler measures.
#[derive(Clone, Debug)]
pub struct SamplerSettings {
    /// Longest time between two full checks when nothing is happening.
    pub check_interval: Duration,
    /// Where `/proc/meminfo`, `/proc/pressure`, the cgroup files and AMD's and
    /// Intel's GPUs are looked for: `/`, or a folder of fixtures. The sizes of
    /// processes are always the real ones.
    pub root: PathBuf,
    /// The GPU driver's library; the system's `libnvidia-ml.so.1` when absent.
    pub nvml_library: Option<PathBuf>,
    /// Where the host's `/proc` is mounted, for drivers that list processes as
    /// the host numbers them; absent: nowhere.
    pub host_proc: Option<PathBuf>,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Self {
            check_interval: Duration::from_secs(60),
            root: PathBuf::from("/"),
            nvml_library: None,
            host_proc: None,
        }
    }
}

/// Measures workers, host and GPUs on a thread of its own, which ends when
/// this is dropped.
#[derive(Debug)]
pub struct Sampler {
    desk: Arc<Desk>,
    root: PathBuf,
    readings: watch::Receiver<Arc<Reading>>,
    thread: Option<JoinHandle<()>>,
    _wake: Wake,
}

/// Workers whose proportional share is wanted.
type Weigh = BTreeSet<WorkerId>;

/// Where orders for the thread lie.
#[derive(Debug, Default)]
struct Desk {
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Orders {
    followed: Arc<Followed>,
    pace: Pace,
    /// A pass over all parts is wanted at once.
    now: bool,
    /// A worker is gone: a pass over sizes is wanted at once, since the next one
    /// may wait for its bytes.
    gone: bool,
    /// The walker found something: a pass over sizes is wanted.
    found: bool,
    /// The kernel says that memory is tight: the host is wanted at once.
    pressed: bool,
    /// Workers whose proportional share is wanted.
    weigh: Weigh,
    stop: bool,
}

impl Sampler {
    fn set_loading(&self, worker: &WorkerId, loading: bool) {
        self.desk.order(|orders| {
            if let Some(subject) = Arc::make_mut(&mut orders.followed).get_mut(worker) {
                subject.loading = loading;
                orders.now = true;
            }
        });
    }

    /// Takes the first reading and starts the thread. Blocks for some
    /// milliseconds, and for up to 5 s when a GPU driver is slow to open.
    ///
    /// # Panics
    /// When the system has no room for one more thread.
    #[must_use]
    pub fn start(clock: Clock, settings: SamplerSettings) -> Arc<Self> {
        let desk = Arc::new(Desk::default());
        let walker = Walker::start(clock, {
            let desk = Arc::clone(&desk);
            move || desk.order(|orders| orders.found = true)
        });
        let wake = Wake::start(&settings.root, Cgroup::locate(&settings.root).as_ref(), {
            let desk = Arc::clone(&desk);
            move || desk.order(|orders| orders.pressed = true)
        });
        let gpus = Gpus::start(clock, settings.nvml_library);
        let drm = Drm::new(settings.root.clone());
        let host = Host::new(settings.root.clone());
        let mut observer = Observer::new(clock, host, (gpus, drm), walker, settings.host_proc);
        let (first, _) = observer.observe(Depth::Full, &Followed::new());
        let mut rounds = Rounds::new(settings.check_interval);
        rounds.passed(&first, Depth::Full, clock.now());
        let (sender, readings) = watch::channel(Arc::new(first));
        let thread = thread::Builder::new()
            .name("memory-sampler".into())
            .spawn({
                let desk = Arc::clone(&desk);
                move || run(clock, &desk, observer, rounds, &sender)
            })
            .expect("a process that starts has room for its threads");
        Arc::new(Self {
            desk,
            root: settings.root,
            readings,
            thread: Some(thread),
            _wake: wake,
        })
    }
}

impl MemorySource for Sampler {
    fn follow(&self, worker: WorkerId, subject: Subject) {
        self.desk.order(|orders| {
            Arc::make_mut(&mut orders.followed).insert(worker, subject);
            orders.now = true;
        });
    }

    fn loaded(&self, worker: &WorkerId) {
        self.set_loading(worker, false);
    }

    fn moves(&self, worker: &WorkerId) {
        self.set_loading(worker, true);
    }

    fn forget(&self, worker: &WorkerId) {
        self.desk.order(|orders| {
            Arc::make_mut(&mut orders.followed).remove(worker);
            orders.gone = true;
        });
    }

    fn weigh(&self, worker: &WorkerId) {
        self.desk.order(|orders| {
            orders.weigh.insert(worker.clone());
            orders.now = true;
        });
    }

    fn sample_now(&self) {
        self.desk.order(|orders| orders.now = true);
    }

    fn pace(&self, pace: Pace) {
        self.desk.order(|orders| {
            // A change to busy must not wait for the end of a calm second.
            orders.now |= pace == Pace::Busy && orders.pace == Pace::Calm;
            orders.pace = pace;
        });
    }

    fn oom_counters(&self) -> OomCounters {
        OomFiles::new(&self.root, Cgroup::locate(&self.root).as_ref()).read(&mut Vec::new())
    }

    fn readings(&self) -> watch::Receiver<Arc<Reading>> {
        self.readings.clone()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.desk.order(|orders| orders.stop = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the sampler's thread had panicked");
        }
    }
}

impl Desk {
    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next pass. Returns how deep it is to be and over what, or
    /// `None` at the end.
    fn next_pass(&self, clock: Clock, rounds: &Rounds) -> Option<(Depth, Arc<Followed>, Weigh)> {
        let mut orders = self.lock();
        loop {
            if orders.stop {
                return None;
            }
            let now = clock.now();
            if let Some(depth) = rounds.due(now, &orders) {
                orders.now = false;
                orders.gone = false;
                orders.found = false;
                orders.pressed = false;
                let weigh = mem::take(&mut orders.weigh);
                return Some((depth, Arc::clone(&orders.followed), weigh));
            }
            let next = if orders.found {
                rounds.rested
            } else {
                rounds.next(orders.pace)
            };
            orders = self
                .changed
                .wait_timeout(orders, next.since(now))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn run(
    clock: Clock,
    desk: &Desk,
    mut observer: Observer,
    mut rounds: Rounds,
    readings: &watch::Sender<Arc<Reading>>,
) {
    while let Some((depth, followed, weigh)) = desk.next_pass(clock, &rounds) {
        observer.weigh(weigh);
        let (reading, depth) = observer.observe(depth, &followed);
        rounds.passed(&reading, depth, clock.now());
        readings.send_replace(Arc::new(reading));
    }
}

/// When what was last read.
#[derive(Debug)]
struct Rounds {
    check_interval: Duration,
    host: Timestamp,
    sizes: Timestamp,
    parts: Timestamp,
    full: Timestamp,
    /// End of the rest after the last pass.
    rested: Timestamp,
}

impl Rounds {
    fn new(check_interval: Duration) -> Self {
        Self {
            check_interval: check_interval.max(BUSY_EVERY),
            host: Timestamp::START,
            sizes: Timestamp::START,
            parts: Timestamp::START,
            full: Timestamp::START,
            rested: Timestamp::START,
        }
    }

    /// Notes a pass that has ended.
    fn passed(&mut self, reading: &Reading, depth: Depth, ended: Timestamp) {
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

    /// Returns when the next pass is due without an order.
    fn next(&self, pace: Pace) -> Timestamp {
        let next = match pace {
            Pace::Calm => self.sizes + self.sizes_every(),
            Pace::Watchful | Pace::Busy => self.host + BUSY_EVERY,
        };
        next.max(self.rested)
    }

    fn sizes_every(&self) -> Duration {
        SIZES_EVERY.min(self.check_interval)
    }

    /// Returns how deep the pass is to be that is due now.
    fn due(&self, now: Timestamp, orders: &Orders) -> Option<Depth> {
        let asked = orders.now || orders.gone || (orders.found && now >= self.rested);
        let in_turn = now >= self.next(orders.pace);
        if !asked && !orders.pressed && !in_turn {
            return None;
        }
        let parts_every = PARTS_EVERY.min(self.check_interval);
        let depth = if orders.gone && !orders.now && !in_turn {
            Depth::Sizes
        } else if now.since(self.full) >= self.check_interval {
            Depth::Full
        } else if orders.now || orders.pace == Pace::Busy || now.since(self.parts) >= parts_every {
            Depth::Parts
        } else if asked || now.since(self.sizes) >= self.sizes_every() {
            Depth::Sizes
        } else {
            Depth::Host
        };
        Some(depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds_after(depth: Depth, at: u64, took: u64) -> Rounds {
        let mut rounds = Rounds::new(Duration::from_secs(60));
        let reading = Reading {
            at: Timestamp::from_millis(at),
            ..Reading::default()
        };
        rounds.passed(&reading, depth, Timestamp::from_millis(at + took));
        rounds
    }

    fn orders(pace: Pace) -> Orders {
        Orders {
            pace,
            ..Orders::default()
        }
    }

    fn due(rounds: &Rounds, millis: u64, orders: &Orders) -> Option<Depth> {
        rounds.due(Timestamp::from_millis(millis), orders)
    }

    #[test]
    fn calm_is_sizes_each_second_parts_every_five_and_a_full_check_each_interval() {
        let calm = orders(Pace::Calm);
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
        let calm = orders(Pace::Calm);
        assert_eq!(due(&rounds, 1_499, &calm), None);
        assert_eq!(due(&rounds, 1_500, &calm), Some(Depth::Full));
    }

    #[test]
    fn busy_is_all_parts_every_hundred_milliseconds() {
        let rounds = rounds_after(Depth::Full, 1_000, 1);
        let busy = orders(Pace::Busy);
        assert_eq!(due(&rounds, 1_099, &busy), None);
        assert_eq!(due(&rounds, 1_100, &busy), Some(Depth::Parts));
    }

    #[test]
    fn watchful_is_the_host_every_hundred_milliseconds_and_the_rest_as_when_calm() {
        let mut rounds = rounds_after(Depth::Full, 1_000, 1);
        let watchful = orders(Pace::Watchful);
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
        let mut calm = orders(Pace::Calm);
        calm.found = true;
        assert_eq!(due(&rounds, 1_249, &calm), None);
        assert_eq!(due(&rounds, 1_250, &calm), Some(Depth::Sizes));
        calm.now = true;
        assert_eq!(due(&rounds, 1_051, &calm), Some(Depth::Parts));
    }

    #[test]
    fn a_worker_that_is_gone_gets_a_look_at_sizes_at_once_which_puts_nothing_else_off() {
        let rounds = rounds_after(Depth::Full, 1_000, 50);
        let mut busy = orders(Pace::Busy);
        busy.gone = true;
        assert_eq!(due(&rounds, 1_051, &busy), Some(Depth::Sizes));
        assert_eq!(due(&rounds, 1_250, &busy), Some(Depth::Parts));
        busy.now = true;
        assert_eq!(due(&rounds, 1_051, &busy), Some(Depth::Parts));
        let mut calm = orders(Pace::Calm);
        calm.gone = true;
        assert_eq!(due(&rounds, 60_500, &calm), Some(Depth::Parts));
        assert_eq!(due(&rounds, 61_000, &calm), Some(Depth::Full));
    }

    #[test]
    fn a_kernel_that_says_memory_is_tight_gets_a_look_at_the_host_at_once() {
        let rounds = rounds_after(Depth::Full, 1_000, 1);
        let mut calm = orders(Pace::Calm);
        calm.pressed = true;
        assert_eq!(due(&rounds, 1_010, &calm), Some(Depth::Host));
    }

    #[test]
    fn a_slow_pass_is_followed_by_a_rest_that_is_bounded() {
        let busy = orders(Pace::Busy);
        let rounds = rounds_after(Depth::Parts, 1_000, 60);
        assert_eq!(due(&rounds, 1_299, &busy), None);
        assert_eq!(due(&rounds, 1_300, &busy), Some(Depth::Parts));
        let rounds = rounds_after(Depth::Parts, 1_000, 5_000);
        assert_eq!(due(&rounds, 7_000, &busy), Some(Depth::Parts));
    }
}
