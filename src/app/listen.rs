//! Takes connections, and serves each by the proxy or the API.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use axum::body::Body as ApiBody;
use http_body_util::{BodyExt, Either};
use hyper::body::{Body as _, Incoming};
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, Entry, HeaderMap, HeaderValue, TRANSFER_ENCODING, UPGRADE,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::connection::{self, HEAD_TIMEOUT};
use super::entrance::{self, Entrance, Rules};
use super::lanes::Lanes;
use super::parts::Parts;
use super::reload::proxy_settings;
use super::sockets::{Listener, Scope};
use super::upgrade::{named_peer, pass};
use crate::api::{self, ApiState, KnownPage, PeerAddr};
use crate::clock::Clock;
use crate::config::Config;
use crate::control::Stream;
use crate::grpc;
use crate::proxy::{self, Proxy, ProxyBody, REQUEST_ID, TRIED};
use crate::reply::{Fault, Speech};

/// Wait after an accept that failed, as it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The body of a call of the API that is kept, in bytes, while it is answered; calls
/// are shorter.
const KEPT: u64 = 64 << 10;
/// What TCP connections are encrypted with, as it is configured now.
type Encryption = Arc<ArcSwapOption<ServerConfig>>;

/// Whether connections are taken.
#[derive(Clone, Debug)]
pub(super) enum Doors {
    Open,
    /// Another residentd is about to take over: calls wait.
    Shut,
    /// Another residentd has taken over and listens here for what still comes.
    Moved(Arc<Path>),
}

/// What every connection is served with.
#[derive(Clone, Debug)]
pub(super) struct Server {
    clock: Clock,
    proxy: Proxy,
    api: axum::Router,
    /// What is left of it where operators have an address of their own.
    probes: axum::Router,
    entrance: Entrance,
    tls: Encryption,
    pub(super) closing: CancellationToken,
    pub(super) connections: tokio_util::task::TaskTracker,
    doors: watch::Receiver<Doors>,
    lanes: Lanes,
}

impl Doors {
    /// Waits while another residentd is about to take over, and returns where it
    /// listens if it has.
    pub(super) async fn settled(doors: &mut watch::Receiver<Self>) -> Option<Arc<Path>> {
        let settled = doors.wait_for(|doors| !matches!(doors, Self::Shut)).await;
        // Without anybody who could take over nobody has.
        settled.ok().and_then(|doors| doors.moved())
    }

    fn moved(&self) -> Option<Arc<Path>> {
        match self {
            Self::Moved(socket) => Some(Arc::clone(socket)),
            Self::Open | Self::Shut => None,
        }
    }
}

