//! One task for each worker: it alone spawns, probes, signals and reaps the
//! process tree it owns.
//!
//! Orders come in through a [`WorkerHandle`], what happened goes out as
//! [`WorkerEvent`]s. The order of events of one worker is fixed:
//!
//! ```text
//! Spawned ── Ready ──── Used ────┐
//!    │  └─── NeverReady ─────────┤
//!    └───────────────────────────┴── Exited   (always last, exactly once)
//! ```
//!
//! `Used` may be missing. `Exited` means that the whole tree is gone and reaped, not just the leader.
//! `Prefetched` tells of a model's files, with or without a worker.

mod command;
mod leftovers;
mod listener;
mod notify;
mod opened;
mod output;
mod port;
mod prefetch;
mod probe;
mod process;
mod reaper;
mod release;
mod task;
mod watched;

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

pub use self::leftovers::{end_left_behind, end_orphans};
pub use self::opened::{Opened, Stream};
pub use self::output::{TAIL_LINES, Tail};
use self::port::Ports;
pub use self::prefetch::{
    Cached, CachedModels, PrefetchOrder, PrefetchReport, Prefetching, Survey,
};
use self::reaper::Leaders;
pub use self::reaper::become_subreaper;
use self::task::Life;
pub(crate) use self::watched::readable;
use crate::clock::Clock;
use crate::model::{Bytes, ModelSpec, PlacedGpu, Upstream, WorkerId};
use crate::procfs::ProcessTree;
use crate::procfs::mark::{Marks, Owner};
use crate::telemetry;

/// Starts workers. The seam along which tests put a fake and a worker host in
/// another container will plug in.
pub trait Spawner: fmt::Debug + Send + Sync + 'static {
    /// Starts a worker task and returns at once; everything that can go wrong
    /// arrives as an event.
    fn spawn(&self, order: SpawnOrder) -> WorkerHandle;
}

/// What to start, and where to tell what became of it.
#[derive(Clone, Debug)]
pub struct SpawnOrder {
    /// The life to start.
    pub worker: WorkerId,
    /// What the configuration says of its model.
    pub spec: Arc<ModelSpec>,
    /// The GPUs it is placed on.
    pub gpus: Vec<PlacedGpu>,
    /// Where its events go. Unbounded because a task that reaps cannot wait;
    /// five events at most per worker bound it.
    pub events: mpsc::UnboundedSender<WorkerEvent>,
}

/// The controller's side of one worker task.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    /// How urgently the worker is to end; only ever raised.
    pub stop: Arc<watch::Sender<Stop>>,
    /// The last lines of its output.
    pub tail: Arc<Tail>,
}

impl WorkerHandle {
    /// Asks the worker to end at least this urgently. A milder order after a
    /// stronger one changes nothing.
    pub fn stop(&self, how: Stop) {
        self.stop.send_if_modified(|current| {
            let raised = how > *current;
            if raised {
                *current = how;
            }
            raised
        });
    }
}

/// How urgently a worker is to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Not at all.
    #[default]
    Run,
    /// Stop signal to the leader, again half way, SIGKILL to the tree after
    /// the model's `stop_timeout`.
    Graceful,
    /// SIGKILL to the tree at once.
    Kill,
}

/// What happened to a worker.
#[derive(Clone, Debug)]
pub enum WorkerEvent {
    /// The process runs and can be measured.
    Spawned {
        /// Which worker.
        worker: WorkerId,
        /// Its processes.
        tree: Arc<ProcessTree>,
        /// The file in which it may report its own GPU memory.
        report: PathBuf,
    },
    /// The worker can answer.
    Ready {
        /// Which worker.
        worker: WorkerId,
        /// Where it answers.
        upstream: Upstream,
        /// The connection that it has answered on.
        opened: Opened,
    },
    /// Which files it maps or has open, some time after it was ready.
    Used {
        /// Which worker.
        worker: WorkerId,
        /// Regular files of some size that it only reads, each once.
        files: Vec<PathBuf>,
    },
    /// What became of reading a model's files ahead.
    Prefetched(PrefetchReport),
    /// The start deadline passed; the worker task is ending the tree.
    NeverReady {
        /// Which worker.
        worker: WorkerId,
        /// How long it was waited for.
        after: Duration,
    },
    /// The whole tree is gone and reaped, or nothing could be spawned.
    Exited {
        /// Which worker.
        worker: WorkerId,
        /// How the leader ended.
        status: ExitStatus,
        /// The last lines it printed, oldest first.
        last_lines: Vec<String>,
    },
}

