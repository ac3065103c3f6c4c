//! `GET /api/v1/events`: the newest decisions with their reasons, and with
//! `follow=true` those to come, as server-sent events.
//!
//! A follower has its place in the record and is told what it came too late
//! for; nobody waits for it. An event's id is `<run>:<number>`: numbers go on in
//! the next run, but the last few of a run that died may be lost and their
//! numbers given again, and who comes back must miss none of the new run's.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt::Write;
use std::str::FromStr;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Uri};
use axum::response::Response;
use futures_util::stream::unfold;
use serde::Serialize;

use super::ApiState;
use super::decision::DecisionEntry;
use super::envelope::{ApiError, success};
use super::past::{Both, Past, PastEvent};
use super::query::{Params, bad_value};
use crate::clock::Clock;
use crate::control::{Decisions, KEPT, Kind, Wanted};

/// Events shown unless asked otherwise.
const DEFAULT_LIMIT: usize = 100;
/// Events put into one piece of a stream: what a slow reader has waiting.
const PIECE: usize = 32;
/// A follower hears something at least this often, so that proxies between
/// keep the connection and a reader that has gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a browser waits before it comes back.
const RETRY_MS: u32 = 1000;

/// Answers `GET /api/v1/events`.
pub(crate) async fn events(
    State(state): State<ApiState>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut params = Params::of(&uri)?;
    let wanted = wanted(&state, &mut params)?;
    let since: Option<Place> = params.parsed("since", "the id of an event")?;
    let limit = params.parsed("limit", "a number of events")?;
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    let follow = params.flag("follow", false)?;
    params.finish()?;
    if limit > KEPT {
        return Err(bad_value("limit", &limit, &format!("at most {KEPT}")));
    }
    // A browser that comes back says where it was, also when the address it
    // calls still has an older place.
    let back = headers.get("last-event-id");
    let back = back.and_then(|id| id.to_str().ok()?.parse().ok());
    let from = back.or(since);
    let decisions = state.controller.decisions();
    let clock = state.controller.clock();
    let found = match &from {
        Some(place) => {
            let id = place.id(decisions.epoch(), &state.past);
            Both::after(id, (&state.past, &decisions), &wanted, limit)
        }
        None => Both::newest((&state.past, &decisions), &wanted, limit),
    };
    if follow {
        let follower = Follower {
            decisions,
            wanted,
            clock,
            seen: found.found.seen,
        };
        return Ok(follower.stream(&found));
    }
    Ok(success(&Page::of(&found, &decisions, clock)))
}

fn wanted(state: &ApiState, params: &mut Params) -> Result<Wanted, ApiError> {
    let model = match params.text("model") {
        Some(name) => {
            let route = state.controller.routes().get(&name);
            let unknown = || ApiError::UnknownModel(name.chars().take(128).collect());
            Some(route.ok_or_else(unknown)?.name().clone())
        }
        None => None,
    };
    let kinds = params.text("kind").unwrap_or_default();
    let kinds = kinds.split(',').filter(|kind| !kind.is_empty());
    let kinds = kinds.map(|kind| {
        let all: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
        let expected = format!("of {}", all.join(", "));
        kind.parse()
            .map_err(|()| bad_value("kind", &format_args!("{kind:?}"), &expected))
    });
    Ok(Wanted {
        model,
        kinds: kinds.collect::<Result<_, _>>()?,
    })
}

/// Where in the record a reader is: `<run>:<number>`, or only the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    run: Option<u64>,
    id: u64,
}

impl FromStr for Place {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (run, id) = match text.split_once(':') {
            Some((run, id)) => (Some(run.parse()?), id),
            None => (None, text),
        };
        let id = id.parse()?;
        Ok(Self { run, id })
    }
}

impl Place {
    /// Returns the number of the last event that was seen, as they are numbered
    /// in this run; 0 for a run that nobody knows.
    fn id(self, this_run: u64, past: &Past) -> u64 {
        match self.run {
            Some(run) if run != this_run => past.place(run, self.id).unwrap_or(0),
            _ => self.id,
        }
    }
}

