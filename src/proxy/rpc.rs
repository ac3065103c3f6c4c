//! gRPC calls: which model they are for, how long their client waits, and what
//! they are told when something is wrong.
//!
//! A call is passed to its worker over HTTP/2, message by message, unread but
//! for the model's name: the metadata `x-model`, else, in the Open Inference
//! Protocol, a field of the first message.

use std::time::Duration;

use hyper::header::{CONTENT_LENGTH, HOST, HeaderMap};
use hyper::http::request;
use hyper::http::uri::{self, Authority, Scheme};
use hyper::{Request, Response, StatusCode, Uri, Version};

use super::body::ProxyBody;
use super::filter::Change;
use super::held::Held;
use crate::clock::Timestamp;
use crate::gate::Visit;
use crate::grpc::{self, Code, Finder, Found};
use crate::model::{Bytes, ModelSpec};
use crate::reply::{self, Fault};

/// How long a message is waited for that comes at once. A stream begins so much
/// later.
const AT_ONCE: Duration = Duration::from_millis(2);
/// Where the methods of the Open Inference Protocol are.
const INFERENCE: &str = "/inference.GRPCInferenceService/";

/// One call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    deadline: Option<Timestamp>,
}

impl Call {
    /// Reads the headers of a call that came at `began`.
    pub(super) fn of(began: Timestamp, headers: &HeaderMap) -> Self {
        Self {
            deadline: grpc::timeout(headers).map(|timeout| began + timeout),
        }
    }

    /// Returns whether the client waits no longer.
    pub(super) fn is_late(&self, now: Timestamp) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }

    /// Returns the status that the call is refused with.
    pub(super) fn refused_by(&self, fault: &Fault, now: Timestamp) -> Code {
        match self.is_late(now) {
            true => Code::DeadlineExceeded,
            false => reply::code_of(fault.status()),
        }
    }

    /// Returns the deadline, or this one if it comes earlier.
    pub(super) fn or_earlier(&self, other: Timestamp) -> Timestamp {
        self.deadline.map_or(other, |deadline| deadline.min(other))
    }

    /// Makes a request one of HTTP/2 for the worker at this address, which is told how
    /// much time is left.
    pub(super) fn address<B>(
        &self,
        request: &mut Request<B>,
        address: &Authority,
        now: Timestamp,
    ) -> Result<(), hyper::http::Error> {
        let mut parts = uri::Parts::default();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(address.clone());
        parts.path_and_query = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from_parts(parts)?;
        *request.version_mut() = Version::HTTP_2;
        let headers = request.headers_mut();
        headers.remove(HOST);
        // The frames say how long a message is, and a name may have become longer.
        headers.remove(CONTENT_LENGTH);
        if let Some(deadline) = self.deadline {
            headers.insert(grpc::TIMEOUT, grpc::timeout_text(deadline.since(now)));
        }
        Ok(())
    }
}

/// Returns the number of the field that names the model, for the methods that
/// have one.
fn field_of(path: &str) -> Option<u32> {
    match path.strip_prefix(INFERENCE)? {
        "ModelInfer" | "ModelStreamInfer" | "ModelMetadata" | "ModelConfig" | "ModelStatistics"
        | "ModelReady" => Some(1),
        "TraceSetting" => Some(2),
        _ => None,
    }
}

/// Decides what is changed of a call's messages: the model's name, where it has
/// another one for its worker.
pub(super) fn change(spec: &ModelSpec, head: &request::Parts) -> Change {
    let field = field_of(head.uri.path());
    match (field, &spec.requests.filter.model) {
        (Some(field), Some(name)) => Change::Messages(field, name.clone()),
        (None, _) | (_, None) => Change::None,
    }
}

/// Looks for the model in the first message, reading no more of the
/// body than needed.
pub(super) async fn by_content(
    head: &request::Parts,
    held: &mut Held,
    prefix: Bytes,
) -> Result<Option<String>, Fault> {
    let Some(field) = field_of(head.uri.path()) else {
        return Ok(None);
    };
    let bad = |why: &str| Err(Fault::BadRequest(why.to_owned()));
    let mut finder = Finder::new(field.into());
    loop {
        let left = prefix.get().saturating_sub(held.size());
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        if left == 0 {
            return Err(Fault::PrefixTooLong(prefix));
        }
        let Some(piece) = held.read().await? else {
            return bad("the call ended before its first message");
        };
        match finder.feed(&piece[..piece.len().min(left)]) {
            Found::More => {}
            Found::Text(name) => return Ok(Some(name)),
            Found::Absent => return Ok(None),
            Found::Compressed => {
                return bad(
                    "the message is compressed, so its model cannot be read: name it in the metadata x-model",
                );
            }
            Found::Malformed => {
                return bad(
                    "the first message cannot be read for its model: name it in the metadata x-model",
                );
            }
        }
    }
}

/// Reads a call of one message to its end if it is at most about `size`, so that
/// it can be sent again and on a connection that is there. Of other services it is
/// not known which calls are streams, whose end may be far: they are read as far as
/// they come at once, as a call of one message mostly does.
pub(super) async fn read_whole(
    head: &request::Parts,
    held: &mut Held,
    size: u64,
) -> Result<(), Fault> {
    let path = head.uri.path();
    let is_known = field_of(path).is_some();
    if is_known && path.ends_with("/ModelStreamInfer") {
        return Ok(());
    }
    let whole = held.read_up_to(size);
    match is_known {
        true => whole.await?,
        false => tokio::time::timeout(AT_ONCE, whole)
            .await
            .unwrap_or(Ok(false))?,
    };
    Ok(())
}

/// Tells a client that its time was over, and what it waited for.
pub(super) fn too_late(fault: &Fault) -> Response<ProxyBody> {
    let (code, why) = (Code::DeadlineExceeded, fault.to_string());
    reply::refusal(code, &why, None, ProxyBody::text)
}

/// Tells what the head of an answer says of its worker. That of a call says
/// nothing yet, unless its status is in it.
pub(super) fn tell<B>(visit: &Visit, is_call: bool, response: &Response<B>) {
    let status = response.status();
    if !is_call || status != StatusCode::OK {
        return visit.answered(status.as_u16());
    }
    match grpc::given(response.headers()) {
        Some(status) => visit.answered(verdict(status)),
        None => visit.begun(),
    }
}

/// Returns the status of HTTP that says the same of the worker as the end of a
/// call. That the client's own deadline was over says nothing.
pub(super) fn verdict(status: u16) -> u16 {
    match status {
        status if status == Code::DeadlineExceeded as u16 => 503,
        status => grpc::http_of(status),
    }
}

/// Returns the end of a call that took longer than it may.
pub(super) fn over() -> HeaderMap {
    let why = "the answer took longer than request_timeout";
    grpc::status(Code::DeadlineExceeded, why)
}

/// Returns the end of a call whose worker broke off in the midst of it.
pub(super) fn broken_off() -> HeaderMap {
    grpc::status(Code::Unavailable, "the worker broke off")
}
