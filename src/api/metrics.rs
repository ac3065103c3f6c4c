//! `GET /metrics`: the headline series in Prometheus' text format, made from
//! the snapshot and the routes' counts at the moment of the scrape. A scrape touches no instrument
//! and wakes no model.
//!
//! Labels are configured names and our own words, never text of a request.

mod traffic;

use std::fmt;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::ApiState;
use super::entry::is_loaded;
use super::memory::usage_ratio;
use crate::clock::Clock;
use crate::control::{Controller, DomainView, ModelView, Phase, PressureLevel, Snapshot};
use crate::memory::Usage;
use crate::model::Domain;

/// The text format every scraper understands. Its counters carry `_total` in
/// the name of the family too, unlike OpenMetrics'.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers `GET /metrics`.
pub(crate) async fn metrics(State(state): State<ApiState>) -> Response {
    ([(CONTENT_TYPE, TEXT_FORMAT)], state.metrics.text()).into_response()
}

/// The metrics page.
#[derive(Debug)]
pub(crate) struct Page(Registry);

impl Page {
    /// Builds the page over the controller's snapshots.
    pub(crate) fn new(controller: Controller) -> Self {
        let mut registry = Registry::with_prefix("residentd");
        registry.register_collector(Box::new(View(controller)));
        Self(registry)
    }

    fn text(&self) -> String {
        let mut text = String::new();
        encode_registry(&mut text, &self.0).expect("writing to a string does not fail");
        text
    }
}

/// Turns the newest snapshot into series.
#[derive(Debug)]
struct View(Controller);

impl Collector for View {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let snapshot = self.0.snapshot();
        let out = &mut encoder;
        about(out, &snapshot)?;
        config(out, &snapshot, self.0.clock())?;
        memory(out, &snapshot)?;
        devices(out, &snapshot)?;
        events(out, &snapshot)?;
        models_memory(out, &snapshot)?;
        models_work(out, &snapshot)?;
        traffic::traffic(out, self.0.routes())
    }
}

type Out<'a, 'b> = &'a mut DescriptorEncoder<'b>;

/// A family with one series for each `T`: name, help, value.
type Column<T> = (&'static str, &'static str, fn(&T) -> u64);

fn about(out: Out<'_, '_>, snapshot: &Snapshot) -> fmt::Result {
    let mut build = gauge(out, "build_info", "Version of residentd, always 1")?;
    build.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1_u64)?;
    let mut draining = gauge(out, "draining", "1 while residentd shuts down")?;
    draining.sample(&[], u64::from(snapshot.draining))?;
    let help = "1 while what happens is written to the state database, 0 while that fails";
    let mut state = gauge(out, "state_writable", help)?;
    state.sample(&[], u64::from(snapshot.state_error.is_none()))?;
    let mut phases = gauge(out, "models", "Configured models by phase")?;
    for phase in Phase::ALL {
        let models = snapshot.models.values();
        let count = models.filter(|view| view.phase == phase).count();
        phases.sample(&[("phase", phase.as_str())], count)?;
    }
    let mut running = gauge(out, "requests_running", "Requests inside workers")?;
    let inside = snapshot.models.values().map(ModelView::in_flight);
    running.sample(&[], inside.map(u64::from).sum::<u64>())?;
    let mut waiting = gauge(out, "requests_waiting", "Requests waiting for a worker")?;
    waiting.sample(
        &[],
        snapshot
            .models
            .values()
            .map(|view| view.queued)
            .sum::<usize>(),
    )
}

fn config(out: Out<'_, '_>, snapshot: &Snapshot, clock: Clock) -> fmt::Result {
    let config = &snapshot.counters.config;
    let help = "Tells the configuration that holds from others, always 1";
    gauge(out, "config_info", help)?.sample(&[("hash", &config.hash)], 1_u64)?;
    let help = "0 while the last reload of the configuration was refused";
    let mut good = gauge(out, "config_last_reload_successful", help)?;
    good.sample(&[], u64::from(!config.last_refused))?;
    let help = "When a configuration was last taken in: at a reload, else at the start";
    let name = "config_last_reload_success_timestamp_seconds";
    let at = config.last_applied.unwrap_or(clock.began());
    gauge(out, name, help)?.sample(&[], clock.unix(at))
}

