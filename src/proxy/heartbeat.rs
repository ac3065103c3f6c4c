//! What a client of a stream hears while it waits, for a model with
//! `heartbeat`: comments, which it skips, so that nothing between the two takes
//! the silence for the end.
//!
//! ```text
//! waits ── an answer in time ──────────────────────► as without heartbeats
//!   │ nothing for one interval: head 200, a comment each interval
//!   ├── events ──────────► passes: as they come
//!   ├── other content ───► tells: as the data of one event
//!   └── an error ────────► fails: as an error event, and is cut
//! ```
//!
//! The request is carried out within the answer's body. So a client that leaves
//! drops it, wherever it waits.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use hyper::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request;
use hyper::{Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::time::Sleep;
use tracing::debug;

use super::body::{Broken, ProxyBody};
use super::filter::Change;
use super::forward::is_events;
use super::headers::words;
use super::held::Held;
use super::resolve::{is_encoded, kind, may_be_else};
use super::rewrite::asks_stream;
use super::upload::BodyError;
use super::{headers, multipart};
use crate::model::{Bytes as Size, ModelSpec};
use crate::reply::Fault;

/// A line that clients of events skip.
const COMMENT: &[u8] = b": waiting\n\n";
/// What is kept at most of a worker's error, to be told within an event.
const MOST_OF_ERROR: usize = 64 << 10;

/// A request on its way, up to the head of its answer.
pub(super) type Passing = Pin<Box<dyn Future<Output = Passed> + Send>>;
/// What came of it.
pub(super) type Passed = Result<Response<ProxyBody>, Fault>;

/// Returns how often this request's client is to hear something: one that asks
/// for a stream of events, of a model that is configured so. Reads at most about
/// `most` bytes of the body to find out.
pub(super) async fn wanted(
    spec: &ModelSpec,
    head: &request::Parts,
    (held, change): (&mut Held, &Change),
    most: Size,
) -> Result<Option<Duration>, Fault> {
    let Some(every) = spec.requests.heartbeat else {
        return Ok(None);
    };
    if head.method == Method::HEAD || headers::asks_upgrade(&head.headers) {
        return Ok(None);
    }
    if accepts_events(&head.headers) {
        return Ok(Some(every));
    }
    // Elsewhere a stream may be something else than events.
    let is_open_ai = head.uri.path().contains("/v1/");
    let kind = kind(head);
    let is_json = !may_be_else(kind) && multipart::boundary(kind).is_none() && !is_encoded(head);
    if !is_open_ai || !is_json || !held.read_up_to(most.get()).await? {
        return Ok(None);
    }
    let asks = match change {
        Change::Whole(body) => asks_stream(body),
        Change::None | Change::Name { .. } | Change::Messages(..) => asks_stream(&held.joined()),
    };
    Ok(asks.then_some(every))
}

fn accepts_events(headers: &HeaderMap) -> bool {
    let ranges = words(headers, &ACCEPT);
    let mut kinds = ranges.filter_map(|range| range.split(|byte| *byte == b';').next());
    kinds.any(|kind| kind.trim_ascii().eq_ignore_ascii_case(b"text/event-stream"))
}

/// Waits for an answer, and begins one after `every` without it.
pub(super) async fn wait(mut passing: Passing, every: Duration) -> Passed {
    if let Ok(passed) = tokio::time::timeout(every, &mut passing).await {
        return passed;
    }
    let waiting = Waiting {
        state: State::Waits(passing),
        every,
        beat: Box::pin(tokio::time::sleep(Duration::ZERO)),
    };
    let mut response = Response::new(ProxyBody::Waiting(Box::new(waiting)));
    for (name, value) in [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-cache"),
        // nginx gathers an answer otherwise, comments too.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ] {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    Ok(response)
}

/// The body of an answer that was begun before there was one.
pub struct Waiting {
    state: State,
    every: Duration,
    beat: Pin<Box<Sleep>>,
}

enum State {
    Waits(Passing),
    Passes(ProxyBody),
    /// Whether its event has begun.
    Tells(ProxyBody, bool),
    Fails(Failure),
    Ends(Option<Broken>),
}

/// A worker's error, while it is read.
struct Failure {
    status: StatusCode,
    body: ProxyBody,
    text: Vec<u8>,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Waits(_) => "waits",
            State::Passes(_) => "passes",
            State::Tells(..) => "tells",
            State::Fails(_) => "fails",
            State::Ends(_) => "ends",
        };
        f.debug_struct("Waiting").field("state", &state).finish()
    }
}

type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

fn data(bytes: impl Into<Bytes>) -> Polled {
    Poll::Ready(Some(Ok(Frame::data(bytes.into()))))
}

