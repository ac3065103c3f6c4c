//! `POST /api/v1/upgrade`: has the program that lies where this residentd was
//! started from take over, and says how that went.

use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use serde::Serialize;

use super::ApiState;
use super::envelope::{ApiError, success};
use super::query::Params;
use crate::control::UpgradeError;

/// Answers `POST /api/v1/upgrade`.
pub(crate) async fn upgrade(State(state): State<ApiState>, uri: Uri) -> Result<Response, ApiError> {
    Params::of(&uri)?.finish()?;
    let upgrader = state.upgrader.as_ref();
    let upgrader = upgrader.ok_or(ApiError::Upgrade(UpgradeError::Impossible))?;
    let upgraded = upgrader.upgrade().await.map_err(ApiError::Upgrade)?;
    Ok(success(&Taken {
        message: "another residentd has taken over",
        pid: upgraded.pid,
        workers: upgraded.workers,
    }))
}

#[derive(Debug, Serialize)]
struct Taken {
    message: &'static str,
    pid: i32,
    workers: usize,
}
