//! One connection, from its first byte to its end, and how long it may take over
//! a request's head.
//!
//! Ends and time limits are looked at when they happen and not with every piece
//! of a request: what waits for them stands beside the connection and is asked
//! only once woken. hyper would set a timer for each head and take it back a
//! moment later; here it notes when the head is due, and one timer a connection
//! comes by.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use hyper::body::{Body, Incoming};
use hyper::rt::{Read, Sleep, Timer, Write};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::again::Again;
use crate::clock::{Clock, Timestamp};

/// Longest time for a client to send a request's head.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one on which nothing was asked may take to end.
const LEAVE: Duration = Duration::from_secs(2);
/// Stands for no moment.
const NEVER: u64 = u64::MAX;

/// What happens to a connection seldom.
enum Event {
    /// The server is closing.
    Closing,
    /// It is time to look whether a head is due; the server may close later.
    Time(Option<CancellationToken>),
}

/// Answers what is asked on a connection until it ends, and soon after that no
/// more once `closing` is cancelled.
pub(super) async fn serve<I, B, A>(
    io: I,
    (clock, closing): (Clock, CancellationToken),
    answer: impl Fn(Request<Incoming>) -> A,
) where
    I: Read + Write + Unpin + Send + 'static,
    A: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let (asked, due) = (AtomicBool::new(false), Arc::new(Due::new(clock)));
    let service = service_fn(|request| {
        asked.store(true, Ordering::Relaxed);
        answer(request).map(Ok::<_, Infallible>)
    });
    let builder = builder(&due);
    let connection = pin!(builder.serve_connection_with_upgrades(io, service));
    let mut connection = Again::new(connection);
    let mut events = pin!(FuturesUnordered::new());
    let at_first = clock.instant(due.began + HEAD_TIMEOUT);
    events.push(event(Some(closing), at_first));
    let ended = loop {
        let came = tokio::select! {
            biased;
            ended = &mut connection => break ended,
            came = events.next() => came,
        };
        let closing = match came {
            Some(Event::Time(closing)) => closing,
            Some(Event::Closing) | None => {
                connection.inner().as_mut().graceful_shutdown();
                None
            }
        };
        // What hyper notes begins with the first byte only.
        if !asked.load(Ordering::Relaxed) && due.is_old() {
            connection.inner().as_mut().graceful_shutdown();
            let left = tokio::time::timeout(LEAVE, &mut connection);
            let left = Box::pin(left).await;
            if left.is_ok() || !asked.load(Ordering::Relaxed) {
                debug!("nothing was asked on a connection");
                return;
            }
        }
        events.push(event(closing, clock.instant(due.look())));
    };
    if let Err(error) = ended {
        debug!(error = %error, "a connection ended early");
    }
}

/// Waits until the server is closing, unless that is known, or until then.
async fn event(closing: Option<CancellationToken>, until: Instant) -> Event {
    let until = tokio::time::sleep_until(until);
    match closing {
        None => {
            until.await;
            Event::Time(None)
        }
        Some(closing) => {
            let ended = closing.clone().run_until_cancelled_owned(until).await;
            ended.map_or(Event::Closing, |()| Event::Time(Some(closing)))
        }
    }
}

fn builder(due: &Arc<Due>) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(HeadTimer(Arc::clone(due)))
        .header_read_timeout(HEAD_TIMEOUT);
    // A client that is gone without a word does not answer.
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(HEAD_TIMEOUT);
    builder
}

/// When the head that a connection waits for is due, in microseconds since the
/// clock's zero.
#[derive(Debug)]
struct Due {
    clock: Clock,
    began: Timestamp,
    at: AtomicU64,
    /// Heads that were due by then are late.
    past: AtomicU64,
}

impl Due {
    fn new(clock: Clock) -> Self {
        Self {
            clock,
            began: clock.now(),
            at: AtomicU64::new(NEVER),
            past: AtomicU64::new(0),
        }
    }

    /// Whether a first request had time enough.
    fn is_old(&self) -> bool {
        self.clock.now().since(self.began) >= HEAD_TIMEOUT
    }

    /// Notes whether a head is late. Returns when to look again: none that is
    /// noted meanwhile is due earlier.
    fn look(&self) -> Timestamp {
        let now = self.clock.now();
        let (at, passed) = (self.at.load(Ordering::Relaxed), now.as_micros());
        if at > passed && at < NEVER {
            return Timestamp::from_micros(at);
        }
        self.past.store(passed, Ordering::Relaxed);
        now + HEAD_TIMEOUT
    }
}

