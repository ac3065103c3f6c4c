//! The controller: one task that owns the policy, and the handle everyone else
//! talks to it through.
//!
//! Requests that find their model ready take a [`Lease`] from the routes
//! without a message. Everything else is a [`Command`] on a bounded channel.
//! Readers take the published [`Snapshot`] and never queue here.

mod adopt;
mod answers;
mod arrivals;
mod autopsy;
mod command;
mod decision;
mod decisions;
mod deeds;
mod files;
mod gates;
mod guests;
mod handover;
mod lease;
mod obey;
mod parking;
mod reload;
mod snapshot;
mod task;
mod tell;
mod traffic;
mod view;
mod wording;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use command::{CleanupRequest, Command, LimitReport, LimitRequest, LogTail, Reply, Signal};
pub use decision::{Decision, End, Kind, LoadFailure, LoadReason, What};
pub use decisions::{Decisions, Found, KEPT, Recorder, Wanted, record};
pub use guests::Guests;
pub use handover::{HandedOver, Inheritance, UpgradeError, UpgradeRequest, Upgraded, Upgrader};
pub use lease::{Lease, ModelRoute, ReadyWorker, Routes};
pub use reload::{
    Reconfiguration, ReloadError, ReloadOrigin, ReloadProblem, ReloadReport, ReloadRequest,
    Reloader, Reloads,
};
pub use snapshot::{
    Candidate, Counters, DomainView, LastEviction, LimitSource, MemoryView, ModelView, Snapshot,
};
pub use task::{Parts, start};
use tokio::sync::{mpsc, oneshot, watch};
pub use traffic::{Durations, Ending, Passed, Traffic};

use crate::clock::{Clock, Timestamp};
use crate::model::{ModelName, Upstream};
pub use crate::policy::{
    CleanupReport, EvictReason, Expectation, Expected, ExpectedSource, Explanation, Holder,
    Outlook, ParkFault, Phase, PressureLevel, Protection, Refusal, Shortage, Skip, Skipped, Why,
};
pub use crate::worker::{Opened, Stream};

/// Commands waiting at most. A full queue is answered with `503 overloaded`:
/// the controller handles a command in microseconds, so thousands waiting
/// means that something is wrong, and more would only wait longer.
pub const COMMAND_QUEUE: usize = 4096;

/// Everyone's way to the controller. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Controller {
    routes: Arc<Routes>,
    commands: mpsc::Sender<Command>,
    signals: mpsc::UnboundedSender<Signal>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    decisions: Decisions,
    clock: Clock,
    next_ticket: Arc<AtomicU64>,
}

impl Controller {
    /// Builds a handle from its parts. Whoever holds the other ends of the
    /// channels is the controller: the task in this module, or a test.
    #[must_use]
    pub fn from_parts(
        routes: Arc<Routes>,
        commands: mpsc::Sender<Command>,
        signals: mpsc::UnboundedSender<Signal>,
        (snapshots, decisions): (watch::Receiver<Arc<Snapshot>>, Decisions),
        clock: Clock,
    ) -> Self {
        Self {
            routes,
            commands,
            signals,
            snapshots,
            decisions,
            clock,
            next_ticket: Arc::new(AtomicU64::new(1)),
        }
    }

    /// Returns which models there are, and the ready worker of each.
    #[must_use]
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// Returns the clock that deadlines are counted in.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Takes a lease on the model's worker, waiting for room and for the load
    /// until `deadline`. Dropping the future gives up the place in the queue.
    ///
    /// # Errors
    /// Why there is no lease; each refusal has one status and code.
    pub async fn acquire(&self, route: &ModelRoute, deadline: Timestamp) -> Result<Lease, Refusal> {
        match route.try_lease(self.clock, &self.signals) {
            Some(lease) => Ok(lease),
            // Boxed, since few need it and all would have room for it.
            None => Box::pin(self.wait_for_lease(route, deadline)).await,
        }
    }

    async fn wait_for_lease(
        &self,
        route: &ModelRoute,
        deadline: Timestamp,
    ) -> Result<Lease, Refusal> {
        let model = route.name().clone();
        let answer = self.ask(|ticket, reply| Command::Acquire {
            ticket,
            model,
            deadline,
            reply,
        });
        let answer = answer.await;
        if matches!(answer, Err(Refusal::Overloaded)) {
            self.routes.count_overload();
        }
        if matches!(answer, Err(Refusal::ShuttingDown))
            && let Some(lease) = route.try_lease(self.clock, &self.signals)
        {
            // Meanwhile it was left to the residentd that has taken over.
            return Ok(lease);
        }
        answer
    }

    /// Makes the model ready, waiting for it until `deadline`.
    ///
    /// # Errors
    /// Why it is not ready.
    pub async fn load(&self, model: &ModelName, deadline: Timestamp) -> Result<(), Refusal> {
        let model = model.clone();
        self.ask(|ticket, reply| Command::Load {
            ticket,
            model,
            deadline,
            reply,
        })
        .await
    }

    /// Makes the model be gone: new requests wait for its next life, those
    /// inside finish, then its tree ends. Answers when it is gone.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`], or that the controller is gone.
    pub async fn unload(&self, model: &ModelName) -> Result<(), Refusal> {
        let model = model.clone();
        self.ask(|ticket, reply| Command::Unload {
            ticket,
            model,
            reply,
        })
        .await
    }

