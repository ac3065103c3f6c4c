//! Connections to one worker.
//!
//! The pool belongs to the worker: when the worker is about to end, its idle
//! connections are closed at once (llama-server does not end on SIGTERM while
//! a client is connected and waits), and none is kept any more.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hyper::header::HeaderValue;
use hyper::http::uri::Authority;
use hyper_util::rt::TokioIo;

use super::headers;
use super::http1::{Connection, Standing};
use super::line::{Line, Place, Share};
use crate::control::{Opened, ReadyWorker, Stream};
use crate::model::Upstream;
use crate::telemetry;

/// Idle connections kept for one worker; more than engines serve at once.
const MOST_IDLE: usize = 64;

/// How a worker is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// As everybody does.
    Http1,
    /// As gRPC needs it: small calls share connections, see [`super::line`].
    Http2,
}

/// A connection to a worker, or a share of one, for one request at a time.
#[derive(Debug)]
pub(super) enum Sender {
    Http1(Connection),
    Http2(Place),
}

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
            state.lines.clear();
        }
    }
}

/// One worker's connections.
#[derive(Debug)]
pub(super) struct Pool {
    plain: Address,
    /// Of calls.
    calls: Address,
    opened: Opened,
    state: Mutex<State>,
}

/// Where a worker is asked, and what it is called there.
#[derive(Debug)]
struct Address {
    upstream: Upstream,
    host: HeaderValue,
    authority: Authority,
}

impl Address {
    fn new(upstream: &Upstream) -> Self {
        Self {
            upstream: upstream.clone(),
            host: headers::host(upstream),
            authority: upstream
                .host()
                .parse()
                .unwrap_or_else(|_| Authority::from_static("localhost")),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Connection>,
    /// Those of HTTP/2, which serve calls or wait for some.
    lines: Vec<Line>,
    closed: bool,
}

impl Pool {
    fn new(worker: &ReadyWorker) -> Self {
        Self {
            plain: Address::new(worker.address(false)),
            calls: Address::new(worker.address(true)),
            opened: worker.opened.clone(),
            state: Mutex::default(),
        }
    }

    fn address(&self, wire: Wire) -> &Address {
        match wire {
            Wire::Http1 => &self.plain,
            Wire::Http2 => &self.calls,
        }
    }

    /// Returns what the worker is called in `Host`.
    pub(super) fn host(&self) -> &HeaderValue {
        &self.plain.host
    }

    /// Returns what the worker is called in the address of a call.
    pub(super) fn authority(&self) -> &Authority {
        &self.calls.authority
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection that need not be opened: the one that was used last
    /// and still lives, else the one on which the worker first answered.
    pub(super) async fn kept(&self) -> Option<Sender> {
        match self.take() {
            Some(connection) => Some(Sender::Http1(connection)),
            // Boxed, since few need it and all would have room for it.
            None => Box::pin(self.opened()).await,
        }
    }

    /// One that was used on this thread if there is one: whoever wakes another thread
    /// pays for it.
    fn take(&self) -> Option<Connection> {
        let mut state = self.lock();
        let idle = &mut state.idle;
        let mut others = None;
        // Only those that are looked at are dropped when they have ended: there may be
        // many, and what an ended one holds is little.
        for at in (0..idle.len()).rev() {
            match idle[at].standing() {
                Standing::Ready if idle[at].is_here() => return Some(idle.remove(at)),
                Standing::Ready => others = others.or(Some(at)),
                Standing::Ended => {
                    drop(idle.remove(at));
                    others = others.map(|other: usize| other - 1);
                }
                Standing::Busy => {}
            }
        }
        let taken = others.map(|at| idle.remove(at));
        drop(state);
        taken?.moved_here().ok()
    }

    async fn opened(&self) -> Option<Sender> {
        let opened = self.opened.take()?.moved_here().ok()?;
        greet(opened, Wire::Http1).await.ok()
    }

    /// Takes a share of a connection of HTTP/2 that is there: of the first that has
    /// room, so that as few as may be are in use.
    pub(super) fn share(&self, share: Share) -> Option<Sender> {
        let mut state = self.lock();
        state.lines.retain(Line::is_open);
        let mut here = state.lines.iter().filter(|line| line.is_here());
        let place = here.find_map(|line| line.take(share));
        place.map(Sender::Http2)
    }

    /// Keeps a connection whose answer has ended for the next request; it is taken
    /// when it can take one, since the last request's body may still be on its way.
    pub(super) fn put(&self, sender: Sender) {
        let mut state = self.lock();
        match sender {
            Sender::Http1(connection) => {
                if state.closed {
                    return;
                }
                if state.idle.len() == MOST_IDLE {
                    state
                        .idle
                        .retain_mut(|idle| idle.standing() != Standing::Ended);
                }
                if state.idle.len() < MOST_IDLE {
                    state.idle.push(connection);
                }
            }
            Sender::Http2(place) => {
                let line = place.give_back();
                if state.closed {
                    return;
                }
                state.lines.extend(line);
                // More than that are kept only as long as they are in use.
                if state.lines.len() > MOST_IDLE {
                    state.lines.retain(Line::is_open);
                    let idle = state.lines.iter().filter(|line| line.is_idle());
                    let mut spare = idle.count().saturating_sub(MOST_IDLE);
                    state.lines.retain(|line| {
                        let goes = spare > 0 && line.is_idle();
                        spare -= usize::from(goes);
                        !goes
                    });
                }
            }
        }
    }

    /// Opens a new connection.
    pub(super) async fn connect(&self, wire: Wire) -> io::Result<Sender> {
        // Nobody needs it any more, and it may keep a worker with one thread
        // from hearing us.
        self.opened.close();
        greet(Stream::connect(&self.address(wire).upstream).await?, wire).await
    }
}

async fn greet(stream: Stream, wire: Wire) -> io::Result<Sender> {
    match (wire, stream) {
        (Wire::Http1, stream) => Ok(Sender::Http1(Connection::new(stream))),
        (Wire::Http2, Stream::Tcp(stream)) => open_line(TokioIo::new(stream)).await,
        (Wire::Http2, Stream::Unix(stream)) => open_line(TokioIo::new(stream)).await,
    }
}

async fn open_line<I>(io: TokioIo<I>) -> io::Result<Sender>
where
    TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    I: Send + 'static,
{
    let place = Line::open(io).await.map_err(io::Error::other)?;
    Ok(Sender::Http2(place))
}
