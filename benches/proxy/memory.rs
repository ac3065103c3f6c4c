//! S04: resident memory, idle, with streams open, and after large bodies. Every
//! visit starts a target of its own, since memory that was used once may stay.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::Options;
use crate::load::{self, float_of};
use crate::peers::{self, Target, pause, whoami};
use crate::report::{Goal, Report, Rounds, Visit};
use crate::wire::{Connection, request};

const WORKERS: usize = 10;
const STREAMS: usize = 1000;
/// Clients that send large bodies side by side, and how many each sends.
const SENDERS: usize = 5;
const BODIES: usize = 10;
/// What was just started or ended comes to rest.
const REST: Duration = Duration::from_millis(700);

/// Runs the row.
pub(crate) fn run(options: &Options, report: &mut Report) -> io::Result<()> {
    let mut names = vec!["residentd"];
    names.extend(
        ["nginx", "haproxy"]
            .iter()
            .filter(|name| peers::version(name).is_some()),
    );
    let rounds = Rounds::run(
        (options.rounds, 1),
        &names,
        |name| name,
        |name| visit(name, &options.residentd),
    )?;
    report.table("S04", &rounds);
    let of = |figure| rounds.of("residentd", figure);
    report.absolute("S04-idle", "MB", &of("idle_mb"), Goal::at_most(20.0));
    report.absolute("S04-stream", "KB", &of("stream_kb"), Goal::at_most(48.0));
    report.absolute("S04-bodies", "MB", &of("bodies_mb"), Goal::at_most(32.0));
    Ok(())
}

/// Starts a target by its name; behind a peer is a worker of its own.
fn start(name: &str, binary: &Path) -> (Target, Option<Target>) {
    let worker = peers::worker();
    let target = match name {
        "nginx" => peers::nginx(&worker.address),
        "haproxy" => peers::haproxy(&worker.address),
        _ => {
            let residentd = peers::residentd(binary, "", WORKERS, true);
            whoami(&residentd.address, load::MODEL);
            return (residentd, None);
        }
    };
    (target.expect("it was found before"), Some(worker))
}

fn resident(target: &Target) -> f64 {
    pause(REST);
    let processes = target.processes.as_ref();
    processes.expect("it is a proxy").resident()
}

fn visit(name: &str, binary: &Path) -> io::Result<Visit> {
    let mut visit = Visit::new();
    let (target, _worker) = start(name, binary);
    let idle = resident(&target);
    visit.insert("idle_mb", idle / 1e6);
    let open = crate::driver().block_on(async {
        let streams = open(&target).await?;
        // While they are open.
        let resident = resident(&target);
        drop(streams);
        io::Result::Ok(resident)
    })?;
    visit.insert("stream_kb", (open - idle) / float_of(STREAMS) / 1e3);
    drop(target);
    let (target, _worker) = start(name, binary);
    let idle = resident(&target);
    crate::driver().block_on(send(&target))?;
    visit.insert("bodies_mb", (resident(&target) - idle) / 1e6);
    Ok(visit)
}

/// Opens all streams; each has given one event.
async fn open(target: &Target) -> io::Result<Vec<Connection>> {
    let asked = request("hold", "", load::small());
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = Connection::open(&target.address).await?;
        stream.send(&asked).await?;
        while stream.answer.body.len() < load::EVENT {
            stream.read().await?;
        }
        streams.push(stream);
    }
    Ok(streams)
}

async fn send(target: &Target) -> io::Result<()> {
    let mut senders = JoinSet::new();
    for _ in 0..SENDERS {
        let address = target.address.clone();
        senders.spawn(async move {
            let mut connection = Connection::open(&address).await?;
            for _ in 0..BODIES {
                let body = request("first", "", load::large(true));
                connection.ask(&body).await?;
                connection.answer.is_small()?;
            }
            io::Result::Ok(())
        });
    }
    while let Some(sent) = senders.join_next().await {
        sent.map_err(io::Error::other)??;
    }
    Ok(())
}
