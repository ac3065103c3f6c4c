//! Inference traffic: finds the model, leases its worker, passes bytes.
//!
//! The walk of one request reads from top to bottom in [`Proxy::handle`]:
//! resolve, admit, forward, account. Bodies pass frame by frame; only what
//! finding the model needs is read first, with a cap.

mod account;
mod body;
mod forward;
mod models;
mod multipart;
mod pool;
mod resolve;
mod scan;
mod upload;

use std::sync::Arc;

use hyper::body::{Body, Incoming};
use hyper::{Request, Response};
use tracing::debug;

pub use self::body::{ProxyBody, Streamed};
use self::forward::Passage;
use self::pool::Pools;
use self::resolve::{ByPath, Held};
pub use self::upload::BodyError;
use crate::control::{Controller, ModelRoute};
use crate::model::Bytes;
use crate::reply::Fault;

/// Bodies up to this size are read whole before they are sent, so that they
/// can be sent again when the worker breaks.
const REPLAYED: u64 = 64 << 10;
/// Names listed in an error at most.
const MOST_LISTED: usize = 10;

/// Bounds on what a client may send.
#[derive(Clone, Copy, Debug)]
pub struct ProxySettings {
    /// Largest request body.
    pub max_body: Bytes,
    /// How much of a body may be read to find its model.
    pub model_prefix: Bytes,
}

/// The data path. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Proxy {
    controller: Controller,
    settings: ProxySettings,
    pools: Arc<Pools>,
}

impl Proxy {
    /// Builds the data path around the controller's handle.
    #[must_use]
    pub fn new(controller: Controller, settings: ProxySettings) -> Self {
        Self {
            controller,
            settings,
            pools: Arc::default(),
        }
    }

    /// Returns whether a path is inference, and so ours.
    #[must_use]
    pub fn takes(path: &str) -> bool {
        ["/v1/", "/v2/models/", "/upstream/"]
            .iter()
            .any(|prefix| path.starts_with(prefix))
            || path == "/v1/models"
    }

    /// Answers one request.
    pub async fn handle(&self, request: Request<Incoming>) -> Response<ProxyBody> {
        match self.walk(request).await {
            Ok(response) => response,
            Err(fault) => {
                debug!(code = fault.code(), why = %fault, "refusing a request");
                fault.response(ProxyBody::text)
            }
        }
    }

    async fn walk(&self, request: Request<Incoming>) -> Result<Response<ProxyBody>, Fault> {
        let began = self.controller.clock().now();
        if let Some(name) = models::asked(request.uri().path()) {
            return self.models(request.method(), name);
        }
        let (head, body) = request.into_parts();
        if body.size_hint().lower() > self.settings.max_body.get() {
            return Err(Fault::BodyTooLarge(self.settings.max_body));
        }
        let mut held = Held::new(body);
        let routes = self.controller.routes();
        let query = head.uri.query();
        let (route, target) = match resolve::by_path(routes, head.uri.path(), query) {
            ByPath::Model(route, target) => (route, target),
            ByPath::Unknown(name) => return Err(self.not_found(&name)),
            ByPath::Silent => {
                let target = head
                    .uri
                    .path_and_query()
                    .map_or("/", |both| both.as_str())
                    .to_owned();
                let name = match resolve::by_header(&head)? {
                    Some(name) => Some(name),
                    None => resolve::by_body(&head, &mut held, self.settings.model_prefix).await?,
                };
                (
                    self.route(name.or_else(|| resolve::by_query(&head)))?,
                    target,
                )
            }
        };
        held.read_whole(REPLAYED).await?;
        self.pass(Passage {
            route,
            head,
            target,
            held,
            began,
        })
        .await
    }

    fn route(&self, name: Option<String>) -> Result<&Arc<ModelRoute>, Fault> {
        let routes = self.controller.routes();
        match name {
            Some(name) => routes.get(&name).ok_or_else(|| self.not_found(&name)),
            None => routes.only().ok_or(Fault::NoModel),
        }
    }

    fn not_found(&self, name: &str) -> Fault {
        let known: Vec<_> = self
            .controller
            .routes()
            .iter()
            .map(|route| route.name().clone())
            .collect();
        let known = if known.len() <= MOST_LISTED {
            known
        } else {
            Vec::new()
        };
        Fault::ModelNotFound {
            name: name.chars().take(128).collect(),
            known,
        }
    }
}
