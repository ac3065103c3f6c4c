//! Figures for people and for programs: a table, a chart, JSON, a sentence.

use serde::Serialize;

use super::study::{Figures, Mode, share};
use super::workload::{Memory, Workload};
use crate::model::Bytes;

/// Requests hardly ever wait when this share of them finds its model ready.
const SELDOM: f64 = 0.99;
/// Cells of the longest bar of the chart.
const BAR: usize = 40;
/// Parts of a cell, the emptiest first.
const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// Returns the rows of a table, its head first. The first two columns are
/// words and all others numbers.
#[must_use]
pub fn rows(all: &[Figures]) -> Vec<Vec<String>> {
    let head = "POLICY MODE LIMIT LOADS LOAD-TIME OFFLINE GAP HIT MEAN-WAIT P99 MAX REFUSED";
    let mut rows = vec![head.split(' ').map(str::to_owned).collect::<Vec<_>>()];
    rows.extend(all.iter().map(|figures| {
        vec![
            figures.policy.as_str().to_owned(),
            figures.mode.as_str().to_owned(),
            figures.limit.to_string(),
            figures.loads.to_string(),
            time(figures.load_seconds),
            time(figures.offline.load_seconds),
            format!("{:.2}", figures.gap()),
            format!("{:.2}%", figures.hit_ratio() * 100.0),
            time(figures.waits.mean),
            time(figures.waits.p99),
            time(figures.waits.max),
            figures.refused.to_string(),
        ]
    }));
    rows
}

/// Draws what there is to compare as bars, one a run: the mean wait, and of
/// serial runs the time of all loads.
#[must_use]
pub fn chart(all: &[Figures]) -> String {
    let longest = all.iter().map(charted).fold(0.0, f64::max);
    let label = |figures: &Figures| format!("{} {}", figures.limit, figures.policy.as_str());
    let width = all.iter().map(|figures| label(figures).len()).max();
    let width = width.unwrap_or(0);
    let title = match all.first().map(|figures| figures.mode) {
        Some(Mode::Serial) => "time of all loads, by limit",
        Some(Mode::Timed) | None => "mean wait of a request, by limit",
    };
    let mut lines = vec![title.to_owned()];
    lines.extend(all.iter().map(|figures| {
        let value = charted(figures);
        let bar = if longest > 0.0 { value / longest } else { 0.0 };
        format!("{:>width$} {} {}", label(figures), bar_of(bar), time(value))
    }));
    lines.join("\n")
}

/// Returns what the chart and the picture show of a run, in seconds.
pub(super) fn charted(figures: &Figures) -> f64 {
    match figures.mode {
        Mode::Timed => figures.waits.mean,
        Mode::Serial => figures.load_seconds,
    }
}

/// A bar of this part of the longest, an eighth of a cell exact.
fn bar_of(part: f64) -> String {
    let eighths = (0..=BAR * 8).rev();
    let reached = |eighths: &usize| share(*eighths, BAR * 8) <= part;
    let eighths = eighths.into_iter().find(reached).unwrap_or(0);
    format!("{}{}", "█".repeat(eighths / 8), PARTS[eighths % 8])
}

/// Returns the figures as CONFIG.md's JSON.
#[must_use]
pub fn json(all: &[Figures]) -> serde_json::Value {
    let results: Vec<_> = all.iter().map(ResultBody::of).collect();
    serde_json::json!({ "results": results })
}

#[derive(Serialize)]
struct ResultBody {
    policy: &'static str,
    limit_bytes: u64,
    mode: &'static str,
    requests: usize,
    refused: usize,
    loads: u64,
    load_seconds: f64,
    wait_mean_s: f64,
    wait_p99_s: f64,
    wait_max_s: f64,
    hit_ratio: f64,
    offline_loads: u64,
    offline_load_seconds: f64,
}

impl ResultBody {
    fn of(figures: &Figures) -> Self {
        Self {
            policy: figures.policy.as_str(),
            limit_bytes: figures.limit.get(),
            mode: figures.mode.as_str(),
            requests: figures.requests,
            refused: figures.refused,
            loads: figures.loads,
            load_seconds: thousandths(figures.load_seconds),
            wait_mean_s: thousandths(figures.waits.mean),
            wait_p99_s: thousandths(figures.waits.p99),
            wait_max_s: thousandths(figures.waits.max),
            hit_ratio: (figures.hit_ratio() * 1e6).round() / 1e6,
            offline_loads: figures.offline.loads,
            offline_load_seconds: thousandths(figures.offline.load_seconds),
        }
    }
}

