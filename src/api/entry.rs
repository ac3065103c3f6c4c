//! How one model looks in every answer that lists models.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::clock::{Clock, Timestamp};
use crate::control::{Expected, LastEviction, ModelView, Phase};
use crate::memory::{Usage, VramUsage};
use crate::model::{Bytes, Domain};

/// One model. The first keys are the memory API's, in its order.
#[derive(Debug, Serialize)]
pub(crate) struct ModelEntry<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    loaded: bool,
    file_size: u64,
    memory_usage: u64,
    last_used: f64,
    access_count: u64,
    phase: &'static str,
    pid: Option<i32>,
    pinned: bool,
    in_flight: u32,
    queued: usize,
    memory: Option<MemoryEntry>,
    vram: Vec<VramEntry>,
    expected: ExpectedEntry,
    peak: u64,
    footprint: BTreeMap<String, FootprintEntry>,
    loads: u64,
    evictions: u64,
    last_eviction: Option<EvictionEntry>,
    last_load_seconds: Option<f64>,
    restarts: u64,
    last_error: Option<&'a str>,
    retry_at: f64,
    generation: u64,
    adopted: bool,
    cached_bytes: Option<u64>,
    aliases: Vec<&'a str>,
}

impl<'a> ModelEntry<'a> {
    /// Builds the entry of `view`, its gate read now.
    pub(crate) fn of(view: &'a ModelView, clock: Clock) -> Self {
        let spec = &view.spec;
        Self {
            name: spec.name.as_str(),
            kind: &spec.kind,
            loaded: is_loaded(view),
            file_size: view.file_size.get(),
            memory_usage: rss(view).get(),
            last_used: unix_or_zero(clock, view.last_used()),
            access_count: view.access_count(),
            phase: view.phase.as_str(),
            pid: view.pid,
            pinned: view.pinned,
            in_flight: view.in_flight(),
            queued: view.queued,
            memory: view
                .usage
                .as_ref()
                .map(|usage| MemoryEntry::of(usage, clock)),
            vram: vram(view),
            expected: ExpectedEntry::of(&view.expected),
            peak: view.peak.get(&Domain::Host).map_or(0, |peak| peak.get()),
            footprint: footprint(view),
            loads: view.loads,
            evictions: view.evictions,
            last_eviction: view
                .last_eviction
                .as_ref()
                .map(|last| EvictionEntry::of(last, clock)),
            last_load_seconds: view.last_load.map(|took| took.as_secs_f64()),
            restarts: view.restarts,
            last_error: view.last_error.as_deref(),
            retry_at: unix_or_zero(clock, view.retry_at),
            generation: view.generation,
            adopted: view.adopted,
            cached_bytes: view.cached.map(Bytes::get),
            aliases: spec.aliases.iter().map(|alias| alias.as_str()).collect(),
        }
    }
}

/// Returns whether a worker is ready for the model.
pub(crate) fn is_loaded(view: &ModelView) -> bool {
    view.phase == Phase::Ready
}

/// Returns what the model's worker holds of host RAM, measured; zero without
/// one.
pub(crate) fn rss(view: &ModelView) -> Bytes {
    view.usage.as_ref().map_or(Bytes::ZERO, Usage::resident)
}

/// Returns `at` as Unix seconds, 0 when it never was.
pub(crate) fn unix_or_zero(clock: Clock, at: Option<Timestamp>) -> f64 {
    at.map_or(0.0, |at| clock.unix(at))
}

/// What a worker's tree holds, part by part.
#[derive(Debug, Serialize)]
struct MemoryEntry {
    rss: u64,
    anon: u64,
    file: u64,
    shmem: u64,
    swap: u64,
    hugetlb: u64,
    locked: u64,
    pss: Option<u64>,
    pss_at: f64,
    unreclaimable: u64,
    processes: u32,
}

impl MemoryEntry {
    fn of(usage: &Usage, clock: Clock) -> Self {
        Self {
            rss: usage.rss.get(),
            anon: usage.anon.get(),
            file: usage.file.get(),
            shmem: usage.shmem.get(),
            swap: usage.swap.get(),
            hugetlb: usage.hugetlb.get(),
            locked: usage.locked.get(),
            pss: usage.pss.map(Bytes::get),
            pss_at: unix_or_zero(clock, usage.pss_at),
            unreclaimable: usage.unreclaimable().get(),
            processes: usage.processes,
        }
    }
}

/// GPU memory of a worker; unknown bytes are `null`.
#[derive(Debug, Serialize)]
struct VramEntry {
    device: String,
    bytes: Option<u64>,
    source: &'static str,
    /// The number may be off by what somebody else took of the device.
    tainted: bool,
}

fn vram(view: &ModelView) -> Vec<VramEntry> {
    let entry = |vram: &VramUsage| VramEntry {
        device: Domain::Gpu(vram.device).to_string(),
        bytes: vram.bytes.map(Bytes::get),
        source: vram.source.as_str(),
        tainted: vram.tainted,
    };
    view.usage
        .as_ref()
        .map_or_else(Vec::new, |usage| usage.vram.iter().map(entry).collect())
}

/// What a load is expected to need, by domain; an absent domain is unknown.
#[derive(Debug, Serialize)]
struct ExpectedEntry {
    bytes: BTreeMap<String, u64>,
    /// Where the host's number comes from.
    source: &'static str,
    /// Where each number comes from.
    sources: BTreeMap<String, &'static str>,
}

impl ExpectedEntry {
    fn of(expected: &Expected) -> Self {
        let known = expected
            .domains()
            .filter_map(|domain| Some((domain.to_string(), expected.known(domain)?.get())));
        let needs = expected.0.iter();
        let host = expected.0.get(&Domain::Host).copied().unwrap_or_default();
        Self {
            bytes: known.collect(),
            source: host.source.as_str(),
            sources: needs
                .map(|(domain, need)| (domain.to_string(), need.source.as_str()))
                .collect(),
        }
    }
}

/// What past lives taught of one domain.
#[derive(Debug, Serialize)]
struct FootprintEntry {
    peak: u64,
    settled: u64,
}

fn footprint(view: &ModelView) -> BTreeMap<String, FootprintEntry> {
    let entry = |(domain, peak): (&Domain, &Bytes)| {
        let settled = view.settled.get(domain).copied().unwrap_or_default();
        let entry = FootprintEntry {
            peak: peak.get(),
            settled: settled.get(),
        };
        (domain.to_string(), entry)
    };
    view.peak.iter().map(entry).collect()
}

#[derive(Debug, Serialize)]
struct EvictionEntry {
    reason: &'static str,
    at: f64,
    detail: String,
}

impl EvictionEntry {
    fn of(last: &LastEviction, clock: Clock) -> Self {
        Self {
            reason: last.reason.as_str(),
            at: clock.unix(last.at),
            detail: last.reason.to_string(),
        }
    }
}
