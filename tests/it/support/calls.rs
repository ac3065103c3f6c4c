//! A client of gRPC that hides nothing.

use std::future::Future;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use residentd::grpc::{Message, Value, first_field};
use tokio::sync::mpsc;

use super::PATIENCE;

/// What a call carries.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::convert::Infallible>;
/// A connection to residentd.
pub(crate) type Client = SendRequest<Body>;

/// Where the methods of the Open Inference Protocol are.
pub(crate) const INFERENCE: &str = "/inference.GRPCInferenceService";

/// Runs `talk` with one connection to residentd.
pub(crate) fn with<B, F, T>(address: &str, talk: impl FnOnce(SendRequest<B>) -> F) -> T
where
    B: hyper::body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = T>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(over(address, talk))
}

async fn over<B, F, T>(address: &str, talk: impl FnOnce(SendRequest<B>) -> F) -> T
where
    B: hyper::body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = T>,
{
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .expect("a connection");
    // As every client of gRPC: a message does not wait for its head's receipt.
    stream.set_nodelay(true).expect("a socket option");
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("it speaks HTTP/2");
    tokio::select! {
        biased;
        done = tokio::time::timeout(PATIENCE, talk(sender)) => done.expect("in time"),
        ended = connection => panic!("the connection ended: {ended:?}"),
    }
}

/// Builds a call.
pub(crate) fn call(
    path: &str,
    metadata: &[(&'static str, &'static str)],
    body: Body,
) -> Request<Body> {
    let mut request = Request::post(format!("http://models.test{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .expect("a good request");
    for (name, value) in metadata {
        let value = HeaderValue::from_static(value);
        request.headers_mut().insert(*name, value);
    }
    request
}

/// A body of one message.
pub(crate) fn whole(frame: Bytes) -> Body {
    // Without a length, as real clients send it.
    StreamBody::new(stream::iter([Ok(Frame::data(frame))])).boxed_unsync()
}

/// A body whose messages come one by one.
pub(crate) fn open() -> (mpsc::Sender<Frame<Bytes>>, Body) {
    let (sender, frames) = mpsc::channel(16);
    let frames = stream::unfold(frames, |mut frames| async move {
        Some((Ok(frames.recv().await?), frames))
    });
    (sender, StreamBody::new(frames).boxed_unsync())
}

/// How a call ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) headers: HeaderMap,
    pub(crate) data: Bytes,
    /// Of the trailers, or of the headers when there are no others.
    pub(crate) end: HeaderMap,
}

impl Done {
    pub(crate) fn status(&self) -> &str {
        self.end["grpc-status"].to_str().expect("text")
    }

    pub(crate) fn message(&self) -> &str {
        let message = self.end.get("grpc-message");
        message.map_or("", |message| message.to_str().expect("text"))
    }
}

/// Reads an answer to its end.
pub(crate) async fn finish(response: Response<Incoming>) -> Done {
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/grpc");
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("a call ends with a status");
    let end = body.trailers().unwrap_or(&head.headers).clone();
    Done {
        data: body.to_bytes(),
        headers: head.headers,
        end,
    }
}

/// Calls a method, of inference unless it is a path, with one message.
pub(crate) async fn ask(
    client: &Client,
    method: &str,
    metadata: &[(&'static str, &'static str)],
    frame: Bytes,
) -> Done {
    let path = match method.starts_with('/') {
        true => method.to_owned(),
        false => format!("{INFERENCE}/{method}"),
    };
    let request = call(&path, metadata, whole(frame));
    let response = client.clone().send_request(request).await;
    finish(response.expect("an answer")).await
}

/// A message with a name in its first field.
pub(crate) fn named(name: &str) -> Message {
    Message::default().text(1, name)
}

/// Returns the field of the message in a frame.
pub(crate) fn field(frame: &[u8], wanted: u64) -> Option<Value<'_>> {
    let mut rest = frame.get(5..)?;
    while let Ok(Some((number, value, used))) = first_field(rest) {
        if number == wanted {
            return Some(value);
        }
        rest = &rest[used..];
    }
    None
}
