//! A connection to which small parts are written in one.
//!
//! hyper gives the head of an answer and its body, and the size of a chunk, its bytes and
//! their end, as parts of one write (`writev`). Small ones cost the kernel more one by
//! one than it costs to copy them together first. What is encrypted is copied anyway.

use std::cell::RefCell;
use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Parts are put together up to this, in bytes.
const TOGETHER: usize = 4 << 10;

thread_local! {
    /// Where that is done, on each thread.
    static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// See the module.
#[derive(Debug)]
pub(super) struct Parts<I>(pub(super) I);

impl<I: AsyncRead + Unpin> AsyncRead for Parts<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Parts<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let inner = Pin::new(&mut self.0);
        if let [part] = parts {
            return inner.poll_write(cx, part);
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length > TOGETHER {
            return inner.poll_write_vectored(cx, parts);
        }
        ROOM.with_borrow_mut(|room| {
            room.clear();
            for part in parts {
                room.extend_from_slice(part);
            }
            inner.poll_write(cx, room)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// Notes how it was written to, and takes few bytes of one part.
    #[derive(Debug)]
    struct Noting(TcpStream, Vec<usize>);

    impl AsyncWrite for Noting {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<Result<usize>> {
            self.1.push(1);
            Pin::new(&mut self.0).poll_write(cx, &bytes[..bytes.len().min(3)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            parts: &[IoSlice<'_>],
        ) -> Poll<Result<usize>> {
            self.1.push(parts.len());
            Pin::new(&mut self.0).poll_write_vectored(cx, parts)
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn small_parts_go_out_in_one_and_large_ones_as_they_are() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let stream = TcpStream::connect(address).await.expect("it listens");
        let (mut heard, _) = listener.accept().await.expect("it comes");
        let mut parts = Parts(Noting(stream, Vec::new()));
        assert!(parts.is_write_vectored());
        let large = vec![b'x'; TOGETHER];
        for given in [
            &[&b"5\r\n"[..], b"hello", b"\r\n"][..],
            &[b"1000\r\n", &large],
        ] {
            let mut written = 0;
            let all = given.concat();
            while written < all.len() {
                let mut left = written;
                let slices: Vec<_> = given
                    .iter()
                    .map(|part| {
                        let from = left.min(part.len());
                        left -= from;
                        IoSlice::new(&part[from..])
                    })
                    .collect();
                let more = parts.write_vectored(&slices).await;
                written += more.expect("it is written");
            }
            let mut come = vec![0; all.len()];
            heard.read_exact(&mut come).await.expect("it comes");
            assert_eq!(come, all);
        }
        assert_eq!(parts.0.1[..5], [1, 1, 1, 1, 2]);
    }
}
