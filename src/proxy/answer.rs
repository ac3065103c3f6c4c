//! What a worker answers, over either wire, and why it does not.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::Response;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::http1;
use super::line::Place;
use super::pool::Sender;
use super::upload::BodyError;
use crate::reply::Fault;

/// Why a request has no answer.
#[derive(Debug)]
pub(super) enum Failed {
    /// The connection was closed before anything was written to it.
    Unsent(String),
    /// The worker may have begun with it.
    Broke(String),
    /// The client's own body was at fault.
    Refused(Fault),
}

/// A request that is with a connection: waits for the head of its answer.
pub(super) enum Sent {
    Http1(http1::Asking),
    Http2(Pin<Box<dyn Future<Output = Result<Response<Answer>, Failed>> + Send>>),
}

impl Future for Sent {
    type Output = Result<Response<Answer>, Failed>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Http1(asking) => Pin::new(asking).poll(cx),
            Self::Http2(asking) => asking.as_mut().poll(cx),
        }
    }
}

/// What follows the head of an answer; the connection too, until it is taken back.
#[derive(Debug)]
pub(super) enum Answer {
    Http1(http1::Answer),
    Http2(Incoming, Option<Place>),
}

impl Answer {
    /// Polls for the next piece.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Http1(answer) => answer.poll_frame(cx).map_err(BodyError::from),
            Self::Http2(answer, _) => Pin::new(answer).poll_frame(cx).map_err(BodyError::from),
        }
    }

    /// Returns whether nothing more comes.
    pub(super) fn is_end(&self) -> bool {
        match self {
            Self::Http1(answer) => answer.is_end(),
            Self::Http2(answer, _) => answer.is_end_stream(),
        }
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(answer) => answer.size_hint(),
            Self::Http2(answer, _) => answer.size_hint(),
        }
    }

    /// Takes the connection back, if it may serve another request.
    pub(super) fn take(&mut self) -> Option<Sender> {
        match self {
            Self::Http1(answer) => answer.take().map(Sender::Http1),
            Self::Http2(_, place) => place.take().map(Sender::Http2),
        }
    }

    /// Lets go of the connection, by which the worker hears that nobody waits.
    pub(super) fn leave(&mut self) {
        drop(self.take());
    }
}
