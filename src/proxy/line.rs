//! A connection to a worker over HTTP/2, which several calls share.
//!
//! One connection for many calls costs far less than one for each: what they have to
//! say goes out together. Calls that share one must not hold each other up, so none of
//! them can use up what they share. Towards the worker that is 65,535 bytes on their
//! way (RFC 9113, 6.9.2) until it takes more: a call that is not small has its line
//! alone. From the worker each has a window of its own, and that of the line is as
//! large as all of them. One whose client is gone is called off by a reset, and workers
//! end lines with many of those, so its line takes no other call.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http2};
use hyper::rt::Executor;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tracing::debug;

use super::answer::{Answer, Failed};
use super::upload::{self, RequestBody};
use crate::gate::Home;
use crate::telemetry;

/// How long an answer may take from the end of its line to whoever waits for it.
const LAST_WORD: Duration = Duration::from_secs(1);
/// Calls on one line at most.
const MOST: u16 = 8;
/// Bytes of a body that is small: eight times as many and longer names fit.
const SMALL: u64 = 8_000;
/// Bytes of an answer that a worker may send before its client has read them.
const WINDOW: u32 = 256 << 10;

/// What a call needs of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// One of its places.
    One,
    /// All of them.
    All,
}

impl Share {
    /// Returns what a call needs whose body is here and has so many bytes.
    pub(super) const fn of(size: u64) -> Self {
        match size <= SMALL {
            true => Self::One,
            false => Self::All,
        }
    }

    fn places(self) -> usize {
        match self {
            Self::One => 1,
            Self::All => usize::from(MOST),
        }
    }
}

/// One that may take calls.
#[derive(Clone, Debug)]
pub(super) struct Line(Arc<State>);

#[derive(Debug)]
struct State {
    /// Gone when no more calls are to come: so the line ends with its last one.
    requests: Mutex<Option<http2::SendRequest<RequestBody>>>,
    /// Places that calls have now.
    taken: AtomicUsize,
    /// Calls that the worker lets be on it.
    most: AtomicUsize,
    /// It is where calls look for one.
    kept: AtomicBool,
    /// Where its runtime is.
    home: Home,
    /// Cancelled after all that hyper says of the calls it took.
    ended: CancellationToken,
}

/// Spawns hyper's tasks. A line has ended when none of them is left: the one that
/// takes requests ends before those that are answered still when a worker says that
/// it takes no more.
#[derive(Clone)]
struct Tasks(Arc<DropGuard>);

impl<F> Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        let guard = Arc::clone(&self.0);
        TokioExecutor::new().execute(async move {
            task.await;
            drop(guard);
        });
    }
}

