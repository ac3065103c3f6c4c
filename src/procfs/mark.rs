//! A mark on every worker, so that a process can be told to be a worker's
//! whoever its parent has become.
//!
//! A daemon that forks twice and leads a session of its own re-parents to us
//! and has nothing in common with its worker but what it inherited. Two things
//! are inherited that nobody else needs:
//!
//! - a variable of the environment, `proc_pid_environ(5)`: says whose worker it
//!   is, also to a later residentd. Whoever renames itself wipes it.
//! - the limit on POSIX message queues, `RLIMIT_MSGQUEUE` in `getrlimit(2)`: a
//!   few bytes lower for each worker, so that the number itself is the mark. It
//!   stays, whatever a process does to its memory, files and session.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, io};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::{ProcessKey, ProcessStat, ProcessTable};
use crate::model::WorkerId;

/// The variable that holds the mark.
pub const VARIABLE: &str = "RESIDENTD_WORKER";

/// Which residentd a worker belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The state database's own name: one residentd at a time can hold it.
    pub state: String,
    /// The residentd that spawned the worker.
    pub process: ProcessKey,
}

impl Owner {
    /// Returns this process as the owner of workers under the state `state`.
    #[must_use]
    pub fn this_process(state: String) -> Self {
        let pid = i32::try_from(std::process::id()).unwrap_or_default();
        let start_time = ProcessStat::read(pid).map_or(0, |stat| stat.key.start_time);
        Self {
            state,
            process: ProcessKey { pid, start_time },
        }
    }

    /// Returns the value of [`VARIABLE`] for one worker.
    #[must_use]
    pub fn mark(&self, worker: &WorkerId) -> Mark {
        Mark(format!("{self} {worker}").into())
    }

    /// Reads the owner out of a mark.
    fn parse(mark: &Mark) -> Option<Self> {
        let mut words = mark.0.split(' ');
        let state = words.next()?.to_owned();
        let pid = words.next()?.parse().ok()?;
        let start_time = words.next()?.parse().ok()?;
        Some(Self {
            state,
            process: ProcessKey { pid, start_time },
        })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ProcessKey { pid, start_time } = self.process;
        write!(f, "{} {pid} {start_time}", self.state)
    }
}

/// The value of [`VARIABLE`]: the same for all processes of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mark(Arc<str>);

impl Mark {
    /// Returns the text for the environment.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the mark that was written down as `text`.
    #[must_use]
    pub fn kept(text: &str) -> Self {
        Self(text.into())
    }

    /// Reads the mark of a process; `None` when it has none, or when its
    /// environment may not be read.
    #[must_use]
    pub fn read(pid: i32) -> Option<Self> {
        let environment = super::read(format!("/proc/{pid}/environ")).ok()?;
        Self::find(&environment)
    }

    fn find(environment: &[u8]) -> Option<Self> {
        environment.split(|byte| *byte == 0).find_map(|entry| {
            let value = std::str::from_utf8(entry)
                .ok()?
                .strip_prefix(VARIABLE)?
                .strip_prefix('=')?;
            Some(Self(value.into()))
        })
    }
}

/// Marks of orphans. Shared by all trees, since each asks about the same
/// orphans.
#[derive(Debug)]
pub struct Marks {
    /// Orphans of workers that we spawned become children of this process.
    guardian: i32,
    seen: Mutex<Seen>,
    stamps: Mutex<Stamps>,
    stamped: AtomicU64,
}

/// Whose limit on message queues is how high.
#[derive(Debug, Default)]
struct Stamps {
    marks: BTreeMap<u64, Mark>,
    /// Those of workers that an earlier residentd spawned: not given again.
    taken: BTreeSet<u64>,
    /// Orphans of such workers become children of these: of whoever is next
    /// above us that takes orphans, mostly process 1.
    guardians: BTreeSet<i32>,
}

/// Marks of orphans, as of one table.
#[derive(Debug, Default)]
struct Seen {
    order: u64,
    /// How often a child of another guardian was looked at in vain.
    in_vain: BTreeMap<ProcessKey, u8>,
    marks: BTreeMap<ProcessKey, Mark>,
    carriers: HashMap<Mark, Vec<i32>>,
}

