//! Asks a worker whether it can answer.
//!
//! A probe leaves its connection for the next one, and at last for the first
//! request, when it is as good as a new one: the worker speaks HTTP/1.1, does not
//! close, and its answer was read to its end. A worker that loads for long is asked
//! many times, and most of what that costs is to connect.

use std::io::{Error, ErrorKind, Result};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::opened::Stream;
use crate::clock::{Clock, Timestamp};
use crate::model::{ReadyCheck, Upstream};

/// While a worker starts, one that accepts and does not answer is asked again
/// after this.
const TIMEOUT: Duration = Duration::from_secs(1);
/// So many probes in this time, however many lines a worker prints. Some may come
/// at once: the line that tells is mostly one of several.
const TURNS: (u32, Duration) = (8, Duration::from_millis(16));
/// The end of an answer is waited for so long; what it says is known before.
const REST: Duration = Duration::from_millis(2);
/// The answer to a probe is shorter than this, or its connection is not kept.
const LONGEST: usize = 16 << 10;

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

/// Spaces out the probes of a worker that starts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Turns {
    /// When all probes so far would have been made, one after the other.
    even: Timestamp,
}

impl Turns {
    /// Waits until the next probe may be made.
    pub(super) async fn next(&mut self, clock: Clock) {
        let wait = self.take(clock.now());
        // Timers count in milliseconds: even the shortest sleep takes one.
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes the next turn, and returns how long it is until then.
    fn take(&mut self, now: Timestamp) -> Duration {
        let (most, within) = TURNS;
        self.even = self.even.max(now) + within / most;
        self.even.since(now).saturating_sub(within)
    }
}

/// The connection of the last probe, if it can be used again.
pub(super) type Kept = Option<Stream>;

/// Returns whether a worker that starts passes the check now. Asks on the kept
/// connection, and leaves there the one it asked on. Of each new connection
/// `is_ours` says whether it is the worker that took it, and no stranger on its
/// port; that is looked up while the answer is under way.
pub(super) async fn passes(
    check: &ReadyCheck,
    upstream: &Upstream,
    kept: &mut Kept,
    is_ours: impl FnMut() -> bool,
) -> bool {
    probe(check, upstream, TIMEOUT, kept, is_ours).await == Answer::Passes
}

/// Asks a ready worker once.
pub(super) async fn ask(check: &ReadyCheck, upstream: &Upstream, timeout: Duration) -> Answer {
    probe(check, upstream, timeout, &mut None, || true).await
}

/// Asks a worker once. One that shows by a log line or by a notice that it is
/// ready is asked for a connection.
async fn probe(
    check: &ReadyCheck,
    upstream: &Upstream,
    timeout: Duration,
    kept: &mut Kept,
    mut is_ours: impl FnMut() -> bool,
) -> Answer {
    let asked = tokio::time::timeout(timeout, async {
        let (path, status) = match check {
            ReadyCheck::Log(_) | ReadyCheck::Notify | ReadyCheck::Tcp => {
                // Nothing is sent on it: it stays a new connection.
                let stream = Stream::connect(upstream).await?;
                if !is_ours() {
                    return Err(a_stranger());
                }
                *kept = Some(stream);
                return Ok(Answer::Passes);
            }
            ReadyCheck::Http { path, status } => (path, *status),
        };
        let asked = (upstream.host(), path.as_str());
        let code = match kept.take() {
            Some(stream) => get(stream, &asked, kept, || true).await.ok(),
            None => None,
        };
        let code = match code {
            Some(code) => code,
            // None was kept, or the worker has closed it meanwhile, as it may.
            None => get(Stream::connect(upstream).await?, &asked, kept, is_ours).await?,
        };
        Ok(
            match status.map_or((200..300).contains(&code), |s| s == code) {
                true => Answer::Passes,
                false => Answer::Status(code),
            },
        )
    });
    match asked.await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) if is_refused(&error) => Answer::Refused,
        Ok(Err(_)) | Err(_) => Answer::Nothing,
    }
}

/// Asks on this connection and returns the status. The connection is kept when
/// another request may follow on it.
async fn get(
    stream: Stream,
    asked: &(String, &str),
    kept: &mut Kept,
    is_ours: impl FnMut() -> bool,
) -> Result<u16> {
    let (code, left) = match stream {
        Stream::Tcp(stream) => {
            let (code, left) = exchange(stream, asked, is_ours).await?;
            (code, left.map(Stream::Tcp))
        }
        Stream::Unix(stream) => {
            let (code, left) = exchange(stream, asked, is_ours).await?;
            (code, left.map(Stream::Unix))
        }
    };
    *kept = left;
    Ok(code)
}

