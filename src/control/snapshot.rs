//! The published read-only view: what `GET` routes, metrics and the command
//! line show.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{EvictReason, Expected, Phase, PressureLevel, Protection, ReadyWorker, Reloads};
use crate::clock::Timestamp;
use crate::memory::{Reading, Usage};
use crate::model::{Bytes, Domain, ModelName, ModelSpec};

/// Everything there is to see after one step. `seq` only grows.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Counts the published views.
    pub seq: u64,
    /// When it was made.
    pub at: Timestamp,
    /// Each model, by name.
    pub models: BTreeMap<ModelName, ModelView>,
    /// Usage, limits and pressure.
    pub memory: MemoryView,
    /// What happened since the start.
    pub counters: Counters,
    /// Shutting down: no new work is taken.
    pub draining: bool,
    /// Why the state database is not written at present, if it is not.
    pub state_error: Option<Arc<str>>,
}

impl Snapshot {
    /// Returns requests that found their model ready, those of this moment
    /// included: they pass by the controller.
    #[must_use]
    pub fn hits(&self) -> u64 {
        let admitted: u64 = self.models.values().map(ModelView::access_count).sum();
        let admitted = admitted + self.counters.admitted;
        admitted.saturating_sub(self.counters.granted_late)
    }

    /// Returns requests that found their model ready, of all; 0 with none.
    #[must_use]
    pub fn hit_ratio(&self) -> f64 {
        self.counters.hit_ratio(self.hits())
    }

    /// Returns loads of models that had been evicted, of the requests that found
    /// a worker or caused a load; 0 with none.
    #[must_use]
    pub fn reload_ratio(&self) -> f64 {
        self.counters.reload_ratio(self.hits())
    }
}

/// One model.
#[derive(Clone, Debug)]
pub struct ModelView {
    /// What the configuration says.
    pub spec: Arc<ModelSpec>,
    /// Where its worker is in its life.
    pub phase: Phase,
    /// Which life this is; 0 before the first.
    pub generation: u64,
    /// Leader of the worker's tree, while it lives.
    pub pid: Option<i32>,
    /// The ready worker; its gate has the live number of requests.
    pub ready: Option<Arc<ReadyWorker>>,
    /// Its worker was spawned by an earlier residentd.
    pub adopted: bool,
    /// Never evicted to make room, by configuration or by an operator.
    pub pinned: bool,
    /// Requests waiting for it.
    pub queued: usize,
    /// Measured, while a worker lives.
    pub usage: Option<Usage>,
    /// What a load is expected to need.
    pub expected: Expected,
    /// The most it used over its lives, by domain.
    pub peak: BTreeMap<Domain, Bytes>,
    /// What the last life that served held, by domain.
    pub settled: BTreeMap<Domain, Bytes>,
    /// When the last request before this life left; see [`ModelView::last_used`].
    pub last_used_before: Option<Timestamp>,
    /// Requests before this life; see [`ModelView::access_count`].
    pub accesses_before: u64,
    /// Lives that became ready.
    pub loads: u64,
    /// Lives ended to make room, under pressure, by cleanup or for idleness.
    pub evictions: u64,
    /// The last of those.
    pub last_eviction: Option<LastEviction>,
    /// Spawn to ready of the last life.
    pub last_load: Option<Duration>,
    /// Lives that ended by themselves.
    pub restarts: u64,
    /// Why the last life failed.
    pub last_error: Option<String>,
    /// When it may be tried again, while it backs off.
    pub retry_at: Option<Timestamp>,
    /// Size of its weight files; zero when none is found.
    pub file_size: Bytes,
    /// How much of that is in the page cache; `None` without weights, and where
    /// the kernel does not tell.
    pub cached: Option<Bytes>,
}

/// When and why a model was last evicted.
#[derive(Clone, Debug)]
pub struct LastEviction {
    /// Why.
    pub reason: EvictReason,
    /// When.
    pub at: Timestamp,
}

impl ModelView {
    /// Returns the requests inside the worker now.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.ready
            .as_ref()
            .map_or(0, |worker| worker.gate.read().inside)
    }

    /// Returns when a request last left a worker of this model.
    #[must_use]
    pub fn last_used(&self) -> Option<Timestamp> {
        let current = self.ready.as_ref().map(|worker| worker.gate.read());
        match current {
            Some(read) if read.entered > 0 => Some(read.last_left),
            _ => self.last_used_before,
        }
    }

    /// Returns how many requests workers of this model have admitted.
    #[must_use]
    pub fn access_count(&self) -> u64 {
        let current = self
            .ready
            .as_ref()
            .map_or(0, |worker| worker.gate.read().entered);
        self.accesses_before + current
    }

    /// Returns whether a worker lives for it, ready or not.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.pid.is_some()
    }
}

