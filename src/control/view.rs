//! Conversions between the policy's terms and everyone else's: readings in,
//! snapshots out.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::task::{Live, Task};
use super::{Candidate, DomainView, LastEviction, MemoryView, ModelView, Refusal, Snapshot};
use crate::memory::Reading;
use crate::model::{Domain, WorkerId};
use crate::policy::{DomainMeasure, GpuFacts, Measure, Measured, ModelState, PressureLevel};
use crate::worker::CachedModels;

impl Task {
    /// Returns the newest reading in the policy's terms.
    pub(super) fn measured(&self) -> Measured {
        measured(&self.reading, &self.workers)
    }

    /// Makes the next view to publish.
    pub(super) fn snapshot(&mut self) -> Snapshot {
        self.seq += 1;
        snapshot(self)
    }
}

fn measured(reading: &Reading, workers: &BTreeMap<WorkerId, Live>) -> Measured {
    let host = DomainMeasure {
        total: reading.host.domain_total(),
        headroom: reading.host.headroom,
    };
    let mut domains = BTreeMap::from([(Domain::Host, host)]);
    for device in &reading.devices {
        // A device that does not tell its size bounds nothing; of one that does
        // not tell its use, what workers are known to hold is taken.
        let known = || reading.attributed(device.index);
        let free = device.free.or_else(|| Some(device.total? - known()));
        if let (Some(total), Some(free)) = (device.total, free) {
            domains.insert(
                Domain::Gpu(device.index),
                DomainMeasure {
                    total,
                    headroom: free,
                },
            );
        }
    }
    let measured = reading
        .workers
        .iter()
        .filter(|(id, _)| workers.contains_key(*id));
    let workers = measured
        .map(|(id, usage)| {
            let host = Measure {
                usage: usage.resident(),
                unreclaimable: usage.unreclaimable(),
            };
            let mut by_domain = BTreeMap::from([(Domain::Host, host)]);
            for vram in &usage.vram {
                let mut devices = reading.devices.iter();
                // What such a GPU holds is in the host's figure.
                let unified = devices.any(|d| d.index == vram.device && d.unified);
                if let Some(bytes) = vram.bytes.filter(|_| !unified) {
                    by_domain.insert(
                        Domain::Gpu(vram.device),
                        Measure {
                            usage: bytes,
                            unreclaimable: bytes,
                        },
                    );
                }
            }
            (id.clone(), by_domain)
        })
        .collect();
    let gpus = reading.devices.iter();
    let gpus = gpus.map(|device| {
        let facts = GpuFacts {
            uuid: device.uuid.clone(),
            unified: device.unified,
            vendor: device.vendor,
        };
        (device.index, facts)
    });
    Measured {
        at: reading.workers_at,
        gpus_at: reading.devices_at,
        domains,
        workers,
        counted_twice: reading.counted_twice,
        gpus: gpus.collect(),
    }
}

fn snapshot(task: &Task) -> Snapshot {
    let cached = task.files.found();
    let models: BTreeMap<_, _> = task
        .policy
        .models()
        .iter()
        .map(|(name, state)| (name.clone(), model(task, state, &cached)))
        .collect();
    let mut counters = task.counters.clone();
    for state in task.policy.models().values() {
        counters.add(&state.history);
    }
    let overloads = task.routes.overloads();
    if overloads > 0 {
        let code = Refusal::Overloaded.code();
        *counters.refusals.entry(code).or_default() += overloads;
        counters.misses += overloads;
        counters.turned_away += overloads;
    }
    Snapshot {
        seq: task.seq,
        at: task.clock.now(),
        models,
        memory: memory(task),
        counters,
        draining: task.policy.is_draining(),
        state_error: task.store.trouble(),
    }
}

fn model(task: &Task, state: &ModelState, cached: &CachedModels) -> ModelView {
    let worker = state.worker();
    let live = task.workers.get(&worker);
    let record = task.records.get(state.name()).cloned().unwrap_or_default();
    let settled = state.footprint.iter();
    let settled = settled.map(|(domain, footprint)| (*domain, footprint.settled));
    ModelView {
        spec: Arc::clone(&state.spec),
        phase: state.phase,
        generation: state.generation,
        pid: live.and_then(Live::pid),
        ready: live.and_then(|live| live.ready.clone()),
        adopted: live.is_some_and(|live| live.adoption.is_some()),
        pinned: state.pinned,
        queued: state.queue.len(),
        usage: live.and_then(|_| task.reading.workers.get(&worker).cloned()),
        expected: task.policy.expected(state),
        peak: state.peak(),
        settled: settled.collect(),
        last_used_before: record.last_used,
        accesses_before: record.accesses,
        loads: state.history.loads,
        evictions: state.history.evictions.values().sum(),
        last_eviction: state
            .history
            .last_eviction
            .as_ref()
            .map(|(reason, at)| LastEviction {
                reason: reason.clone(),
                at: *at,
            }),
        last_load: state.history.last_load,
        restarts: state.history.crashes + state.history.unhealthy.values().sum::<u64>(),
        last_error: state.failures.last.clone(),
        retry_at: state
            .failures
            .retry_at
            .filter(|_| !state.may_start(task.clock.now()) && !state.is_live()),
        file_size: state.weights,
        cached: cached.get(state.name()).and_then(|found| found.bytes),
    }
}

fn memory(task: &Task) -> MemoryView {
    let policy = &task.policy;
    let domains: Vec<_> = policy
        .domains()
        .iter()
        .map(|(domain, books)| DomainView {
            domain: *domain,
            usage: policy.usage(*domain),
            limit: books.shown_limit(*domain),
            headroom: books.measured.headroom,
            charged: policy.charged(*domain),
            level: policy.level(*domain),
        })
        .collect();
    let candidates = policy.candidates_in_order().into_iter().map(|m| Candidate {
        model: m.name().clone(),
        would_free: m.used(Domain::Host),
        would_free_vram: m.vram(),
        idle_since: m.idle_since(),
    });
    let protected = policy.models().values().filter(|m| m.is_live());
    MemoryView {
        reading: Arc::clone(&task.reading),
        usage: policy.usage(Domain::Host),
        limit: policy
            .domains()
            .get(&Domain::Host)
            .map(|b| b.limit)
            .unwrap_or_default(),
        limit_source: task.limit_source,
        level: domains
            .iter()
            .map(|d| d.level)
            .max()
            .unwrap_or(PressureLevel::None),
        candidates: candidates.collect(),
        recommended: policy.recommended(),
        protected: protected
            .filter_map(|m| Some((m.name().clone(), m.protection()?)))
            .collect(),
        auto_cleanup: task.auto_cleanup,
        domains,
    }
}
