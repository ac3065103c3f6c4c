//! Writes a request: its head, and its body as it comes.

use std::fmt::Write as _;
use std::future::poll_fn;
use std::io::{Error, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper::body::{Body, Frame};
use hyper::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    HOST, HeaderMap, HeaderName, MAX_FORWARDS, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING,
};
use tokio::io::AsyncWrite;
use tokio::sync::oneshot;

use super::WireError;
use super::head::Lines;
use super::io::Writer;
use crate::proxy::answer::Failed;
use crate::proxy::headers::words;
use crate::proxy::upload::{BodyError, RequestBody};
use crate::telemetry;

/// Pieces up to this are copied together: that costs less than one more piece.
const SMALL: usize = 4 << 10;
/// So much of small pieces is put together.
const TOGETHER: usize = 16 << 10;

/// Why a request is not written on.
#[derive(Debug)]
pub(super) enum Stopped {
    Io(Error),
    Body(BodyError),
}

impl Stopped {
    /// Returns what that means for a request of which something was written, or not.
    pub(super) fn failure(self, has_begun: bool) -> Failed {
        let error = match self {
            Self::Io(error) => WireError::Io(error),
            Self::Body(error) => match error.fault() {
                Some(fault) => return Failed::Refused(fault),
                None => return Failed::Broke(telemetry::chain(&error).to_string()),
            },
        };
        let cause = telemetry::chain(&error).to_string();
        match has_begun {
            true => Failed::Broke(cause),
            false => Failed::Unsent(cause),
        }
    }
}

/// A request on its way.
///
/// A worker that refuses a body answers before it has read it, and closes. The
/// write that fails then must not hide the answer that waits to be read: what
/// cannot be written is thrown away, and the reading says how it ended.
#[derive(Debug)]
pub(in crate::proxy) struct Upload {
    /// What goes out first, put together.
    out: BytesMut,
    /// Then a piece that is too large for that.
    large: Bytes,
    /// Then the end of its line, and of all if it is the last.
    after: Bytes,
    has_begun: bool,
    /// The worker reads no more.
    is_deaf: bool,
    body: Option<RequestBody>,
    framing: Framing,
}

#[derive(Debug)]
enum Framing {
    /// So many bytes are to come.
    Length(u64),
    /// In chunks; with these trailers, if they come.
    Chunked(Vec<HeaderName>),
}

impl Upload {
    /// Begins with a head but for its last lines. `announced`: the headers in which
    /// trailers are.
    pub(in crate::proxy) fn new(
        mut out: BytesMut,
        announced: &HeaderMap,
        body: RequestBody,
    ) -> Self {
        let body = (!body.is_end_stream()).then_some(body);
        let framing = match body.as_ref().map(|body| body.size_hint().exact()) {
            None => Framing::Length(0),
            Some(Some(length)) => {
                // It has room without end.
                let _ = write!(out, "content-length: {length}\r\n");
                Framing::Length(length)
            }
            Some(None) => {
                out.put_slice(b"transfer-encoding: chunked\r\n");
                Framing::Chunked(trailers(announced))
            }
        };
        out.put_slice(b"\r\n");
        Self {
            out,
            large: Bytes::new(),
            after: Bytes::new(),
            has_begun: false,
            is_deaf: false,
            body,
            framing,
        }
    }

    /// Returns whether there is no body, or none any more.
    pub(in crate::proxy) fn is_empty(&self) -> bool {
        self.body.is_none()
    }

    /// Returns whether anything was written.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Returns whether all was written.
    pub(super) fn is_done(&self) -> bool {
        self.body.is_none() && self.waiting() == 0
    }

    /// Returns whether the worker reads no more.
    pub(super) fn is_deaf(&self) -> bool {
        self.is_deaf
    }

    /// Takes back the room in which the head was, unless that is far more than most
    /// need.
    pub(super) fn take_room(&mut self) -> BytesMut {
        let mut room = std::mem::take(&mut self.out);
        room.clear();
        match room.capacity() <= TOGETHER + 2 * SMALL {
            true => room,
            false => BytesMut::new(),
        }
    }

    /// Writes all in the end, and gives back the side to which it was written; nothing
    /// if the worker reads no more. Stops early when it fails, or when the answer was
    /// left: `answered` is told when that is whole.
    pub(super) async fn write_on(
        mut self,
        writer: Writer,
        back: oneshot::Sender<Option<Writer>>,
        mut answered: oneshot::Receiver<()>,
    ) {
        let (mut writer, mut is_whole) = (Some(writer), false);
        let written = poll_fn(|cx| {
            // What nobody reads is still taken from the client, which may hear
            // nothing before it has sent all.
            let goes_on = is_whole || self.is_deaf;
            if !goes_on && let Poll::Ready(ended) = Pin::new(&mut answered).poll(cx) {
                is_whole = ended.is_ok();
                if !is_whole {
                    return Poll::Ready(false);
                }
            }
            let written = self.poll(cx, writer.as_mut());
            if self.is_deaf {
                writer = None;
            }
            written.map(|written| written.is_ok())
        });
        if written.await {
            // Whoever waited may be gone just now.
            let _ = back.send(writer);
        }
    }

