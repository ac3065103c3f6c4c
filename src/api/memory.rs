//! The memory API's views: `GET /stats`, `/pressure` and `/models`.

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;

use super::ApiState;
use super::entry::{ModelEntry, is_loaded, rss, unix_or_zero};
use super::envelope::success;
use super::system::{DeviceEntry, Ram, devices};
use crate::clock::{Clock, Timestamp};
use crate::control::{
    Candidate, DomainView, MemoryView, ModelView, PressureLevel, Protection, Snapshot,
};
use crate::model::{Bytes, Domain, ModelName};

/// Answers `GET /stats`.
pub(crate) async fn stats(State(state): State<ApiState>) -> Response {
    let snapshot = state.controller.snapshot();
    success(&Stats::of(&snapshot, state.controller.clock()))
}

/// Answers `GET /pressure`.
pub(crate) async fn pressure(State(state): State<ApiState>) -> Response {
    let snapshot = state.controller.snapshot();
    let now = state.controller.clock().now();
    success(&Pressure::of(&snapshot.memory, now))
}

/// Answers `GET /memory/models` and `GET /api/v1/models`.
pub(crate) async fn models(State(state): State<ApiState>) -> Response {
    let snapshot = state.controller.snapshot();
    let clock = state.controller.clock();
    let views = snapshot.models.values();
    success(&Models {
        models: views
            .clone()
            .map(|view| ModelEntry::of(view, clock))
            .collect(),
        total_count: snapshot.models.len(),
        loaded_count: views.filter(|view| is_loaded(view)).count(),
    })
}

#[derive(Debug, Serialize)]
struct Models<'a> {
    models: Vec<ModelEntry<'a>>,
    total_count: usize,
    loaded_count: usize,
}

#[derive(Debug, Serialize)]
struct Stats<'a> {
    total_models: usize,
    total_memory_usage: u64,
    formatted_usage: String,
    memory_limit: u64,
    formatted_limit: String,
    memory_pressure: bool,
    system_available: u64,
    formatted_system_available: String,
    system_total: u64,
    formatted_system_total: String,
    models: Vec<LiveModel<'a>>,
    registered_models: usize,
    loaded_models: usize,
    usage_ratio: f64,
    headroom: u64,
    limit_source: &'static str,
    pressure_level: &'static str,
    reload_ratio: f64,
    hit_ratio: f64,
    evictions_total: u64,
    devices: Vec<DeviceEntry<'a>>,
    state_error: Option<&'a str>,
}

impl<'a> Stats<'a> {
    fn of(snapshot: &'a Snapshot, clock: Clock) -> Self {
        let memory = &snapshot.memory;
        let ram = Ram::here(&memory.reading.host);
        let views = snapshot.models.values();
        let live = views.clone().filter(|view| view.is_live());
        let models: Vec<_> = live.map(|view| LiveModel::of(view, clock)).collect();
        Self {
            total_models: models.len(),
            total_memory_usage: memory.usage.get(),
            formatted_usage: memory.usage.formatted(),
            memory_limit: memory.limit.get(),
            formatted_limit: memory.limit.formatted(),
            memory_pressure: memory.level != PressureLevel::None,
            system_available: ram.available.get(),
            formatted_system_available: ram.available.formatted(),
            system_total: ram.total.get(),
            formatted_system_total: ram.total.formatted(),
            models,
            registered_models: snapshot.models.len(),
            loaded_models: views.filter(|view| is_loaded(view)).count(),
            usage_ratio: usage_ratio(memory),
            headroom: memory.reading.host.headroom.get(),
            limit_source: memory.limit_source.as_str(),
            pressure_level: memory.level.as_str(),
            reload_ratio: snapshot.reload_ratio(),
            hit_ratio: snapshot.hit_ratio(),
            evictions_total: snapshot.counters.evictions_total(),
            devices: devices(snapshot),
            state_error: snapshot.state_error.as_deref(),
        }
    }
}

/// Returns usage as a share of the limit; 0 without a limit.
pub(crate) fn usage_ratio(memory: &MemoryView) -> f64 {
    if memory.limit == Bytes::ZERO {
        return 0.0;
    }
    memory.usage.as_f64() / memory.limit.as_f64()
}