    /// Pins or unpins the model until the next restart.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`], or that the controller is gone.
    pub async fn pin(&self, model: &ModelName, pinned: bool) -> Result<(), Refusal> {
        let model = model.clone();
        self.ask(|_, reply| Command::Pin {
            model,
            pinned,
            reply,
        })
        .await
    }

    /// Sets or reports a limit.
    ///
    /// # Errors
    /// That the domain is unknown, or that the controller is gone.
    pub async fn limit(&self, request: LimitRequest) -> Result<LimitReport, Refusal> {
        self.ask(|_, reply| Command::Limit { request, reply }).await
    }

    /// Unloads idle models and answers with what came back, measured.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`] for a name in the request, or that the
    /// controller is gone.
    pub async fn cleanup(&self, request: CleanupRequest) -> Result<CleanupReport, Refusal> {
        self.ask(|ticket, reply| Command::Cleanup {
            ticket,
            request,
            reply,
        })
        .await
    }

    /// Asks for the proportional share of the model's worker; the next views
    /// have it once it was read.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`], or that the controller is gone.
    pub async fn weigh(&self, model: &ModelName) -> Result<(), Refusal> {
        let model = model.clone();
        self.ask(|_, reply| Command::Weigh { model, reply }).await
    }

    /// Returns the last lines of the model's current or last worker.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`], or that the controller is gone.
    pub async fn tail(&self, model: &ModelName, lines: usize) -> Result<LogTail, Refusal> {
        let model = model.clone();
        self.ask(|_, reply| Command::Tail {
            model,
            lines,
            reply,
        })
        .await
    }

    /// Refuses new work, lets requests inside finish until `grace` is over,
    /// ends every worker, and answers when all are gone. A second call with a
    /// shorter grace shortens the first.
    pub async fn shutdown(&self, grace: std::time::Duration) {
        // An error means that the controller has gone already.
        let _: Result<(), Refusal> = self
            .ask(|_, reply| Command::Shutdown { grace, reply })
            .await;
    }

    /// Returns whether the controller runs, once it has got to the question.
    pub async fn answers(&self) -> bool {
        self.ask(|_, reply| Command::Ping { reply }).await.is_ok()
    }

    /// Decides nothing any more, so that another residentd can take over: lets
    /// workers that are being spawned or ended get there, then closes every gate.
    /// Whoever asks for something from now on waits, and no request can enter a
    /// worker. Returns what the other one has to know and the store does not.
    /// [`Controller::take_again`] or [`Controller::leave_to`] has to follow.
    ///
    /// # Errors
    /// That residentd ends, is handing over already, or the controller is gone.
    pub async fn hand_over(&self) -> Result<HandedOver, Refusal> {
        self.ask(|_, reply| Command::HandOver { reply }).await
    }

    /// Decides again, after the other residentd did not get on; or for the first
    /// time, after it has left everything to this one. First about what came
    /// meanwhile.
    ///
    /// # Errors
    /// That the controller is gone.
    pub async fn take_again(&self) -> Result<(), Refusal> {
        self.ask(|_, reply| Command::TakeAgain { reply }).await
    }

    /// Leaves everything to the residentd that answers at `heir`: requests that
    /// wait here, and those that still come, are sent there, and workers are left
    /// alone. Nothing can be asked of this controller after that. Returns whether a
    /// configuration waited to be taken in, which the other one has to read.
    ///
    /// # Errors
    /// That nothing was handed over, or the controller is gone.
    pub async fn leave_to(&self, heir: Upstream) -> Result<bool, Refusal> {
        self.ask(|_, reply| Command::LeaveTo { heir, reply }).await
    }

    /// Has a configuration that was read anew taken in, or told that it is not
    /// valid. Whoever wants a reload asks the [`Reloader`].
    ///
    /// # Errors
    /// That residentd ends, or that the controller is gone.
    pub async fn reload(
        &self,
        origin: ReloadOrigin,
        outcome: Result<Box<Reconfiguration>, Vec<ReloadProblem>>,
    ) -> Result<(), Refusal> {
        self.ask(|_, reply| Command::Reload {
            origin,
            outcome,
            reply,
        })
        .await
    }

    /// Explains why the model is not ready, and what asking for it would lead to
    /// now.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`], or that the controller is gone.
    pub async fn explain(&self, model: &ModelName) -> Result<Explanation, Refusal> {
        let model = model.clone();
        self.ask(|_, reply| Command::Explain { model, reply }).await
    }

    /// Returns the newest decisions with their reasons. Never waits.
    #[must_use]
    pub fn decisions(&self) -> Decisions {
        self.decisions.clone()
    }

    /// Returns the newest published view. Never waits.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Returns the channel of views, for those who wait for a change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(u64, oneshot::Sender<Result<T, Refusal>>) -> Command,
    ) -> Result<T, Refusal> {
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        self.commands
            .try_send(command(ticket, reply))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => Refusal::Overloaded,
                mpsc::error::TrySendError::Closed(_) => Refusal::ShuttingDown,
            })?;
        let mut cancel = CancelOnDrop {
            ticket: Some(ticket),
            signals: &self.signals,
        };
        let answer = answer.await;
        cancel.ticket = None;
        answer.unwrap_or(Err(Refusal::ShuttingDown))
    }
}

/// Gives up a place in a queue when the one who waits leaves.
struct CancelOnDrop<'a> {
    ticket: Option<u64>,
    signals: &'a mpsc::UnboundedSender<Signal>,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            // A closed channel means that the controller has gone already.
            let _ = self.signals.send(Signal::Cancel { ticket });
        }
    }
}
