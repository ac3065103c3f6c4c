//! Asks a worker whether it can answer.
//!
//! A probe leaves its connection for the first request when it is as good as a
//! new one: the worker speaks HTTP/1.1, does not close, and its answer was read
//! to its end.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::opened::Stream;
use crate::model::{ReadyCheck, Upstream};

/// A worker that accepts and does not answer is asked again after this.
const TIMEOUT: Duration = Duration::from_secs(1);
/// The end of an answer is waited for so long; what it says is known before.
const REST: Duration = Duration::from_millis(2);
/// The answer to a probe is shorter than this, or its connection is not kept.
const LONGEST: usize = 16 << 10;

/// A check that was passed, and its connection if it can be used again.
pub(super) type Passed = Option<Stream>;

/// Returns whether the worker passes the check now. A check by log line or by
/// notice is not asked for here and never passes.
pub(super) async fn passes(check: &ReadyCheck, upstream: &Upstream) -> Option<Passed> {
    let asked = tokio::time::timeout(TIMEOUT, async {
        match check {
            ReadyCheck::Log(_) | ReadyCheck::Notify => None,
            // Nothing was sent on it: it is a new connection.
            ReadyCheck::Tcp => connect(upstream).await.map(Some),
            ReadyCheck::Http { path, status } => {
                let counts = |code: u16| status.map_or((200..300).contains(&code), |s| s == code);
                match connect(upstream).await? {
                    Stream::Tcp(stream) => {
                        let host = upstream_host(upstream);
                        let kept = get(stream, (&host, path), counts).await?;
                        Some(kept.map(Stream::Tcp))
                    }
                    Stream::Unix(stream) => {
                        let kept = get(stream, ("localhost", path), counts).await?;
                        Some(kept.map(Stream::Unix))
                    }
                }
            }
        }
    });
    asked.await.ok().flatten()
}

fn upstream_host(upstream: &Upstream) -> String {
    match upstream {
        Upstream::Tcp(address) => address.to_string(),
        Upstream::Unix(_) => "localhost".to_owned(),
    }
}

async fn connect(upstream: &Upstream) -> Option<Stream> {
    Some(match upstream {
        Upstream::Tcp(address) => {
            let stream = TcpStream::connect(address).await.ok()?;
            stream.set_nodelay(true).ok()?;
            Stream::Tcp(stream)
        }
        Upstream::Unix(path) => Stream::Unix(UnixStream::connect(path).await.ok()?),
    })
}

/// Asks; `None` when the answer does not count. The stream comes back when
/// another request may follow on it.
async fn get<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    (host, path): (&str, &str),
    counts: impl Fn(u16) -> bool,
) -> Option<Option<S>> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: residentd\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::with_capacity(512);
    while !answer.contains(&b'\n') {
        if answer.len() > LONGEST || stream.read_buf(&mut answer).await.ok()? == 0 {
            return None;
        }
    }
    counts(status(&answer)?).then_some(())?;
    let rest = tokio::time::timeout(REST, async {
        loop {
            match ends(&answer) {
                End::Here => return true,
                End::Unknown => return false,
                End::Later => {}
            }
            if answer.len() > LONGEST || !matches!(stream.read_buf(&mut answer).await, Ok(1..)) {
                return false;
            }
        }
    });
    let is_clean = rest.await.unwrap_or(false);
    Some(is_clean.then_some(stream))
}

fn status(answer: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(answer.split(|byte| *byte == b'\n').next()?).ok()?;
    let mut words = line.split(' ');
    words
        .next()
        .filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.trim().parse().ok()
}

/// Where an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With the last byte that came.
    Here,
    /// Behind it.
    Later,
    /// Nobody can tell, or the worker closes.
    Unknown,
}

/// Returns where an answer ends of which this has come. Only the plainest kind
/// is understood: a length, or none by its status.
fn ends(answer: &[u8]) -> End {
    let Some(head) = answer.windows(4).position(|end| end == b"\r\n\r\n") else {
        return End::Later;
    };
    let Ok(text) = std::str::from_utf8(&answer[..head]) else {
        return End::Unknown;
    };
    if !text.starts_with("HTTP/1.1 ") {
        return End::Unknown;
    }
    let mut length = status(answer)
        .filter(|code| matches!(code, 204 | 304))
        .map(|_| 0);
    for line in text.split("\r\n").skip(1) {
        let Some((name, value)) = line.split_once(':') else {
            return End::Unknown;
        };
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") && length.is_none() {
            length = value.parse::<usize>().ok();
        } else if name.eq_ignore_ascii_case("transfer-encoding")
            || (name.eq_ignore_ascii_case("connection")
                && !value.eq_ignore_ascii_case("keep-alive"))
        {
            return End::Unknown;
        }
    }
    match (length, answer.len() - head - 4) {
        (Some(length), came) if came == length => End::Here,
        (Some(length), came) if came < length => End::Later,
        _ => End::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[test]
    fn only_an_answer_whose_end_is_known_leaves_a_connection() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
        for (answer, end) in [
            (format!("{ok}ok"), End::Here),
            (format!("{ok}o"), End::Later),
            (format!("{ok}ok!"), End::Unknown),
            ("HTTP/1.1 200 OK\r\ncontent-le".into(), End::Later),
            ("HTTP/1.1 204 No Content\r\n\r\n".into(), End::Here),
            ("HTTP/1.1 200 OK\r\n\r\n".into(), End::Unknown),
            (ok.replace("1.1", "1.0") + "ok", End::Unknown),
            (
                ok.replace(
                    "Content-Length: 2",
                    "connection: close\r\ncontent-length: 2",
                ) + "ok",
                End::Unknown,
            ),
            (
                ok.replace(
                    "Content-Length: 2",
                    "Connection: keep-alive\r\ncontent-length: 2",
                ) + "ok",
                End::Here,
            ),
            (
                ok.replace("Content-Length: 2", "transfer-encoding: chunked") + "0\r\n\r\n",
                End::Unknown,
            ),
            (ok.replace(": 2", ": two") + "ok", End::Unknown),
        ] {
            assert_eq!(ends(answer.as_bytes()), end, "{answer}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_end_in_time_counts_and_leaves_no_connection() {
        for (answer, expected) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", Some(true)),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",
                Some(false),
            ),
            ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", None),
            ("SSH-2.0-x\r\n", None),
        ] {
            let (ours, mut theirs) = duplex(4096);
            theirs.write_all(answer.as_bytes()).await.expect("it fits");
            let asked = get(ours, ("x", "/"), |code| code == 200).await;
            assert_eq!(asked.map(|kept| kept.is_some()), expected, "{answer}");
        }
    }
}
