//! The words the policy answers with: phases, reasons, refusals. They reach
//! log, metrics, API and dashboard unchanged.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::reason::EvictReason;
use crate::model::{Bytes, Domain, GpuRequest, ModelName};

/// Where a model's worker is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// No worker, and nothing against one.
    #[default]
    Stopped,
    /// Spawned, not ready yet.
    Starting,
    /// Answers requests.
    Ready,
    /// Told to give memory back and live on.
    Parking,
    /// Lives, holds little, and answers nobody.
    Parked,
    /// Told to take its memory again.
    Unparking,
    /// Takes no new requests; those inside finish.
    Draining,
    /// Told to end; its tree is not gone yet.
    Stopping,
    /// Failed; waits before the next try.
    Backoff,
    /// Failed too often; waits for an operator.
    Failed,
}

impl Phase {
    /// Every phase, in the order of a life.
    pub const ALL: [Self; 10] = [
        Self::Stopped,
        Self::Starting,
        Self::Ready,
        Self::Parking,
        Self::Parked,
        Self::Unparking,
        Self::Draining,
        Self::Stopping,
        Self::Backoff,
        Self::Failed,
    ];

    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Parking => "parking",
            Self::Parked => "parked",
            Self::Unparking => "unparking",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Backoff => "backoff",
            Self::Failed => "failed",
        }
    }
}

/// Where most is missing for a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Where.
    pub domain: Domain,
    /// How much the model is expected to need there.
    pub need: Bytes,
    /// How much room there is.
    pub room: Bytes,
}

impl Shortage {
    /// Why a worker goes for this model.
    pub(super) fn reason(&self, for_model: &ModelName) -> EvictReason {
        EvictReason::MakeRoom {
            for_model: for_model.clone(),
            domain: self.domain,
            need: self.need,
            room: self.room,
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, need, room } = self;
        write!(f, "it needs {need} on {domain}, there is room for {room}")
    }
}

/// How tight memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum PressureLevel {
    /// Enough is left.
    #[default]
    None,
    /// Idle workers go, one at a time.
    Soft,
    /// The least valuable worker goes at once.
    Hard,
}

impl PressureLevel {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Soft => "soft",
            Self::Hard => "hard",
        }
    }
}

/// Why a live model is no candidate for eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Requests are inside.
    Busy,
    /// Pinned by configuration or an operator.
    Pinned,
    /// Not ready yet.
    Loading,
    /// On its way out already.
    Draining,
    /// On its way into its park.
    Parking,
}

impl Protection {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Pinned => "pinned",
            Self::Loading => "loading",
            Self::Draining => "draining",
            Self::Parking => "parking",
        }
    }
}

/// Why a cleanup left a model alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// It is protected.
    Protected(Protection),
    /// It has no worker.
    NotLoaded,
    /// Enough was freed without it.
    NotNeeded,
}

impl Skip {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Protected(why) => why.as_str(),
            Self::NotLoaded => "not_loaded",
            Self::NotNeeded => "not_needed",
        }
    }
}

/// What a load is expected to need, by domain. A domain that is absent is not
/// used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected(pub BTreeMap<Domain, Expectation>);

/// Shows each domain with its bytes and where they come from.
impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (domain, need)) in self.0.iter().enumerate() {
            let comma = if nth == 0 { "" } else { ", " };
            let source = need.source.as_str();
            write!(f, "{comma}{domain} {} ({source})", need.bytes)?;
        }
        Ok(())
    }
}

/// What a load is expected to need in one domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expectation {
    /// How much; of no meaning when the source is unknown and the load has not
    /// been admitted yet.
    pub bytes: Bytes,
    /// Where the number comes from.
    pub source: ExpectedSource,
}

impl Expected {
    /// Returns the bytes expected in a domain; `None` when they are unknown or
    /// none.
    #[must_use]
    pub fn known(&self, domain: Domain) -> Option<Bytes> {
        let need = self.0.get(&domain)?;
        (need.source != ExpectedSource::Unknown).then_some(need.bytes)
    }

    /// Returns whether it uses the domain and nobody knows how much.
    #[must_use]
    pub fn is_unknown(&self, domain: Domain) -> bool {
        let need = self.0.get(&domain);
        need.is_some_and(|need| need.source == ExpectedSource::Unknown)
    }

    /// Returns the domains it uses.
    pub fn domains(&self) -> impl Iterator<Item = Domain> {
        self.0.keys().copied()
    }

    /// Returns the indexes of the GPUs it uses.
    #[must_use]
    pub fn gpus(&self) -> Vec<u32> {
        let index = |domain| match domain {
            Domain::Gpu(index) => Some(index),
            Domain::Host => None,
        };
        self.domains().filter_map(index).collect()
    }
}

