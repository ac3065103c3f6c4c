//! The controller task: turns what arrives into policy events, and effects
//! into deeds.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::adopt::Adoption;
use super::answers::Answers;
use super::arrivals::{Arrival, Arrivals};
use super::command::Reply;
use super::files::Files;
use super::handover::{Held, Inheritance};
use super::tell::Told;
use super::{
    CleanupReport, Controller, Counters, Guests, Lease, LimitSource, LogTail, ReadyWorker,
    Recorder, Refusal, Reloads, Routes, Signal, Snapshot, What,
};
use crate::clock::{Clock, Timestamp};
use crate::gate::Gate;
use crate::memory::{MemorySource, OomWatch, Pace, Reading};
use crate::model::{Bytes, Domain, ModelName, Upstream, WorkerId, WorkerRecord};
use crate::policy::{Event, Phase, Policy, Ticket};
use crate::procfs::ProcessTree;
use crate::store::Store;
use crate::telemetry;
use crate::worker::{Adoptee, Opened, Spawner, Stop, Survey, Tail, WorkerEvent, WorkerHandle};

/// Arrivals handled before the next snapshot is published, so that a burst
/// costs one snapshot and a quiet moment shows each step.
const BATCH: usize = 64;

/// What the controller is built from.
#[derive(Debug)]
pub struct Parts {
    /// The policy, with every model in it.
    pub policy: Policy,
    /// Every model's route.
    pub routes: Arc<Routes>,
    /// Starts workers.
    pub spawner: Arc<dyn Spawner>,
    /// Measures.
    pub memory: Arc<dyn MemorySource>,
    /// Keeps what is learned.
    pub store: Store,
    /// Reads the time.
    pub clock: Clock,
    /// Who set the host's limit.
    pub limit_source: LimitSource,
    /// Idle models are unloaded under pressure without being asked.
    pub auto_cleanup: bool,
    /// Number of the first decision.
    pub first_decision: u64,
    /// Workers of an earlier residentd that are taken back.
    pub adoptees: Vec<Adoptee>,
    /// Tells the configuration from others.
    pub config_hash: String,
    /// What another residentd hands over.
    pub inherited: Option<Inheritance>,
}

/// Starts the controller task and returns the handle to it.
#[must_use]
pub fn start(parts: Parts) -> Controller {
    let (commands_in, commands) = mpsc::channel(super::COMMAND_QUEUE);
    #[expect(
        clippy::disallowed_methods,
        reason = "a lease's drop cannot wait; at most one signal per waiting ask and watched gate"
    )]
    let (signals_in, signals) = mpsc::unbounded_channel();
    #[expect(
        clippy::disallowed_methods,
        reason = "a worker task that reaps cannot wait; six events at most each, and one for each park"
    )]
    let (events_in, events) = mpsc::unbounded_channel();
    let readings = parts.memory.readings();
    let reading = readings.borrow().clone();
    let (recorder, decisions) = super::record(parts.clock, parts.first_decision);
    let mut task = Task {
        policy: parts.policy,
        clock: parts.clock,
        routes: Arc::clone(&parts.routes),
        spawner: parts.spawner,
        memory: parts.memory,
        files: Files::new(Survey::start(parts.clock)),
        store: parts.store,
        events: events_in,
        signals: signals_in.clone(),
        workers: BTreeMap::new(),
        records: BTreeMap::new(),
        waiting: HashMap::new(),
        answers: Answers::default(),
        finishing: Vec::new(),
        finished: false,
        guests: parts.inherited.as_ref().map(|i| i.guests.clone()),
        held: parts.inherited.map(Held::inherited),
        reading,
        pace: Pace::Calm,
        limit_source: parts.limit_source,
        limits_set: BTreeMap::new(),
        auto_cleanup: parts.auto_cleanup,
        counters: Counters {
            config: Reloads {
                hash: parts.config_hash,
                ..Reloads::default()
            },
            ..Counters::default()
        },
        oom: OomWatch::default(),
        recorder,
        told: Told::default(),
        next_serial: 0,
        seq: 0,
    };
    task.files
        .look_at(task.policy.models().values().map(|m| &m.spec));
    task.take_back(parts.adoptees);
    if task.held.is_none() {
        task.take_reading();
    }
    let (publish, snapshots) = watch::channel(Arc::new(task.snapshot()));
    let handle = Controller::from_parts(
        parts.routes,
        commands_in,
        signals_in,
        (snapshots, decisions),
        parts.clock,
    );
    telemetry::spawn(
        "controller",
        run(
            task,
            Arrivals {
                commands,
                signals,
                events,
                readings,
            },
            publish,
        ),
    );
    handle
}

