//! The side of the residentd that takes over.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::channel::{Channel, Listening, Sent, Wishes, Word, inside};
use crate::app::core::Core;
use crate::app::listen::{Server, listen};
use crate::app::sockets::{Listener, Scope};
use crate::app::{AppError, survivors};
use crate::config::Config;
use crate::control::{Guests, Inheritance};
use crate::model::{Bytes, ModelName, WorkerId};
use crate::telemetry;

/// Longest wait until the other one has finished what it had begun: it waits for
/// workers that end, at most [`super::SETTLE`].
const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks at the parent.
const LOOK: Duration = Duration::from_millis(250);
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
                wishes,
            },
            mut sockets,
        )) = taken
        else {
            return Err(HandoverError::CalledOff);
        };
        let workers = inside(&workers);
        let parent = sockets.split_off(listeners.len().min(sockets.len()));
        Ok(Inherited {
            link: Some(self.0),
            stays,
            wishes,
            parent: (has_parent.then_some(parent).into_iter().flatten().next()).map(Channel::new),
            listeners: listeners.into_iter().zip(sockets).collect(),
            answering: workers.keys().cloned().collect(),
            guests: Guests::new(workers),
        })
    }
}

/// What another residentd has handed over; by default there was none.
#[derive(Debug, Default)]
pub struct Inherited {
    link: Option<Channel>,
    parent: Option<Channel>,
    stays: bool,
    wishes: Wishes,
    pub(in crate::app) listeners: Vec<(Sent, OwnedFd)>,
    /// Workers that answer.
    answering: BTreeSet<WorkerId>,
    /// Requests of the other one that are inside of them.
    guests: Guests,
}

impl Inherited {
    /// Returns whether the other one says that this worker answers.
    pub(in crate::app) fn vouches_for(&self, worker: &WorkerId) -> bool {
        self.answering.contains(worker)
    }

    /// Returns another handle to whoever hands over.
    pub(in crate::app) fn share(&self) -> io::Result<Option<Predecessor>> {
        let link = self.link.as_ref().map(Channel::try_clone).transpose()?;
        Ok(link.map(Channel::new).map(Predecessor))
    }

    /// Returns what the controller has to know, where there was another one.
    pub(in crate::app) fn inheritance(&self) -> Option<Inheritance> {
        self.link.as_ref()?;
        let pins = self.wishes.pins.iter();
        let limits = self.wishes.limits.iter();
        Some(Inheritance {
            guests: self.guests.clone(),
            pins: pins
                .filter_map(|(model, pinned)| Some((ModelName::new(model).ok()?, *pinned)))
                .collect(),
            limits: limits
                .filter_map(|(domain, limit)| Some((domain.parse().ok()?, Bytes(*limit))))
                .collect(),
        })
    }

    /// Listens for what comes to the other one. Before anything else is done, since
    /// it may not be possible.
    pub(in crate::app) fn listener(&self, config: &Config) -> Result<Option<Listener>, AppError> {
        let socket = config.server.state_dir.join(SOCKET);
        match self.link {
            Some(_) => Listener::handover(&socket).map(Some),
            None => Ok(None),
        }
    }

    /// Says that this one can serve, waits until the other one has left everything
    /// to it, and begins: with the workers that are busy for the other one held, and
    /// with what still comes to it.
    ///
    /// # Errors
    /// That the other one has not left. Nothing is this one's then.
    pub(in crate::app) async fn take_over(
        self,
        config: &Config,
        core: &Core,
        (server, listener): (&Server, Option<Listener>),
    ) -> Result<Succession, AppError> {
        let abandoned = CancellationToken::new();
        let (Some(link), Some(listener)) = (self.link, listener) else {
            return Ok(Succession {
                parent: None,
                abandoned,
            });
        };
        let parent = match self.parent {
            Some(parent) => Some(parent),
            None if !self.stays => None,
            None => Some(Channel::new(link.try_clone().map_err(AppError::Handover)?)),
        };
        let link = link.listen().map_err(AppError::Handover)?;
        let socket = config.server.state_dir.join(SOCKET);
        let said = link.channel.send(&Word::Serving { socket }, &[]);
        said.map_err(AppError::Handover)?;
        match link.next().await {
            Some((Word::Yours, _)) => {}
            _ => return Err(AppError::CalledOff),
        }
        if core.controller.take_again().await.is_err() {
            return Err(AppError::CalledOff);
        }
        telemetry::spawn("handover", listen(listener, Scope::All, server.clone()));
        survivors::settle(&core.controller, &core.ready).await;
        if let Some(parent) = &parent {
            let parent = parent.try_clone().map_err(AppError::Handover)?;
            let watch = watch_parent(Channel::new(parent), abandoned.clone());
            telemetry::spawn("parent", watch);
        }
        telemetry::spawn("predecessor", attend(link, self.guests));
        Ok(Succession { parent, abandoned })
    }
}

/// How this one stands to those before it.
#[derive(Debug)]
pub(in crate::app) struct Succession {
    /// The channel to the process that watches over all of them, if there is one.
    pub(in crate::app) parent: Option<Channel>,
    /// Cancelled when that has ended: whoever watched over it starts another one,
    /// and this one is in its way.
    pub(in crate::app) abandoned: CancellationToken,
}

/// Looks from time to time whether the parent is still there: its words may be for
/// another one that listens on the same channel.
async fn watch_parent(parent: Channel, abandoned: CancellationToken) {
    while !parent.is_closed() {
        tokio::time::sleep(LOOK).await;
    }
    abandoned.cancel();
}

/// Listens to the other one until nothing of what came to it is left.
async fn attend(link: Listening, guests: Guests) {
    loop {
        match link.next().await {
            Some((
                Word::Inside {
                    worker,
                    inside,
                    waiting,
                    heard,
                },
                _,
            )) => {
                if let Some(worker) = worker.id() {
                    guests.note(&worker, inside, waiting, heard);
                }
            }
            Some((Word::Done, _)) | None => break,
            Some((word, _)) => debug!(?word, "not for us"),
        }
    }
    guests.leave();
    info!("the residentd before this one has finished");
}
