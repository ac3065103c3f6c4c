//! Sends a request to a worker and passes its answer on.

use std::io::ErrorKind::{ConnectionRefused, NotFound};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use hyper::body::Body;
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::http::request;
use hyper::http::uri::PathAndQuery;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::time::Instant;
use tracing::debug;

use super::account::Account;
use super::answer::{Answer, Failed, Sent};
use super::body::{Kind, ProxyBody, Streamed};
use super::filter::Change;
use super::held::Held;
use super::http1::{Lines, Upload};
use super::ids::TRACEPARENT;
use super::line::Share;
use super::pool::{Pool, Sender, Wire};
use super::rpc::{self, Call};
use super::spans::Step;
use super::upload::RequestBody;
use super::{Proxy, headers, limit, upgrade};
use crate::clock::Timestamp;
use crate::control::{Lease, ModelRoute, Refusal};
use crate::gate::Visit;
use crate::grpc::Renamer;
use crate::reply::{Fault, Speech};

/// Headers that a call gets beside those of its client, at most: three of a proxy, its
/// host, the time that is left, a place in a trace, and what a residentd tells another.
const ADDED: usize = 8;
/// How long a broken worker's end is waited for before another lease is asked
/// for, so that the dead one is not taken again.
const END_OF_BROKEN: Duration = Duration::from_millis(250);

/// One request as its client sent it.
#[derive(Debug)]
pub struct Asked {
    pub(super) speech: Speech,
    pub(super) head: request::Parts,
    pub(super) held: Held,
    /// What its worker is told of the client.
    pub(super) client: Option<HeaderValue>,
    pub(super) began: Timestamp,
    /// A worker broke over it already.
    pub(super) tried: bool,
    /// Of a call of gRPC.
    pub(super) call: Option<Call>,
}

/// One request on its way.
pub(super) struct Passage {
    pub(super) asked: Box<Asked>,
    pub(super) route: Arc<ModelRoute>,
    pub(super) target: PathAndQuery,
    /// What is changed of what is held.
    pub(super) change: Change,
    pub(super) account: Account,
    /// Its client asks to leave HTTP.
    pub(super) leaves: bool,
}

/// The head of an answer, and what is held until the answer ends.
struct Answered {
    response: Response<Answer>,
    pool: Arc<Pool>,
    lease: Lease,
    visit: Option<Visit>,
    /// When it has to end.
    ends: Option<Instant>,
    /// The client's side of a connection that is to leave HTTP.
    client: Option<OnUpgrade>,
}

/// What became of one try: the head of an answer, and the worker's turn.
type Tried = Result<(Response<Answer>, Option<Visit>), Failed>;

impl Proxy {
    /// Carries a request out up to the head of its answer, and accounts for one
    /// that gets none.
    pub(super) async fn carry(
        &self,
        mut passage: Box<Passage>,
    ) -> Result<Response<ProxyBody>, Fault> {
        let answered = match self.pass(&mut passage).await {
            Ok(answered) => answered,
            Err(fault) => {
                passage.account.refused(&fault);
                return Err(fault);
            }
        };
        let Answered {
            response,
            pool,
            lease,
            visit,
            ends,
            client,
        } = answered;
        let mut account = passage.account;
        account.answered(response.status().as_u16(), response.headers());
        Ok(match client {
            Some(client) => upgrade::switch(response, client, account, lease),
            None => {
                let held = (lease, visit);
                let answer = answer(response, account, pool, held, passage.asked.call);
                limit::bound(answer, ends)
            }
        })
    }