/// Where an expectation comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpectedSource {
    /// The configuration says so.
    Declared,
    /// The peak of past lives.
    Learned,
    /// The size of the weight files.
    Weights,
    /// Nothing is known: such a model loads alone.
    #[default]
    Unknown,
}

impl ExpectedSource {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Declared => "declared",
            Self::Learned => "learned",
            Self::Weights => "weights",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a request or an operator's wish is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such model is configured.
    #[error("model {0} is not configured")]
    UnknownModel(ModelName),
    /// No such domain, as in `device=gpu:7`.
    #[error("there is no domain {0}")]
    UnknownDomain(Domain),
    /// The model's queue is full.
    #[error("the queue of {model} is full: {queued} requests wait")]
    QueueFull {
        /// Which model.
        model: ModelName,
        /// How many wait.
        queued: usize,
    },
    /// It could never fit, whatever goes.
    #[error("{model} needs {need} on {domain}, more than its budget of {budget}")]
    TooLarge {
        /// Which model.
        model: ModelName,
        /// Where it does not fit.
        domain: Domain,
        /// What it is expected to need.
        need: Bytes,
        /// The most the domain gives to workers.
        budget: Bytes,
    },
    /// It wants a GPU that is not there.
    #[error("{model} wants {wanted}; this machine has {present} that residentd can measure")]
    NoDevice {
        /// Which model.
        model: ModelName,
        /// What it wants.
        wanted: GpuRequest,
        /// How many GPUs there are.
        present: usize,
    },
    /// No room came free in time, or none can come free by itself.
    #[error("no room for {model} on {domain}: it needs {need}, {room} can be had")]
    NoRoom {
        /// Which model.
        model: ModelName,
        /// Where there is no room.
        domain: Domain,
        /// What it is expected to need.
        need: Bytes,
        /// What there was, with every idle worker gone.
        room: Bytes,
    },
    /// The model failed and waits before the next try.
    #[error("{model} failed and is tried again in {:.0} s: {cause}", retry_in.as_secs_f64().ceil())]
    BackingOff {
        /// Which model.
        model: ModelName,
        /// When the next try is.
        retry_in: Duration,
        /// Why it failed.
        cause: String,
    },
    /// The worker ended before it could answer.
    #[error("the worker of {model} failed: {cause}")]
    WorkerFailed {
        /// Which model.
        model: ModelName,
        /// How it ended.
        cause: String,
        /// The last lines it printed.
        last_lines: Vec<String>,
    },
    /// The worker was not ready before its start deadline.
    #[error("{model} was not ready within {:.0} s", after.as_secs_f64())]
    StartTimeout {
        /// Which model.
        model: ModelName,
        /// How long it was waited for.
        after: Duration,
        /// The last lines it printed.
        last_lines: Vec<String>,
    },
    /// The request waited as long as it may.
    #[error("{model} was not ready in time: waited {:.0} s", waited.as_secs_f64())]
    QueueTimeout {
        /// Which model.
        model: ModelName,
        /// How long it waited.
        waited: Duration,
    },
    /// An operator unloaded the model while this waited for it.
    #[error("{0} was unloaded while it loaded")]
    Unloaded(ModelName),
    /// Too many commands wait for the controller.
    #[error("too many requests wait for a decision")]
    Overloaded,
    /// residentd ends.
    #[error("residentd is shutting down")]
    ShuttingDown,
}

impl Refusal {
    /// Returns the model it is about; some are about residentd itself.
    #[must_use]
    pub const fn model(&self) -> Option<&ModelName> {
        match self {
            Self::UnknownModel(model)
            | Self::QueueFull { model, .. }
            | Self::TooLarge { model, .. }
            | Self::NoDevice { model, .. }
            | Self::NoRoom { model, .. }
            | Self::BackingOff { model, .. }
            | Self::WorkerFailed { model, .. }
            | Self::StartTimeout { model, .. }
            | Self::QueueTimeout { model, .. }
            | Self::Unloaded(model) => Some(model),
            Self::UnknownDomain(_) | Self::Overloaded | Self::ShuttingDown => None,
        }
    }

    /// Returns the stable code of the error body and of the metrics.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::UnknownModel(_) => "model_not_found",
            Self::UnknownDomain(_) => "device_not_found",
            Self::QueueFull { .. } => "queue_full",
            Self::TooLarge { .. } => "model_too_large",
            Self::NoDevice { .. } => "no_device",
            Self::NoRoom { .. } => "no_room",
            Self::BackingOff { .. } => "backing_off",
            Self::WorkerFailed { .. } => "worker_failed",
            Self::StartTimeout { .. } => "start_timeout",
            Self::QueueTimeout { .. } => "queue_timeout",
            Self::Unloaded(_) => "unloaded",
            Self::Overloaded => "overloaded",
            Self::ShuttingDown => "draining",
        }
    }
}