/// How a worker's leader ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It was never spawned; the text says why.
    NotSpawned(String),
    /// The kernel did not tell.
    Unknown,
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "signal {signal}"),
                Err(_) => write!(f, "signal {number}"),
            },
            Self::NotSpawned(why) => write!(f, "not spawned: {why}"),
            Self::Unknown => f.write_str("unknown exit status"),
        }
    }
}

/// Where worker processes live and how much they may print.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// Reads the time.
    pub clock: Clock,
    /// Logs and sockets go below it.
    pub state_dir: PathBuf,
    /// Whose workers they are; goes into their environment.
    pub owner: Owner,
    /// Ports to give out; outside the range the system gives out itself.
    pub ports: RangeInclusive<u16>,
    /// Size at which a model's log file is cut back.
    pub log_cap: Bytes,
    /// Reap every orphan of this process, not only members of worker trees.
    pub reap_all: bool,
}

impl WorkerSettings {
    /// Returns the defaults for this state folder.
    #[must_use]
    pub fn new(clock: Clock, state_dir: PathBuf, owner: Owner) -> Self {
        Self {
            clock,
            state_dir,
            owner,
            ports: 20_000..=29_999,
            log_cap: Bytes::mib(16),
            reap_all: false,
        }
    }
}

/// Starts workers as processes of this machine.
#[derive(Debug)]
pub struct ProcessSpawner {
    shared: Arc<Shared>,
}

/// What all worker tasks share.
#[derive(Debug)]
struct Shared {
    clock: Clock,
    state_dir: PathBuf,
    owner: Owner,
    marks: Arc<Marks>,
    log_cap: Bytes,
    ports: Ports,
    leaders: Arc<Leaders>,
    /// Numbers the files that one life has for itself.
    files: AtomicU64,
}

impl Shared {
    /// Returns a path for a Unix socket that no other life has.
    fn socket(&self) -> Result<PathBuf, String> {
        let path = self.own_file("sockets")?.with_extension("sock");
        let length = path.as_os_str().len();
        if length > LONGEST_SOCKET {
            return Err(format!(
                "the socket path {} has {length} bytes, at most {LONGEST_SOCKET} are possible: set a shorter server.state_dir",
                path.display()
            ));
        }
        Ok(path)
    }

    /// Returns a path in a folder of the state that no other life has and where
    /// nothing is.
    fn own_file(&self, folder: &str) -> Result<PathBuf, String> {
        let folder = self.state_dir.join(folder);
        std::fs::create_dir_all(&folder)
            .map_err(|error| format!("make {}: {error}", folder.display()))?;
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{}-{number}", std::process::id()));
        // Of an earlier residentd with this pid; mostly there is none.
        let _ = std::fs::remove_file(&path);
        Ok(path)
    }
}

/// The kernel's bound on a Unix socket's path, less the closing zero; see
/// `unix(7)`.
const LONGEST_SOCKET: usize = 107;

impl ProcessSpawner {
    /// Builds the spawner and starts reaping orphans. Called in a runtime.
    #[must_use]
    pub fn new(settings: WorkerSettings) -> Self {
        let leaders = Arc::new(Leaders::default());
        reaper::start(Arc::clone(&leaders), settings.reap_all);
        let shared = Shared {
            clock: settings.clock,
            state_dir: settings.state_dir,
            marks: Arc::new(Marks::new(settings.owner.process.pid)),
            owner: settings.owner,
            log_cap: settings.log_cap,
            ports: Ports::new(settings.ports),
            leaders,
            files: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }
}

impl Spawner for ProcessSpawner {
    fn spawn(&self, order: SpawnOrder) -> WorkerHandle {
        let (stop, orders) = watch::channel(Stop::Run);
        let tail = Arc::new(Tail::default());
        let life = Life::new(Arc::clone(&self.shared), order, orders, Arc::clone(&tail));
        telemetry::spawn("worker", life.run());
        WorkerHandle {
            stop: Arc::new(stop),
            tail,
        }
    }
}
