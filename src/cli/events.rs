//! `events`: what was decided and why, a line each, and with `-f` what is
//! decided from now on.

use hyper::Method;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::args::EventsArgs;
use super::client::{Answer, CallError, Client};
use super::{output, show};

/// Prints the last events, and follows until the server ends.
pub(super) async fn events(args: EventsArgs) -> anyhow::Result<()> {
    let path = path(&args);
    let client = Client::new(&args.client)?;
    let json = args.client.json;
    if !args.follow {
        let answer = client.call(Method::GET, &path, String::new()).await?;
        return show(&answer, json, page);
    }
    let mut body = client.open(&path, "text/event-stream").await?;
    let mut stream = Stream::default();
    while let Some(bytes) = client.next(&mut body).await? {
        for (kind, data) in stream.take_in(&bytes) {
            output::write_text(&line(&kind, data, json)?)?;
        }
    }
    Ok(())
}

fn path(args: &EventsArgs) -> String {
    let encoded = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let mut params = vec![format!("limit={}", args.limit)];
    if let Some(model) = &args.model {
        params.push(format!("model={}", encoded(model.as_str())));
    }
    if !args.kinds.is_empty() {
        params.push(format!("kind={}", encoded(&args.kinds.join(","))));
    }
    if let Some(since) = &args.since {
        params.push(format!("since={}", encoded(since)));
    }
    if args.follow {
        params.push("follow=true".to_owned());
    }
    format!("/api/v1/events?{}", params.join("&"))
}

#[derive(Debug, Deserialize)]
struct Page {
    events: Vec<Event>,
    missed: u64,
}

#[derive(Debug, Deserialize)]
struct Event {
    id: u64,
    at: f64,
    kind: String,
    reason: Option<String>,
    message: String,
}

#[derive(Deserialize)]
struct Missed {
    missed: u64,
}

fn page(answer: &Answer) -> Result<String, CallError> {
    let page: Page = answer.data()?;
    let mut lines = Vec::new();
    if page.missed > 0 {
        lines.push(missed(page.missed));
    }
    lines.extend(page.events.iter().map(Event::line));
    if lines.is_empty() {
        lines.push("no such event".to_owned());
    }
    Ok(lines.join("\n"))
}

/// Returns what is printed for one event of the stream.
fn line(kind: &str, data: String, json: bool) -> anyhow::Result<String> {
    if json {
        return Ok(data);
    }
    Ok(if kind == "missed" {
        missed(serde_json::from_str::<Missed>(&data)?.missed)
    } else {
        serde_json::from_str::<Event>(&data)?.line()
    })
}

fn missed(count: u64) -> String {
    format!("({count} events are no longer kept)")
}

impl Event {
    fn line(&self) -> String {
        let reason = self.reason.as_deref().unwrap_or("-");
        let (id, at, kind) = (self.id, utc(self.at), &self.kind);
        format!("{at} {id:>5} {kind:<9} {reason:<14} {}", self.message)
    }
}

/// Takes server-sent events apart, however they are cut into pieces.
#[derive(Debug, Default)]
struct Stream {
    unfinished: Vec<u8>,
    kind: String,
    data: String,
}

impl Stream {
    /// Returns the events that are whole now: name, and data.
    fn take_in(&mut self, bytes: &[u8]) -> Vec<(String, String)> {
        self.unfinished.extend_from_slice(bytes);
        let mut whole = Vec::new();
        while let Some(end) = memchr::memchr(b'\n', &self.unfinished) {
            let line: Vec<u8> = self.unfinished.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]).into_owned();
            if let Some(data) = line.strip_prefix("data: ") {
                data.clone_into(&mut self.data);
            } else if let Some(kind) = line.strip_prefix("event: ") {
                kind.clone_into(&mut self.kind);
            } else if line.is_empty() {
                let kind = std::mem::take(&mut self.kind);
                let data = std::mem::take(&mut self.data);
                if !data.is_empty() {
                    whole.push((kind, data));
                }
            }
        }
        whole
    }
}

/// Returns Unix seconds as `2026-11-24 01:02:03.456`, in UTC.
fn utc(unix: f64) -> String {
    let since = std::time::Duration::try_from_secs_f64(unix).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years are counted from the first of March, so that the odd day of a leap
    // year is the last one: then each month begins at a fixed day.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let leaps = day_of_era / 1460 + day_of_era / 146_096;
    let year_of_era = (day_of_era + day_of_era / 36_524 - leaps) / 365;
    let leap_days = year_of_era / 4 - year_of_era / 100;
    let day_of_year = day_of_era - (365 * year_of_era + leap_days);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = since.subsec_millis();
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{millis:03}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_told_in_utc() {
        for (unix, text) in [
            (0.0, "1970-01-01 00:00:00.000"),
            (951_782_399.25, "2000-02-28 23:59:59.250"),
            (951_782_400.0, "2000-02-29 00:00:00.000"),
            (1_709_164_800.0, "2024-02-29 00:00:00.000"),
            (1_735_689_599.999, "2024-12-31 23:59:59.999"),
            (4_107_542_400.0, "2100-03-01 00:00:00.000"),
        ] {
            assert_eq!(utc(unix), text);
        }
    }

    #[test]
    fn events_are_whole_however_the_stream_is_cut() {
        let raw = "retry: 1000\n\nid: 5:1\ndata: {\"a\":1}\n\n: still here\n\nevent: missed\ndata: {\"missed\":2}\n\ndata: ü\n\n";
        let expected = [("", "{\"a\":1}"), ("missed", "{\"missed\":2}"), ("", "ü")];
        for size in 1..raw.len() {
            let mut stream = Stream::default();
            let pieces = raw.as_bytes().chunks(size);
            let got: Vec<_> = pieces.flat_map(|piece| stream.take_in(piece)).collect();
            let got: Vec<_> = got.iter().map(|(k, d)| (k.as_str(), d.as_str())).collect();
            assert_eq!(got, expected, "in pieces of {size}");
        }
    }
}
