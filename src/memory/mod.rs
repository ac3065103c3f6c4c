//! Measures: the process tree of every worker, the host and its cgroups, the
//! GPUs. Owns the instruments; decides nothing.
//!
//! The sampler runs on its own threads because the instruments block. It
//! publishes the newest [`Reading`] on a `watch` channel; nobody waits for it.
//!
//! ```text
//! sampler ── thread: orders, publishing ── wake (thread): pressure, events
//!    ├ rounds     when to look at what
//!    └ observer ── one pass ─┬ host ── cgroup, psi, oom ── kept (files)
//!                            ├ usage      statm and status of each process
//!                            ├ sharing ── walker (thread) ── maps
//!                            ├ vram ───── nvml   (thread), drm
//!                            └ attribution   what processes do not tell
//! ```

mod attribution;
mod births;
mod cgroup;
mod drm;
mod host;
mod kept;
mod maps;
mod nvml;
mod observer;
mod oom;
mod psi;
mod rounds;
mod sampler;
mod sharing;
mod stay;
mod usage;
mod vram;
mod wake;
mod walker;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

pub use oom::{Killer, OomCounters, OomWatch};
pub use sampler::{Sampler, SamplerSettings};
pub use stay::{spare_from_oom, stay_in_memory};
use tokio::sync::watch;

use crate::clock::Timestamp;
use crate::model::{Bytes, GpuVendor, WorkerId};
use crate::procfs::ProcessTree;

/// Where readings come from. The seam along which tests put a fake and a
/// worker host in another container will plug in.
pub trait MemorySource: fmt::Debug + Send + Sync + 'static {
    /// Measures this worker from now on.
    fn follow(&self, worker: WorkerId, subject: Subject);
    /// Notes that a worker has loaded: what its devices use more than before
    /// is its own.
    fn loaded(&self, worker: &WorkerId);
    /// The worker's memory moves, because it is parked or unparked: it is looked
    /// at as one that loads until it is `loaded` again.
    fn moves(&self, worker: &WorkerId);
    /// Stops measuring it, since it is gone, and asks for a reading at once that
    /// shows what came back; it is taken after this call.
    fn forget(&self, worker: &WorkerId);
    /// Asks for the proportional share of a worker, which is not read by itself
    /// once it is known: reading it stalls the worker.
    fn weigh(&self, worker: &WorkerId);
    /// Asks for a reading at once; it is taken after this call.
    fn sample_now(&self);
    /// Sets how often readings are taken.
    fn pace(&self, pace: Pace);
    /// Reads the kernel's counts of its OOM kills at once.
    fn oom_counters(&self) -> OomCounters;
    /// Returns the channel that holds the newest reading.
    fn readings(&self) -> watch::Receiver<Arc<Reading>>;
}

/// What is measured of one worker.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its processes.
    pub tree: Arc<ProcessTree>,
    /// The GPUs it was placed on, by index.
    pub gpus: Vec<u32>,
    /// The file in which it may report its own GPU memory.
    pub report: Option<PathBuf>,
    /// It has not answered yet.
    pub loading: bool,
    /// What an earlier residentd knew it to hold of each device; absent for a
    /// worker that we spawned, whose load we can watch.
    pub held: Option<BTreeMap<u32, Bytes>>,
}

impl Subject {
    /// Returns a worker of which nothing but its processes is known.
    #[must_use]
    pub fn of(tree: Arc<ProcessTree>) -> Self {
        Self {
            tree,
            gpus: Vec::new(),
            report: None,
            loading: false,
            held: None,
        }
    }
}

/// How often readings are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// Nothing is happening: sizes each second, parts and new descendants
    /// every 5 s, a full check each `check_interval`.
    #[default]
    Calm,
    /// So little headroom is left that it could be gone within a second: the
    /// host every 100 ms, the rest as when calm.
    Watchful,
    /// Something loads or dies, or headroom shrinks: every 100 ms.
    Busy,
}

/// Everything measured in one pass.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Counts the readings of this process, from 1; 0 is "none yet".
    pub seq: u64,
    /// When the pass began. What ended before this moment is not in it.
    pub at: Timestamp,
    /// When workers were last read; some passes look at the host only. What they
    /// hold is not older than this.
    pub workers_at: Timestamp,
    /// When the GPUs were. A driver that is slow to answer has last been asked
    /// before.
    pub devices_at: Timestamp,
    /// The host or container.
    pub host: HostReading,
    /// Each followed worker's tree.
    pub workers: BTreeMap<WorkerId, Usage>,
    /// Bytes that the sum of the workers' `rss` counts more than once, because
    /// several workers map the same pages.
    pub counted_twice: Bytes,
    /// GPUs and MIG instances; empty without a driver.
    pub devices: Vec<DeviceReading>,
    /// What is wrong with the GPU driver, when it is there but does not answer.
    pub device_error: Option<String>,
}

impl Reading {
    /// Returns what all workers hold of host RAM, each shared page counted
    /// once.
    #[must_use]
    pub fn total_rss(&self) -> Bytes {
        self.workers.values().map(Usage::resident).sum::<Bytes>() - self.counted_twice
    }

    /// Returns what workers are known to hold of a device.
    #[must_use]
    pub fn attributed(&self, device: u32) -> Bytes {
        let vram = self.workers.values().flat_map(|usage| &usage.vram);
        let here = vram.filter(|vram| vram.device == device);
        here.filter_map(|vram| vram.bytes).sum()
    }

    /// Returns what is in use of a device and known to be no worker's.
    #[must_use]
    pub fn unattributed(&self, device: &DeviceReading) -> Option<Bytes> {
        Some(device.used? - self.attributed(device.index))
    }
}

