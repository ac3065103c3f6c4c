//! What is read of an answer beside what hyper's client reads of it.

use std::convert::Infallible;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::header::{CONTENT_LENGTH, HeaderMap};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::decode::Piece;
use super::head;
use crate::proxy::fuzzing::ways;

/// What was read of an answer.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
    is_whole: bool,
    /// The connection serves another request.
    is_kept: bool,
    /// What came behind it.
    behind: Vec<u8>,
}

/// Compares what is read of an answer with what hyper reads, and in pieces with the
/// whole. The first byte says whether only the head was asked for.
///
/// # Panics
/// When they differ.
pub fn answer(data: &[u8]) {
    let Some((first, data)) = data.split_first() else {
        return;
    };
    let is_head = first % 2 == 1;
    let whole = ours(&[data], is_head);
    for pieces in ways(data) {
        assert_eq!(ours(&pieces, is_head), whole, "in {pieces:?}");
    }
    // What we refuse hyper may take; never the other way round, nor otherwise.
    let Ok(mut ours) = whole else {
        return;
    };
    let theirs = hypers(data, is_head).unwrap_or_else(|| panic!("only we read {ours:?}"));
    // hyper tells neither.
    ours.behind.clear();
    ours.is_kept = theirs.is_kept;
    // It leaves out one that does not count, as we do later.
    if theirs.headers.get(CONTENT_LENGTH).is_none() {
        ours.headers.remove(CONTENT_LENGTH);
    }
    if !ours.is_whole {
        // What we take for broken hyper may take for whole, and what came of a body
        // that breaks off may be lost.
        let begins = |long: &[u8], short: &[u8]| long.starts_with(short) || short.starts_with(long);
        assert!(begins(&ours.body, &theirs.body), "{ours:?} {theirs:?}");
        ours.body.clone_from(&theirs.body);
        ours.trailers.clone_from(&theirs.trailers);
        ours.is_whole = theirs.is_whole;
    }
    assert_eq!(ours, theirs);
}

/// Reads an answer that comes in these pieces, after which the worker closes. `Err`:
/// it has no head, or none that can be.
fn ours(pieces: &[&[u8]], is_head: bool) -> Result<Seen, ()> {
    let mut pieces = pieces.iter();
    let (mut buffer, mut seen) = (BytesMut::new(), 0);
    let mut head = loop {
        match head::read(&mut buffer, &mut seen, is_head) {
            Err(_) => return Err(()),
            Ok(Some(head)) if head.status.is_informational() && head.status != 101 => {}
            Ok(Some(head)) => break head,
            Ok(None) => buffer.extend_from_slice(pieces.next().ok_or(())?),
        }
    };
    let mut read = Seen {
        status: head.status.as_u16(),
        headers: head.headers,
        is_kept: head.is_kept,
        ..Seen::default()
    };
    loop {
        match head.body.next(&mut buffer) {
            Ok(Piece::Data(data)) => read.body.extend_from_slice(&data),
            Ok(Piece::Trailers(trailers)) => read.trailers = Some(trailers),
            Ok(Piece::End) => {
                read.is_whole = true;
                break;
            }
            Ok(Piece::More) => match pieces.next() {
                Some(piece) => buffer.extend_from_slice(piece),
                None => {
                    read.is_whole = head.body.close().is_ok();
                    break;
                }
            },
            Err(_) => break,
        }
    }
    read.behind.extend_from_slice(&buffer);
    pieces.for_each(|piece| read.behind.extend_from_slice(piece));
    Ok(read)
}

/// Has hyper read the same.
fn hypers(data: &[u8], is_head: bool) -> Option<Seen> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime");
    runtime.block_on(async {
        let (client, worker) = tokio::io::duplex(1 << 16);
        let (read, ()) = tokio::join!(by_hyper(client, is_head), play(worker, data));
        read
    })
}

async fn play(mut worker: DuplexStream, data: &[u8]) {
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        asked.push(worker.read_u8().await.expect("a request"));
    }
    // Whoever has read enough may be gone.
    let _ = worker.write_all(data).await;
}

async fn by_hyper(client: DuplexStream, is_head: bool) -> Option<Seen> {
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(client));
    let (mut requests, connection) = handshake.await.expect("a connection");
    let method = if is_head { "HEAD" } else { "GET" };
    let request = Request::builder()
        .method(method)
        .uri("/")
        .header("host", "x");
    let request = request.body(Empty::<Bytes>::new()).expect("a good request");
    let asked = async move {
        let response = requests.send_request(request).await.ok()?;
        let (head, mut body) = response.into_parts();
        let mut read = Seen {
            status: head.status.as_u16(),
            headers: head.headers,
            is_whole: true,
            ..Seen::default()
        };
        while let Some(frame) = body.frame().await {
            match frame.map(hyper::body::Frame::into_data) {
                Ok(Ok(data)) => read.body.extend_from_slice(&data),
                Ok(Err(frame)) => read.trailers = frame.into_trailers().ok(),
                Err(_) => {
                    read.is_whole = false;
                    break;
                }
            }
        }
        Some(read)
    };
    let connection = async {
        // What is wrong with it is told to who asked.
        let _ = connection.await;
        Ok::<_, Infallible>(())
    };
    tokio::join!(asked, connection).0
}