/// What a limit is lowered from where there is none: the kernel's default.
const QUEUE_BYTES: u64 = 819_200;
/// Stamps are told apart among so many workers.
const STAMPS: u64 = 1 << 16;
/// Looks at a child of another guardian before it counts as a stranger: one may
/// meet the middle of an exec.
const LOOKS: u8 = 3;

impl Marks {
    /// Returns marks of the orphans that come to this process.
    #[must_use]
    pub fn new(guardian: i32) -> Self {
        Self {
            guardian,
            seen: Mutex::default(),
            stamps: Mutex::default(),
            stamped: AtomicU64::new(0),
        }
    }

    /// Stamps a process that was just spawned, and so all it will ever start.
    ///
    /// # Errors
    /// When its limits cannot be changed, or leave no room for a stamp.
    pub fn stamp(&self, pid: i32, mark: &Mark) -> io::Result<u64> {
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let own = getrlimit(Resource::Msgqueue).maximum.unwrap_or(QUEUE_BYTES);
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        let height = loop {
            let nth = self.stamped.fetch_add(1, Ordering::Relaxed) % STAMPS;
            let height = own.checked_sub(nth + 1).ok_or(io::ErrorKind::Unsupported)?;
            if !stamps.taken.contains(&height) {
                break height;
            }
        };
        let limit = Rlimit {
            current: Some(height),
            maximum: Some(height),
        };
        prlimit(Some(pid), Resource::Msgqueue, limit)?;
        stamps.marks.insert(height, mark.clone());
        Ok(height)
    }

    /// Takes in the mark and stamp of a worker that an earlier residentd
    /// spawned, whose leader is a child of `guardian` now. Returns those of its
    /// processes that are found by them.
    pub fn resume(
        &self,
        (mark, stamp): (&Mark, Option<u64>),
        guardian: i32,
        table: &ProcessTable,
    ) -> Vec<ProcessKey> {
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        stamps.guardians.insert(guardian);
        if let Some(height) = stamp {
            stamps.marks.insert(height, mark.clone());
            stamps.taken.insert(height);
        }
        drop(stamps);
        let carries = |pid| Mark::read(pid).as_ref() == Some(mark);
        // A stamp without a mark counts only among orphans: workers of another
        // residentd may have the same.
        let orphans = table.children(guardian).filter_map(|pid| table.get(pid));
        let stamped = orphans.filter(|stat| self.find(stat.key.pid).as_ref() == Some(mark));
        let marked = table.iter().filter(|stat| carries(stat.key.pid));
        marked.chain(stamped).map(|stat| stat.key).collect()
    }

    /// Returns whose the process is, by its environment or by its stamp.
    fn find(&self, pid: i32) -> Option<Mark> {
        Mark::read(pid).or_else(|| {
            let height = queue_limit(Path::new(&format!("/proc/{pid}/limits")))?;
            let stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
            stamps.marks.get(&height).cloned()
        })
    }

    /// Returns the orphans in `table` that carry this mark.
    pub(super) fn carriers(&self, mark: &Mark, table: &ProcessTable) -> Vec<i32> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.order != table.order {
            self.look(&mut seen, table);
        }
        seen.carriers.get(mark).cloned().unwrap_or_default()
    }

    /// Reads the marks of orphans that are new in a table: once for all trees
    /// that ask about it.
    fn look(&self, seen: &mut Seen, table: &ProcessTable) {
        seen.order = table.order;
        let is_there = |key: &ProcessKey| table.get(key.pid).is_some_and(|stat| stat.key == *key);
        seen.marks.retain(|key, _| is_there(key));
        seen.in_vain.retain(|key, _| is_there(key));
        let stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        let guardians = stamps.guardians.clone();
        drop(stamps);
        let ours = table.children(self.guardian).map(|pid| (pid, true));
        let others = guardians.iter().flat_map(|pid| table.children(*pid));
        for (pid, ours) in ours.chain(others.map(|pid| (pid, false))) {
            let Some(stat) = table.get(pid) else { continue };
            let in_vain = seen.in_vain.get(&stat.key).copied().unwrap_or(0);
            if stat.is_zombie() || seen.marks.contains_key(&stat.key) || in_vain >= LOOKS {
                continue;
            }
            // One whose mark cannot be read, as in the middle of an exec, is
            // asked again at the next pass.
            if let Some(found) = self.find(pid) {
                seen.marks.insert(stat.key, found);
            } else if !ours {
                seen.in_vain.insert(stat.key, in_vain + 1);
            }
        }
        seen.carriers.clear();
        for (process, mark) in &seen.marks {
            let carriers = seen.carriers.entry(mark.clone()).or_default();
            carriers.push(process.pid);
        }
    }
}

