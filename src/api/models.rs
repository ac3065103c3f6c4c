//! `/api/v1/models`: each model by name, and what an operator wishes of it.
//!
//! A model's name may hold slashes, written as they are or as `%2F`, so what
//! follows `/api/v1/models/` is taken apart here and not by the router.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::Response;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tracing::warn;

use super::decision::ExplanationEntry;
use super::entry::ModelEntry;
use super::envelope::{ApiError, success, success_with};
use super::query::Params;
use super::{ApiState, logs};
use crate::control::{Controller, ModelRoute, Refusal, Routes};
use crate::model::ModelSpec;
use crate::telemetry;

/// Where the names begin.
pub(crate) const PREFIX: &str = "/api/v1/models/";

/// How long a call that does not wait listens for a refusal that comes at
/// once: an unknown or too large model is told, not promised.
const QUICK_ANSWER: Duration = Duration::from_millis(50);

/// The longest that reading a proportional share is waited for.
const LONGEST_SHARE: Duration = Duration::from_secs(10);

/// Answers `GET /api/v1/models/{model}` and `…/logs`.
pub(crate) async fn read(
    State(state): State<ApiState>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let routes = state.controller.routes();
    let (whole, split) = take_apart(uri.path());
    if let Some((head, last)) = &split
        && let Some(route) = find(routes, head)
    {
        if *last == "logs" {
            return logs::answer(&state, route.name().clone(), &uri, &headers).await;
        }
        if Action::named(last).is_some() && find(routes, &whole).is_none() {
            return Err(not_allowed("GET", uri.path(), "POST"));
        }
    }
    let route = find(routes, &whole).ok_or_else(|| unknown(&whole))?;
    let mut params = Params::of(&uri)?;
    let weigh = params.flag("pss", false)?;
    params.finish()?;
    if weigh {
        await_share(&state.controller, &route).await?;
    }
    let snapshot = state.controller.snapshot();
    let view = snapshot.models.get(route.name());
    let view = view.ok_or_else(|| unknown(&whole))?;
    let clock = state.controller.clock();
    // Without a controller there is still the last view.
    let explanation = state.controller.explain(route.name()).await.ok();
    Ok(success(&Explained {
        entry: ModelEntry::of(view, clock),
        explanation: explanation.map(|told| ExplanationEntry::of(&told, clock)),
    }))
}

/// One model, with why it is not ready.
#[derive(Debug, Serialize)]
struct Explained<'a> {
    #[serde(flatten)]
    entry: ModelEntry<'a>,
    explanation: Option<ExplanationEntry>,
}

/// Has the proportional share of the model's worker read, and waits until it
/// was, the worker is gone, or it took too long.
async fn await_share(controller: &Controller, route: &ModelRoute) -> Result<(), ApiError> {
    let asked = controller.clock().now();
    let mut views = controller.watch();
    controller.weigh(route.name()).await?;
    let has_it = views.wait_for(|snapshot| {
        let view = snapshot.models.get(route.name());
        let usage = view.and_then(|view| view.usage.as_ref());
        usage.is_none_or(|usage| usage.pss_at > Some(asked))
    });
    // Late, the answer has the last one, and `pss_at` says how old it is.
    let _ = tokio::time::timeout(LONGEST_SHARE, has_it).await;
    Ok(())
}

/// Answers `POST /api/v1/models/{model}/{action}`.
pub(crate) async fn act(State(state): State<ApiState>, uri: Uri) -> Result<Response, ApiError> {
    let mut params = Params::of(&uri)?;
    let wait = params.flag("wait", true)?;
    params.finish()?;
    let routes = state.controller.routes();
    let (whole, split) = take_apart(uri.path());
    let known = split.and_then(|(head, last)| Action::named(last).map(|action| (head, action)));
    let Some((head, action)) = known else {
        return Err(if find(routes, &whole).is_some() {
            not_allowed("POST", uri.path(), "GET,HEAD")
        } else {
            ApiError::NotFound(uri.path().to_owned())
        });
    };
    let route = find(routes, &head).ok_or_else(|| unknown(&head))?;
    carry_out(&state.controller, &route, action, wait).await
}

