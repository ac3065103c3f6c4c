//! A client of HTTP/1.1 that costs little and hides nothing: it tells each read
//! apart, and its answers are compared byte for byte.

use std::io::{self, Read, Write};
use std::net::TcpStream as Blocking;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::load::{self, ASK, MODEL};

/// Returns the bytes of a request with this body; `ask` is what the worker is to
/// do, `more` further lines of the head.
pub(crate) fn request(ask: &str, more: &str, body: &[u8]) -> Vec<u8> {
    let mut text = head(ask, more, body.len());
    text.extend(body);
    text
}

/// Returns the head of such a request.
pub(crate) fn head(ask: &str, more: &str, length: usize) -> Vec<u8> {
    post(("/v1/completions", "application/json"), ask, more, length)
}

/// Returns the head of a request with a body of this kind to this path.
pub(crate) fn post((path, kind): (&str, &str), ask: &str, more: &str, length: usize) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: {MODEL}\r\ncontent-type: {kind}\r\n{ASK}: {ask}\r\n{more}content-length: {length}\r\n\r\n"
    )
    .into_bytes()
}

/// Returns the bytes of a request for a document.
pub(crate) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: {MODEL}\r\n\r\n").into_bytes()
}

fn broken(why: &str) -> io::Error {
    io::Error::other(why)
}

/// What is still to come of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Head,
    Bytes(usize),
    /// The line that says how long the next chunk is.
    ChunkHead,
    Chunk(usize),
    /// The line break after a chunk.
    ChunkEnd,
    /// The empty line after the last chunk.
    Last,
    Nothing,
}

/// An answer that is being read.
#[derive(Debug)]
pub(crate) struct Answer {
    left: Left,
    raw: Vec<u8>,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn new() -> Self {
        Self {
            left: Left::Head,
            raw: Vec::new(),
            head: String::new(),
            body: Vec::new(),
        }
    }

    /// Makes ready for the next one.
    fn clear(&mut self) {
        self.left = Left::Head;
        self.raw.clear();
        self.head.clear();
        self.body.clear();
    }

    /// Takes what was read.
    fn feed(&mut self, data: &[u8]) -> io::Result<()> {
        self.raw.extend(data);
        let raw = std::mem::take(&mut self.raw);
        let mut rest = &raw[..];
        while let Some(next) = self.step(rest)? {
            rest = next;
        }
        let kept = raw.len() - rest.len();
        self.raw = raw;
        self.raw.drain(..kept);
        Ok(())
    }

    /// Returns what is left when one part was taken; nothing when more is needed.
    fn step<'a>(&mut self, data: &'a [u8]) -> io::Result<Option<&'a [u8]>> {
        match self.left {
            Left::Head => {
                let Some(at) = memchr::memmem::find(data, b"\r\n\r\n") else {
                    return Ok(None);
                };
                let head = std::str::from_utf8(&data[..at]).map_err(io::Error::other)?;
                self.head.push_str(head);
                self.left = self.framing()?;
                Ok(Some(&data[at + 4..]))
            }
            Left::Bytes(left) | Left::Chunk(left) => {
                let chunked = matches!(self.left, Left::Chunk(_));
                let (now, rest) = data.split_at(left.min(data.len()));
                self.body.extend(now);
                self.left = match (left - now.len(), chunked) {
                    (0, true) => Left::ChunkEnd,
                    (0, false) => Left::Nothing,
                    (more, true) => Left::Chunk(more),
                    (more, false) => Left::Bytes(more),
                };
                Ok((!now.is_empty()).then_some(rest))
            }
            Left::ChunkHead | Left::ChunkEnd | Left::Last => {
                let Some(at) = memchr::memmem::find(data, b"\r\n") else {
                    return Ok(None);
                };
                self.left = match self.left {
                    Left::ChunkEnd => Left::ChunkHead,
                    Left::ChunkHead => match chunk_length(&data[..at])? {
                        0 => Left::Last,
                        length => Left::Chunk(length),
                    },
                    _ => Left::Nothing,
                };
                Ok(Some(&data[at + 2..]))
            }
            Left::Nothing if data.is_empty() => Ok(None),
            Left::Nothing => Err(broken("there is more than the answer")),
        }
    }

    fn framing(&self) -> io::Result<Left> {
        if !self.head.starts_with("HTTP/1.1 200") {
            return Err(broken(&format!("answered {}", self.head)));
        }
        if let Some(length) = self.header("content-length") {
            let length = length.parse().map_err(io::Error::other)?;
            return Ok(Left::Bytes(length));
        }
        match self.header("transfer-encoding") {
            Some("chunked") => Ok(Left::ChunkHead),
            _ => Err(broken(&format!(
                "an answer without a length: {}",
                self.head
            ))),
        }
    }

    /// Returns a line of the head.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut pairs = self.head.lines().filter_map(|line| line.split_once(": "));
        let found = pairs.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value)
    }

    fn is_done(&self) -> bool {
        self.left == Left::Nothing
    }

    /// Fails unless the body is that of a small answer.
    pub(crate) fn is_small(&self) -> io::Result<()> {
        match self.body == load::answer() {
            true => Ok(()),
            false => Err(broken("other bytes came back")),
        }
    }
}

fn chunk_length(line: &[u8]) -> io::Result<usize> {
    let line = std::str::from_utf8(line).map_err(io::Error::other)?;
    let digits = line.split(';').next().unwrap_or_default().trim();
    usize::from_str_radix(digits, 16).map_err(io::Error::other)
}

/// A kept connection.
#[derive(Debug)]
pub(crate) struct Connection<S = TcpStream> {
    stream: S,
    buffer: Vec<u8>,
    pub(crate) answer: Answer,
}

impl Connection {
    pub(crate) async fn open(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::over(stream))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(crate) fn over(stream: S) -> Self {
        Self {
            stream,
            buffer: vec![0; 16 << 10],
            answer: Answer::new(),
        }
    }

    /// Sends a request and reads the whole answer.
    pub(crate) async fn ask(&mut self, request: &[u8]) -> io::Result<()> {
        self.send(request).await?;
        while self.read().await? {}
        Ok(())
    }

    pub(crate) async fn send(&mut self, request: &[u8]) -> io::Result<()> {
        self.answer.clear();
        self.stream.write_all(request).await
    }

    /// Sends more of a request's body.
    pub(crate) async fn send_more(&mut self, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(data).await
    }

    /// Reads once; returns whether there is more to come.
    pub(crate) async fn read(&mut self) -> io::Result<bool> {
        let read = self.stream.read(&mut self.buffer).await?;
        if read == 0 {
            return Err(broken("the connection was closed"));
        }
        self.answer.feed(&self.buffer[..read])?;
        Ok(!self.answer.is_done())
    }
}

/// A kept connection of a thread that waits.
#[derive(Debug)]
pub(crate) struct Waiting {
    stream: Blocking,
    buffer: Vec<u8>,
    pub(crate) answer: Answer,
}

impl Waiting {
    pub(crate) fn open(address: &str) -> io::Result<Self> {
        let stream = Blocking::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
        Ok(Self {
            stream,
            buffer: vec![0; 64 << 10],
            answer: Answer::new(),
        })
    }

    /// Sends a request and reads the whole answer.
    pub(crate) fn ask(&mut self, request: &[u8]) -> io::Result<()> {
        self.answer.clear();
        self.stream.write_all(request)?;
        while !self.answer.is_done() {
            let read = self.stream.read(&mut self.buffer)?;
            if read == 0 {
                return Err(broken("the connection was closed"));
            }
            self.answer.feed(&self.buffer[..read])?;
        }
        Ok(())
    }
}