/// Reads the hard limit on message queues out of `/proc/<pid>/limits`.
fn queue_limit(path: &Path) -> Option<u64> {
    let text = super::read(path).ok()?;
    let line = std::str::from_utf8(&text)
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("Max msgqueue size"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Returns the processes that the residentd `owner` spawned, or their
/// descendants.
#[must_use]
pub fn of_run(owner: &Owner, table: &ProcessTable) -> Vec<ProcessKey> {
    let theirs = table.iter().filter(|stat| {
        let mark = Mark::read(stat.key.pid);
        mark.as_ref().and_then(Owner::parse).as_ref() == Some(owner)
    });
    theirs.map(|stat| stat.key).collect()
}

/// Returns whether the process has exactly this limit on message queues.
#[must_use]
pub fn is_stamped(pid: i32, stamp: u64) -> bool {
    queue_limit(Path::new(&format!("/proc/{pid}/limits"))) == Some(stamp)
}

/// Returns the processes that a residentd left behind which held the same
/// state as `owner` and is no more, but for those with one of the marks `kept`.
#[must_use]
pub fn left_behind(owner: &Owner, kept: &[Mark], table: &ProcessTable) -> Vec<ProcessKey> {
    let runs = |process: ProcessKey| {
        table
            .get(process.pid)
            .is_some_and(|stat| stat.key == process && !stat.is_zombie())
    };
    let left = table.iter().filter(|stat| {
        let mark = Mark::read(stat.key.pid).filter(|mark| !kept.contains(mark));
        let its = mark.as_ref().and_then(Owner::parse);
        its.is_some_and(|its| its.state == owner.state && !runs(its.process))
    });
    left.map(|stat| stat.key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits until these processes carry a mark: a spawn returns in the middle
    /// of the exec, when the environment is not there yet.
    fn wait_for_marks(pids: &[i32]) {
        while pids.iter().any(|pid| Mark::read(*pid).is_none()) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_mark_is_found_whole_among_other_variables() {
        let environment = b"A=1\0NOT_RESIDENTD_WORKER=x\0RESIDENTD_WORKER=s 7 9 m#1\0B=2\0";
        let mark = Mark::find(environment).expect("it is there");
        assert_eq!(mark.as_str(), "s 7 9 m#1");
        assert_eq!(
            Owner::parse(&mark),
            Some(Owner {
                state: "s".into(),
                process: ProcessKey {
                    pid: 7,
                    start_time: 9
                }
            })
        );
        assert_eq!(Mark::find(b"RESIDENTD_WORKERS=x\0"), None);
        assert_eq!(Mark::find(b""), None);
    }

    #[test]
    fn a_stamp_is_inherited_and_tells_workers_apart_without_any_environment() {
        let me = Owner::this_process("a-state".into());
        let marks = Marks::new(me.process.pid);
        let worker = |generation| WorkerId {
            model: crate::model::ModelName::new("m").expect("a good name"),
            generation,
        };
        let mut children: Vec<_> = [1, 2]
            .map(|generation| {
                let child = std::process::Command::new("sh")
                    .args(["-c", "read line; sleep 60 & wait"])
                    .env_clear()
                    .env("PATH", "/usr/bin:/bin")
                    .stdin(std::process::Stdio::piped())
                    .spawn()
                    .expect("sh can be spawned");
                let mark = me.mark(&worker(generation));
                let pid = i32::try_from(child.id()).expect("a pid fits");
                marks
                    .stamp(pid, &mark)
                    .expect("a lower limit needs no right");
                (child, pid, mark)
            })
            .into();
        for (child, pid, mark) in &mut children {
            drop(child.stdin.take());
            assert_eq!(marks.find(*pid).as_ref(), Some(&*mark));
            let grandchild = loop {
                let table = ProcessTable::scan().expect("/proc can be listed");
                if let Some(found) = table.iter().find(|stat| stat.ppid == *pid) {
                    break found.key.pid;
                }
            };
            assert_eq!(marks.find(grandchild).as_ref(), Some(&*mark));
            child.kill().expect("it runs");
            child.wait().expect("it is our child");
            let grandchild = nix::unistd::Pid::from_raw(grandchild);
            nix::sys::signal::kill(grandchild, nix::sys::signal::SIGKILL).expect("it runs");
        }
    }

    #[test]
    fn orphans_of_a_worker_that_was_taken_back_are_found_at_whoever_takes_them() {
        let me = Owner::this_process("a-state".into()).process.pid;
        let marks = Arc::new(Marks::new(-1));
        let mark = Mark::kept("a-state 1 2 m#1");
        let scan = || ProcessTable::scan().expect("/proc can be listed");
        let own = getrlimit(Resource::Msgqueue).maximum.unwrap_or(QUEUE_BYTES);
        assert!(marks.resume((&mark, Some(own - 1)), me, &scan()).is_empty());
        let sleep = |mark: Option<&Mark>| {
            let mut command = std::process::Command::new("sleep");
            command.arg("60").env_remove(VARIABLE);
            command.envs(mark.map(|mark| (VARIABLE, mark.as_str())));
            command.spawn().expect("sleep can be spawned")
        };
        let mut children = [sleep(Some(&mark)), sleep(Some(&mark)), sleep(None)];
        let pids = [0, 1, 2].map(|n: usize| i32::try_from(children[n].id()).expect("a pid fits"));
        wait_for_marks(&pids[..2]);
        let leader = ProcessStat::read(pids[0]).expect("it runs").key;
        let tree = crate::procfs::ProcessTree::marked(leader, mark, Arc::clone(&marks));
        let members: Vec<_> = tree.refresh(&scan()).iter().map(|key| key.pid).collect();
        // Looked at again and again, a stranger stays one.
        for _ in 0..5 {
            assert!(!tree.refresh(&scan()).iter().any(|key| key.pid == pids[2]));
        }
        let stamp = marks.stamp(pids[2], &Mark::kept("a-state 3 4 n#1"));
        for child in &mut children {
            child.kill().expect("it runs");
            child.wait().expect("it is our child");
        }
        assert_eq!(members, pids[..2]);
        assert!(stamp.expect("a lower limit needs no right") < own - 1);
    }

    #[test]
    fn only_workers_of_a_dead_residentd_with_the_same_state_were_left_behind() {
        let me = Owner::this_process("a-state".into());
        let dead = Owner {
            process: ProcessKey {
                start_time: me.process.start_time + 1,
                ..me.process
            },
            ..me.clone()
        };
        let other = Owner {
            state: "other-state".into(),
            ..dead.clone()
        };
        let mut children: Vec<_> = [&me, &dead, &other]
            .map(|owner| {
                std::process::Command::new("sleep")
                    .arg("60")
                    .env(VARIABLE, format!("{owner} m#1"))
                    .spawn()
                    .expect("sleep can be spawned")
            })
            .into();
        let spawned =
            [0, 1, 2].map(|n: usize| i32::try_from(children[n].id()).expect("a pid fits"));
        wait_for_marks(&spawned);
        let table = ProcessTable::scan().expect("/proc can be listed");
        let left = left_behind(&me, &[], &table);
        let pids: Vec<_> = left.iter().map(|key| key.pid).collect();
        for child in &mut children {
            child.kill().expect("it runs");
            child.wait().expect("it is our child");
        }
        assert_eq!(pids, [spawned[1]]);
    }
}
