//! What the policy is told, and what it wants done.

use std::collections::BTreeMap;
use std::time::Duration;

use super::configure::Change;
use super::history::History;
use super::reason::EvictReason;
use super::words::{Expected, Refusal, Skip};
use crate::clock::Timestamp;
use crate::model::{
    Ailment, Bytes, Domain, Footprint, GpuVendor, ModelName, PrefetchReason, WorkerId,
};

/// Names one wish, so that its answer finds the way back.
pub type Ticket = u64;

/// Something happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A deadline named by `next_wake` came, or nothing did: look around.
    Tick,
    /// A request wants a lease.
    Acquire {
        /// The request.
        ticket: Ticket,
        /// Which model it wants.
        model: ModelName,
        /// When it gives up.
        deadline: Timestamp,
    },
    /// An operator wants the model ready.
    Load {
        /// The wish.
        ticket: Ticket,
        /// Which model.
        model: ModelName,
        /// When the operator gives up.
        deadline: Timestamp,
    },
    /// Whoever waits under this ticket left.
    Cancel {
        /// The wish.
        ticket: Ticket,
    },
    /// An operator wants the model gone.
    Unload {
        /// The wish.
        ticket: Ticket,
        /// Which model.
        model: ModelName,
    },
    /// An operator pins or unpins.
    Pin {
        /// Which model.
        model: ModelName,
        /// Whether it is pinned from now on.
        pinned: bool,
    },
    /// A user's limit changes.
    Limit {
        /// Where.
        domain: Domain,
        /// From now on.
        limit: Bytes,
    },
    /// The configuration changed.
    Configure(Box<Change>),
    /// An operator wants memory back.
    Cleanup {
        /// The wish.
        ticket: Ticket,
        /// What to unload.
        order: CleanupOrder,
        /// When to answer at the latest.
        deadline: Timestamp,
    },
    /// A gate could not be closed, to evict or to park: someone is inside.
    EvictRefused {
        /// Whose gate.
        worker: WorkerId,
        /// How many are inside.
        inside: u32,
    },
    /// The worker answers.
    Ready {
        /// Which.
        worker: WorkerId,
    },
    /// The worker answered every call that parks it.
    Parked {
        /// Which.
        worker: WorkerId,
    },
    /// The worker answered every call that makes it ready again.
    Unparked {
        /// Which.
        worker: WorkerId,
    },
    /// A call that parks a worker, or makes it ready again, failed or took too
    /// long.
    ParkFailed {
        /// Which.
        worker: WorkerId,
        /// Which call, and how.
        said: String,
    },
    /// The worker runs and is of no use.
    Unhealthy {
        /// Which.
        worker: WorkerId,
        /// What is wrong with it.
        why: Ailment,
    },
    /// The worker missed its start deadline and is being ended.
    NeverReady {
        /// Which.
        worker: WorkerId,
        /// How long it was waited for.
        after: Duration,
        /// The last lines it printed.
        last_lines: Vec<String>,
    },
    /// The worker's whole tree is gone and reaped.
    Exited {
        /// Which.
        worker: WorkerId,
        /// How its leader ended, as text.
        status: String,
        /// Where it died for want of memory, as far as that is known.
        out_of_memory: Vec<Domain>,
        /// The last lines it printed.
        last_lines: Vec<String>,
    },
    /// New measurements.
    Measured(Measured),
    /// residentd is to end.
    Shutdown {
        /// Until when requests inside may finish. A second, earlier one wins.
        until: Timestamp,
    },
}

