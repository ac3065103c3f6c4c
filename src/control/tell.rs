//! Has each decision logged and kept: the only place that does.

use std::collections::BTreeMap;
use std::time::Duration;

use super::decision::{End, LoadFailure, What};
use super::task::Task;
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, WorkerId};
use crate::policy::{Phase, PressureLevel, Refusal};
use crate::worker::ExitStatus;

/// Refusals alike are told of once in this time, with their number: one model
/// that fails under load must not push everything else out of the record.
const REFUSALS_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked for what a waiting model waits for.
const WAITS_EVERY: Duration = Duration::from_millis(100);

/// What is remembered so that the same is not told again and again.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// By model and code; bounded by the number of models.
    refusals: BTreeMap<(Option<ModelName>, &'static str), Refusals>,
    /// When a model that waits was looked at, and whether its wait was told.
    waits: BTreeMap<ModelName, (Timestamp, bool)>,
    levels: BTreeMap<Domain, PressureLevel>,
}

/// Refusals alike.
#[derive(Debug)]
struct Refusals {
    told_at: Timestamp,
    untold: u64,
    last: Refusal,
}

impl Task {
    /// Tells a decision about a worker.
    pub(super) fn tell(&self, worker: &WorkerId, what: What) {
        self.keep(Some(worker.model.clone()), Some(worker.generation), what);
    }

    /// Tells a decision about a model, or about residentd itself.
    pub(super) fn tell_of(&self, model: Option<ModelName>, what: What) {
        self.keep(model, None, what);
    }

    fn keep(&self, model: Option<ModelName>, generation: Option<u64>, what: What) {
        let about = (model, generation);
        self.recorder.keep(self.clock.now(), about, what).log();
    }

    /// Counts a refusal, and tells it unless one like it was told just now.
    pub(super) fn tell_refusal(&mut self, refusal: &Refusal) {
        *self.counters.refusals.entry(refusal.code()).or_default() += 1;
        let now = self.clock.now();
        let key = (refusal.model().cloned(), refusal.code());
        if let Some(alike) = self.told.refusals.get_mut(&key) {
            alike.untold += 1;
            alike.last.clone_from(refusal);
        } else {
            let refusal = refusal.clone();
            let model = key.0.clone();
            let alike = Refusals {
                told_at: now,
                untold: 0,
                last: refusal.clone(),
            };
            self.told.refusals.insert(key, alike);
            let requests = 1;
            self.tell_of(model, What::Refuse { refusal, requests });
        }
        self.tell_refusals();
    }

    /// Tells refusals that were only counted, when their time has come.
    pub(super) fn tell_refusals(&mut self) {
        let now = self.clock.now();
        let mut due = Vec::new();
        self.told.refusals.retain(|(model, _), alike| {
            if now.since(alike.told_at) < REFUSALS_EVERY {
                return true;
            }
            alike.told_at = now;
            let requests = std::mem::take(&mut alike.untold);
            if requests > 0 {
                let refusal = alike.last.clone();
                due.push((model.clone(), What::Refuse { refusal, requests }));
            }
            requests > 0
        });
        for (model, what) in due {
            self.tell_of(model, what);
        }
    }

    /// Tells of models that have begun to wait for others, once for each wait.
    pub(super) fn tell_waits(&mut self) {
        let now = self.clock.now();
        let models = self.policy.models();
        let waits = |name: &ModelName| {
            let model = models.get(name);
            model.is_some_and(|m| m.is_without_memory() && !m.queue.is_empty())
        };
        self.told.waits.retain(|name, _| waits(name));
        if !self.policy.awaits_idle() {
            return;
        }
        let due = |name: &ModelName| match self.told.waits.get(name) {
            Some((looked_at, told)) => !told && now.since(*looked_at) >= WAITS_EVERY,
            None => true,
        };
        let waiting = models.keys().filter(|name| waits(name) && due(name));
        let found: Vec<_> = waiting
            .filter_map(|name| Some((name.clone(), self.policy.explain(name, now)?.outlook)))
            .collect();
        for (name, outlook) in found {
            let blocked = outlook.is_blocked();
            self.told.waits.insert(name.clone(), (now, blocked));
            if blocked {
                self.tell_of(Some(name), What::Wait { outlook });
            }
        }
    }

