//! The side of the residentd that takes over.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::channel::{Channel, Listening, Sent, Word, inside};
use crate::app::listen::{Server, listen};
use crate::app::sockets::{Listener, Scope};
use crate::app::{AppError, supervisor};
use crate::config::Config;
use crate::control::{Controller, Lease};
use crate::gate::Visit;
use crate::model::WorkerId;
use crate::telemetry;

/// Longest wait until the other one has finished what it had begun: it waits for
/// workers that end, at most [`super::SETTLE`].
const PATIENCE: Duration = Duration::from_secs(90);
/// Name of the socket, in the state folder, on which requests arrive that still
/// came to the other one.
pub(in crate::app) const SOCKET: &str = "handover.sock";

/// Why nothing was taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// Standard input is no channel to another residentd.
    #[error("talk to the residentd that started this one; --take-over is for residentd itself")]
    Channel(#[source] io::Error),
    /// The other one changed its mind or ended.
    #[error("the residentd that started this one did not hand over")]
    CalledOff,
}

/// The residentd that started this one to be replaced by it.
#[derive(Debug)]
pub struct Predecessor(Channel);

impl Predecessor {
    /// Takes the channel that standard input is; that reads nothing from then on.
    ///
    /// # Errors
    /// When standard input cannot be taken.
    pub fn of_stdin() -> Result<Self, HandoverError> {
        let take = || {
            let end = io::stdin().as_fd().try_clone_to_owned()?;
            let nothing = std::fs::File::open("/dev/null")?;
            rustix::stdio::dup2_stdin(&nothing)?;
            Ok(end)
        };
        take()
            .map(Channel::new)
            .map(Self)
            .map_err(HandoverError::Channel)
    }

    /// Says why this one cannot take over.
    pub fn fail(&self, why: &str) {
        let why = why.to_owned();
        // It sees that we end all the same.
        let _ = self.0.send(&Word::Failed { why }, &[]);
    }

    /// Says that this one can start as `config` says, and waits until the other
    /// one has let go of everything. Blocks.
    ///
    /// # Errors
    /// When it does not.
    pub fn inherit(self, config: &Config) -> Result<Inherited, HandoverError> {
        let prepared = Word::Prepared {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state_dir: config.server.state_dir.clone(),
            adopt: config.server.adopt,
        };
        self.0
            .send(&prepared, &[])
            .map_err(HandoverError::Channel)?;
        let taken = self.0.wait(PATIENCE).map_err(HandoverError::Channel)?;
        let Some((
            Word::Take {
                listeners,
                has_parent,
                stays,
                workers,
            },
            mut sockets,
        )) = taken
        else {
            return Err(HandoverError::CalledOff);
        };
        let parent = sockets.split_off(listeners.len().min(sockets.len()));
        Ok(Inherited {
            link: Some(self.0),
            stays,
            parent: (has_parent.then_some(parent).into_iter().flatten().next()).map(Channel::new),
            listeners: listeners.into_iter().zip(sockets).collect(),
            workers: inside(&workers),
        })
    }
}

/// What another residentd has handed over; by default there was none.
#[derive(Debug, Default)]
pub struct Inherited {
    link: Option<Channel>,
    parent: Option<Channel>,
    stays: bool,
    pub(in crate::app) listeners: Vec<(Sent, OwnedFd)>,
    /// Workers that answer, and how many requests of the other one are inside.
    workers: BTreeMap<WorkerId, u32>,
}

impl Inherited {
    /// Returns whether the other one says that this worker answers.
    pub(in crate::app) fn vouches_for(&self, worker: &WorkerId) -> bool {
        self.workers.contains_key(worker)
    }

    /// Returns another handle to whoever hands over.
    pub(in crate::app) fn share(&self) -> io::Result<Option<Predecessor>> {
        let link = self.link.as_ref().map(Channel::try_clone).transpose()?;
        Ok(link.map(Channel::new).map(Predecessor))
    }

