//! What was decided, with the reason and the numbers. `wording` says each in a
//! sentence, `tell` has it logged and kept.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::{ReloadOrigin, ReloadProblem, ReloadReport};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, PrefetchEnd, PrefetchReason};
use crate::policy::{EvictReason, Expected, Outlook, PressureLevel, Refusal};

/// One decision, or one thing that happened and led to some.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Counts on without a gap, also over restarts, as long as the state is kept.
    pub id: u64,
    /// When.
    pub at: Timestamp,
    /// Which model it is about; absent when it is about residentd itself.
    pub model: Option<ModelName>,
    /// Which life of that model.
    pub generation: Option<u64>,
    /// What it is.
    pub what: What,
}

/// What was decided, or happened.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// A worker is started.
    Spawn {
        /// For whom.
        reason: LoadReason,
        /// Requests that wait for it.
        waiting: usize,
        /// What is promised to it.
        expected: Expected,
        /// The GPUs it is placed on.
        gpus: Vec<u32>,
    },
    /// A worker of an earlier residentd is taken back.
    Adopt {
        /// Its leader.
        pid: i32,
        /// How long it has run.
        age: Duration,
        /// It had answered the earlier residentd; else it still loads.
        ready: bool,
        /// What it is measured to hold.
        held: BTreeMap<Domain, Bytes>,
    },
    /// A worker is ready.
    Ready {
        /// From its spawn.
        took: Duration,
        /// Its model had been evicted before.
        reload: bool,
    },
    /// Files of a model were read into the page cache, before or while its
    /// worker starts.
    Prefetch {
        /// Why.
        reason: PrefetchReason,
        /// How much was read.
        read: Bytes,
        /// How much was there already, as far as it was looked.
        found: Bytes,
        /// Of all its files together.
        size: Bytes,
        /// How long it took.
        took: Duration,
        /// How it ended.
        end: PrefetchEnd,
    },
    /// A request waits, and nobody is told to go for it.
    Wait {
        /// For what.
        outlook: Outlook,
    },
    /// An idle worker is told to go.
    Evict {
        /// Why.
        reason: EvictReason,
        /// What it is charged with.
        charge: BTreeMap<Domain, Bytes>,
        /// Without grace.
        kill: bool,
    },
    /// An idle worker is told to give memory back and live on.
    Park {
        /// Why.
        reason: EvictReason,
        /// What it is charged with.
        charge: BTreeMap<Domain, Bytes>,
        /// What it is expected to hold then.
        holds: BTreeMap<Domain, Bytes>,
    },
    /// The memory of a parked worker is measured to be back.
    Parked {
        /// How much, by domain.
        freed: BTreeMap<Domain, Bytes>,
        /// How long it took.
        took: Duration,
    },
    /// A parked worker is told to take its memory again.
    Unpark {
        /// For whom.
        reason: LoadReason,
        /// Requests that wait for it.
        waiting: usize,
        /// What is promised to it.
        expected: Expected,
    },
    /// A worker that was parked is ready again.
    Unparked {
        /// How long it took.
        took: Duration,
    },
    /// A worker that was to go turned out to be in use, and stays.
    Keep {
        /// Why it was to go.
        reason: EvictReason,
        /// Requests inside.
        inside: u32,
    },
    /// A worker takes no new requests, and is told to go when those inside are
    /// done.
    Drain {
        /// Why.
        reason: EvictReason,
        /// Requests inside.
        inside: u32,
    },
    /// Nobody needs the memory of a drained worker any more: it takes requests
    /// again.
    Resume {
        /// Requests inside.
        inside: u32,
    },
    /// A worker is told to go, whoever is inside.
    Terminate {
        /// Why.
        reason: EvictReason,
        /// What it is charged with.
        charge: BTreeMap<Domain, Bytes>,
        /// Without grace.
        kill: bool,
    },
    /// A worker is gone.
    Exit {
        /// How it ended, as text.
        status: String,
        /// What that means.
        end: End,
    },
    /// A model that failed is not tried again for a while.
    Backoff {
        /// What it said.
        cause: String,
        /// Failures in the last minutes.
        failures: usize,
        /// How long.
        retry_in: Duration,
    },
    /// Memory of a worker that is gone is measured to be back, or given up.
    Reclaim {
        /// Where.
        domain: Domain,
        /// How much is back.
        freed: Bytes,
        /// How much is not.
        missing: Bytes,
    },
    /// Requests are turned away.
    Refuse {
        /// Why.
        refusal: Refusal,
        /// How many alike since the last decision that says so, this included.
        requests: u64,
    },
    /// An operator's cleanup is done.
    Cleanup {
        /// Models that were unloaded.
        unloaded: Vec<ModelName>,
        /// Bytes of host RAM that are back.
        freed: Bytes,
        /// What is missing to what was asked for.
        missing: Bytes,
    },
    /// An operator pins or unpins a model.
    Pin {
        /// Whether it is pinned from now on.
        pinned: bool,
    },
    /// An operator sets a limit.
    Limit {
        /// Where.
        domain: Domain,
        /// From now on.
        limit: Bytes,
    },
    /// Memory became tighter, or less tight.
    Pressure {
        /// Where.
        domain: Domain,
        /// How tight it is now.
        level: PressureLevel,
        /// What workers use there.
        usage: Bytes,
        /// What physics still gives.
        headroom: Bytes,
    },
    /// The configuration was read anew and holds.
    Reload {
        /// Who asked.
        origin: ReloadOrigin,
        /// What it changes.
        report: Arc<ReloadReport>,
    },
    /// The configuration was read anew and is not valid: nothing changes.
    ReloadRefused {
        /// Who asked.
        origin: ReloadOrigin,
        /// All that is wrong.
        problems: Arc<[ReloadProblem]>,
    },
    /// residentd ends.
    Shutdown {
        /// How long requests inside may take.
        grace: Duration,
    },
}

