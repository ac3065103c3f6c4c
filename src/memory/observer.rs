//! One pass over everything that is measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;

use rustix::process::{Resource, getrlimit};

use super::attribution::{Attribution, Claim};
use super::drm::Drm;
use super::host::Host;
use super::nvml::{Gpus, Sweep};
use super::sharing::{Member, Sharing};
use super::usage::{self, ProcessMemory, Sizes};
use super::vram::{self, Row, Vram};
use super::walker::Walker;
use super::{DeviceReading, Reading, Subject, Usage};
use crate::clock::{Clock, Timestamp};
use crate::model::{Bytes, WorkerId};
use crate::procfs::{ProcessKey, ProcessTable};

/// The workers to measure.
pub(super) type Followed = BTreeMap<WorkerId, Subject>;

/// How much a pass looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Depth {
    /// The host alone; workers and devices as they were last measured.
    Host,
    /// The sizes of processes that are known; all parts when they moved much.
    Sizes,
    /// All parts, and who is new.
    Parts,
    /// Also whether we moved to another cgroup, and who shares what, again.
    Full,
}

/// Takes readings. Owns the instruments and what was learned before.
#[derive(Debug)]
pub(super) struct Observer {
    clock: Clock,
    host: Host,
    gpus: Gpus,
    drm: Drm,
    drm_rows: Vec<Row>,
    /// What the GPUs said last.
    sweep: Sweep,
    walker: Walker,
    sharing: Sharing,
    attribution: Attribution,
    host_proc: Option<PathBuf>,
    trees: BTreeMap<WorkerId, Tree>,
    /// Open files of sizes: reading one anew each time costs twice as much.
    files: BTreeMap<ProcessKey, File>,
    most_files: usize,
    /// What was made of the processes at the last pass.
    last: Summary,
    /// Workers whose proportional share somebody waits for.
    wanted: BTreeSet<WorkerId>,
    seq: u64,
    proc_failed: bool,
}

/// What the sizes of all processes come to. Making it looks at every mapping
/// that is known, so it is kept while no size changes and nobody writes to pages
/// that a fork shares.
#[derive(Clone, Debug, Default)]
struct Summary {
    members: Vec<(ProcessKey, ProcessMemory, Option<u64>)>,
    usages: BTreeMap<WorkerId, Usage>,
    counted_twice: Bytes,
}

/// One worker's processes.
#[derive(Debug, Default)]
struct Tree {
    members: BTreeMap<ProcessKey, ProcessMemory>,
    /// Resident when all parts were last read.
    rss: Bytes,
}

impl Observer {
    pub(super) fn new(
        clock: Clock,
        host: Host,
        (gpus, drm): (Gpus, Drm),
        walker: Walker,
        host_proc: Option<PathBuf>,
    ) -> Self {
        Self {
            clock,
            host,
            gpus,
            drm,
            drm_rows: Vec::new(),
            sweep: Sweep::default(),
            walker,
            sharing: Sharing::default(),
            attribution: Attribution::default(),
            host_proc,
            trees: BTreeMap::new(),
            files: BTreeMap::new(),
            most_files: most_files(),
            last: Summary::default(),
            wanted: BTreeSet::new(),
            seq: 0,
            proc_failed: false,
        }
    }

    /// Looks at the proportional shares of these workers as soon as may be.
    pub(super) fn weigh(&mut self, workers: BTreeSet<WorkerId>) {
        self.wanted.extend(workers);
    }

    /// Takes one reading. Everything in it is newer than the call. Returns it
    /// with the depth that turned out to be needed.
    pub(super) fn observe(&mut self, depth: Depth, followed: &Followed) -> (Reading, Depth) {
        let at = self.clock.now();
        if depth == Depth::Full {
            self.host.relocate();
        }
        self.trees.retain(|worker, _| followed.contains_key(worker));
        let unknown = followed.len() > self.trees.len();
        let grown = depth == Depth::Sizes && self.read_sizes();
        let depth = if depth <= Depth::Sizes && (unknown || grown) {
            Depth::Parts
        } else {
            depth
        };
        if depth > Depth::Sizes {
            self.read_parts(followed);
        }
        let members = self.members();
        if depth > Depth::Host {
            self.summarise(at, &members, depth);
            self.sweep_gpus(at, &members, depth);
        } else {
            let followed = |worker: &WorkerId, _: &mut Usage| self.trees.contains_key(worker);
            self.last.usages.retain(followed);
        }
        let sweep = self.sweep.clone();
        let known: BTreeSet<i32> = members.iter().map(|m| m.process.pid).collect();
        let host_proc = self.host_proc.clone();
        let vram = Vram::new(&sweep.rows, |pid| {
            vram::identify(pid, &known, host_proc.as_deref())
        });
        self.seq += 1;
        let mut workers = self.last.usages.clone();
        for tree in members.chunk_by(|a, b| a.worker == b.worker) {
            if let Some(usage) = workers.get_mut(&tree[0].worker) {
                usage.vram = vram.of_tree(tree.iter().map(|member| member.process.pid));
            }
        }
        self.attribute(at, &sweep.devices, followed, &mut workers);
        // After the workers: what they took in between counts twice rather than
        // not at all.
        let host = self.host.read(depth >= Depth::Parts);
        let reading = Reading {
            seq: self.seq,
            at,
            host,
            workers,
            counted_twice: self.last.counted_twice,
            devices: sweep.devices,
            device_error: sweep.error,
        };
        (reading, depth)
    }