/// What is told of this run or of an earlier one.
#[derive(Serialize)]
#[serde(untagged)]
enum Event<'a> {
    Past(&'a PastEvent),
    Now(DecisionEntry<'a>),
}

#[derive(Serialize)]
struct Page<'a> {
    events: Vec<Event<'a>>,
    /// For `since=`, to go on from here.
    next: String,
    missed: u64,
    kept: usize,
}

impl<'a> Page<'a> {
    fn of(both: &'a Both<'_>, decisions: &Decisions, clock: Clock) -> Self {
        let found = &both.found;
        let past = both.past.iter().map(|each| Event::Past(each));
        let now = found.decisions.iter();
        let now = now.map(|each| Event::Now(DecisionEntry::of(each, clock)));
        Self {
            events: past.chain(now).collect(),
            next: format!("{}:{}", decisions.epoch(), found.seen),
            missed: found.missed,
            kept: KEPT,
        }
    }
}

/// One reader of the stream.
struct Follower {
    decisions: Decisions,
    wanted: Wanted,
    clock: Clock,
    seen: u64,
}

impl Follower {
    /// Streams what was found, and then what comes.
    fn stream(self, found: &Both<'_>) -> Response {
        let opening = format!("retry: {RETRY_MS}\n\n");
        let opening = VecDeque::from([opening + &self.written(found)]);
        let pieces = unfold((self, opening), |(mut follower, mut opening)| async move {
            let piece = match opening.pop_front() {
                Some(piece) => piece,
                None => follower.next_piece().await?,
            };
            Some((Ok::<_, Infallible>(piece), (follower, opening)))
        });
        let mut response = Response::new(Body::from_stream(pieces));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }

    /// Waits for what is wanted, or for the time to say that the stream is
    /// alive; `None` when there will be no more.
    async fn next_piece(&mut self) -> Option<String> {
        let waiting = async {
            loop {
                let goes_on = self.decisions.wait_after(self.seen).await;
                let found = self.decisions.after(self.seen, &self.wanted, PIECE);
                let is_news = !found.decisions.is_empty() || found.missed > 0;
                self.seen = found.seen;
                if is_news || !goes_on {
                    return is_news.then(|| self.written(&found.into()));
                }
            }
        };
        match tokio::time::timeout(KEEP_ALIVE, waiting).await {
            Ok(piece) => piece,
            Err(_) => Some(": still here\n\n".to_owned()),
        }
    }

    fn written(&self, both: &Both<'_>) -> String {
        let mut out = String::new();
        let run = self.decisions.epoch();
        let found = &both.found;
        if found.missed > 0 {
            let missed = found.missed;
            writeln!(out, "event: missed\ndata: {{\"missed\":{missed}}}\n")
                .expect("writing to a string does not fail");
        }
        for past in &both.past {
            let json = serde_json::to_string(past).expect("text and numbers serialize");
            writeln!(out, "id: {run}:{}\ndata: {json}\n", past.id)
                .expect("writing to a string does not fail");
        }
        for decision in &found.decisions {
            let entry = DecisionEntry::of(decision, self.clock);
            let json = serde_json::to_string(&entry).expect("text and numbers serialize");
            writeln!(out, "id: {run}:{}\ndata: {json}\n", decision.id)
                .expect("writing to a string does not fail");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_number_with_or_without_its_run() {
        let place = |text: &str| text.parse::<Place>().ok();
        let run = Some(1_700_000_000_000);
        assert_eq!(place("1700000000000:17"), Some(Place { run, id: 17 }));
        assert_eq!(place("17"), Some(Place { run: None, id: 17 }));
        for bad in ["", "a", "1:", ":1", "1:2:3", "-1"] {
            assert_eq!(place(bad), None, "{bad}");
        }
    }
}
