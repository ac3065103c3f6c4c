//! S06: calls of gRPC over h2c on both sides, each of 1 KB with an answer of 1 KB,
//! beside the least that hyper can do.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http2;
use hyper::header::CONTENT_TYPE;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::load::{self, MODEL};
use crate::peers::{self, Target};
use crate::report::{Goal, Report, Rounds, Visit};
use crate::requests::Used;
use crate::{BEFORE, Options, before};

const CONNECTIONS: usize = 4;
/// Calls that are on their way on each.
const CALLS: usize = 8;
const VISIT: Duration = Duration::from_millis(500);
/// Most calls of one after the other in a visit.
const MOST: usize = 100_000;
/// The goal is 40 µs where hyper to hyper takes 35.
const GOAL: f64 = 40.0 / 35.0;

type Sender = http2::SendRequest<Full<Bytes>>;

/// Runs the row.
pub(crate) fn run(options: &Options, report: &mut Report) -> io::Result<()> {
    let residentd = peers::residentd(&options.residentd, "", 1, false);
    let worker = peers::whoami(&residentd.address, MODEL);
    let bare = peers::bare(&worker);
    let mut targets = vec![residentd, bare];
    targets.extend(before(options, ""));
    targets.push(Target::direct(worker));
    let rounds = Rounds::run(options.rounds(), &targets, |target| &target.name, visit)?;
    report.table("S06", &rounds);
    report.prove_driver("S06", &rounds);
    let pair = (
        rounds.of("residentd", "cpu_us"),
        rounds.of("bare-hyper", "cpu_us"),
    );
    report.ratio("S06-cpu", ("us", "bare-hyper"), pair, Goal::at_most(GOAL));
    if options.before.is_some() {
        let pair = (
            rounds.of("residentd", "cpu_us"),
            rounds.of(BEFORE, "cpu_us"),
        );
        report.ratio("S06-cpu-before", ("us", BEFORE), pair, Goal::at_most(1.0));
    }
    Ok(())
}

pub(crate) fn visit(target: &Target) -> io::Result<Visit> {
    crate::driver().block_on(async {
        let mut connections = JoinSet::new();
        let mut senders = Vec::new();
        for _ in 0..CONNECTIONS {
            let (mut sender, connection) = open(&target.address).await?;
            connections.spawn(connection);
            call(&mut sender, &target.address).await?;
            senders.extend(std::iter::repeat_n(sender, CALLS));
        }
        let before = Used::now(target);
        let end = load::now() + u64::try_from(VISIT.as_nanos()).expect("it is short");
        let mut calling = JoinSet::new();
        for mut sender in senders {
            let address = target.address.clone();
            calling.spawn(async move {
                let mut done = 0;
                while load::now() < end && done < MOST {
                    call(&mut sender, &address).await?;
                    done += 1;
                }
                io::Result::Ok(done)
            });
        }
        let mut count = 0;
        while let Some(done) = calling.join_next().await {
            count += done.map_err(io::Error::other)??;
        }
        Ok(before.until_now(target, count))
    })
}

/// Opens a connection on which HTTP/2 is spoken unasked; it is to be polled.
pub(crate) async fn open(
    address: &str,
) -> io::Result<(Sender, impl Future<Output = hyper::Result<()>> + use<>)> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let io = TokioIo::new(stream);
    let opened = http2::handshake(TokioExecutor::new(), io).await;
    opened.map_err(io::Error::other)
}

async fn call(sender: &mut Sender, address: &str) -> io::Result<()> {
    let request = Request::post(format!("http://{address}/bench.Echo/Call"))
        .header(CONTENT_TYPE, "application/grpc")
        .header("te", "trailers")
        .header("x-model", MODEL)
        .body(Full::new(Bytes::from_static(load::message())))
        .map_err(io::Error::other)?;
    sender.ready().await.map_err(io::Error::other)?;
    let answer = sender.send_request(request).await;
    let answer = answer.map_err(io::Error::other)?;
    let body = answer.into_body().collect().await;
    let body = body.map_err(io::Error::other)?;
    let status = body
        .trailers()
        .and_then(|trailers| trailers.get("grpc-status"));
    let ended_well = status.is_some_and(|status| status == "0");
    match ended_well && body.to_bytes() == load::message() {
        true => Ok(()),
        false => Err(io::Error::other("another message came back")),
    }
}
