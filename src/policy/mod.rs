//! The pure core: which workers run.
//!
//! [`Policy::step`] takes one [`Event`] at a given time and answers with
//! [`Effect`]s. There is no clock, task, channel, file, log line or chance in
//! here: the same events give the same effects. Deadlines go out through
//! [`Policy::next_wake`].
//!
//! | file | decides |
//! | --- | --- |
//! | `admission` | who waits, who is granted, who is turned away, what is loaded next |
//! | `verdict` | whether one model may start, must wait, or takes others' place |
//! | `adoption` | nothing: takes in workers that an earlier residentd spawned |
//! | `lifecycle` | one model's phases |
//! | `failures` | how long a model that failed rests: backoff and breaker |
//! | `ledger` | is there room, and when are bytes back |
//! | `footprint` | what a load is expected to need |
//! | `placement` | which GPUs a model goes to |
//! | `eviction` | who goes to make room, by `lru` or by `cost` |
//! | `reuse` | what it would cost that a worker goes |
//! | `parking` | which victims are parked instead of ended, and when their bytes are back |
//! | `prefetch` | whose files are read ahead, and how much memory there is for it |
//! | `patience` | when busy workers are drained to make room |
//! | `pressure` | how tight memory is |
//! | `relief` | who goes for idleness, pressure, or an operator's cleanup |
//! | `departure` | unload, drain, exit, shutdown |
//! | `configure` | what a changed configuration means for workers that run |
//! | `attention` | nothing: says how closely memory and gates should be watched |
//! | `explain` | nothing: says why a model is not ready and what asking would do |

#![warn(clippy::wildcard_enum_match_arm)]

mod admission;
mod adoption;
mod attention;
mod configure;
mod departure;
mod event;
mod eviction;
mod explain;
mod failures;
mod footprint;
mod history;
mod ledger;
mod lifecycle;
mod parking;
mod patience;
mod placement;
mod prefetch;
mod pressure;
mod reason;
mod relief;
mod reuse;
mod verdict;
mod words;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

pub use adoption::Adopted;
pub use configure::{Change, ModelChange};
pub use event::{
    Activity, CleanupOrder, CleanupReport, DomainMeasure, Effect, Event, GpuFacts, Measure,
    Measured, Skipped, Ticket,
};
pub use explain::{Explanation, Holder, Outlook, Why};
pub use footprint::{from_weights, from_weights_on_gpus};
pub use history::History;
pub use ledger::DomainBooks;
use ledger::Ledger;
pub use lifecycle::ModelState;
pub use parking::ParkFault;
use pressure::Levels;
pub use pressure::Threshold;
pub use reason::EvictReason;
use relief::Cleanup;
use reuse::{Common, Worth};
pub use words::{
    Expectation, Expected, ExpectedSource, Phase, PressureLevel, Protection, Refusal, Shortage,
    Skip,
};

use crate::clock::Timestamp;
use crate::model::{
    Bytes, DeviceRef, Domain, EvictionPolicy, Footprint, Gaps, ModelName, ModelSpec, WorkerId,
};

/// What the configuration says of the policy as a whole.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The user's limit on host RAM.
    pub limit: Bytes,
    /// Headroom never given to workers.
    pub reserve: Bytes,
    /// The user's limits on GPUs.
    pub gpu_limits: BTreeMap<DeviceRef, Bytes>,
    /// Headroom under this is soft pressure.
    pub soft: Threshold,
    /// Headroom under this is hard pressure.
    pub hard: Threshold,
    /// Unload idle models under soft pressure without being asked.
    pub auto_cleanup: bool,
    /// End workers at once under hard pressure.
    pub emergency: bool,
    /// Who goes to make room.
    pub eviction: EvictionPolicy,
    /// How long a request waits for busy workers before the least valuable of
    /// them are drained for it.
    pub patience: Duration,
    /// How long a drain may take.
    pub drain_timeout: Duration,
}

/// One model as the policy gets it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What the configuration says.
    pub spec: Arc<ModelSpec>,
    /// Size of its weight files.
    pub weights: Bytes,
    /// What past lives used, kept over restarts.
    pub footprint: BTreeMap<Domain, Footprint>,
}

/// Everything that decides. Cloned to branch from one state into many.
#[derive(Clone, Debug)]
pub struct Policy {
    settings: Settings,
    models: BTreeMap<ModelName, ModelState>,
    ledger: Ledger,
    levels: Levels,
    cleanups: Vec<Cleanup>,
    shutdown: Option<Timestamp>,
    finished: bool,
    blocked: bool,
    /// When the next waiter loses patience with busy workers.
    patience_at: Option<Timestamp>,
    /// When the step began that is being made.
    now: Timestamp,
    /// Times between requests of all models.
    common: Common,
    /// The last generation of models that were removed and forgotten.
    past_lives: BTreeMap<ModelName, u64>,
}

