//! What passed for each model that is configured now: requests by code and by
//! end, bytes, and how long requests waited.

use std::fmt;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;

use super::{Out, counter};
use crate::control::{Durations, ModelRoute, Routes, Traffic};

/// Stands for all requests that named no model that there is. No model can have
/// such a name.
const UNKNOWN: &str = "(unknown)";

/// A family with one histogram for each model: name, help, value.
type Histogram = (&'static str, &'static str, fn(&Traffic) -> &Durations);
/// A family with one counter for each model: name, help, value.
type Counter = (&'static str, &'static str, fn(&Traffic) -> u64);

/// Writes the families.
pub(super) fn traffic(out: Out<'_, '_>, routes: &Routes) -> fmt::Result {
    let models = routes.all();
    let known = || models.iter().map(named);
    let help = "Requests by the status of their answer; of a call of gRPC the one its status stands for; 499 left before";
    let mut family = counter(out, "model_answers_total", help)?;
    for (model, traffic) in known().chain([(UNKNOWN, routes.stray())]) {
        for (code, count) in traffic.codes() {
            family.sample(&[("model", model), ("code", code)], count)?;
        }
    }
    let help = "Calls of gRPC by their status";
    let mut family = counter(out, "model_grpc_answers_total", help)?;
    for (model, traffic) in known().chain([(UNKNOWN, routes.stray())]) {
        for (status, count) in traffic.calls() {
            family.sample(&[("model", model), ("status", status)], count)?;
        }
    }
    let help =
        "Requests by how they ended: whole, left by the client, broke by the worker, late, refused";
    let mut family = counter(out, "model_endings_total", help)?;
    for (model, traffic) in known() {
        for (end, count) in traffic.endings() {
            family.sample(&[("model", model), ("end", end)], count)?;
        }
    }
    let counters: [Counter; 2] = [
        (
            "model_request_bytes_total",
            "Bytes of the bodies of requests that have ended",
            Traffic::request_bytes,
        ),
        (
            "model_answer_bytes_total",
            "Bytes of the bodies of answers that have ended",
            Traffic::answer_bytes,
        ),
    ];
    for (name, help, value) in counters {
        let mut family = counter(out, name, help)?;
        for (model, traffic) in known() {
            family.sample(&[("model", model)], value(traffic))?;
        }
    }
    durations(out, &models)
}

fn durations(out: Out<'_, '_>, models: &[impl AsRef<ModelRoute>]) -> fmt::Result {
    let histograms: [Histogram; 3] = [
        (
            "model_queue_seconds",
            "How long requests waited for a place in the model's worker",
            Traffic::queued,
        ),
        (
            "model_cold_start_seconds",
            "The same, of requests whose worker became ready meanwhile",
            Traffic::cold,
        ),
        (
            "model_first_byte_seconds",
            "From a request's arrival to the first byte of its answer's body",
            Traffic::first_byte,
        ),
    ];
    for (name, help, value) in histograms {
        let mut family = out.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for route in models {
            let (model, traffic) = named(route);
            let durations = value(traffic);
            let classes = durations.classes();
            let count = classes.iter().map(|(_, count)| count).sum();
            let sum = durations.sum().as_secs_f64();
            let labels = [("model", model)];
            let mut series = family.encode_family(&labels)?;
            series.encode_histogram::<NoLabelSet>(sum, count, &classes, None)?;
        }
    }
    Ok(())
}

fn named(route: &impl AsRef<ModelRoute>) -> (&str, &Traffic) {
    let route = route.as_ref();
    (route.name().as_str(), route.traffic())
}