impl Waiting {
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Polled {
        loop {
            self.state = match &mut self.state {
                State::Waits(passing) => match passing.as_mut().poll(cx) {
                    Poll::Pending => return self.poll_beat(cx),
                    Poll::Ready(passed) => State::after(passed),
                },
                State::Passes(body) => return Pin::new(body).poll_frame(cx),
                State::Tells(body, begun) => match ready!(Pin::new(body).poll_frame(cx)) {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(part) => return data(lines(&part, begun)),
                        Err(_) => continue,
                    },
                    Some(Err(error)) => State::Ends(Some(Broken::new(error, None))),
                    None => {
                        let end: &[u8] = if *begun { b"\n\n" } else { b"" };
                        self.state = State::Ends(None);
                        return data(end);
                    }
                },
                State::Fails(failure) => {
                    ready!(failure.poll(cx));
                    State::broken(&failure.told())
                }
                State::Ends(broken) => return Broken::poll(broken, cx),
            }
        }
    }

    fn poll_beat(&mut self, cx: &mut Context<'_>) -> Polled {
        ready!(self.beat.as_mut().poll(cx));
        self.beat.set(tokio::time::sleep(self.every));
        data(COMMENT)
    }
}

impl State {
    /// Goes on with what came of the request.
    fn after(passed: Passed) -> Self {
        let response = match passed {
            Ok(response) => response,
            Err(fault) => {
                debug!(code = fault.code(), why = %fault, "refusing a request in its stream");
                return Self::broken(&fault.body());
            }
        };
        let (head, body) = response.into_parts();
        if !head.status.is_success() {
            return Self::Fails(Failure {
                status: head.status,
                body,
                text: Vec::new(),
            });
        }
        if is_events(&head.headers) {
            Self::Passes(body)
        } else {
            Self::Tells(body, false)
        }
    }

    /// Tells this error in an event of its own and cuts the answer: the head
    /// that went out says that all is well.
    fn broken(error: &Value) -> Self {
        // Anthropic's clients, and OpenAI's responses, go by the type.
        let mut error = error.clone();
        error["type"] = json!("error");
        let words = Bytes::from(format!("event: error\ndata: {error}\n\n"));
        Self::Ends(Some(Broken::new(BodyError::Cut, Some(words))))
    }
}

impl Failure {
    /// Reads what the worker says, to its end or as far as it is kept.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(Ok(frame)) = ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            let Ok(part) = frame.into_data() else {
                continue;
            };
            let room = MOST_OF_ERROR - self.text.len();
            self.text.extend_from_slice(&part[..part.len().min(room)]);
            if part.len() >= room {
                break;
            }
        }
        Poll::Ready(())
    }

    /// Returns the worker's own words where they are what clients expect.
    fn told(&self) -> Value {
        if let Ok(said) = serde_json::from_slice::<Value>(&self.text)
            && said.get("error").is_some()
        {
            return said;
        }
        let kind = if self.status.is_client_error() {
            "invalid_request_error"
        } else {
            "server_error"
        };
        let text = String::from_utf8_lossy(&self.text);
        let message = match text.trim() {
            "" => format!("the worker answered {}", self.status.as_u16()),
            text => text.to_owned(),
        };
        let detail = json!({"status": self.status.as_u16()});
        json!({"error": {"message": message, "type": kind, "code": "worker_error", "detail": detail}})
    }
}

/// Writes a part of a text as lines of an event's data.
fn lines(part: &[u8], begun: &mut bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(part.len() + 8);
    if !part.is_empty() && !std::mem::replace(begun, true) {
        out.extend_from_slice(b"data: ");
    }
    for byte in part {
        match byte {
            // JSON has no use for it but at the end of a line.
            b'\r' => {}
            b'\n' => out.extend_from_slice(b"\ndata: "),
            byte => out.push(*byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_of_events_is_known_by_what_it_accepts() {
        for (accept, is) in [
            ("text/event-stream", true),
            ("application/json, Text/Event-Stream;q=0.9", true),
            ("*/*", false),
            ("text/*", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(accepts_events(&headers), is, "{accept}");
        }
    }

    #[test]
    fn a_text_of_several_lines_is_one_event_whatever_the_pieces() {
        let text = b"{\r\n  \"a\": 1\n}";
        for piece in 1..=text.len() {
            let mut begun = false;
            let parts = text.chunks(piece).map(|part| lines(part, &mut begun));
            let event = parts.collect::<Vec<_>>().concat();
            assert_eq!(event, b"data: {\ndata:   \"a\": 1\ndata: }", "{piece}");
        }
    }

    #[test]
    fn a_workers_error_is_told_as_it_is_or_wrapped() {
        let told = |status, text: &str| {
            let (body, text) = (ProxyBody::empty(), text.as_bytes().to_vec());
            let status = StatusCode::from_u16(status).expect("a status");
            Failure { status, body, text }.told()
        };
        let own = json!({"error": {"message": "no", "code": 400}});
        assert_eq!(told(400, &own.to_string()), own);
        let wrapped = told(503, "busy\n");
        assert_eq!(wrapped["error"]["message"], "busy");
        assert_eq!(wrapped["error"]["detail"]["status"], 503);
        assert_eq!(told(500, "")["error"]["message"], "the worker answered 500");
    }
}
