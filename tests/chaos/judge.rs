//! What residentd promises of each request, held against what came of it.
//!
//! Every request has one outcome: the whole answer of a worker of its model, an
//! error by the table of `docs/operating.md` that has a cause in what was done,
//! an answer that is cut and looks so, since its worker died, or a broken
//! connection while residentd did not run.

use std::time::Duration;

use serde_json::Value;

use crate::client::Outcome;
use crate::plan::{Ask, SHARES, Whim};
use crate::site::{Blow, Site};
use crate::support::Answer;

/// What became of a request for which no residentd was there.
pub(crate) const DOWN: &str = "broken while residentd was down";
/// Status and code of each error, and whether it says when to come back.
const ERRORS: [(&str, u16, bool); 12] = [
    ("model_not_found", 404, false),
    ("queue_full", 429, true),
    ("worker_failed", 502, true),
    ("no_device", 503, false),
    ("model_too_large", 503, false),
    ("no_room", 503, true),
    ("backing_off", 503, true),
    ("queue_timeout", 503, true),
    ("unloaded", 503, true),
    ("overloaded", 503, true),
    ("draining", 503, true),
    ("start_timeout", 504, false),
];
/// What may keep a worker from answering.
const FAILING: [Blow; 4] = [Blow::Worker, Blow::Start, Blow::Memory, Blow::Changed];
/// How long a model may rest after it failed; one that rests for longer is
/// loaded by the watch.
const RESTS: Duration = Duration::from_secs(30);
/// What may end a worker in the middle of an answer.
const DEADLY: [Blow; 4] = [Blow::Worker, Blow::Memory, Blow::Down, Blow::Draining];

/// Judges an outcome: what it counts as, or what is wrong with it.
pub(crate) fn judge(
    site: &Site,
    ask: &Ask,
    outcome: &Outcome,
    time: (Duration, Duration),
) -> Result<String, String> {
    let struck = |blows: &[Blow]| site.struck(Some(ask.model), blows, time);
    let rests = || {
        let time = (time.0.saturating_sub(RESTS), time.1);
        site.struck(Some(ask.model), &FAILING, time)
    };
    match outcome {
        Outcome::Left => Ok("left".into()),
        Outcome::Lost(raw) => Err(format!(
            "no outcome: {:?}",
            String::from_utf8_lossy(&raw[..raw.len().min(300)])
        )),
        Outcome::Broken(_) if struck(&[Blow::Down]) => Ok(DOWN.into()),
        Outcome::Broken(why) => Err(format!("the connection broke without a cause: {why}")),
        Outcome::Answered(answer) if answer.header("x-stub-name").is_none() => {
            refused(ask, answer, struck, rests)
        }
        Outcome::Answered(answer) => from_worker(ask, answer, struck),
    }
}

/// Judges an error of residentd's own.
fn refused(
    ask: &Ask,
    answer: &Answer,
    struck: impl Fn(&[Blow]) -> bool,
    rests: impl Fn() -> bool,
) -> Result<String, String> {
    let shown = || format!("{} {:?} {}", answer.status, answer.headers, answer.text());
    if !answer.complete {
        return match struck(&[Blow::Down]) {
            true => Ok("cut while residentd was down".into()),
            false => Err(format!("an error that is not whole: {}", shown())),
        };
    }
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
    let error = &body["error"];
    let code = error["code"].as_str().unwrap_or_default();
    let kind = match answer.status {
        400..500 => "invalid_request_error",
        _ => "server_error",
    };
    let message = error["message"].as_str().unwrap_or_default();
    let Some((_, status, comes_back)) = ERRORS.iter().find(|(known, ..)| *known == code) else {
        return Err(format!("an error that is not documented: {}", shown()));
    };
    let is_whole = answer.status == *status
        && error["type"] == kind
        && !message.is_empty()
        && answer.header("content-type") == Some("application/json")
        && answer.header("retry-after").is_some() == *comes_back;
    if !is_whole {
        return Err(format!("an error of another shape: {}", shown()));
    }
    let own = matches!(ask.whim, Whim::Dies(_) | Whim::Drops);
    let has_cause = match code {
        "worker_failed" => own || struck(&FAILING),
        "start_timeout" => struck(&FAILING),
        "backing_off" => rests(),
        "model_not_found" => !is_known(ask) || struck(&[Blow::Changed]),
        "unloaded" => struck(&[Blow::Unloaded]),
        // The latter when it came before an upgrade and whoever took over is killed.
        "draining" => struck(&[Blow::Draining, Blow::Down]),
        "model_too_large" => struck(&[Blow::Limit]),
        "no_room" => struck(&[Blow::Limit, Blow::Pinned, Blow::Memory]),
        // Of these the whole run may have a few; see the end.
        "queue_full" | "queue_timeout" => true,
        _ => false,
    };
    match has_cause {
        true => Ok(code.to_owned()),
        false => Err(format!("refused without a cause: {}", shown())),
    }
}