    /// Reads all GPUs: NVIDIA's first, then those of the kernel's own drivers.
    /// Whose memory is whose takes looking at every open file there, so that is
    /// done with the parts only.
    fn sweep_gpus(&mut self, at: Timestamp, members: &[Member], depth: Depth) {
        let mut sweep = self.gpus.sweep(at);
        if depth == Depth::Full {
            self.drm.relocate();
        }
        if !self.drm.is_empty() {
            let first = u32::try_from(sweep.devices.len()).unwrap_or(u32::MAX);
            if depth >= Depth::Parts {
                let pids = members.iter().map(|m| m.process.pid).collect();
                self.drm_rows = self.drm.rows(first, &pids);
            }
            sweep.devices.extend(self.drm.devices(first));
            sweep.rows.extend(&self.drm_rows);
        }
        self.sweep = sweep;
    }

    /// Fills in what processes do not tell of GPUs.
    fn attribute(
        &mut self,
        at: Timestamp,
        devices: &[DeviceReading],
        followed: &Followed,
        workers: &mut BTreeMap<WorkerId, Usage>,
    ) {
        let claims = followed.iter().filter_map(|(worker, subject)| {
            Some(Claim {
                worker,
                gpus: &subject.gpus,
                loading: subject.loading,
                told: workers.get(worker)?.vram.clone(),
                report: subject.report.as_deref(),
            })
        });
        let claims = claims.collect();
        for (worker, vram) in self.attribution.attribute(at, devices, claims) {
            let Some(usage) = workers.get_mut(&worker) else {
                continue;
            };
            let unified = vram.iter().filter(|vram| {
                let mut devices = devices.iter();
                devices.any(|device| device.unified && device.index == vram.device)
            });
            usage.unified = unified.filter_map(|vram| vram.bytes).sum();
            usage.vram = vram;
        }
    }

    /// Brings the sizes of known processes up to date. Returns whether all
    /// parts must be read: a process is gone or a tree moved much.
    fn read_sizes(&mut self) -> bool {
        for tree in self.trees.values_mut() {
            for (process, memory) in &mut tree.members {
                let sizes = match self.files.get(process) {
                    Some(file) => Sizes::read(file),
                    None => Sizes::open(process.pid).and_then(|file| {
                        let sizes = Sizes::read(&file);
                        if self.files.len() < self.most_files {
                            self.files.insert(*process, file);
                        }
                        sizes
                    }),
                };
                match sizes {
                    Some(sizes) => *memory = memory.with_sizes(sizes),
                    None => return true,
                }
            }
            if usage::moved_much(tree.rss, tree.rss_now()) {
                return true;
            }
        }
        false
    }

    /// Looks for new processes and reads all parts of each.
    fn read_parts(&mut self, followed: &Followed) {
        if followed.is_empty() {
            return;
        }
        let table = match ProcessTable::scan() {
            Ok(table) => table,
            Err(error) => {
                if !self.proc_failed {
                    tracing::error!(%error, "cannot list processes; keeping the last figures");
                }
                self.proc_failed = true;
                return;
            }
        };
        self.proc_failed = false;
        for (worker, subject) in followed {
            let members = subject
                .tree
                .refresh(&table)
                .into_iter()
                .filter_map(|process| Some((process, ProcessMemory::read(process.pid)?)))
                .collect();
            let mut tree = Tree {
                members,
                rss: Bytes::ZERO,
            };
            tree.rss = tree.rss_now();
            self.trees.insert(worker.clone(), tree);
        }
        let trees = self.trees.values();
        let living: BTreeSet<_> = trees.flat_map(|tree| tree.members.keys()).collect();
        self.files.retain(|process, _| living.contains(process));
    }

    /// Returns every process, the ones of a worker side by side.
    fn members(&self) -> Vec<Member> {
        let mut members = Vec::new();
        for (worker, tree) in &self.trees {
            members.extend(tree.members.iter().map(|(process, memory)| {
                Member {
                    worker: worker.clone(),
                    process: *process,
                    memory: *memory,
                    faults: (self.sharing.watches_faults(process))
                        .then(|| usage::minor_faults(process.pid))
                        .flatten(),
                }
            }));
        }
        members
    }

    /// Brings the summary up to date, and lets the walker look for what is
    /// shared. Nothing of that can have changed while no size did.
    fn summarise(&mut self, at: Timestamp, members: &[Member], depth: Depth) {
        let finds = self.walker.collect();
        let sizes = || members.iter().map(|m| (m.process, m.memory, m.faults));
        let unchanged = finds.is_empty() && self.last.members.iter().copied().eq(sizes());
        if unchanged && depth == Depth::Sizes && self.wanted.is_empty() {
            return;
        }
        self.sharing.learn(at, members, finds);
        if self.walker.is_idle() {
            let recheck = depth == Depth::Full;
            let list = self.sharing.plan(at, members, recheck, &self.wanted);
            self.walker.look(list);
            self.wanted.clear();
        }
        self.last = Summary {
            members: sizes().collect(),
            usages: self.usages(members),
            counted_twice: self.sharing.counted_twice(members),
        };
    }

    fn usages(&self, members: &[Member]) -> BTreeMap<WorkerId, Usage> {
        // A tree without any process left is still followed: it is empty.
        let mut usages: BTreeMap<_, _> = self
            .trees
            .keys()
            .map(|worker| (worker.clone(), Usage::default()))
            .collect();
        for tree in members.chunk_by(|a, b| a.worker == b.worker) {
            let mut usage = usage::sum(tree.iter().map(|member| &member.memory));
            self.sharing.correct(&mut usage, tree);
            usages.insert(tree[0].worker.clone(), usage);
        }
        usages
    }
}

/// Returns how many files may be kept open: a part of what this process may
/// open at all.
fn most_files() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 4).unwrap_or(usize::MAX).min(4096)
}

impl Tree {
    fn rss_now(&self) -> Bytes {
        self.members.values().map(ProcessMemory::rss).sum()
    }
}
