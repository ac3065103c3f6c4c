//! What every listener answers with when something is wrong: the one table
//! from refusal and fault to status, code and body.
//!
//! Bodies are as OpenAI clients expect them:
//! `{"error": {"message", "type", "code", "model"?, "detail"?}}`; other
//! protocols have their own shape ([`Speech`]).

mod speech;

use std::time::Duration;

use hyper::header::{HeaderValue, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

pub use self::speech::{Speech, code_of, open_inference, refusal};
use crate::control::Refusal;
use crate::model::{Bytes, ModelName};

/// When to come back after a refusal that passes by itself.
const SOON: Duration = Duration::from_secs(1);
/// When to come back after there was no room.
const LATER: Duration = Duration::from_secs(5);

/// How a token is to be sent, where one is needed.
pub const BEARER: HeaderValue = HeaderValue::from_static("Bearer");

/// Returns the status of a refusal.
#[must_use]
pub const fn status_of(refusal: &Refusal) -> StatusCode {
    match refusal {
        Refusal::UnknownModel(_) | Refusal::UnknownDomain(_) => StatusCode::NOT_FOUND,
        Refusal::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
        Refusal::WorkerFailed { .. } => StatusCode::BAD_GATEWAY,
        Refusal::StartTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        Refusal::TooLarge { .. }
        | Refusal::NoDevice { .. }
        | Refusal::NoRoom { .. }
        | Refusal::BackingOff { .. }
        | Refusal::QueueTimeout { .. }
        | Refusal::Unloaded(_)
        | Refusal::Overloaded
        | Refusal::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Returns when to try again, where that helps.
#[must_use]
pub fn retry_after(refusal: &Refusal) -> Option<Duration> {
    match refusal {
        Refusal::QueueFull { .. }
        | Refusal::Unloaded(_)
        | Refusal::Overloaded
        | Refusal::WorkerFailed { .. } => Some(SOON),
        Refusal::NoRoom { .. } | Refusal::QueueTimeout { .. } | Refusal::ShuttingDown => {
            Some(LATER)
        }
        Refusal::BackingOff { retry_in, .. } => Some((*retry_in).max(SOON)),
        Refusal::UnknownModel(_)
        | Refusal::UnknownDomain(_)
        | Refusal::TooLarge { .. }
        | Refusal::NoDevice { .. }
        | Refusal::StartTimeout { .. } => None,
    }
}

/// What is wrong with a request, apart from the controller's refusals.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The request cannot be understood.
    #[error("{0}")]
    BadRequest(String),
    /// A token is asked for, and none that came is right.
    #[error("a token is needed: send it as `Authorization: Bearer …` or as `x-api-key`")]
    Unauthorized,
    /// No model is named and there are several.
    #[error("no model is named: put `model` into the body, the header x-model or ?model=")]
    NoModel,
    /// The model is not configured.
    #[error("model {name:?} is not configured{}", listed(.known))]
    ModelNotFound {
        /// What was asked for.
        name: String,
        /// The models there are, when they are few.
        known: Vec<ModelName>,
    },
    /// The body is over `max_body`.
    #[error("the body is larger than {0}")]
    BodyTooLarge(Bytes),
    /// The model was not found in the part of the body that may be read.
    #[error(
        "no `model` in the first {0} of the body: put it first, or name it in the header x-model"
    )]
    PrefixTooLong(Bytes),
    /// The body is too large to be changed as its model is configured.
    #[error(
        "the body is larger than {most}, the most that can be changed for {model}: send less, raise server.model_prefix, or configure the model without use_model_name, set_params and strip_params"
    )]
    FilterTooLong {
        /// Whose body it would change.
        model: ModelName,
        /// How much may be read for that.
        most: Bytes,
    },
    /// The answer was not there in the time that its model is given.
    #[error("the worker of {model} did not answer within request_timeout ({} s)", .limit.as_secs_f64())]
    RequestTimeout {
        /// Whose worker.
        model: ModelName,
        /// How long it had.
        limit: Duration,
    },
    /// The path parks or unparks the worker, which is not for clients to do.
    #[error("{path} parks or unparks the worker of {model}: only residentd calls it")]
    ParkPath {
        /// Whose worker.
        model: ModelName,
        /// What was asked for.
        path: String,
    },
    /// The worker could not be reached or broke before it answered.
    #[error("the worker of {model} broke before it answered: {cause}")]
    WorkerBroke {
        /// Whose worker.
        model: ModelName,
        /// How.
        cause: String,
    },
    /// The controller said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

