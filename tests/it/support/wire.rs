//! One end of a connection, by hand: what is on the wire is seen and said
//! byte by byte, as client or as worker.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use super::PATIENCE;

/// A connection and what was read from it ahead.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    ahead: Vec<u8>,
}

/// The first line and the headers of a message.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    /// The first line.
    pub(crate) line: String,
    /// Names in lower case, in their order.
    pub(crate) headers: Vec<(String, String)>,
}

impl Head {
    /// Returns the values of a header, in their order.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let values = self.headers.iter().filter(|(n, _)| n == name);
        values.map(|(_, value)| value.as_str()).collect()
    }

    /// Returns the header's value.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    /// Returns the status of an answer.
    pub(crate) fn status(&self) -> u16 {
        let word = self.line.split(' ').nth(1).and_then(|s| s.parse().ok());
        word.unwrap_or_else(|| panic!("no status in {:?}", self.line))
    }
}

impl Wire {
    /// Connects.
    pub(crate) fn to(address: &str) -> Self {
        Self::on(TcpStream::connect(address).expect("a connection"))
    }

    /// Takes a connection that is there.
    pub(crate) fn on(stream: TcpStream) -> Self {
        for set in [TcpStream::set_read_timeout, TcpStream::set_write_timeout] {
            set(&stream, Some(PATIENCE)).expect("a time-out can be set");
        }
        stream.set_nodelay(true).expect("a socket option");
        Self {
            stream,
            ahead: Vec::new(),
        }
    }

    /// Returns the socket itself.
    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends these bytes.
    pub(crate) fn put(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_put(bytes).expect("the other side reads");
    }

    /// Sends these bytes to somebody who may have left.
    pub(crate) fn try_put(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Sends a request with a body of known length, both at once: who is answered
    /// before the body came may find the connection closed.
    pub(crate) fn ask(&mut self, line: &str, headers: &str, body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        let length = body.len();
        let head = format!(
            "{line} HTTP/1.1\r\nhost: models.test\r\n{headers}content-length: {length}\r\n\r\n"
        );
        self.put([head.as_bytes(), body].concat());
    }

    /// Sends one chunk of a chunked body; an empty one is the last.
    pub(crate) fn put_chunk(&mut self, data: impl AsRef<[u8]>) {
        let data = data.as_ref();
        let mut bytes = format!("{:x}\r\n", data.len()).into_bytes();
        bytes.extend_from_slice(data);
        bytes.extend_from_slice(b"\r\n");
        self.put(bytes);
    }

    /// Reads a head. Panics when the connection ends first.
    pub(crate) fn head(&mut self) -> Head {
        let text = self.until(b"\r\n\r\n");
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut lines = text.trim_end().split("\r\n").map(str::to_owned);
        let line = lines.next().expect("a first line");
        let headers = lines
            .filter_map(|line| {
                let (name, value) = line.split_once(':')?;
                Some((name.to_ascii_lowercase(), value.trim().to_owned()))
            })
            .collect();
        Head { line, headers }
    }

    /// Reads the body that belongs to `head` to its end.
    pub(crate) fn body(&mut self, head: &Head) -> Vec<u8> {
        if head.get("transfer-encoding").is_some() {
            let mut all = Vec::new();
            while let Some(chunk) = self.chunk() {
                all.extend_from_slice(&chunk);
            }
            return all;
        }
        let length = head.get("content-length").and_then(|l| l.parse().ok());
        self.exactly(length.unwrap_or(0))
    }

    /// Reads a whole answer.
    pub(crate) fn answer(&mut self) -> (Head, String) {
        let head = self.head();
        let body = self.body(&head);
        (head, String::from_utf8_lossy(&body).into_owned())
    }

    /// Reads the event that says why a stream of events breaks, which names this, and
    /// then the break.
    pub(crate) fn error_event(mut self, names: &str) {
        let said = self.chunk().expect("an error event");
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(
            said.starts_with("event: error\ndata: {\"error\":"),
            "{said}"
        );
        assert!(said.contains(names) && said.ends_with("\n\n"), "{said}");
        assert_eq!(self.rest().0, b"", "no last chunk");
    }

    /// Reads one chunk; `None` is the last.
    pub(crate) fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = self.until(b"\r\n");
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        let size = usize::from_str_radix(&text, 16).expect("the size of a chunk");
        let data = self.exactly(size);
        assert_eq!(self.exactly(2), b"\r\n");
        (size > 0).then_some(data)
    }

    /// Reads this many bytes.
    pub(crate) fn exactly(&mut self, length: usize) -> Vec<u8> {
        while self.ahead.len() < length {
            self.more();
        }
        self.ahead.drain(..length).collect()
    }

    /// Reads until the connection ends; the error when it is no plain end.
    pub(crate) fn rest(mut self) -> (Vec<u8>, Option<ErrorKind>) {
        let ended = self.stream.read_to_end(&mut self.ahead);
        (self.ahead, ended.err().map(|error| error.kind()))
    }

    /// Says that nothing more will be sent.
    pub(crate) fn finish(&mut self) {
        self.stream
            .shutdown(Shutdown::Write)
            .expect("the connection is open");
    }

    /// Ends the connection with a reset.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.stream)
            .set_linger(Some(std::time::Duration::ZERO))
            .expect("a socket option");
    }

    fn until(&mut self, mark: &[u8]) -> Vec<u8> {
        loop {
            let found = self.ahead.windows(mark.len()).position(|w| w == mark);
            if let Some(at) = found {
                return self.ahead.drain(..at + mark.len()).collect();
            }
            self.more();
        }
    }

    fn more(&mut self) {
        let mut buffer = [0; 64 << 10];
        let read = match self.stream.read(&mut buffer) {
            Ok(read) if read > 0 => read,
            ended => panic!("{ended:?} after {:?}", String::from_utf8_lossy(&self.ahead)),
        };
        self.ahead.extend_from_slice(&buffer[..read]);
    }
}