fn a_stranger() -> Error {
    ErrorKind::AddrInUse.into()
}

/// Whether it says that nothing listens there: also a Unix socket that was
/// taken away.
fn is_refused(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused | ErrorKind::NotFound
    )
}

/// Asks, and returns the status. The stream comes back when another request may
/// follow on it.
async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    (host, path): &(String, &str),
    mut is_ours: impl FnMut() -> bool,
) -> Result<(u16, Option<S>)> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: residentd\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    if !is_ours() {
        return Err(a_stranger());
    }
    let mut answer = Vec::with_capacity(512);
    while !answer.contains(&b'\n') {
        if answer.len() > LONGEST {
            return Err(ErrorKind::InvalidData.into());
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    let code = status(&answer).ok_or(ErrorKind::InvalidData)?;
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
    Ok((code, is_clean.then_some(stream)))
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
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn probes_come_at_once_until_there_are_too_many() {
        let mut turns = Turns::default();
        let mut now = Timestamp::from_millis(1000);
        let at_once = (0..100).take_while(|_| turns.take(now).is_zero()).count();
        assert_eq!(at_once, 8);
        // From then on as many as there is time for.
        for _ in 0..100 {
            now = now + turns.take(now);
        }
        assert_eq!(now, Timestamp::from_millis(1000 + 2 * 100 + 2));
        assert!(turns.take(now + Duration::from_millis(4)).is_zero());
    }

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

    /// Probes once sent `Host: http://…`, which strict servers answer with 400.
    #[tokio::test]
    async fn a_worker_is_called_by_its_address_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let served = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut asked).await.expect("it reads"), 0);
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            stream.write_all(answer).await.expect("it writes");
            String::from_utf8(asked).expect("it is text")
        };
        let check = ReadyCheck::Http {
            path: "/health".into(),
            status: None,
        };
        let upstream = Upstream::Tcp(address);
        let mut kept = None;
        let (asked, passed) = tokio::join!(served, passes(&check, &upstream, &mut kept, || true));
        assert!(passed && kept.is_some());
        let host = format!("\r\nhost: {address}\r\n");
        assert!(asked.contains(&host), "{asked}");
    }

    #[tokio::test]
    async fn a_stranger_is_not_believed_and_its_connection_not_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let upstream = Upstream::Tcp(listener.local_addr().expect("an address"));
        let http = ReadyCheck::Http {
            path: "/health".into(),
            status: None,
        };
        for check in [http, ReadyCheck::Tcp] {
            let mut kept = None;
            let asked = probe(&check, &upstream, TIMEOUT, &mut kept, || false).await;
            assert_eq!(asked, Answer::Nothing);
            assert!(kept.is_none());
        }
    }

    #[tokio::test]
    async fn a_worker_that_loads_is_asked_on_one_connection_until_it_closes_that() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let upstream = Upstream::Tcp(listener.local_addr().expect("an address"));
        // Of each connection, what is answered on it before it is closed.
        let served = async {
            for statuses in [&["503 No", "503 No"][..], &["503 No", "200 OK"]] {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                for status in statuses {
                    let mut asked = Vec::new();
                    while !asked.ends_with(b"\r\n\r\n") {
                        assert_ne!(stream.read_buf(&mut asked).await.expect("it reads"), 0);
                    }
                    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
                    stream.write_all(answer.as_bytes()).await.expect("written");
                }
            }
        };
        let check = ReadyCheck::Http {
            path: "/health".into(),
            status: None,
        };
        let probes = async {
            let mut kept = None;
            let mut passed = Vec::new();
            let mut looked_up = 0;
            for _ in 0..4 {
                let is_ours = || {
                    looked_up += 1;
                    true
                };
                passed.push(passes(&check, &upstream, &mut kept, is_ours).await);
            }
            (passed, kept.is_some(), looked_up)
        };
        let ((), (passed, is_kept, looked_up)) = tokio::join!(served, probes);
        assert_eq!(passed, [false, false, false, true]);
        assert!(is_kept);
        assert_eq!(looked_up, 2, "once for each connection");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_end_in_time_counts_and_leaves_no_connection() {
        for (answer, expected) in [
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
                Some((200, true)),
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",
                Some((200, false)),
            ),
            (
                "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n",
                Some((503, true)),
            ),
            ("SSH-2.0-x\r\n", None),
        ] {
            let (ours, mut theirs) = duplex(4096);
            theirs.write_all(answer.as_bytes()).await.expect("it fits");
            let asked = exchange(ours, &("x".into(), "/"), || true).await;
            let asked = asked.ok().map(|(code, kept)| (code, kept.is_some()));
            assert_eq!(asked, expected, "{answer}");
        }
    }
}
