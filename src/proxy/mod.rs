//! Inference traffic: finds the model, leases its worker, passes bytes.
//!
//! The walk of one request reads from top to bottom in [`Proxy::handle`]:
//! resolve, admit, forward, account. Bodies pass frame by frame; only what
//! finding the model needs is read first, with a cap, and a model whose
//! configuration changes bodies has them changed before it is admitted.

mod access;
mod account;
mod answer;
mod body;
mod filter;
mod forward;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod headers;
mod heartbeat;
mod held;
mod http1;
mod ids;
mod limit;
mod line;
mod models;
mod multipart;
mod pool;
mod resolve;
mod rewrite;
mod rpc;
mod scan;
mod spans;
mod upgrade;
mod upload;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::body::Incoming;
use hyper::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use hyper::http::request;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response};
use tracing::debug;

pub use self::access::AccessLog;
use self::account::Account;
pub use self::body::{ProxyBody, Streamed};
use self::filter::Change;
pub use self::forward::Asked;
use self::forward::Passage;
pub use self::headers::{PEER, TRIED, client};
pub use self::heartbeat::Waiting;
use self::held::Held;
use self::ids::Names;
pub use self::ids::REQUEST_ID;
pub use self::limit::Limited;
use self::pool::Pools;
use self::resolve::ByPath;
use self::rpc::Call;
use self::spans::{Ended, Spans};
pub use self::upload::BodyError;
use crate::control::{Controller, ModelRoute, Passed};
use crate::model::Bytes;
use crate::reply::{self, Fault, Speech};
use crate::telemetry::Traces;

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
    names: Arc<Names>,
    traces: Option<Traces>,
}

/// What became of a request before it asks for its worker.
enum Begun {
    /// It needs none.
    Answered(Response<ProxyBody>),
    /// It is ready to, and its client hears so often that it waits.
    Passage(Box<Passage>, Option<Duration>),
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
            names: Arc::new(Names::new()),
            traces: None,
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

    /// Makes spans of requests.
    #[must_use]
    pub fn with_traces(mut self, traces: Option<Traces>) -> Self {
        self.traces = traces;
        self
    }

    /// Returns whether a path is inference, and so ours.
    #[must_use]
    pub fn takes(path: &str) -> bool {
        ["/v1/", "/v2/models/", "/upstream/"]
            .iter()
            .any(|prefix| path.starts_with(prefix))
    }

    /// Gives a request a name, its client's own where that is good, in its header
    /// [`REQUEST_ID`]. The answer is to have it too.
    pub fn name(&self, headers: &mut HeaderMap) -> HeaderValue {
        self.names.of(headers)
    }

    /// Counts a request that was turned away before it could name a model.
    pub fn count_stray(&self, fault: &Fault, speech: Speech) {
        let status = fault.status();
        let call = (speech == Speech::Grpc).then(|| reply::code_of(status) as u16);
        let refused = Passed::refused(status.as_u16(), call);
        self.controller.routes().stray().count(&refused);
    }

    /// Takes a request in. `client` is what its worker is told of the client, see
    /// [`client()`]. One over which a worker broke in another residentd is `tried`
    /// already.
    #[must_use]
    pub fn take(
        &self,
        request: Request<Incoming>,
        client: Option<HeaderValue>,
        tried: bool,
    ) -> Box<Asked> {
        let (speech, began) = (Speech::of(&request), self.controller.clock().now());
        let call = (speech == Speech::Grpc).then(|| Call::of(began, request.headers()));
        let (head, body) = request.into_parts();
        Box::new(Asked {
            speech,
            head,
            held: Held::new(body),
            client,
            began,
            tried,
            call,
        })
    }

    /// Answers one request.
    pub async fn handle(&self, asked: Box<Asked>) -> Response<ProxyBody> {
        let (speech, call) = (asked.speech, asked.call);
        // One after the other, so that they share their room.
        let (passage, beats) = match self.begin(asked).await {
            Ok(Begun::Answered(response)) => return response,
            Ok(Begun::Passage(passage, beats)) => (passage, beats),
            Err(fault) => return self.refuse(&fault, speech, call),
        };
        let passed = match beats {
            None => self.carry(passage).await,
            Some(every) => {
                let proxy = self.clone();
                let passing = async move { proxy.carry(passage).await };
                Box::pin(heartbeat::wait(Box::pin(passing), every)).await
            }
        };
        passed.unwrap_or_else(|fault| self.refuse(&fault, speech, call))
    }

    fn refuse(&self, fault: &Fault, speech: Speech, call: Option<Call>) -> Response<ProxyBody> {
        debug!(code = fault.code(), why = %fault, "refusing a request");
        if call.is_some_and(|call| call.is_late(self.controller.clock().now())) {
            return rpc::too_late(fault);
        }
        speech.answer(fault, ProxyBody::text)
    }

