//! Ends workers when residentd dies that are not to outlive it.
//!
//! A process of its own reads from a pipe whose other end only residentd has.
//! However residentd ends, the kernel closes that end, and the guard ends what is
//! left. A signal at the parent's death, `PR_SET_PDEATHSIG`, would not do: it
//! comes when the thread ends that spawned, reaches only the direct child, and is
//! lost in some execs.
//!
//! The guard leads a session of its own and blocks the signals that end
//! residentd. It is told of each leader with its stamp, for processes that
//! renamed themselves and so wiped their mark.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use tracing::{debug, error, warn};

use super::helper::Helper;
use super::process;
use super::reaper::Leaders;
use crate::clock::Clock;
use crate::procfs::mark::{self, Mark, Owner};
use crate::procfs::{ProcessKey, ProcessStat, ProcessTable, ProcessTree};
use crate::telemetry;

/// Between two tries to start a guard.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a dismissed guard may take to leave.
const LEAVE: Duration = Duration::from_secs(1);
/// Looks at all processes after residentd's death, and the time between them: a
/// worker that was just being spawned shows its mark a moment later.
const LOOKS: (u32, Duration) = (6, Duration::from_millis(40));
/// A process that lives this long after SIGKILL hangs in the kernel.
const PATIENCE: Duration = Duration::from_secs(5);

/// residentd's side of its guard.
#[derive(Debug)]
pub struct Guard {
    /// The program and its arguments.
    command: (PathBuf, Vec<OsString>),
    leaders: Arc<Leaders>,
    post: Mutex<Post>,
}

#[derive(Debug, Default)]
struct Post {
    told: BTreeMap<ProcessKey, Option<u64>>,
    pipe: Option<ChildStdin>,
    dismissed: bool,
}

impl Guard {
    /// Starts the guard, and starts another whenever one ends. Called in a
    /// runtime.
    pub(super) fn start(
        command: (PathBuf, Vec<OsString>),
        leaders: Arc<Leaders>,
    ) -> io::Result<Arc<Self>> {
        let guard = Arc::new(Self {
            command,
            leaders,
            post: Mutex::default(),
        });
        let first = guard.spawn()?;
        telemetry::spawn("guard", Arc::clone(&guard).watch(first));
        Ok(guard)
    }

    /// Tells it of a worker.
    pub(super) fn protect(&self, leader: ProcessKey, stamp: Option<u64>) {
        let mut post = self.post();
        post.told.insert(leader, stamp);
        post.write(&Line::Protect(leader, stamp));
    }

    /// Tells it that a worker is gone.
    pub(super) fn forget(&self, leader: ProcessKey) {
        let mut post = self.post();
        post.told.remove(&leader);
        post.write(&Line::Forget(leader));
    }

    /// Lets it go, when all workers are gone, and waits until it has.
    pub async fn dismiss(&self) {
        {
            let mut post = self.post();
            post.dismissed = true;
            post.pipe = None;
        }
        let clock = Clock::start();
        while !self.leaders.helpers().is_empty() && clock.now().since_start() < LEAVE {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn spawn(&self) -> io::Result<Helper> {
        let (program, arguments) = &self.command;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let (helper, mut child) = Helper::spawn(&self.leaders, &mut command)?;
        let pipe = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        // Nobody may wait for a guard that does not read.
        rustix::io::ioctl_fionbio(&pipe, true)?;
        let mut post = self.post();
        post.pipe = Some(pipe);
        let told: Vec<_> = post
            .told
            .iter()
            .map(|(leader, stamp)| (*leader, *stamp))
            .collect();
        for (leader, stamp) in told {
            post.write(&Line::Protect(leader, stamp));
        }
        debug!(pid = helper.pid(), "guard started");
        Ok(helper)
    }

    async fn watch(self: Arc<Self>, first: Helper) {
        let mut running = Some(first);
        loop {
            if let Some(helper) = running.take() {
                let (pid, _) = (helper.pid(), helper.exited().await);
                if self.post().dismissed {
                    return;
                }
                warn!(
                    pid,
                    "the guard that ends workers with residentd has ended; starting another"
                );
            }
            tokio::time::sleep(AGAIN).await;
            match self.spawn() {
                Ok(next) => running = Some(next),
                Err(failed) => {
                    error!(error = %failed, "no guard can be started; workers would outlive residentd now");
                }
            }
        }
    }

    fn post(&self) -> MutexGuard<'_, Post> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Post {
    fn write(&mut self, line: &Line) {
        let Some(pipe) = &mut self.pipe else { return };
        // One that has ended is told everything when it is replaced.
        if let Err(failed) = pipe.write_all(line.to_string().as_bytes()) {
            debug!(error = %failed, "the guard was not told");
        }
    }
}

/// What a guard is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Protect(ProcessKey, Option<u64>),
    Forget(ProcessKey),
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Protect(ProcessKey { pid, start_time }, stamp) => {
                writeln!(f, "+ {pid} {start_time} {}", stamp.unwrap_or(0))
            }
            Self::Forget(ProcessKey { pid, start_time }) => writeln!(f, "- {pid} {start_time} 0"),
        }
    }
}

