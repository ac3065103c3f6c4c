//! One process tree: spawned, waited for, signalled, and ended for good.
//!
//! Every process is waited for in one way, by its pidfd, and signalled through
//! it, so that a number that was given to somebody else is never hit. See
//! `pidfd_open(2)`, `pidfd_send_signal(2)`, `waitid(2)`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal,
    waitid,
};
use tokio::io::unix::AsyncFd;
use tracing::{debug, error};

use super::reaper::Leaders;
use super::watched::readable;
use super::{ExitStatus, exit, release};
use crate::clock::Clock;
use crate::procfs::mark::{Mark, Marks};
use crate::procfs::{ProcessKey, ProcessStat, ProcessTable, ProcessTree};

/// Between two looks at a tree that is being ended.
const LOOK: Duration = Duration::from_millis(5);
/// A process that lives this long after SIGKILL hangs in the kernel.
const STUCK: Duration = Duration::from_secs(10);
/// Rescans after which new members are no longer waited for with SIGSTOP.
const MOST_SCANS: usize = 50;

/// The leader of a tree, and the tree.
#[derive(Debug)]
pub(super) struct Process {
    leader: AsyncFd<OwnedFd>,
    pub(super) tree: Arc<ProcessTree>,
    ended: Option<ExitStatus>,
    /// Nothing is left of the tree. Looked for once: nothing comes after that.
    gone: bool,
    /// It was spawned by an earlier residentd, so somebody else reaps it.
    adopted: bool,
    /// How long it has been waited for to be reaped.
    unreaped: Duration,
}

impl Process {
    /// Takes charge of a child that was just spawned with `mark` in its
    /// environment and not waited for.
    pub(super) fn spawned(pid: u32, mark: Mark, marks: Arc<Marks>) -> std::io::Result<Self> {
        let pid = i32::try_from(pid).map_err(std::io::Error::other)?;
        let number =
            Pid::from_raw(pid).ok_or_else(|| std::io::Error::other("a pid is positive"))?;
        let leader = readable(pidfd_open(number, PidfdFlags::empty())?)?;
        // It has not been reaped, so its number is its own, dead or alive.
        let stat =
            ProcessStat::read(pid).ok_or_else(|| std::io::Error::other("it is not in /proc"))?;
        Ok(Self {
            leader,
            tree: Arc::new(ProcessTree::marked(stat.key, mark, marks)),
            ended: None,
            gone: false,
            adopted: false,
            unreaped: Duration::ZERO,
        })
    }

    /// Takes charge of the processes of a worker that an earlier residentd
    /// spawned.
    pub(super) fn adopted(
        (leader, key, parent): (OwnedFd, ProcessKey, i32),
        (mark, stamp): (Mark, Option<u64>),
        marks: Arc<Marks>,
    ) -> std::io::Result<Self> {
        let table = ProcessTable::scan()?;
        let members = marks.resume((&mark, stamp), parent, &table);
        let tree = ProcessTree::marked(key, mark, marks);
        tree.join(members);
        Ok(Self {
            leader: readable(leader)?,
            tree: Arc::new(tree),
            ended: None,
            gone: false,
            adopted: true,
            unreaped: Duration::ZERO,
        })
    }

    /// Returns the leader's pid.
    pub(super) fn pid(&self) -> i32 {
        self.tree.leader().pid
    }

    /// Waits until the leader has ended and reaps it. May be called again.
    pub(super) async fn exited(&mut self) -> ExitStatus {
        if let Some(status) = &self.ended {
            return status.clone();
        }
        loop {
            let status = match self.adopted {
                false => reap(&self.leader),
                true if has_ended(&self.leader) => Some(self.told().await),
                true => None,
            };
            if let Some(status) = status {
                self.ended = Some(status.clone());
                return status;
            }
            // A pidfd is readable from the end of the process on.
            if let Ok(mut ready) = self.leader.readable().await {
                ready.clear_ready();
            }
        }
    }

    /// Returns how an adopted leader ended that has, when the kernel tells.
    async fn told(&mut self) -> ExitStatus {
        use std::os::fd::AsFd;
        let pidfd = self.leader.get_ref().as_fd();
        exit::told(pidfd, self.tree.leader(), &mut self.unreaped).await
    }