impl Line {
    /// Speaks HTTP/2 without being asked whether it may, as gRPC does. Whoever opens
    /// it has it alone until it is kept.
    pub(super) async fn open<I>(io: TokioIo<I>) -> hyper::Result<Place>
    where
        TokioIo<I>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
        I: Send + 'static,
    {
        let ended = CancellationToken::new();
        let tasks = Tasks(Arc::new(ended.clone().drop_guard()));
        let mut builder = http2::Builder::new(tasks.clone());
        builder
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW * u32::from(MOST));
        let (requests, mut connection) = builder.handshake(io).await?;
        let line = Self(Arc::new(State {
            requests: Mutex::new(Some(requests.clone())),
            taken: AtomicUsize::new(0),
            most: AtomicUsize::new(usize::from(MOST)),
            kept: AtomicBool::new(false),
            home: Home::here(),
            ended,
        }));
        let shared = Arc::clone(&line.0);
        let connection = poll_fn(move |cx| {
            let ended = Pin::new(&mut connection).poll(cx);
            // It says so at any time.
            let most = connection.current_max_send_streams();
            shared.most.store(most, Ordering::Relaxed);
            ended
        });
        telemetry::spawn_often("upstream", async move {
            let _tasks = tasks;
            if let Err(error) = connection.await {
                debug!(%error, "a connection to a worker ended early");
            }
        });
        Ok(line.place(Share::All, requests))
    }

    /// Returns a share of it, if there is room. For one caller at a time.
    pub(super) fn take(&self, share: Share) -> Option<Place> {
        let taken = self.0.taken.load(Ordering::Acquire);
        let most = self.0.most.load(Ordering::Relaxed);
        let most = most.min(usize::from(MOST));
        let fits = taken == 0 || taken + share.places() <= most;
        if !fits || most == 0 {
            return None;
        }
        let requests = self.requests().clone()?;
        Some(self.place(share, requests))
    }

    fn place(&self, share: Share, requests: http2::SendRequest<RequestBody>) -> Place {
        self.0.taken.fetch_add(share.places(), Ordering::Relaxed);
        Place {
            ended: Box::pin(self.0.ended.clone().cancelled_owned()),
            line: self.clone(),
            requests,
            share,
            is_good: false,
        }
    }

    fn requests(&self) -> MutexGuard<'_, Option<http2::SendRequest<RequestBody>>> {
        let requests = self.0.requests.lock();
        requests.unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether it takes calls still.
    pub(super) fn is_open(&self) -> bool {
        let requests = self.requests();
        requests.as_ref().is_some_and(|open| !open.is_closed())
    }

    /// Returns whether it was opened on this thread.
    pub(super) fn is_here(&self) -> bool {
        self.0.home == Home::here()
    }

    /// Returns whether no call is on it.
    pub(super) fn is_idle(&self) -> bool {
        self.0.taken.load(Ordering::Acquire) == 0
    }
}

/// What hyper says of a call.
type Sent = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>;

/// A call's share of a line.
#[derive(Debug)]
pub(super) struct Place {
    line: Line,
    requests: http2::SendRequest<RequestBody>,
    share: Share,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    /// The call ended well.
    is_good: bool,
}

