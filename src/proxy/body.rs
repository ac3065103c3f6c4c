//! What goes back to the client.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::account::Account;
use super::answer::Answer;
use super::heartbeat::Waiting;
use super::limit::Limited;
use super::pool::Pool;
use super::rpc;
use super::upload::BodyError;
use crate::control::Lease;
use crate::gate::Visit;
use crate::grpc;

/// What goes to the client.
#[derive(Debug)]
pub enum ProxyBody {
    /// An answer of our own.
    Full(Option<Bytes>),
    /// The worker's answer as it comes.
    Stream(Box<Streamed>),
    /// As it comes, for so long.
    Limited(Box<Limited>),
    /// An answer that is still waited for, and then as it comes.
    Waiting(Box<Waiting>),
}

impl ProxyBody {
    /// Returns an answer of our own; without content when the text is empty.
    #[must_use]
    pub fn text(text: String) -> Self {
        Self::Full((!text.is_empty()).then(|| Bytes::from(text)))
    }

    /// Returns a body without content.
    #[must_use]
    pub const fn empty() -> Self {
        Self::Full(None)
    }
}

/// How an answer that breaks is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It is cut.
    Plain,
    /// As a stream of events: by an event, then it is cut.
    Events,
    /// As a call of gRPC: by a status.
    Call,
}

/// How an answer can be ended whose time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LastWords {
    /// By an event.
    Event,
    /// By the status of a call.
    Status,
    /// Only by a cut.
    None,
}

/// The worker's answer, and what is held until it ends: the lease, the
/// connection, the account.
#[derive(Debug)]
pub struct Streamed {
    inner: Answer,
    // Dropped in this order: the account is written while the lease is held.
    account: Account,
    /// Where the connection goes when the answer is whole.
    pool: Option<Arc<Pool>>,
    /// How a stream of events ends so far.
    events: Option<Tail>,
    is_call: bool,
    broken: Option<Broken>,
    /// Until the worker has said all.
    visit: Option<Visit>,
    _lease: Lease,
}

impl Streamed {
    pub(super) fn new(
        (inner, pool): (Answer, Arc<Pool>),
        account: Account,
        kind: Kind,
        (lease, visit): (Lease, Option<Visit>),
    ) -> Self {
        let mut streamed = Self {
            inner,
            account,
            pool: Some(pool),
            events: (kind == Kind::Events).then(Tail::default),
            is_call: kind == Kind::Call,
            broken: None,
            visit,
            _lease: lease,
        };
        // A body without content is never asked for a frame.
        if streamed.inner.is_end() {
            streamed.finish();
        }
        streamed
    }

    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.broken.is_some() {
            return Broken::poll(&mut self.broken, cx);
        }
        let Poll::Ready(frame) = self.inner.poll_frame(cx) else {
            if let Some(visit) = &self.visit {
                visit.waits_on();
            }
            return Poll::Pending;
        };
        match frame {
            None => {
                self.finish();
                Poll::Ready(None)
            }
            Some(Ok(frame)) => {
                self.hear(&frame);
                if let Some(data) = frame.data_ref() {
                    self.account.passed(data.len());
                    if let Some(tail) = &mut self.events {
                        tail.push(data);
                    }
                }
                if self.inner.is_end() {
                    self.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.account.broke();
                self.inner.leave();
                self.pool = None;
                self.visit = None;
                if self.is_call {
                    return Poll::Ready(Some(Ok(Frame::trailers(rpc::broken_off()))));
                }
                // In the middle of an event our words would end it, and it
                // would pass for one.
                let between = self.events.take().is_some_and(|tail| tail.is_between());
                let words = between.then(|| Bytes::from_static(BROKEN_EVENT));
                self.broken = Some(Broken::new(error, words));
                Broken::poll(&mut self.broken, cx)
            }
        }
    }

    /// Something came from the worker. The end of a call says what it was worth.
    fn hear(&mut self, frame: &Frame<Bytes>) {
        let trailers = frame.trailers_ref().filter(|_| self.is_call);
        let status = trailers.and_then(grpc::given);
        if let Some(status) = status {
            self.account.call_ends(status);
        }
        match (&self.visit, status) {
            (Some(visit), Some(status)) => visit.answered(rpc::verdict(status)),
            (Some(visit), None) => visit.hears(),
            (None, _) => {}
        }
    }

    /// Returns whether nothing more comes of it: it is whole, or broke.
    pub(super) fn is_done(&self) -> bool {
        self.pool.is_none()
    }

