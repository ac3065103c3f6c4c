//! Takes connections, and serves each by the proxy or the API.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body as ApiBody;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::sockets::Listener;
use super::upgrade::{named_peer, pass};
use crate::api::{self, PeerAddr};
use crate::grpc;
use crate::model::Bytes;
use crate::proxy::{Proxy, ProxyBody, TRIED};
use crate::reply::Fault;
use crate::telemetry;

/// Longest time for a client to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Wait after an accept that failed, as it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The body of a call of the API is this long at most.
const LONGEST_CALL: usize = 1 << 20;

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
#[derive(Clone)]
pub(super) struct Server {
    pub(super) proxy: Proxy,
    pub(super) api: axum::Router,
    pub(super) closing: CancellationToken,
    pub(super) connections: tokio_util::task::TaskTracker,
    pub(super) doors: watch::Receiver<Doors>,
}

impl Doors {
    fn moved(&self) -> Option<Arc<Path>> {
        match self {
            Self::Moved(socket) => Some(Arc::clone(socket)),
            Self::Open | Self::Shut => None,
        }
    }
}

/// Takes connections until the server is closing or another residentd has taken
/// over, and none while one is about to.
pub(super) async fn listen(listener: Listener, server: Server) {
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
            Ok((Stream::Tcp(stream), peer)) => server.serve(TokioIo::new(stream), peer),
            Ok((Stream::Unix(stream), peer)) => server.serve(TokioIo::new(stream), peer),
            Err(error) => {
                warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

/// Where a request came from.
#[derive(Clone, Copy)]
enum Origin {
    Client(PeerAddr),
    /// The residentd before this one, which names the client.
    Handover,
}

impl Origin {
    fn peer(self, headers: &HeaderMap) -> PeerAddr {
        match self {
            Self::Client(peer) => peer,
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

type Body = Either<ProxyBody, ApiBody>;

impl Server {
    fn serve<I>(&self, io: TokioIo<I>, origin: Origin)
    where
        TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
        I: Send + 'static,
    {
        let server = self.clone();
        let closing = self.closing.clone();
        let task = async move {
            let service = service_fn(move |request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.answer(request, origin).await) }
            });
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT);
            builder.http2().timer(TokioTimer::new());
            let connection = builder.serve_connection_with_upgrades(io, service);
            tokio::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = closing.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                debug!(error = %error, "a connection ended early");
            }
        };
        telemetry::spawn("connection", self.connections.track_future(task));
    }

    async fn answer(&self, request: Request<Incoming>, origin: Origin) -> Response<Body> {
        let (peer, version) = (origin.peer(request.headers()), request.version());
        let is_ours = Proxy::takes(request.uri().path());
        if is_ours || grpc::is_call(&request) && !api::answers(&request) {
            let (client, tried) = match origin {
                Origin::Client(_) => (peer.0, false),
                // That one has named the client to workers.
                Origin::Handover => (None, request.headers().contains_key(TRIED)),
            };
            let mut response = self.proxy.handle(request, client, tried).await;
            self.part(version, response.headers_mut());
            return response.map(Either::Left);
        }
        let mut response = self.call(request, peer).await;
        self.part(version, response.headers_mut());
        response.map(Either::Right)
    }

    /// Answers a call of the API: here, or by the residentd that has taken over.
    async fn call(&self, request: Request<Incoming>, peer: PeerAddr) -> Response<ApiBody> {
        let mut doors = self.doors.clone();
        let open = doors.wait_for(|doors| !matches!(doors, Doors::Shut)).await;
        if let Some(socket) = open.ok().and_then(|doors| doors.moved()) {
            return pass(request.map(ApiBody::new), peer, &socket).await;
        }
        if request.method() != Method::POST || grpc::is_call(&request) {
            return self.answer_call(request.map(ApiBody::new), peer).await;
        }
        // Kept for the one who may take over while it waits.
        let (head, body) = request.into_parts();
        let body = axum::body::to_bytes(ApiBody::new(body), LONGEST_CALL).await;
        let Ok(body) = body else {
            let limit = u64::try_from(LONGEST_CALL).unwrap_or(u64::MAX);
            return Fault::BodyTooLarge(Bytes(limit)).response(ApiBody::from);
        };
        let again = Request::from_parts(head.clone(), ApiBody::from(body.clone()));
        let request = Request::from_parts(head, ApiBody::from(body));
        let answer = self.answer_call(request, peer).await;
        if answer.status() != StatusCode::SERVICE_UNAVAILABLE {
            return answer;
        }
        let open = doors.wait_for(|doors| !matches!(doors, Doors::Shut)).await;
        match open.ok().and_then(|doors| doors.moved()) {
            Some(socket) => pass(again, peer, &socket).await,
            None => answer,
        }
    }

    async fn answer_call(
        &self,
        mut request: Request<ApiBody>,
        peer: PeerAddr,
    ) -> Response<ApiBody> {
        request.extensions_mut().insert(peer);
        let answer = self.api.clone().oneshot(request).await;
        answer.unwrap_or_else(|never| match never {})
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
