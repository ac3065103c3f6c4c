//! One pass over everything that is measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;

use rustix::process::{Resource, getrlimit};

use super::attribution::{Attribution, Claim};
use super::births::Births;
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
    /// All parts of what changed, and who is new.
    Parts,
    /// All parts of everyone, whether we moved to another cgroup, and who shares
    /// what, again.
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
    births: Births,
    /// What the newest look at `/proc` showed.
    table: ProcessTable,
    trees: BTreeMap<WorkerId, Tree>,
    most_files: usize,
    /// What was made of the processes at the last pass.
    last: Summary,
    /// Workers whose proportional share somebody waits for.
    wanted: BTreeSet<WorkerId>,
    seq: u64,
    /// When workers were last read.
    workers_at: Timestamp,
    proc_failed: bool,
}

/// What the sizes of all processes come to. Making it looks at every mapping
/// that is known, so it is kept while no size changes and nobody writes to pages
/// that a fork shares.
#[derive(Clone, Debug, Default)]
struct Summary {
    members: Vec<Member>,
    usages: BTreeMap<WorkerId, Usage>,
    counted_twice: Bytes,
}

/// One worker's processes.
#[derive(Debug, Default)]
struct Tree {
    members: BTreeMap<ProcessKey, Process>,
    /// Resident when all parts were last read.
    rss: Bytes,
}

/// One process, and how to see cheaply whether it changed.
#[derive(Debug)]
struct Process {
    memory: ProcessMemory,
    /// Its sizes when all its parts were last read.
    sizes: Option<Sizes>,
    /// Its file of sizes: opening one anew each time costs twice as much.
    file: Option<File>,
}