    /// Takes a request as far as it goes without its worker.
    async fn begin(&self, mut asked: Box<Asked>) -> Result<Begun, Fault> {
        let Asked {
            head,
            held,
            began,
            call,
            ..
        } = &mut *asked;
        let call = *call;
        if let Some(name) = models::asked(head.uri.path()) {
            return self.models(&head.method, name).map(Begun::Answered);
        }
        let times = (self.controller.clock(), *began);
        let spans = self.traces.as_ref().map(|traces| {
            let asked = (&head.method, head.uri.path());
            Spans::begin(traces, asked, &head.headers, times, call.is_some())
        });
        let (route, target) = match self.find(head, held, call).await {
            Ok(ByPath::Model(route, target)) => (route, target),
            Ok(ByPath::Readiness(route, name)) => {
                return Ok(Begun::Answered(self.readiness(&name, &route)));
            }
            Ok(ByPath::Unknown(name)) => {
                return Err(self.stray(self.not_found(&name), call, spans));
            }
            Ok(ByPath::Silent) => return Err(self.stray(Fault::NoModel, call, spans)),
            Err(fault) => return Err(self.stray(fault, call, spans)),
        };
        let account = Account::new(Arc::clone(&route), &head.headers, times, call).traced(spans);
        let mut passage = Box::new(Passage {
            asked,
            route,
            target,
            change: Change::None,
            account: account.logged(self.access.clone()),
            leaves: false,
        });
        match self.prepare(&mut passage).await {
            Ok(beats) => Ok(Begun::Passage(passage, beats)),
            Err(fault) => {
                passage.account.refused(&fault);
                Err(fault)
            }
        }
    }

    /// Finds the model that a request is for, and what its worker is asked for.
    async fn find(
        &self,
        head: &request::Parts,
        held: &mut Held,
        call: Option<Call>,
    ) -> Result<ByPath, Fault> {
        let settings = **self.settings.load();
        if head.method == Method::CONNECT {
            let why = "models are no tunnels: ask for an upgrade with GET";
            return Err(Fault::BadRequest(why.into()));
        }
        if held.least() > settings.max_body.get() {
            return Err(Fault::BodyTooLarge(settings.max_body));
        }
        let routes = self.controller.routes();
        match resolve::by_path(routes, head.uri.path(), head.uri.query())? {
            ByPath::Silent => {}
            told => return Ok(told),
        }
        let prefix = settings.model_prefix;
        let name = match (resolve::by_header(head)?, call) {
            (Some(name), _) => Some(name),
            (None, Some(_)) => rpc::by_content(head, held, prefix).await?,
            (None, None) => resolve::by_content(head, held, prefix).await?,
        };
        let target = head.uri.path_and_query().cloned();
        let target = target.unwrap_or_else(|| PathAndQuery::from_static("/"));
        Ok(ByPath::Model(self.route(name)?, target))
    }

    /// Does what is to be done before a request asks for its worker. Returns how
    /// often its client hears that it waits.
    async fn prepare(&self, passage: &mut Passage) -> Result<Option<Duration>, Fault> {
        let Passage {
            asked,
            route,
            target,
            change,
            ..
        } = passage;
        if let Some(path) = resolve::parks(route, target.path()) {
            let model = route.name().clone();
            return Err(Fault::ParkPath { model, path });
        }
        let (spec, most) = (route.spec(), self.settings.load().model_prefix);
        let Asked {
            head, held, call, ..
        } = &mut **asked;
        *change = match call {
            Some(_) => rpc::change(spec, head),
            None => filter::change(spec, head, held, most).await?,
        };
        let beats = heartbeat::wanted(spec, head, (held, change), most).await?;
        match call {
            Some(_) => rpc::read_whole(head, held, REPLAYED).await?,
            None => held.read_whole(REPLAYED).await?,
        }
        if beats.is_some() {
            // The head may go out before the worker could say how it packs.
            head.headers.remove(ACCEPT_ENCODING);
        }
        Ok(beats)
    }

    /// Counts a request that named no model that there is.
    fn stray(&self, fault: Fault, call: Option<Call>, spans: Option<Box<Spans>>) -> Fault {
        let now = self.controller.clock().now();
        let status = fault.status().as_u16();
        let call = call.map(|call| call.refused_by(&fault, now) as u16);
        let refused = Passed::refused(status, call);
        self.controller.routes().stray().count(&refused);
        if let Some(spans) = spans {
            let ended = Ended {
                model: None,
                name: None,
                status: Some(status),
                code: Some(fault.code()),
                passed: &refused,
            };
            spans.end(now, &ended);
        }
        fault
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
