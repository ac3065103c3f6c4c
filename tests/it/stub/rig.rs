//! A stub worker for one test, and HTTP by hand: the tests look at what is on
//! the wire, which a client library would hide.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::wait_until;

/// Longest any condition is waited for.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A stub worker in a process group of its own, which ends with the test.
pub(crate) struct Stub {
    pub(crate) child: Child,
    pub(crate) lines: Receiver<String>,
    pub(crate) others: Vec<i32>,
}

impl Stub {
    pub(crate) fn spawn(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_stub-worker"))
            .args(["--name", "red"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the stub starts");
        let output = child.stdout.take().expect("a pipe");
        let (sender, lines) = sync_channel(4096);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            others: Vec::new(),
        }
    }

    /// Returns what follows `beginning` in the first line that begins so.
    pub(crate) fn line(&self, beginning: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(DEADLINE);
            let line = line.unwrap_or_else(|_| panic!("no line {beginning:?}"));
            if let Some(rest) = line.strip_prefix(beginning) {
                return rest.to_owned();
            }
        }
    }

    pub(crate) fn ready(args: &[&str]) -> (Self, String) {
        let stub = Self::spawn(args);
        let address = stub.line("red: ready on ");
        (stub, address)
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("the stub lives");
    }

    pub(crate) fn exit(&mut self) -> ExitStatus {
        let child = &mut self.child;
        wait_until("the stub exits", || child.try_wait().expect("our child"))
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        // Some are gone already, which is what most tests want.
        let _ = killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
        for pid in &self.others {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// An answer as it came over the wire.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
    /// Whether the connection ended as HTTP says it should.
    pub(crate) whole: bool,
    /// Why reading stopped when it was not the end.
    pub(crate) error: Option<std::io::ErrorKind>,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {:?}", self.body))
    }

    pub(crate) fn text(&self) -> String {
        let json = self.json();
        json["choices"][0]["text"]
            .as_str()
            .expect("text")
            .to_owned()
    }
}

pub(crate) fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the stub listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream
}

pub(crate) fn send(stream: &mut impl Write, line: &str, body: &str) {
    let length = body.len();
    let head = format!("{line} HTTP/1.1\r\nhost: stub\r\ncontent-length: {length}\r\n\r\n");
    stream
        .write_all((head + body).as_bytes())
        .expect("a request");
}

/// Sends one request on a connection of its own and reads what comes.
pub(crate) fn ask(address: &str, line: &str, body: &Value) -> Reply {
    let mut stream = connect(address);
    send(&mut stream, line, &body.to_string());
    receive(&mut stream)
}

pub(crate) fn receive(stream: &mut impl Read) -> Reply {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let outcome = stream.read(&mut piece);
        bytes.extend_from_slice(&piece[..*outcome.as_ref().unwrap_or(&0)]);
        let reply = parse(&bytes, outcome.as_ref().err().map(std::io::Error::kind));
        if reply.whole || !matches!(outcome, Ok(1..)) {
            return reply;
        }
    }
}

fn parse(bytes: &[u8], error: Option<std::io::ErrorKind>) -> Reply {
    let text = String::from_utf8_lossy(bytes);
    let (head, raw) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let length: Option<usize> = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let (body, whole) = match length {
        Some(length) => (raw.to_owned(), raw.len() == length),
        None => unchunked(raw),
    };
    Reply {
        status: status.unwrap_or(0),
        head: head.to_owned(),
        body,
        whole,
        error,
    }
}

fn unchunked(mut raw: &str) -> (String, bool) {
    let mut body = String::new();
    while let Some((size, rest)) = raw.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("the size of a chunk");
        if size == 0 || rest.len() < size + 2 {
            return (body, size == 0);
        }
        body.push_str(&rest[..size]);
        raw = &rest[size + 2..];
    }
    (body, false)
}

pub(crate) fn stats(address: &str) -> Value {
    ask(address, "GET /stats", &Value::Null).json()
}

/// Returns a field of `/proc/PID/status` in KiB.
pub(crate) fn status_kib(pid: i32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a live process");
    status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok())
        .expect("a size")
}
