//! One task for each worker: it alone spawns, probes, signals and reaps the
//! process tree it owns.
//!
//! Orders come in through a [`WorkerHandle`], what happened goes out as
//! [`WorkerEvent`]s. The order of events of one worker is fixed:
//!
//! ```text
//! Spawned ── Ready ── (Parked ── Unparked)* ── ParkFailed, or Unhealthy ──┐
//!    │  └─── NeverReady ─────────────────────────────────────────────────┤
//!    └───────────────────────────────────────────────────────────────────┴── Exited   (always last, exactly once)
//! ```
//!
//! `Parked` and `Unparked` answer an order each; after a `ParkFailed` the worker
//! is only good to be ended. `Used` comes once at most, some time after `Ready`.
//!
//! `Exited` means that the whole tree is gone and reaped, not just the leader.
//! `Prefetched` tells of a model's files, with or without a worker.

mod adopt;
mod body;
mod command;
mod exit;
mod guard;
mod helper;
mod leftovers;
mod listener;
mod liveness;
mod notify;
mod opened;
mod orders;
mod output;
mod park;
mod port;
mod prefetch;
mod probe;
mod process;
mod reaper;
mod release;
mod task;
mod watched;

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fmt, io};

use tokio::sync::{mpsc, watch};

pub use self::adopt::{Adoptee, Inspected, Unfit, inspect, origin};
pub use self::guard::{Guard, keep_guard};
pub use self::helper::Helper;
pub use self::leftovers::{end_left_behind, end_orphans, tidy};
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
use crate::gate::Pulse;
use crate::model::{Ailment, Bytes, ModelSpec, PlacedGpu, Upstream, WorkerId, WorkerRecord};
use crate::procfs::mark::{Marks, Owner};
use crate::procfs::{ProcessKey, ProcessTree};
use crate::telemetry;

/// Starts workers. The seam along which tests put a fake and a worker host in
/// another container will plug in.
pub trait Spawner: fmt::Debug + Send + Sync + 'static {
    /// Starts a worker task and returns at once; everything that can go wrong
    /// arrives as an event.
    fn spawn(&self, order: SpawnOrder) -> WorkerHandle;
    /// Goes on with a worker that an earlier residentd started. As with
    /// [`Spawner::spawn`], what becomes of it arrives as events, `Spawned` first.
    fn adopt(&self, adoptee: Adoptee, events: mpsc::UnboundedSender<WorkerEvent>) -> WorkerHandle;
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
    /// What it is started from, see [`origin`]; the configuration may be another
    /// one once it runs.
    pub origin: String,
    /// Where its events go. Unbounded because a task that reaps cannot wait;
    /// six events at most per worker bound it, and one for each park or unpark.
    pub events: mpsc::UnboundedSender<WorkerEvent>,
}

/// The controller's side of one worker task.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    /// How urgently the worker is to end; only ever raised.
    pub stop: Arc<watch::Sender<Stop>>,
    /// Whether the worker is to be parked. Changed only after what was ordered
    /// before has been answered.
    pub residence: Arc<watch::Sender<Residence>>,
    /// The last lines of its output.
    pub tail: Arc<Tail>,
    /// What requests hear from it.
    pub pulse: Arc<Pulse>,
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

