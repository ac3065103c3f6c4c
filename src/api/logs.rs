//! `GET /api/v1/models/{model}/logs`: the last lines of its worker's output,
//! and those that follow.
//!
//! Lines are numbered within a life of the model, so that a follower neither
//! loses nor repeats one; lines that came faster than they could be fetched
//! are counted and said to be missing.

use std::fmt::Write;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri};
use axum::response::Response;
use futures_util::stream::unfold;
use serde::Serialize;

use super::ApiState;
use super::envelope::{ApiError, success};
use super::query::{Params, bad_value};
use crate::control::{Controller, LogTail, Refusal};
use crate::model::ModelName;

/// Lines shown unless asked otherwise.
const DEFAULT_LINES: usize = 100;
/// The most that can be asked for.
const MAX_LINES: usize = 10_000;
/// How often a follower looks for new lines.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);
/// `<generation>:<number of the last line>`, on answers in plain text.
static POSITION: HeaderName = HeaderName::from_static("x-residentd-log-position");

/// Answers with the last `lines`, and with `follow=true` also with those to
/// come, until the caller leaves.
pub(crate) async fn answer(
    state: &ApiState,
    model: ModelName,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let mut params = Params::of(uri)?;
    let expected = "a number of lines";
    let lines = params.parsed("lines", expected)?.unwrap_or(DEFAULT_LINES);
    let follow = params.flag("follow", false)?;
    params.finish()?;
    if lines > MAX_LINES {
        let expected = format!("at most {MAX_LINES}");
        return Err(bad_value("lines", &lines, &expected));
    }
    let tail = state.controller.tail(&model, lines).await?;
    let format = Format::wanted(headers);
    if follow {
        return Ok(followed(state.controller.clone(), model, tail, format));
    }
    Ok(match format {
        Format::Json => success(&Lines {
            name: model.as_str(),
            generation: tail.generation,
            end: tail.end,
            lines: &tail.lines,
        }),
        Format::Text => text(&tail),
    })
}

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// As they are.
    Text,
    /// In the envelope; while following, an object a line.
    Json,
}

impl Format {
    fn wanted(headers: &HeaderMap) -> Self {
        let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok());
        let json = accept.is_some_and(|accept| accept.contains("json"));
        if json { Self::Json } else { Self::Text }
    }
}

#[derive(Debug, Serialize)]
struct Lines<'a> {
    name: &'a str,
    generation: u64,
    end: u64,
    lines: &'a [String],
}

fn text(tail: &LogTail) -> Response {
    let body: String = tail.lines.iter().flat_map(|line| [line, "\n"]).collect();
    let mut response = plain(Body::from(body), Format::Text);
    let position = format!("{}:{}", tail.generation, tail.end);
    let position = HeaderValue::try_from(position).expect("digits and a colon");
    response.headers_mut().insert(&POSITION, position);
    response
}