/// What one worker's process tree holds.
///
/// Sums over the tree of `/proc/<pid>/status`; pages that several processes of
/// the tree map are counted once where that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processes in the tree; 0 when it is gone.
    pub processes: u32,
    /// `RssAnon + RssFile + RssShmem`.
    pub rss: Bytes,
    /// Anonymous pages: heap, stacks, copied weights.
    pub anon: Bytes,
    /// Mapped file pages, most of them weights; the kernel can drop them.
    pub file: Bytes,
    /// Shared memory.
    pub shmem: Bytes,
    /// Swapped out.
    pub swap: Bytes,
    /// Huge pages from the reserved pool; not part of `rss`.
    pub hugetlb: Bytes,
    /// Locked into memory.
    pub locked: Bytes,
    /// Proportional share by `smaps_rollup`, at the time of `pss_at`.
    pub pss: Option<Bytes>,
    /// When `pss` was read.
    pub pss_at: Option<Timestamp>,
    /// GPU memory by device, with where the number comes from.
    pub vram: Vec<VramUsage>,
    /// The part of `vram` that is host RAM, on devices without memory of their
    /// own: in no process' resident memory, and only given back by its end.
    pub unified: Bytes,
}

impl Usage {
    /// Returns what the kernel cannot take back without killing or swapping:
    /// `anon + shmem + swap + hugetlb + min(locked, file)`, and what a GPU
    /// without memory of its own holds.
    #[must_use]
    pub fn unreclaimable(&self) -> Bytes {
        let pages = self.anon + self.shmem + self.swap + self.hugetlb;
        pages + self.locked.min(self.file) + self.unified
    }

    /// Returns what the worker holds of host RAM: resident memory, and what a
    /// GPU without memory of its own holds for it.
    #[must_use]
    pub fn resident(&self) -> Bytes {
        self.rss + self.unified
    }
}

/// One worker's memory on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VramUsage {
    /// Index of the device in [`Reading::devices`]' order, as in `gpu:<index>`.
    pub device: u32,
    /// Bytes held; `None` is unknown, never zero.
    pub bytes: Option<Bytes>,
    /// Where the number comes from.
    pub source: VramSource,
    /// The number is what the device used more, and something else was seen to
    /// use the device as well: it may be off by that.
    pub tainted: bool,
}

/// Where a worker's VRAM figure comes from, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum VramSource {
    /// NVML's process list, by pid.
    NvmlProcess,
    /// The kernel's `fdinfo` of the process' open render nodes.
    DrmFdinfo,
    /// The AMD compute driver's own list.
    Kfd,
    /// What the device used more once the worker had loaded than before.
    DeviceDelta,
    /// The worker's own report.
    WorkerReport,
    /// Nobody tells.
    Unknown,
}

impl VramSource {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NvmlProcess => "nvml_pid",
            Self::DrmFdinfo => "drm_fdinfo",
            Self::Kfd => "kfd",
            Self::DeviceDelta => "device_delta",
            Self::WorkerReport => "worker_report",
            Self::Unknown => "unknown",
        }
    }
}

/// The host, or the container when a cgroup limits it.
#[derive(Clone, Debug, Default)]
pub struct HostReading {
    /// `MemTotal`.
    pub total: Bytes,
    /// `MemAvailable`.
    pub available: Bytes,
    /// `SwapTotal`.
    pub swap_total: Bytes,
    /// `SwapFree`.
    pub swap_free: Bytes,
    /// What physics still gives: the least of `MemAvailable` and the margin of
    /// every visible cgroup ancestor.
    pub headroom: Bytes,
    /// The cgroup that limits us most, when one does.
    pub cgroup: Option<CgroupReading>,
    /// Memory pressure stall information, when the kernel offers it.
    pub psi: Option<PsiReading>,
    /// How often the kernel's OOM killer has struck.
    pub oom: OomCounters,
}

impl HostReading {
    /// Returns the size of the domain: the smaller of the host's memory and
    /// the cgroup's limit.
    #[must_use]
    pub fn domain_total(&self) -> Bytes {
        match self.cgroup.as_ref().and_then(|c| c.limit) {
            Some(limit) => limit.min(self.total),
            None => self.total,
        }
    }
}

/// The tightest memory cgroup above us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupReading {
    /// 1 or 2.
    pub version: u8,
    /// Its path below the mount.
    pub path: String,
    /// `memory.limit_in_bytes`, or the smaller of `memory.max` and
    /// `memory.high`; absent when there is no limit.
    pub limit: Option<Bytes>,
    /// `memory.current` or `memory.usage_in_bytes`.
    pub current: Bytes,
    /// Current less what can be dropped at once: active and inactive file
    /// pages that need no writing, and reclaimable slab.
    pub working_set: Bytes,
}

/// `/proc/pressure/memory`, averages in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PsiReading {
    /// Share of the last 10 s in which some task waited for memory.
    pub some_avg10: f64,
    /// Over 60 s.
    pub some_avg60: f64,
    /// Share of the last 10 s in which all tasks waited.
    pub full_avg10: f64,
    /// Over 60 s.
    pub full_avg60: f64,
}

/// One GPU or MIG instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReading {
    /// Index, as in `gpu:<index>`.
    pub index: u32,
    /// The driver's UUID.
    pub uuid: String,
    /// The product's name.
    pub name: String,
    /// Size of its memory.
    pub total: Option<Bytes>,
    /// In use, by anyone.
    pub used: Option<Bytes>,
    /// Not in use.
    pub free: Option<Bytes>,
    /// Who made it.
    pub vendor: GpuVendor,
    /// It has no memory of its own: what it uses is the host's.
    pub unified: bool,
    /// Where the numbers come from: `nvml`, or the kernel driver's name.
    pub source: &'static str,
}
