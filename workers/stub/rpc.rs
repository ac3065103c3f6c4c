//! gRPC, as far as tests need it: messages are sent back as they come, one by
//! one, and a status ends the call.
//!
//! A call of the Open Inference Protocol is answered as a model would whose
//! outputs are its inputs; a compressed one goes back as it came. Metadata asks for more: `x-stub-status` for that
//! status at the end, `x-stub-exit-after` for a SIGKILL after so many messages, `x-stub-delay-ms` for a wait before
//! the first, `x-stub-times` for each message so many times.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream::unfold;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Request, Response};
use residentd::grpc::{Value, first_field};

use crate::answer::{Answer, BrokenOff, kill_self};
use crate::state::{InFlight, Stub};

/// What is already written goes out while a kill waits this long.
const BEFORE_A_KILL: Duration = Duration::from_millis(20);

/// Answers one call.
pub(crate) fn answer(stub: &Arc<Stub>, request: Request<Incoming>) -> Response<Answer> {
    let (head, body) = request.into_parts();
    let call = Call {
        shape: Shape::of(head.uri.path()),
        body,
        read: BytesMut::new(),
        trailers: HeaderMap::new(),
        given: 0,
        delay: number(&head.headers, "x-stub-delay-ms").map(Duration::from_millis),
        times: number(&head.headers, "x-stub-times").unwrap_or(1),
        again: (0, Bytes::new()),
        exit_after: number(&head.headers, "x-stub-exit-after"),
        status: number(&head.headers, "x-stub-status").unwrap_or(0),
        in_flight: stub.begin(),
    };
    if call.exit_after == Some(0) {
        kill_self();
    }
    let messages = unfold(Some(call), |call| async move { call?.next().await });
    let mut response = Response::new(StreamBody::new(messages).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("x-stub-pid", HeaderValue::from(std::process::id()));
    if let Ok(name) = HeaderValue::from_str(&stub.args.name) {
        headers.insert("x-stub-name", name);
    }
    for (from, to) in [
        ("grpc-timeout", "x-stub-timeout"),
        ("grpc-encoding", "grpc-encoding"),
        ("te", "x-stub-te"),
    ] {
        if let Some(value) = head.headers.get(from) {
            headers.insert(to, value.clone());
        }
    }
    response
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// How a message is answered.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Echo,
    Infer,
    StreamInfer,
}

impl Shape {
    fn of(path: &str) -> Self {
        match path.strip_prefix("/inference.GRPCInferenceService/") {
            Some("ModelInfer") => Self::Infer,
            Some("ModelStreamInfer") => Self::StreamInfer,
            _ => Self::Echo,
        }
    }

    fn answer(self, message: &[u8]) -> Vec<u8> {
        match self {
            Self::Echo => message.to_vec(),
            Self::Infer => inferred(message),
            Self::StreamInfer => {
                let mut wrapped = Vec::new();
                put(&mut wrapped, 2, &inferred(message));
                wrapped
            }
        }
    }
}

/// Makes a `ModelInferResponse` of a `ModelInferRequest`: name, id and tensors
/// have the same numbers, their raw bytes move from 7 to 6, and the wanted
/// outputs go.
fn inferred(message: &[u8]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), message);
    while let Ok(Some((number, value, used))) = first_field(rest) {
        match (number, value) {
            (1 | 2 | 3 | 5, Value::Bytes(bytes)) => put(&mut out, number, bytes),
            (7, Value::Bytes(bytes)) => put(&mut out, 6, bytes),
            _ => {}
        }
        rest = &rest[used..];
    }
    out
}

fn put(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    for mut number in [
        field << 3 | 2,
        u64::try_from(bytes.len()).expect("a length fits 64 bits"),
    ] {
        while number >= 0x80 {
            out.push(number.to_le_bytes()[0] | 0x80);
            number >>= 7;
        }
        out.push(number.to_le_bytes()[0]);
    }
    out.extend_from_slice(bytes);
}

/// A call that goes on.
struct Call {
    shape: Shape,
    body: Incoming,
    read: BytesMut,
    /// Those of the client.
    trailers: HeaderMap,
    given: u64,
    delay: Option<Duration>,
    times: u64,
    /// What is given so many times more.
    again: (u64, Bytes),
    exit_after: Option<u64>,
    status: u64,
    in_flight: InFlight,
}

type Given = (Result<Frame<Bytes>, BrokenOff>, Option<Call>);

impl Call {
    /// Gives the next message back, in the end the status.
    async fn next(mut self) -> Option<Given> {
        if self.exit_after == Some(self.given) {
            tokio::time::sleep(BEFORE_A_KILL).await;
            kill_self();
        }
        if self.again.0 > 0 {
            self.again.0 -= 1;
            let frame = Frame::data(self.again.1.clone());
            return Some((Ok(frame), Some(self)));
        }
        loop {
            if let Some((compressed, message)) = self.take() {
                if let Some(delay) = self.delay.take() {
                    tokio::time::sleep(delay).await;
                }
                self.given += 1;
                let answer = match compressed {
                    0 => self.shape.answer(&message),
                    _ => message.to_vec(),
                };
                let length = u32::try_from(answer.len()).expect("a test's message is small");
                let mut frame = vec![compressed];
                frame.extend_from_slice(&length.to_be_bytes());
                frame.extend_from_slice(&answer);
                let frame = Bytes::from(frame);
                self.again = (self.times.saturating_sub(1), frame.clone());
                return Some((Ok(Frame::data(frame)), Some(self)));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.read.extend_from_slice(&data),
                    Err(frame) => self.trailers = frame.into_trailers().unwrap_or_default(),
                },
                // The client left, and nobody hears more.
                Some(Err(_)) => return Some((Err(BrokenOff), None)),
                None => return Some((Ok(Frame::trailers(self.end())), None)),
            }
        }
    }

    /// Takes a message that is here as a whole, with its mark of being
    /// compressed.
    fn take(&mut self) -> Option<(u8, Bytes)> {
        let prefix = self.read.first_chunk::<5>()?;
        let [compressed, a, b, c, d] = *prefix;
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()?;
        if self.read.len() < 5 + length {
            return None;
        }
        self.read.advance(5);
        Some((compressed, self.read.split_to(length).freeze()))
    }

    fn end(&mut self) -> HeaderMap {
        self.in_flight.finish();
        let mut trailers = std::mem::take(&mut self.trailers);
        trailers.insert("grpc-status", HeaderValue::from(self.status));
        trailers.insert("x-stub-given", HeaderValue::from(self.given));
        trailers
    }
}