/// What is wanted done. Each effect is carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Give the request its lease on this ready worker.
    Grant {
        /// The request.
        ticket: Ticket,
        /// The worker.
        worker: WorkerId,
    },
    /// Tell that the wish came true.
    Done {
        /// The wish.
        ticket: Ticket,
    },
    /// Tell why not.
    Reject {
        /// The wish.
        ticket: Ticket,
        /// Why.
        refusal: Refusal,
    },
    /// Tell what a cleanup did.
    CleanedUp {
        /// The wish.
        ticket: Ticket,
        /// What it did.
        report: CleanupReport,
    },
    /// Start this worker.
    Spawn {
        /// A new life.
        worker: WorkerId,
        /// What is promised to it; the GPUs among its domains are those it is
        /// placed on.
        expected: Expected,
        /// The GPUs it is placed on, by index.
        gpus: Vec<u32>,
    },
    /// Close the gate if nobody is inside, then end the worker; otherwise say
    /// `EvictRefused`.
    Evict {
        /// Which.
        worker: WorkerId,
        /// Why.
        reason: EvictReason,
        /// Skip the grace.
        kill: bool,
    },
    /// Close the gate if nobody is inside, then have the worker give memory back
    /// and live on; otherwise say `EvictRefused`.
    Park {
        /// Which.
        worker: WorkerId,
        /// Why.
        reason: EvictReason,
        /// What it is expected to hold when it is parked.
        holds: BTreeMap<Domain, Bytes>,
    },
    /// The memory of a worker that was told to park is measured to be back.
    Parked {
        /// Which.
        worker: WorkerId,
        /// How much, by domain.
        freed: BTreeMap<Domain, Bytes>,
        /// How long that took.
        took: Duration,
    },
    /// Have a parked worker take its memory again; there is room for it.
    Unpark {
        /// Which.
        worker: WorkerId,
        /// What is promised to it.
        expected: Expected,
    },
    /// Close the gate whoever is inside, then look again who is, and tell when
    /// the last one leaves.
    Drain {
        /// Which.
        worker: WorkerId,
        /// Why.
        reason: EvictReason,
    },
    /// Open the gate of a draining worker again: nobody needs its bytes any more.
    Resume {
        /// Which.
        worker: WorkerId,
    },
    /// End the worker, whoever is inside.
    Terminate {
        /// Which.
        worker: WorkerId,
        /// Why.
        reason: EvictReason,
        /// Skip the grace.
        kill: bool,
    },
    /// Bytes of an ended worker are measured to be back, or were given up.
    Reclaimed {
        /// Whose.
        worker: WorkerId,
        /// Where.
        domain: Domain,
        /// How much is back.
        freed: Bytes,
        /// How much did not come back in time.
        missing: Bytes,
    },
    /// A life ended and taught this; keep it over restarts.
    Learn {
        /// Which model.
        model: ModelName,
        /// What its lives used, by domain.
        footprint: BTreeMap<Domain, Footprint>,
    },
    /// A model that was removed from the configuration is no more.
    Forget {
        /// Which.
        model: ModelName,
        /// What happened to it since the start.
        history: History,
    },
    /// Read the model's files into the page cache, as far as there is memory to
    /// spare.
    Prefetch {
        /// Whose.
        model: ModelName,
        /// Why.
        reason: PrefetchReason,
    },
    /// Stop that: its worker is ready, or nobody waits any more.
    CallOff {
        /// Whose.
        model: ModelName,
    },
    /// Everything is gone; the shutdown is complete.
    Finished,
}

/// A copy of one gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Requests inside.
    pub inside: u32,
    /// When a request last left; the time of opening when none has.
    pub last_left: Timestamp,
    /// When a request last came in; the time of opening when none has.
    pub last_entered: Timestamp,
}

impl Activity {
    /// Returns what a gate shows that has just been opened.
    #[must_use]
    pub const fn opened(now: Timestamp) -> Self {
        Self {
            inside: 0,
            last_left: now,
            last_entered: now,
        }
    }
}

/// What one reading says, in the policy's terms.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// When workers were read; what ended earlier is not in it.
    pub at: Timestamp,
    /// When the GPUs' driver was asked.
    pub gpus_at: Timestamp,
    /// Size and headroom of each domain.
    pub domains: BTreeMap<Domain, DomainMeasure>,
    /// Each worker's memory in each domain.
    pub workers: BTreeMap<WorkerId, BTreeMap<Domain, Measure>>,
    /// Bytes of host RAM that the sum of all workers counts more than once.
    pub counted_twice: Bytes,
    /// The GPUs there are, by index.
    pub gpus: BTreeMap<u32, GpuFacts>,
}

/// What does not change about a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuFacts {
    /// The driver's UUID.
    pub uuid: String,
    /// It has no memory of its own: what it uses is the host's.
    pub unified: bool,
    /// Who made it: a worker is placed on GPUs of one vendor.
    pub vendor: GpuVendor,
}

/// One domain, measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainMeasure {
    /// Its size.
    pub total: Bytes,
    /// What physics still gives.
    pub headroom: Bytes,
}

/// One worker in one domain, measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Resident bytes: what counts against the limit.
    pub usage: Bytes,
    /// What only comes back when the worker ends.
    pub unreclaimable: Bytes,
}

/// What an operator's cleanup is to unload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanupOrder {
    /// Free at least this much.
    pub target: Option<Bytes>,
    /// Exactly these.
    pub models: Option<Vec<ModelName>>,
    /// Every idle one.
    pub all: bool,
    /// Also busy ones, after they drained, and pinned ones that are named.
    pub force: bool,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What a cleanup did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanupReport {
    /// Models unloaded (or, in a dry run, that would be), in that order.
    pub unloaded: Vec<ModelName>,
    /// Bytes of host RAM measured to be back; in a dry run, bytes expected.
    pub freed: Bytes,
    /// The same of all GPUs together.
    pub freed_vram: Bytes,
    /// Models that were named or idle and stay, with why.
    pub skipped: Vec<Skipped>,
    /// What is missing to the target, or to the end of pressure.
    pub shortfall: Bytes,
    /// The deadline passed before all bytes were back.
    pub timed_out: bool,
}

/// A model that a cleanup left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Which.
    pub model: ModelName,
    /// Why.
    pub why: Skip,
}