/// Whether a worker that was ready once is to hold its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residence {
    /// It holds it and answers requests.
    #[default]
    Ready,
    /// It lives, and has given back what it can.
    Parked,
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
        /// What a later residentd must know of it.
        record: Box<WorkerRecord>,
    },
    /// The worker can answer.
    Ready {
        /// Which worker.
        worker: WorkerId,
        /// Where it answers.
        upstream: Upstream,
        /// Where it takes gRPC, when that is elsewhere.
        grpc_upstream: Option<Upstream>,
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
    /// The worker answered every call that parks it.
    Parked {
        /// Which worker.
        worker: WorkerId,
    },
    /// The worker answered every call that makes it ready again.
    Unparked {
        /// Which worker.
        worker: WorkerId,
    },
    /// A call of a park or an unpark failed, or all took too long.
    ParkFailed {
        /// Which worker.
        worker: WorkerId,
        /// Which call, and how.
        said: String,
    },
    /// The start deadline passed; the worker task is ending the tree.
    NeverReady {
        /// Which worker.
        worker: WorkerId,
        /// How long it was waited for.
        after: Duration,
    },
    /// The worker runs and is of no use any more. It is left as it is until it
    /// is told to stop.
    Unhealthy {
        /// Which worker.
        worker: WorkerId,
        /// What is wrong with it.
        why: Ailment,
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
    /// Ends workers when we die, where they are not to outlive us.
    guard: OnceLock<Arc<Guard>>,
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
        debug_assert!(OWN_FOLDERS.contains(&folder), "tidied at the start");
        let folder = self.state_dir.join(folder);
        std::fs::create_dir_all(&folder)
            .map_err(|error| format!("make {}: {error}", folder.display()))?;
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        // Also in a container, where every residentd has the same pid.
        let ProcessKey { pid, start_time } = self.owner.process;
        Ok(folder.join(format!("{pid}-{start_time}-{number}")))
    }
}

/// Folders of the state that hold a file of each life.
const OWN_FOLDERS: [&str; 2] = ["sockets", "reports"];
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
            guard: OnceLock::new(),
            files: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }
}

impl ProcessSpawner {
    /// Has workers ended when this process dies, by a guard that `program` with
    /// these arguments becomes: it is to call [`keep_guard`]. Called in a
    /// runtime, before the first worker is spawned.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_guard(
        &self,
        program: PathBuf,
        arguments: Vec<OsString>,
    ) -> io::Result<Arc<Guard>> {
        let guard = Guard::start((program, arguments), Arc::clone(&self.shared.leaders))?;
        Ok(Arc::clone(self.shared.guard.get_or_init(|| guard)))
    }

    /// Spawns a process that is no worker. Blocks for the time of a spawn.
    ///
    /// # Errors
    /// When it cannot be spawned.
    pub fn spawn_helper(&self, command: &mut Command) -> io::Result<(Helper, Child)> {
        Helper::spawn(&self.shared.leaders, command)
    }

    /// Takes charge of a process that is no worker, and is or will be our child.
    ///
    /// # Errors
    /// When there is none with this pid.
    pub fn find_helper(&self, pid: i32) -> io::Result<Helper> {
        Helper::found(&self.shared.leaders, pid)
    }

    fn life(&self, order: SpawnOrder) -> (Life, WorkerHandle) {
        let (stop, stops) = watch::channel(Stop::Run);
        let (residence, residences) = watch::channel(Residence::Ready);
        let tail = Arc::new(Tail::default());
        let orders = (stops, residences);
        let pulse = Arc::new(Pulse::default());
        let shown = (Arc::clone(&tail), Arc::clone(&pulse));
        let life = Life::new(Arc::clone(&self.shared), order, orders, shown);
        let handle = WorkerHandle {
            stop: Arc::new(stop),
            residence: Arc::new(residence),
            tail,
            pulse,
        };
        (life, handle)
    }
}

impl Spawner for ProcessSpawner {
    fn spawn(&self, order: SpawnOrder) -> WorkerHandle {
        let (life, handle) = self.life(order);
        telemetry::spawn("worker", life.run());
        handle
    }

    fn adopt(&self, adoptee: Adoptee, events: mpsc::UnboundedSender<WorkerEvent>) -> WorkerHandle {
        let order = SpawnOrder {
            worker: adoptee.record.worker.clone(),
            spec: Arc::clone(&adoptee.spec),
            gpus: Vec::new(),
            origin: adoptee.record.origin.clone(),
            events,
        };
        let (life, handle) = self.life(order);
        telemetry::spawn("worker", life.go_on(adoptee));
        handle
    }
}