    /// Sends the leader a signal; one that has ended is no error.
    pub(super) fn signal(&self, number: i32) {
        if self.ended.is_some() {
            return;
        }
        let Some(signal) = Signal::from_named_raw(number) else {
            error!(number, "an unknown stop signal");
            return;
        };
        if let Err(failed) = pidfd_send_signal(&self.leader, signal) {
            debug!(pid = self.pid(), error = %failed, "signalling a leader that has ended");
        }
    }

    /// Sends every member a signal, and returns them.
    pub(super) fn signal_members(&self, number: i32) -> Vec<ProcessKey> {
        let members = self.members();
        if let Some(signal) = Signal::from_named_raw(number) {
            for member in &members {
                send(*member, signal);
            }
        }
        members
    }

    /// Returns the members that live.
    pub(super) fn members(&self) -> Vec<ProcessKey> {
        members(&self.tree)
    }

    /// Returns whether the leader is reaped and nothing is left of its tree.
    /// Mostly so, and then there is no need to look at every process of the
    /// machine; false when in doubt.
    pub(super) fn left_nothing(&mut self, leaders: &Leaders) -> bool {
        // What an adopted leader leaves does not become our child.
        let may_tell = self.ended.is_some() && !self.adopted;
        self.gone = self.gone || may_tell && leaders.have_orphans() == Some(false);
        self.gone
    }

    /// Ends every member by SIGKILL and returns when all are gone and the
    /// leader is reaped.
    pub(super) async fn kill_tree(&mut self, leaders: &Leaders, clock: Clock) {
        if !self.left_nothing(leaders) {
            end(&self.tree, clock, None).await;
        }
        self.exited().await;
    }
}

/// Returns the members that live.
fn members(tree: &ProcessTree) -> Vec<ProcessKey> {
    match ProcessTable::scan() {
        Ok(table) => tree.refresh(&table),
        Err(failed) => {
            error!(error = %failed, "listing /proc");
            tree.known()
        }
    }
}

/// Ends every member by SIGKILL and returns when all are gone, or when
/// `patience` is over. All are stopped first, until a scan finds no new one,
/// so that none forks away in between.
pub(super) async fn end(tree: &ProcessTree, clock: Clock, patience: Option<Duration>) {
    let mut stopped = Vec::new();
    for _ in 0..MOST_SCANS {
        let live = members(tree);
        if live.is_empty() {
            return;
        }
        let new: Vec<_> = live.into_iter().filter(|m| !stopped.contains(m)).collect();
        if new.is_empty() {
            break;
        }
        for member in new {
            send(member, Signal::STOP);
            stopped.push(member);
        }
    }
    let since = clock.now();
    let mut told = false;
    let mut released = false;
    loop {
        let members = members(tree);
        for member in &members {
            send(*member, Signal::KILL);
        }
        if !std::mem::replace(&mut released, true) {
            release::memory_of(&members);
        }
        let waited = clock.now().since(since);
        if members.is_empty() || patience.is_some_and(|patience| waited > patience) {
            break;
        }
        if !told && waited > STUCK {
            told = true;
            error!(
                pid = tree.leader().pid,
                left = members.len(),
                "processes live on after SIGKILL; their memory stays booked"
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Reaps the process behind the pidfd if it has ended.
pub(super) fn reap(pidfd: &AsyncFd<OwnedFd>) -> Option<ExitStatus> {
    use std::os::fd::AsFd;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options) {
        Ok(None) => None,
        Ok(Some(status)) => Some(describe(&status)),
        // Somebody else reaped it: that it ended is all there is to know.
        Err(_) => Some(ExitStatus::Unknown),
    }
}

/// Returns whether the process behind the pidfd has ended.
fn has_ended(pidfd: &AsyncFd<OwnedFd>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::new(pidfd.get_ref(), PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn describe(status: &WaitIdStatus) -> ExitStatus {
    if let Some(code) = status.exit_status() {
        return ExitStatus::Code(code);
    }
    status
        .terminating_signal()
        .map_or(ExitStatus::Unknown, ExitStatus::Signal)
}

/// Signals a member if it still is who it was.
fn send(member: ProcessKey, signal: Signal) {
    let Some(pid) = Pid::from_raw(member.pid) else {
        return;
    };
    // Opened first, compared then: the number cannot be given away between.
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    if ProcessStat::read(member.pid).is_some_and(|stat| stat.key == member) {
        // It may end at this moment, which is what is wanted.
        let _ = pidfd_send_signal(&pidfd, signal);
    }
}
