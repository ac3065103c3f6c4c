//! One task for each worker: it alone spawns, probes, signals and reaps the
//! process tree it owns.
//!
//! Orders come in through a [`WorkerHandle`], what happened goes out as
//! [`WorkerEvent`]s. The order of events of one worker is fixed:
//!
//! ```text
//! Spawned ── Ready ──────────────┐
//!    │  └─── NeverReady ─────────┤
//!    └───────────────────────────┴── Exited   (always last, exactly once)
//! ```
//!
//! `Exited` means that the whole tree is gone and reaped, not just the leader.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::model::{ModelSpec, Upstream, WorkerId};
use crate::procfs::ProcessTree;

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
    /// Where its events go. Unbounded because a task that reaps cannot wait;
    /// four events at most per worker bound it.
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
    },
    /// The worker can answer.
    Ready {
        /// Which worker.
        worker: WorkerId,
        /// Where it answers.
        upstream: Upstream,
    },
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

/// The last lines of one worker's output, bounded in lines and bytes.
#[derive(Debug, Default)]
pub struct Tail {
    kept: std::sync::Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    lines: std::collections::VecDeque<String>,
    pushed: u64,
}

/// Lines a [`Tail`] keeps: enough for a stack trace of an engine.
pub const TAIL_LINES: usize = 200;

impl Tail {
    /// Adds a line; the oldest goes when there are more than [`TAIL_LINES`].
    pub fn push(&self, line: String) {
        let mut kept = self.lock();
        if kept.lines.len() == TAIL_LINES {
            kept.lines.pop_front();
        }
        kept.lines.push_back(line);
        kept.pushed += 1;
    }

    /// Returns the last `count` lines, oldest first.
    #[must_use]
    pub fn last(&self, count: usize) -> Vec<String> {
        self.read(count).0
    }

    /// Returns the last `count` lines, oldest first, and how many lines were
    /// ever added: the last one returned is the line of that number.
    #[must_use]
    pub fn read(&self, count: usize) -> (Vec<String>, u64) {
        let kept = self.lock();
        let skipped = kept.lines.len().saturating_sub(count);
        let lines = kept.lines.iter().skip(skipped).cloned().collect();
        (lines, kept.pushed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