    /// Writes what can be written now; without a writer it is thrown away.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut writer: Option<&mut Writer>,
    ) -> Poll<Result<(), Stopped>> {
        loop {
            self.gather(cx)?;
            if self.waiting() == 0 {
                return match self.body {
                    None => Poll::Ready(Ok(())),
                    Some(_) => Poll::Pending,
                };
            }
            while self.waiting() > 0 {
                let Some(writer) = writer.as_deref_mut() else {
                    self.advance(self.waiting());
                    break;
                };
                let written = ready!(self.poll_write(cx, writer));
                let written = written.and_then(|written| match written {
                    0 => Err(ErrorKind::WriteZero.into()),
                    written => Ok(written),
                });
                match written {
                    Ok(written) => {
                        self.has_begun = true;
                        self.advance(written);
                    }
                    Err(error) if self.has_begun && is_gone(&error) => {
                        self.is_deaf = true;
                        self.advance(self.waiting());
                    }
                    Err(error) => return Poll::Ready(Err(Stopped::Io(error))),
                }
            }
        }
    }

    fn poll_write(&self, cx: &mut Context<'_>, writer: &mut Writer) -> Poll<Result<usize, Error>> {
        let writer = Pin::new(writer);
        if self.large.is_empty() && self.after.is_empty() {
            return writer.poll_write(cx, &self.out);
        }
        let parts = [&self.out[..], &self.large, &self.after].map(IoSlice::new);
        writer.poll_write_vectored(cx, &parts)
    }

    /// Bytes that are to be written next.
    fn waiting(&self) -> usize {
        self.out.len() + self.large.len() + self.after.len()
    }

    fn advance(&mut self, mut written: usize) {
        let of_out = written.min(self.out.len());
        self.out.advance(of_out);
        written -= of_out;
        let of_large = written.min(self.large.len());
        self.large.advance(of_large);
        self.after.advance(written - of_large);
    }

    /// Takes what there is of the body, up to some bytes.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), Stopped> {
        while self.waiting() < TOGETHER && self.large.is_empty() && self.after.is_empty() {
            let Some(body) = &mut self.body else {
                break;
            };
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => self.end(None)?,
                Poll::Ready(Some(Err(error))) => return Err(Stopped::Body(error)),
                Poll::Ready(Some(Ok(frame))) => {
                    let is_end = body.is_end_stream();
                    self.put(frame, is_end)?;
                }
            }
        }
        Ok(())
    }

    fn put(&mut self, frame: Frame<Bytes>, is_end: bool) -> Result<(), Stopped> {
        match frame.into_data() {
            Ok(data) => {
                self.put_data(data)?;
                if is_end {
                    self.end(None)?;
                }
                Ok(())
            }
            Err(frame) => self.end(frame.into_trailers().ok()),
        }
    }

    fn put_data(&mut self, data: Bytes) -> Result<(), Stopped> {
        if self.is_deaf || data.is_empty() {
            return Ok(());
        }
        let after: &'static [u8] = match &mut self.framing {
            Framing::Length(left) => {
                let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
                *left = left.checked_sub(length).ok_or_else(of_other_length)?;
                b""
            }
            Framing::Chunked(_) => {
                // It has room without end.
                let _ = write!(self.out, "{:x}\r\n", data.len());
                b"\r\n"
            }
        };
        if data.len() <= SMALL {
            self.out.extend_from_slice(&data);
            self.out.extend_from_slice(after);
        } else {
            self.large = data;
            self.after = Bytes::from_static(after);
        }
        Ok(())
    }

    /// The body has ended.
    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<(), Stopped> {
        self.body = None;
        match &self.framing {
            _ if self.is_deaf => {}
            Framing::Length(0) => {}
            Framing::Length(_) => return Err(of_other_length()),
            Framing::Chunked(announced) => {
                let trailers = trailers.unwrap_or_default();
                // Behind what is large.
                let mut last = BytesMut::from(&self.after[..]);
                last.put_slice(b"0\r\n");
                for (name, value) in &trailers {
                    if announced.contains(name) {
                        last.line(name, value);
                    }
                }
                last.put_slice(b"\r\n");
                match self.large.is_empty() {
                    true => self.out.unsplit(last),
                    false => self.after = last.freeze(),
                }
            }
        }
        Ok(())
    }
}

/// Whether the other side is gone.
fn is_gone(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
    )
}

fn of_other_length() -> Stopped {
    let why = "the body is not as long as it was said to be";
    Stopped::Io(Error::new(ErrorKind::InvalidData, why))
}

/// Returns the trailers that are announced, but for those that would change how the
/// message is read (RFC 9110, 6.5.1).
fn trailers(headers: &HeaderMap) -> Vec<HeaderName> {
    const NEVER: [HeaderName; 12] = [
        AUTHORIZATION,
        CACHE_CONTROL,
        CONTENT_ENCODING,
        CONTENT_LENGTH,
        CONTENT_RANGE,
        CONTENT_TYPE,
        HOST,
        MAX_FORWARDS,
        SET_COOKIE,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
    ];
    let names = words(headers, &TRAILER).filter_map(|word| HeaderName::from_bytes(word).ok());
    names.filter(|name| !NEVER.contains(name)).collect()
}
