//! Asks a worker whether it can answer.

use std::io::{Error, ErrorKind, Result};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::model::{ReadyCheck, Upstream};

/// While a worker starts, one that accepts and does not answer is asked again
/// after this.
const TIMEOUT: Duration = Duration::from_secs(1);
/// A status line is shorter than this.
const HEAD: usize = 256;

/// What a worker answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// What the check wants.
    Passes,
    /// Another status.
    Status(u16),
    /// Nothing listens.
    Refused,
    /// Nothing in time, or nothing that is HTTP.
    Nothing,
}

/// Returns whether the worker passes the check now. A check by log line is
/// not asked for here and never passes.
pub(super) async fn passes(check: &ReadyCheck, upstream: &Upstream) -> bool {
    !matches!(check, ReadyCheck::Log(_)) && ask(check, upstream, TIMEOUT).await == Answer::Passes
}

/// Asks a worker once. One that shows by a log line that it is ready is asked
/// for a connection.
pub(super) async fn ask(check: &ReadyCheck, upstream: &Upstream, timeout: Duration) -> Answer {
    let asked = tokio::time::timeout(timeout, async {
        match check {
            ReadyCheck::Log(_) | ReadyCheck::Tcp => {
                connect(upstream).await.map(|()| Answer::Passes)
            }
            ReadyCheck::Http { path, status } => {
                let code = get(upstream, path).await?;
                let good = status.map_or((200..300).contains(&code), |s| s == code);
                Ok(if good {
                    Answer::Passes
                } else {
                    Answer::Status(code)
                })
            }
        }
    });
    match asked.await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) if is_refused(&error) => Answer::Refused,
        Ok(Err(_)) | Err(_) => Answer::Nothing,
    }
}

/// Whether it says that nothing listens there: also a Unix socket that was
/// taken away.
fn is_refused(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused | ErrorKind::NotFound
    )
}

async fn connect(upstream: &Upstream) -> Result<()> {
    match upstream {
        Upstream::Tcp(address) => TcpStream::connect(address).await.map(drop),
        Upstream::Unix(path) => UnixStream::connect(path).await.map(drop),
    }
}

async fn get(upstream: &Upstream, path: &str) -> Result<u16> {
    match upstream {
        Upstream::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            status(stream, &address.to_string(), path).await
        }
        Upstream::Unix(socket) => {
            status(UnixStream::connect(socket).await?, "localhost", path).await
        }
    }
}

async fn status<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    host: &str,
    path: &str,
) -> Result<u16> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: residentd\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::with_capacity(HEAD);
    while !head.contains(&b'\n') && head.len() < HEAD {
        if stream.read_buf(&mut head).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    parse(&head).ok_or_else(|| ErrorKind::InvalidData.into())
}

fn parse(head: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(head.split(|byte| *byte == b'\n').next()?).ok()?;
    let mut words = line.split(' ');
    words
        .next()
        .filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.trim().parse().ok()
}