    /// Notes that its time is over. Returns how it can be ended without words of
    /// ours being taken for the worker's.
    pub(super) fn is_late(&mut self) -> LastWords {
        self.account.late();
        let between = self.events.take().is_some_and(|tail| tail.is_between());
        // An answer of known length cannot end before that.
        let is_open = self.is_call && self.inner.size_hint().exact().is_none();
        match (between, is_open) {
            (true, _) => LastWords::Event,
            (false, true) => LastWords::Status,
            (false, false) => LastWords::None,
        }
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.broken.is_none() && self.inner.is_end()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }

    /// The answer is whole: the connection serves the next request.
    fn finish(&mut self) {
        self.account.finish();
        self.visit = None;
        if let Some(pool) = self.pool.take()
            && let Some(sender) = self.inner.take()
        {
            pool.put(sender);
        }
    }
}

/// How long what was given so far has to go out before an answer is cut: over
/// HTTP/2 the connection is a task of its own, whose turn under load is tens of
/// milliseconds away.
const LAST_TURN: Duration = Duration::from_millis(100);

/// How a broken answer ends.
#[derive(Debug)]
pub(super) struct Broken {
    error: BodyError,
    /// What is still to be said.
    words: Option<Bytes>,
    /// An error throws away what the connection has not written yet.
    rest: Option<Pin<Box<Sleep>>>,
}

impl Broken {
    /// Breaks with this error, after words if there are any.
    pub(super) const fn new(error: BodyError, words: Option<Bytes>) -> Self {
        Self {
            error,
            words,
            rest: None,
        }
    }

    /// Ends one that is there. A stream of events says what happened in its own
    /// words first, and is cut then: it never looks like a clean end.
    pub(super) fn poll(
        place: &mut Option<Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(broken) = place else {
            return Poll::Ready(None);
        };
        if let Some(words) = broken.words.take() {
            return Poll::Ready(Some(Ok(Frame::data(words))));
        }
        let rest = broken
            .rest
            .get_or_insert_with(|| Box::pin(sleep(LAST_TURN)));
        ready!(rest.as_mut().poll(cx));
        Poll::Ready(place.take().map(|broken| Err(broken.error)))
    }
}

/// The last bytes of a stream of events.
#[derive(Debug)]
struct Tail([u8; 4]);

impl Default for Tail {
    fn default() -> Self {
        Self(*b"\n\n\n\n")
    }
}

impl Tail {
    fn push(&mut self, data: &[u8]) {
        let new = &data[data.len().saturating_sub(self.0.len())..];
        self.0.rotate_left(new.len());
        let kept = self.0.len() - new.len();
        self.0[kept..].copy_from_slice(new);
    }

    /// Whether the stream stands between two events: after an empty line.
    fn is_between(&self) -> bool {
        [&b"\n\n"[..], b"\r\r", b"\r\n\r\n"]
            .iter()
            .any(|end| self.0.ends_with(end))
    }
}

/// What a client of a stream of events reads when the worker broke.
const BROKEN_EVENT: &[u8] = b"event: error\ndata: {\"error\":{\"message\":\"the worker broke off\",\"type\":\"server_error\",\"code\":\"worker_failed\"},\"type\":\"error\"}\n\n";

impl Body for ProxyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Full(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Stream(streamed) => streamed.poll(cx),
            Self::Limited(limited) => limited.poll(cx),
            Self::Waiting(waiting) => waiting.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(text) => text.is_none(),
            Self::Stream(streamed) => streamed.is_end_stream(),
            Self::Limited(limited) => limited.is_end_stream(),
            // It ends by saying so.
            Self::Waiting(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(text) => {
                let length = text.as_ref().map_or(0, Bytes::len);
                SizeHint::with_exact(u64::try_from(length).unwrap_or(u64::MAX))
            }
            Self::Stream(streamed) => streamed.size_hint(),
            Self::Limited(limited) => limited.size_hint(),
            Self::Waiting(_) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_between_events_after_an_empty_line_whatever_the_pieces() {
        for (text, between) in [
            ("", true),
            ("data: 1\n\n", true),
            ("data: 1\r\n\r\n", true),
            ("data: 1\r\r", true),
            ("data: 1\n", false),
            ("data: 1\r\n", false),
            ("data: 1\n\ndata", false),
            ("\n\nd", false),
        ] {
            for piece in 1..=text.len().max(1) {
                let mut tail = Tail::default();
                for part in text.as_bytes().chunks(piece) {
                    tail.push(part);
                }
                assert_eq!(tail.is_between(), between, "{text:?} in pieces of {piece}");
            }
        }
    }
}
