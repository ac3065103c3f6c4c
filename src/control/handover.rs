//! Another residentd takes over: from then on nothing is decided here.
//!
//! ```text
//! hand_over ── spawns and ends that have begun get there ── gates closed ──┬── leave_to: waiting requests go to the heir
//!                                                                          └── take_again: what came meanwhile is heard
//! ```
//!
//! The store has to know every worker before the other one reads it, and must
//! tell of none that is about to be gone. So what has begun is waited for, and
//! written down; everything else that arrives is kept until it is known who
//! decides about it.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::arrivals::Arrival;
use super::command::Reply;
use super::task::{Pending, Task};
use super::{COMMAND_QUEUE, Command, Guests, Lease, LimitRequest, ReadyWorker, Refusal, Signal};
use crate::gate::{Gate, Pulse};
use crate::model::{Bytes, Domain, ModelName, Upstream, WorkerId};
use crate::policy::{Event, Phase, Ticket};
use crate::worker::{Opened, WorkerEvent};

/// What is handed over beside the store.
#[derive(Debug)]
pub struct HandedOver {
    /// Workers that answer. Requests inside of them go on.
    pub workers: Vec<Arc<ReadyWorker>>,
    /// Workers that said meanwhile that they answer.
    pub ready: Vec<WorkerId>,
    /// Models that an operator pinned or unpinned until the next restart.
    pub pins: Vec<(ModelName, bool)>,
    /// Limits that an operator set until the next restart.
    pub limits: Vec<(Domain, Bytes)>,
}

/// What was handed over by another residentd: nothing is decided before
/// [`super::Controller::take_again`].
#[derive(Clone, Debug, Default)]
pub struct Inheritance {
    /// Requests inside of workers over there.
    pub guests: Guests,
    /// See [`HandedOver::pins`].
    pub pins: Vec<(ModelName, bool)>,
    /// See [`HandedOver::limits`].
    pub limits: Vec<(Domain, Bytes)>,
}

/// The residentd that has taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upgraded {
    /// Its pid.
    pub pid: i32,
    /// Workers that it has taken with it.
    pub workers: usize,
}

/// Why everything stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeError {
    /// One is being made.
    #[error("an upgrade is being made already")]
    Underway,
    /// This residentd has no program file and no process of its own.
    #[error("this residentd runs within another program and cannot be replaced")]
    Impossible,
    /// Workers end with this residentd.
    #[error(
        "workers end with residentd, as server.adopt = false says, so it cannot be replaced under them; restart it"
    )]
    NotAdopting,
    /// The new one did not get on.
    #[error("the new residentd did not take over, and this one goes on: {0}")]
    Failed(String),
}

/// A wish to be replaced by the program that lies where this one was started
/// from.
#[derive(Debug)]
pub struct UpgradeRequest {
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<Upgraded, UpgradeError>>,
}

/// Everyone's way to an upgrade. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Upgrader(mpsc::Sender<UpgradeRequest>);

impl Upgrader {
    /// Returns a handle, and where its requests arrive.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<UpgradeRequest>) {
        let (requests, arrivals) = mpsc::channel(1);
        (Self(requests), arrivals)
    }

    /// Has another residentd take over, and waits for that.
    ///
    /// # Errors
    /// Why this one goes on.
    pub async fn upgrade(&self) -> Result<Upgraded, UpgradeError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.0.try_send(UpgradeRequest { reply });
        sent.map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => UpgradeError::Underway,
            mpsc::error::TrySendError::Closed(_) => UpgradeError::Impossible,
        })?;
        answer.await.unwrap_or(Err(UpgradeError::Underway))
    }
}

/// What waits while another residentd takes over.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Who is told when everything that had begun has got there.
    settling: Option<Reply<HandedOver>>,
    commands: Vec<Command>,
    left: Vec<Ticket>,
    events: Vec<WorkerEvent>,
    /// Workers whose end is among the events.
    gone: BTreeSet<WorkerId>,
    /// Gates that were open.
    closed: Vec<WorkerId>,
    /// What an operator had set over there.
    inherited: Inheritance,
}

