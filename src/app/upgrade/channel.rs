//! What two residentds say to each other while one takes over: packets over a
//! pair of sockets, see `SOCK_SEQPACKET` in `unix(7)`, listeners as
//! `SCM_RIGHTS`.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::model::{ModelName, WorkerId};
use crate::worker::readable;

/// Longest packet; a worker takes some hundred bytes of one.
const LONGEST: usize = 160 << 10;
/// Descriptors in one packet at most; the kernel takes 253 (`unix(7)`).
const MOST_DESCRIPTORS: usize = 64;

/// One packet. Either side may be of another version: unknown fields mean nothing
/// here, and whoever adds a field gives it a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "snake_case")]
pub(super) enum Word {
    /// Of the new one: its configuration is valid.
    Prepared {
        version: String,
        state_dir: PathBuf,
        adopt: bool,
    },
    /// To the new one: the state is free, and here are the listeners; then, if
    /// there is one, the channel to the parent.
    Take {
        listeners: Vec<Sent>,
        has_parent: bool,
        /// The old one will be the parent.
        #[serde(default)]
        stays: bool,
        workers: Vec<Answering>,
        #[serde(default)]
        wishes: Wishes,
    },
    /// Of the new one: it is ready to serve, and takes what still comes to the old
    /// one here.
    Serving { socket: PathBuf },
    /// Of the new one: it cannot go on.
    Failed { why: String },
    /// To the new one: everything is its own from now on.
    Yours,
    /// To the new one: how many requests are inside of a worker over there, how many
    /// of them wait for it, and whether any heard of it since this was last said.
    Inside {
        worker: Named,
        inside: u32,
        waiting: u32,
        heard: bool,
    },
    /// To the new one: nothing of what came to the old one is left.
    Done,
    /// To the parent: this process has taken over from the one that says it.
    Successor { pid: i32 },
}

/// What an operator has set until the next restart, which this is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wishes {
    pub(super) pins: Vec<(String, bool)>,
    /// Domains and bytes.
    pub(super) limits: Vec<(String, u64)>,
}

/// A listener that is sent along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::app) struct Sent {
    /// As it was configured; absent when the service manager opened it.
    pub(in crate::app) configured: Option<String>,
    /// Whether it was the operators' own.
    #[serde(default)]
    pub(in crate::app) is_admin: bool,
}

/// A worker that answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answering {
    pub(super) worker: Named,
    pub(super) inside: u32,
}

/// A worker's model and generation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Named(String, u64);

impl From<&WorkerId> for Named {
    fn from(worker: &WorkerId) -> Self {
        Self(worker.model.as_str().to_owned(), worker.generation)
    }
}

impl Named {
    pub(super) fn id(&self) -> Option<WorkerId> {
        Some(WorkerId {
            model: ModelName::new(&self.0).ok()?,
            generation: self.1,
        })
    }
}

/// Returns who answers, and how many are inside.
pub(super) fn inside(workers: &[Answering]) -> BTreeMap<WorkerId, u32> {
    let known = workers.iter();
    known
        .filter_map(|each| Some((each.worker.id()?, each.inside)))
        .collect()
}

/// One end.
#[derive(Debug)]
pub(in crate::app) struct Channel(OwnedFd);

/// What came, and what was sent along.
pub(super) type Received = (Word, Vec<OwnedFd>);

impl Channel {
    /// Returns both ends.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(ours), theirs))
    }

    pub(super) const fn new(end: OwnedFd) -> Self {
        Self(end)
    }

    pub(super) fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Sends a packet; one that does not fit at once is an error.
    pub(super) fn send(&self, word: &Word, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(word)?;
        if text.len() > LONGEST || descriptors.len() > MOST_DESCRIPTORS {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.0, &[IoSlice::new(&text)], &mut control, flags)?;
        Ok(())
    }

    /// Takes a packet that is there; `None` when the other end is closed.
    fn take(&self) -> io::Result<Option<Received>> {
        let mut bytes = vec![0; LONGEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            flags,
        )?;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(sent) = message {
                descriptors.extend(sent);
            }
        }
        if got.bytes == 0 {
            return Ok(None);
        }
        let word = serde_json::from_slice(&bytes[..got.bytes])?;
        Ok(Some((word, descriptors)))
    }

    /// Returns whether nobody holds the other end any more. What has come is left for
    /// whoever listens.
    pub(super) fn is_closed(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut byte = [0];
        recv(&self.0, &mut byte[..], flags).is_ok_and(|(got, _)| got == 0)
    }

    /// Waits for a packet; `None` when the other end is closed. Blocks.
    pub(super) fn wait(&self, patience: Duration) -> io::Result<Option<Received>> {
        let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        match rustix::io::retry_on_intr(|| poll(&mut polled, Some(&patience)))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => self.take(),
        }
    }

    /// Has packets come as they are asked for. Called in a runtime.
    pub(super) fn listen(self) -> io::Result<Listening> {
        let arrives = readable(self.0.try_clone()?)?;
        Ok(Listening {
            channel: self,
            arrives,
        })
    }
}

/// An end whose packets are waited for by a task.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) channel: Channel,
    arrives: AsyncFd<OwnedFd>,
}

impl Listening {
    /// Waits for a packet; `None` when the other end is closed or talks in
    /// another tongue.
    pub(super) async fn next(&self) -> Option<Received> {
        loop {
            let mut ready = self.arrives.readable().await.ok()?;
            match self.channel.take() {
                Ok(received) => return received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(_) => return None,
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn words_and_descriptors_arrive_whole_and_a_closed_end_is_seen() {
        let (ours, theirs) = Channel::pair().expect("a pair");
        let theirs = Channel::new(theirs);
        let late = theirs.wait(Duration::from_millis(1));
        let late = late.expect_err("nothing was sent").kind();
        assert_eq!(late, io::ErrorKind::TimedOut);
        let file = tempfile::tempfile().expect("a file");
        let workers = (0..400).map(|number| Answering {
            worker: Named(format!("{number}-{}", "m".repeat(100)), number),
            inside: 1,
        });
        let word = Word::Take {
            listeners: vec![Sent {
                configured: None,
                is_admin: false,
            }],
            has_parent: false,
            stays: true,
            workers: workers.collect(),
            wishes: Wishes::default(),
        };
        ours.send(&word, &[file.as_fd()]).expect("it fits");
        ours.send(&Word::Yours, &[]).expect("it fits");
        let got = theirs.wait(Duration::from_secs(5)).expect("it came");
        let (got, sent) = got.expect("it is open");
        assert_eq!((got, sent.len()), (word, 1));
        let theirs = theirs.listen().expect("registered");
        let (got, sent) = theirs.next().await.expect("it is open");
        assert_eq!((got, sent.len()), (Word::Yours, 0));
        assert!(!theirs.channel.is_closed());
        drop(ours);
        assert!(theirs.channel.is_closed());
        assert!(theirs.next().await.is_none());
    }
}
