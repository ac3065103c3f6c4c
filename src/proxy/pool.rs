//! Connections to one worker.
//!
//! The pool belongs to the worker: when the worker is about to end, its idle
//! connections are closed at once (llama-server does not end on SIGTERM while
//! a client is connected and waits), and none is kept any more.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::Either;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1};
use hyper::header::HeaderValue;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;

use super::headers;
use super::hearing::Hearing;
use super::line::{self, Line, Place, Share};
use super::upload::RequestBody;
use crate::control::{Opened, ReadyWorker, Stream};
use crate::model::Upstream;
use crate::telemetry;

/// Idle connections kept for one worker; more than engines serve at once.
const MOST_IDLE: usize = 64;
/// How long an answer that came over HTTP/2 may take from the end of its
/// connection to whoever waits for it.
const LAST_WORD: Duration = Duration::from_secs(1);

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
    Http1(Single),
    Http2(Place),
}

/// A connection of HTTP/1.
#[derive(Debug)]
pub(super) struct Single {
    requests: http1::SendRequest<RequestBody>,
    /// Tells when the connection has ended, after all that hyper says of the
    /// requests it took.
    ended: oneshot::Receiver<Infallible>,
}

/// What hyper says of a request.
type Answer = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>;

/// Why a request has no answer.
#[derive(Debug)]
pub(super) struct Unanswered {
    /// Whether nothing of it was written.
    pub(super) unsent: bool,
    /// What hyper says; nothing of a request that it forgot.
    pub(super) error: Option<hyper::Error>,
}

impl From<TrySendError<Request<RequestBody>>> for Unanswered {
    fn from(failed: TrySendError<Request<RequestBody>>) -> Self {
        Self {
            unsent: failed.message().is_some(),
            error: Some(failed.into_error()),
        }
    }
}

impl Sender {
    /// Hands a request over at once, and waits for the head of its answer.
    ///
    /// A request that is handed over in the very moment in which the connection
    /// ends may stay where nobody looks any more, in hyper's channel to it: some
    /// in 100,000 that meet such an end do. So it is not waited for beyond that.
    pub(super) fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, Unanswered>> {
        let answer = match self {
            Self::Http1(single) => Either::Left(single.requests.try_send_request(request)),
            Self::Http2(place) => Either::Right(place.requests().try_send_request(request)),
        };
        // In a room of its own, since it has place for a request that comes back.
        self.answered(Box::pin(answer))
    }

    async fn answered(
        &mut self,
        mut answer: Pin<Box<impl Future<Output = Answer>>>,
    ) -> Result<Response<Incoming>, Unanswered> {
        // Not kept in a variable, for which there would have to be room below.
        if let Some(answered) = tokio::select! {
            biased;
            answered = &mut answer => Some(answered),
            () = poll_fn(|cx| self.poll_ended(cx)) => None,
        } {
            return answered.map_err(Unanswered::from);
        }
        // What hyper had to say of HTTP/1 it has said by now; of HTTP/2 other tasks
        // of its own may be about to.
        let wire = self.wire();
        let last = match wire {
            Wire::Http1 => answer.now_or_never(),
            Wire::Http2 => Box::pin(tokio::time::timeout(LAST_WORD, answer)).await.ok(),
        };
        let forgotten = Unanswered {
            unsent: wire == Wire::Http1,
            error: None,
        };
        last.ok_or(forgotten)?.map_err(Unanswered::from)
    }

    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Http1(single) => Pin::new(&mut single.ended).poll(cx).map(drop),
            Self::Http2(place) => place.poll_ended(cx),
        }
    }

    fn wire(&self) -> Wire {
        match self {
            Self::Http1(_) => Wire::Http1,
            Self::Http2(_) => Wire::Http2,
        }
    }
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
}

