//! Health for load balancers and Kubernetes, and the page that says what else
//! there is.
//!
//! None of these depends on a worker: one bad model must not restart all.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::ApiState;

const INDEX: &str = concat!(
    "residentd ",
    env!("CARGO_PKG_VERSION"),
    "\n
inference
  POST /v1/...                               the model is named in the body, by x-model or ?model=
  ANY  /upstream/{model}/...                 the rest goes to the model's worker as it is
  GET  /v1/models
  GET  /v2  /v2/health/{live,ready}  /v2/models/{model}/ready
  ANY  /v2/models/{model}/...                Open Inference Protocol; by gRPC too, on this port
  POST /v2/repository/index
  POST /v2/repository/models/{model}/{load,unload}

memory
  GET  /api/v1/memory/stats
  GET  /api/v1/memory/pressure
  GET  /api/v1/memory/models
  GET  /api/v1/memory/system
  POST /api/v1/memory/cleanup
  POST /api/v1/memory/limit?limit_gb=4.0

models
  GET  /api/v1/models
  GET  /api/v1/models/{model}
  GET  /api/v1/models/{model}/logs?lines=100&follow=true
  POST /api/v1/models/{model}/{load,unload,pin,unpin,restart}

events
  GET  /api/v1/events?model=NAME&kind=evict&since=ID&limit=100&follow=true

configuration
  POST /api/v1/reload?dry_run=true

health and metrics
  GET  /health /startupz /livez /readyz
  GET  /metrics
"
);

/// Answers `GET /`.
pub(crate) async fn index() -> Response {
    plain(StatusCode::OK, INDEX)
}

/// Answers `GET /livez`: this answer is the proof.
pub(crate) async fn livez() -> Response {
    plain(StatusCode::OK, "ok\n")
}

/// Answers `GET /startupz`: memory has been measured once.
pub(crate) async fn startupz(State(state): State<ApiState>) -> Response {
    if has_measured(&state) {
        plain(StatusCode::OK, "ok\n")
    } else {
        plain(StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    }
}

/// Answers `GET /readyz`: requests are welcome.
pub(crate) async fn readyz(State(state): State<ApiState>) -> Response {
    if state.controller.snapshot().draining {
        plain(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else {
        startupz(State(state)).await
    }
}

/// Answers `GET /health`, the name that engines' own clients ask for.
pub(crate) async fn health(State(state): State<ApiState>) -> Response {
    let (status, body) = if state.controller.snapshot().draining {
        (StatusCode::SERVICE_UNAVAILABLE, r#"{"status":"draining"}"#)
    } else {
        (StatusCode::OK, r#"{"status":"ok"}"#)
    };
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// Returns whether requests are welcome.
pub(super) fn is_ready(state: &ApiState) -> bool {
    !state.controller.snapshot().draining && has_measured(state)
}

fn has_measured(state: &ApiState) -> bool {
    state.controller.snapshot().memory.reading.seq > 0
}

fn plain(status: StatusCode, text: &'static str) -> Response {
    (status, [(CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
}
