//! A worker spoken to in HTTP/1.1.
//!
//! A connection serves one request at a time, and whoever waits for the answer
//! drives it: the request is written and the answer read in the task of its client.
//! No task stands between the two, so no piece of an answer waits for another turn,
//! a client that reads slowly holds its worker up by nothing but TCP, and a request
//! costs about what its bytes cost. Only a body that is still on its way when the
//! answer begins gets a task, since a client that does not read may write on.
//!
//! Lines are read by httparse. What ends a body is decided as RFC 9112, 6.3, says;
//! what can be read in two ways is refused.

mod decode;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
mod head;
mod io;
#[cfg(test)]
mod tests;
mod upload;

use std::io::{Error, ErrorKind};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use hyper::body::{Frame, SizeHint};
use hyper::{Response, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use self::decode::{Decoder, Piece};
use self::head::Head;
pub(super) use self::head::Lines;
use self::io::{Reader, Writer};
pub(super) use self::upload::Upload;
use super::answer::{self, Failed};
use crate::control::Stream;
use crate::gate::Home;
use crate::telemetry;

/// Room for what is read at once; for heads too, which seldom are larger.
const ROOM: usize = 8 << 10;
/// The same of an answer whose pieces fill it.
const MOST_ROOM: usize = 256 << 10;

/// Why an answer breaks off, or never begins.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed.
    #[error("connection to the worker: {0}")]
    Io(#[from] Error),
    /// It was closed too early.
    #[error("the worker closed the connection {0}")]
    Closed(&'static str),
    /// What came cannot be understood.
    #[error("what the worker sent is no HTTP/1.1: {0}")]
    Malformed(String),
}

/// A connection on which nothing is under way, but for the end of the last
/// request's body at most.
#[derive(Debug)]
pub(super) struct Connection(Box<State>);

/// In a room of its own, so that whoever waits for an answer has room for little.
#[derive(Debug)]
struct State {
    reader: Reader,
    writer: Place,
    /// What was read and not used.
    buffer: BytesMut,
    /// Room for the next read.
    room: usize,
    /// Where its runtime is.
    home: Home,
    /// It serves no other request.
    is_last: bool,
    /// Tells who writes the rest of a body that the answer is whole; dropped, that it
    /// was left.
    answered: Option<oneshot::Sender<()>>,
    /// The request that waits for its answer.
    asked: Option<Asked>,
}

#[derive(Debug)]
struct Asked {
    upload: Upload,
    /// It asks for no more than a head.
    is_head: bool,
    /// How much of what was read was looked at in vain.
    seen: usize,
}

/// Where the side is to which requests are written.
#[derive(Debug)]
enum Place {
    Here(Writer),
    /// With a task that writes the rest of a body. It comes back when all went well,
    /// if the worker reads on.
    Away(oneshot::Receiver<Option<Writer>>),
    /// The worker reads no more.
    Closed,
}

/// Whether a connection that was kept takes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Ready,
    /// The last request's body is on the way.
    Busy,
    /// The worker has closed it, or spoke unasked.
    Ended,
}

impl Connection {
    pub(super) fn new(stream: Stream) -> Self {
        let (reader, writer) = io::split(stream);
        Self(Box::new(State {
            reader,
            writer: Place::Here(writer),
            buffer: BytesMut::new(),
            room: ROOM,
            home: Home::here(),
            is_last: false,
            answered: None,
            asked: None,
        }))
    }

    /// Looks how it stands, without waiting.
    pub(super) fn standing(&mut self) -> Standing {
        let state = &mut *self.0;
        if let Place::Away(back) = &mut state.writer {
            match back.try_recv() {
                Ok(writer) => state.writer = writer.map_or(Place::Closed, Place::Here),
                Err(TryRecvError::Empty) => return Standing::Busy,
                Err(TryRecvError::Closed) => return Standing::Ended,
            }
        }
        let is_here = matches!(state.writer, Place::Here(_));
        let is_free = is_here && !state.is_last && state.buffer.is_empty();
        match is_free && state.reader.is_silent() {
            true => Standing::Ready,
            false => Standing::Ended,
        }
    }

    /// Returns whether it was last used on this thread.
    pub(super) fn is_here(&self) -> bool {
        self.0.home == Home::here()
    }

    /// Moves one that is ready to the runtime of this thread.
    pub(super) fn moved_here(self) -> Result<Self, Error> {
        let State { reader, writer, .. } = *self.0;
        let Place::Here(writer) = writer else {
            return Err(ErrorKind::NotConnected.into());
        };
        Ok(Self::new(io::joined(reader, writer)?.moved_here()?))
    }

    /// Returns room for a request's head; its own, which is empty.
    pub(super) fn room(&mut self) -> BytesMut {
        let mut room = std::mem::take(&mut self.0.buffer);
        if room.capacity() < ROOM / 2 {
            room.reserve(ROOM);
        }
        room
    }

    /// Writes a request, and waits for the head of its answer. `is_head`: it asks
    /// for no more than that. `is_odd`: it has a body where most have none, so what
    /// the worker leaves of it could be taken for the next request.
    pub(super) fn ask(mut self, upload: Upload, (is_head, is_odd): (bool, bool)) -> Asking {
        self.0.is_last |= is_odd;
        self.0.asked = Some(Asked {
            upload,
            is_head,
            seen: 0,
        });
        Asking(Some(self))
    }
}

/// Waits for the head of an answer.
#[derive(Debug)]
pub(super) struct Asking(Option<Connection>);

impl Future for Asking {
    type Output = Result<Response<answer::Answer>, Failed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let connection = self.0.as_mut();
        let state = &mut *connection.expect("it is not polled after its end").0;
        let head = ready!(state.poll_head(cx));
        let connection = self.0.take();
        let head = head?;
        let mut response = Response::new(answer::Answer::Http1(Answer {
            decoder: head.body,
            connection,
        }));
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        Poll::Ready(Ok(response))
    }
}

