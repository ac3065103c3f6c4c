//! gRPC calls that residentd answers itself: about the server, its models'
//! readiness and repository in the Open Inference Protocol, and
//! `grpc.health.v1`. All others are a worker's, and belong to the proxy.

use std::convert::Infallible;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{self, unfold};
use http_body_util::StreamBody;
use hyper::body::Frame;

use super::envelope::ApiError;
use super::repository::{self, Wish};
use super::{ApiState, oip, probes};
use crate::grpc::{self, Code, Message, Value, first_field};
use crate::model::Bytes as Size;

/// Where the methods of inference are.
pub(super) const INFERENCE: &str = "/inference.GRPCInferenceService/{method}";
/// Where those of health are.
pub(super) const HEALTH: &str = "/grpc.health.v1.Health/{method}";
/// The largest message that is read here.
const MOST: Size = Size::mib(1);
/// The health service's own words.
const SERVING: u64 = 1;
const NOT_SERVING: u64 = 2;
const SERVICE_UNKNOWN: u64 = 3;

/// A method that is answered here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    ServerLive,
    ServerReady,
    ServerMetadata,
    ModelReady,
    RepositoryIndex,
    Change(Wish),
    Check,
    Watch,
}

impl Method {
    fn of(path: &str) -> Option<Self> {
        let (service, method) = path.strip_prefix('/')?.split_once('/')?;
        Some(match (service, method) {
            ("inference.GRPCInferenceService", method) => match method {
                "ServerLive" => Self::ServerLive,
                "ServerReady" => Self::ServerReady,
                "ServerMetadata" => Self::ServerMetadata,
                "ModelReady" => Self::ModelReady,
                "RepositoryIndex" => Self::RepositoryIndex,
                "RepositoryModelLoad" => Self::Change(Wish::Load),
                "RepositoryModelUnload" => Self::Change(Wish::Unload),
                _ => return None,
            },
            ("grpc.health.v1.Health", "Check") => Self::Check,
            ("grpc.health.v1.Health", "Watch") => Self::Watch,
            _ => return None,
        })
    }
}

/// Returns whether a call is answered here. One that names a model in its
/// metadata is for that model's worker.
#[must_use]
pub fn answers<B>(request: &axum::http::Request<B>) -> bool {
    !request.headers().contains_key("x-model") && Method::of(request.uri().path()).is_some()
}

/// Returns whether a path is that of a call which changes nothing.
pub(super) fn only_reads(path: &str) -> bool {
    Method::of(path).is_some_and(|method| !matches!(method, Method::Change(_)))
}

/// Answers a call.
pub(crate) async fn call(
    State(state): State<ApiState>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = request.uri().path().to_owned();
    if !grpc::is_call(&request) {
        let how = "a call needs HTTP/2 and the content type application/grpc";
        return Err(ApiError::BadRequest(how.into()));
    }
    let method = Method::of(&path).ok_or(ApiError::NotFound(path))?;
    let message = read(request).await?;
    Ok(match method {
        Method::ServerLive => said(&flag(true)),
        Method::ServerReady => said(&flag(probes::is_ready(&state))),
        Method::ServerMetadata => {
            let about = Message::default()
                .text(1, env!("CARGO_PKG_NAME"))
                .text(2, env!("CARGO_PKG_VERSION"));
            let extensions = oip::EXTENSIONS.iter();
            said(&extensions.fold(about, |about, extension| about.text(3, extension)))
        }
        Method::ModelReady => said(&flag(repository::is_ready(&state, &text(&message, 1)?)?)),
        Method::RepositoryIndex => {
            let only_ready = number(&message, 2)? != 0;
            said(&index(repository::index(&state, only_ready)))
        }
        Method::Change(wish) => {
            let names = parameters(&message)?;
            let names = names.iter().map(String::as_str);
            repository::carry_out(&state, &text(&message, 2)?, wish, names).await?;
            said(&Message::default())
        }
        Method::Check => {
            let service = text(&message, 1)?;
            let status = status_of(&state, &service).ok_or(ApiError::UnknownModel(service))?;
            said(&Message::default().number(1, status))
        }
        Method::Watch => watch(state, text(&message, 1)?),
    })
}

