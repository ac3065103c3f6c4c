//! Reaps orphans that came to us, so that no zombie is left.
//!
//! residentd is a child subreaper: whatever a worker leaves behind becomes our
//! child. Leaders are reaped by their own task; everything else here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;

use crate::procfs::{ProcessTable, ProcessTree};
use crate::telemetry;

/// A burst of exits is swept once.
const REST: Duration = Duration::from_millis(100);

/// Leaders and their trees. Held while a child is spawned and noted, so that
/// a sweep never takes a leader for an orphan.
#[derive(Debug, Default)]
pub(super) struct Leaders {
    trees: Mutex<BTreeMap<i32, Arc<ProcessTree>>>,
    helpers: Mutex<BTreeSet<i32>>,
}

impl Leaders {
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, Arc<ProcessTree>>> {
        self.trees.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns children of ours that are no workers and no orphans. Whoever
    /// holds both locks takes this one last.
    pub(super) fn helpers(&self) -> MutexGuard<'_, BTreeSet<i32>> {
        self.helpers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether this process has a child that leads no worker. When it
    /// has none, nothing is left of a worker whose leader was reaped, since
    /// whatever a leader leaves becomes our child. `None` when the kernel does
    /// not list children (`CONFIG_PROC_CHILDREN`, `proc_tid_children(5)`).
    pub(super) fn have_orphans(&self) -> Option<bool> {
        let mut children = BTreeSet::new();
        for thread in std::fs::read_dir("/proc/self/task").ok()? {
            let list = std::fs::read_to_string(thread.ok()?.path().join("children")).ok()?;
            children.extend(list.split_ascii_whitespace().flat_map(str::parse::<i32>));
        }
        let leaders = self.lock();
        let helpers = self.helpers();
        let is_orphan = |pid: &i32| !leaders.contains_key(pid) && !helpers.contains(pid);
        Some(children.iter().any(is_orphan))
    }
}

/// Makes orphaned descendants become our children instead of init's; see
/// `PR_SET_CHILD_SUBREAPER` in `prctl(2)`.
pub fn become_subreaper() {
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        warn!(%error, "becoming a subreaper; orphans of workers may escape");
    }
}

/// Starts the sweeping. With `reap_all` every orphan is reaped, as PID 1 must;
/// otherwise only members of our workers' trees.
pub(super) fn start(leaders: Arc<Leaders>, reap_all: bool) {
    let mut children = match signal(SignalKind::child()) {
        Ok(children) => children,
        Err(error) => {
            warn!(%error, "listening for SIGCHLD; orphans stay zombies");
            return;
        }
    };
    telemetry::spawn("reaper", async move {
        while children.recv().await.is_some() {
            // An orphan may come and end while nothing is signalled: the sweep
            // after the rest finds it.
            tokio::time::sleep(REST).await;
            sweep(&leaders, reap_all);
        }
    });
}

fn sweep(leaders: &Leaders, reap_all: bool) {
    let helpers = leaders.helpers().clone();
    let leaders = leaders.lock();
    let Ok(table) = ProcessTable::scan() else {
        return;
    };
    let Ok(me) = i32::try_from(std::process::id()) else {
        return;
    };
    for zombie in table.iter().filter(|p| p.is_zombie() && p.ppid == me) {
        let pid = zombie.key.pid;
        if leaders.contains_key(&pid) || helpers.contains(&pid) {
            continue;
        }
        let known = || {
            leaders
                .values()
                .any(|tree| tree.known().contains(&zombie.key))
        };
        if let Some(pid) = Pid::from_raw(pid).filter(|_| reap_all || known()) {
            // It is ours and has ended; whoever was quicker has it.
            let _ = waitid(
                WaitId::Pid(pid),
                WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            );
        }
    }
}
