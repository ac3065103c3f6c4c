//! What can be asked of the controller.

use std::time::Duration;

use tokio::sync::oneshot;

use super::{
    CleanupReport, Explanation, HandedOver, Lease, Reconfiguration, Refusal, ReloadOrigin,
    ReloadProblem,
};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, Upstream, WorkerId};

/// Where the answer to a command goes.
pub type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A wish with an answer.
#[derive(Debug)]
#[expect(
    missing_docs,
    reason = "the fields are those of the `Controller` method of the same name"
)]
pub enum Command {
    /// See [`super::Controller::acquire`].
    Acquire {
        ticket: u64,
        model: ModelName,
        deadline: Timestamp,
        reply: Reply<Lease>,
    },
    /// See [`super::Controller::load`].
    Load {
        ticket: u64,
        model: ModelName,
        deadline: Timestamp,
        reply: Reply<()>,
    },
    /// See [`super::Controller::unload`].
    Unload {
        ticket: u64,
        model: ModelName,
        reply: Reply<()>,
    },
    /// See [`super::Controller::pin`].
    Pin {
        model: ModelName,
        pinned: bool,
        reply: Reply<()>,
    },
    /// See [`super::Controller::limit`].
    Limit {
        request: LimitRequest,
        reply: Reply<LimitReport>,
    },
    /// See [`super::Controller::cleanup`].
    Cleanup {
        ticket: u64,
        request: CleanupRequest,
        reply: Reply<CleanupReport>,
    },
    /// See [`super::Controller::weigh`].
    Weigh { model: ModelName, reply: Reply<()> },
    /// See [`super::Controller::explain`].
    Explain {
        model: ModelName,
        reply: Reply<Explanation>,
    },
    /// See [`super::Controller::tail`].
    Tail {
        model: ModelName,
        lines: usize,
        reply: Reply<LogTail>,
    },
    /// See [`super::Controller::reload`].
    Reload {
        origin: ReloadOrigin,
        outcome: Result<Box<Reconfiguration>, Vec<ReloadProblem>>,
        reply: Reply<()>,
    },
    /// See [`super::Controller::answers`].
    Ping { reply: Reply<()> },
    /// See [`super::Controller::hand_over`].
    HandOver { reply: Reply<HandedOver> },
    /// See [`super::Controller::take_again`].
    TakeAgain { reply: Reply<()> },
    /// See [`super::Controller::leave_to`].
    LeaveTo { heir: Upstream, reply: Reply<bool> },
    /// See [`super::Controller::shutdown`].
    Shutdown { grace: Duration, reply: Reply<()> },
}

/// What is told without waiting. Their number is bounded by what runs: one
/// cancel per waiting ask, one idle per watched gate.
#[derive(Debug)]
pub enum Signal {
    /// Whoever asked under this ticket left.
    Cancel {
        /// The ticket of the command.
        ticket: u64,
    },
    /// The last request left a gate that the controller watches.
    Idle {
        /// The gate's worker.
        worker: WorkerId,
    },
}

/// Sets a limit, or reports it when `limit` is absent.
#[derive(Clone, Copy, Debug)]
pub struct LimitRequest {
    /// Host RAM or a GPU.
    pub domain: Domain,
    /// The new limit.
    pub limit: Option<Bytes>,
    /// Keep it over restarts.
    pub persist: bool,
}

/// What a limit is now.
#[derive(Clone, Copy, Debug)]
pub struct LimitReport {
    /// The limit as set.
    pub limit: Bytes,
    /// What it comes to on this machine: the smaller of the limit and the
    /// domain's size less the reserve.
    pub effective: Bytes,
    /// Measured usage against it.
    pub usage: Bytes,
}

/// The last lines of a model's output, and where in it they are, so that who
/// follows the output loses and repeats none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogTail {
    /// Which life of the model printed them; 0 before the first.
    pub generation: u64,
    /// Lines this life has printed so far; the last of `lines` has this number.
    pub end: u64,
    /// The lines, oldest first.
    pub lines: Vec<String>,
}

/// Which models to unload, and how long to wait for their bytes.
#[derive(Clone, Debug, Default)]
pub struct CleanupRequest {
    /// Free at least this much.
    pub target: Option<Bytes>,
    /// Exactly these.
    pub models: Option<Vec<ModelName>>,
    /// Every idle one.
    pub all: bool,
    /// Also busy ones, after they drained, and pinned ones that are named.
    pub force: bool,
    /// Answer after this long even if bytes are still outstanding.
    pub timeout: Option<Duration>,
    /// Say what would be done and do nothing.
    pub dry_run: bool,
}
