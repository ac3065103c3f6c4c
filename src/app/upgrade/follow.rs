//! What remains to be done for the residentd that has taken over.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::Signal;
use tracing::{info, warn};

use super::channel::{Listening, Word};
use crate::telemetry;
use crate::worker::{ExitStatus, Helper, ProcessSpawner};

/// How long those that were replaced may take to end when the last has: the last
/// pieces of their answers are on their way.
const LEAVE: Duration = Duration::from_secs(3);

/// Who watches over the residentd that has taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WatchedBy {
    /// The service manager, which knows it.
    Manager,
    /// The parent, which was told of it.
    Parent,
    /// This process.
    Us,
}

/// The residentd that has taken over, and those that follow it.
#[derive(Debug)]
pub struct Heir {
    current: Mutex<Arc<Helper>>,
    link: Listening,
    watched_by: WatchedBy,
    spawner: Arc<ProcessSpawner>,
}

impl Heir {
    pub(super) fn new(
        helper: Helper,
        link: Listening,
        watched_by: WatchedBy,
        spawner: Arc<ProcessSpawner>,
    ) -> Self {
        Self {
            current: Mutex::new(Arc::new(helper)),
            link,
            watched_by,
            spawner,
        }
    }

    /// Returns whether somebody else watches over it, so that this process may
    /// end.
    #[must_use]
    pub fn is_on_its_own(&self) -> bool {
        self.watched_by != WatchedBy::Us
    }

    /// Returns whether signals to this process are meant for it: whoever watches over
    /// it may not have heard of it yet.
    #[must_use]
    pub fn gets_signals(&self) -> bool {
        self.watched_by != WatchedBy::Manager
    }

    /// Passes a signal on.
    pub fn signal(&self, signal: Signal) {
        self.current().signal(signal);
    }

    /// Waits until it has ended, and whoever took over from it. Called once.
    pub async fn exited(&self) -> ExitStatus {
        let (mut heard, mut replaced) = (true, Vec::new());
        loop {
            let current = Arc::clone(&self.current());
            tokio::select! {
                // Said before it ends.
                biased;
                said = self.link.next(), if heard => match said {
                    Some((Word::Successor { pid }, _)) => match self.spawner.find_helper(pid) {
                        Ok(helper) => {
                            info!(pid, "another residentd has taken over");
                            *self.current() = Arc::new(helper);
                            // It ends with its last stream.
                            replaced.push(telemetry::spawn("replaced", async move {
                                current.exited().await;
                            }));
                        }
                        Err(error) => warn!(pid, %error, "the residentd that took over is not there"),
                    },
                    Some(_) => {}
                    None => heard = false,
                },
                status = current.exited() => {
                    // Where this one is the first process, they end with it.
                    let _ = tokio::time::timeout(LEAVE, join_all(replaced)).await;
                    return status;
                }
            }
        }
    }

    /// Waits until it has ended, whoever took over from it.
    pub async fn gone(&self) {
        let current = Arc::clone(&self.current());
        current.ended().await;
    }

    /// Says that nothing of what came to this process is left.
    pub fn is_done(&self) {
        // It may have ended.
        let _ = self.say(&Word::Done);
    }

    pub(super) fn say(&self, word: &Word) -> std::io::Result<()> {
        self.link.channel.send(word, &[])
    }

    fn current(&self) -> MutexGuard<'_, Arc<Helper>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