fn is_known(ask: &Ask) -> bool {
    SHARES.iter().any(|(name, _)| *name == ask.model)
}

/// Judges what a worker answered.
fn from_worker(
    ask: &Ask,
    answer: &Answer,
    struck: impl Fn(&[Blow]) -> bool,
) -> Result<String, String> {
    if answer.header("x-stub-name") != Some(ask.model) {
        return Err(format!("another model answered: {:?}", answer.headers));
    }
    let expected = if ask.whim == Whim::Fails { 500 } else { 200 };
    if answer.status != expected {
        return Err(format!("status {}: {}", answer.status, answer.text()));
    }
    if ask.whim == Whim::Fails {
        return match answer.complete {
            true => Ok("a worker's own error".into()),
            false => Err(format!("an error that is cut: {}", answer.text())),
        };
    }
    let text = if ask.stream {
        streamed(answer)
    } else {
        plain(answer)
    };
    let said = text.map_err(|why| format!("{why}: {}", answer.text()))?;
    is_right(ask, answer, &said)?;
    let died = matches!(ask.whim, Whim::Dies(after) if after > 0) || struck(&DEADLY);
    match (answer.complete, said.ended, died) {
        (true, true, _) => Ok("answered".into()),
        (true, false, _) => Err(format!("it looks whole and is not: {}", answer.text())),
        // The worker may have said all before it died.
        (false, _, true) => Ok("cut by the end of its worker".into()),
        (false, _, false) => Err("cut without a cause".into()),
    }
}

/// What an answer says, as far as it came.
#[derive(Debug, Default)]
struct Said {
    text: String,
    parts: u64,
    ended: bool,
}

fn plain(answer: &Answer) -> Result<Said, String> {
    if !answer.complete {
        return Ok(Said::default());
    }
    let body: Value = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
    let choice = &body["choices"][0];
    let text = choice["text"].as_str();
    let text = text.or_else(|| choice["message"]["content"].as_str());
    Ok(Said {
        text: text.ok_or("no text")?.to_owned(),
        parts: 0,
        ended: true,
    })
}

/// Reads the events that are there as a whole; the last may be cut.
fn streamed(answer: &Answer) -> Result<Said, String> {
    let text = answer.text();
    let mut said = Said::default();
    let mut events: Vec<&str> = text.split("\n\n").collect();
    let rest = events.pop().unwrap_or_default();
    if answer.complete && !rest.is_empty() {
        return Err("half an event at the end".into());
    }
    for event in events {
        if said.ended {
            return Err("an event after the end".into());
        }
        if event.starts_with("event: error") {
            if answer.complete {
                return Err("an error that looks like a clean end".into());
            }
            continue;
        }
        let data = event.strip_prefix("data: ").ok_or("no data in an event")?;
        if data == "[DONE]" {
            said.ended = true;
            continue;
        }
        let event: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
        let choice = &event["choices"][0];
        let text = choice["text"].as_str();
        let text = text.or_else(|| choice["delta"]["content"].as_str());
        said.text += text.ok_or("an event without text")?;
        said.parts += 1;
    }
    Ok(said)
}

/// Checks that it is one worker's answer to this very request, each part once
/// and in its place.
fn is_right(ask: &Ask, answer: &Answer, said: &Said) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{what}: {}", answer.text()));
    let expected = |index| match index {
        0 => format!(
            "{0} pid={1} model={0} bytes=",
            ask.model,
            answer.worker_pid()
        ),
        _ => format!("{}{index} ", ask.model),
    };
    let mut at = 0;
    let parts = if said.ended { ask.parts } else { said.parts };
    for index in 0..parts {
        match said.text[at..].find(&expected(index)) {
            Some(found) => at += found + 1,
            None => return wrong(&format!("part {index} is missing")),
        }
    }
    if said.ended && ask.stream && said.parts != ask.parts {
        return wrong("not as many parts as were asked for");
    }
    Ok(())
}