fn thousandths(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

/// Answers in sentences whether the models fit, and what more memory would
/// change: `more` is the same run with a larger limit.
#[must_use]
pub fn answer(
    workload: &Workload,
    memory: Memory,
    figures: &Figures,
    more: Option<&Figures>,
) -> String {
    let mut text = fit(workload, memory, figures);
    if let Some(more) = more.filter(|more| more.limit > figures.limit) {
        text.push(' ');
        text.push_str(&gain(figures, more));
    }
    text
}

fn fit(workload: &Workload, memory: Memory, figures: &Figures) -> String {
    let (count, total, limit) = (workload.models().len(), workload.total(), figures.limit);
    let what = match memory {
        Memory::Host => "memory",
        Memory::Gpu => "GPU memory",
    };
    let too_large: Vec<_> = workload
        .models()
        .iter()
        .filter(|facts| facts.size > limit)
        .map(|facts| facts.name().as_str())
        .collect();
    if !too_large.is_empty() {
        return format!(
            "No: {} of {count} models can never be loaded into {limit} of {what} ({}); the largest needs {}.",
            too_large.len(),
            too_large.join(", "),
            workload.largest(),
        );
    }
    let waiting = 1.0 - figures.hit_ratio();
    let waits = format!(
        "{} loads, {:.2} % of the requests wait, {} on average over all of them and {} at most",
        figures.loads,
        waiting * 100.0,
        time(figures.waits.mean),
        time(figures.waits.max),
    );
    if total <= limit {
        return format!(
            "Yes: all {count} models fit into {limit} of {what} at once, they need {total}: {waits}."
        );
    }
    format!(
        "Not at once: the {count} models need {total} of {what} and {limit} are there, so they take turns: {waits}."
    )
}

fn gain(figures: &Figures, more: &Figures) -> String {
    let extra = more.limit - figures.limit;
    let mut changes = Vec::new();
    let mut change = |what: &str, new: String, old: String| {
        if new != old {
            changes.push(format!("{what} {new} instead of {old}"));
        }
    };
    let waiting = |figures: &Figures| format!("{:.2} %", (1.0 - figures.hit_ratio()) * 100.0);
    let waits = |figures: &Figures| time(figures.waits.mean);
    let loads = |figures: &Figures| time(figures.load_seconds);
    let refused = |figures: &Figures| figures.refused.to_string();
    change("requests refused", refused(more), refused(figures));
    change("a mean wait of", waits(more), waits(figures));
    change("requests that wait", waiting(more), waiting(figures));
    change("loads", more.loads.to_string(), figures.loads.to_string());
    change("time of all loads", loads(more), loads(figures));
    match changes.is_empty() {
        true => format!("Another {extra} would change nothing."),
        false => format!("Another {extra} would buy: {}.", changes.join(", ")),
    }
}

/// Returns what has to be known to read a table: nothing most of the time.
#[must_use]
pub fn remark(all: &[Figures]) -> Option<&'static str> {
    let shared = |figures: &Figures| figures.mode == Mode::Timed && figures.gap() < 1.0;
    all.iter().any(shared).then_some(
        "A GAP under 1: requests that wait for one load share it, and whoever is turned away needs none; the plan\n\
         serves each request at once and in order. --serial compares like with like.",
    )
}

/// Names the smallest limit at which requests hardly ever wait.
#[must_use]
pub fn enough(all: &[Figures]) -> Option<String> {
    let seldom = |figures: &&Figures| figures.refused == 0 && figures.hit_ratio() >= SELDOM;
    let least = all
        .iter()
        .filter(seldom)
        .min_by_key(|figures| figures.limit)?;
    Some(format!(
        "Of these limits, {} with {} is the smallest at which fewer than one request in a hundred waits.",
        least.limit,
        least.policy.as_str()
    ))
}

/// Returns seconds as `0s`, `0.14s`, `75s`, `12m30s` or `3h38m`.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        none if none < 0.0005 => "0s".to_owned(),
        short if short < 10.0 => format!("{short:.2}s"),
        some if some < 119.5 => format!("{some:.0}s"),
        minutes if minutes < 7200.0 => {
            let whole = minutes.round();
            format!("{:.0}m{:02.0}s", (whole / 60.0).floor(), whole % 60.0)
        }
        hours => format!(
            "{:.0}h{:02.0}m",
            (hours / 3600.0).floor(),
            (hours % 3600.0 / 60.0).floor()
        ),
    }
}

/// Returns a limit's text for places where every limit is a whole number of
/// GiB most of the time.
pub(super) fn short(limit: Bytes) -> String {
    limit.to_string().replace(".00 ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_units_that_carry() {
        for (seconds, text) in [
            (0.0, "0s"),
            (0.144, "0.14s"),
            (75.4, "75s"),
            (119.6, "2m00s"),
            (4499.7, "75m00s"),
            (13_080.0, "3h38m"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }

    #[test]
    fn a_bar_is_as_long_as_its_part() {
        assert_eq!(bar_of(1.0), "█".repeat(BAR));
        assert_eq!(bar_of(0.5), "█".repeat(BAR / 2));
        assert_eq!(bar_of(1.0 / 320.0), "▏");
        assert_eq!(bar_of(0.0), "");
    }
}
