//! A virtual machine around the policy: gates, workers and memory that do what
//! the policy says, and a queue of what happens when.
//!
//! It behaves as `control` and `worker` do: a request for a ready worker enters
//! by the gate and the policy does not hear of it; gates are copied into the
//! policy before each step; a gate with somebody inside refuses an eviction;
//! the last request to leave is told when the policy waits for that. Memory is
//! measured, truthfully, whenever it changes: when a worker is ready and when it
//! is gone.

mod deeds;
mod parking;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::journal::{Entry, What};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, Gaps, ModelName, ModelSpec, WorkerId};
use crate::policy::{CleanupOrder, Event, Policy, Refusal, Settings, Setup, Ticket};

/// How soon the policy is asked again when a deadline of its own has passed and
/// nothing came of it.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// One model, and how its worker behaves.
#[derive(Clone, Debug)]
pub struct Program {
    /// What the configuration says of it.
    pub spec: Arc<ModelSpec>,
    /// What its worker holds once it is ready, by domain.
    pub holds: BTreeMap<Domain, Bytes>,
    /// From spawn to ready.
    pub load: Duration,
    /// From the signal to end until its tree is gone.
    pub stop: Duration,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// It ends with an error when it should be ready.
    Exits,
    /// It is never ready.
    Hangs,
}

/// Something that was asked for, by its number from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wish(Ticket);

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// What became of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing yet.
    Waiting,
    /// It is inside a worker, or has been and was answered whole.
    Served {
        /// How long it waited for that.
        waited: Duration,
        /// Its model was ready when it came.
        hit: bool,
    },
    /// Its worker ended while it was inside.
    Cut,
    /// The operator's wish came true.
    Done,
    /// It was turned away.
    Refused(Refusal),
    /// Whoever asked left.
    Left,
}

#[derive(Clone, Debug)]
struct State {
    since: Timestamp,
    duration: Duration,
    outcome: Outcome,
}

#[derive(Clone, Debug)]
struct Worker {
    id: WorkerId,
    gpus: Vec<u32>,
    /// Admits requests.
    open: bool,
    /// It was ready once, and holds its bytes.
    holds: bool,
    /// It is parked, or on its way there.
    parked: bool,
    /// It was told to end.
    ending: bool,
    inside: BTreeSet<Ticket>,
    last_left: Timestamp,
    last_entered: Timestamp,
    /// Somebody was inside once.
    used: bool,
    /// Idle times between two uses that the policy was not told yet.
    gaps: Option<Gaps>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Ready(WorkerId),
    NeverReady(WorkerId),
    Parked(WorkerId),
    Unparked(WorkerId),
    Gone(WorkerId, &'static str),
    Leaves(WorkerId, Ticket),
}

/// The machine, its workers and its clients.
#[derive(Clone, Debug)]
pub struct Machine {
    policy: Policy,
    now: Timestamp,
    wake: Option<Timestamp>,
    queue: BinaryHeap<Reverse<(Timestamp, u64, Happening)>>,
    queued: u64,
    memory: BTreeMap<Domain, Bytes>,
    programs: BTreeMap<ModelName, Program>,
    workers: BTreeMap<ModelName, Worker>,
    spawned: BTreeMap<ModelName, u64>,
    wishes: Vec<State>,
    journal: Option<Vec<Entry>>,
}

impl Machine {
    /// Builds a machine with this much memory in each domain, on which nothing
    /// runs. Models to preload are loaded at once.
    #[must_use]
    pub fn new(
        settings: Settings,
        memory: BTreeMap<Domain, Bytes>,
        programs: impl IntoIterator<Item = Program>,
    ) -> Self {
        let programs: BTreeMap<_, _> = programs
            .into_iter()
            .map(|program| (program.spec.name.clone(), program))
            .collect();
        let setups = programs.values().map(|program| Setup {
            spec: Arc::clone(&program.spec),
            weights: Bytes::ZERO,
            footprint: BTreeMap::new(),
        });
        let mut machine = Self {
            policy: Policy::new(settings, setups),
            now: Timestamp::START,
            wake: None,
            queue: BinaryHeap::new(),
            queued: 0,
            memory,
            programs,
            workers: BTreeMap::new(),
            spawned: BTreeMap::new(),
            wishes: Vec::new(),
            journal: None,
        };
        machine.measure();
        machine
    }

    /// Writes down everything that happens from now on.
    pub fn keep_journal(&mut self) {
        self.journal.get_or_insert_default();
    }

    /// Returns what was written down.
    #[must_use]
    pub fn journal(&self) -> &[Entry] {
        self.journal.as_deref().unwrap_or_default()
    }

    /// Returns the policy as it stands.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Returns the moment it is now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// Returns how often workers of each model were spawned.
    #[must_use]
    pub fn spawned(&self) -> &BTreeMap<ModelName, u64> {
        &self.spawned
    }