/// For whom a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadReason {
    /// A request waits for it.
    Request,
    /// An operator wants it ready.
    Operator,
    /// The configuration wants it ready.
    Preload,
}

impl LoadReason {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Operator => "operator",
            Self::Preload => "preload",
        }
    }
}

/// What the end of a worker means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to go.
    Told(EvictReason),
    /// It failed before it was ready.
    LoadFailed(LoadFailure),
    /// It ended by itself after it was ready.
    Crashed,
}

/// Why a worker did not become ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LoadFailure {
    /// It could not be spawned.
    NotSpawned,
    /// It returned a code.
    ExitCode,
    /// A signal ended it.
    Signal,
    /// It ran out of memory, on the host or on a GPU.
    OutOfMemory,
    /// It missed its start deadline.
    StartTimeout,
    /// The kernel did not tell how it ended.
    Unknown,
}

impl LoadFailure {
    /// Returns the word used in metrics and the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotSpawned => "not_spawned",
            Self::ExitCode => "exit_code",
            Self::Signal => "signal",
            Self::OutOfMemory => "out_of_memory",
            Self::StartTimeout => "start_timeout",
            Self::Unknown => "unknown",
        }
    }
}

/// The kinds of decisions, for those who look for some of them only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is what `What` says of the same name")]
pub enum Kind {
    Spawn,
    Adopt,
    Ready,
    Prefetch,
    Wait,
    Evict,
    Park,
    Parked,
    Unpark,
    Unparked,
    Keep,
    Drain,
    Resume,
    Terminate,
    Exit,
    Backoff,
    Reclaim,
    Refuse,
    Cleanup,
    Pin,
    Limit,
    Pressure,
    Reload,
    Shutdown,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 24] = [
        Self::Spawn,
        Self::Ready,
        Self::Prefetch,
        Self::Wait,
        Self::Evict,
        Self::Park,
        Self::Parked,
        Self::Unpark,
        Self::Unparked,
        Self::Keep,
        Self::Drain,
        Self::Resume,
        Self::Terminate,
        Self::Exit,
        Self::Backoff,
        Self::Reclaim,
        Self::Refuse,
        Self::Cleanup,
        Self::Pin,
        Self::Limit,
        Self::Pressure,
        Self::Reload,
        Self::Shutdown,
        Self::Adopt,
    ];

    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Spawn => "spawn",
            Self::Adopt => "adopt",
            Self::Ready => "ready",
            Self::Prefetch => "prefetch",
            Self::Wait => "wait",
            Self::Evict => "evict",
            Self::Park => "park",
            Self::Parked => "parked",
            Self::Unpark => "unpark",
            Self::Unparked => "unparked",
            Self::Keep => "keep",
            Self::Drain => "drain",
            Self::Resume => "resume",
            Self::Terminate => "terminate",
            Self::Exit => "exit",
            Self::Backoff => "backoff",
            Self::Reclaim => "reclaim",
            Self::Refuse => "refuse",
            Self::Cleanup => "cleanup",
            Self::Pin => "pin",
            Self::Limit => "limit",
            Self::Pressure => "pressure",
            Self::Reload => "reload",
            Self::Shutdown => "shutdown",
        }
    }
}