impl Policy {
    /// Returns the policy over these models, all stopped.
    #[must_use]
    pub fn new(settings: Settings, models: impl IntoIterator<Item = Setup>) -> Self {
        let books = DomainBooks {
            limit: settings.limit,
            reserve: settings.reserve,
            ..DomainBooks::default()
        };
        Self {
            models: models
                .into_iter()
                .map(|setup| {
                    (
                        setup.spec.name.clone(),
                        ModelState::new(setup.spec, setup.weights, setup.footprint),
                    )
                })
                .collect(),
            ledger: Ledger::new(books, settings.gpu_limits.clone()),
            settings,
            levels: Levels::default(),
            cleanups: Vec::new(),
            shutdown: None,
            finished: false,
            blocked: false,
            patience_at: None,
            now: Timestamp::START,
            common: Common::default(),
            past_lives: BTreeMap::new(),
        }
    }

    /// Takes in one event and returns what is to be done, in order.
    pub fn step(&mut self, now: Timestamp, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.now = now;
        match event {
            Event::Tick => {}
            Event::Acquire {
                ticket,
                model,
                deadline,
            } => {
                self.acquire(now, (ticket, deadline, true), &model, &mut out);
            }
            Event::Load {
                ticket,
                model,
                deadline,
            } => {
                self.clear_failures(&model);
                self.acquire(now, (ticket, deadline, false), &model, &mut out);
            }
            Event::Cancel { ticket } => self.cancel(ticket),
            Event::Unload { ticket, model } => self.unload(now, ticket, &model, &mut out),
            Event::Pin { model, pinned } => {
                if let Some(state) = self.models.get_mut(&model) {
                    state.pinned = pinned;
                }
            }
            Event::Limit { domain, limit } => self.set_limit(domain, limit),
            Event::Configure(change) => self.configure(now, *change, &mut out),
            Event::Cleanup {
                ticket,
                order,
                deadline,
            } => {
                self.cleanup(now, ticket, &order, deadline, &mut out);
            }
            Event::EvictRefused { worker, inside } => self.evict_refused(&worker, inside),
            Event::Ready { worker } => self.ready(now, &worker, &mut out),
            Event::Parked { worker } => self.park_answered(now, &worker),
            Event::Unparked { worker } => self.unparked(now, &worker, &mut out),
            Event::ParkFailed { worker, said } => {
                self.park_failed(now, &worker, said, &mut out);
            }
            Event::Unhealthy { worker, why } => self.unhealthy(now, &worker, why, &mut out),
            Event::NeverReady {
                worker,
                after,
                last_lines,
            } => {
                self.never_ready(now, &worker, after, &last_lines, &mut out);
            }
            Event::Exited {
                worker,
                status,
                out_of_memory,
                last_lines,
            } => {
                self.learn(&worker, &out_of_memory, &mut out);
                self.exited(now, &worker, &status, &last_lines, &mut out);
            }
            Event::Measured(measured) => self.measure(&measured),
            Event::Shutdown { until } => self.begin_shutdown(until, &mut out),
        }
        self.follow_up(now, &mut out);
        self.prefetch(&mut out);
        debug_assert_eq!(self.check(), Ok(()), "a law of the policy is broken");
        out
    }

