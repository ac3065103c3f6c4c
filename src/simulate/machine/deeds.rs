//! What the machine does: it lets things happen that are due, tells the policy,
//! and carries out what the policy says.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::super::journal::{Entry, What};
use super::{ASK_AGAIN, Fault, Happening, Machine, Outcome, State, Wish, Worker};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, Gaps, GpuVendor, WorkerId};
use crate::policy::{Activity, DomainMeasure, Effect, Event, GpuFacts, Measure, Measured, Ticket};

impl Machine {
    /// Lets the one thing happen that is due at `at`.
    pub(super) fn proceed(&mut self, at: Timestamp) {
        self.now = self.now.max(at);
        let is_due = |Reverse((due, _, _)): &Reverse<(Timestamp, u64, Happening)>| *due <= at;
        if !self.queue.peek().is_some_and(is_due) {
            self.feed(Event::Tick);
            return;
        }
        let Some(Reverse((_, _, happening))) = self.queue.pop() else {
            return;
        };
        match happening {
            Happening::Ready(worker) => self.ready(&worker),
            Happening::NeverReady(worker) => self.never_ready(&worker),
            Happening::Parked(worker) => self.parked(&worker),
            Happening::Unparked(worker) => self.unparked(&worker),
            Happening::Gone(worker, status) => self.gone(&worker, status),
            Happening::Leaves(worker, ticket) => self.left(&worker, ticket),
        }
    }

    pub(super) fn after(&mut self, time: Duration, happening: Happening) {
        self.queued += 1;
        self.queue
            .push(Reverse((self.now + time, self.queued, happening)));
    }

    /// Steps the policy and does what it says, until nothing follows.
    pub(super) fn feed(&mut self, event: Event) {
        let mut todo = VecDeque::from([event]);
        while let Some(event) = todo.pop_front() {
            for worker in self.workers.values_mut() {
                if let Some(gaps) = worker.gaps.take() {
                    self.policy.learn_gaps(&worker.id.model, &gaps);
                }
            }
            let ready = self.workers.values().filter(|worker| worker.holds);
            self.policy
                .observe(ready.map(|worker| (&worker.id, worker.activity())));
            for effect in self.policy.step(self.now, event) {
                todo.extend(self.carry_out(effect));
            }
        }
        let soonest = self.now + ASK_AGAIN;
        self.wake = self.policy.next_wake().map(|at| match at > self.now {
            true => at,
            false => soonest,
        });
    }

