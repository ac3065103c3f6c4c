//! S05: a body of 10 MB that comes at 1 Gbit/s, its model first or last.

use std::io;
use std::time::Duration;

use crate::load::{self, FIRST_BYTE, LARGE, float};
use crate::peers::Target;
use crate::report::{Goal, Report, Visit};
use crate::wire::{Connection, head, request};
use crate::{Options, Stage};

/// What is sent at once, and how often: together 1 Gbit/s.
const PIECE: usize = 125_000;
const GAP: Duration = Duration::from_millis(1);
/// Uploads of a visit; the median counts.
const UPLOADS: usize = 3;
/// A model at the end of 10 MB is only found by who may read so much: the default
/// is 1 MiB, more is a setting.
pub(crate) const PREFIX: &str = "model_prefix = \"16MiB\"";

/// Runs both rows.
pub(crate) fn run(options: &Options, report: &mut Report) -> io::Result<()> {
    for (row, ask, server, goal) in [("first", "first", "", 1.01), ("last", "last", PREFIX, 1.08)] {
        let stage = Stage::new(options, report, server);
        let rounds = stage.rounds(options.rounds(), |target| visit(target, ask))?;
        report.table(&format!("S05-{row}"), &rounds);
        let pair = (
            rounds.of("residentd", "end_ms"),
            rounds.of("direct", "end_ms"),
        );
        let name = format!("S05-end-{row}");
        report.ratio(&name, ("ms", "direct"), pair, Goal::at_most(goal));
        if ask == "first" {
            let first = rounds.of("residentd", "first_ms");
            report.absolute("S05-first-byte", "ms", &first, Goal::at_most(2.0));
        }
    }
    Ok(())
}

pub(crate) fn visit(target: &Target, ask: &str) -> io::Result<Visit> {
    crate::driver().block_on(async {
        let mut connection = Connection::open(&target.address).await?;
        connection.ask(&request("", "", load::small())).await?;
        let (mut ends, mut firsts) = (Vec::new(), Vec::new());
        for _ in 0..UPLOADS {
            let (end, first) = upload(&mut connection, ask).await?;
            ends.push(end);
            firsts.push(first);
        }
        let median = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values[UPLOADS / 2]
        };
        Ok(Visit::from([
            ("end_ms", median(ends)),
            ("first_ms", median(firsts)),
        ]))
    })
}

/// Returns when the answer was there and when the worker had the first byte, in ms
/// from the start.
async fn upload(connection: &mut Connection, ask: &str) -> io::Result<(f64, f64)> {
    let body = load::large(ask == "first");
    let start = load::now();
    let mut due = tokio::time::Instant::now();
    connection.send(&head(ask, "", LARGE)).await?;
    for piece in body.chunks(PIECE) {
        connection.send_more(piece).await?;
        due += GAP;
        tokio::time::sleep_until(due).await;
    }
    while connection.read().await? {}
    let end = load::now();
    connection.answer.is_small()?;
    let first = connection.answer.header(FIRST_BYTE);
    let first: u64 = first.and_then(|ns| ns.parse().ok()).expect("a time");
    let ms = |at: u64| float(at.saturating_sub(start)) / 1e6;
    Ok((ms(end), ms(first)))
}
