//! Calls of the API that still come to a residentd that has been replaced.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use axum::body::Body;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tracing::debug;

use crate::api::PeerAddr;
use crate::control::Refusal;
use crate::proxy::PEER;
use crate::reply::{Fault, Speech};
use crate::{grpc, telemetry};

/// What [`PEER`] says of a client on a Unix socket. It is believed on the socket
/// between the two only.
const UNIX: &str = "unix";

/// Sends a call to the residentd that listens at `socket`.
pub(in crate::app) async fn pass(
    mut request: Request<Body>,
    peer: PeerAddr,
    socket: &Path,
) -> Response<Body> {
    let speech = Speech::of(&request);
    let named = match peer.0 {
        Some(address) => HeaderValue::try_from(address.to_string()).ok(),
        None => Some(HeaderValue::from_static(UNIX)),
    };
    request.headers_mut().remove(PEER);
    request
        .headers_mut()
        .extend(named.map(|named| (PEER, named)));
    if !grpc::is_call(&request) {
        *request.version_mut() = Version::HTTP_11;
    }
    match send(request, socket).await {
        Ok(response) => response.map(Body::new),
        Err(error) => {
            debug!(error = %telemetry::chain(&*error), "a call is not passed on");
            speech.answer(&Fault::Refused(Refusal::ShuttingDown), |text| {
                match text.is_empty() {
                    true => Body::empty(),
                    false => text.into(),
                }
            })
        }
    }
}

/// Returns the client that the other residentd names; one that it does not name may
/// be anybody.
pub(in crate::app) fn named_peer(headers: &HeaderMap) -> PeerAddr {
    let named = headers.get(PEER).and_then(|peer| peer.to_str().ok());
    let anybody = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    PeerAddr(match named {
        Some(UNIX) => None,
        Some(address) => Some(address.parse().unwrap_or(anybody)),
        None => Some(anybody),
    })
}

async fn send(
    request: Request<Body>,
    socket: &Path,
) -> Result<Response<Incoming>, Box<dyn std::error::Error + Send + Sync>> {
    let stream = UnixStream::connect(socket).await?;
    if grpc::is_call(&request) {
        return call(request, stream).await;
    }
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    hold(connection);
    Ok(sender.send_request(request).await?)
}

/// Sends a call of gRPC, whose status comes in trailers.
async fn call(
    request: Request<Body>,
    stream: UnixStream,
) -> Result<Response<Incoming>, Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    hold(connection);
    Ok(sender.send_request(request).await?)
}

fn hold(connection: impl Future<Output = Result<(), hyper::Error>> + Send + 'static) {
    telemetry::spawn("passed", async move {
        if let Err(error) = connection.await {
            debug!(%error, "a connection to the new residentd ended early");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_named_counts_as_local() {
        let named = |peer: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.extend(peer.map(|peer| (PEER, HeaderValue::from_static(peer))));
            named_peer(&headers)
        };
        assert!(named(Some("unix")).is_local() && named(Some("127.0.0.1:5")).is_local());
        assert!(named(Some("[::1]:5")).is_local());
        for other in [
            None,
            Some(""),
            Some("x"),
            Some("192.168.1.1:5"),
            Some("UNIX"),
        ] {
            assert!(!named(other).is_local(), "{other:?}");
        }
    }
}
