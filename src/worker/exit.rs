//! How a process ended that is not our child.
//!
//! `waitid(2)` tells a parent only. Until that has reaped it, `/proc` shows it
//! too. Since Linux 6.15 the kernel keeps the exit status with the pidfs inode of
//! a process that was reaped, as long as a pidfd of it is open: `PIDFD_GET_INFO`
//! in `linux/pidfd.h`, with `PIDFD_INFO_EXIT`.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use super::ExitStatus;
use crate::procfs::{ProcessKey, ProcessStat};

/// Between two looks at a process that has ended.
const LOOK: Duration = Duration::from_millis(5);
/// Whoever reaps such a process takes at most this long: only then can it be told
/// how it ended.
const REAPED: Duration = Duration::from_millis(200);

/// Returns how a process ended that has, when the kernel tells in time. `waited` is
/// how long that was waited for already: whoever waits for other things too begins
/// this again and again.
pub(super) async fn told(
    pidfd: BorrowedFd<'_>,
    key: ProcessKey,
    waited: &mut Duration,
) -> ExitStatus {
    loop {
        if let Some(status) = status(pidfd, key) {
            return status;
        }
        if *waited >= REAPED {
            return ExitStatus::Unknown;
        }
        *waited += LOOK;
        tokio::time::sleep(LOOK).await;
    }
}

/// Returns how a process ended that has; `None` when it cannot be seen, or not
/// yet.
fn status(pidfd: BorrowedFd<'_>, key: ProcessKey) -> Option<ExitStatus> {
    let status = ProcessStat::wait_status(key).or_else(|| after_reap(pidfd))?;
    let status = std::process::ExitStatus::from_raw(status);
    let code = status.code().map(ExitStatus::Code);
    code.or_else(|| status.signal().map(ExitStatus::Signal))
}

#[expect(unsafe_code, reason = "no crate has a function for this request")]
fn after_reap(pidfd: BorrowedFd<'_>) -> Option<i32> {
    // SAFETY: the type is plain numbers, for which zeros are valid.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    info.mask = u64::from(libc::PIDFD_INFO_EXIT);
    // SAFETY: the descriptor is open, and the kernel writes at most the size
    // that the request names, which is that of `info`.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
    let told = done == 0 && info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0;
    told.then_some(info.exit_code)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    #[test]
    fn how_a_process_ended_is_told_before_and_after_it_is_reaped() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "kill -9 $$"])
            .spawn()
            .expect("sh can be spawned");
        let pid = i32::try_from(child.id()).expect("a pid fits");
        let key = ProcessStat::read(pid).expect("it is not reaped").key;
        let pid = Pid::from_raw(pid).expect("a pid is positive");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("it is not reaped");
        let told = loop {
            if let Some(told) = status(pidfd.as_fd(), key) {
                break told;
            }
            std::thread::yield_now();
        };
        assert_eq!(told, ExitStatus::Signal(9));
        child.wait().expect("it is our child");
        // Kernels before 6.15 do not tell.
        let after = status(pidfd.as_fd(), key);
        assert!(after.is_none() || after == Some(told), "{after:?}");
    }
}
