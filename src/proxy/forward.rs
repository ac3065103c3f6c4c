//! Sends a request to a worker and passes its answer on.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, TE, UPGRADE,
};
use hyper::http::request;
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use tracing::debug;

use super::Proxy;
use super::account::Account;
use super::body::{ProxyBody, Streamed};
use super::pool::{Pool, Sender};
use super::resolve::Held;
use super::upload::{BodyError, RequestBody};
use crate::clock::Timestamp;
use crate::control::{Lease, ModelRoute};
use crate::model::Upstream;
use crate::reply::Fault;
use crate::telemetry;

/// How long a broken worker's end is waited for before another lease is asked
/// for, so that the dead one is not taken again.
const END_OF_BROKEN: Duration = Duration::from_millis(250);
/// Headers of one connection, never passed on (RFC 9110, 7.6.1).
const HOP_BY_HOP: [&str; 7] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// One request on its way.
pub(super) struct Passage<'a> {
    pub(super) route: &'a Arc<ModelRoute>,
    pub(super) head: request::Parts,
    pub(super) target: String,
    pub(super) held: Held,
    pub(super) began: Timestamp,
}

/// What became of one try.
enum Tried {
    Answered(Response<Incoming>, Sender),
    /// Nothing came back.
    Broke(String),
    /// The client's own body was at fault.
    BadBody(Fault),
}

impl Proxy {
    /// Leases, sends, and tries once more when the worker broke before its
    /// head and the whole body is still here.
    pub(super) async fn pass(
        &self,
        mut passage: Passage<'_>,
    ) -> Result<Response<ProxyBody>, Fault> {
        let clock = self.controller.clock();
        let deadline = passage.began + passage.route.spec().queue_timeout;
        let upgrade = passage
            .head
            .extensions
            .remove::<hyper::upgrade::OnUpgrade>();
        let upgrade = upgrade.filter(|_| asks_upgrade(&passage.head.headers));
        let mut lease = self.controller.acquire(passage.route, deadline).await?;
        let mut retried = false;
        loop {
            let leased = clock.now();
            let pool = self.pools.of(lease.worker());
            match self
                .try_once(&pool, &lease, &mut passage, upgrade.is_some())
                .await
            {
                Tried::Answered(response, sender) => {
                    let status = response.status();
                    let worker = lease.worker().id.clone();
                    let account =
                        Account::new(worker, clock, passage.began, leased, status.as_u16());
                    if let (StatusCode::SWITCHING_PROTOCOLS, Some(client)) = (status, upgrade) {
                        return Ok(switch(response, client, account, lease));
                    }
                    return Ok(answer(response, account, (sender, pool), lease));
                }
                Tried::BadBody(fault) => return Err(fault),
                Tried::Broke(cause) => {
                    debug!(worker = %lease.worker().id, cause, "a worker broke before it answered");
                    if retried || !passage.held.is_whole() {
                        let model = passage.route.name().clone();
                        return Err(Fault::WorkerBroke { model, cause });
                    }
                    retried = true;
                    let ended = lease.worker().closing.clone();
                    drop(lease);
                    // A worker that lives on is simply asked once more.
                    let _ = tokio::time::timeout(END_OF_BROKEN, ended.cancelled()).await;
                    lease = self.controller.acquire(passage.route, deadline).await?;
                }
            }
        }
    }

    /// Sends on a kept connection if there is one. One that the worker closed
    /// meanwhile is no fault the client sees: a fresh one is used then.
    async fn try_once(
        &self,
        pool: &Arc<Pool>,
        lease: &Lease,
        passage: &mut Passage<'_>,
        upgrade: bool,
    ) -> Tried {
        let replayable = passage.held.is_whole();
        if !upgrade && let Some(sender) = pool.take() {
            match self.send(sender, lease, passage, upgrade).await {
                Tried::Broke(_) if replayable => {}
                done => return done,
            }
        }
        match pool.connect().await {
            Ok(sender) => self.send(sender, lease, passage, upgrade).await,
            Err(error) => Tried::Broke(format!("connect: {error}")),
        }
    }