impl Address {
    fn new(upstream: &Upstream) -> Self {
        Self {
            upstream: upstream.clone(),
            host: headers::host(upstream),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Single>,
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
    pub(super) fn host(&self, wire: Wire) -> HeaderValue {
        self.address(wire).host.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection that need not be opened: the one that was used last
    /// and still lives, else the one on which the worker first answered.
    pub(super) async fn kept(&self) -> Option<Sender> {
        match self.take() {
            Some(single) => Some(Sender::Http1(single)),
            // Boxed, since few need it and all would have room for it.
            None => Box::pin(self.opened()).await,
        }
    }

    fn take(&self) -> Option<Single> {
        let mut state = self.lock();
        let idle = &mut state.idle;
        // Only those that are looked at are dropped when they have ended: there may be
        // many, and what an ended one holds is little.
        for at in (0..idle.len()).rev() {
            let requests = &idle[at].requests;
            if requests.is_closed() {
                idle.remove(at);
            } else if requests.is_ready() {
                return Some(idle.remove(at));
            }
            // Else its last request's body is on the way.
        }
        None
    }

    async fn opened(&self) -> Option<Sender> {
        greet(self.opened.take()?, Wire::Http1).await.ok()
    }

    /// Takes a share of a connection of HTTP/2 that is there: of the first that has
    /// room, so that as few as may be are in use.
    pub(super) fn share(&self, share: Share) -> Option<Sender> {
        let mut state = self.lock();
        state.lines.retain(Line::is_open);
        let place = state.lines.iter().find_map(|line| line.take(share));
        place.map(Sender::Http2)
    }

    /// Keeps a connection whose answer has ended for the next request; it is taken
    /// when it can take one, since the last request's body may still be on its way.
    pub(super) fn put(&self, sender: Sender) {
        let mut state = self.lock();
        match sender {
            Sender::Http1(single) => {
                if state.closed || single.requests.is_closed() {
                    return;
                }
                if state.idle.len() == MOST_IDLE {
                    state.idle.retain(|single| !single.requests.is_closed());
                }
                if state.idle.len() < MOST_IDLE {
                    state.idle.push(single);
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
    match (stream, wire) {
        (Stream::Tcp(stream), Wire::Http1) => handshake(TokioIo::new(stream)).await,
        (Stream::Unix(stream), Wire::Http1) => handshake(TokioIo::new(stream)).await,
        (Stream::Tcp(stream), Wire::Http2) => open_line(TokioIo::new(stream)).await,
        (Stream::Unix(stream), Wire::Http2) => open_line(TokioIo::new(stream)).await,
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

async fn handshake<I>(io: TokioIo<I>) -> io::Result<Sender>
where
    TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    I: Send + 'static,
{
    let (requests, connection) = http1::handshake(Hearing(io))
        .await
        .map_err(io::Error::other)?;
    let (end, ended) = oneshot::channel();
    line::drive(connection.with_upgrades(), end);
    Ok(Sender::Http1(Single { requests, ended }))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::pin::pin;

    use super::*;
    use crate::model::Bytes;

    #[tokio::test(start_paused = true)]
    async fn a_request_that_hyper_forgot_is_not_waited_for() {
        // Chaos found it: a client waited for ever.
        let (ours, _theirs) = tokio::io::duplex(1 << 10);
        let (requests, connection) = http1::handshake(TokioIo::new(ours))
            .await
            .expect("a connection");
        let (end, ended) = oneshot::channel();
        let mut sender = Sender::Http1(Single { requests, ended });
        // Never polled and never dropped: so it is with one that came too late.
        let _connection = connection;
        let body = RequestBody::new(VecDeque::new(), None, Bytes::mib(1), None);
        let mut sent = pin!(sender.send(Request::new(body)));
        let soon = tokio::time::timeout(Duration::from_secs(60), &mut sent);
        assert!(soon.await.is_err(), "it may be answered yet");
        drop(end);
        let failed = sent.await.expect_err("there is no answer");
        assert!(failed.unsent && failed.error.is_none(), "{failed:?}");
    }
}
