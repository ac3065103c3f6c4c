//! The REST API for operators: memory, models, events, health and metrics.
//!
//! Every answer is made from the published snapshot or is the controller's own
//! reply; nothing here decides. Inference belongs to the proxy. State changes
//! by `POST` only, and only for callers the guard lets through.

mod cleanup;
mod decision;
mod entry;
mod envelope;
mod events;
mod guard;
mod limit;
mod logs;
mod memory;
mod metrics;
mod models;
mod oip;
mod past;
mod probes;
mod query;
mod reload;
mod repository;
mod rpc;
mod shape;
mod system;
mod upgrade;

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::from_fn;
use axum::routing::{any, get, post};

use self::envelope::ApiError;
pub use self::guard::{KnownPage, PeerAddr, Standing};
use self::metrics::Page;
pub use self::past::{Past, written};
pub use self::rpc::answers;
use crate::control::{Controller, Reloader, Upgrader};

/// What every route needs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ApiState {
    controller: Controller,
    reloader: Option<Reloader>,
    upgrader: Option<Upgrader>,
    metrics: Arc<Page>,
    past: Arc<Past>,
}

impl ApiState {
    /// Builds the state around the controller's handle, and the way to a reload
    /// where there is one.
    #[must_use]
    pub fn new(controller: Controller, reloader: Option<Reloader>) -> Self {
        Self {
            metrics: Arc::new(Page::new(controller.clone())),
            controller,
            reloader,
            upgrader: None,
            past: Arc::default(),
        }
    }

    /// Has upgrades made where they can be.
    #[must_use]
    pub fn with_upgrader(self, upgrader: Option<Upgrader>) -> Self {
        Self { upgrader, ..self }
    }

    /// Has events of earlier runs told too.
    #[must_use]
    pub fn with_past(self, past: Past) -> Self {
        Self {
            past: Arc::new(past),
            ..self
        }
    }
}

/// Builds what is answered where operators have a listener of their own and this
/// is not it: probes.
pub fn probes(state: ApiState) -> Router {
    finish(probe_routes(), state)
}

fn probe_routes() -> Router<ApiState> {
    Router::new()
        .route("/health", get(probes::health))
        .route("/startupz", get(probes::startupz))
        .route("/livez", get(probes::livez))
        .route("/readyz", get(probes::readyz))
}

/// Returns whether a path is asked by whoever only uses models: a probe, or what of
/// the Open Inference Protocol changes nothing.
#[must_use]
pub fn is_probe(path: &str) -> bool {
    let of_http = [
        "/health",
        "/startupz",
        "/livez",
        "/readyz",
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
    ];
    of_http.contains(&path) || only_reads(path)
}

/// Returns whether this path changes nothing, though it is for `POST`.
fn only_reads(path: &str) -> bool {
    path == "/v2/repository/index" || rpc::only_reads(path)
}

/// Builds the API. Whoever accepts the connection puts a [`PeerAddr`] into
/// each request's extensions, without which nothing can be changed, and a
/// [`Standing`] where tokens are configured.
pub fn router(state: ApiState) -> Router {
    let memory = Router::new()
        .route("/stats", get(memory::stats))
        .route("/pressure", get(memory::pressure))
        .route("/models", get(memory::models))
        .route("/system", get(system::system))
        .route("/cleanup", post(cleanup::cleanup))
        .route("/limit", post(limit::limit));
    let routes = probe_routes()
        .nest("/api/v1/memory", memory)
        .route("/api/v1/models", get(memory::models))
        .route(
            "/api/v1/models/{*rest}",
            get(models::read).post(models::act),
        )
        .route("/api/v1/events", get(events::events))
        .route("/api/v1/reload", post(reload::reload))
        .route("/api/v1/upgrade", post(upgrade::upgrade))
        .route("/", get(probes::index))
        .route("/metrics", get(metrics::metrics))
        .merge(open_inference());
    finish(routes, state)
}

fn finish(routes: Router<ApiState>, state: ApiState) -> Router {
    routes
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(guard::guard))
        .layer(from_fn(shape::shape))
        .with_state(state)
}

/// What is answered of the Open Inference Protocol and by gRPC.
fn open_inference() -> Router<ApiState> {
    Router::new()
        .route("/v2", get(oip::metadata))
        .route("/v2/", get(oip::metadata))
        .route("/v2/health/live", get(oip::live))
        .route("/v2/health/ready", get(oip::ready))
        .route("/v2/repository/index", post(oip::index))
        .route("/v2/repository/models/{*rest}", post(oip::wish))
        .route(rpc::INFERENCE, any(rpc::call))
        .route(rpc::HEALTH, any(rpc::call))
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::NotFound(uri.path().to_owned())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed {
        method: method.to_string(),
        path: uri.path().to_owned(),
        allow: None,
    }
}