impl Place {
    /// Hands a call over at once, and waits for the head of its answer.
    ///
    /// A call that is handed over in the very moment in which the line ends may stay
    /// where nobody looks any more, in hyper's channel to it: some in 100,000 that meet
    /// such an end do. So it is not waited for beyond that.
    pub(super) fn ask(
        mut self,
        call: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<Answer>, Failed>> + use<> {
        // In a room of its own, since it has place for a call that comes back.
        let answer = Box::pin(self.requests.try_send_request(call));
        self.answered(answer)
    }

    async fn answered(
        mut self,
        mut answer: Pin<Box<impl Future<Output = Sent>>>,
    ) -> Result<Response<Answer>, Failed> {
        let mut answered = tokio::select! {
            biased;
            answered = &mut answer => Some(answered),
            () = &mut self.ended => None,
        };
        if answered.is_none() {
            // What hyper has to say other tasks of its own may be about to.
            let last = Box::pin(tokio::time::timeout(LAST_WORD, answer));
            answered = last.await.ok();
        }
        match answered {
            None => Err(Failed::Broke("the connection has ended".into())),
            Some(Err(failed)) => Err(failure(failed)),
            Some(Ok(response)) => Ok(response.map(|body| Answer::Http2(body, Some(self)))),
        }
    }

    /// Gives it back after a call that ended well. Returns the line if it is to be kept
    /// from now on.
    pub(super) fn give_back(mut self) -> Option<Line> {
        self.is_good = true;
        let is_new = self.line.is_open() && !self.line.0.kept.swap(true, Ordering::Relaxed);
        is_new.then(|| self.line.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_good {
            self.line.requests().take();
        }
        let places = self.share.places();
        self.line.0.taken.fetch_sub(places, Ordering::Release);
    }
}

fn failure(failed: TrySendError<Request<RequestBody>>) -> Failed {
    let unsent = failed.message().is_some();
    let error = failed.into_error();
    let cause = telemetry::chain(&error).to_string();
    match upload::fault_in(&error) {
        Some(fault) => Failed::Refused(fault),
        None if unsent => Failed::Unsent(cause),
        None => Failed::Broke(cause),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::Duration;

    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::service::service_fn;
    use hyper::{Request, Response};

    use super::*;
    use crate::model::Bytes as Size;

    /// How long the worker takes for an answer.
    const TAKES: Duration = Duration::from_secs(20);

    /// A line that is kept, to a worker that lets so many calls be on it, until it is
    /// told to end.
    async fn line(calls: u32) -> (Line, CancellationToken) {
        let (ours, theirs) = tokio::io::duplex(1 << 12);
        let answer = service_fn(async |_| {
            tokio::time::sleep(TAKES).await;
            let yes = Full::new(Bytes::from_static(b"yes"));
            Ok::<_, std::convert::Infallible>(Response::new(yes))
        });
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.max_concurrent_streams(calls);
        let ends = CancellationToken::new();
        let told = ends.clone();
        drop(telemetry::spawn("test", async move {
            let mut serving = Box::pin(builder.serve_connection(TokioIo::new(theirs), answer));
            tokio::select! {
                ended = &mut serving => return ended,
                () = told.cancelled() => serving.as_mut().graceful_shutdown(),
            }
            serving.await
        }));
        let place = Line::open(TokioIo::new(ours)).await;
        let line = place.expect("it speaks HTTP/2").give_back();
        let line = line.expect("it is new");
        while line.0.most.load(Ordering::Relaxed) != usize::try_from(calls).expect("few") {
            tokio::task::yield_now().await;
        }
        (line, ends)
    }

    fn call() -> Request<RequestBody> {
        let body = RequestBody::new(VecDeque::new(), None, Size::mib(1), None);
        let call = Request::post("http://worker/a.B/C").body(body);
        call.expect("a good request")
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_are_answered_when_the_worker_takes_no_more_are_answered_to_the_end() {
        let (line, ends) = line(100).await;
        let share = || line.take(Share::One).expect("there is room");
        let (first, second) = (share(), share());
        let answered = telemetry::spawn("test", async move {
            let answer = first.ask(call()).await;
            answer.map(|answer| answer.status().as_u16())
        });
        tokio::time::sleep(TAKES / 4).await;
        ends.cancel();
        tokio::time::sleep(TAKES / 4).await;
        let late = second.ask(call()).await;
        let late = late.expect_err("it takes no more");
        assert!(matches!(late, Failed::Unsent(_)), "{late:?}");
        let answered = answered.await.expect("it does not panic");
        assert_eq!(answered.expect("an answer"), 200);
        assert!(!line.is_open());
    }

    #[tokio::test]
    async fn small_calls_share_a_line_and_others_have_it_alone() {
        let (line, _ends) = line(100).await;
        let shares: Vec<_> = (0..MOST).map(|_| line.take(Share::One)).collect();
        assert!(shares.iter().all(Option::is_some));
        assert!(line.take(Share::One).is_none(), "there are eight places");
        for share in shares.into_iter().flatten() {
            assert!(share.give_back().is_none(), "it is kept already");
        }
        let alone = line.take(Share::of(SMALL + 1)).expect("nobody is there");
        assert!(line.take(Share::of(SMALL)).is_none());
        drop(alone.give_back());
        let small = line.take(Share::of(SMALL)).expect("nobody is there");
        assert!(line.take(Share::All).is_none());
        drop(small.give_back());
    }

    #[tokio::test]
    async fn no_more_calls_are_on_a_line_than_its_worker_lets() {
        let (line, _ends) = line(2).await;
        let two = [line.take(Share::One), line.take(Share::One)];
        assert!(two.iter().all(Option::is_some));
        assert!(line.take(Share::One).is_none());
        two.into_iter()
            .flatten()
            .for_each(|place| drop(place.give_back()));
        assert!(line.take(Share::All).is_some(), "nobody is there");
    }

    #[tokio::test]
    async fn a_line_on_which_a_call_was_left_takes_no_other() {
        let (line, _ends) = line(100).await;
        let (left, stays) = (line.take(Share::One), line.take(Share::One));
        assert!(line.is_open());
        drop(left.expect("there is room"));
        assert!(!line.is_open());
        let stays = stays.expect("there is room");
        assert!(stays.give_back().is_none(), "it is not kept any more");
    }
}
