//! What goes to the worker: a client's body, its beginning read already.

use std::collections::VecDeque;
use std::error::Error as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::http1::WireError;
use crate::gate::Visit;
use crate::grpc::Renamer;
use crate::model::Bytes as Size;
use crate::reply::Fault;
use crate::telemetry;

/// Why a body broke.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The client's body broke off, or the answer of a call.
    #[error("the body broke off")]
    Broken(#[from] hyper::Error),
    /// The worker's answer broke off.
    #[error("the answer broke off")]
    Worker(#[from] WireError),
    /// An answer that failed after its head was sent.
    #[error("the answer is cut")]
    Cut,
    /// The client sent more than it may.
    #[error("the body is larger than {0}")]
    TooLarge(Size),
}

impl BodyError {
    /// Returns the client's fault when its body is why sending failed.
    pub(super) fn fault(&self) -> Option<Fault> {
        match self {
            Self::TooLarge(most) => Some(Fault::BodyTooLarge(*most)),
            Self::Cut | Self::Worker(_) => None,
            broken @ Self::Broken(_) => {
                Some(Fault::BadRequest(telemetry::chain(broken).to_string()))
            }
        }
    }
}

/// Returns the client's fault when its body is behind what hyper says.
pub(super) fn fault_in(error: &hyper::Error) -> Option<Fault> {
    error.source()?.downcast_ref::<BodyError>()?.fault()
}

/// What goes to the worker: the pieces that were read already, then the rest
/// as it comes.
#[derive(Debug)]
pub(super) struct RequestBody {
    held: VecDeque<Bytes>,
    rest: Option<Incoming>,
    trailers: Option<HeaderMap>,
    left: u64,
    most: Size,
    /// Gives messages another name as they pass.
    renamer: Option<Box<Renamer>>,
    /// Counts the bytes of the rest.
    counted: Option<Arc<AtomicU64>>,
    /// Waits for the worker from the end of the body on.
    visit: Option<Visit>,
}

impl RequestBody {
    pub(super) fn new(
        held: VecDeque<Bytes>,
        rest: Option<Incoming>,
        most: Size,
        visit: Option<&Visit>,
    ) -> Self {
        // What is here as a whole is the worker's to read at once.
        let visit = match (&rest, visit) {
            (Some(_), visit) => visit.inspect(|visit| visit.owes()).cloned(),
            (None, visit) => {
                visit.inspect(|visit| visit.waits());
                None
            }
        };
        Self {
            held,
            rest,
            trailers: None,
            left: most.get(),
            most,
            renamer: None,
            counted: None,
            visit,
        }
    }

    /// Has the messages of a call renamed.
    pub(super) fn renamed(self, renamer: Option<Renamer>) -> Self {
        let renamer = renamer.map(Box::new);
        Self { renamer, ..self }
    }

    /// Counts what comes behind the pieces.
    pub(super) fn counted(self, counted: Option<Arc<AtomicU64>>) -> Self {
        Self { counted, ..self }
    }

    /// Ends it with these, which were read already.
    pub(super) fn with_trailers(self, trailers: Option<HeaderMap>) -> Self {
        Self { trailers, ..self }
    }

    fn count(&self, frame: &Frame<Bytes>) {
        if let (Some(counted), Some(data)) = (&self.counted, frame.data_ref()) {
            let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
            counted.fetch_add(length, Ordering::Relaxed);
        }
    }

    /// The worker has it all.
    fn end(&mut self) {
        if let Some(visit) = self.visit.take() {
            visit.waits();
        }
    }

    /// Takes the next frame as the client sent it.
    fn poll_plain(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match (self.held.pop_front(), &mut self.rest) {
            (Some(piece), _) => Frame::data(piece),
            (None, None) => match self.trailers.take() {
                Some(trailers) => Frame::trailers(trailers),
                None => return Poll::Ready(None),
            },
            (None, Some(rest)) => match ready!(Pin::new(rest).poll_frame(cx)) {
                None => {
                    self.end();
                    return Poll::Ready(None);
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Some(Ok(frame)) => {
                    self.count(&frame);
                    frame
                }
            },
        };
        if let Some(data) = frame.data_ref() {
            let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
            match self.left.checked_sub(length) {
                Some(left) => self.left = left,
                None => return Poll::Ready(Some(Err(BodyError::TooLarge(self.most)))),
            }
        }
        if self.is_plain_end() {
            self.end();
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_plain_end(&self) -> bool {
        self.held.is_empty()
            && self.trailers.is_none()
            && self.rest.as_ref().is_none_or(Body::is_end_stream)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        loop {
            let frame = ready!(this.poll_plain(cx));
            let Some(renamer) = &mut this.renamer else {
                return Poll::Ready(frame);
            };
            let (renamed, behind) = match frame {
                Some(Err(_)) => return Poll::Ready(frame),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => match renamer.feed(data) {
                        // The next frame brings what the name is in.
                        renamed if renamed.is_empty() => continue,
                        renamed => (renamed, None),
                    },
                    Err(trailers) => (renamer.finish(), Some(trailers)),
                },
                None => (renamer.finish(), None),
            };
            if renamed.is_empty() {
                return Poll::Ready(behind.map(Ok));
            }
            if let Some(trailers) = behind {
                // Next, behind what was held back.
                this.rest = None;
                this.trailers = trailers.into_trailers().ok();
            }
            return Poll::Ready(Some(Ok(Frame::data(renamed))));
        }
    }

    fn is_end_stream(&self) -> bool {
        // A renamer may hold something back, and says so at the next poll.
        self.renamer.is_none() && self.is_plain_end()
    }

    fn size_hint(&self) -> SizeHint {
        if self.renamer.is_some() {
            return SizeHint::new();
        }
        let held: u64 = self
            .held
            .iter()
            .map(|piece| u64::try_from(piece.len()).unwrap_or(0))
            .sum();
        let Some(rest) = &self.rest else {
            let mut hint = SizeHint::with_exact(held);
            if self.trailers.is_some() {
                // What is told its length has none in HTTP/1.
                hint = SizeHint::new();
                hint.set_lower(held);
            }
            return hint;
        };
        let rest = rest.size_hint();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(held));
        }
        hint.set_lower(rest.lower().saturating_add(held));
        hint
    }
}