fn memory(out: Out<'_, '_>, snapshot: &Snapshot) -> fmt::Result {
    let memory = &snapshot.memory;
    let mut used = gauge(
        out,
        "memory_utilization_ratio",
        "Resident memory of all workers as a share of the limit",
    )?;
    used.sample(&[], usage_ratio(memory))?;
    let columns: [Column<DomainView>; 4] = [
        (
            "memory_limit_bytes",
            "Limit on what workers use, by domain",
            |domain| domain.limit.get(),
        ),
        (
            "memory_usage_bytes",
            "Measured use by workers, by domain",
            |domain| domain.usage.get(),
        ),
        (
            "memory_headroom_bytes",
            "What physics still has to give, by domain",
            |domain| domain.headroom.get(),
        ),
        (
            "memory_charged_bytes",
            "Reserved or measured by workers, the larger of both, by domain",
            |domain| domain.charged.get(),
        ),
    ];
    for (name, help, column) in columns {
        let mut family = gauge(out, name, help)?;
        for domain in &memory.domains {
            let id = domain.domain.to_string();
            family.sample(&[("domain", &id)], column(domain))?;
        }
    }
    let mut level = gauge(
        out,
        "memory_pressure_level",
        "How tight memory is by domain: 0 none, 1 soft, 2 hard",
    )?;
    for domain in &memory.domains {
        let id = domain.domain.to_string();
        level.sample(&[("domain", &id)], level_number(domain.level))?;
    }
    Ok(())
}

const fn level_number(level: PressureLevel) -> u64 {
    match level {
        PressureLevel::None => 0,
        PressureLevel::Soft => 1,
        PressureLevel::Hard => 2,
    }
}

fn devices(out: Out<'_, '_>, snapshot: &Snapshot) -> fmt::Result {
    let help = "Memory of each device by kind, used by anyone; unattributed is no worker's";
    let mut family = gauge(out, "device_memory_bytes", help)?;
    for device in &snapshot.memory.reading.devices {
        let id = Domain::Gpu(device.index).to_string();
        let kinds = [
            ("total", device.total),
            ("used", device.used),
            ("free", device.free),
            ("unattributed", snapshot.memory.reading.unattributed(device)),
        ];
        for (kind, bytes) in kinds {
            if let Some(bytes) = bytes {
                let labels = [("device", &*id), ("uuid", &device.uuid), ("kind", kind)];
                family.sample(&labels, bytes.get())?;
            }
        }
    }
    Ok(())
}

fn events(out: Out<'_, '_>, snapshot: &Snapshot) -> fmt::Result {
    let counters = &snapshot.counters;
    let mut requests = counter(
        out,
        "requests_total",
        "Requests by whether they found their model ready",
    )?;
    requests.sample(&[("result", "hit")], snapshot.hits())?;
    requests.sample(&[("result", "miss")], counters.misses)?;
    let mut reloads = counter(
        out,
        "config_reloads_total",
        "Reloads of the configuration by whether it was valid and taken in",
    )?;
    reloads.sample(&[("result", "success")], counters.config.applied)?;
    reloads.sample(&[("result", "failure")], counters.config.refused)?;
    let plain = [
        ("loads_total", "Workers that became ready", counters.loads),
        (
            "reloads_total",
            "Loads of a model that had been evicted before",
            counters.reloads,
        ),
        (
            "crashes_total",
            "Workers that ended by themselves after they were ready",
            counters.crashes,
        ),
        (
            "unparks_total",
            "Parked workers that became ready again",
            counters.unparks,
        ),
        (
            "reclaim_shortfall_bytes_total",
            "Bytes that did not come back after an eviction",
            counters.reclaim_shortfall.get(),
        ),
    ];
    for (name, help, value) in plain {
        counter(out, name, help)?.sample(&[], value)?;
    }
    events_by_word(out, snapshot)
}

fn events_by_word(out: Out<'_, '_>, snapshot: &Snapshot) -> fmt::Result {
    let counters = &snapshot.counters;
    let by_word = [
        (
            "load_failures_total",
            "Workers that failed before they were ready, by reason",
            "reason",
            &counters.load_failures,
        ),
        (
            "unhealthy_total",
            "Workers that ran and were of no use, and were ended, by what was wrong",
            "reason",
            &counters.unhealthy,
        ),
        (
            "evictions_total",
            "Workers ended by reason",
            "reason",
            &counters.evictions,
        ),
        (
            "parks_total",
            "Workers parked, their memory measured back, by reason",
            "reason",
            &counters.parks,
        ),
        (
            "kills_total",
            "Workers killed by somebody else, by verdict",
            "verdict",
            &counters.kills,
        ),
        (
            "refusals_total",
            "Requests turned away by code",
            "code",
            &counters.refusals,
        ),
    ];
    for (name, help, label, counts) in by_word {
        let mut family = counter(out, name, help)?;
        for (word, count) in counts {
            family.sample(&[(label, word)], *count)?;
        }
    }
    Ok(())
}