/// Reads the one message of a call.
async fn read(request: Request) -> Result<Bytes, ApiError> {
    let most = usize::try_from(MOST.get()).unwrap_or(usize::MAX);
    let body = to_bytes(request.into_body(), most).await;
    let body = body.map_err(|_| ApiError::BodyTooLarge(MOST))?;
    match body.split_at_checked(5) {
        Some(([0, length @ ..], message)) if length == length_of(message) => Ok(body.slice(5..)),
        Some(([1, ..], _)) => Err(ApiError::BadRequest(
            "the message is compressed, which is not read here".into(),
        )),
        _ => Err(ApiError::BadRequest("the call has not one message".into())),
    }
}

fn length_of(message: &[u8]) -> [u8; 4] {
    u32::try_from(message.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
}

/// Gives the fields of a message.
fn fields(mut message: &[u8]) -> Result<Vec<(u64, Value<'_>)>, ApiError> {
    let mut all = Vec::new();
    while !message.is_empty() {
        match first_field(message) {
            Ok(Some((number, value, used))) => {
                all.push((number, value));
                message = &message[used..];
            }
            Ok(None) | Err(grpc::Malformed) => {
                return Err(ApiError::BadRequest(grpc::Malformed.to_string()));
            }
        }
    }
    Ok(all)
}

/// Reads a text, empty when it is missing. Of a doubled field the last counts,
/// as everywhere in protobuf.
fn text(message: &[u8], field: u64) -> Result<String, ApiError> {
    let last = fields(message)?
        .into_iter()
        .rev()
        .find_map(|read| match read {
            (number, Value::Bytes(text)) if number == field => Some(text),
            _ => None,
        });
    let text = std::str::from_utf8(last.unwrap_or_default());
    let text = text.map_err(|_| ApiError::BadRequest("a name is not text".into()))?;
    Ok(text.to_owned())
}

fn number(message: &[u8], field: u64) -> Result<u64, ApiError> {
    let last = fields(message)?
        .into_iter()
        .rev()
        .find_map(|read| match read {
            (number, Value::Number(value)) if number == field => Some(value),
            _ => None,
        });
    Ok(last.unwrap_or_default())
}

/// Reads the names of the parameters of a wish, field 3, a map.
fn parameters(message: &[u8]) -> Result<Vec<String>, ApiError> {
    let entries = fields(message)?;
    let entries = entries.into_iter().filter_map(|read| match read {
        (3, Value::Bytes(entry)) => Some(text(entry, 1)),
        _ => None,
    });
    entries.collect()
}

fn flag(is: bool) -> Message {
    Message::default().number(1, u64::from(is))
}

fn index(entries: Vec<repository::IndexEntry>) -> Message {
    entries
        .into_iter()
        .fold(Message::default(), |index, entry| {
            let model = Message::default()
                .text(1, &entry.name)
                .text(3, entry.state)
                .text(4, &entry.reason);
            index.message(1, &model)
        })
}

/// Says how a service is: the server's own, or a model by its name, which
/// serves while a worker of it is ready.
fn status_of(state: &ApiState, service: &str) -> Option<u64> {
    let serves = match service {
        "" | "inference.GRPCInferenceService" | "grpc.health.v1.Health" => probes::is_ready(state),
        model => repository::is_ready(state, model).ok()?,
    };
    Some(if serves { SERVING } else { NOT_SERVING })
}

/// Says how a service is, and again whenever that changes, until residentd
/// ends.
fn watch(state: ApiState, service: String) -> Response {
    let views = state.controller.watch();
    let beginning = Some((state, service, views, None));
    let frames = unfold(beginning, |going| async move {
        let (state, service, mut views, before) = going?;
        loop {
            let draining = views.borrow_and_update().draining;
            let status = status_of(&state, &service).unwrap_or(SERVICE_UNKNOWN);
            if before != Some(status) {
                let said = Frame::data(Message::default().number(1, status).frame());
                return Some((Ok(said), Some((state, service, views, Some(status)))));
            }
            if draining || views.changed().await.is_err() {
                let ended = grpc::status(Code::Unavailable, "residentd is ending");
                return Some((Ok(Frame::trailers(ended)), None));
            }
        }
    });
    streamed(frames)
}

/// Answers with one message.
fn said(message: &Message) -> Response {
    let frames = [
        Ok(Frame::data(message.frame())),
        Ok(Frame::trailers(grpc::status(Code::Ok, ""))),
    ];
    streamed(stream::iter(frames))
}

fn streamed(
    frames: impl futures_util::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static,
) -> Response {
    let mut response = Response::new(Body::new(StreamBody::new(frames)));
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