    /// Does one thing that the policy wants, and returns what follows at once.
    fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Grant { ticket, worker } => self.enter(ticket, &worker, false),
            Effect::Done { ticket } => self.answer(ticket, Outcome::Done, || "done".into()),
            Effect::CleanedUp { ticket, report } => {
                let text = || format!("done: freed {}", report.freed);
                self.answer(ticket, Outcome::Done, text);
            }
            Effect::Reject { ticket, refusal } => {
                let text = format!("refused, {}: {refusal}", refusal.code());
                self.answer(ticket, Outcome::Refused(refusal), || text);
            }
            Effect::Spawn { worker, gpus, .. } => self.spawn(worker, gpus),
            Effect::Evict {
                worker,
                reason,
                kill,
            } => {
                let inside = self.inside(&worker);
                if inside > 0 {
                    self.tell(&worker, || format!("is busy and stays, {inside} inside"));
                    return Some(Event::EvictRefused { worker, inside });
                }
                self.tell(&worker, || format!("is evicted: {reason}"));
                self.end(&worker, kill);
            }
            Effect::Park { worker, reason, .. } => return self.park(worker, &reason),
            Effect::Unpark { worker, .. } => self.unpark(worker),
            Effect::Drain { worker, reason } => {
                self.tell(&worker, || format!("drains: {reason}"));
                self.close(&worker);
                return Some(Event::Tick);
            }
            Effect::Resume { worker } => {
                self.tell(&worker, || "stays after all".to_owned());
                if let Some(worker) = self.worker(&worker) {
                    worker.open = true;
                }
            }
            Effect::Terminate {
                worker,
                reason,
                kill,
            } => {
                self.tell(&worker, || format!("is told to end: {reason}"));
                self.end(&worker, kill);
            }
            Effect::Reclaimed { .. }
            | Effect::Parked { .. }
            | Effect::Learn { .. }
            | Effect::Forget { .. }
            | Effect::Prefetch { .. }
            | Effect::CallOff { .. }
            | Effect::Finished => {}
        }
        None
    }

    fn spawn(&mut self, id: WorkerId, gpus: Vec<u32>) {
        let program = &self.programs[&id.model];
        let (load, fault) = (program.load, program.fault);
        let timeout = program.spec.start_timeout;
        *self.spawned.entry(id.model.clone()).or_default() += 1;
        self.tell(&id, || "is spawned".to_owned());
        self.workers.insert(
            id.model.clone(),
            Worker {
                id: id.clone(),
                gpus,
                open: false,
                holds: false,
                parked: false,
                ending: false,
                inside: BTreeSet::new(),
                last_left: self.now,
                last_entered: self.now,
                used: false,
                gaps: None,
            },
        );
        match fault {
            Fault::Exits => self.after(load, Happening::Gone(id, "exit code 1")),
            Fault::None if load < timeout => self.after(load, Happening::Ready(id)),
            Fault::None | Fault::Hangs => self.after(timeout, Happening::NeverReady(id)),
        }
    }

    fn ready(&mut self, id: &WorkerId) {
        let now = self.now;
        let Some(worker) = self
            .worker(id)
            .filter(|worker| !worker.holds && !worker.ending)
        else {
            return;
        };
        worker.holds = true;
        worker.open = true;
        worker.last_left = now;
        worker.last_entered = now;
        self.tell(id, || "is ready".to_owned());
        self.feed(Event::Ready { worker: id.clone() });
        self.measure();
    }

    fn never_ready(&mut self, id: &WorkerId) {
        if self.worker(id).is_none_or(|worker| worker.ending) {
            return;
        }
        self.tell(id, || "was never ready".to_owned());
        self.feed(Event::NeverReady {
            worker: id.clone(),
            after: self.programs[&id.model].spec.start_timeout,
            last_lines: Vec::new(),
        });
        self.end(id, false);
    }

    /// The worker's tree is gone and its bytes are back; whoever was inside
    /// gets no whole answer.
    pub(super) fn gone(&mut self, id: &WorkerId, status: &'static str) {
        if self.worker(id).is_none() {
            return;
        }
        self.tell(id, || format!("is gone: {status}"));
        let worker = self.workers.remove(&id.model).expect("looked up above");
        for ticket in worker.inside {
            self.answer(ticket, Outcome::Cut, || "is cut off".to_owned());
        }
        self.feed(Event::Exited {
            worker: id.clone(),
            status: status.to_owned(),
            out_of_memory: Vec::new(),
            last_lines: Vec::new(),
        });
        self.measure();
    }

    pub(super) fn enter(&mut self, ticket: Ticket, id: &WorkerId, hit: bool) {
        let wish = Wish(ticket);
        self.write(|| What::Entered {
            wish,
            worker: id.clone(),
        });
        let now = self.now;
        let state = self.state(ticket);
        let waited = now.since(state.since);
        state.outcome = Outcome::Served { waited, hit };
        let duration = state.duration;
        let worker = self.worker(id).expect("leases are on live workers");
        if worker.used {
            let class = Gaps::class(now.since(worker.last_entered));
            worker.gaps.get_or_insert_default().0[class] += 1;
        }
        worker.used = true;
        worker.last_entered = now;
        worker.inside.insert(ticket);
        self.after(duration, Happening::Leaves(id.clone(), ticket));
    }

    pub(super) fn left(&mut self, id: &WorkerId, ticket: Ticket) {
        let now = self.now;
        let Some(worker) = self.worker(id) else {
            return;
        };
        if !worker.inside.remove(&ticket) {
            return;
        }
        worker.last_left = now;
        let is_empty = worker.inside.is_empty();
        if matches!(self.state(ticket).outcome, Outcome::Served { .. }) {
            self.write(|| What::Answered {
                wish: Wish(ticket),
                text: "is answered".to_owned(),
            });
        }
        if is_empty && self.policy.awaits_idle() {
            self.feed(Event::Tick);
        }
    }

    /// Closes the gate and ends the worker: after its own time, or at once.
    fn end(&mut self, id: &WorkerId, kill: bool) {
        if let Some(worker) = self.worker(id) {
            worker.open = false;
            worker.ending = true;
        }
        let stop = match kill {
            true => Duration::ZERO,
            false => self.programs[&id.model].stop,
        };
        self.after(stop, Happening::Gone(id.clone(), "ended"));
    }

    pub(super) fn close(&mut self, id: &WorkerId) {
        if let Some(worker) = self.worker(id) {
            worker.open = false;
        }
    }

    pub(super) fn inside(&mut self, id: &WorkerId) -> u32 {
        let inside = self.worker(id).map_or(0, |worker| worker.inside.len());
        u32::try_from(inside).unwrap_or(u32::MAX)
    }

    pub(super) fn worker(&mut self, id: &WorkerId) -> Option<&mut Worker> {
        self.workers
            .get_mut(&id.model)
            .filter(|worker| worker.id == *id)
    }

    fn state(&mut self, ticket: Ticket) -> &mut State {
        let index = usize::try_from(ticket).expect("wishes are kept in a list");
        &mut self.wishes[index]
    }

    pub(super) fn answer(
        &mut self,
        ticket: Ticket,
        outcome: Outcome,
        text: impl FnOnce() -> String,
    ) {
        let wish = Wish(ticket);
        self.write(|| What::Answered { wish, text: text() });
        self.state(ticket).outcome = outcome;
    }

    pub(super) fn tell(&mut self, worker: &WorkerId, text: impl FnOnce() -> String) {
        self.write(|| What::Worker {
            worker: worker.clone(),
            text: text(),
        });
    }

    pub(super) fn write(&mut self, what: impl FnOnce() -> What) {
        if let Some(journal) = &mut self.journal {
            journal.push(Entry {
                at: self.now,
                what: what(),
            });
        }
    }

    /// Tells the policy what every worker holds, and what is left.
    pub(super) fn measure(&mut self) {
        let mut workers = BTreeMap::new();
        let mut free = self.memory.clone();
        for worker in self.workers.values().filter(|worker| worker.holds) {
            let held = self.held(worker);
            let is_there = |domain: &Domain| match domain {
                Domain::Host => true,
                Domain::Gpu(index) => worker.gpus.contains(index),
            };
            let mut domains = BTreeMap::new();
            for (domain, bytes) in held.iter().filter(|(domain, _)| is_there(domain)) {
                domains.insert(
                    *domain,
                    Measure {
                        usage: *bytes,
                        unreclaimable: *bytes,
                    },
                );
                if let Some(free) = free.get_mut(domain) {
                    *free -= *bytes;
                }
            }
            workers.insert(worker.id.clone(), domains);
        }
        let measure = |(domain, total): (&Domain, &Bytes)| {
            let headroom = free[domain];
            let total = *total;
            (*domain, DomainMeasure { total, headroom })
        };
        self.feed(Event::Measured(Measured {
            at: self.now,
            gpus_at: self.now,
            domains: self.memory.iter().map(measure).collect(),
            workers,
            counted_twice: Bytes::ZERO,
            gpus: self.memory.keys().filter_map(facts).collect(),
        }));
    }
}

impl Worker {
    fn activity(&self) -> Activity {
        Activity {
            inside: u32::try_from(self.inside.len()).unwrap_or(u32::MAX),
            last_left: self.last_left,
            last_entered: self.last_entered,
        }
    }
}

fn facts(domain: &Domain) -> Option<(u32, GpuFacts)> {
    let Domain::Gpu(index) = *domain else {
        return None;
    };
    let facts = GpuFacts {
        uuid: format!("GPU-{index}"),
        unified: false,
        vendor: GpuVendor::Nvidia,
    };
    Some((index, facts))
}
