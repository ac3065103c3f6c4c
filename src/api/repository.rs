//! The model repository of the Open Inference Protocol: which models there
//! are, and an operator's wishes of them. REST and gRPC share it.

use serde::Serialize;

use super::ApiState;
use super::envelope::ApiError;
use super::models::{Action, see_through, unknown};
use crate::control::Phase;

/// One model, as the index tells it. Versions are the worker's own matter.
#[derive(Debug, Serialize)]
pub(super) struct IndexEntry {
    pub(super) name: String,
    pub(super) state: &'static str,
    pub(super) reason: String,
}

/// Returns all models, or those whose worker is ready.
pub(super) fn index(state: &ApiState, only_ready: bool) -> Vec<IndexEntry> {
    let snapshot = state.controller.snapshot();
    let views = snapshot.models.iter();
    let shown = views.filter(|(_, view)| !only_ready || view.phase == Phase::Ready);
    shown
        .map(|(name, view)| IndexEntry {
            name: name.to_string(),
            state: state_of(view.phase),
            reason: match (view.phase, &view.last_error) {
                (Phase::Ready, _) => String::new(),
                (Phase::Backoff | Phase::Failed, Some(error)) => error.clone(),
                (phase, _) => phase.as_str().to_owned(),
            },
        })
        .collect()
}

const fn state_of(phase: Phase) -> &'static str {
    match phase {
        Phase::Ready => "READY",
        Phase::Starting | Phase::Unparking => "LOADING",
        Phase::Parking | Phase::Draining | Phase::Stopping => "UNLOADING",
        Phase::Stopped | Phase::Parked | Phase::Backoff | Phase::Failed => "UNAVAILABLE",
    }
}

/// Returns whether a worker of this model takes requests; nothing is loaded.
///
/// # Errors
/// When there is no such model.
pub(super) fn is_ready(state: &ApiState, name: &str) -> Result<bool, ApiError> {
    let route = state.controller.routes().get(name);
    let route = route.ok_or_else(|| unknown(name))?;
    let snapshot = state.controller.snapshot();
    let view = snapshot.models.get(route.name());
    Ok(view.is_some_and(|view| view.phase == Phase::Ready))
}

/// What may be asked of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Be ready.
    Load,
    /// Be gone.
    Unload,
}

/// Loads a model and answers when it is ready, or unloads it and answers when it
/// is gone. `parameters` are the names of those that came along.
///
/// # Errors
/// When there is no such model, a parameter would change what residentd's own
/// configuration says, or the controller refuses.
pub(super) async fn carry_out<'a>(
    state: &ApiState,
    name: &str,
    wish: Wish,
    parameters: impl IntoIterator<Item = &'a str>,
) -> Result<(), ApiError> {
    for parameter in parameters {
        // Nothing here depends on another model.
        if (wish, parameter) != (Wish::Unload, "unload_dependents") {
            let shown: String = parameter.chars().take(128).collect();
            return Err(ApiError::BadRequest(format!(
                "parameter {shown} is not supported: a model is what the configuration says"
            )));
        }
    }
    let route = state.controller.routes().get(name);
    let route = route.ok_or_else(|| unknown(name))?;
    let action = match wish {
        Wish::Load => Action::Load,
        Wish::Unload => Action::Unload,
    };
    see_through(&state.controller, &route, action).await
}
