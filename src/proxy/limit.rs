//! An answer that ends at a moment that is set when it begins, for a model
//! with `request_timeout`.
//!
//! A client that does not read is not polled for. So the moment is watched by
//! a task, which then lets go of lease and connection, by which the worker
//! hears that nobody waits any more. The client sees a broken answer, or the
//! status of a call, at once or when it reads on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use hyper::Response;
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::body::{Broken, LastWords, ProxyBody, Streamed};
use super::rpc;
use super::upload::BodyError;
use crate::telemetry;

/// What a client of a stream of events reads when the time is over.
const LATE_EVENT: &[u8] = b"event: error\ndata: {\"error\":{\"message\":\"the answer took longer than request_timeout\",\"type\":\"server_error\",\"code\":\"request_timeout\"},\"type\":\"error\"}\n\n";

/// Sets the moment at which a worker's answer ends at the latest.
pub(super) fn bound(response: Response<ProxyBody>, ends: Option<Instant>) -> Response<ProxyBody> {
    response.map(|body| match (body, ends) {
        (ProxyBody::Stream(streamed), Some(ends)) if !streamed.is_done() => {
            ProxyBody::Limited(Box::new(Limited::new(streamed, ends)))
        }
        (body, _) => body,
    })
}

/// See the module.
#[derive(Debug)]
pub struct Limited {
    /// The only one that holds it, but for a moment when the time is over.
    answer: Arc<Mutex<Answer>>,
    broken: Option<Broken>,
    /// The status of a call has gone out.
    has_ended: bool,
    /// Ends the watch with the answer.
    _watch: DropGuard,
}

#[derive(Debug)]
struct Answer {
    /// Taken when the time is over.
    streamed: Option<Box<Streamed>>,
    /// How it can be ended then.
    words: LastWords,
    waker: Option<Waker>,
}

impl Limited {
    fn new(streamed: Box<Streamed>, ends: Instant) -> Self {
        let answer = Arc::new(Mutex::new(Answer {
            streamed: Some(streamed),
            words: LastWords::None,
            waker: None,
        }));
        let gone = CancellationToken::new();
        let watch = gone.clone().drop_guard();
        let watched = Arc::downgrade(&answer);
        telemetry::spawn("request timeout", async move {
            let over = gone.run_until_cancelled(tokio::time::sleep_until(ends));
            if over.await.is_some()
                && let Some(answer) = watched.upgrade()
            {
                end(&answer);
            }
        });
        Self {
            answer,
            broken: None,
            has_ended: false,
            _watch: watch,
        }
    }

    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.broken.is_some() {
            return Broken::poll(&mut self.broken, cx);
        }
        let mut answer = lock(&self.answer);
        if let Some(mut streamed) = answer.streamed.take() {
            let polled = streamed.poll(cx);
            answer.streamed = Some(streamed);
            if polled.is_pending() {
                answer.waker = Some(cx.waker().clone());
            }
            return polled;
        }
        let words = answer.words;
        drop(answer);
        let event = match words {
            LastWords::Status if self.has_ended => return Poll::Ready(None),
            LastWords::Status => {
                self.has_ended = true;
                return Poll::Ready(Some(Ok(Frame::trailers(rpc::over()))));
            }
            LastWords::Event => Some(Bytes::from_static(LATE_EVENT)),
            LastWords::None => None,
        };
        self.broken = Some(Broken::new(BodyError::Cut, event));
        Broken::poll(&mut self.broken, cx)
    }

    pub(super) fn is_end_stream(&self) -> bool {
        let answer = lock(&self.answer);
        let streamed = answer.streamed.as_ref();
        self.broken.is_none() && streamed.is_some_and(|streamed| streamed.is_end_stream())
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let answer = lock(&self.answer);
        let streamed = answer.streamed.as_ref();
        streamed.map_or_else(SizeHint::default, |streamed| streamed.size_hint())
    }
}

fn lock(answer: &Mutex<Answer>) -> MutexGuard<'_, Answer> {
    answer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time is over. An answer that has ended by itself is left alone.
fn end(answer: &Mutex<Answer>) {
    let mut answer = lock(answer);
    let Some(mut streamed) = answer.streamed.take_if(|streamed| !streamed.is_done()) else {
        return;
    };
    answer.words = streamed.is_late();
    let waker = answer.waker.take();
    drop(answer);
    drop(streamed);
    if let Some(waker) = waker {
        waker.wake();
    }
}
