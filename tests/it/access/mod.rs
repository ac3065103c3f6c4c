//! Who may call: tokens, addresses, encryption, pages of other origins, and
//! what a caller may send.

mod admin;
mod cors;
mod limits;
mod secrets;
mod tls;
mod tokens;

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::support::http::Answer;
use crate::support::residentd::STUB;
use crate::support::{PATIENCE, Residentd};

/// A token of a user of models.
const USER: &str = "sk-user-5f0c1d7ab2e94f36";
/// An operator's.
const BOSS: &str = "sk-boss-93b1e07c4d8a4e15";

/// One stub worker, model `m`, after these lines of configuration.
fn with(config: &str) -> String {
    format!(
        "{config}\n[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m'\nmemory = \"32MiB\"\n"
    )
}

/// Sends a request with these headers on a connection of its own.
fn call(address: &str, line: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    exchange(stream, line, headers, body)
}

fn exchange(
    mut stream: impl Read + Write,
    line: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Answer {
    let headers = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"));
    let headers: String = headers.collect();
    let length = body.len();
    let request = format!(
        "{line} HTTP/1.1\r\nhost: models.test\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).expect("it is read");
    let mut raw = Vec::new();
    // A connection that is cut ends the answer too; whether it was whole is in it.
    let _ = stream.read_to_end(&mut raw);
    Answer::parse(&raw)
        .unwrap_or_else(|| panic!("{line}: no answer: {:?}", String::from_utf8_lossy(&raw)))
}

/// The header that carries a token.
fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// Returns the status of a call with this token, or without one.
fn status(residentd: &Residentd, line: &str, token: Option<&str>) -> u16 {
    let value = token.map(bearer);
    let header = value.as_deref().map(|value| ("authorization", value));
    call(residentd.address(), line, header.as_slice(), "").status
}
