//! Connections to one worker.
//!
//! The pool belongs to the worker: when the worker is about to end, its idle
//! connections are closed at once (llama-server does not end on SIGTERM while
//! a client is connected and waits), and none is kept any more.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::hearing::Hearing;
use super::upload::RequestBody;
use crate::control::{Opened, ReadyWorker, Stream};
use crate::model::Upstream;
use crate::telemetry;

/// Idle connections kept for one worker; more than engines serve at once.
const MOST_IDLE: usize = 64;

/// A connection to a worker, for one request at a time.
pub(super) type Sender = SendRequest<RequestBody>;

/// The pools of all workers, by the worker's serial.
#[derive(Debug, Default)]
pub(super) struct Pools(RwLock<HashMap<u64, Arc<Pool>>>);

impl Pools {
    /// Returns the worker's pool, making it at first use. It goes when the
    /// worker does.
    pub(super) fn of(self: &Arc<Self>, worker: &ReadyWorker) -> Arc<Pool> {
        let read = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = read.get(&worker.serial) {
            return Arc::clone(pool);
        }
        drop(read);
        let mut write = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let pool = write.entry(worker.serial).or_insert_with(|| {
            let (pools, closing, serial) =
                (Arc::clone(self), worker.closing.clone(), worker.serial);
            telemetry::spawn("pool", async move {
                closing.cancelled().await;
                pools.close(serial);
            });
            Arc::new(Pool::new(worker))
        });
        Arc::clone(pool)
    }

    fn close(&self, serial: u64) {
        let pool = self
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&serial);
        if let Some(pool) = pool {
            let mut state = pool.lock();
            state.closed = true;
            state.idle.clear();
        }
    }
}

/// One worker's connections.
#[derive(Debug)]
pub(super) struct Pool {
    upstream: Upstream,
    opened: Opened,
    closing: CancellationToken,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Sender>,
    closed: bool,
}

impl Pool {
    fn new(worker: &ReadyWorker) -> Self {
        Self {
            upstream: worker.upstream.clone(),
            opened: worker.opened.clone(),
            closing: worker.closing.clone(),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection that need not be opened: the one that was used last
    /// and still lives, else the one on which the worker first answered.
    pub(super) async fn kept(&self) -> Option<Sender> {
        match self.take() {
            Some(sender) => Some(sender),
            None => self.opened().await,
        }
    }

    fn take(&self) -> Option<Sender> {
        let mut state = self.lock();
        while let Some(sender) = state.idle.pop() {
            if sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    async fn opened(&self) -> Option<Sender> {
        greet(self.opened.take()?).await.ok()
    }

    /// Keeps a connection whose answer has ended for the next request, as soon
    /// as it can take one: the request's body may still be on its way.
    pub(super) fn put(self: &Arc<Self>, mut sender: Sender) {
        if sender.is_ready() {
            return self.keep(sender);
        }
        if sender.is_closed() {
            return;
        }
        let pool = Arc::clone(self);
        telemetry::spawn("kept", async move {
            let ready = pool.closing.run_until_cancelled(sender.ready()).await;
            if let Some(Ok(())) = ready {
                pool.keep(sender);
            }
        });
    }

    fn keep(&self, sender: Sender) {
        let mut state = self.lock();
        if !state.closed && state.idle.len() < MOST_IDLE {
            state.idle.push(sender);
        }
    }

    /// Opens a new connection.
    pub(super) async fn connect(&self) -> io::Result<Sender> {
        // Nobody needs it any more, and it may keep a worker with one thread
        // from hearing us.
        self.opened.close();
        greet(Stream::connect(&self.upstream).await?).await
    }
}

async fn greet(stream: Stream) -> io::Result<Sender> {
    match stream {
        Stream::Tcp(stream) => handshake(TokioIo::new(stream)).await,
        Stream::Unix(stream) => handshake(TokioIo::new(stream)).await,
    }
}

async fn handshake<I>(io: TokioIo<I>) -> io::Result<Sender>
where
    TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    I: Send + 'static,
{
    let (sender, connection) = http1::handshake(Hearing(io))
        .await
        .map_err(io::Error::other)?;
    telemetry::spawn("upstream", async move {
        if let Err(error) = connection.with_upgrades().await {
            debug!(%error, "a connection to a worker ended early");
        }
    });
    Ok(sender)
}
