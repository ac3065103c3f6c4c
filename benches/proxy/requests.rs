//! S01 and S02: small requests, each of 1 KB with an answer of 1 KB, on kept
//! connections.
//!
//! Once more with all targets on one core and the driver and the worker on another,
//! where there are two: so less of what else runs is measured.
//!
//! Two rows are closed loops: each connection asks again when it has its answer.
//! In the third requests come at a fixed rate and their time counts from when they
//! were due, so that a target that stands still cannot hide who waited meanwhile.

use std::io;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::cost::host_busy;
use crate::load::{self, float, float_of};
use crate::peers::{self, Target, pause};
use crate::report::{Goal, Report, Rounds, Visit, percentile};
use crate::wire::{Connection, Waiting, request};
use crate::{Options, Stage};

/// Connections of the row that fills all targets.
const MANY: usize = 64;
/// How long a visit lasts.
pub(crate) const VISIT: Duration = Duration::from_millis(500);
/// Most requests of one connection in a visit.
const MOST: usize = 100_000;
/// Requests a second of the open loop, and connections that take turns with them.
const RATE: u64 = 1000;
const TURNS: u64 = 16;

/// Names by which all rows are run, and each.
pub(crate) const ROWS: [&str; 6] = ["S01", "S02", "S02-1", "S01-64", "S02-open", "S01-pinned"];

/// Runs the rows.
pub(crate) fn run(options: &Options, report: &mut Report) -> io::Result<()> {
    let wants = |row| [row, "S01", "S02"].iter().any(|name| options.wants(name));
    if ["S02-1", "S01-64", "S02-open"].into_iter().any(wants) {
        closed_and_open(options, report, wants)?;
    }
    // Nobody gets in the way of a target that has a core to itself.
    if wants("S01-pinned") && peers::pin() {
        let stage = Stage::new(options, report, "");
        let rounds = stage.rounds(options.rounds(), |target| closed(target, MANY, VISIT));
        peers::unpin();
        let rounds = rounds?;
        report.table("S01-pinned", &rounds);
        let pair = (
            rounds.of("residentd", "cpu_us"),
            rounds.of("nginx", "cpu_us"),
        );
        report.ratio("S01-cpu-pinned", ("us", "nginx"), pair, Goal::at_most(1.15));
    }
    Ok(())
}