impl FromStr for Line {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split_ascii_whitespace();
        let sign = words.next().ok_or(())?;
        let mut number = || {
            words
                .next()
                .and_then(|word| word.parse::<u64>().ok())
                .ok_or(())
        };
        let pid = i32::try_from(number()?).map_err(|_| ())?;
        let start_time = number()?;
        let key = ProcessKey { pid, start_time };
        match (sign, number()?) {
            ("+", stamp) => Ok(Self::Protect(key, (stamp > 0).then_some(stamp))),
            ("-", _) => Ok(Self::Forget(key)),
            _ => Err(()),
        }
    }
}

/// Is the guard: waits for the end of the residentd `owner`, whose pipe is
/// standard input, and ends what that leaves. Returns when nothing is left.
///
/// # Errors
/// When the pipe cannot be read, or nothing can be ended for want of a runtime.
pub fn keep_guard(owner: &Owner) -> io::Result<()> {
    let mut blocked = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        blocked.add(signal);
    }
    blocked.thread_block()?;
    // It leads a group only if somebody starts it by hand, who may end it.
    let _ = nix::unistd::setsid();
    let mut told: BTreeMap<ProcessKey, Option<u64>> = BTreeMap::new();
    for line in io::stdin().lock().lines() {
        match line?.parse() {
            Ok(Line::Protect(key, stamp)) => {
                told.insert(key, stamp);
            }
            Ok(Line::Forget(key)) => {
                told.remove(&key);
            }
            Err(()) => {}
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(end_all(owner, &told));
    Ok(())
}

async fn end_all(owner: &Owner, told: &BTreeMap<ProcessKey, Option<u64>>) {
    let clock = Clock::start();
    for _ in 0..LOOKS.0 {
        if let Ok(table) = ProcessTable::scan() {
            let left = left(owner, told, &table);
            if let Some(tree) = ProcessTree::of(&left) {
                let pids: Vec<_> = left.iter().map(|key| key.pid).collect();
                warn!(?pids, "residentd is gone: ending its workers");
                process::end(&tree, clock, Some(PATIENCE)).await;
            }
        }
        tokio::time::sleep(LOOKS.1).await;
    }
}

/// Returns who is left of this run: who carries its mark, who was told of, their
/// groups, and orphans with a stamp that renamed themselves.
fn left(
    owner: &Owner,
    told: &BTreeMap<ProcessKey, Option<u64>>,
    table: &ProcessTable,
) -> Vec<ProcessKey> {
    let mut left = mark::of_run(owner, table);
    for leader in told.keys() {
        let now = table.get(leader.pid).map(|stat| stat.key);
        left.extend(now.filter(|now| now == leader));
        // Its number cannot be given away while its group has a member.
        if now.is_none_or(|now| now == *leader) {
            let group = table.iter().filter(|stat| stat.pgrp == leader.pid);
            left.extend(group.map(|stat| stat.key));
        }
    }
    // An orphan came to whoever we came to. One of another residentd that died
    // and has the same stamp is an orphan of a worker all the same.
    let parent = nix::unistd::getppid().as_raw();
    let stamped = |stat: &&ProcessStat| {
        let mut stamps = told.values().flatten();
        stat.ppid == parent
            && Mark::read(stat.key.pid).is_none()
            && stamps.any(|stamp| mark::is_stamped(stat.key.pid, *stamp))
    };
    left.extend(table.iter().filter(stamped).map(|stat| stat.key));
    let me = std::process::id();
    left.retain(|key| {
        let lives = table.get(key.pid).is_some_and(|stat| !stat.is_zombie());
        lives && u32::try_from(key.pid) != Ok(me)
    });
    left.sort_unstable();
    left.dedup();
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guard_is_told_is_what_it_understands() {
        let key = ProcessKey {
            pid: 4711,
            start_time: 99,
        };
        for line in [
            Line::Protect(key, Some(819_199)),
            Line::Protect(key, None),
            Line::Forget(key),
        ] {
            assert_eq!(line.to_string().parse(), Ok(line));
        }
        for bad in ["", "+", "+ 1", "+ a 1 2", "* 1 2 3", "+ 99999999999 1 2"] {
            assert_eq!(bad.parse::<Line>(), Err(()), "{bad}");
        }
    }
}
