//! Inference traffic: finds the model, leases its worker, passes bytes.
//!
//! The walk of one request reads from top to bottom in [`Proxy::handle`]:
//! resolve, admit, forward, account. Bodies pass frame by frame; only what
//! finding the model needs is read first, with a cap, and a model whose
//! configuration changes bodies has them changed before it is admitted.

mod access;
mod account;
mod body;
mod filter;
mod forward;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod headers;
mod hearing;
mod heartbeat;
mod held;
mod limit;
mod models;
mod multipart;
mod pool;
mod resolve;
mod rewrite;
mod rpc;
mod scan;
mod upgrade;
mod upload;

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hyper::body::{Body, Incoming};
use hyper::header::ACCEPT_ENCODING;
use hyper::{Request, Response};
use tracing::debug;

pub use self::access::AccessLog;
use self::access::Unanswered;
pub use self::body::{ProxyBody, Streamed};
use self::forward::Passage;
pub use self::headers::{PEER, TRIED};
pub use self::heartbeat::Waiting;
use self::held::Held;
pub use self::limit::Limited;
use self::pool::Pools;
use self::resolve::ByPath;
use self::rpc::Call;
pub use self::upload::BodyError;
use crate::clock::Timestamp;
use crate::control::{Controller, ModelRoute};
use crate::model::Bytes;
use crate::reply::{Fault, Speech};

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
    settings: Arc<ArcSwap<ProxySettings>>,
    pools: Arc<Pools>,
    access: Option<AccessLog>,
}

impl Proxy {
    /// Builds the data path around the controller's handle.
    #[must_use]
    pub fn new(controller: Controller, settings: ProxySettings) -> Self {
        Self {
            controller,
            settings: Arc::new(ArcSwap::from_pointee(settings)),
            pools: Arc::default(),
            access: None,
        }
    }

    /// Sets other bounds, for requests that come from now on.
    pub fn set(&self, settings: ProxySettings) {
        self.settings.store(Arc::new(settings));
    }

    /// Writes every request that names a model to this log.
    #[must_use]
    pub fn with_access_log(mut self, log: Option<AccessLog>) -> Self {
        self.access = log;
        self
    }

    /// Returns whether a path is inference, and so ours.
    #[must_use]
    pub fn takes(path: &str) -> bool {
        ["/v1/", "/v2/models/", "/upstream/"]
            .iter()
            .any(|prefix| path.starts_with(prefix))
    }

    /// Answers one request of a client at `peer`; a Unix socket has none. One over which
    /// a worker broke in another residentd is `tried` already.
    pub async fn handle(
        &self,
        request: Request<Incoming>,
        peer: Option<SocketAddr>,
        tried: bool,
    ) -> Response<ProxyBody> {
        let (speech, began) = (Speech::of(&request), self.controller.clock().now());
        let call = (speech == Speech::Grpc).then(|| Call::of(began, request.headers()));
        match self.walk(request, (peer, tried), began, call).await {
            Ok(response) => response,
            Err(fault) => {
                debug!(code = fault.code(), why = %fault, "refusing a request");
                if call.is_some_and(|call| call.is_late(self.controller.clock().now())) {
                    return rpc::too_late(&fault);
                }
                speech.answer(&fault, ProxyBody::text)
            }
        }
    }

    async fn walk(
        &self,
        request: Request<Incoming>,
        (peer, tried): (Option<SocketAddr>, bool),
        began: Timestamp,
        call: Option<Call>,
    ) -> Result<Response<ProxyBody>, Fault> {
        if let Some(name) = models::asked(request.uri().path()) {
            return self.models(request.method(), name);
        }
        let (mut head, body) = request.into_parts();
        let settings = **self.settings.load();
        if body.size_hint().lower() > settings.max_body.get() {
            return Err(Fault::BodyTooLarge(settings.max_body));
        }
        let mut held = Held::new(body);
        let routes = self.controller.routes();
        let (route, target) = match resolve::by_path(routes, head.uri.path(), head.uri.query()) {
            ByPath::Model(route, target) => (route, target),
            ByPath::Readiness(route, name) => return Ok(self.readiness(&name, &route)),
            ByPath::Unknown(name) => return Err(self.not_found(&name)),
            ByPath::Silent => {
                let prefix = settings.model_prefix;
                let name = match (resolve::by_header(&head)?, &call) {
                    (Some(name), _) => Some(name),
                    (None, Some(_)) => rpc::by_content(&head, &mut held, prefix).await?,
                    (None, None) => resolve::by_content(&head, &mut held, prefix).await?,
                };
                let target = head.uri.path_and_query().map_or("/", |both| both.as_str());
                (self.route(name)?, target.to_owned())
            }
        };
        if let Some(path) = resolve::parks(&route, &target) {
            let model = route.name().clone();
            return Err(Fault::ParkPath { model, path });
        }
        let (spec, most) = (route.spec(), settings.model_prefix);
        let change = filter::change(spec, &head, &mut held, most).await?;
        let beats = heartbeat::wanted(spec, &head, (&mut held, &change), most).await?;
        match call {
            Some(_) => rpc::read_whole(&head, &mut held, REPLAYED).await?,
            None => held.read_whole(REPLAYED).await?,
        }
        let (access, clock) = (self.access.clone(), self.controller.clock());
        let unanswered = Unanswered::new(access, route.name().clone(), clock, began);
        if beats.is_some() {
            // The head may go out before the worker could say how it packs.
            head.headers.remove(ACCEPT_ENCODING);
        }
        let passage = Passage {
            route,
            head,
            peer,
            target,
            held,
            change,
            began,
            tried,
            call,
        };
        let Some(every) = beats else {
            return self.carry(passage, unanswered).await;
        };
        let proxy = self.clone();
        let passing = async move { proxy.carry(passage, unanswered).await };
        heartbeat::wait(Box::pin(passing), every).await
    }

    async fn carry(
        &self,
        passage: Passage,
        unanswered: Unanswered,
    ) -> Result<Response<ProxyBody>, Fault> {
        let passed = self.pass(passage).await;
        match &passed {
            Ok(_) => unanswered.answered(),
            Err(fault) => unanswered.refused(fault),
        }
        passed
    }

    fn route(&self, name: Option<String>) -> Result<Arc<ModelRoute>, Fault> {
        let routes = self.controller.routes();
        match name {
            Some(name) => routes.get(&name).ok_or_else(|| self.not_found(&name)),
            None => routes.only().ok_or(Fault::NoModel),
        }
    }

    fn not_found(&self, name: &str) -> Fault {
        let known = self.controller.routes().all();
        let known: Vec<_> = known.iter().map(|route| route.name().clone()).collect();
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