impl FromStr for Kind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut all = Self::ALL.into_iter();
        all.find(|kind| kind.as_str() == text).ok_or(())
    }
}

impl What {
    /// Returns which kind it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Spawn { .. } => Kind::Spawn,
            Self::Adopt { .. } => Kind::Adopt,
            Self::Ready { .. } => Kind::Ready,
            Self::Prefetch { .. } => Kind::Prefetch,
            Self::Wait { .. } => Kind::Wait,
            Self::Evict { .. } => Kind::Evict,
            Self::Park { .. } => Kind::Park,
            Self::Parked { .. } => Kind::Parked,
            Self::Unpark { .. } => Kind::Unpark,
            Self::Unparked { .. } => Kind::Unparked,
            Self::Keep { .. } => Kind::Keep,
            Self::Drain { .. } => Kind::Drain,
            Self::Resume { .. } => Kind::Resume,
            Self::Terminate { .. } => Kind::Terminate,
            Self::Exit { .. } => Kind::Exit,
            Self::Backoff { .. } => Kind::Backoff,
            Self::Reclaim { .. } => Kind::Reclaim,
            Self::Refuse { .. } => Kind::Refuse,
            Self::Cleanup { .. } => Kind::Cleanup,
            Self::Pin { .. } => Kind::Pin,
            Self::Limit { .. } => Kind::Limit,
            Self::Pressure { .. } => Kind::Pressure,
            Self::Reload { .. } | Self::ReloadRefused { .. } => Kind::Reload,
            Self::Shutdown { .. } => Kind::Shutdown,
        }
    }

    /// Returns the word for its reason, where there is one: those of
    /// evictions, refusals and failures are also labels of metrics.
    #[must_use]
    pub const fn reason(&self) -> Option<&'static str> {
        Some(match self {
            Self::Spawn { reason, .. } | Self::Unpark { reason, .. } => reason.as_str(),
            Self::Ready { reload: true, .. } => "reload",
            Self::Prefetch { reason, .. } => reason.as_str(),
            Self::Evict { reason, .. }
            | Self::Park { reason, .. }
            | Self::Keep { reason, .. }
            | Self::Drain { reason, .. }
            | Self::Terminate { reason, .. } => reason.as_str(),
            Self::Exit { end, .. } => match end {
                End::Told(reason) => reason.as_str(),
                End::LoadFailed(failure) => failure.as_str(),
                End::Crashed => "crash",
            },
            Self::Refuse { refusal, .. } => refusal.code(),
            Self::Pressure { level, .. } => level.as_str(),
            Self::Reclaim { missing, .. } if missing.get() > 0 => "shortfall",
            Self::Reload { .. } => "applied",
            Self::ReloadRefused { .. } => "invalid",
            Self::Pin { pinned } => {
                if *pinned {
                    "pin"
                } else {
                    "unpin"
                }
            }
            Self::Adopt { .. }
            | Self::Ready { .. }
            | Self::Wait { .. }
            | Self::Parked { .. }
            | Self::Unparked { .. }
            | Self::Resume { .. }
            | Self::Backoff { .. }
            | Self::Reclaim { .. }
            | Self::Cleanup { .. }
            | Self::Limit { .. }
            | Self::Shutdown { .. } => return None,
        })
    }
}
