//! Asks a worker whether it can answer.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::model::{ReadyCheck, Upstream};

/// A worker that accepts and does not answer is asked again after this.
const TIMEOUT: Duration = Duration::from_secs(1);
/// A status line is shorter than this.
const HEAD: usize = 256;

/// Returns whether the worker passes the check now. A check by log line is
/// not asked for here and never passes.
pub(super) async fn passes(check: &ReadyCheck, upstream: &Upstream) -> bool {
    let asked = tokio::time::timeout(TIMEOUT, async {
        match check {
            ReadyCheck::Log(_) => false,
            ReadyCheck::Tcp => connects(upstream).await,
            ReadyCheck::Http { path, status } => {
                let answered = get(upstream, path).await;
                answered
                    .is_some_and(|code| status.map_or((200..300).contains(&code), |s| s == code))
            }
        }
    });
    asked.await.unwrap_or(false)
}

async fn connects(upstream: &Upstream) -> bool {
    match upstream {
        Upstream::Tcp(address) => TcpStream::connect(address).await.is_ok(),
        Upstream::Unix(path) => UnixStream::connect(path).await.is_ok(),
    }
}

async fn get(upstream: &Upstream, path: &str) -> Option<u16> {
    match upstream {
        Upstream::Tcp(address) => {
            let stream = TcpStream::connect(address).await.ok()?;
            stream.set_nodelay(true).ok()?;
            status(stream, &address.to_string(), path).await
        }
        Upstream::Unix(socket) => {
            status(UnixStream::connect(socket).await.ok()?, "localhost", path).await
        }
    }
}

async fn status<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    host: &str,
    path: &str,
) -> Option<u16> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: residentd\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut head = Vec::with_capacity(HEAD);
    while !head.contains(&b'\n') && head.len() < HEAD {
        if stream.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let line = std::str::from_utf8(head.split(|byte| *byte == b'\n').next()?).ok()?;
    let mut words = line.split(' ');
    words
        .next()
        .filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.trim().parse().ok()
}