impl Held {
    /// Holds everything back until the other residentd has left.
    pub(super) fn inherited(inherited: Inheritance) -> Self {
        Self {
            inherited,
            ..Self::default()
        }
    }
}

impl Task {
    pub(super) fn hand_over(&mut self, reply: Reply<HandedOver>) {
        if self.held.is_some() || !self.finishing.is_empty() {
            self.answers.put(reply, Err(Refusal::ShuttingDown));
            return;
        }
        info!("handing over: nothing is decided from now on");
        self.held = Some(Held {
            settling: Some(reply),
            ..Held::default()
        });
        self.settle();
    }

    /// Keeps what arrives while another residentd takes over; returns what is to
    /// be handled all the same.
    pub(super) fn hold_back(&mut self, arrival: Arrival) -> Option<Arrival> {
        let Some(held) = self.held.as_mut() else {
            return Some(arrival);
        };
        match arrival {
            Arrival::Command(
                Command::TakeAgain { .. }
                | Command::LeaveTo { .. }
                | Command::HandOver { .. }
                | Command::Ping { .. },
            ) => return Some(arrival),
            // Workers are the other one's.
            Arrival::Abandoned => self.finished = true,
            Arrival::Command(Command::Acquire { reply, .. })
                if held.commands.len() >= COMMAND_QUEUE =>
            {
                // Whoever asked may have left.
                let _ = reply.send(Err(Refusal::Overloaded));
            }
            Arrival::Command(command) => held.commands.push(command),
            Arrival::Signal(Signal::Cancel { ticket }) => {
                self.waiting.remove(&ticket);
                held.left.push(ticket);
            }
            Arrival::Worker(WorkerEvent::Spawned {
                worker,
                tree,
                record,
            }) => self.worker_runs(worker, tree, record),
            Arrival::Worker(event) => {
                if let WorkerEvent::Exited { worker, .. } = &event {
                    self.store.forget_worker(worker);
                    held.gone.insert(worker.clone());
                }
                held.events.push(event);
            }
            // All is looked at anew when it goes on here.
            Arrival::Signal(Signal::Idle { .. }) | Arrival::Reading | Arrival::Wake => {}
        }
        self.settle();
        None
    }

    /// Tells that everything got there, once it has.
    fn settle(&mut self) {
        let Some(held) = self.held.as_mut() else {
            return;
        };
        let models = self.policy.models();
        let is_underway = |worker: &WorkerId| {
            let model = models.get(&worker.model);
            let current = model.filter(|model| model.generation == worker.generation);
            current.is_none_or(|model| model.phase == Phase::Stopping)
        };
        let mut workers = self.workers.iter();
        let underway = workers.any(|(worker, live)| {
            !held.gone.contains(worker) && (live.tree.is_none() || is_underway(worker))
        });
        if underway {
            return;
        }
        let Some(reply) = held.settling.take() else {
            return;
        };
        self.keep_use();
        let Some(held) = self.held.as_mut() else {
            return;
        };
        let mut answering = Vec::new();
        for (worker, live) in &self.workers {
            let Some(ready) = &live.ready else { continue };
            let route = self.routes.get(worker.model.as_str());
            if route.is_some_and(|route| route.ready().is_some_and(|r| r.id == *worker)) {
                held.closed.push(worker.clone());
            }
            ready.gate.close();
            answering.push(Arc::clone(ready));
        }
        let said = held.events.iter().filter_map(|event| match event {
            WorkerEvent::Ready { worker, .. } => Some(worker.clone()),
            _ => None,
        });
        let ready = said.filter(|worker| !held.gone.contains(worker)).collect();
        for worker in held.closed.clone() {
            self.withdraw(&worker);
        }
        let models = self.policy.models().iter();
        let pinned = models.filter(|(_, model)| model.pinned != model.spec.pinned);
        let handed_over = HandedOver {
            workers: answering,
            ready,
            pins: pinned
                .map(|(name, model)| (name.clone(), model.pinned))
                .collect(),
            limits: self.limits_set.clone().into_iter().collect(),
        };
        self.answers.put(reply, Ok(handed_over));
    }

