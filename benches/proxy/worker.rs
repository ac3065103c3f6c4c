//! The worker behind every target: the least that answers HTTP/1.1 and h2c, on
//! one thread, so that it is not what is measured. It compares what it gets.
//!
//! This same program, started as `proxy worker --port PORT`.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::unfold;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::load::{self, ASK, FIRST_BYTE};

type Answer = UnsyncBoxBody<Bytes, Infallible>;

/// No bench takes so long: whoever is left behind ends by itself.
pub(crate) const LIFE: Duration = Duration::from_secs(1800);
/// How long a stream is held open at most.
const HELD: Duration = Duration::from_secs(60);

/// Runs a server of this program to the end of its life.
pub(crate) fn run(serves: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    // At the end of its life it just ends.
    let _ = runtime.block_on(async { timeout(LIFE, serves).await });
}

/// Serves on this port.
pub(crate) async fn serve(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    let listener = listener.expect("the port is free");
    let port = listener.local_addr().expect("it is bound").port();
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).expect("it can be set");
        connections.spawn(async move {
            let service = service_fn(move |request| answer(request, port));
            let builder = auto::Builder::new(TokioExecutor::new());
            // An error is a client that left.
            let _ = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(request: Request<Incoming>, port: u16) -> Result<Response<Answer>, Infallible> {
    if request.method() == Method::GET {
        let who = format!("{} {port}", std::process::id());
        return Ok(Response::new(whole(who.into())));
    }
    let (head, body) = request.into_parts();
    let ask = head.headers.get(ASK).map(HeaderValue::as_bytes);
    let is_call = head.headers.get(CONTENT_TYPE);
    let is_call = is_call.is_some_and(|kind| kind == "application/grpc");
    let wanted = match ask {
        Some(b"first") => load::large(true),
        Some(b"last") => load::large(false),
        _ if is_call => load::message(),
        _ => load::small(),
    };
    let first_byte = match ask {
        // It may have been changed on its way.
        Some(b"any") => body.collect().await.ok().map(|_| load::now()),
        _ => compare(body, wanted).await,
    };
    let Some(first_byte) = first_byte else {
        let mut broken = Response::new(whole(Bytes::from_static(b"other bytes came")));
        *broken.status_mut() = StatusCode::BAD_REQUEST;
        return Ok(broken);
    };
    let mut response = match ask {
        Some(b"stream") => events(count(&head.headers, "x-count"), gap(&head.headers)),
        Some(b"hold") => held(),
        _ if is_call => echo(),
        _ => Response::new(whole(Bytes::from_static(load::answer()))),
    };
    let headers = response.headers_mut();
    headers.insert(FIRST_BYTE, HeaderValue::from(first_byte));
    headers
        .entry(CONTENT_TYPE)
        .or_insert(HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Returns when the first byte came, if all are as they should be.
async fn compare(mut body: Incoming, wanted: &[u8]) -> Option<u64> {
    let (mut first_byte, mut rest) = (None, wanted);
    while !body.is_end_stream() {
        let Some(frame) = body.frame().await else {
            break;
        };
        if let Ok(data) = frame.ok()?.into_data() {
            first_byte.get_or_insert_with(load::now);
            rest = rest.strip_prefix(&*data)?;
        }
    }
    first_byte.filter(|_| rest.is_empty())
}

fn whole(text: Bytes) -> Answer {
    Full::new(text).boxed_unsync()
}

fn count(headers: &HeaderMap, name: &str) -> usize {
    let text = headers.get(name).and_then(|text| text.to_str().ok());
    text.and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn gap(headers: &HeaderMap) -> Duration {
    Duration::from_millis(u64::try_from(count(headers, "x-gap-ms")).expect("a short time"))
}

/// Gives so many events, each at its time.
fn events(count: usize, gap: Duration) -> Response<Answer> {
    let began = Instant::now();
    let parts = unfold((0, began), move |(number, due)| async move {
        if number == count {
            return None;
        }
        sleep_until(due).await;
        let event = load::event(number, load::now());
        let frame = Ok(Frame::data(Bytes::from(event)));
        Some((frame, (number + 1, due + gap)))
    });
    stream(StreamBody::new(parts).boxed_unsync())
}

/// Gives one event and then nothing until the client leaves.
fn held() -> Response<Answer> {
    let parts = unfold(0, |number| async move {
        if number > 0 {
            tokio::time::sleep(HELD).await;
            return None;
        }
        let event = load::event(number, load::now());
        Some((Ok(Frame::data(Bytes::from(event))), 1))
    });
    stream(StreamBody::new(parts).boxed_unsync())
}

fn stream(body: Answer) -> Response<Answer> {
    let mut response = Response::new(body);
    let kind = HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// Answers a call of gRPC with its own message.
fn echo() -> Response<Answer> {
    let trailers = HeaderMap::from_iter([(
        hyper::header::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    let message = Full::new(Bytes::from_static(load::message()));
    let body = message.with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = Response::new(body.boxed_unsync());
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
