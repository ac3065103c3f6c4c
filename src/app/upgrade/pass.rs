//! Calls of the API that still come to a residentd that has been replaced.

use std::path::Path;

use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tracing::debug;

use crate::api::PeerAddr;
use crate::control::Refusal;
use crate::grpc;
use crate::reply::{Fault, Speech};
use crate::telemetry;

/// Names the client on the way from one residentd to the other. Believed on the
/// socket between them only.
pub(in crate::app) const PEER: HeaderName = HeaderName::from_static("x-residentd-peer");

/// Sends a call to the residentd that listens at `socket`.
pub(in crate::app) async fn pass(
    mut request: Request<Incoming>,
    peer: PeerAddr,
    socket: &Path,
) -> Response<axum::body::Body> {
    let speech = Speech::of(&request);
    request.headers_mut().remove(PEER);
    if let PeerAddr(Some(peer)) = peer
        && let Ok(peer) = HeaderValue::try_from(peer.to_string())
    {
        request.headers_mut().insert(PEER, peer);
    }
    if !grpc::is_call(&request) {
        *request.version_mut() = Version::HTTP_11;
    }
    match send(request, socket).await {
        Ok(response) => response.map(axum::body::Body::new),
        Err(error) => {
            debug!(error = %telemetry::chain(&*error), "a call is not passed on");
            speech.answer(&Fault::Refused(Refusal::ShuttingDown), |text| {
                match text.is_empty() {
                    true => axum::body::Body::empty(),
                    false => text.into(),
                }
            })
        }
    }
}

async fn send(
    request: Request<Incoming>,
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
    request: Request<Incoming>,
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