/// Takes connections until the server is closing or another residentd has taken
/// over, and none while one is about to.
pub(super) async fn listen(listener: Listener, scope: Scope, server: Server) {
    let mut doors = server.doors.clone();
    loop {
        let state = doors.borrow_and_update().clone();
        let accepted = match (state, &listener) {
            // What comes to the one before this is passed on as long as it comes.
            (Doors::Open, _) | (Doors::Moved(_), Listener::Handover(_)) => Some(accept(&listener)),
            (Doors::Moved(_), _) => return,
            (Doors::Shut, _) => None,
        };
        let accepted = async {
            match accepted {
                Some(accepted) => accepted.await,
                None => std::future::pending().await,
            }
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            Ok(()) = doors.changed() => continue,
            () = server.closing.cancelled() => return,
        };
        match accepted {
            Ok((stream, origin)) => server.take(stream, At { scope, origin }),
            Err(error) => {
                warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Where a connection was taken, and from whom.
#[derive(Clone, Copy)]
struct At {
    scope: Scope,
    origin: Origin,
}

/// Where a request came from.
#[derive(Clone, Copy)]
enum Origin {
    Client(PeerAddr),
    /// As a client, encrypted.
    Encrypted(PeerAddr),
    /// The residentd before this one, which names the client.
    Handover,
}

impl Origin {
    fn peer(self, headers: &HeaderMap) -> PeerAddr {
        match self {
            Self::Client(peer) | Self::Encrypted(peer) => peer,
            Self::Handover => named_peer(headers),
        }
    }
}

async fn accept(listener: &Listener) -> std::io::Result<(Stream, Origin)> {
    match listener {
        Listener::Tcp(listener) => {
            let (stream, peer) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok((Stream::Tcp(stream), Origin::Client(PeerAddr(Some(peer)))))
        }
        Listener::Unix(listener) => {
            let (stream, _) = listener.accept().await?;
            Ok((Stream::Unix(stream), Origin::Client(PeerAddr(None))))
        }
        Listener::Handover(listener) => {
            let (stream, _) = listener.accept().await?;
            Ok((Stream::Unix(stream), Origin::Handover))
        }
    }
}

/// Returns whether a body is not simply in chunks: whoever reads on could take
/// another part of it for its end.
fn is_recoded(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    codings.next().is_some_and(|coding| !is_chunked(coding)) || codings.next().is_some()
}

/// Tells workers how the client called, unless a proxy before this one has.
fn set_encrypted(headers: &mut HeaderMap) {
    if let Entry::Vacant(place) = headers.entry("x-forwarded-proto") {
        place.insert(HeaderValue::from_static("https"));
    }
}

type Body = Either<ProxyBody, ApiBody>;
/// An answer that is waited for.
type Answering = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// Answers without a look at the request's body. That is let go with the answer and
/// not before: as long as somebody has it hyper does not give the connection up,
/// and more of it may have come then.
fn at_once(response: Response<Body>, request: Request<Incoming>) -> Answering {
    Box::pin(async move {
        drop(request);
        response
    })
}

impl Server {
    pub(super) fn new(
        config: &Config,
        clock: Clock,
        proxy: Proxy,
        state: ApiState,
        (doors, lanes): (watch::Receiver<Doors>, Lanes),
    ) -> Self {
        let made = Self {
            clock,
            proxy,
            probes: api::probes(state.clone()),
            api: api::router(state),
            entrance: Entrance::new(config),
            tls: Encryption::default(),
            closing: CancellationToken::new(),
            connections: tokio_util::task::TaskTracker::new(),
            doors,
            lanes,
        };
        made.set(config);
        made
    }

    /// Serves as this says from now on, as far as that needs no restart.
    pub(super) fn set(&self, config: &Config) {
        self.proxy.set(proxy_settings(config));
        self.entrance.set(config);
        let tls = config.tls.as_ref().map(|tls| Arc::clone(&tls.server));
        self.tls.store(tls);
    }

    /// Has a connection served in a lane.
    fn take(&self, stream: Stream, at: At) {
        // Each request takes it along, so it is one thing to take.
        let server = Arc::new(self.clone());
        // From now on, so that nobody ends without it.
        let token = self.connections.token();
        self.lanes.serve(move || {
            let stream = stream.moved_here()?;
            Ok(async move {
                let _token = token;
                server.serve_any(stream, at).await;
            })
        });
    }

    async fn serve_any(self: &Arc<Self>, stream: Stream, at: At) {
        let (stream, peer) = match (stream, at.origin) {
            (Stream::Unix(stream), _) => return self.serve_plain(stream, at).await,
            (Stream::Tcp(stream), Origin::Client(peer)) => (stream, peer),
            (Stream::Tcp(stream), _) => return self.serve_plain(stream, at).await,
        };
        let Some(config) = self.tls.load_full() else {
            return self.serve_plain(stream, at).await;
        };
        let shaken = TlsAcceptor::from(config).accept(stream);
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(HEAD_TIMEOUT, shaken) => shaken,
            () = self.closing.cancelled() => return,
        };
        let origin = Origin::Encrypted(peer);
        match shaken {
            // Boxed, as its room would be had by connections that need none.
            Ok(Ok(stream)) => Box::pin(self.serve(TokioIo::new(stream), At { origin, ..at })).await,
            Ok(Err(error)) => debug!(%error, "a client does not speak TLS as it should"),
            Err(_) => debug!("a client took too long to begin TLS"),
        }
    }

    async fn serve_plain<I>(self: &Arc<Self>, stream: I, at: At)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.serve(TokioIo::new(Parts(stream)), at).await;
    }

    async fn serve<I>(self: &Arc<Self>, io: TokioIo<I>, at: At)
    where
        TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
        I: Send + 'static,
    {
        let client = match at.origin {
            Origin::Client(peer) | Origin::Encrypted(peer) => peer.0.map(proxy::client),
            // That one has named the client to workers.
            Origin::Handover => None,
        };
        let answer = |request| Arc::clone(self).answer(request, at, client.clone());
        connection::serve(io, (self.clock, self.closing.clone()), answer).await;
    }

    /// Answers one request. What can be told of it at once is, so that the future
    /// has room for little else than the one inside of it.
    fn answer(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        at: At,
        client: Option<HeaderValue>,
    ) -> impl Future<Output = Response<Body>> + use<> {
        let name = self.proxy.name(request.headers_mut());
        let rules = self.entrance.rules();
        let (version, page) = (request.version(), rules.page(request.headers()));
        let is_head = request.method() == Method::HEAD;
        let answering = if is_recoded(request.headers()) {
            let fault = Fault::BadRequest("the body has a coding other than chunked".into());
            let mut response = fault.response(ProxyBody::text).map(Either::Left);
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
            at_once(response, request)
        } else if entrance::is_preflight(request.method(), request.headers()) {
            let response = entrance::preflight(page.as_ref(), request.headers());
            at_once(response.map(Either::Left), request)
        } else {
            Arc::clone(&self).let_in((request, client), at, &rules, page.is_some())
        };
        async move {
            let mut response = answering.await;
            let headers = response.headers_mut();
            entrance::tell(page.as_ref(), headers);
            self.part(version, headers);
            headers.insert(REQUEST_ID, name);
            match is_head {
                true => without_content(response),
                false => response,
            }
        }
    }

    fn let_in(
        self: Arc<Self>,
        (mut request, client): (Request<Incoming>, Option<HeaderValue>),
        At { scope, origin }: At,
        rules: &Rules,
        has_page: bool,
    ) -> Answering {
        let is_ours = Proxy::takes(request.uri().path())
            || grpc::is_call(&request) && !api::answers(&request);
        if scope != Scope::Admin && is_ours {
            // That one has asked for a token too.
            let is_known = matches!(origin, Origin::Handover);
            let tried = is_known && request.headers().contains_key(TRIED);
            if matches!(origin, Origin::Encrypted(_)) {
                set_encrypted(request.headers_mut());
            }
            if !is_known && let Err(fault) = rules.admit(request.headers_mut()) {
                let speech = Speech::of(&request);
                self.proxy.count_stray(&fault, speech);
                let response = speech.answer(&fault, ProxyBody::text).map(Either::Left);
                return at_once(response, request);
            }
            // A connection keeps the room of its largest request as long as it is open:
            // the answer may be a stream of hours.
            let asked = self.proxy.take(request, client, tried);
            return Box::pin(async move { self.proxy.handle(asked).await.map(Either::Left) });
        }
        let peer = origin.peer(request.headers());
        let standing = rules.standing(request.headers());
        request.extensions_mut().insert(standing);
        request.extensions_mut().insert(peer);
        if has_page {
            request.extensions_mut().insert(KnownPage);
        }
        let is_closed = scope == Scope::Inference && !api::is_probe(request.uri().path());
        Box::pin(async move {
            let answer = match is_closed {
                true => answer_by(&self.probes, request.map(ApiBody::new)).await,
                false => self.call(request, peer).await,
            };
            answer.map(Either::Right)
        })
    }

    /// Answers a call of the API: here, or by the residentd that has taken over.
    async fn call(&self, request: Request<Incoming>, peer: PeerAddr) -> Response<ApiBody> {
        let mut doors = self.doors.clone();
        if let Some(socket) = Doors::settled(&mut doors).await {
            return pass(request.map(ApiBody::new), peer, &socket).await;
        }
        let most = request.body().size_hint().upper();
        let is_kept = request.method() == Method::POST && most.is_some_and(|most| most <= KEPT);
        if !is_kept {
            return answer_by(&self.api, request.map(ApiBody::new)).await;
        }
        // For the one who may take over while it waits.
        let (head, body) = request.into_parts();
        let body = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => {
                debug!(%error, "a call broke");
                let fault = Fault::BadRequest("the body ended early".into());
                return fault.response(ApiBody::from);
            }
        };
        let again = Request::from_parts(head.clone(), ApiBody::from(body.clone()));
        let request = Request::from_parts(head, ApiBody::from(body));
        let answer = answer_by(&self.api, request).await;
        if answer.status() != StatusCode::SERVICE_UNAVAILABLE {
            return answer;
        }
        match Doors::settled(&mut doors).await {
            Some(socket) => pass(again, peer, &socket).await,
            None => answer,
        }
    }

    /// Has a client open another connection for its next request when another
    /// residentd has taken over.
    fn part(&self, version: Version, headers: &mut HeaderMap) {
        let has_moved = self.doors.borrow().moved().is_some();
        if has_moved && version < Version::HTTP_2 && !headers.contains_key(UPGRADE) {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

async fn answer_by(router: &axum::Router, request: Request<ApiBody>) -> Response<ApiBody> {
    let answer = router.clone().oneshot(request).await;
    answer.unwrap_or_else(|never| match never {})
}

/// Takes the content off an answer to HEAD, and leaves its length: over HTTP/2 hyper
/// would send it, which breaks the client's stream.
fn without_content(response: Response<Body>) -> Response<Body> {
    let (mut head, body) = response.into_parts();
    if let Some(length) = body.size_hint().exact().filter(|length| *length > 0) {
        let length = HeaderValue::from(length);
        head.headers.entry(CONTENT_LENGTH).or_insert(length);
    }
    Response::from_parts(head, Either::Left(ProxyBody::empty()))
}