impl State {
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Head, Failed>> {
        loop {
            let asked = self.asked.as_mut().expect("a request waits");
            if !asked.upload.has_begun() {
                // What is new to this thread's runtime shows here whether it lives.
                let mut none = [0];
                let reading = pin!(self.reader.read(&mut none)).poll(cx);
                if reading.is_ready() {
                    return Poll::Ready(Err(Failed::Unsent("it was closed".into())));
                }
            }
            if let Place::Here(writer) = &mut self.writer
                && !asked.upload.is_done()
                && let Poll::Ready(Err(stopped)) = asked.upload.poll(cx, Some(writer))
            {
                let failure = stopped.failure(asked.upload.has_begun());
                return Poll::Ready(Err(failure));
            }
            if asked.upload.is_done() && self.buffer.capacity() == 0 {
                self.buffer = asked.upload.take_room();
            }
            // Others than 101 only say that the answer is to come.
            let (seen, is_head) = (&mut asked.seen, asked.is_head);
            while let Some(head) = head::read(&mut self.buffer, seen, is_head).map_err(broke)? {
                let is_last = !head.status.is_informational();
                if is_last || head.status == StatusCode::SWITCHING_PROTOCOLS {
                    self.answers(&head);
                    return Poll::Ready(Ok(head));
                }
            }
            match ready!(self.poll_read(cx)) {
                Ok(0) => {
                    let closed = WireError::Closed("before it answered");
                    return Poll::Ready(Err(broke(closed)));
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(broke(error.into()))),
            }
        }
    }

    /// The answer begins.
    fn answers(&mut self, head: &Head) {
        self.is_last |= !head.is_kept;
        let Asked { upload, .. } = self.asked.take().expect("a request waits");
        if !upload.is_done() {
            self.continues(upload);
        } else if upload.is_deaf() {
            self.writer = Place::Closed;
        }
    }