async fn run(mut task: Task, mut arrivals: Arrivals, publish: watch::Sender<Arc<Snapshot>>) {
    if task.held.is_none() {
        task.feed(Event::Tick);
    }
    loop {
        publish.send_replace(Arc::new(task.snapshot()));
        task.answers.give();
        if task.finished {
            break;
        }
        let wake = match task.held {
            Some(_) => None,
            None => task.policy.next_wake(),
        };
        let mut arrival = Some(arrivals.next(task.clock, wake).await);
        for _ in 0..BATCH {
            let Some(next) = arrival else { break };
            if matches!(next, Arrival::Reading) {
                task.reading = arrivals.newest_reading();
            }
            task.handle(next);
            // Nothing is ours to handle then.
            arrival = (!task.finished).then(|| arrivals.ready_now()).flatten();
        }
        if let Some(rest) = arrival {
            task.handle(rest);
        }
    }
    arrivals.commands.close();
    while let Ok(command) = arrivals.commands.try_recv() {
        task.pass_on(command);
    }
    task.answer_the_rest();
    task.answers.give();
}

/// One live worker, as the controller holds it.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) handle: WorkerHandle,
    /// The GPUs it is placed on.
    pub(super) gpus: Vec<u32>,
    pub(super) tree: Option<Arc<ProcessTree>>,
    pub(super) ready: Option<Arc<ReadyWorker>>,
    /// How it came to be ours, when we did not spawn it.
    pub(super) adoption: Option<Adoption>,
    /// What is kept of it for a later residentd.
    pub(super) record: Option<Box<WorkerRecord>>,
}

impl Live {
    pub(super) fn pid(&self) -> Option<i32> {
        self.tree.as_ref().map(|tree| tree.leader().pid)
    }
}

/// What is kept of a model's past lives.
#[derive(Clone, Debug, Default)]
pub(super) struct Record {
    pub(super) tail: Option<(u64, Arc<Tail>)>,
    pub(super) accesses: u64,
    pub(super) last_used: Option<Timestamp>,
}

/// Who waits under a ticket.
pub(super) enum Pending {
    Lease { reply: Reply<Lease>, late: bool },
    Done(Reply<()>),
    Cleanup(Reply<CleanupReport>),
}

pub(super) struct Task {
    pub(super) policy: Policy,
    pub(super) clock: Clock,
    pub(super) routes: Arc<Routes>,
    pub(super) spawner: Arc<dyn Spawner>,
    pub(super) memory: Arc<dyn MemorySource>,
    pub(super) files: Files,
    pub(super) store: Store,
    pub(super) events: mpsc::UnboundedSender<WorkerEvent>,
    pub(super) signals: mpsc::UnboundedSender<Signal>,
    pub(super) workers: BTreeMap<WorkerId, Live>,
    pub(super) records: BTreeMap<ModelName, Record>,
    pub(super) waiting: HashMap<Ticket, Pending>,
    pub(super) answers: Answers,
    pub(super) finishing: Vec<Reply<()>>,
    pub(super) finished: bool,
    /// What waits while one residentd takes over from another.
    pub(super) held: Option<Held>,
    /// Requests inside of workers in the residentd before this one.
    guests: Option<Guests>,
    pub(super) reading: Arc<Reading>,
    pace: Pace,
    pub(super) limit_source: LimitSource,
    /// By an operator, since the start.
    pub(super) limits_set: BTreeMap<Domain, Bytes>,
    pub(super) auto_cleanup: bool,
    pub(super) counters: Counters,
    pub(super) oom: OomWatch,
    pub(super) recorder: Recorder,
    pub(super) told: Told,
    pub(super) next_serial: u64,
    pub(super) seq: u64,
}

impl Task {
    pub(super) fn handle(&mut self, arrival: Arrival) {
        let Some(arrival) = self.hold_back(arrival) else {
            return;
        };
        match arrival {
            Arrival::Command(command) => self.obey(command),
            Arrival::Signal(Signal::Cancel { ticket }) => {
                self.waiting.remove(&ticket);
                self.feed(Event::Cancel { ticket });
            }
            // The gates are read before every step: the step itself is enough.
            Arrival::Signal(Signal::Idle { .. }) | Arrival::Wake => self.feed(Event::Tick),
            Arrival::Worker(event) => self.hear(event),
            Arrival::Reading => self.take_reading(),
            Arrival::Abandoned => {
                self.kill_all();
                self.feed(Event::Shutdown {
                    until: self.clock.now(),
                });
            }
        }
    }

