//! S03: streams of events, each at its time.
//!
//! How late an event comes is told by the two ends: the worker writes the time into
//! it, the driver notes when it has read all of it.

use std::io;

use tokio::task::JoinSet;

use crate::load::{self, EVENT, STAMP, float, float_of};
use crate::peers::Target;
use crate::report::{Goal, Report, Visit, percentile};
use crate::requests::Used;
use crate::wire::{Connection, request};
use crate::{Options, Stage};

const STREAMS: usize = 32;
/// Events of a stream, one each [`GAP_MS`].
const EVENTS: usize = 200;
const GAP_MS: usize = 5;

/// Runs the row.
pub(crate) fn run(options: &Options, report: &mut Report) -> io::Result<()> {
    let stage = Stage::new(options, report, "");
    let passes = options.passes.div_ceil(2);
    let rounds = stage.rounds((options.rounds, passes), visit)?;
    report.table("S03", &rounds);
    let (ours, nginx) = ("residentd", "nginx");
    let pair = (rounds.of(ours, "cpu_us"), rounds.of(nginx, "cpu_us"));
    report.ratio("S03-cpu-chunk", ("us", nginx), pair, Goal::at_most(1.0));
    // A driver that is late finds two events at once, also without a proxy.
    let reads = (rounds.of(ours, "reads"), rounds.of("direct", "reads"));
    let unit = ("reads/chunk", "direct");
    report.ratio("S03-reads-chunk", unit, reads, Goal::at_least(0.99));
    let late = (rounds.added(ours, "p50_us"), rounds.added(nginx, "p50_us"));
    report.ratio(
        "S03-added-delay-p50",
        ("us", nginx),
        late,
        Goal::at_most(1.2),
    );
    Ok(())
}

pub(crate) fn visit(target: &Target) -> io::Result<Visit> {
    crate::driver().block_on(async {
        let more = format!("x-count: {EVENTS}\r\nx-gap-ms: {GAP_MS}\r\n");
        let asked = request("stream", &more, load::small());
        let mut opened = Vec::new();
        for _ in 0..STREAMS {
            let mut connection = Connection::open(&target.address).await?;
            connection.ask(&request("", "", load::small())).await?;
            opened.push(connection);
        }
        let before = Used::now(target);
        let mut streams = JoinSet::new();
        for connection in opened {
            streams.spawn(stream(connection, asked.clone()));
        }
        let (mut reads, mut delays) = (0, Vec::new());
        while let Some(read) = streams.join_next().await {
            let read = read.map_err(io::Error::other)??;
            reads += read.0;
            delays.extend(read.1);
        }
        let mut visit = before.until_now(target, STREAMS * EVENTS);
        delays.sort_by(f64::total_cmp);
        visit.insert("reads", float_of(reads) / float_of(STREAMS * EVENTS));
        visit.insert("p50_us", percentile(&delays, 50));
        visit.insert("p99_us", percentile(&delays, 99));
        Ok(visit)
    })
}

/// Reads one stream; returns how many reads brought something of it, and how long
/// each event was on its way, in µs.
async fn stream(mut connection: Connection, asked: Vec<u8>) -> io::Result<(usize, Vec<f64>)> {
    connection.send(&asked).await?;
    let (mut reads, mut delays) = (0, Vec::new());
    loop {
        let had = connection.answer.body.len();
        let more = connection.read().await?;
        let (now, body) = (load::now(), &connection.answer.body);
        reads += usize::from(body.len() > had);
        for event in body.chunks_exact(EVENT).skip(delays.len()) {
            let stamp = std::str::from_utf8(&event[STAMP]).map_err(io::Error::other)?;
            let stamp = stamp.parse().map_err(io::Error::other)?;
            if event != load::event(delays.len(), stamp) {
                return Err(io::Error::other("an event came out changed"));
            }
            delays.push(float(now.saturating_sub(stamp)) / 1e3);
        }
        if !more {
            let whole = body.len() == EVENT * EVENTS;
            return match whole {
                true => Ok((reads, delays)),
                false => Err(io::Error::other("a stream is not whole")),
            };
        }
    }
}
