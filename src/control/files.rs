//! Files of models: what is read ahead, and what workers teach of them.
//!
//! The policy says whose files somebody waits for. In idle time, when nothing
//! loads, ends or presses, the likeliest next models follow, one at a time. What
//! is to spare is worked out anew at every reading, for as long as a model's
//! files are read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::What;
use super::task::Task;
use crate::clock::Timestamp;
use crate::model::{Bytes, ModelName, ModelSpec, PrefetchEnd, PrefetchReason};
use crate::policy::Phase;
use crate::worker::{Cached, CachedModels, PrefetchOrder, PrefetchReport, Prefetching, Survey};

/// Between two looks for something to read in idle time.
const IDLE_EVERY: Duration = Duration::from_secs(5);
/// A model whose files were read in idle time is left alone for this long:
/// when the kernel has dropped them again there was better use for the memory.
const IDLE_AGAIN: Duration = Duration::from_secs(600);
/// Files are taken to be cached with so many hundredths of them there.
const NEARLY_PERCENT: u64 = 99;

/// What the controller holds of files.
#[derive(Debug)]
pub(super) struct Files {
    survey: Survey,
    running: BTreeMap<ModelName, Running>,
    next_number: u64,
    idle_looked: Timestamp,
    idle_read: BTreeMap<ModelName, Timestamp>,
}

#[derive(Debug)]
struct Running {
    number: u64,
    reason: PrefetchReason,
    reading: Prefetching,
}

impl Files {
    pub(super) fn new(survey: Survey) -> Self {
        Self {
            survey,
            running: BTreeMap::new(),
            next_number: 0,
            idle_looked: Timestamp::START,
            idle_read: BTreeMap::new(),
        }
    }

    /// Has the weights of these models looked at from now on.
    pub(super) fn look_at<'a>(&self, models: impl Iterator<Item = &'a Arc<ModelSpec>>) {
        let files = models.map(|spec| (spec.name.clone(), spec.weights.clone()));
        self.survey.look_at(files.collect());
    }

    /// Returns what is known to be cached of each model.
    pub(super) fn found(&self) -> CachedModels {
        self.survey.found()
    }

    /// Says that workers have come or gone.
    pub(super) fn look_again(&self) {
        self.survey.again();
    }

    pub(super) fn call_off(&mut self, model: &ModelName) {
        self.running.remove(model);
    }
}

impl Task {
    /// Starts to read the model's files into the page cache.
    pub(super) fn prefetch(&mut self, model: &ModelName, reason: PrefetchReason) {
        let Some(state) = self.policy.models().get(model) else {
            return;
        };
        // Programs and libraries come first: they are wanted first.
        let learned = self.store.files(model);
        let weights: BTreeSet<&PathBuf> = state.spec.weights.iter().collect();
        let mut files = learned;
        files.retain(|file| !weights.contains(file));
        files.extend(state.spec.weights.iter().cloned());
        let spare = self.policy.spare_for(model, self.mapped());
        let Some((spare, most)) = spare.filter(|_| !files.is_empty()) else {
            return;
        };
        self.files.next_number += 1;
        let number = self.files.next_number;
        debug!(%model, reason = reason.as_str(), files = files.len(), %spare, "reading files ahead");
        let order = PrefetchOrder {
            number,
            model: model.clone(),
            reason,
            files,
            most,
            spare,
        };
        let running = Running {
            number,
            reason,
            reading: Prefetching::start(order, self.clock, self.events.clone()),
        };
        // One that runs for it in idle time is called off by this.
        self.files.running.insert(model.clone(), running);
    }

    /// Takes in what became of it.
    pub(super) fn prefetched(&mut self, report: &PrefetchReport) {
        let running = self.files.running.get(&report.model);
        if running.is_some_and(|running| running.number == report.number) {
            self.files.running.remove(&report.model);
        }
        let is_news = match report.end {
            PrefetchEnd::Done | PrefetchEnd::CalledOff => report.read > Bytes::ZERO,
            PrefetchEnd::NoRoom => report.found < report.size,
            PrefetchEnd::Failed => true,
        };
        if is_news {
            self.files.look_again();
            let what = What::Prefetch {
                reason: report.reason,
                read: report.read,
                found: report.found,
                size: report.size,
                took: report.took,
                end: report.end,
            };
            self.tell_of(Some(report.model.clone()), what);
        }
    }

    /// Keeps which files a worker uses, for its next life.
    pub(super) fn keep_files(&self, model: &ModelName, files: &[PathBuf]) {
        debug!(%model, files = files.len(), "files of a worker are known");
        self.store.keep_files(model, files);
    }

    /// Says to all that read ahead what is to spare now, and looks for
    /// something to read in idle time. Comes with every reading.
    pub(super) fn mind_files(&mut self) {
        let mapped = self.mapped();
        let is_calm = !self.policy.is_restless() && !self.policy.is_draining();
        let policy = &self.policy;
        self.files.running.retain(|model, running| {
            if let Some((spare, _)) = policy.spare_for(model, mapped) {
                running.reading.set_spare(spare);
            }
            is_calm || running.reason != PrefetchReason::Idle
        });
        let now = self.clock.now();
        let is_time = now.since(self.files.idle_looked) >= IDLE_EVERY;
        if is_calm && is_time && self.files.running.is_empty() {
            self.files.idle_looked = now;
            self.read_in_idle_time(now, mapped);
        }
    }

    fn read_in_idle_time(&mut self, now: Timestamp, mapped: Bytes) {
        let found = self.files.found();
        // What is cached of likelier models is to stay there.
        let mut ahead = mapped;
        for model in self.policy.likely_next(now) {
            let Some(Cached { bytes, size }) = found.get(&model).copied() else {
                continue;
            };
            // Where the kernel does not tell, reading might be for nothing.
            let Some(cached) = bytes else { continue };
            let read_at = self.files.idle_read.get(&model);
            let rests = read_at.is_some_and(|at| now.since(*at) < IDLE_AGAIN);
            let spare = self.policy.spare_for(&model, ahead + size);
            let has_room = spare.is_some_and(|(spare, _)| spare > Bytes::ZERO);
            if has_room && !rests && cached < size.percent(NEARLY_PERCENT) {
                self.files.idle_read.insert(model.clone(), now);
                self.prefetch(&model, PrefetchReason::Idle);
                return;
            }
            ahead += cached;
        }
    }

    /// Files that workers have mapped which are to stay: physics counts them as
    /// headroom, since the kernel can drop them.
    fn mapped(&self) -> Bytes {
        let stays = |model: &ModelName| {
            let state = self.policy.models().get(model);
            state.is_some_and(|m| matches!(m.phase, Phase::Starting | Phase::Ready))
        };
        let workers = self.reading.workers.iter();
        let staying = workers.filter(|(worker, _)| stays(&worker.model));
        staying.map(|(_, usage)| usage.file).sum()
    }
}