    /// Leases, sends, and tries once more when the worker broke before its
    /// head and nothing of the body is gone.
    async fn pass(&self, passage: &mut Passage) -> Result<Answered, Fault> {
        let deadline = passage.asked.began + passage.route.spec().queue_timeout;
        let call = passage.asked.call;
        let deadline = call.map_or(deadline, |call| call.or_earlier(deadline));
        let client = passage.asked.head.extensions.remove::<OnUpgrade>();
        let client = client.filter(|_| headers::asks_upgrade(&passage.asked.head.headers));
        passage.leaves = client.is_some();
        let mut lease = self.lease(passage, deadline).await?;
        loop {
            let leased = passage.account.leased(&lease);
            let pool = self.pools.of(lease.worker());
            // What is sent the second time goes where nothing can have closed.
            let fresh = passage.asked.tried || client.is_some();
            let limit = passage.route.spec().requests.timeout;
            // The one who has taken over counts itself, from its own lease on.
            let limit = limit.filter(|_| !lease.worker().is_heir);
            let ends = limit.map(|limit| self.controller.clock().instant(leased + limit));
            // Not kept in a variable, for which there would have to be room below.
            let cause = match self.try_until(ends, (&pool, &lease), passage, fresh).await {
                None => return Err(passage.late()),
                Some(Ok((response, visit))) => {
                    let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
                    if switches && client.is_none() {
                        return Err(passage.broke("it left HTTP unasked".into()));
                    }
                    return Ok(Answered {
                        response,
                        pool,
                        lease,
                        visit,
                        ends,
                        client: client.filter(|_| switches),
                    });
                }
                Some(Err(Failed::Refused(fault))) => return Err(fault),
                Some(Err(Failed::Broke(cause) | Failed::Unsent(cause))) => cause,
            };
            debug!(worker = %lease.worker().id, cause, "a worker broke before it answered");
            if passage.asked.tried || !passage.asked.held.can_be_sent() {
                return Err(match lease.worker().is_heir {
                    // It says nothing of the model that the one who has taken over
                    // is gone: the next one will do.
                    true => Fault::Refused(Refusal::ShuttingDown),
                    false => passage.broke(cause),
                });
            }
            passage.asked.tried = true;
            let ended = lease.worker().closing.clone();
            drop(lease);
            // A worker that lives on is simply asked once more.
            let _ = Box::pin(tokio::time::timeout(END_OF_BROKEN, ended.cancelled())).await;
            lease = self.lease(passage, deadline).await?;
        }
    }

    /// Tries once, until then at the latest if that is set.
    async fn try_until(
        &self,
        ends: Option<Instant>,
        (pool, lease): (&Arc<Pool>, &Lease),
        passage: &mut Passage,
        fresh: bool,
    ) -> Option<Tried> {
        let tried = pin!(self.try_once(pool, lease, passage, fresh));
        match ends {
            None => Some(tried.await),
            Some(ends) => Box::pin(tokio::time::timeout_at(ends, tried)).await.ok(),
        }
    }

    async fn lease(&self, passage: &mut Passage, deadline: Timestamp) -> Result<Lease, Fault> {
        passage.account.asks();
        let lease = self.controller.acquire(&passage.route, deadline);
        Ok(lease.await?)
    }

    /// Sends on a kept connection, or a share of one, if there is one and it need
    /// not be a fresh one.
    /// One that the worker had closed is no try: a fresh one is used then. One
    /// that broke later is: the worker may have begun. A body that could not be
    /// sent again goes on a fresh one at once.
    async fn try_once(
        &self,
        pool: &Arc<Pool>,
        lease: &Lease,
        passage: &mut Passage,
        fresh: bool,
    ) -> Tried {
        passage.account.step(Step::Connect);
        let mut kept = match (!fresh && passage.asked.held.is_whole(), passage.wire()) {
            (true, Wire::Http1) => pool.kept().await,
            (true, Wire::Http2) => pool.share(Share::of(passage.asked.held.size())),
            (false, _) => None,
        };
        loop {
            let was_kept = kept.is_some();
            let sender = match kept.take() {
                Some(sender) => sender,
                // Boxed, since few need it and all would have room for it.
                None => match Box::pin(pool.connect(passage.wire())).await {
                    // Whoever it is that listens there now.
                    Ok(_) if !lease.worker().runs() => {
                        return Err(Failed::Unsent("it has ended".into()));
                    }
                    Ok(sender) => sender,
                    Err(error) => {
                        if matches!(error.kind(), ConnectionRefused | NotFound) {
                            lease.worker().pulse.refused();
                        }
                        return Err(Failed::Broke(format!("connect: {error}")));
                    }
                },
            };
            match self.send(sender, (pool, lease), passage).await {
                Err(Failed::Unsent(cause)) if was_kept => {
                    debug!(worker = %lease.worker().id, cause, "a kept connection was closed");
                    passage.account.step(Step::Connect);
                }
                done => return done,
            }
        }
    }

