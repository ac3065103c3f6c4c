//! Bodies of answers: given in parts, at a pace, and broken off when asked.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, SizeHint};
use nix::sys::signal::{Signal, kill};
use tokio::time::{Sleep, sleep};

use crate::knobs::Knobs;
use crate::state::InFlight;

/// Any answer's body.
pub(crate) type Answer = UnsyncBoxBody<Bytes, BrokenOff>;

/// The worker broke its own answer off, as it was asked to.
#[derive(Debug, thiserror::Error)]
#[error("answer broken off on request")]
pub(crate) struct BrokenOff;

/// Whether the connection is to end with a reset.
pub(crate) type ResetFlag = Arc<AtomicBool>;

/// What is already written goes out while a break waits this long.
const BEFORE_A_BREAK: Duration = Duration::from_millis(2);

/// Returns a body that is there at once.
pub(crate) fn whole(text: impl Into<Bytes>) -> Answer {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// Ends this process as the kernel's out-of-memory killer would.
pub(crate) fn kill_self() {
    // It cannot fail, and there is nobody left to tell.
    let _ = kill(nix::unistd::Pid::this(), Signal::SIGKILL);
}

/// A body that comes part by part.
pub(crate) struct Parts<F> {
    part: F,
    count: u64,
    given: u64,
    length: Option<u64>,
    knobs: Knobs,
    reset: ResetFlag,
    timer: Option<Pin<Box<Sleep>>>,
    flushed: bool,
    request: InFlight,
}

impl<F> Parts<F>
where
    F: FnMut(u64) -> Bytes + Send + Unpin + 'static,
{
    /// Returns a body of `count` parts; `part` makes each from its number, from
    /// 0. With a `length` in bytes the answer is not chunked.
    pub(crate) fn body(
        part: F,
        count: u64,
        length: Option<u64>,
        knobs: Knobs,
        reset: ResetFlag,
        request: InFlight,
    ) -> Answer {
        Self {
            part,
            count,
            given: 0,
            length,
            knobs,
            reset,
            timer: None,
            flushed: false,
            request,
        }
        .boxed_unsync()
    }

    /// Waits until a timer set before is over.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(timer) = &mut self.timer {
            ready!(timer.as_mut().poll(cx));
            self.timer = None;
        }
        Poll::Ready(())
    }

    fn is_to_break(&self) -> bool {
        self.knobs.break_after == Some(self.given) || self.knobs.exit_after == Some(self.given)
    }

    /// Kills the process or fails the body.
    fn break_off(&mut self) -> BrokenOff {
        if self.knobs.exit_after == Some(self.given) {
            kill_self();
        }
        self.reset.store(self.knobs.reset, Ordering::Relaxed);
        self.request.finish();
        BrokenOff
    }

    fn next(&mut self) -> Bytes {
        let bytes = (self.part)(self.given);
        self.given += 1;
        if self.given == self.count && !self.is_to_break() {
            self.request.finish();
        } else if !self.knobs.pace.is_zero() {
            self.timer = Some(Box::pin(sleep(self.knobs.pace)));
        }
        if let Some(length) = &mut self.length {
            *length = length.saturating_sub(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        }
        bytes
    }
}

impl<F> Body for Parts<F>
where
    F: FnMut(u64) -> Bytes + Send + Unpin + 'static,
{
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let this = self.get_mut();
        loop {
            ready!(this.poll_timer(cx));
            if !this.is_to_break() {
                break;
            }
            if this.flushed {
                return Poll::Ready(Some(Err(this.break_off())));
            }
            this.flushed = true;
            this.timer = Some(Box::pin(sleep(BEFORE_A_BREAK)));
        }
        if this.given == this.count {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(Frame::data(this.next()))))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}