fn listed(names: &[ModelName]) -> String {
    if names.is_empty() {
        return String::new();
    }
    let names: Vec<&str> = names.iter().map(ModelName::as_str).collect();
    format!("; there are {}", names.join(", "))
}

impl Fault {
    /// Returns the status it is answered with.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) | Self::NoModel => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::ModelNotFound { .. } => StatusCode::NOT_FOUND,
            Self::ParkPath { .. } => StatusCode::FORBIDDEN,
            Self::BodyTooLarge(_) | Self::PrefixTooLong(_) | Self::FilterTooLong { .. } => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            Self::RequestTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::WorkerBroke { .. } => StatusCode::BAD_GATEWAY,
            Self::Refused(refusal) => status_of(refusal),
        }
    }

    /// Returns the stable code.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) | Self::NoModel => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::ModelNotFound { .. } => "model_not_found",
            Self::ParkPath { .. } => "forbidden",
            Self::BodyTooLarge(_) | Self::PrefixTooLong(_) | Self::FilterTooLong { .. } => {
                "body_too_large"
            }
            Self::RequestTimeout { .. } => "request_timeout",
            Self::WorkerBroke { .. } => "worker_failed",
            Self::Refused(refusal) => refusal.code(),
        }
    }

    /// Returns the JSON body.
    #[must_use]
    pub fn body(&self) -> Value {
        let kind = if self.status().is_client_error() {
            "invalid_request_error"
        } else {
            "server_error"
        };
        let mut error = json!({"message": self.to_string(), "type": kind, "code": self.code()});
        if let Some(model) = self.model() {
            error["model"] = json!(model.as_str());
        }
        if let Some(lines) = self.last_lines().filter(|lines| !lines.is_empty()) {
            error["detail"] = json!({"last_lines": lines});
        }
        json!({ "error": error })
    }

    fn model(&self) -> Option<&ModelName> {
        match self {
            Self::WorkerBroke { model, .. }
            | Self::ParkPath { model, .. }
            | Self::FilterTooLong { model, .. }
            | Self::RequestTimeout { model, .. } => Some(model),
            Self::Refused(refusal) => match refusal {
                Refusal::UnknownModel(model)
                | Refusal::Unloaded(model)
                | Refusal::QueueFull { model, .. }
                | Refusal::TooLarge { model, .. }
                | Refusal::NoDevice { model, .. }
                | Refusal::NoRoom { model, .. }
                | Refusal::BackingOff { model, .. }
                | Refusal::WorkerFailed { model, .. }
                | Refusal::StartTimeout { model, .. }
                | Refusal::QueueTimeout { model, .. } => Some(model),
                Refusal::UnknownDomain(_) | Refusal::Overloaded | Refusal::ShuttingDown => None,
            },
            Self::BadRequest(_)
            | Self::Unauthorized
            | Self::NoModel
            | Self::ModelNotFound { .. }
            | Self::BodyTooLarge(_)
            | Self::PrefixTooLong(_) => None,
        }
    }

    fn last_lines(&self) -> Option<&[String]> {
        match self {
            Self::Refused(
                Refusal::WorkerFailed { last_lines, .. } | Refusal::StartTimeout { last_lines, .. },
            ) => Some(last_lines),
            _ => None,
        }
    }

    /// Builds the answer around a body made of its JSON text.
    pub fn response<B>(&self, body: impl FnOnce(String) -> B) -> Response<B> {
        let mut response = Response::new(body(self.body().to_string()));
        *response.status_mut() = self.status();
        speech::set_json(&mut response);
        speech::set_retry(&mut response, self.retry_after());
        if matches!(self, Self::Unauthorized) {
            response.headers_mut().insert(WWW_AUTHENTICATE, BEARER);
        }
        response
    }

    /// Returns when to try again, where that helps.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) => retry_after(refusal),
            Self::WorkerBroke { .. } => Some(SOON),
            _ => None,
        }
    }
}
