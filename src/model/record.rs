//! What is kept of a live worker over the end of residentd.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{Bytes, Domain, Upstream, WorkerId};

/// Enough to find a worker again, to be sure that it is the same one, and to
/// go on with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerRecord {
    /// Which life of which model.
    pub worker: WorkerId,
    /// Its leader.
    pub pid: i32,
    /// When that started, in clock ticks since the machine came up.
    pub start_time: u64,
    /// Where its pid means something: the boot and the pid namespace.
    pub home: String,
    /// The mark in its environment.
    pub mark: String,
    /// The other mark, its limit on message queues, as far as it has one.
    pub stamp: Option<u64>,
    /// What it was started from; changes with the configuration.
    pub origin: String,
    /// Where it answers.
    pub upstream: Upstream,
    /// Where it takes gRPC, when that is elsewhere.
    pub grpc_upstream: Option<Upstream>,
    /// The port that was given to it.
    pub port: Option<u16>,
    /// The second one, for gRPC.
    pub grpc_port: Option<u16>,
    /// The socket that was given to it.
    pub socket: Option<PathBuf>,
    /// The socket to which it says that it is ready, when it is to say so.
    pub notify: Option<PathBuf>,
    /// The file in which it may report its own GPU memory.
    pub report: PathBuf,
    /// Where in its model's log its output begins.
    pub log_from: u64,
    /// UUIDs of the GPUs it is placed on.
    pub gpus: Vec<String>,
    /// It has answered.
    pub ready: bool,
    /// It was told to park and is not known to have its memory again.
    pub parked: bool,
    /// When it was used, as far as that was written.
    pub last_use: LastUse,
    /// The most it used so far, by domain.
    pub peak: BTreeMap<Domain, Bytes>,
}

/// When a worker was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastUse {
    /// Since when nobody used it, in microseconds of the machine's clock.
    pub idle_since: Option<u64>,
    /// It has answered requests.
    pub used: bool,
}
