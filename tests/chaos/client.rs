//! One request and what comes of it, as its client sees it.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use serde_json::{Value, json};

use crate::plan::{Ask, Manner, Whim};
use crate::site::Site;
use crate::support::http::send;
use crate::support::{Answer, pause};

/// The longest a request may take: to wait in the queue, to be tried a second
/// time after a hang, and for the answer. Who waits longer is lost.
const LONGEST: Duration = Duration::from_secs(45);
/// How often a client that waits looks whether it wants to leave.
const LOOK: Duration = Duration::from_millis(20);

/// How a request ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// With a head, whole or broken off.
    Answered(Answer),
    /// Without.
    Broken(String),
    /// The client left.
    Left,
    /// Not at all.
    Lost(Vec<u8>),
}

/// Sends the request and reads what comes.
pub(crate) fn perform(site: &Site, ask: &Ask) -> Outcome {
    let from = site.time();
    let path = if ask.chat {
        "/v1/chat/completions"
    } else {
        "/v1/completions"
    };
    let sent = send(&site.address(), "POST", path, Some(&body(ask).to_string()));
    let mut stream = match sent {
        Ok(stream) => stream,
        Err(error) => return Outcome::Broken(error.to_string()),
    };
    stream
        .set_read_timeout(Some(LOOK))
        .expect("a time-out can be set");
    let mut raw = Vec::new();
    let mut piece = vec![0; 16 << 10];
    let why = loop {
        match stream.read(&mut piece) {
            Ok(0) => break "the end".to_owned(),
            Ok(read) => raw.extend_from_slice(&piece[..read]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => break error.to_string(),
        }
        let waited = site.time().saturating_sub(from);
        match ask.manner {
            Manner::Leaves(after) if waited >= after => return Outcome::Left,
            Manner::Dawdles => pause(Duration::from_millis(10)),
            Manner::Leaves(_) | Manner::Reads => {}
        }
        if waited > LONGEST {
            return Outcome::Lost(raw);
        }
    };
    Answer::parse(&raw).map_or(Outcome::Broken(why), Outcome::Answered)
}

fn body(ask: &Ask) -> Value {
    let mut body = json!({
        "model": ask.model,
        "x_id": ask.number,
        "stream": ask.stream,
        "x_chunks": ask.parts,
        "x_pace_ms": ask.pace_ms,
        "x_delay_ms": ask.delay_ms,
        "x_chunk_bytes": ask.part_bytes,
    });
    match ask.whim {
        Whim::None => {}
        Whim::Dies(after) => body["x_exit_after"] = json!(after),
        Whim::Drops => body["x_drop"] = json!(true),
        Whim::Fails => body["x_status"] = json!(500),
    }
    body
}