    pub(super) fn take_again(&mut self, reply: Reply<()>) {
        let Some(held) = self.held.take() else {
            // It was not even begun.
            self.answers.put(reply, Ok(()));
            return;
        };
        info!("deciding");
        for (model, pinned) in held.inherited.pins {
            if self.pin(model.clone(), pinned).is_err() {
                info!(%model, pinned, "it was pinned or unpinned by hand, and is not configured");
            }
        }
        for (domain, limit) in held.inherited.limits {
            let wish = LimitRequest {
                domain,
                limit: Some(limit),
                // What was to be kept is kept.
                persist: false,
            };
            if self.set_limit(wish).is_err() {
                info!(%domain, %limit, "its limit was set by hand, and it is not there");
            }
        }
        for worker in held.closed {
            self.admit_again(&worker);
        }
        for event in held.events {
            self.handle(Arrival::Worker(event));
        }
        for ticket in held.left {
            self.feed(Event::Cancel { ticket });
        }
        for command in held.commands {
            self.obey(command);
        }
        self.take_reading();
        self.answers.put(reply, Ok(()));
    }

    pub(super) fn leave_to(&mut self, heir: &Upstream, reply: Reply<bool>) {
        let Some(held) = self.held.take() else {
            self.answers.put(reply, Err(Refusal::ShuttingDown));
            return;
        };
        // Kept connections would hold up a worker with one thread.
        for ready in self.workers.values().filter_map(|live| live.ready.as_ref()) {
            ready.closing.cancel();
            ready.opened.close();
        }
        for route in self.routes.all() {
            let ready = self.heir(route.name(), heir);
            route.set_ready(Some(ready));
        }
        let mut waiting = Vec::new();
        for (name, model) in self.policy.models() {
            let tickets = model.queue.iter().map(|waiter| waiter.ticket);
            waiting.extend(tickets.map(|ticket| (name.clone(), ticket)));
        }
        for (model, ticket) in waiting {
            if !matches!(self.waiting.get(&ticket), Some(Pending::Lease { .. })) {
                continue;
            }
            if let Some(Pending::Lease { reply, .. }) = self.waiting.remove(&ticket) {
                self.send_on(&model, reply);
            }
        }
        let is_reload = |command: &Command| matches!(command, Command::Reload { .. });
        let reload = held.commands.iter().any(is_reload);
        for command in held.commands {
            self.pass_on(command);
        }
        self.finished = true;
        self.answers.put(reply, Ok(reload));
    }

    /// Leaves a command to the one who has taken over. Whoever asks for anything
    /// but a lease hears, when this is dropped, that residentd ends.
    pub(super) fn pass_on(&self, command: Command) {
        if let Command::Acquire { model, reply, .. } = command {
            self.send_on(&model, reply);
        }
    }

    fn send_on(&self, model: &ModelName, reply: Reply<Lease>) {
        let heir = self.routes.get(model.as_str()).and_then(|r| r.ready());
        let lease = heir.filter(|heir| heir.is_heir).and_then(|heir| {
            let signals = self.signals.clone();
            Lease::enter(heir, self.clock, signals)
        });
        // Whoever asked may have left.
        let _ = reply.send(lease.ok_or(Refusal::ShuttingDown));
    }

    /// Stands for the residentd that took over.
    fn heir(&mut self, model: &ModelName, upstream: &Upstream) -> Arc<ReadyWorker> {
        self.next_serial += 1;
        let now = self.clock.now();
        Arc::new(ReadyWorker {
            id: WorkerId {
                model: model.clone(),
                generation: 0,
            },
            upstream: upstream.clone(),
            grpc_upstream: None,
            opened: Opened::default(),
            pulse: Arc::new(Pulse::default()),
            gate: Gate::open(now, None),
            closing: CancellationToken::new(),
            serial: self.next_serial,
            since: now,
            loaded_in: None,
            is_heir: true,
            leader: None,
        })
    }
}
