//! Takes connections, and serves each by the proxy or the API.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Either;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::sockets::Listener;
use super::upgrade::{PEER, pass};
use crate::api::{self, PeerAddr};
use crate::grpc;
use crate::proxy::{Proxy, ProxyBody};
use crate::telemetry;

/// Longest time for a client to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Wait after an accept that failed, as it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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

/// Takes connections until the server is closing or another residentd has taken
/// over, and none while one is about to.
pub(super) async fn listen(listener: Listener, server: Server) {
    let mut doors = server.doors.clone();
    loop {
        let state = doors.borrow_and_update().clone();
        let accepted = match state {
            Doors::Moved(_) => return,
            Doors::Shut => None,
            Doors::Open => Some(accept(&listener)),
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
            Self::Handover => {
                let peer = headers.get(PEER).and_then(|peer| peer.to_str().ok());
                PeerAddr(peer.and_then(|peer| peer.parse().ok()))
            }
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

type Body = Either<ProxyBody, axum::body::Body>;

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
            // Before this, the one that was replaced has named the client to workers.
            let client = match origin {
                Origin::Client(_) => peer.0,
                Origin::Handover => None,
            };
            let mut response = self.proxy.handle(request, client).await;
            self.part(version, response.headers_mut());
            return response.map(Either::Left);
        }
        let mut response = self.call(request, peer).await;
        self.part(version, response.headers_mut());
        response.map(Either::Right)
    }

    /// Answers a call of the API: here, or by the residentd that has taken over.
    async fn call(
        &self,
        mut request: Request<Incoming>,
        peer: PeerAddr,
    ) -> Response<axum::body::Body> {
        let mut doors = self.doors.clone();
        let open = doors.wait_for(|doors| !matches!(doors, Doors::Shut)).await;
        let open = open.map(|doors| doors.clone());
        if let Ok(Doors::Moved(socket)) = open {
            return pass(request, peer, &socket).await;
        }
        request.extensions_mut().insert(peer);
        let answer = self.api.clone().oneshot(request).await;
        answer.unwrap_or_else(|never| match never {})
    }

    /// Has a client open another connection for its next request when another
    /// residentd has taken over.
    fn part(&self, version: Version, headers: &mut HeaderMap) {
        let has_moved = matches!(*self.doors.borrow(), Doors::Moved(_));
        if has_moved && version < Version::HTTP_2 && !headers.contains_key(UPGRADE) {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
}