    async fn send(
        &self,
        sender: Sender,
        (pool, lease): (&Pool, &Lease),
        passage: &mut Passage,
    ) -> Tried {
        // Whoever asks for work and gets none says something of the worker; a
        // connection on which a client only listens may be quiet for long.
        passage.account.step(Step::FirstByte);
        let asks_for_work = has_body(&passage.asked.head.method);
        let visit = asks_for_work.then(|| Visit::begin(Arc::clone(&lease.worker().pulse)));
        let sent = self.hand_over(sender, (pool, lease), passage, visit.as_ref());
        let response = sent.map_err(Failed::Refused)?.await?;
        if let Some(visit) = &visit {
            rpc::tell(visit, passage.asked.call.is_some(), &response);
        }
        Ok((response, visit))
    }

    /// Gives it to a connection, so that nothing of it waits for its answer here.
    fn hand_over(
        &self,
        sender: Sender,
        at: (&Pool, &Lease),
        passage: &mut Passage,
        visit: Option<&Visit>,
    ) -> Result<Sent, Fault> {
        match sender {
            Sender::Http1(mut connection) => {
                let upload = self.upload(connection.room(), at, passage, visit);
                let method = &passage.asked.head.method;
                let is_odd = !upload.is_empty() && matches!(*method, Method::GET | Method::HEAD);
                let asking = connection.ask(upload, (*method == Method::HEAD, is_odd));
                Ok(Sent::Http1(asking))
            }
            Sender::Http2(place) => {
                let call = self.call(at, passage, visit).map_err(|error| {
                    Fault::BadRequest(format!("the path cannot be passed on: {error}"))
                })?;
                Ok(Sent::Http2(Box::pin(place.ask(call))))
            }
        }
    }

    /// Makes a request of it as it is written to a worker. `room` is where.
    fn upload(
        &self,
        mut room: BytesMut,
        (pool, lease): (&Pool, &Lease),
        passage: &mut Passage,
        visit: Option<&Visit>,
    ) -> Upload {
        let body = self.body(lease, passage, visit);
        let head = &passage.asked.head;
        let target = passage.target(lease).as_str();
        for part in [head.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
            room.extend_from_slice(part.as_bytes());
        }
        room.line(&HOST, pool.host());
        passage.headers(lease, &mut room);
        if has_body(&head.method) && body.is_end_stream() {
            room.line(&CONTENT_LENGTH, &HeaderValue::from_static("0"));
        }
        Upload::new(room, &head.headers, body)
    }

    /// Makes a call of it.
    fn call(
        &self,
        (pool, lease): (&Pool, &Lease),
        passage: &mut Passage,
        visit: Option<&Visit>,
    ) -> Result<Request<RequestBody>, hyper::http::Error> {
        let mut request = Request::new(self.body(lease, passage, visit));
        let head = &passage.asked.head;
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = passage.target(lease).clone().into();
        request.headers_mut().reserve(head.headers.len() + ADDED);
        passage.headers(lease, request.headers_mut());
        if let Some(call) = passage.asked.call {
            let now = self.controller.clock().now();
            call.address(&mut request, pool.authority(), now)?;
        }
        Ok(request)
    }

