//! Children of this process that are no workers, such as the guard and the
//! residentd that takes over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use super::reaper::Leaders;
use super::watched::readable;
use super::{ExitStatus, exit, process};
use crate::procfs::{ProcessKey, ProcessStat};

/// A process that the reaper leaves to whoever holds this.
#[derive(Debug)]
pub struct Helper {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    /// Absent of one that had ended when it was found.
    key: Option<ProcessKey>,
    leaders: Arc<Leaders>,
}

impl Helper {
    /// Spawns it. Called in a runtime; blocks for the time of a spawn.
    pub(super) fn spawn(
        leaders: &Arc<Leaders>,
        command: &mut Command,
    ) -> io::Result<(Self, Child)> {
        // Held until the child is noted, so that the reaper leaves it alone.
        let mut helpers = leaders.helpers();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        helpers.insert(pid);
        drop(helpers);
        Ok((Self::known(leaders, pid)?, child))
    }

    /// Takes charge of a process that is or will be a child of this one.
    pub(super) fn found(leaders: &Arc<Leaders>, pid: i32) -> io::Result<Self> {
        leaders.helpers().insert(pid);
        Self::known(leaders, pid)
    }

    fn known(leaders: &Arc<Leaders>, pid: i32) -> io::Result<Self> {
        let opened = || {
            let number = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
            readable(pidfd_open(number, PidfdFlags::empty())?)
        };
        let pidfd = opened().inspect_err(|_| {
            leaders.helpers().remove(&pid);
        })?;
        Ok(Self {
            pid,
            pidfd,
            key: ProcessStat::read(pid).map(|stat| stat.key),
            leaders: Arc::clone(leaders),
        })
    }

    /// Returns its pid.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal; one that has ended gets none.
    pub fn signal(&self, signal: Signal) {
        // An error means that it has ended.
        let _ = pidfd_send_signal(self.pidfd.get_ref(), signal);
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        // A pidfd is readable from the end of the process on, and so stays. An error
        // is as good as its end: whoever reaps it looks.
        let _ = self
            .pidfd
            .readable()
            .await
            .map(|mut ready| ready.retain_ready());
    }

    /// Waits for its end and reaps it. It may be somebody else's child, who then
    /// reaps it.
    pub async fn exited(&self) -> ExitStatus {
        self.ended().await;
        let status = process::reap(&self.pidfd);
        self.leaders.helpers().remove(&self.pid);
        let mut waited = Duration::ZERO;
        match (status, self.key) {
            (Some(ExitStatus::Unknown) | None, Some(key)) => {
                exit::told(self.pidfd.get_ref().as_fd(), key, &mut waited).await
            }
            (status, _) => status.unwrap_or(ExitStatus::Unknown),
        }
    }
}
