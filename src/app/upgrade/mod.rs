//! Another residentd takes over while this one runs: no connection is refused,
//! streams are finished here, workers go on.
//!
//! ```text
//! this one                                       the new one, its child
//! ────────                                       ──────────────────────
//! starts the program it was started from ──────► reads the configuration
//!                           ◄── Prepared, or Failed, and nothing has changed
//! decides nothing any more; what it had begun
//! gets there; accepts nobody: they wait in the
//! kernel; lets go of the state
//!                 Take, with listeners ────────► opens the state, takes workers back
//!                           ◄── Serving, or Failed, and this one goes on as before
//! leaves; requests that wait here go to the
//! new one's handover.sock; streams go on
//!                 Yours ───────────────────────► decides for the first time, and accepts
//!                 Inside, for each worker ─────► evicts none that is busy over there
//! ends, or stays as the parent
//! ```
//!
//! Where a service manager can be told of another main process, this one ends
//! with its last stream. Where it cannot, whoever started residentd watches this
//! very process: so it stays, passes signals on, and ends as the new one does.
//! Of three, the one in the middle ends: the parent is told who follows.

mod channel;
mod follow;
mod heir;
mod pass;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use self::channel::{Answering, Listening, Named, Wishes, Word};
pub(super) use self::channel::{Channel, Sent};
pub use self::follow::Heir;
use self::follow::WatchedBy;
pub use self::heir::{HandoverError, Inherited, Predecessor};
pub(super) use self::heir::{SOCKET, Succession};
pub(super) use self::pass::{named_peer, pass};
use super::core::Core;
use super::keeper::Keeper;
use super::listen::Doors;
use super::supervisor;
use crate::config::Config;
use crate::control::{Controller, ReadyWorker, UpgradeError, UpgradeRequest, Upgraded};
use crate::model::Upstream;
use crate::store::Store;
use crate::telemetry;
use crate::worker::{ExitStatus, Helper, ProcessSpawner};

/// Longest wait for the new one to read its configuration, and then to serve:
/// it waits two seconds for workers to answer again.
const START: Duration = Duration::from_secs(30);
/// Longest wait for workers that are being spawned or ended.
const SETTLE: Duration = Duration::from_secs(60);
/// How long the new one may take to end when it is not wanted.
const LEAVE: Duration = Duration::from_secs(2);
/// Between two looks at how many requests are inside.
const LOOK: Duration = Duration::from_millis(20);
/// After so many looks it is also said what requests hear.
const LOOKS: u32 = 50;
/// The flag that has `serve` take over.
const FLAG: &str = "--take-over";

/// How this process was started, so that another can be started the same way.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// Reads it from this process: the path as it was written, so that what lies
    /// there by then is started, also behind a link that points elsewhere.
    ///
    /// # Errors
    /// When the program file cannot be found.
    pub fn of_this_process() -> io::Result<Self> {
        let mut arguments = std::env::args_os();
        let named = arguments.next().map(PathBuf::from).unwrap_or_default();
        let path = if named.components().count() > 1 {
            std::path::absolute(named)?
        } else {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let places = std::env::split_paths(&path);
            let mut found = places.map(|place| place.join(&named));
            let found = found.find(|file| !named.as_os_str().is_empty() && file.is_file());
            found.map_or_else(std::env::current_exe, std::path::absolute)?
        };
        Ok(Self {
            path,
            arguments: arguments.filter(|argument| argument != FLAG).collect(),
        })
    }

    fn command(&self, channel: OwnedFd) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).arg(FLAG).stdin(channel);
        // A terminal's Ctrl-C reaches this process alone, which passes it on.
        command.process_group(0);
        // They are for this process only; see `sd_listen_fds(3)`.
        for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"] {
            command.env_remove(variable);
        }
        command.stdout(Stdio::inherit()).stderr(Stdio::inherit());
        command
    }
}

/// The one who has another residentd take over.
#[derive(Debug)]
pub(super) struct Upgrading {
    program: Program,
    state_dir: PathBuf,
    adopt: bool,
    spawner: Arc<ProcessSpawner>,
    controller: Controller,
    store: Store,
    keeper: Arc<Keeper>,
    doors: watch::Sender<Doors>,
    /// Copies of what is listened on.
    listeners: Vec<(Sent, OwnedFd)>,
    /// To the process that watches over all of them, when this is not it.
    parent: Option<Channel>,
    /// Where it is said that one has taken over.
    heir: watch::Sender<Option<Arc<Heir>>>,
}

/// Who hears how far an upgrade is, and who has taken over.
pub(super) type Said = (watch::Sender<Doors>, watch::Sender<Option<Arc<Heir>>>);

/// A new one that has said that it can.
struct Candidate {
    helper: Helper,
    link: Listening,
}

impl Upgrading {
    pub(super) fn new(
        program: Program,
        core: &Core,
        config: &Config,
        (listeners, parent): (Vec<(Sent, OwnedFd)>, Option<Channel>),
        (doors, heir): Said,
    ) -> Self {
        Self {
            program,
            state_dir: config.server.state_dir.clone(),
            adopt: config.server.adopt,
            spawner: Arc::clone(&core.spawner),
            controller: core.controller.clone(),
            store: core.store.clone(),
            keeper: Arc::clone(&core.keeper),
            doors,
            listeners,
            parent,
            heir,
        }
    }

