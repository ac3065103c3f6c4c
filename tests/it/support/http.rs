//! A blocking HTTP/1.1 client of a hundred lines: one request a connection,
//! everything that came is shown as it came.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// What a server answered.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// The status code.
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// The body, chunked framing undone.
    pub(crate) body: Vec<u8>,
    /// Whether the body ended as its framing says it should.
    pub(crate) complete: bool,
}

impl Answer {
    /// Returns the body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Returns the body as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// Returns the header's value.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// Returns the pid of the stub worker that answered.
    pub(crate) fn worker_pid(&self) -> i64 {
        let pid = self.header("x-stub-pid").and_then(|pid| pid.parse().ok());
        pid.unwrap_or_else(|| panic!("no stub answered: {} {}", self.status, self.text()))
    }

    /// Reads an answer as it came over the wire; `None` without a whole head.
    pub(crate) fn parse(raw: &[u8]) -> Option<Self> {
        let end = raw.windows(4).position(|w| w == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&raw[..end]).into_owned();
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let rest = &raw[end + 4..];
        let find = |name: &str| {
            headers
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, v)| v.clone())
        };
        let (body, complete) = if find("transfer-encoding").is_some_and(|v| v.contains("chunked")) {
            unchunk(rest)
        } else if let Some(length) = find("content-length").and_then(|v| v.parse::<usize>().ok()) {
            (
                rest[..rest.len().min(length)].to_vec(),
                rest.len() >= length,
            )
        } else {
            (rest.to_vec(), true)
        };
        Some(Self {
            status,
            headers,
            body,
            complete,
        })
    }
}

/// Undoes chunked framing; false when the last chunk is missing.
fn unchunk(mut raw: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = raw.windows(2).position(|w| w == b"\r\n") else {
            return (body, false);
        };
        let size = std::str::from_utf8(&raw[..end])
            .ok()
            .and_then(|s| usize::from_str_radix(s, 16).ok());
        let Some(size) = size else {
            return (body, false);
        };
        raw = &raw[end + 2..];
        if size == 0 {
            return (body, raw.starts_with(b"\r\n"));
        }
        if raw.len() < size + 2 {
            body.extend_from_slice(&raw[..raw.len().min(size)]);
            return (body, false);
        }
        body.extend_from_slice(&raw[..size]);
        raw = &raw[size + 2..];
    }
}

/// Opens a connection and sends a request; the answer is still to be read.
pub(crate) fn send(
    address: &str,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let body = body.unwrap_or_default();
    let kind = if body.is_empty() {
        ""
    } else {
        "content-type: application/json\r\n"
    };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{kind}content-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(stream)
}

/// Sends a request and reads the whole answer.
pub(crate) fn request(
    address: &str,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> std::io::Result<Answer> {
    let mut stream = send(address, method, path, body)?;
    let mut raw = Vec::new();
    // A connection that is cut ends the answer; whether it was whole is in it.
    let read = stream.read_to_end(&mut raw);
    match Answer::parse(&raw) {
        Some(answer) => Ok(answer),
        None => Err(read.err().unwrap_or_else(|| {
            std::io::Error::other(format!("no answer: {:?}", String::from_utf8_lossy(&raw)))
        })),
    }
}

/// A stream that has begun: its connection, and what came so far.
pub(crate) type Begun = (TcpStream, Vec<u8>);

/// Begins a stream of so many events of a stub, 10 ms apart, and waits for its
/// first.
pub(crate) fn begin(address: &str, model: &str, chunks: u32) -> Begun {
    let body = format!(
        "{{\"model\": {model:?}, \"prompt\": \"x\", \"stream\": true, \"x_chunks\": {chunks}, \"x_pace_ms\": 10}}"
    );
    let mut stream = send(address, "POST", "/v1/completions", Some(&body)).expect("a connection");
    let mut raw = vec![0_u8; 64];
    let read = stream.read(&mut raw).expect("it begins");
    raw.truncate(read);
    (stream, raw)
}

/// Reads the rest of a stream.
pub(crate) fn finish((mut stream, mut raw): Begun) -> Answer {
    // A stream that is cut ends with an error; whether it was whole is in it.
    let _ = stream.read_to_end(&mut raw);
    Answer::parse(&raw).expect("an answer")
}