    /// Reads what is there. Zero: the worker says no more.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Error>> {
        // From the beginning again if nobody has what was there, so that one place is
        // written to again and again, which is in the cache.
        let has_room = self.buffer.is_empty() && self.buffer.try_reclaim(self.room);
        let free = self.buffer.capacity() - self.buffer.len();
        if !has_room && free < self.room / 2 {
            self.buffer.reserve(self.room);
        }
        let free = self.buffer.capacity() - self.buffer.len();
        let read = ready!(pin!(self.reader.read_buf(&mut self.buffer)).poll(cx))?;
        if read == free {
            self.room = (self.room * 2).min(MOST_ROOM);
        }
        Poll::Ready(Ok(read))
    }

    /// Has the rest of a body written by a task, unless its answer is left.
    fn continues(&mut self, upload: Upload) {
        let (back, away) = oneshot::channel();
        let (answered, whole) = oneshot::channel();
        if let Place::Here(writer) = std::mem::replace(&mut self.writer, Place::Away(away)) {
            self.answered = Some(answered);
            let writing = upload.write_on(writer, back, whole);
            drop(telemetry::spawn_often("upload", writing));
        }
    }

    /// Returns whether the rest of a body could not be written.
    fn poll_failed(&mut self, cx: &mut Context<'_>) -> bool {
        let Place::Away(back) = &mut self.writer else {
            return false;
        };
        let Poll::Ready(written) = Pin::new(back).poll(cx) else {
            return false;
        };
        let failed = written.is_err();
        self.writer = written.ok().flatten().map_or(Place::Closed, Place::Here);
        failed
    }
}

fn broke(error: WireError) -> Failed {
    Failed::Broke(telemetry::chain(&error).to_string())
}

/// What follows the head of an answer; the connection, until it is taken back.
#[derive(Debug)]
pub(super) struct Answer {
    connection: Option<Connection>,
    decoder: Decoder,
}

impl Answer {
    /// Polls for the next piece.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, WireError>>> {
        let Some(Connection(connection)) = &mut self.connection else {
            return Poll::Ready(None);
        };
        if connection.poll_failed(cx) {
            let error = WireError::Closed("as its request broke off");
            return Poll::Ready(Some(Err(error)));
        }
        loop {
            match self.decoder.next(&mut connection.buffer) {
                Ok(Piece::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Piece::Trailers(trailers)) => {
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                Ok(Piece::End) => return Poll::Ready(None),
                Ok(Piece::More) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            match ready!(connection.poll_read(cx)) {
                Ok(0) => match self.decoder.close() {
                    Ok(()) => return Poll::Ready(None),
                    Err(error) => return Poll::Ready(Some(Err(error))),
                },
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }

    /// Returns whether nothing more comes.
    pub(super) fn is_end(&self) -> bool {
        self.decoder.is_done()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.decoder
            .left()
            .map_or_else(SizeHint::new, SizeHint::with_exact)
    }

    /// Gives the connection back when all was read, if it serves another request or
    /// has to write this one's to its end.
    pub(super) fn take(&mut self) -> Option<Connection> {
        let mut connection = self.connection.take()?;
        let state = &mut *connection.0;
        if self.decoder.is_done()
            && let Some(answered) = state.answered.take()
        {
            // It may have all been written.
            let _ = answered.send(());
        }
        let is_on = !state.is_last || matches!(state.writer, Place::Away(_));
        if !is_on || !self.decoder.is_done() || !state.buffer.is_empty() {
            return None;
        }
        if state.room > ROOM {
            (state.buffer, state.room) = (BytesMut::new(), ROOM);
        }
        Some(connection)
    }

    /// Takes the connection of an answer after which it is no HTTP any more.
    pub(super) fn leave_http(
        mut self,
    ) -> Option<(impl AsyncRead + use<>, impl AsyncWrite + use<>)> {
        let connection = *self.connection.take()?.0;
        let Place::Here(writer) = connection.writer else {
            return None;
        };
        let read = std::io::Cursor::new(connection.buffer.freeze());
        Some((read.chain(connection.reader), writer))
    }
}