/// What a look at the sizes of all known processes showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    None,
    Some,
    /// A process is gone or a tree moved much: all parts must be read.
    Much,
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
            births: Births::new(),
            table: ProcessTable::default(),
            trees: BTreeMap::new(),
            most_files: most_files(),
            last: Summary::default(),
            wanted: BTreeSet::new(),
            seq: 0,
            workers_at: Timestamp::START,
            proc_failed: false,
        }
    }

    /// Looks at the proportional shares of these workers as soon as may be.
    pub(super) fn weigh(&mut self, workers: BTreeSet<WorkerId>) {
        self.wanted.extend(workers);
    }

    /// Takes one reading, as deep as was asked or as turns out to be needed, and
    /// returns it with that depth. What is read is newer than the call.
    pub(super) fn observe(&mut self, depth: Depth, followed: &Followed) -> (Reading, Depth) {
        let at = self.clock.now();
        if depth == Depth::Full {
            self.host.relocate();
        }
        self.trees.retain(|worker, _| followed.contains_key(worker));
        let unknown = followed.len() > self.trees.len();
        let change = match depth {
            Depth::Sizes => self.read_sizes(),
            Depth::Host => Change::None,
            Depth::Parts | Depth::Full => Change::Much,
        };
        // Somebody may wait for this pass because a worker is gone: what only explains
        // is left for the next one.
        let explains = depth >= Depth::Parts;
        let depth = if unknown || change == Change::Much {
            depth.max(Depth::Parts)
        } else {
            depth
        };
        if depth > Depth::Sizes {
            self.read_parts(followed, depth);
        }
        if depth > Depth::Host {
            if !self.proc_failed {
                self.workers_at = at;
            }
            self.summarise(at, depth, change);
            self.sweep_gpus(at, depth);
        } else {
            let trees = &self.trees;
            let followed = |worker: &WorkerId, _: &mut Usage| trees.contains_key(worker);
            self.last.usages.retain(followed);
        }
        let sweep = self.sweep.clone();
        self.seq += 1;
        let mut workers = self.last.usages.clone();
        self.list_vram(&sweep, &mut workers);
        self.attribute(at, &sweep.devices, followed, &mut workers);
        // After the workers: what they took in between counts twice rather than
        // not at all.
        let host = self.host.read(explains);
        let reading = Reading {
            seq: self.seq,
            at,
            workers_at: self.workers_at,
            devices_at: sweep.at,
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
    fn sweep_gpus(&mut self, at: Timestamp, depth: Depth) {
        let mut sweep = self.gpus.sweep(at);
        if sweep.devices.is_empty() {
            // Nothing of it is old.
            sweep.at = at;
        }
        if depth == Depth::Full {
            self.drm.relocate();
        }
        if !self.drm.is_empty() {
            let first = u32::try_from(sweep.devices.len()).unwrap_or(u32::MAX);
            if depth >= Depth::Parts {
                let members = self.last.members.iter();
                let pids = members.map(|m| m.process.pid).collect();
                self.drm_rows = self.drm.rows(first, &pids);
            }
            sweep.devices.extend(self.drm.devices(first));
            sweep.rows.extend(&self.drm_rows);
        }
        self.sweep = sweep;
    }

    /// Fills in what the drivers list by process.
    fn list_vram(&self, sweep: &Sweep, workers: &mut BTreeMap<WorkerId, Usage>) {
        if sweep.rows.is_empty() {
            return;
        }
        let members = &self.last.members;
        let known: BTreeSet<i32> = members.iter().map(|m| m.process.pid).collect();
        let vram = Vram::new(&sweep.rows, |pid| {
            vram::identify(pid, &known, self.host_proc.as_deref())
        });
        for tree in members.chunk_by(|a, b| a.worker == b.worker) {
            if let Some(usage) = workers.get_mut(&tree[0].worker) {
                usage.vram = vram.of_tree(tree.iter().map(|member| member.process.pid));
            }
        }
    }

    /// Fills in what processes do not tell of GPUs.
    fn attribute(
        &mut self,
        at: Timestamp,
        devices: &[DeviceReading],
        followed: &Followed,
        workers: &mut BTreeMap<WorkerId, Usage>,
    ) {
        // Most machines without a GPU have many workers and nobody to ask about.
        let claims = followed.iter().filter_map(|(worker, subject)| {
            let told = workers.get(worker)?.vram.clone();
            let is_on_gpus = !subject.gpus.is_empty() || !told.is_empty();
            is_on_gpus.then_some(Claim {
                worker,
                gpus: &subject.gpus,
                loading: subject.loading,
                told,
                report: subject.report.as_deref(),
                held: subject.held.as_ref(),
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

    /// Brings the sizes of known processes up to date.
    fn read_sizes(&mut self) -> Change {
        let mut change = Change::None;
        for tree in self.trees.values_mut() {
            for (key, process) in &mut tree.members {
                let Some(sizes) = process.read_sizes(key.pid) else {
                    return Change::Much;
                };
                let memory = process.memory.with_sizes(sizes);
                if memory != process.memory {
                    process.memory = memory;
                    change = Change::Some;
                }
            }
            if change != Change::None && usage::moved_much(tree.rss, tree.rss_now()) {
                return Change::Much;
            }
        }
        change
    }

    /// Looks for new processes and reads the parts of each that may have moved;
    /// at a full check those of all.
    fn read_parts(&mut self, followed: &Followed, depth: Depth) {
        if followed.is_empty() {
            return;
        }
        let table = match depth {
            Depth::Full => Some(ProcessTable::scan()),
            Depth::Host | Depth::Sizes | Depth::Parts => {
                let due = self.births.are_due(self.clock.now());
                due.then(|| self.table.rescan())
            }
        };
        match table {
            // Nobody is new, and who is gone shows when it is read.
            None => {}
            Some(Ok(table)) => self.table = table,
            Some(Err(error)) => {
                if !self.proc_failed {
                    tracing::error!(%error, "cannot list processes; keeping the last figures");
                }
                self.proc_failed = true;
                return;
            }
        }
        self.proc_failed = false;
        let open = self.trees.values().flat_map(|tree| tree.members.values());
        let open = open.filter(|process| process.file.is_some()).count();
        let mut may_open = self.most_files.saturating_sub(open);
        for (worker, subject) in followed {
            let mut known = self.trees.remove(worker).unwrap_or_default();
            let all = depth == Depth::Full || subject.loading;
            let members = subject.tree.refresh(&self.table).into_iter();
            let read = members.filter_map(|key| {
                let process = match known.members.remove(&key) {
                    Some(process) => process.look_again(key.pid, all)?,
                    None => Process::find(key.pid, &mut may_open)?,
                };
                Some((key, process))
            });
            let mut tree = Tree {
                members: read.collect(),
                rss: Bytes::ZERO,
            };
            tree.rss = tree.rss_now();
            self.trees.insert(worker.clone(), tree);
        }
    }

    /// Returns every process, the ones of a worker side by side.
    fn members(&self) -> Vec<Member> {
        let mut members = Vec::new();
        for (worker, tree) in &self.trees {
            members.extend(tree.members.iter().map(|(key, process)| {
                Member {
                    worker: worker.clone(),
                    process: *key,
                    memory: process.memory,
                    faults: (self.sharing.watches_faults(key))
                        .then(|| usage::minor_faults(key.pid))
                        .flatten(),
                }
            }));
        }
        members
    }

    /// Brings the summary up to date, and lets the walker look for what is
    /// shared. Nothing of that can have changed while no size did and nobody
    /// writes to pages that a fork shares.
    fn summarise(&mut self, at: Timestamp, depth: Depth, change: Change) {
        let finds = self.walker.collect();
        let known = |tree: &[Member]| self.trees.contains_key(&tree[0].worker);
        let mut trees = self.last.members.chunk_by(|a, b| a.worker == b.worker);
        let unchanged = change == Change::None
            && depth == Depth::Sizes
            && finds.is_empty()
            && self.wanted.is_empty()
            && self.last.usages.len() == self.trees.len()
            && trees.all(known)
            && !self.last.members.iter().any(|m| m.faults.is_some());
        if unchanged {
            return;
        }
        let members = self.members();
        self.sharing.learn(at, &members, finds);
        if self.walker.is_idle() {
            let recheck = depth == Depth::Full;
            let list = self.sharing.plan(at, &members, recheck, &self.wanted);
            self.walker.look(list);
            self.wanted.clear();
        }
        self.last = Summary {
            usages: self.usages(&members),
            counted_twice: self.sharing.counted_twice(&members),
            members,
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
        let members = self.members.values();
        members.map(|process| process.memory.rss()).sum()
    }
}

impl Process {
    /// Reads a process that was not known; `None` when it is gone already.
    fn find(pid: i32, may_open: &mut usize) -> Option<Self> {
        let mut process = Self {
            memory: ProcessMemory::default(),
            sizes: None,
            file: None,
        };
        if *may_open > 0 {
            process.file = Sizes::open(pid);
            *may_open -= 1;
        }
        process.look_again(pid, true)
    }

    /// Reads all parts, but for those of a process whose sizes are what they
    /// were: then nothing moved, unless it holds what sizes do not show.
    /// `None` when the process is gone.
    fn look_again(mut self, pid: i32, all: bool) -> Option<Self> {
        // Before the parts: what moves in between is then seen the next time.
        let sizes = self.read_sizes(pid);
        let hidden = self.memory.hugetlb + self.memory.locked > Bytes::ZERO;
        if all || hidden || sizes.is_none() || sizes != self.sizes {
            self.memory = ProcessMemory::read(pid)?;
            self.sizes = sizes;
        }
        Some(self)
    }

    fn read_sizes(&self, pid: i32) -> Option<Sizes> {
        match &self.file {
            Some(file) => Sizes::read(file),
            None => Sizes::read(&Sizes::open(pid)?),
        }
    }
}
