//! Takes connections and speaks HTTP/1.1 on them, or HTTP/2 with whoever begins
//! with it over TCP.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::answer::{BrokenOff, ResetFlag};
use crate::args::Args;
use crate::state::Stub;
use crate::{routes, rpc};

/// Rest after a failed accept: the process is out of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(10);

/// Where the worker listens.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection just taken.
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    /// Binds and listens. A socket file that was left behind is replaced.
    ///
    /// # Errors
    /// When the address is taken or not ours.
    pub(crate) async fn bind(args: &Args) -> io::Result<Self> {
        let Some(path) = &args.socket else {
            return Ok(Self::Tcp(TcpListener::bind((args.host, args.port)).await?));
        };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(Self::Unix(UnixListener::bind(path)?)),
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Socket::Unix(listener.accept().await?.0)),
        }
    }

    /// Returns the address as people write it.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|error| error.to_string(), |address| address.to_string()),
            Self::Unix(listener) => listener
                .local_addr()
                .ok()
                .and_then(|address| Some(format!("unix:{}", address.as_pathname()?.display())))
                .unwrap_or_default(),
        }
    }
}

/// Takes calls of gRPC on a port of their own until the worker ends; for ever when
/// it has no such port.
pub(crate) async fn serve_calls(stub: &Arc<Stub>) -> io::Result<()> {
    let Some(port) = stub.args.grpc_port else {
        return std::future::pending().await;
    };
    let listener = TcpListener::bind((stub.args.host, port)).await?;
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                connections.spawn(converse2(Arc::clone(stub), accepted?.0));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves until the worker is closing, then until the last connection ends.
pub(crate) async fn serve(stub: &Arc<Stub>, listener: Listener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(Socket::Tcp(stream)) => {
                    let stub = Arc::clone(stub);
                    connections.spawn(async move {
                        match begins_http2(&stream).await {
                            true if stub.args.grpc_port.is_some() => {}
                            true => converse2(stub, stream).await,
                            false => converse(stub, stream).await,
                        }
                    });
                }
                Ok(Socket::Unix(stream)) => {
                    connections.spawn(converse(Arc::clone(stub), stream));
                }
                Err(_) => sleep(ACCEPT_REST).await,
            },
            Some(_) = connections.join_next() => {}
            () = stub.closing.cancelled() => break,
            () = stub.answered(stub.args.close_after_requests) => {
                drop((listener, connections));
                return std::future::pending().await;
            }
            () = stub.answered(stub.args.mute_after_requests) => {
                drop(connections);
                return never_answer(&listener).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Takes every connection and says nothing on it.
async fn never_answer(listener: &Listener) {
    let mut taken = Vec::new();
    loop {
        match listener.accept().await {
            Ok(socket) => taken.push(socket),
            Err(_) => sleep(ACCEPT_REST).await,
        }
    }
}

/// Whether the client begins with HTTP/2: no method of HTTP/1.1 begins so.
async fn begins_http2(stream: &TcpStream) -> bool {
    let mut first = [0; 3];
    loop {
        match stream.peek(&mut first).await {
            Ok(3) => return first == *b"PRI",
            Ok(1..) => sleep(Duration::from_millis(1)).await,
            Ok(0) | Err(_) => return false,
        }
    }
}

/// Answers the requests and calls of one connection of HTTP/2.
async fn converse2(stub: Arc<Stub>, stream: TcpStream) {
    stub.count_connection();
    let closing = stub.closing.clone();
    let service = service_fn(|request: Request<Incoming>| {
        let (stub, reset) = (Arc::clone(&stub), ResetFlag::default());
        Box::pin(async move {
            let kind = request.headers().get(CONTENT_TYPE);
            match kind.is_some_and(|kind| kind == "application/grpc") {
                true => Ok(rpc::answer(&stub, request)),
                false => routes::answer(stub, request, reset).await,
            }
        })
    });
    let connection =
        http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    // An error here is a client that left.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

/// Answers the requests of one connection, then closes it or resets it.
async fn converse<S>(stub: Arc<Stub>, stream: S)
where
    S: Reset + AsyncRead + AsyncWrite + Unpin,
{
    stub.count_connection();
    let reset = ResetFlag::default();
    let upgraded = AtomicBool::new(false);
    let service = service_fn(|request| {
        let answer = routes::answer(Arc::clone(&stub), request, Arc::clone(&reset));
        let upgraded = &upgraded;
        Box::pin(async move {
            let answer = answer.await?;
            let leaves = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
            upgraded.store(leaves, Ordering::Relaxed);
            Ok::<_, BrokenOff>(answer)
        })
    });
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // An error here is a client that left or an answer broken off; the books
    // of the request have it already.
    let _ = poll_fn(|cx| connection.poll_without_shutdown(cx)).await;
    let parts = connection.into_parts();
    if reset.load(Ordering::Relaxed) {
        parts.io.into_inner().reset();
    } else if upgraded.load(Ordering::Relaxed) {
        echo(parts.io.into_inner(), &parts.read_buf).await;
    }
}

/// Sends back what comes, until the other side ends.
async fn echo<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, first: &[u8]) {
    let mut piece = vec![0_u8; 16 << 10];
    // Whoever leaves in between has had enough.
    let _ = stream.write_all(first).await;
    while let Ok(read @ 1..) = stream.read(&mut piece).await {
        if stream.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}

/// A stream that can end without a farewell.
trait Reset {
    /// Closes at once; over TCP the other side gets a reset.
    fn reset(self);
}

impl Reset for TcpStream {
    fn reset(self) {
        // Without it the close is a plain one, which the test will see.
        let _ = self.set_zero_linger();
    }
}

impl Reset for UnixStream {
    fn reset(self) {}
}
