//! What goes back to the client.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::account::Account;
use super::pool::{Pool, Sender};
use super::upload::BodyError;
use crate::control::Lease;

/// What goes to the client.
#[derive(Debug)]
pub enum ProxyBody {
    /// An answer of our own.
    Full(Option<Bytes>),
    /// The worker's answer as it comes.
    Stream(Box<Streamed>),
}

impl ProxyBody {
    /// Returns an answer of our own.
    #[must_use]
    pub fn text(text: String) -> Self {
        Self::Full(Some(Bytes::from(text)))
    }

    /// Returns a body without content.
    #[must_use]
    pub const fn empty() -> Self {
        Self::Full(None)
    }
}

/// The worker's answer, and what is held until it ends: the lease, the
/// connection, the account.
#[derive(Debug)]
pub struct Streamed {
    inner: Incoming,
    // Dropped in this order: the account is written while the lease is held.
    account: Account,
    sender: Option<(Sender, Arc<Pool>)>,
    events: bool,
    broken: Option<Broken>,
    _lease: Lease,
}

/// How far telling a client of a stream of events has come.
#[derive(Debug)]
enum Broken {
    /// The event was given to the connection, which has not sent it yet.
    Told(BodyError),
    /// It had its turn to send it.
    Sent(BodyError),
}

impl Streamed {
    pub(super) fn new(
        inner: Incoming,
        account: Account,
        (sender, pool): (Sender, Arc<Pool>),
        events: bool,
        lease: Lease,
    ) -> Self {
        Self {
            inner,
            account,
            sender: Some((sender, pool)),
            events,
            broken: None,
            _lease: lease,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.broken.take() {
            None => {}
            Some(Broken::Told(error)) => {
                // The error makes the connection drop what it has not sent.
                self.broken = Some(Broken::Sent(error));
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Broken::Sent(error)) => return Poll::Ready(Some(Err(error))),
        }
        match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
            None => {
                self.finish();
                Poll::Ready(None)
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.account.passed(data.len());
                }
                if self.inner.is_end_stream() {
                    self.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.account.broke();
                self.sender = None;
                let error = BodyError::from(error);
                // With a length there is no room for another event.
                if !self.events || self.inner.size_hint().exact().is_some() {
                    return Poll::Ready(Some(Err(error)));
                }
                // A stream of events says so in its own words first, and is
                // cut then: it never looks like a clean end.
                self.broken = Some(Broken::Told(error));
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(BROKEN_EVENT)))))
            }
        }
    }

    /// The answer is whole: the connection serves the next request.
    fn finish(&mut self) {
        self.account.finish();
        if let Some((sender, pool)) = self.sender.take() {
            pool.put(sender);
        }
    }
}

/// What a client of a stream of events reads when the worker broke.
const BROKEN_EVENT: &[u8] = b"event: error\ndata: {\"error\":{\"message\":\"the worker broke off\",\"type\":\"server_error\",\"code\":\"worker_failed\"}}\n\n";

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
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(text) => text.is_none(),
            Self::Stream(streamed) => streamed.broken.is_none() && streamed.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(text) => {
                let length = text.as_ref().map_or(0, Bytes::len);
                SizeHint::with_exact(u64::try_from(length).unwrap_or(u64::MAX))
            }
            Self::Stream(streamed) => streamed.inner.size_hint(),
        }
    }
}
