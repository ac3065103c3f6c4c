//! Connections that left HTTP, as a websocket does: bytes are copied both
//! ways until either side closes.

use std::time::Duration;

use hyper::Response;
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::account::Account;
use super::body::ProxyBody;
use crate::control::Lease;
use crate::telemetry;

/// How long the other side may still speak after one has closed.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Passes the worker's 101 on and copies from then on. The lease is held as
/// long.
pub(super) fn switch(
    mut response: Response<Incoming>,
    client: OnUpgrade,
    mut account: Account,
    lease: Lease,
) -> Response<ProxyBody> {
    let worker = hyper::upgrade::on(&mut response);
    telemetry::spawn("upgraded", async move {
        let _held = lease;
        // Without both sides there is nothing to copy: one left just now.
        let Ok((client, worker)) = both(client, worker).await else {
            return account.broke();
        };
        match copy_until_closed(client, worker).await {
            Ok(back) => {
                account.passed(usize::try_from(back).unwrap_or(usize::MAX));
                account.finish();
            }
            Err(_) => account.broke(),
        }
    });
    let (mut head, _) = response.into_parts();
    head.extensions.clear();
    Response::from_parts(head, ProxyBody::empty())
}

async fn both(client: OnUpgrade, worker: OnUpgrade) -> hyper::Result<(Upgraded, Upgraded)> {
    Ok((client.await?, worker.await?))
}

/// Returns the number of bytes that went to the client.
async fn copy_until_closed(client: Upgraded, worker: Upgraded) -> std::io::Result<u64> {
    let (from_client, to_client) = tokio::io::split(TokioIo::new(client));
    let (from_worker, to_worker) = tokio::io::split(TokioIo::new(worker));
    let up = copy(from_client, to_worker);
    let down = copy(from_worker, to_client);
    tokio::pin!(up, down);
    tokio::select! {
        sent = &mut up => {
            sent?;
            // A worker that says nothing more in time is left.
            tokio::time::timeout(LAST_WORDS, down).await.unwrap_or(Ok(0))
        }
        back = &mut down => {
            let back = back?;
            match tokio::time::timeout(LAST_WORDS, up).await {
                Ok(Err(error)) => Err(error),
                Ok(Ok(_)) | Err(_) => Ok(back),
            }
        }
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> std::io::Result<u64> {
    let copied = tokio::io::copy(&mut from, &mut to).await?;
    to.shutdown().await?;
    Ok(copied)
}