fn plain(body: Body, format: Format) -> Response {
    let kind = match format {
        Format::Text => "text/plain; charset=utf-8",
        Format::Json => "application/x-ndjson",
    };
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn followed(controller: Controller, model: ModelName, first: LogTail, format: Format) -> Response {
    let mut follower = Follower::default();
    let opening = follower.start(first, format);
    let state = (controller, model, follower, Some(opening));
    let stream = unfold(
        state,
        move |(controller, model, mut follower, opening)| async move {
            let chunk = match opening {
                Some(opening) => opening,
                None => next_chunk(&controller, &model, &mut follower, format).await?,
            };
            Some((
                Ok::<_, std::convert::Infallible>(chunk),
                (controller, model, follower, None),
            ))
        },
    );
    plain(Body::from_stream(stream), format)
}

/// Waits for lines that the follower has not seen; `None` when there will be
/// no more.
async fn next_chunk(
    controller: &Controller,
    model: &ModelName,
    follower: &mut Follower,
    format: Format,
) -> Option<String> {
    loop {
        tokio::time::sleep(FOLLOW_EVERY).await;
        match controller.tail(model, MAX_LINES).await {
            Ok(tail) => {
                let chunk = follower.advance(tail, format);
                if !chunk.is_empty() {
                    return Some(chunk);
                }
            }
            // Too much to do at this moment: the lines are still there later.
            Err(Refusal::Overloaded) => {}
            Err(_) => return None,
        }
    }
}

/// Where in the output a follower is.
#[derive(Debug, Default)]
struct Follower {
    generation: u64,
    seen: u64,
}

impl Follower {
    /// Takes the lines it starts with, whichever they are.
    fn start(&mut self, tail: LogTail, format: Format) -> String {
        let kept = u64::try_from(tail.lines.len()).unwrap_or(u64::MAX);
        self.generation = tail.generation;
        self.seen = tail.end.saturating_sub(kept);
        self.advance(tail, format)
    }

    /// Takes the lines it has not seen, and notes how many it never will.
    fn advance(&mut self, tail: LogTail, format: Format) -> String {
        if tail.generation != self.generation {
            self.generation = tail.generation;
            self.seen = 0;
        }
        let kept = u64::try_from(tail.lines.len()).unwrap_or(u64::MAX);
        let before_first = tail.end.saturating_sub(kept);
        let missed = before_first.saturating_sub(self.seen);
        let mut out = String::new();
        if missed > 0 {
            let note = format!("({missed} lines came too fast to be shown)");
            write_line(&mut out, format, self.generation, before_first, &note);
        }
        for (number, line) in (before_first + 1..).zip(&tail.lines) {
            if number > self.seen {
                write_line(&mut out, format, self.generation, number, line);
            }
        }
        self.seen = self.seen.max(tail.end);
        out
    }
}

#[derive(Serialize)]
struct NumberedLine<'a> {
    generation: u64,
    number: u64,
    line: &'a str,
}

fn write_line(out: &mut String, format: Format, generation: u64, number: u64, line: &str) {
    let written = match format {
        Format::Text => writeln!(out, "{line}"),
        Format::Json => {
            let numbered = NumberedLine {
                generation,
                number,
                line,
            };
            let json = serde_json::to_string(&numbered).expect("text and numbers serialize");
            writeln!(out, "{json}")
        }
    };
    written.expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(generation: u64, end: u64, lines: &[&str]) -> LogTail {
        LogTail {
            generation,
            end,
            lines: lines.iter().map(|&line| line.to_owned()).collect(),
        }
    }

    #[test]
    fn a_follower_loses_and_repeats_no_line_also_when_lines_are_equal() {
        let mut follower = Follower::default();
        let text = Format::Text;
        assert_eq!(follower.start(tail(1, 7, &["a", "a"]), text), "a\na\n");
        assert_eq!(follower.advance(tail(1, 7, &["a", "a"]), text), "");
        assert_eq!(
            follower.advance(tail(1, 8, &["a", "a", "a"]), text),
            "a\n",
            "one more of the same"
        );
    }

    #[test]
    fn a_new_life_is_followed_from_its_first_line() {
        let mut follower = Follower::default();
        assert_eq!(
            follower.start(tail(1, 2, &["a", "b"]), Format::Text),
            "a\nb\n"
        );
        assert_eq!(follower.advance(tail(2, 1, &["c"]), Format::Text), "c\n");
    }

    #[test]
    fn lines_that_came_too_fast_are_said_to_be_missing() {
        let mut follower = Follower::default();
        follower.start(tail(1, 2, &["a", "b"]), Format::Text);
        assert_eq!(
            follower.advance(tail(1, 9, &["y", "z"]), Format::Text),
            "(5 lines came too fast to be shown)\ny\nz\n"
        );
    }

    #[test]
    fn followed_as_json_each_line_is_an_object() {
        let mut follower = Follower::default();
        assert_eq!(
            follower.start(tail(3, 4, &["say \"hi\""]), Format::Json),
            "{\"generation\":3,\"number\":4,\"line\":\"say \\\"hi\\\"\"}\n"
        );
    }
}
