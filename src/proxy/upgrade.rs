//! Connections that left HTTP, as a websocket does: bytes are copied both
//! ways until either side closes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::Response;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::account::Account;
use super::answer::Answer;
use super::body::ProxyBody;
use crate::control::Lease;
use crate::telemetry;

/// How long the other side may still speak after one has closed.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Bytes that are on their way in one direction at most.
const BUFFER: usize = 8 << 10;

/// Passes the worker's 101 on and copies from then on. The lease is held as
/// long.
pub(super) fn switch(
    response: Response<Answer>,
    client: OnUpgrade,
    mut account: Account,
    lease: Lease,
) -> Response<ProxyBody> {
    let (head, worker) = response.into_parts();
    telemetry::spawn("upgraded", async move {
        let _held = lease;
        let Answer::Http1(worker) = worker else {
            return account.broke();
        };
        // Without both sides there is nothing to copy: one left just now.
        let (Some(worker), Ok(client)) = (worker.leave_http(), client.await) else {
            return account.broke();
        };
        let counts = Counts::default();
        let ended = copy_until_closed(client, worker, &counts).await;
        let (up, down) = (&counts.from_client, &counts.to_client);
        account.exchanged(up.load(Ordering::Relaxed), down.load(Ordering::Relaxed));
        match ended {
            Ok(()) => account.finish(),
            Err(_) => account.broke(),
        }
    });
    Response::from_parts(head, ProxyBody::empty())
}

/// Bytes that passed.
#[derive(Debug, Default)]
struct Counts {
    from_client: AtomicU64,
    to_client: AtomicU64,
}

async fn copy_until_closed(
    client: Upgraded,
    (from_worker, to_worker): (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    counts: &Counts,
) -> std::io::Result<()> {
    let (from_client, to_client) = tokio::io::split(TokioIo::new(client));
    let up = copy(from_client, to_worker, &counts.from_client);
    let down = copy(from_worker, to_client, &counts.to_client);
    tokio::pin!(up, down);
    tokio::select! {
        sent = &mut up => {
            sent?;
            // A worker that says nothing more in time is left.
            tokio::time::timeout(LAST_WORDS, down).await.unwrap_or(Ok(()))
        }
        back = &mut down => {
            back?;
            match tokio::time::timeout(LAST_WORDS, up).await {
                Ok(ended) => ended,
                Err(_) => Ok(()),
            }
        }
    }
}

/// Copies to the end, and counts on the way: the other direction may end it.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    count: &AtomicU64,
) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
        // What is encrypted may be kept back otherwise.
        to.flush().await?;
        count.fetch_add(u64::try_from(read).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}