    /// Takes in copies of gates, before a step that may evict. Changes nothing
    /// by itself.
    pub fn observe<'a>(&mut self, gates: impl IntoIterator<Item = (&'a WorkerId, Activity)>) {
        for (worker, activity) in gates {
            if let Some(model) = self.current(worker) {
                if activity.last_entered > model.activity.last_entered {
                    model.asked_at = Some(activity.last_entered);
                }
                model.activity = activity;
            }
        }
    }

    /// Takes in how long it took from one request for a model to the next.
    pub fn learn_gaps(&mut self, model: &ModelName, gaps: &Gaps) {
        if let Some(model) = self.models.get_mut(model) {
            model.reuse.learn(gaps);
            self.common.learn(gaps);
        }
    }

    /// Returns what it is expected to cost that a model's worker goes; by `lru`
    /// nobody asks.
    fn worth(&self, model: &ModelState) -> Worth {
        match self.settings.eviction {
            EvictionPolicy::Lru => 0,
            EvictionPolicy::Cost => {
                let idle = self.now.since(model.asked_since());
                model.reuse.worth(idle, &self.common)
            }
        }
    }

    /// What any event may have made possible or due.
    fn follow_up(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        self.settle(now, out);
        self.forget_removed(out);
        self.settle_parks(now, out);
        self.expire_waiters(now, out);
        self.fill_places(out);
        self.finish_drains(now, out);
        self.finish_cleanups(now, out);
        if self.shutdown.is_some() {
            self.proceed_shutdown(now, out);
            return;
        }
        self.end_idle(now, out);
        self.hold_ceilings(now, out);
        self.relieve(now, out);
        self.end_rests(now);
        self.call_off_drains(now, out);
        self.plan(now, out);
        // Who was started found room without those that still drain for it.
        if self.call_off_drains(now, out) {
            self.plan(now, out);
        }
    }

    /// Ends the rest of failed models that are wanted: from here on they wait
    /// for room like any other, and not for a moment that has passed.
    fn end_rests(&mut self, now: Timestamp) {
        for model in self.models.values_mut() {
            let rests = matches!(model.phase, Phase::Backoff | Phase::Failed);
            if rests && model.wanted && model.may_start(now) {
                model.enter(Phase::Stopped, now);
            }
        }
    }

    /// Returns when to send a [`Event::Tick`] at the latest.
    #[must_use]
    pub fn next_wake(&self) -> Option<Timestamp> {
        let of_models = self.models.values().flat_map(|m| {
            let waiters = m.queue.iter().map(|w| w.deadline);
            let drain = m.drain_until.filter(|_| m.phase == Phase::Draining);
            let idle = self.idle_deadline(m);
            let rests = matches!(m.phase, Phase::Backoff | Phase::Failed);
            let is_tried = rests && m.wanted && self.shutdown.is_none();
            let retry = is_tried.then_some(m.failures.retry_at);
            waiters.chain(drain).chain(idle).chain(retry.flatten())
        });
        of_models
            .chain(self.cleanups.iter().map(|c| c.deadline))
            .chain(self.ledger.next_deadline())
            .chain(self.next_park_deadline())
            .chain(self.patience_at)
            .chain(self.shutdown.filter(|_| {
                let is_told = |m: &ModelState| m.phase == Phase::Stopping;
                self.models.values().any(|m| m.is_live() && !is_told(m))
            }))
            .min()
    }

    /// Returns each model's state.
    #[must_use]
    pub fn models(&self) -> &BTreeMap<ModelName, ModelState> {
        &self.models
    }

    /// Returns one domain's books: limit, reserve and the newest measurement.
    #[must_use]
    pub fn domains(&self) -> &BTreeMap<Domain, DomainBooks> {
        &self.ledger.domains
    }

    /// Returns measured use by all workers, shared pages once.
    #[must_use]
    pub fn usage(&self, domain: Domain) -> Bytes {
        self.ledger.usage(&self.models, domain)
    }

    /// Returns what counts against the limit.
    #[must_use]
    pub fn charged(&self, domain: Domain) -> Bytes {
        self.ledger.charged(&self.models, domain)
    }

    /// Returns how tight a domain is.
    #[must_use]
    pub fn level(&self, domain: Domain) -> PressureLevel {
        self.levels.of(domain)
    }

    /// Returns whether new work is refused.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.shutdown.is_some()
    }

    fn measure(&mut self, measured: &Measured) {
        self.ledger.measure(measured);
        // Both are in the order of their names.
        let mut workers = measured.workers.iter().peekable();
        for (name, model) in &mut self.models {
            while let Some((worker, usage)) = workers.next_if(|(w, _)| w.model <= *name) {
                if worker.model == *name && worker.generation == model.generation && model.is_live()
                {
                    let domains = model.domains().into_iter();
                    let at = domains.map(|domain| self.ledger.domain_measured_at(domain));
                    model.measure(usage, at.min().unwrap_or(measured.at));
                }
            }
        }
        self.ledger.follow_reclaims(&self.models);
        for domain in measured.domains.keys() {
            let (look, thresholds) = (self.look(*domain), self.thresholds(*domain));
            self.levels.update(*domain, look, thresholds);
        }
    }

    fn set_limit(&mut self, domain: Domain, limit: Bytes) {
        if self.ledger.set_limit(domain, limit) {
            let over = self.usage(domain) > limit;
            self.levels.set_over_limit(domain, over);
        }
    }

    /// Returns the model whose current life this is; an event of an older life
    /// finds nobody.
    fn current(&mut self, worker: &WorkerId) -> Option<&mut ModelState> {
        self.models
            .get_mut(&worker.model)
            .filter(|m| m.generation == worker.generation)
    }

    /// Checks the laws that hold between any two steps.
    ///
    /// # Errors
    /// The law that is broken.
    pub fn check(&self) -> Result<(), String> {
        let mut tickets = std::collections::BTreeSet::new();
        for model in self.models.values() {
            let name = model.name();
            if model.phase == Phase::Ready && !model.queue.is_empty() && !model.is_full() {
                return Err(format!("{name} has a place and requests wait for it"));
            }
            if matches!(model.phase, Phase::Backoff | Phase::Failed) && !model.queue.is_empty() {
                return Err(format!("{name} backs off and requests wait for it"));
            }
            if model.leaving.is_some() && !model.is_leaving() {
                return Err(format!("{name} stays but has a reason to leave"));
            }
            let serves = matches!(model.phase, Phase::Starting | Phase::Ready);
            if serves && (model.outdated || model.removed) {
                return Err(format!("{name} serves what is no longer configured"));
            }
            if model.removed && !model.queue.is_empty() {
                return Err(format!("{name} is not configured and requests wait for it"));
            }
            if !model.is_live() && !model.usage.is_empty() {
                return Err(format!("{name} has no worker but memory"));
            }
            if !model.queue.iter().all(|w| tickets.insert(w.ticket)) {
                return Err(format!("{name} has a ticket that waits twice"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod laws;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