    fn hear(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Spawned {
                worker,
                tree,
                record,
            } => self.worker_runs(worker, tree, record),
            WorkerEvent::Ready {
                worker,
                upstream,
                grpc_upstream,
                opened,
            } => self.worker_ready(&worker, (upstream, grpc_upstream), opened),
            WorkerEvent::Used { worker, files } => self.keep_files(&worker.model, &files),
            WorkerEvent::Prefetched(report) => self.prefetched(&report),
            WorkerEvent::Parked { worker } => {
                self.feed(Event::Parked { worker });
                self.memory.sample_now();
            }
            WorkerEvent::Unparked { worker } => self.worker_unparked(worker),
            WorkerEvent::ParkFailed { worker, said } => {
                self.feed(Event::ParkFailed { worker, said });
            }
            WorkerEvent::Unhealthy { worker, why } => self.feed(Event::Unhealthy { worker, why }),
            WorkerEvent::NeverReady { worker, after } => {
                warn!(%worker, after_s = after.as_secs_f64(), "worker missed its start deadline");
                let last_lines = self.tail_of(&worker.model, ERROR_LINES).lines;
                self.feed(Event::NeverReady {
                    worker,
                    after,
                    last_lines,
                });
            }
            WorkerEvent::Exited {
                worker,
                status,
                mut last_lines,
            } => {
                let exit = status;
                let (status, out_of_memory) = self.autopsy(&worker, &exit, &last_lines);
                let verdict = (status.as_str(), !out_of_memory.is_empty());
                self.tell_exit(&worker, &exit, verdict);
                self.bury(&worker);
                self.store.forget_worker(&worker);
                let from = last_lines.len().saturating_sub(ERROR_LINES);
                last_lines.drain(..from);
                self.feed(Event::Exited {
                    worker: worker.clone(),
                    status,
                    out_of_memory,
                    last_lines,
                });
                // Only a reading later than the step above shows bytes back.
                self.memory.forget(&worker);
                self.tell_backoff(&worker);
                self.files.look_again();
            }
        }
    }

    fn worker_ready(
        &mut self,
        worker: &WorkerId,
        (upstream, grpc_upstream): (Upstream, Option<Upstream>),
        opened: Opened,
    ) {
        let model = &self.policy.models()[&worker.model];
        if model.phase != Phase::Starting || model.generation != worker.generation {
            return;
        }
        let Some(live) = self.workers.get_mut(worker) else {
            return;
        };
        let now = self.clock.now();
        debug!(%worker, %upstream, "worker answers");
        if model.queue.iter().all(|waiter| !waiter.wants_lease) {
            // A server with one thread would wait for a request on it.
            opened.close();
        }
        let took = match &live.adoption {
            // It was ready all the time.
            Some(adoption) if adoption.was_ready => None,
            Some(adoption) => Some(adoption.age(now)),
            None => Some(now.since(model.since)),
        };
        let adoption = live.adoption.as_ref();
        let idle_since = adoption.and_then(|adoption| adoption.idle_since);
        let reload = model.history.evicted;
        self.next_serial += 1;
        let ready = Arc::new(ReadyWorker {
            id: worker.clone(),
            upstream,
            grpc_upstream,
            opened,
            pulse: Arc::clone(&live.handle.pulse),
            gate: Gate::open(idle_since.unwrap_or(now), model.spec.concurrency),
            closing: CancellationToken::new(),
            serial: self.next_serial,
            since: now,
            loaded_in: took,
            is_heir: false,
            leader: live.tree.as_ref().map(|tree| tree.leader()),
        });
        if let Some(guests) = &self.guests {
            guests.enter(&ready, self.clock, &self.signals);
        }
        live.ready = Some(Arc::clone(&ready));
        if let Some(route) = self.routes.get(worker.model.as_str()) {
            route.set_ready(Some(ready));
        }
        if let Some(took) = took {
            self.store.loaded(&worker.model, took);
            self.tell(worker, What::Ready { took, reload });
            self.keep_ready(worker);
        }
        self.feed(Event::Ready {
            worker: worker.clone(),
        });
        // Whoever waited goes first: this wakes threads that take their time.
        self.memory.loaded(worker);
        self.files.look_again();
    }

    /// Steps the policy and carries out what it says, until nothing follows.
    pub(super) fn feed(&mut self, event: Event) {
        let mut todo = VecDeque::from([event]);
        while let Some(event) = todo.pop_front() {
            self.read_gates();
            let effects = self.policy.step(self.clock.now(), event);
            self.tell_pressure();
            for effect in effects {
                todo.extend(self.carry_out(effect));
            }
            self.release_gates();
            if self.watch_gates() {
                todo.push_back(Event::Tick);
            }
        }
        self.tell_waits();
        let pace = if self.policy.is_restless() {
            Pace::Busy
        } else if self.policy.is_watchful() {
            Pace::Watchful
        } else {
            Pace::Calm
        };
        if pace != self.pace {
            self.pace = pace;
            self.memory.pace(pace);
        }
    }

    pub(super) fn kill_all(&self) {
        for live in self.workers.values() {
            live.handle.stop(Stop::Kill);
        }
    }

    pub(super) fn take_reading(&mut self) {
        self.oom.notice(self.clock.now(), self.reading.host.oom);
        let measured = self.measured();
        self.feed(Event::Measured(measured));
        self.mind_files();
        self.follow_workers();
        self.tell_refusals();
    }

    pub(super) fn tail_of(&self, model: &ModelName, lines: usize) -> LogTail {
        let Some((generation, tail)) = self.records.get(model).and_then(|r| r.tail.as_ref()) else {
            return LogTail::default();
        };
        let (lines, end) = tail.read(lines);
        LogTail {
            generation: *generation,
            end,
            lines,
        }
    }

    fn answer_the_rest(&mut self) {
        let tickets: Vec<_> = self.waiting.keys().copied().collect();
        for ticket in tickets {
            self.reject(ticket, Refusal::ShuttingDown);
        }
    }
}

/// Lines of a worker's output that go into an error.
const ERROR_LINES: usize = 20;