    /// Returns what became of a wish.
    #[must_use]
    pub fn outcome(&self, wish: Wish) -> &Outcome {
        let index = usize::try_from(wish.0).expect("wishes are kept in a list");
        &self.wishes[index].outcome
    }

    /// Lets everything happen that is due until `at`, and makes it `at`.
    pub fn run_until(&mut self, at: Timestamp) {
        while let Some(due) = self.next_due().filter(|due| *due <= at) {
            self.proceed(due);
        }
        self.now = self.now.max(at);
    }

    /// Lets everything happen until nobody waits, loads, works or ends.
    pub fn run_out(&mut self) {
        let waits = |state: &State| state.outcome == Outcome::Waiting;
        while !self.queue.is_empty() || self.wishes.iter().any(waits) {
            let Some(due) = self.next_due() else { return };
            self.proceed(due);
        }
    }

    /// Lets things happen until a wish is answered or nothing is due, and all
    /// that is due at that moment.
    pub fn run_until_answered(&mut self, wish: Wish) {
        while *self.outcome(wish) == Outcome::Waiting {
            let Some(due) = self.next_due() else { return };
            self.proceed(due);
        }
        self.run_until(self.now);
    }

    /// A request for a model comes, that will stay `duration` in its worker and
    /// waits `patience` for it.
    pub fn request(&mut self, model: &ModelName, duration: Duration, patience: Duration) -> Wish {
        let wish = self.wish(duration, "request", Some(model));
        let deadline = self.now + patience;
        let open = self.workers.get(model).filter(|worker| worker.open);
        match open.map(|worker| worker.id.clone()) {
            Some(worker) => self.enter(wish.0, &worker, true),
            None => self.feed(Event::Acquire {
                ticket: wish.0,
                model: model.clone(),
                deadline,
            }),
        }
        wish
    }

    /// Whoever asked leaves, waiting or inside.
    pub fn leave(&mut self, wish: Wish) {
        self.answer(wish.0, Outcome::Left, || "leaves".to_owned());
        let inside = |worker: &&mut Worker| worker.inside.contains(&wish.0);
        match self.workers.values_mut().find(inside) {
            Some(worker) => {
                let id = worker.id.clone();
                self.left(&id, wish.0);
            }
            None => self.feed(Event::Cancel { ticket: wish.0 }),
        }
    }

    /// An operator wants a model ready, and waits `patience` for it.
    pub fn load(&mut self, model: &ModelName, patience: Duration) -> Wish {
        let wish = self.wish(Duration::ZERO, "load", Some(model));
        self.feed(Event::Load {
            ticket: wish.0,
            model: model.clone(),
            deadline: self.now + patience,
        });
        wish
    }

    /// An operator wants a model gone.
    pub fn unload(&mut self, model: &ModelName) -> Wish {
        let wish = self.wish(Duration::ZERO, "unload", Some(model));
        self.feed(Event::Unload {
            ticket: wish.0,
            model: model.clone(),
        });
        wish
    }

    /// An operator wants memory back, and waits `patience` for it.
    pub fn cleanup(&mut self, order: CleanupOrder, patience: Duration) -> Wish {
        let wish = self.wish(Duration::ZERO, "cleanup", None);
        self.feed(Event::Cleanup {
            ticket: wish.0,
            order,
            deadline: self.now + patience,
        });
        wish
    }

    /// An operator pins or unpins a model.
    pub fn pin(&mut self, model: &ModelName, pinned: bool) {
        self.feed(Event::Pin {
            model: model.clone(),
            pinned,
        });
    }

    /// A user's limit changes.
    pub fn limit(&mut self, domain: Domain, limit: Bytes) {
        self.feed(Event::Limit { domain, limit });
    }

    /// A model's worker is killed from outside, if it has one.
    pub fn kill(&mut self, model: &ModelName) {
        if let Some(worker) = self.workers.get(model) {
            let id = worker.id.clone();
            self.gone(&id, "signal 9");
        }
    }

    /// From its next life on the model's worker behaves like this.
    pub fn set_fault(&mut self, model: &ModelName, fault: Fault) {
        if let Some(program) = self.programs.get_mut(model) {
            program.fault = fault;
        }
    }

    fn wish(&mut self, duration: Duration, verb: &'static str, model: Option<&ModelName>) -> Wish {
        let number = u64::try_from(self.wishes.len()).expect("a list fits into memory");
        let wish = Wish(number);
        self.wishes.push(State {
            since: self.now,
            duration,
            outcome: Outcome::Waiting,
        });
        self.write(|| What::Asked {
            wish,
            verb,
            model: model.cloned(),
        });
        wish
    }

    fn next_due(&self) -> Option<Timestamp> {
        let queued = self.queue.peek().map(|Reverse((at, _, _))| *at);
        queued.into_iter().chain(self.wake).min()
    }
}