    /// Tells of domains that became tighter or less tight.
    pub(super) fn tell_pressure(&mut self) {
        let level_of = |domain| self.policy.level(domain);
        let before = |domain| self.told.levels.get(&domain).copied().unwrap_or_default();
        let domains = self.policy.domains().iter();
        let changed: Vec<_> = domains
            .filter(|(domain, _)| level_of(**domain) != before(**domain))
            .map(|(domain, books)| (*domain, books.measured.headroom))
            .collect();
        for (domain, headroom) in changed {
            let level = self.policy.level(domain);
            let usage = self.policy.usage(domain);
            self.told.levels.insert(domain, level);
            let what = What::Pressure {
                domain,
                level,
                usage,
                headroom,
            };
            self.tell_of(None, what);
        }
    }

    /// Tells that a worker is gone, and counts a load that failed. Before the
    /// policy hears of it, which knows until then what was going on.
    pub(super) fn tell_exit(
        &mut self,
        worker: &WorkerId,
        exit: &ExitStatus,
        (status, out_of_memory): (&str, bool),
    ) {
        let model = &self.policy.models()[&worker.model];
        if model.generation != worker.generation {
            return;
        }
        let end = match (model.phase, &model.leaving) {
            (Phase::Starting, _) => End::LoadFailed(failure(exit, out_of_memory)),
            (Phase::Draining | Phase::Stopping, None) => End::LoadFailed(LoadFailure::StartTimeout),
            (Phase::Draining | Phase::Stopping, Some(reason)) => End::Told(reason.clone()),
            (Phase::Ready | Phase::Parking | Phase::Parked | Phase::Unparking, _) => End::Crashed,
            // It has no worker that could end.
            (Phase::Stopped | Phase::Backoff | Phase::Failed, _) => return,
        };
        if let End::LoadFailed(failure) = end {
            let failures = &mut self.counters.load_failures;
            *failures.entry(failure.as_str()).or_default() += 1;
        }
        let status = status.to_owned();
        self.tell(worker, What::Exit { status, end });
    }

    /// Tells that a model which failed now has to rest.
    pub(super) fn tell_backoff(&self, worker: &WorkerId) {
        let now = self.clock.now();
        // One that was removed is forgotten by now.
        let Some(model) = self.policy.models().get(&worker.model) else {
            return;
        };
        let rests = matches!(model.phase, Phase::Backoff | Phase::Failed);
        let until = model.failures.retry_at.filter(|at| *at > now);
        if let Some(until) = until.filter(|_| rests && model.generation == worker.generation) {
            let what = What::Backoff {
                cause: model.failures.last.clone().unwrap_or_default(),
                failures: model.failures.recent.len(),
                retry_in: until.since(now),
            };
            self.tell(worker, what);
        }
    }

    /// What the worker is charged with, by domain.
    pub(super) fn charge(&self, worker: &WorkerId) -> BTreeMap<Domain, Bytes> {
        let model = &self.policy.models()[&worker.model];
        let domains = model.domains().into_iter();
        domains.map(|d| (d, model.charge(d))).collect()
    }
}

const fn failure(exit: &ExitStatus, out_of_memory: bool) -> LoadFailure {
    match exit {
        _ if out_of_memory => LoadFailure::OutOfMemory,
        ExitStatus::NotSpawned(_) => LoadFailure::NotSpawned,
        ExitStatus::Code(_) => LoadFailure::ExitCode,
        ExitStatus::Signal(_) => LoadFailure::Signal,
        ExitStatus::Unknown => LoadFailure::Unknown,
    }
}
