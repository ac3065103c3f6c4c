//! What residentd costs, a line for each figure:
//! `BENCH <name> ours=<n> base=<n> ratio=<n> unit=<u>`.
//!
//! Where there is something to compare with it is measured in the same run,
//! in turns; where a goal is absolute, `base` is the goal. Medians. Names as
//! arguments (`S20 S13`) pick some.

mod measuring;
mod policies;
mod policy;
mod respawn;
mod serving;
#[path = "../tests/it/support/mod.rs"]
#[expect(dead_code, reason = "shared with the integration tests")]
mod support;
mod traffic;

use std::time::Duration;

fn main() {
    // `cargo test --benches` asks for a list; nothing here is a test.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let all: [(&str, fn()); 11] = [
        ("S21", policy::steps),
        ("policies", policies::waits),
        ("S20", measuring::passes),
        ("S13", measuring::next_start),
        ("request", serving::proxied_request),
        ("S10", serving::swap),
        ("S11", serving::readiness),
        ("S12", respawn::spawn),
        ("S14", respawn::warm),
        ("S14", respawn::engine),
        ("A41", serving::noticed_exit),
    ];
    for (name, bench) in all {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            bench();
        }
    }
}

/// Prints one figure.
#[expect(clippy::print_stdout, reason = "that is what a bench is for")]
fn print(name: &str, ours: f64, base: f64, unit: &str) {
    println!(
        "BENCH {name} ours={ours:.3} base={base:.3} ratio={:.3} unit={unit}",
        ours / base
    );
}

/// Says that a figure was not taken, and why.
#[expect(clippy::print_stdout, reason = "that is what a bench is for")]
fn skip(name: &str, why: &str) {
    println!("SKIP {name}: {why}");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
