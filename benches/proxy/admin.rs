//! S22: the list of a hundred models, asked for while the proxy has all it can do.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::Options;
use crate::load::{self, MODEL, float};
use crate::peers::{self, Target, pause};
use crate::report::{Goal, Report, Rounds, Visit, percentile};
use crate::requests::closed;
use crate::wire::{Waiting, get};

pub(crate) const MODELS: usize = 100;
const CONNECTIONS: usize = 64;
/// How long lists are asked for under load: so that there are hundreds.
const VISIT: Duration = Duration::from_secs(1);
/// Between two lists.
const GAP: Duration = Duration::from_millis(2);
/// Lists of an idle residentd, for comparison.
const IDLE: usize = 100;

/// Runs the row.
pub(crate) fn run(options: &Options, report: &mut Report) -> io::Result<()> {
    let residentd = peers::residentd(&options.residentd, "", MODELS, false);
    peers::whoami(&residentd.address, MODEL);
    let targets = [residentd];
    let rounds = Rounds::run((options.rounds, 1), &targets, |target| &target.name, visit)?;
    report.table("S22", &rounds);
    let p99 = rounds.of("residentd", "busy_p99_ms");
    report.absolute("S22-list-p99", "ms", &p99, Goal::at_most(5.0));
    Ok(())
}

pub(crate) fn visit(target: &Target) -> io::Result<Visit> {
    let idle = lists(target, |done| done < IDLE)?;
    let over = AtomicBool::new(false);
    let (busy, load) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| lists(target, |_| !over.load(Ordering::Relaxed)));
        let load = closed(target, CONNECTIONS, VISIT);
        over.store(true, Ordering::Relaxed);
        (asking.join().expect("it does not panic"), load)
    });
    let (busy, load) = (busy?, load?);
    Ok(Visit::from([
        ("idle_p50_ms", percentile(&idle, 50)),
        ("idle_p99_ms", percentile(&idle, 99)),
        ("busy_p50_ms", percentile(&busy, 50)),
        ("busy_p99_ms", percentile(&busy, 99)),
        ("proxied_per_s", load["per_s"]),
    ]))
}

/// Asks for the list as long as wanted; returns how long each took, in ms, sorted.
fn lists(target: &Target, more: impl Fn(usize) -> bool) -> io::Result<Vec<f64>> {
    let mut connection = Waiting::open(&target.address)?;
    let request = get("/api/v1/models");
    let mut times = Vec::new();
    while times.is_empty() || more(times.len()) {
        let start = load::now();
        connection.ask(&request)?;
        times.push(float(load::now() - start) / 1e6);
        let list: Value = serde_json::from_slice(&connection.answer.body)?;
        let models = list["data"]["models"].as_array().map_or(0, Vec::len);
        if models != MODELS {
            return Err(io::Error::other(format!("{models} models are listed")));
        }
        pause(GAP);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
