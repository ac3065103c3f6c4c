//! Binds addresses, takes connections, and serves each by the proxy or the API.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::Either;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::AppError;
use crate::api::PeerAddr;
use crate::config::Listen;
use crate::proxy::{Proxy, ProxyBody};
use crate::telemetry;

/// Longest time for a client to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Wait after an accept that failed, as it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound address.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Binds an address; the one that comes back has the port that the system gave.
pub(super) async fn bind(listen: &Listen) -> Result<(Listen, Listener), AppError> {
    let failed = |source: std::io::Error| {
        let address = address_text(listen);
        match source.kind() {
            std::io::ErrorKind::AddrInUse => AppError::Taken { address },
            _ => AppError::Listen { address, source },
        }
    };
    match listen {
        Listen::Tcp(address) => {
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?;
            Ok((Listen::Tcp(bound), Listener::Tcp(listener)))
        }
        Listen::Unix(path) => {
            remove_stale_socket(path).await.map_err(failed)?;
            let listener = UnixListener::bind(path).map_err(failed)?;
            Ok((Listen::Unix(path.clone()), Listener::Unix(listener)))
        }
    }
}

/// Shows an address as it is written in the configuration, `http://` before a
/// TCP one.
#[must_use]
pub fn address_text(listen: &Listen) -> String {
    match listen {
        Listen::Tcp(address) => format!("http://{address}"),
        Listen::Unix(path) => format!("unix:{}", path.display()),
    }
}

/// Takes away a socket file that nobody listens on; one that answers stays.
async fn remove_stale_socket(path: &PathBuf) -> std::io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    match tokio::net::UnixStream::connect(path).await {
        Ok(_) => Err(std::io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) => Err(error),
    }
}

/// What every connection is served with.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) proxy: Proxy,
    pub(super) api: axum::Router,
    pub(super) closing: CancellationToken,
    pub(super) connections: tokio_util::task::TaskTracker,
}

/// Takes connections until the server is closing.
pub(super) async fn listen(listener: Listener, server: Server) {
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
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

async fn accept(listener: &Listener) -> std::io::Result<(Stream, PeerAddr)> {
    match listener {
        Listener::Tcp(listener) => {
            let (stream, peer) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok((Stream::Tcp(stream), PeerAddr(Some(peer))))
        }
        Listener::Unix(listener) => {
            let (stream, _) = listener.accept().await?;
            Ok((Stream::Unix(stream), PeerAddr(None)))
        }
    }
}

type Body = Either<ProxyBody, axum::body::Body>;

impl Server {
    fn serve<I>(&self, io: TokioIo<I>, peer: PeerAddr)
    where
        TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
        I: Send + 'static,
    {
        let server = self.clone();
        let closing = self.closing.clone();
        let task = async move {
            let service = service_fn(move |request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.answer(request, peer).await) }
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

    async fn answer(&self, mut request: Request<Incoming>, peer: PeerAddr) -> Response<Body> {
        if Proxy::takes(request.uri().path()) {
            return self.proxy.handle(request, peer.0).await.map(Either::Left);
        }
        request.extensions_mut().insert(peer);
        let answer = self.api.clone().oneshot(request).await;
        answer
            .unwrap_or_else(|never| match never {})
            .map(Either::Right)
    }
}