/// Does what an operator wishes. A task of its own does it, so that a wish
/// once heard is carried out also when the caller leaves.
async fn carry_out(
    controller: &Controller,
    route: &Arc<ModelRoute>,
    action: Action,
    wait: bool,
) -> Result<Response, ApiError> {
    let spec = Arc::clone(route.spec());
    let name = spec.name.clone();
    let work = perform(controller.clone(), spec, action);
    let mut work = telemetry::spawn("operator", work);
    let done = if wait {
        Some(work.await)
    } else {
        tokio::time::timeout(QUICK_ANSWER, &mut work).await.ok()
    };
    let answer = |message| Acted {
        name: name.as_str(),
        action: action.as_str(),
        message,
    };
    match done {
        Some(Ok(Ok(()))) => Ok(success(&answer(format!("{name} is {}", action.done())))),
        Some(Ok(Err(refusal))) => Err(refusal.into()),
        Some(Err(_)) => Err(ApiError::Broken),
        None => Ok(success_with(
            StatusCode::ACCEPTED,
            &answer(format!("{name} is about to be {}", action.done())),
        )),
    }
}

/// Does what an operator wishes and waits for it; a task of its own goes on
/// when the caller leaves.
pub(super) async fn see_through(
    controller: &Controller,
    route: &ModelRoute,
    action: Action,
) -> Result<(), ApiError> {
    let work = perform(controller.clone(), Arc::clone(route.spec()), action);
    match telemetry::spawn("operator", work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(ApiError::Broken),
    }
}

async fn perform(
    controller: Controller,
    spec: Arc<ModelSpec>,
    action: Action,
) -> Result<(), Refusal> {
    let model = &spec.name;
    let result = match action {
        Action::Load => load(&controller, &spec).await,
        Action::Unload => controller.unload(model).await,
        Action::Pin => controller.pin(model, true).await,
        Action::Unpin => controller.pin(model, false).await,
        Action::Restart => match controller.unload(model).await {
            Ok(()) => load(&controller, &spec).await,
            refused => refused,
        },
    };
    if let Err(refusal) = &result {
        warn!(%model, action = action.as_str(), reason = %refusal, "operator's wish refused");
    }
    result
}

/// Loads the model, waiting for room and for the start as long as a request
/// would, and at least until the start deadline.
async fn load(controller: &Controller, spec: &ModelSpec) -> Result<(), Refusal> {
    let patience = spec.queue_timeout.max(spec.start_timeout);
    let deadline = controller.clock().now() + patience;
    controller.load(&spec.name, deadline).await
}

/// What an operator may wish of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Load,
    Unload,
    Pin,
    Unpin,
    Restart,
}

impl Action {
    fn named(text: &str) -> Option<Self> {
        Some(match text {
            "load" => Self::Load,
            "unload" => Self::Unload,
            "pin" => Self::Pin,
            "unpin" => Self::Unpin,
            "restart" => Self::Restart,
            _ => return None,
        })
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Unload => "unload",
            Self::Pin => "pin",
            Self::Unpin => "unpin",
            Self::Restart => "restart",
        }
    }

    /// Returns what the model is afterwards.
    const fn done(self) -> &'static str {
        match self {
            Self::Load => "ready",
            Self::Unload => "unloaded",
            Self::Pin => "pinned",
            Self::Unpin => "unpinned",
            Self::Restart => "restarted",
        }
    }
}

#[derive(Debug, Serialize)]
struct Acted<'a> {
    name: &'a str,
    action: &'static str,
    message: String,
}

/// Splits what follows [`PREFIX`]: all of it as a name, and, where there is a
/// written slash, the name before the last one and the word after it.
fn take_apart(path: &str) -> (Cow<'_, str>, Option<(Cow<'_, str>, &str)>) {
    let rest = path.strip_prefix(PREFIX).unwrap_or(path);
    let split = rest.rsplit_once('/');
    (decode(rest), split.map(|(head, last)| (decode(head), last)))
}

fn decode(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

fn find(routes: &Routes, name: &str) -> Option<Arc<ModelRoute>> {
    routes.get(name)
}

pub(super) fn unknown(name: &str) -> ApiError {
    // A name is short; a caller's text of any length is not sent back.
    ApiError::UnknownModel(name.chars().take(128).collect())
}

fn not_allowed(method: &str, path: &str, allow: &'static str) -> ApiError {
    ApiError::MethodNotAllowed {
        method: method.to_owned(),
        path: path.to_owned(),
        allow: Some(allow),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_in_a_name_is_written_as_it_is_or_encoded() {
        let (whole, split) = take_apart("/api/v1/models/meta/llama%3A8b/load");
        assert_eq!(whole, "meta/llama:8b/load");
        assert_eq!(split, Some((Cow::from("meta/llama:8b"), "load")));
        let (whole, split) = take_apart("/api/v1/models/a%2Flogs");
        assert_eq!((whole, split), (Cow::from("a/logs"), None));
        let (_, split) = take_apart("/api/v1/models/a%2Fb/logs");
        assert_eq!(split, Some((Cow::from("a/b"), "logs")));
    }
}