/// What hyper takes for a timer.
#[derive(Debug)]
struct HeadTimer(Arc<Due>);

#[expect(clippy::disallowed_types, reason = "hyper names moments so")]
mod timer {
    use std::time::Instant;

    use super::{Arc, Duration, HeadTimer, Pin, Sleep, Timer, Timestamp, UntilDue};

    impl Timer for HeadTimer {
        fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
            self.sleep_until(self.now() + duration)
        }

        fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
            let start = self.0.clock.instant(Timestamp::START).into_std();
            let since_start = deadline.saturating_duration_since(start);
            let at = Timestamp::from_start(since_start).as_micros();
            let due = Arc::clone(&self.0);
            Box::pin(UntilDue { due, at })
        }

        fn now(&self) -> Instant {
            let clock = self.0.clock;
            clock.instant(clock.now()).into_std()
        }
    }
}

/// Ends when a head is late. Nobody is woken for it: whoever looks asks the
/// connection then.
#[derive(Debug)]
struct UntilDue {
    due: Arc<Due>,
    at: u64,
}

impl Future for UntilDue {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.due.past.load(Ordering::Relaxed) >= self.at {
            return Poll::Ready(());
        }
        self.due.at.store(self.at, Ordering::Relaxed);
        Poll::Pending
    }
}

impl Sleep for UntilDue {}

impl Drop for UntilDue {
    fn drop(&mut self) {
        self.due.at.store(NEVER, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::task::JoinHandle;

    use super::*;

    fn begin(closing: &CancellationToken) -> (DuplexStream, JoinHandle<Duration>) {
        let (ours, theirs) = tokio::io::duplex(1 << 12);
        let closing = closing.clone();
        let serving = async move {
            let clock = Clock::start();
            let answer = |_| async { Response::new(Full::new(bytes::Bytes::from("yes"))) };
            serve(TokioIo::new(theirs), (clock, closing), answer).await;
            clock.now().since_start()
        };
        (ours, crate::telemetry::spawn("test", serving))
    }

    async fn ask(client: &mut DuplexStream) {
        let asked = client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        asked.expect("it is open");
        let mut answer = vec![0; 1 << 10];
        let read = client.read(&mut answer).await.expect("an answer");
        assert!(answer[..read].ends_with(b"yes"), "{answer:?}");
    }

    async fn pass(seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    fn assert_took(took: Duration, seconds: u64) {
        let (least, most) = (seconds, seconds + 1);
        let range = Duration::from_secs(least)..Duration::from_secs(most);
        assert!(range.contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_nothing_is_asked_ends() {
        let (_client, serving) = begin(&CancellationToken::new());
        assert_took(serving.await.expect("it ends"), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_kept_ends_when_its_next_head_is_late_however_it_comes() {
        for pieces in [0, 1, 20] {
            let (mut client, serving) = begin(&CancellationToken::new());
            for _ in 0..5 {
                pass(13).await;
                ask(&mut client).await;
            }
            // Who sends byte by byte gains nothing.
            for _ in 0..pieces {
                client.write_all(b"G").await.expect("it is open");
                pass(1).await;
            }
            assert_took(serving.await.expect("it ends"), 5 * 13 + 30);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_is_no_late_head() {
        let (mut client, theirs) = tokio::io::duplex(1 << 12);
        let answer = |_| async {
            pass(100).await;
            Response::new(Full::new(bytes::Bytes::from("yes")))
        };
        let at = (Clock::start(), CancellationToken::new());
        let serving = serve(TokioIo::new(theirs), at, answer);
        let serving = crate::telemetry::spawn("test", serving);
        ask(&mut client).await;
        ask(&mut client).await;
        drop(client);
        serving.await.expect("it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_kept_ends_at_once_when_the_server_closes() {
        let closing = CancellationToken::new();
        let (mut client, serving) = begin(&closing);
        pass(40).await;
        let (mut other, other_serving) = begin(&closing);
        ask(&mut other).await;
        assert!(client.write_all(b"G").await.is_err(), "nothing was asked");
        closing.cancel();
        assert_took(other_serving.await.expect("it ends"), 0);
        assert_took(serving.await.expect("it ends"), 30);
    }
}