    /// Says that this one serves, holds the workers that are busy for the other
    /// one, and takes what still comes to it. Returns the channel to the process
    /// that watches over all of them, if there is one.
    pub(in crate::app) fn take_over(
        self,
        config: &Config,
        controller: &Controller,
        server: &Server,
    ) -> Result<Option<Channel>, AppError> {
        let Some(link) = self.link else {
            return Ok(None);
        };
        let socket = config.server.state_dir.join(SOCKET);
        let listener = Listener::handover(&socket)?;
        let attendant = Attendant::new(controller.clone(), self.workers);
        let parent = match self.parent {
            Some(parent) => Some(parent),
            None if !self.stays => None,
            None => Some(Channel::new(link.try_clone().map_err(AppError::Handover)?)),
        };
        let link = link.listen().map_err(AppError::Handover)?;
        let said = link.channel.send(&Word::Serving { socket }, &[]);
        said.map_err(AppError::Handover)?;
        let gone = CancellationToken::new();
        telemetry::spawn("predecessor", attendant.attend(link, gone.clone()));
        let server = server.clone();
        telemetry::spawn("handover", async move {
            // Connections that are open then are served to their end.
            let serving = listen(listener, Scope::All, server);
            gone.run_until_cancelled(serving).await;
        });
        Ok(parent)
    }
}

/// Holds the workers that the other one's requests are inside of, so that none is
/// evicted under them, until it is gone.
#[derive(Debug)]
struct Attendant {
    controller: Controller,
    wanted: BTreeMap<WorkerId, u32>,
    stays: BTreeMap<WorkerId, Vec<Stay>>,
}

/// One request that is inside over there: the gate counts it, and so does whoever
/// judges the worker by what requests hear.
#[derive(Debug)]
struct Stay {
    visit: Visit,
    _lease: Lease,
}

impl Attendant {
    fn new(controller: Controller, wanted: BTreeMap<WorkerId, u32>) -> Self {
        let mut attendant = Self {
            controller,
            wanted,
            stays: BTreeMap::new(),
        };
        attendant.hold();
        attendant
    }

    /// Takes as many leases as there are requests. A worker that is not ready yet
    /// has them later, one that is gone never.
    fn hold(&mut self) {
        for (worker, wanted) in &self.wanted {
            let stays = self.stays.entry(worker.clone()).or_default();
            let wanted = *wanted as usize;
            stays.truncate(wanted);
            while stays.len() < wanted {
                let Some(lease) = self.controller.enter(worker) else {
                    break;
                };
                stays.push(Stay {
                    visit: Visit::begin(Arc::clone(&lease.worker().pulse)),
                    _lease: lease,
                });
            }
        }
        self.wanted.retain(|_, wanted| *wanted > 0);
        self.stays.retain(|_, stays| !stays.is_empty());
    }

    /// Passes on what the requests over there hear of a worker.
    fn hear(&self, worker: &WorkerId, waiting: u32, heard: bool) {
        let stays = self.stays.get(worker).map_or(&[][..], Vec::as_slice);
        let (wait, rest) = stays.split_at(stays.len().min(waiting as usize));
        for stay in rest.iter().chain(wait.iter().filter(|_| heard)) {
            stay.visit.hears();
        }
        for stay in wait {
            stay.visit.waits();
        }
    }

    /// Listens to the other one until it has finished, then says so to `gone`.
    async fn attend(mut self, link: Listening, gone: CancellationToken) {
        let mut views = self.controller.watch();
        loop {
            let short = self.wanted.iter().any(|(worker, wanted)| {
                self.stays.get(worker).map_or(0, Vec::len) < *wanted as usize
            });
            tokio::select! {
                said = link.next() => match said {
                    Some((Word::Inside { worker, inside, waiting, heard }, _)) => {
                        if let Some(worker) = worker.id() {
                            self.wanted.insert(worker.clone(), inside);
                            self.hold();
                            self.hear(&worker, waiting, heard);
                        }
                    }
                    Some((Word::Yours, _)) => supervisor::ready(),
                    Some((Word::Done, _)) | None => break,
                    Some((word, _)) => debug!(?word, "not for us"),
                },
                Ok(()) = views.changed(), if short => {}
            }
            self.hold();
        }
        info!("the residentd before this one has finished");
        gone.cancel();
    }
}