fn models_memory(out: Out<'_, '_>, snapshot: &Snapshot) -> fmt::Result {
    let help = "Measured memory of the model's process tree by kind; rss is anon, file and shmem";
    let mut family = gauge(out, "model_memory_bytes", help)?;
    for (name, usage) in measured(snapshot) {
        let kinds = [
            ("rss", usage.rss),
            ("anon", usage.anon),
            ("file", usage.file),
            ("shmem", usage.shmem),
            ("swap", usage.swap),
            ("unreclaimable", usage.unreclaimable()),
        ];
        for (kind, bytes) in kinds {
            family.sample(&[("model", name), ("kind", kind)], bytes.get())?;
        }
    }
    let help = "Measured GPU memory of the model by device, where it is known";
    let mut family = gauge(out, "model_vram_bytes", help)?;
    for (name, usage) in measured(snapshot) {
        for vram in &usage.vram {
            if let Some(bytes) = vram.bytes {
                let device = Domain::Gpu(vram.device).to_string();
                let source = vram.source.as_str();
                let labels = [("model", name), ("device", &device), ("source", source)];
                family.sample(&labels, bytes.get())?;
            }
        }
    }
    Ok(())
}

fn measured(snapshot: &Snapshot) -> impl Iterator<Item = (&str, &Usage)> {
    let models = snapshot.models.iter();
    models.filter_map(|(name, view)| Some((name.as_str(), view.usage.as_ref()?)))
}

fn models_work(out: Out<'_, '_>, snapshot: &Snapshot) -> fmt::Result {
    let columns: [Column<ModelView>; 4] = [
        (
            "model_ready",
            "1 while a worker is ready for the model",
            |view| u64::from(is_loaded(view)),
        ),
        (
            "model_pinned",
            "1 while the model is never evicted to make room",
            |view| u64::from(view.pinned),
        ),
        (
            "model_requests_running",
            "Requests inside the model's worker",
            |view| u64::from(view.in_flight()),
        ),
        (
            "model_requests_waiting",
            "Requests waiting for the model",
            |view| view.queued as u64,
        ),
    ];
    for (name, help, column) in columns {
        let mut family = gauge(out, name, help)?;
        for (name, view) in &snapshot.models {
            family.sample(&[("model", name.as_str())], column(view))?;
        }
    }
    let help = "From spawn to ready of the model's last worker";
    let mut family = gauge(out, "model_last_load_seconds", help)?;
    for (name, view) in &snapshot.models {
        if let Some(took) = view.last_load {
            family.sample(&[("model", name.as_str())], took.as_secs_f64())?;
        }
    }
    let columns: [Column<ModelView>; 3] = [
        (
            "model_requests_total",
            "Requests admitted to workers of the model",
            ModelView::access_count,
        ),
        (
            "model_loads_total",
            "Workers of the model that became ready",
            |view| view.loads,
        ),
        (
            "model_evictions_total",
            "Workers of the model that were evicted",
            |view| view.evictions,
        ),
    ];
    for (name, help, column) in columns {
        let mut family = counter(out, name, help)?;
        for (name, view) in &snapshot.models {
            family.sample(&[("model", name.as_str())], column(view))?;
        }
    }
    Ok(())
}

/// One metric family that is being written.
struct Family<'a>(MetricEncoder<'a>);

impl Family<'_> {
    /// Writes one series. Counters come here too: the crate's own would add
    /// a second `_total` to a name that already has it in this text format.
    fn sample(&mut self, labels: &[(&str, &str)], value: impl EncodeGaugeValue) -> fmt::Result {
        if labels.is_empty() {
            return self.0.encode_gauge(&value);
        }
        self.0.encode_family(&labels)?.encode_gauge(&value)
    }
}

fn gauge<'a>(
    out: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &str,
) -> Result<Family<'a>, fmt::Error> {
    out.encode_descriptor(name, help, None, MetricType::Gauge)
        .map(Family)
}

fn counter<'a>(
    out: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &str,
) -> Result<Family<'a>, fmt::Error> {
    out.encode_descriptor(name, help, None, MetricType::Counter)
        .map(Family)
}
