//! Errors in the words of the protocol that was spoken.

use std::time::Duration;

use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Request, Response, StatusCode};
use serde_json::json;

use super::Fault;
use crate::grpc::{self, Code};

/// A must in Anthropic's API, whatever the path before it.
const ANTHROPIC: HeaderName = HeaderName::from_static("anthropic-version");

/// Which protocol a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speech {
    /// That of the path: OpenAI's, or our own API's.
    Native,
    /// Anthropic's: `{"type": "error", "error": {"type", "message"}}`, with
    /// `code`, `model` and `detail` as in OpenAI's.
    Anthropic,
    /// The Open Inference Protocol over REST: `{"error": "text"}`.
    OpenInference,
    /// gRPC: a status in place of an answer.
    Grpc,
}

impl Speech {
    /// Returns the protocol of a request.
    #[must_use]
    pub fn of<B>(request: &Request<B>) -> Self {
        let rest = request.uri().path().strip_prefix("/v2");
        if grpc::is_call(request) {
            Self::Grpc
        } else if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
            Self::OpenInference
        } else if request.headers().contains_key(ANTHROPIC) {
            Self::Anthropic
        } else {
            Self::Native
        }
    }

    /// Builds the answer to a fault around a body made of its text; a body
    /// without content is made of an empty one.
    pub fn answer<B>(self, fault: &Fault, body: impl FnOnce(String) -> B) -> Response<B> {
        let (status, message) = (fault.status(), fault.to_string());
        match self {
            Self::Native => fault.response(body),
            Self::Anthropic => {
                let text = anthropic(fault);
                fault.response(|_| body(text))
            }
            Self::OpenInference => {
                let text = open_inference(&message);
                fault.response(|_| body(text))
            }
            Self::Grpc => refusal(code_of(status), &message, fault.retry_after(), body),
        }
    }
}

/// Returns the body of a fault in Anthropic's API; its clients read the code
/// from the details.
fn anthropic(fault: &Fault) -> String {
    let mut said = fault.body();
    said["type"] = json!("error");
    said["error"]["type"] = json!(match fault.status().as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        _ => "api_error",
    });
    said["error"]["details"] = json!({"error_code": fault.code()});
    said.to_string()
}

/// Returns the body of an error of the Open Inference Protocol.
#[must_use]
pub fn open_inference(message: &str) -> String {
    json!({ "error": message }).to_string()
}

/// Builds the answer to a call that failed, with the time to wait before
/// another try where that helps.
pub fn refusal<B>(
    code: Code,
    message: &str,
    retry: Option<Duration>,
    body: impl FnOnce(String) -> B,
) -> Response<B> {
    let mut response = grpc::refusal(code, message, body(String::new()));
    set_retry(&mut response, retry);
    response
}

/// Returns the status of a call for that of HTTP.
#[must_use]
pub const fn code_of(status: StatusCode) -> Code {
    match status.as_u16() {
        200 => Code::Ok,
        400 | 422 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::NotFound,
        405 | 501 => Code::Unimplemented,
        408 | 504 => Code::DeadlineExceeded,
        409 => Code::FailedPrecondition,
        413 | 429 => Code::ResourceExhausted,
        502 | 503 => Code::Unavailable,
        _ => Code::Internal,
    }
}

/// Tells in whole seconds when to come back, never too early.
pub(super) fn set_retry<B>(response: &mut Response<B>, retry: Option<Duration>) {
    let Some(retry) = retry else { return };
    let seconds = retry.as_secs() + u64::from(retry.subsec_nanos() > 0);
    response
        .headers_mut()
        .insert(RETRY_AFTER, HeaderValue::from(seconds));
}

/// Marks a body as JSON.
pub(super) fn set_json<B>(response: &mut Response<B>) {
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
}

#[cfg(test)]
mod tests {
    use hyper::Version;
    use serde_json::Value;

    use super::*;
    use crate::control::Refusal;
    use crate::model::ModelName;

    #[test]
    fn a_fault_is_told_in_the_words_of_whoever_asked() {
        let mut request = Request::new(());
        *request.uri_mut() = "/v2/models/a/infer".parse().expect("a path");
        assert_eq!(Speech::of(&request), Speech::OpenInference);
        let model = ModelName::new("a").expect("a name");
        let fault = Fault::Refused(Refusal::QueueFull { model, queued: 3 });
        let answer = Speech::of(&request).answer(&fault, |text| text);
        assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(
            *answer.body(),
            json!({"error": fault.to_string()}).to_string()
        );
        assert_eq!(answer.headers()[RETRY_AFTER], "1");

        *request.version_mut() = Version::HTTP_2;
        let kind = HeaderValue::from_static("application/grpc");
        request.headers_mut().insert(CONTENT_TYPE, kind);
        let answer = Speech::of(&request).answer(&fault, |text| text);
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()[grpc::STATUS], "8");
        assert!(answer.headers().contains_key(grpc::MESSAGE));
        assert!(answer.body().is_empty());

        request.headers_mut().clear();
        *request.uri_mut() = "/upstream/a/v1/messages".parse().expect("a path");
        let version = HeaderValue::from_static("2023-06-01");
        request.headers_mut().insert("anthropic-version", version);
        let answer = Speech::of(&request).answer(&fault, |text| text);
        assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(answer.headers()[RETRY_AFTER], "1");
        let said: Value = serde_json::from_str(answer.body()).expect("JSON");
        let error = json!({"type": "rate_limit_error", "message": fault.to_string(),
            "code": "queue_full", "model": "a", "details": {"error_code": "queue_full"}});
        assert_eq!(said, json!({"type": "error", "error": error}));

        *request.uri_mut() = "/v2x".parse().expect("a path");
        request.headers_mut().clear();
        assert_eq!(Speech::of(&request), Speech::Native);
    }
}
