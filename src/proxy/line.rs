//! A connection to a worker over HTTP/2, which several calls share.
//!
//! One connection for many calls costs far less than one for each: what they have to
//! say goes out together. Calls that share one must not hold each other up, so none of
//! them can use up what they share. Towards the worker that is 65,535 bytes on their
//! way (RFC 9113, 6.9.2) until it takes more: a call that is not small has its line
//! alone. From the worker each has a window of its own, and that of the line is as
//! large as all of them. One whose client is gone is called off by a reset, and workers
//! end lines with many of those, so its line takes no other call.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::debug;

use super::upload::RequestBody;
use crate::telemetry;

/// Calls on one line at most.
const MOST: u16 = 8;
/// Bytes of a body that is small.
const SMALL: u64 = 65_535 / MOST as u64;
/// Bytes of an answer that a worker may send before its client has read them.
const WINDOW: u32 = 256 << 10;

/// What a call needs of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// One of its places.
    Place,
    /// All of it.
    Alone,
}

impl Share {
    /// Returns what a call needs whose body is here and has so many bytes.
    pub(super) const fn of(size: u64) -> Self {
        match size <= SMALL {
            true => Self::Place,
            false => Self::Alone,
        }
    }

    fn places(self) -> usize {
        match self {
            Self::Place => 1,
            Self::Alone => usize::from(MOST),
        }
    }
}

/// One that may take calls.
#[derive(Clone, Debug)]
pub(super) struct Line {
    requests: http2::SendRequest<RequestBody>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    /// Places that calls have now.
    taken: AtomicUsize,
    /// Calls that the worker lets be on it.
    most: AtomicUsize,
    /// A call did not end well on it.
    retired: AtomicBool,
    /// It is where calls look for one.
    kept: AtomicBool,
    /// Cancelled after all that hyper says of the calls it took.
    ended: CancellationToken,
}

impl Line {
    /// Speaks HTTP/2 without being asked whether it may, as gRPC does. Whoever opens
    /// it has it alone until it is kept.
    pub(super) async fn open<I>(io: TokioIo<I>) -> hyper::Result<Place>
    where
        TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
        I: Send + 'static,
    {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW * u32::from(MOST));
        let (requests, mut connection) = builder.handshake(io).await?;
        let state = Arc::new(State {
            taken: AtomicUsize::new(0),
            most: AtomicUsize::new(usize::from(MOST)),
            retired: AtomicBool::new(false),
            kept: AtomicBool::new(false),
            ended: CancellationToken::new(),
        });
        let shared = Arc::clone(&state);
        let connection = std::future::poll_fn(move |cx| {
            let ended = Pin::new(&mut connection).poll(cx);
            // It says so at any time.
            let most = connection.current_max_send_streams();
            shared.most.store(most, Ordering::Relaxed);
            ended
        });
        let end = state.ended.clone().drop_guard();
        telemetry::spawn_often("upstream", async move {
            // Goes after the connection, however that ends.
            let _end = end;
            if let Err(error) = connection.await {
                debug!(%error, "a connection to a worker ended early");
            }
        });
        Ok(Self { requests, state }.place(Share::Alone))
    }

    /// Returns a share of it, if there is room. For one caller at a time.
    pub(super) fn take(&self, share: Share) -> Option<Place> {
        let taken = self.state.taken.load(Ordering::Acquire);
        let most = self
            .state
            .most
            .load(Ordering::Relaxed)
            .min(usize::from(MOST));
        let fits = taken == 0 || taken + share.places() <= most;
        (fits && most > 0).then(|| self.clone().place(share))
    }

    fn place(self, share: Share) -> Place {
        self.state
            .taken
            .fetch_add(share.places(), Ordering::Relaxed);
        Place {
            ended: Box::pin(self.state.ended.clone().cancelled_owned()),
            line: self,
            share,
            is_good: false,
        }
    }

    /// Returns whether it takes calls still.
    pub(super) fn is_open(&self) -> bool {
        !self.requests.is_closed() && !self.state.retired.load(Ordering::Relaxed)
    }
}

/// A call's share of a line.
#[derive(Debug)]
pub(super) struct Place {
    line: Line,
    share: Share,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    /// The call ended well.
    is_good: bool,
}

impl Place {
    pub(super) fn requests(&mut self) -> &mut http2::SendRequest<RequestBody> {
        &mut self.line.requests
    }

    /// Polls for the end of the line.
    pub(super) fn poll_ended(&mut self, cx: &mut std::task::Context<'_>) -> Poll<()> {
        self.ended.as_mut().poll(cx)
    }

    /// Gives it back after a call that ended well. Returns the line if it is to be kept
    /// from now on.
    pub(super) fn give_back(mut self) -> Option<Line> {
        self.is_good = true;
        let is_new = self.line.is_open() && !self.line.state.kept.swap(true, Ordering::Relaxed);
        is_new.then(|| self.line.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let state = &self.line.state;
        if !self.is_good {
            state.retired.store(true, Ordering::Relaxed);
        }
        state
            .taken
            .fetch_sub(self.share.places(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::Response;
    use hyper::service::service_fn;

    use super::*;

    /// A line that is kept, to a worker that lets so many calls be on it.
    async fn line(calls: u32) -> Line {
        let (ours, theirs) = tokio::io::duplex(1 << 12);
        let answer = service_fn(async |_| {
            let yes = Full::new(Bytes::from_static(b"yes"));
            Ok::<_, std::convert::Infallible>(Response::new(yes))
        });
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.max_concurrent_streams(calls);
        let serving = builder.serve_connection(TokioIo::new(theirs), answer);
        drop(telemetry::spawn("test", serving));
        let place = Line::open(TokioIo::new(ours)).await;
        let line = place.expect("it speaks HTTP/2").give_back();
        let line = line.expect("it is new");
        while line.state.most.load(Ordering::Relaxed) != usize::try_from(calls).expect("few") {
            tokio::task::yield_now().await;
        }
        line
    }

    #[tokio::test]
    async fn small_calls_share_a_line_and_others_have_it_alone() {
        let line = line(100).await;
        let shares: Vec<_> = (0..MOST).map(|_| line.take(Share::Place)).collect();
        assert!(shares.iter().all(Option::is_some));
        assert!(line.take(Share::Place).is_none(), "there are eight places");
        for share in shares.into_iter().flatten() {
            assert!(share.give_back().is_none(), "it is kept already");
        }
        let alone = line.take(Share::of(SMALL + 1)).expect("nobody is there");
        assert!(line.take(Share::of(SMALL)).is_none());
        drop(alone.give_back());
        let small = line.take(Share::of(SMALL)).expect("nobody is there");
        assert!(line.take(Share::Alone).is_none());
        drop(small.give_back());
    }

    #[tokio::test]
    async fn no_more_calls_are_on_a_line_than_its_worker_lets() {
        let line = line(2).await;
        let two = [line.take(Share::Place), line.take(Share::Place)];
        assert!(two.iter().all(Option::is_some));
        assert!(line.take(Share::Place).is_none());
        two.into_iter()
            .flatten()
            .for_each(|place| drop(place.give_back()));
        assert!(line.take(Share::Alone).is_some(), "nobody is there");
    }

    #[tokio::test]
    async fn a_line_on_which_a_call_was_left_takes_no_other() {
        let line = line(100).await;
        let (left, stays) = (line.take(Share::Place), line.take(Share::Place));
        assert!(line.is_open());
        drop(left.expect("there is room"));
        assert!(!line.is_open());
        let stays = stays.expect("there is room");
        assert!(stays.give_back().is_none(), "it is not kept any more");
    }
}
