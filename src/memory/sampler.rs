//! The sampler's thread: takes orders, measures when it is due, and publishes what
//! was measured.

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
use super::rounds::{Rounds, Wanted};
use super::wake::Wake;
use super::walker::Walker;
use super::{MemorySource, OomCounters, Pace, Reading, Subject};
use crate::clock::Clock;
use crate::model::WorkerId;

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
    wanted: Wanted,
    /// Workers whose proportional share is wanted.
    weigh: Weigh,
    stop: bool,
}

impl Sampler {
    fn set_loading(&self, worker: &WorkerId, loading: bool) {
        self.desk.order(|orders| {
            if let Some(subject) = Arc::make_mut(&mut orders.followed).get_mut(worker) {
                subject.loading = loading;
                orders.wanted.now = true;
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
            move || desk.order(|orders| orders.wanted.found = true)
        });
        let wake = Wake::start(&settings.root, Cgroup::locate(&settings.root).as_ref(), {
            let desk = Arc::clone(&desk);
            move || desk.order(|orders| orders.wanted.pressed = true)
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
            orders.wanted.now = true;
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
            orders.wanted.gone = true;
        });
    }

    fn weigh(&self, worker: &WorkerId) {
        self.desk.order(|orders| {
            orders.weigh.insert(worker.clone());
            orders.wanted.now = true;
        });
    }

    fn sample_now(&self) {
        self.desk.order(|orders| orders.wanted.now = true);
    }

    fn pace(&self, pace: Pace) {
        self.desk.order(|orders| {
            // A change to busy must not wait for the end of a calm second.
            let wanted = &mut orders.wanted;
            wanted.now |= pace == Pace::Busy && wanted.pace == Pace::Calm;
            wanted.pace = pace;
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
            if let Some(depth) = rounds.due(now, &orders.wanted) {
                orders.wanted = Wanted {
                    pace: orders.wanted.pace,
                    ..Wanted::default()
                };
                let weigh = mem::take(&mut orders.weigh);
                return Some((depth, Arc::clone(&orders.followed), weigh));
            }
            let next = rounds.look_again(&orders.wanted);
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
        rounds.compare(&readings.borrow(), &reading);
        readings.send_replace(Arc::new(reading));
    }
}
