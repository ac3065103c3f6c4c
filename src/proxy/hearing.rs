//! A connection that listens on when it cannot speak any more.
//!
//! A worker that refuses a body answers before it has read it and closes. The
//! write that fails then must not hide the answer that waits to be read: what
//! cannot be written is thrown away, and the reading says how it ended.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::rt::{Read, ReadBufCursor, Write};

/// See the module.
#[derive(Debug)]
pub(super) struct Hearing<I>(pub(super) I);

/// Turns the failure of a write to a side that left into success.
fn thrown_away<T>(written: Poll<Result<T>>, all: T) -> Poll<Result<T>> {
    let left = |error: &Error| {
        matches!(
            error.kind(),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
        )
    };
    match written {
        Poll::Ready(Err(error)) if left(&error) => Poll::Ready(Ok(all)),
        other => other,
    }
}

impl<I: Read + Unpin> Read for Hearing<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<I: Write + Unpin> Write for Hearing<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        thrown_away(Pin::new(&mut self.0).poll_write(cx, bytes), bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let all = parts.iter().map(|part| part.len()).sum();
        thrown_away(Pin::new(&mut self.0).poll_write_vectored(cx, parts), all)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        thrown_away(Pin::new(&mut self.0).poll_flush(cx), ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