    async fn send(
        &self,
        mut sender: Sender,
        lease: &Lease,
        passage: &mut Passage<'_>,
        upgrade: bool,
    ) -> Tried {
        let request = match self.request(lease, passage, upgrade) {
            Ok(request) => request,
            Err(error) => return Tried::Broke(error.to_string()),
        };
        match sender.send_request(request).await {
            Ok(response) => Tried::Answered(response, sender),
            Err(error) => match body_error(&error) {
                Some(BodyError::TooLarge(most)) => Tried::BadBody(Fault::BodyTooLarge(*most)),
                Some(BodyError::Broken(why)) => Tried::BadBody(Fault::BadRequest(format!(
                    "the body broke off: {}",
                    telemetry::chain(why)
                ))),
                None => Tried::Broke(telemetry::chain(&error).to_string()),
            },
        }
    }

    fn request(
        &self,
        lease: &Lease,
        passage: &mut Passage<'_>,
        upgrade: bool,
    ) -> Result<Request<RequestBody>, hyper::http::Error> {
        let body = RequestBody::new(
            passage.held.pieces.clone(),
            passage.held.take_rest(),
            self.settings.max_body,
        );
        let mut request = Request::new(body);
        *request.method_mut() = passage.head.method.clone();
        *request.uri_mut() = Uri::try_from(passage.target.as_str())?;
        *request.version_mut() = Version::HTTP_11;
        let mut headers = passage.head.headers.clone();
        strip(&mut headers, upgrade);
        headers.insert(HOST, host(&lease.worker().upstream));
        *request.headers_mut() = headers;
        Ok(request)
    }
}

/// Returns what was wrong with the client's body, when sending it failed for
/// that.
fn body_error(error: &hyper::Error) -> Option<&BodyError> {
    std::error::Error::source(error)?.downcast_ref()
}

/// Whether the client wants to leave HTTP, as for a websocket.
fn asks_upgrade(headers: &HeaderMap) -> bool {
    let wanted = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let named = wanted
        .flat_map(|value| value.split(','))
        .any(|word| word.trim().eq_ignore_ascii_case("upgrade"));
    named && headers.contains_key(UPGRADE)
}

/// Takes off the headers of one connection, and those it names. `te: trailers`
/// stays, and with an upgrade what asks for it.
fn strip(headers: &mut HeaderMap, upgrade: bool) {
    let kept = upgrade.then(|| headers.get(UPGRADE).cloned()).flatten();
    let trailers = headers.get(TE).is_some_and(|value| value == "trailers");
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = kept {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
}

fn host(upstream: &Upstream) -> HeaderValue {
    let text = match upstream {
        Upstream::Tcp(address) => address.to_string(),
        Upstream::Unix(_) => "localhost".to_owned(),
    };
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("localhost"))
}

/// Passes the worker's answer on, frame by frame.
fn answer(
    response: Response<Incoming>,
    account: Account,
    connection: (Sender, Arc<Pool>),
    lease: Lease,
) -> Response<ProxyBody> {
    let (mut head, body) = response.into_parts();
    strip(&mut head.headers, false);
    head.version = Version::default();
    head.extensions.clear();
    let kind = head
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let events = kind.is_some_and(|kind| kind.starts_with("text/event-stream"));
    let streamed = Streamed::new(body, account, connection, events, lease);
    Response::from_parts(head, ProxyBody::Stream(Box::new(streamed)))
}

/// Both sides left HTTP: bytes are copied until one ends. The lease is held
/// as long.
fn switch(
    mut response: Response<Incoming>,
    client: hyper::upgrade::OnUpgrade,
    mut account: Account,
    lease: Lease,
) -> Response<ProxyBody> {
    let worker = hyper::upgrade::on(&mut response);
    telemetry::spawn("upgraded", async move {
        let _held = lease;
        let both = async {
            let (client, worker) = (client.await?, worker.await?);
            Ok::<_, hyper::Error>((TokioIo::new(client), TokioIo::new(worker)))
        };
        if let Ok((mut client, mut worker)) = both.await {
            match tokio::io::copy_bidirectional(&mut client, &mut worker).await {
                Ok((_, back)) => {
                    account.passed(usize::try_from(back).unwrap_or(usize::MAX));
                    account.finish();
                }
                Err(_) => account.broke(),
            }
        }
    });
    let (mut head, _) = response.into_parts();
    head.extensions.clear();
    Response::from_parts(head, ProxyBody::empty())
}