fn closed_and_open(
    options: &Options,
    report: &mut Report,
    wants: impl Fn(&'static str) -> bool,
) -> io::Result<()> {
    let stage = Stage::new(options, report, "");
    type Visiting = fn(&Target) -> io::Result<Visit>;
    let rows: [(&str, &str, Visiting); 3] = [
        ("S02-1", "1", |target| closed(target, 1, VISIT)),
        ("S01-64", "64", |target| closed(target, MANY, VISIT)),
        ("S02-open", "open", open),
    ];
    for (row, short, visit) in rows.into_iter().filter(|(row, ..)| wants(row)) {
        let rounds = stage.rounds(options.rounds(), visit)?;
        report.table(row, &rounds);
        if row == "S01-64" {
            report.prove_driver(row, &rounds);
        }
        compare(options, report, short, &rounds);
    }
    Ok(())
}

/// Tells what a row says of the goals.
fn compare(options: &Options, report: &mut Report, row: &str, rounds: &Rounds) {
    let against = ("us", "nginx");
    let pair = |figure| (rounds.of("residentd", figure), rounds.of("nginx", figure));
    let goal = Goal::at_most(1.15);
    match row {
        "1" => report.ratio("S01-cpu-1", against, pair("cpu_us"), goal),
        "64" => {
            report.ratio("S01-cpu", against, pair("cpu_us"), goal);
            for peer in options.peers() {
                let name = format!("S01-cpu-{peer}");
                let pair = (rounds.of("residentd", "cpu_us"), rounds.of(&peer, "cpu_us"));
                report.ratio(&name, ("us", &peer), pair, goal);
            }
        }
        _ => {}
    }
    let added = (
        rounds.added("residentd", "p50_us"),
        rounds.added("nginx", "p50_us"),
    );
    let name = format!("S02-added-p50-{row}");
    report.ratio(&name, against, added, Goal::at_most(1.2));
    let name = format!("S02-p99-{row}");
    report.ratio(&name, against, pair("p99_us"), Goal::at_most(1.5));
}

/// Small requests on so many connections, each as soon as the last is answered, for so
/// long.
pub(crate) fn closed(target: &Target, connections: usize, time: Duration) -> io::Result<Visit> {
    crate::driver().block_on(async {
        let small = request("", "", load::small());
        let mut opened = Vec::new();
        for _ in 0..connections {
            let mut connection = Connection::open(&target.address).await?;
            connection.ask(&small).await?;
            connection.answer.is_small()?;
            opened.push(connection);
        }
        let before = Used::now(target);
        let end = load::now() + u64::try_from(time.as_nanos()).expect("it is short");
        let mut asking = JoinSet::new();
        for connection in opened {
            asking.spawn(ask_until(connection, small.clone(), end));
        }
        let mut times = Vec::new();
        while let Some(asked) = asking.join_next().await {
            times.extend(asked.map_err(io::Error::other)??);
        }
        let mut visit = before.until_now(target, times.len());
        put_times(&mut visit, times);
        Ok(visit)
    })
}

/// Asks again and again; returns how long each answer took, in µs.
async fn ask_until(mut connection: Connection, request: Vec<u8>, end: u64) -> io::Result<Vec<f64>> {
    let mut times = Vec::new();
    while load::now() < end && times.len() < MOST {
        let start = load::now();
        connection.ask(&request).await?;
        times.push(float(load::now() - start) / 1e3);
        connection.answer.is_small()?;
    }
    Ok(times)
}

fn put_times(visit: &mut Visit, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    visit.insert("p50_us", percentile(&times, 50));
    visit.insert("p99_us", percentile(&times, 99));
}

/// Small requests at a fixed rate, whoever is late.
pub(crate) fn open(target: &Target) -> io::Result<Visit> {
    let gap = 1_000_000_000 / RATE;
    let start = load::now() + 20_000_000;
    let end = start + u64::try_from(VISIT.as_nanos()).expect("it is short");
    let turn = |first: u64| -> io::Result<Vec<f64>> {
        let small = request("", "", load::small());
        let mut connection = Waiting::open(&target.address)?;
        connection.ask(&small)?;
        let (mut due, mut times) = (start + first * gap, Vec::new());
        while due < end {
            pause(Duration::from_nanos(due.saturating_sub(load::now())));
            connection.ask(&small)?;
            times.push(float(load::now() - due) / 1e3);
            connection.answer.is_small()?;
            due += TURNS * gap;
        }
        Ok(times)
    };
    let mut times = Vec::new();
    std::thread::scope(|scope| {
        let turns: Vec<_> = (0..TURNS)
            .map(|first| scope.spawn(move || turn(first)))
            .collect();
        for turn in turns {
            times.extend(turn.join().expect("it does not panic")?);
        }
        io::Result::Ok(())
    })?;
    let mut visit = Visit::new();
    put_times(&mut visit, times);
    Ok(visit)
}

/// What had been used when a visit began.
pub(crate) struct Used {
    at: u64,
    /// Its processor time and its switches.
    target: Option<(f64, f64)>,
    host: f64,
}

impl Used {
    pub(crate) fn now(target: &Target) -> Self {
        Self {
            at: load::now(),
            target: target
                .processes
                .as_ref()
                .map(|p| (p.run_time(), p.switches())),
            host: host_busy(),
        }
    }

    /// Returns what was used since then for each of so many requests or chunks.
    pub(crate) fn until_now(&self, target: &Target, count: usize) -> Visit {
        let (now, count) = (Self::now(target), float_of(count));
        let mut visit = Visit::from([
            ("per_s", count / (float(now.at - self.at) / 1e9)),
            ("host_us", (now.host - self.host) / count),
        ]);
        if let (Some(before), Some(after)) = (self.target, now.target) {
            visit.insert("cpu_us", (after.0 - before.0) / count);
            visit.insert("switches", (after.1 - before.1) / count);
        }
        visit
    }
}
