//! A worker that says itself when it is ready, as systemd's services do:
//! `READY=1` in a datagram to the socket that `NOTIFY_SOCKET` names. See
//! `sd_notify(3)`.
//!
//! Anybody may write to a socket. The kernel says who did (`SO_PASSCRED`, see
//! `unix(7)`), and only processes of the worker's tree are heard.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};
use tokio::io::unix::AsyncFd;

use super::watched::readable;
use crate::procfs::{ProcessTable, ProcessTree};

/// Names the socket.
pub(super) const VARIABLE: &str = "NOTIFY_SOCKET";
/// Notices are a few short lines.
const LONGEST: usize = 4096;

/// The socket of one life.
#[derive(Debug)]
pub(super) struct Notices {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Notices {
    /// Listens at a path where nothing is. Called within a runtime.
    pub(super) fn listen(path: PathBuf) -> io::Result<Self> {
        let socket = UnixDatagram::bind(&path)?;
        socket.set_nonblocking(true)?;
        sockopt::set_socket_passcred(&socket, true)?;
        Ok(Self {
            socket: readable(socket.into())?,
            path,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until a process of the tree says that it is ready.
    pub(super) async fn ready(&self, tree: &ProcessTree) {
        loop {
            let Ok(mut ready) = self.socket.readable().await else {
                return std::future::pending().await;
            };
            match receive(self.socket.get_ref()) {
                Ok((text, pid)) => {
                    if says_ready(&text) && pid.is_some_and(|pid| belongs(pid, tree)) {
                        return;
                    }
                }
                Err(_) => ready.clear_ready(),
            }
        }
    }
}

impl Drop for Notices {
    fn drop(&mut self) {
        // Somebody may have taken it away already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Takes one datagram, and who sent it.
fn receive(socket: &OwnedFd) -> io::Result<(Vec<u8>, Option<i32>)> {
    let mut text = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [io::IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    text.truncate(received.bytes);
    // Descriptors that came along are closed.
    let sender = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(sender) => Some(sender.pid.as_raw_nonzero().get()),
        _ => None,
    });
    Ok((text, sender))
}

fn says_ready(text: &[u8]) -> bool {
    text.split(|byte| *byte == b'\n')
        .any(|line| line == b"READY=1")
}

fn belongs(pid: i32, tree: &ProcessTree) -> bool {
    if tree.leader().pid == pid {
        return true;
    }
    ProcessTable::scan().is_ok_and(|table| tree.refresh(&table).iter().any(|key| key.pid == pid))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::procfs::ProcessStat;

    #[tokio::test]
    async fn only_the_tree_is_heard_and_only_when_it_says_ready() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify");
        let notices = Notices::listen(path.clone()).expect("it can be bound");
        let pid = i32::try_from(std::process::id()).expect("a pid fits");
        let me = ProcessTree::new(ProcessStat::read(pid).expect("it runs").key);
        let mut sleep = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep is there");
        let sleeps = i32::try_from(sleep.id()).expect("a pid fits");
        let other = ProcessTree::new(ProcessStat::read(sleeps).expect("it runs").key);
        let say = |text: &str| {
            let socket = UnixDatagram::unbound().expect("a socket");
            socket.send_to(text.as_bytes(), &path).expect("it is bound");
        };
        let heard = async |tree: &ProcessTree| {
            let patience = Duration::from_millis(200);
            tokio::time::timeout(patience, notices.ready(tree))
                .await
                .is_ok()
        };
        say("STATUS=loading\nREADY=0");
        say("XREADY=1");
        assert!(!heard(&me).await);
        say("READY=1\nSTATUS=serving");
        assert!(!heard(&other).await, "this process is not of that tree");
        sleep.kill().expect("it is our child");
        sleep.wait().expect("it is our child");
        say("STATUS=x\nREADY=1");
        assert!(heard(&me).await);
        assert_eq!(notices.path(), path);
        drop(notices);
        assert!(!path.exists());
    }
}