    fn body(&self, lease: &Lease, passage: &mut Passage, visit: Option<&Visit>) -> RequestBody {
        // The one who has taken over changes it itself.
        let beginning = match lease.worker().is_heir {
            true => passage.asked.held.pieces(),
            false => passage.change.of(&passage.asked.held),
        };
        let renamer = match &passage.change {
            Change::Messages(field, name) if !lease.worker().is_heir => {
                let most = self.settings.load().model_prefix.get();
                let most = usize::try_from(most).unwrap_or(usize::MAX);
                Some(Renamer::new(*field, name.clone(), most))
            }
            _ => None,
        };
        let rest = passage.asked.held.take_rest();
        let read = passage.asked.held.size();
        let counted = passage.account.sends(read, rest.is_some());
        let most = self.settings.load().max_body;
        RequestBody::new(beginning, rest, most, visit)
            .with_trailers(passage.asked.held.trailers())
            .renamed(renamer)
            .counted(counted)
    }
}

impl Passage {
    fn wire(&self) -> Wire {
        match self.asked.call {
            Some(_) => Wire::Http2,
            None => Wire::Http1,
        }
    }

    /// Returns what the worker is asked for.
    fn target(&self, lease: &Lease) -> &PathAndQuery {
        let asked = self.asked.head.uri.path_and_query();
        asked
            .filter(|_| lease.worker().is_heir)
            .unwrap_or(&self.target)
    }

    /// Writes the headers that are the same over either wire.
    fn headers(&self, lease: &Lease, to: &mut impl Lines) {
        let (asked, place) = (&self.asked, self.account.place());
        let replaced = place.as_ref().map_or(&[][..], |(_, replaced)| replaced);
        let client = asked.client.as_ref();
        headers::towards_worker(&asked.head, client, (self.leaves, replaced), to);
        if let Some((place, _)) = place {
            to.line(&TRACEPARENT, &place);
        }
        if lease.worker().is_heir && asked.tried {
            to.line(&headers::TRIED, &HeaderValue::from_static("1"));
        }
    }

    fn broke(&self, cause: String) -> Fault {
        let model = self.route.name().clone();
        Fault::WorkerBroke { model, cause }
    }

    fn late(&self) -> Fault {
        Fault::RequestTimeout {
            model: self.route.name().clone(),
            limit: self.route.spec().requests.timeout.unwrap_or_default(),
        }
    }
}

/// Passes the worker's answer on, frame by frame.
fn answer(
    response: Response<Answer>,
    mut account: Account,
    pool: Arc<Pool>,
    held: (Lease, Option<Visit>),
    call: Option<Call>,
) -> Response<ProxyBody> {
    let (mut head, body) = response.into_parts();
    headers::strip(&mut head.headers);
    let unknown_length = !body.is_end() && body.size_hint().exact().is_none();
    if unknown_length {
        // The framing counts, not what else the worker said.
        head.headers.remove(CONTENT_LENGTH);
    }
    head.version = Version::default();
    head.extensions.clear();
    let kind = match call {
        Some(_) => Kind::Call,
        None if unknown_length && is_events(&head.headers) => Kind::Events,
        None => Kind::Plain,
    };
    if kind == Kind::Events {
        account.streams();
    }
    if body.is_end() {
        account.has_no_body();
    }
    let streamed = Streamed::new((body, pool), account, kind, held);
    Response::from_parts(head, ProxyBody::Stream(Box::new(streamed)))
}

fn has_body(method: &Method) -> bool {
    matches!(*method, Method::POST | Method::PUT | Method::PATCH)
}

/// Whether it is a stream of events, in plain text.
pub(super) fn is_events(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let name = b"text/event-stream";
    !headers.contains_key(CONTENT_ENCODING)
        && kind
            .and_then(|kind| kind.get(..name.len()))
            .is_some_and(|kind| kind.eq_ignore_ascii_case(name))
}