#[derive(Debug, Serialize)]
struct LiveModel<'a> {
    name: &'a str,
    memory_usage: u64,
    formatted_usage: String,
    last_used: f64,
    access_count: u64,
}

impl<'a> LiveModel<'a> {
    fn of(view: &'a ModelView, clock: Clock) -> Self {
        Self {
            name: view.spec.name.as_str(),
            memory_usage: rss(view).get(),
            formatted_usage: rss(view).formatted(),
            last_used: unix_or_zero(clock, view.last_used()),
            access_count: view.access_count(),
        }
    }
}

#[derive(Debug, Serialize)]
struct Pressure<'a> {
    memory_pressure: bool,
    recommended_cleanup: Vec<&'a str>,
    message: String,
    level: &'static str,
    domains: Vec<DomainEntry>,
    candidates: Vec<CandidateEntry<'a>>,
    protected: Vec<ProtectedEntry<'a>>,
}

impl<'a> Pressure<'a> {
    fn of(memory: &'a MemoryView, now: Timestamp) -> Self {
        let pressed = memory.level != PressureLevel::None;
        let recommended: &[ModelName] = if pressed { &memory.recommended } else { &[] };
        let candidates = memory.candidates.iter();
        let protected = memory.protected.iter();
        Self {
            memory_pressure: pressed,
            recommended_cleanup: recommended.iter().map(ModelName::as_str).collect(),
            message: pressure_message(memory),
            level: memory.level.as_str(),
            domains: memory.domains.iter().map(DomainEntry::of).collect(),
            candidates: candidates.map(|c| CandidateEntry::of(c, now)).collect(),
            protected: protected
                .map(|(model, why)| ProtectedEntry::of(model, *why))
                .collect(),
        }
    }
}

fn pressure_message(memory: &MemoryView) -> String {
    // From behind, so that the first of equals is named.
    let tightest = memory
        .domains
        .iter()
        .rev()
        .max_by_key(|domain| domain.level);
    let Some(domain) = tightest.filter(|_| memory.level != PressureLevel::None) else {
        return format!(
            "no memory pressure: usage {} of {}",
            memory.usage.formatted(),
            memory.limit.formatted()
        );
    };
    let place = match domain.domain {
        Domain::Host => "memory pressure".to_owned(),
        Domain::Gpu(_) => format!("memory pressure on {}", domain.domain),
    };
    let remedy = match memory.recommended.as_slice() {
        [] => "no idle model is left to unload".to_owned(),
        names => format!("unload {}", join(names)),
    };
    format!(
        "{} {place}: usage {} of {}, headroom {}; {remedy}",
        memory.level.as_str(),
        domain.usage.formatted(),
        domain.limit.formatted(),
        domain.headroom.formatted(),
    )
}

/// Returns the names with commas between.
pub(crate) fn join(names: &[ModelName]) -> String {
    let names: Vec<_> = names.iter().map(ModelName::as_str).collect();
    names.join(", ")
}

#[derive(Debug, Serialize)]
struct DomainEntry {
    id: String,
    usage: u64,
    limit: u64,
    headroom: u64,
    level: &'static str,
}

impl DomainEntry {
    fn of(domain: &DomainView) -> Self {
        Self {
            id: domain.domain.to_string(),
            usage: domain.usage.get(),
            limit: domain.limit.get(),
            headroom: domain.headroom.get(),
            level: domain.level.as_str(),
        }
    }
}

#[derive(Debug, Serialize)]
struct CandidateEntry<'a> {
    name: &'a str,
    would_free: u64,
    would_free_vram: u64,
    idle_seconds: f64,
    reason: String,
}

impl<'a> CandidateEntry<'a> {
    fn of(candidate: &'a Candidate, now: Timestamp) -> Self {
        let idle = now.since(candidate.idle_since).as_secs_f64();
        Self {
            name: candidate.model.as_str(),
            would_free: candidate.would_free.get(),
            would_free_vram: candidate.would_free_vram.get(),
            idle_seconds: idle,
            reason: format!("idle for {idle:.0} s"),
        }
    }
}

#[derive(Debug, Serialize)]
struct ProtectedEntry<'a> {
    name: &'a str,
    why: &'static str,
}

impl<'a> ProtectedEntry<'a> {
    fn of(model: &'a ModelName, why: Protection) -> Self {
        Self {
            name: model.as_str(),
            why: why.as_str(),
        }
    }
}