    /// Upgrades when somebody asks, until it has worked or nobody can ask.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<UpgradeRequest>) {
        while let Some(request) = requests.recv().await {
            // Whoever asked may have left.
            match self.upgrade().await {
                Ok((upgraded, workers)) => {
                    info!(pid = upgraded.pid, "another residentd has taken over");
                    let _ = request.reply.send(Ok(upgraded));
                    // Whoever asked meanwhile hears that one was made.
                    drop(requests);
                    return self.look_after(workers).await;
                }
                Err(why) => {
                    error!(%why, "no upgrade");
                    let _ = request.reply.send(Err(why));
                }
            }
        }
    }

    async fn upgrade(&mut self) -> Result<(Upgraded, Vec<Arc<ReadyWorker>>), UpgradeError> {
        if !self.adopt {
            return Err(UpgradeError::NotAdopting);
        }
        let candidate = self.start().await.map_err(UpgradeError::Failed)?;
        match self.hand_over(&candidate).await {
            Ok((socket, workers)) => {
                let upgraded = Upgraded {
                    pid: candidate.helper.pid(),
                    workers: workers.len(),
                };
                self.leave(candidate, socket).await;
                Ok((upgraded, workers))
            }
            Err(why) => {
                // It may know of workers by now, and is not to end them.
                candidate.helper.signal(Signal::KILL);
                candidate.helper.exited().await;
                self.go_on().await;
                Err(UpgradeError::Failed(why))
            }
        }
    }

    /// Starts the new one, which reads its configuration. Nothing has changed when
    /// it cannot.
    async fn start(&self) -> Result<Candidate, String> {
        let failed = |error: io::Error| telemetry::chain(&error).to_string();
        let (link, theirs) = Channel::pair().map_err(failed)?;
        let link = link.listen().map_err(failed)?;
        let (spawner, mut command) = (Arc::clone(&self.spawner), self.program.command(theirs));
        info!(program = %self.program.path.display(), "starting another residentd to take over");
        // The command holds the other end of the channel, and goes with the closure.
        let spawned = tokio::task::spawn_blocking(move || spawner.spawn_helper(&mut command));
        let spawned = spawned.await.map_err(|error| error.to_string())?;
        let (helper, _) = spawned.map_err(|error| {
            let program = self.program.path.display();
            format!("start {program}: {error}")
        })?;
        let candidate = Candidate { helper, link };
        let why = match tokio::time::timeout(START, candidate.link.next()).await {
            Ok(Some((
                Word::Prepared {
                    version,
                    state_dir,
                    adopt,
                },
                _,
            ))) => match self.suits(&state_dir, adopt) {
                Ok(()) => {
                    let pid = candidate.helper.pid();
                    info!(pid, version, "the new residentd can start");
                    return Ok(candidate);
                }
                Err(why) => why,
            },
            Ok(Some((Word::Failed { why }, _))) => why,
            Ok(Some((word, _))) => format!("it says {word:?}, which makes no sense"),
            Ok(None) => {
                let ended = candidate.helper.exited();
                let ended = tokio::time::timeout(LEAVE, ended).await;
                match ended.unwrap_or(ExitStatus::Unknown) {
                    ExitStatus::Unknown => "it does not talk to this one".to_owned(),
                    status => format!("it ended at once with {status}; its log says why"),
                }
            }
            Err(_) => format!("it was not ready to start within {START:?}"),
        };
        dismiss(&candidate).await;
        Err(why)
    }

    fn suits(&self, state_dir: &Path, adopt: bool) -> Result<(), String> {
        if !adopt {
            return Err("its configuration says server.adopt = false, so it would end all workers; restart residentd instead".into());
        }
        if state_dir != self.state_dir {
            return Err(format!(
                "its server.state_dir is {} and not {}, so it would know of no worker; restart residentd instead",
                state_dir.display(),
                self.state_dir.display()
            ));
        }
        Ok(())
    }

    /// Gives everything to the new one and waits until it serves. Returns where it
    /// takes what still comes here, and the workers that answer.
    async fn hand_over(
        &self,
        candidate: &Candidate,
    ) -> Result<(PathBuf, Vec<Arc<ReadyWorker>>), String> {
        let handed = tokio::select! {
            settled = self.controller.hand_over() => settled.map_err(|why| why.to_string())?,
            () = tokio::time::sleep(SETTLE) => {
                return Err(format!("workers did not finish to start or to end within {SETTLE:?}"));
            }
            _ = candidate.link.next() => return Err("it ended".into()),
        };
        self.doors.send_replace(Doors::Shut);
        self.keeper.keep();
        let store = self.store.clone();
        let let_go = tokio::task::spawn_blocking(move || store.let_go()).await;
        let let_go = let_go.map_err(|error| error.to_string())?;
        let_go.map_err(|why| format!("the state cannot be written down for it: {why}"))?;
        let answering = handed.workers.iter().map(|worker| Answering {
            worker: Named::from(&worker.id),
            inside: worker.gate.read().inside,
        });
        let said = handed.ready.iter().map(|worker| Answering {
            worker: Named::from(worker),
            inside: 0,
        });
        let take = Word::Take {
            listeners: self
                .listeners
                .iter()
                .map(|(sent, _)| sent.clone())
                .collect(),
            has_parent: self.parent.is_some(),
            stays: self.parent.is_none() && !supervisor::follows(),
            workers: answering.chain(said).collect(),
            wishes: Wishes {
                pins: handed
                    .pins
                    .iter()
                    .map(|(model, pinned)| (model.as_str().to_owned(), *pinned))
                    .collect(),
                limits: handed
                    .limits
                    .iter()
                    .map(|(domain, limit)| (domain.to_string(), limit.get()))
                    .collect(),
            },
        };
        let sockets = self.listeners.iter().map(|(_, socket)| socket.as_fd());
        let sockets: Vec<_> = sockets.chain(self.parent.iter().map(AsFd::as_fd)).collect();
        let sent = candidate.link.channel.send(&take, &sockets);
        sent.map_err(|error| format!("it does not listen: {error}"))?;
        match tokio::time::timeout(START, candidate.link.next()).await {
            Ok(Some((Word::Serving { socket }, _))) => Ok((socket, handed.workers)),
            Ok(Some((Word::Failed { why }, _))) => Err(why),
            Ok(Some((word, _))) => Err(format!("it says {word:?}, which makes no sense")),
            Ok(None) => Err("it ended before it served; its log says why".into()),
            Err(_) => Err(format!("it did not serve within {START:?}")),
        }
    }

    /// The new one serves: this one is a matter of streams only.
    async fn leave(&mut self, candidate: Candidate, socket: PathBuf) {
        let upstream = Upstream::Unix(socket.clone());
        let left = self.controller.leave_to(upstream).await;
        let reload = left.unwrap_or_else(|why| {
            error!(%why, "requests that wait are not passed on");
            false
        });
        self.doors.send_replace(Doors::Moved(socket.into()));
        self.listeners.clear();
        let pid = candidate.helper.pid();
        let watched_by = match &self.parent {
            Some(parent) => match parent.send(&Word::Successor { pid }, &[]) {
                Ok(()) => WatchedBy::Parent,
                // It is gone, and nobody else is there.
                Err(_) => WatchedBy::Us,
            },
            None if supervisor::follows() => {
                supervisor::main_process(pid);
                WatchedBy::Manager
            }
            None => WatchedBy::Us,
        };
        if let Err(error) = candidate.link.channel.send(&Word::Yours, &[]) {
            warn!(%error, "the new residentd does not hear that everything is its own");
        }
        if reload {
            // It has read what was there before that.
            candidate.helper.signal(Signal::HUP);
        }
        let Candidate { helper, link } = candidate;
        let heir = Heir::new(helper, link, watched_by, Arc::clone(&self.spawner));
        self.heir.send_replace(Some(Arc::new(heir)));
    }

    /// The new one did not get on: everything is as it was.
    async fn go_on(&self) {
        if let Err(why) = self.controller.take_again().await {
            error!(%why, "nothing is decided any more");
        }
        self.doors.send_replace(Doors::Open);
        // Nobody has to wait for the disk.
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = store.take_again() {
                error!(%error, "the state cannot be opened again; what happens from now on may be forgotten");
            }
        });
    }

    /// Tells the new one how many requests are still inside of workers here, and
    /// that they hear of them: a worker that is busy with these is not called dead.
    async fn look_after(self, workers: Vec<Arc<ReadyWorker>>) {
        let Some(heir) = self.heir.borrow().clone() else {
            return;
        };
        let mut known: Vec<_> = workers.into_iter().map(|worker| (worker, None)).collect();
        let mut ticks = tokio::time::interval(LOOK);
        let mut looks = 0_u32;
        while !known.is_empty() {
            ticks.tick().await;
            looks = looks.wrapping_add(1);
            known.retain_mut(|(worker, told)| {
                let pulse = worker.pulse.read();
                let now = (worker.gate.read().inside, pulse.waiting, pulse.heard);
                let is_due = looks.is_multiple_of(LOOKS) && *told != Some(now);
                let (inside, waiting, heard) = now;
                if is_due || told.is_none_or(|(before, _, _)| before != inside) {
                    let word = Word::Inside {
                        worker: Named::from(&worker.id),
                        inside,
                        waiting,
                        heard: told.is_some_and(|(_, _, before)| before != heard),
                    };
                    // One that does not hear it now is told the next number.
                    if heir.say(&word).is_ok() {
                        *told = Some(now);
                    }
                }
                told.is_none_or(|(inside, _, _)| inside > 0)
            });
        }
    }
}

/// Ends a new one that is not wanted, or cannot.
async fn dismiss(candidate: &Candidate) {
    candidate.helper.signal(Signal::TERM);
    let ended = tokio::time::timeout(LEAVE, candidate.helper.exited());
    if ended.await.is_err() {
        candidate.helper.signal(Signal::KILL);
        candidate.helper.exited().await;
    }
}
