//! What passes through, byte by byte: raw connections against the real binary
//! and stub workers.

mod finding;
mod passing;
mod upgrading;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use crate::support::residentd::STUB;
use crate::support::{Answer, Residentd};

/// Two models, one of them with a slash and an alias.
fn two() -> String {
    format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n\
         [models.red]\ncommand = '{STUB} --port ${{PORT}} --name red'\nmemory = \"32MiB\"\n\
         [models.\"org/blue:7b\"]\ncommand = '{STUB} --port ${{PORT}} --name blue'\nmemory = \"32MiB\"\naliases = [\"azure\"]\n"
    )
}

fn one() -> String {
    format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n\
         [models.red]\ncommand = '{STUB} --port ${{PORT}} --name red'\nmemory = \"32MiB\"\n"
    )
}

/// A connection on which a test writes what it wants.
struct Wire(TcpStream);

impl Wire {
    fn to(residentd: &Residentd) -> Self {
        let stream = TcpStream::connect(residentd.address()).expect("residentd listens");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a time-out can be set");
        stream.set_nodelay(true).expect("it can be set");
        Self(stream)
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // A refused request may be cut off while it is still being written.
        let _ = self.0.write_all(bytes.as_ref());
    }

    /// Reads until `mark` has come, and returns everything so far.
    fn read_until(&mut self, mark: &str) -> String {
        let mut read = Vec::new();
        let mut byte = [0_u8; 1];
        while !read.ends_with(mark.as_bytes()) {
            match self.0.read(&mut byte) {
                Ok(1) => read.push(byte[0]),
                end => panic!("{end:?} after {:?}", String::from_utf8_lossy(&read)),
            }
        }
        String::from_utf8_lossy(&read).into_owned()
    }

    /// Reads to the end of the connection.
    fn rest(mut self) -> Vec<u8> {
        let mut read = Vec::new();
        // A reset ends it as well.
        let _ = self.0.read_to_end(&mut read);
        read
    }

    fn answer(self) -> Answer {
        let raw = self.rest();
        Answer::parse(&raw)
            .unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(&raw)))
    }
}

/// Sends one request on a connection of its own.
fn exchange(residentd: &Residentd, line: &str, headers: &str, body: impl AsRef<[u8]>) -> Answer {
    let body = body.as_ref();
    let mut wire = Wire::to(residentd);
    let length = if headers.to_ascii_lowercase().contains("transfer-encoding") {
        String::new()
    } else {
        format!("content-length: {}\r\n", body.len())
    };
    wire.send(format!(
        "{line} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n{headers}{length}\r\n"
    ));
    wire.send(body);
    wire.answer()
}

/// Asks `/echo` of a model what arrived.
fn echoed(residentd: &Residentd, line: &str, headers: &str, body: impl AsRef<[u8]>) -> Value {
    let answer = exchange(residentd, line, headers, body);
    assert_eq!(answer.status, 200, "{line}: {}", answer.text());
    answer.json()
}

fn arrived<'a>(echo: &'a Value, header: &str) -> Option<&'a str> {
    let all = echo["headers"].as_array().expect("a list of pairs");
    all.iter()
        .find(|pair| pair[0] == header)
        .and_then(|pair| pair[1].as_str())
}

fn served_by(answer: &Answer) -> (u16, Option<&str>) {
    (answer.status, answer.header("x-stub-name"))
}
