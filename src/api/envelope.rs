//! The one shape of every answer under `/api`: `{"status": "success", "data"}`
//! or `{"status": "error", "error": {"code", "message"}, "detail"}`.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::reload::ProblemEntry;
use super::shape::Said;
use crate::control::{Refusal, ReloadError, UpgradeError};
use crate::model::Bytes;
use crate::reply;

/// Why a call is turned away.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// A parameter or the body makes no sense; the text names the field.
    #[error("{0}")]
    BadRequest(String),
    /// The body is larger than any call needs.
    #[error("the body is larger than {0}")]
    BodyTooLarge(Bytes),
    /// An operator's token is asked for, and none that came is right.
    #[error("a token is needed: send it as `Authorization: Bearer …`; see [auth] admin_tokens")]
    Unauthorized,
    /// Whoever asks may not do that.
    #[error("{0}")]
    Forbidden(&'static str),
    /// No such path.
    #[error("there is nothing at {0}")]
    NotFound(String),
    /// The path exists, the method is another.
    #[error("{method} is not allowed on {path}")]
    MethodNotAllowed {
        /// The method used.
        method: String,
        /// The path called.
        path: String,
        /// Those that are allowed, when the router does not say so itself.
        allow: Option<&'static str>,
    },
    /// A name that no model has.
    #[error("model {0} is not configured")]
    UnknownModel(String),
    /// A text that names no GPU.
    #[error("there is no device {0}")]
    UnknownDevice(String),
    /// The controller's answer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A configuration that was read anew is not valid.
    #[error(transparent)]
    Reload(ReloadError),
    /// No other residentd has taken over.
    #[error(transparent)]
    Upgrade(UpgradeError),
    /// The task that did the work panicked.
    #[error("the work was cut off by a fault of residentd itself")]
    Broken,
}

impl ApiError {
    fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::BodyTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound(_) | Self::UnknownModel(_) | Self::UnknownDevice(_) => {
                StatusCode::NOT_FOUND
            }
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Refused(refusal) | Self::Reload(ReloadError::Refused(refusal)) => {
                reply::status_of(refusal)
            }
            Self::Reload(ReloadError::Invalid(_)) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Reload(ReloadError::Impossible) | Self::Upgrade(UpgradeError::Impossible) => {
                StatusCode::NOT_IMPLEMENTED
            }
            Self::Upgrade(_) => StatusCode::CONFLICT,
            Self::Broken => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    const fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad_request",
            Self::BodyTooLarge(_) => "body_too_large",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden(_) => "forbidden",
            Self::NotFound(_) => "not_found",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::UnknownModel(_) => "model_not_found",
            Self::UnknownDevice(_) => "device_not_found",
            Self::Refused(refusal) | Self::Reload(ReloadError::Refused(refusal)) => refusal.code(),
            Self::Reload(ReloadError::Invalid(_)) => "invalid_config",
            Self::Reload(ReloadError::Impossible) | Self::Upgrade(UpgradeError::Impossible) => {
                "not_implemented"
            }
            Self::Upgrade(_) => "upgrade_failed",
            Self::Broken => "internal",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) | Self::Reload(ReloadError::Refused(refusal)) => {
                reply::retry_after(refusal)
            }
            _ => None,
        }
    }

    /// Returns everything that is wrong with a configuration.
    fn problems(&self) -> Vec<ProblemEntry<'_>> {
        match self {
            Self::Reload(ReloadError::Invalid(problems)) => ProblemEntry::list(problems),
            _ => Vec::new(),
        }
    }

    /// Returns what the worker printed last, where that is the explanation.
    fn last_lines(&self) -> &[String] {
        match self {
            Self::Refused(
                Refusal::WorkerFailed { last_lines, .. } | Refusal::StartTimeout { last_lines, .. },
            ) => last_lines,
            _ => &[],
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let message = self.to_string();
        let body = Failure {
            status: "error",
            error: FailureParts {
                code: self.code(),
                message: &message,
                last_lines: self.last_lines(),
                problems: self.problems(),
            },
            detail: &message,
        };
        let mut response = json(self.status(), &body);
        response.extensions_mut().insert(Said(message.clone()));
        if let Some(wait) = self.retry_after() {
            // A client that counts in whole seconds must not come too early.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, Self::Unauthorized) {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, reply::BEARER);
        }
        if let Self::MethodNotAllowed {
            allow: Some(allow), ..
        } = self
        {
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

/// Answers `200` with `data` in the envelope.
pub(crate) fn success(data: &impl Serialize) -> Response {
    success_with(StatusCode::OK, data)
}

/// Answers `status` with `data` in the envelope.
pub(crate) fn success_with(status: StatusCode, data: &impl Serialize) -> Response {
    json(
        status,
        &Success {
            status: "success",
            data,
        },
    )
}

#[derive(Serialize)]
struct Success<'a, T> {
    status: &'static str,
    data: &'a T,
}

#[derive(Serialize)]
struct Failure<'a> {
    status: &'static str,
    error: FailureParts<'a>,
    detail: &'a str,
}

#[derive(Serialize)]
struct FailureParts<'a> {
    code: &'static str,
    message: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    last_lines: &'a [String],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    problems: Vec<ProblemEntry<'a>>,
}

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let bytes = serde_json::to_vec(body).expect("plain structs with text keys always serialize");
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