/// Usage, limits and pressure.
#[derive(Clone, Debug)]
pub struct MemoryView {
    /// The newest reading.
    pub reading: Arc<Reading>,
    /// Resident memory of all workers, shared pages once.
    pub usage: Bytes,
    /// The user's limit on it.
    pub limit: Bytes,
    /// Who set the limit.
    pub limit_source: LimitSource,
    /// The worst level of all domains.
    pub level: PressureLevel,
    /// Each domain.
    pub domains: Vec<DomainView>,
    /// Idle models in the order they would be unloaded, whatever the pressure.
    pub candidates: Vec<Candidate>,
    /// Of those, as many as it takes to end the pressure there is now.
    pub recommended: Vec<ModelName>,
    /// Live models that are no candidates, with why.
    pub protected: Vec<(ModelName, Protection)>,
    /// Idle models are unloaded under pressure without being asked.
    pub auto_cleanup: bool,
}

/// One domain.
#[derive(Clone, Debug)]
pub struct DomainView {
    /// Which.
    pub domain: Domain,
    /// Workers' measured use of it.
    pub usage: Bytes,
    /// The limit on that.
    pub limit: Bytes,
    /// What physics still gives.
    pub headroom: Bytes,
    /// Reservations and usage, the larger of both for each worker.
    pub charged: Bytes,
    /// How tight it is.
    pub level: PressureLevel,
}

/// An idle model that could be unloaded.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Which.
    pub model: ModelName,
    /// Resident bytes that its end gives back.
    pub would_free: Bytes,
    /// The same of all GPUs together.
    pub would_free_vram: Bytes,
    /// When it was last used, or became ready.
    pub idle_since: Timestamp,
}

/// Who set a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitSource {
    /// The configuration file or a flag.
    Config,
    /// `MAX_MEMORY_USAGE`.
    Env,
    /// `POST /limit`.
    Api,
    /// 80 % of what the cgroup left at start.
    Cgroup,
    /// 80 % of what was available at start.
    Default,
}

impl LimitSource {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Env => "env",
            Self::Api => "api",
            Self::Cgroup => "cgroup",
            Self::Default => "default",
        }
    }
}

/// What happened since the start.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Requests admitted to workers of models that are no more.
    pub admitted: u64,
    /// Requests admitted after they had waited; all others admitted found their
    /// model ready.
    pub granted_late: u64,
    /// Requests that had to wait for a load, or were refused one.
    pub misses: u64,
    /// Of those, refused before there was a worker for them.
    pub turned_away: u64,
    /// Loads of a model that had been evicted before.
    pub reloads: u64,
    /// Lives that became ready.
    pub loads: u64,
    /// Lives that failed before they were ready, by reason.
    pub load_failures: BTreeMap<&'static str, u64>,
    /// Lives that ended by themselves after they were ready.
    pub crashes: u64,
    /// Lives that were ended because they were of no use, by what was wrong.
    pub unhealthy: BTreeMap<&'static str, u64>,
    /// Evictions by reason.
    pub evictions: BTreeMap<&'static str, u64>,
    /// Parks that gave back what they should, by reason.
    pub parks: BTreeMap<&'static str, u64>,
    /// Parked workers that became ready again.
    pub unparks: u64,
    /// Workers that were killed by somebody else, by who it most likely was.
    pub kills: BTreeMap<&'static str, u64>,
    /// Refusals by code.
    pub refusals: BTreeMap<&'static str, u64>,
    /// Bytes that did not come back after an eviction.
    pub reclaim_shortfall: Bytes,
    /// What became of reloads of the configuration.
    pub config: Reloads,
}

impl Counters {
    /// Returns evictions of every reason.
    #[must_use]
    pub fn evictions_total(&self) -> u64 {
        self.evictions.values().sum()
    }

    fn hit_ratio(&self, hits: u64) -> f64 {
        ratio(hits, hits + self.misses)
    }

    fn reload_ratio(&self, hits: u64) -> f64 {
        let waited = self.misses.saturating_sub(self.turned_away);
        ratio(self.reloads, hits + waited)
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        Bytes(part).as_f64() / Bytes(whole).as_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_request_is_no_hit_and_counts_for_no_reload() {
        let counters = Counters {
            misses: 6,
            turned_away: 4,
            reloads: 2,
            ..Counters::default()
        };
        assert!((counters.hit_ratio(6) - 0.5).abs() < 1e-9, "6 of all 12");
        assert!(
            (counters.reload_ratio(6) - 0.25).abs() < 1e-9,
            "2 of the 8 that had a worker"
        );
        assert!(Counters::default().reload_ratio(0).abs() < 1e-9);
    }
}
