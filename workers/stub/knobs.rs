//! What one request asks the stub to do: `x_…` members of its JSON body, or of
//! its query where the body has none.

use std::time::Duration;

use serde_json::Value;

/// Most chunks of one answer, so that a slip of the pen ends.
const MOST_CHUNKS: u64 = 100_000_000;

/// How one answer is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Knobs {
    /// Parts of the answer; else the request's bound on tokens, else three.
    pub(crate) chunks: u64,
    /// Pause before each part but the first.
    pub(crate) pace: Duration,
    /// Pause before the head.
    pub(crate) delay: Duration,
    /// Compute for so long before the head, and serve nobody meanwhile.
    pub(crate) busy: Duration,
    /// Padding of each part's text, in bytes.
    pub(crate) chunk_bytes: usize,
    /// Break the connection after this many parts.
    pub(crate) break_after: Option<u64>,
    /// Break it with a reset instead of a plain close.
    pub(crate) reset: bool,
    /// Kill the worker (SIGKILL) after this many parts; with 0 before the head.
    pub(crate) exit_after: Option<u64>,
    /// Close the connection without any answer.
    pub(crate) drop: bool,
    /// Answer with this status and an error.
    pub(crate) status: Option<u16>,
    /// Answer in events.
    pub(crate) stream: bool,
}

impl Knobs {
    /// Reads the knobs of a request.
    pub(crate) fn read(body: &Value, query: Option<&str>) -> Self {
        let number = |name| number(body, query, name);
        let set = |name| set(body, query, name);
        let asked = [
            "x_chunks",
            "max_tokens",
            "max_completion_tokens",
            "max_output_tokens",
        ]
        .into_iter()
        .find_map(number);
        let chunks = asked.unwrap_or(3).clamp(1, MOST_CHUNKS);
        Self {
            chunks,
            pace: millis(number("x_pace_ms")),
            delay: millis(number("x_delay_ms")),
            busy: millis(number("x_busy_ms")),
            chunk_bytes: number("x_chunk_bytes")
                .and_then(|bytes| usize::try_from(bytes).ok())
                .unwrap_or(0),
            break_after: number("x_break_after"),
            reset: set("x_reset"),
            exit_after: number("x_exit_after"),
            drop: set("x_drop"),
            status: number("x_status").and_then(|status| u16::try_from(status).ok()),
            stream: set("stream"),
        }
    }
}

/// Returns the value of `name` in a query such as `a=1&b=2`, undecoded.
pub(crate) fn in_query<'a>(query: Option<&'a str>, name: &str) -> Option<&'a str> {
    query?
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find_map(|(key, value)| (key == name).then_some(value))
}

fn number(body: &Value, query: Option<&str>, name: &str) -> Option<u64> {
    let text = || in_query(query, name)?.parse().ok();
    body.get(name).and_then(Value::as_u64).or_else(text)
}

fn set(body: &Value, query: Option<&str>, name: &str) -> bool {
    let text = || matches!(in_query(query, name), Some("true" | "1"));
    body.get(name).and_then(Value::as_bool).unwrap_or_else(text)
}

fn millis(number: Option<u64>) -> Duration {
    Duration::from_millis(number.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_body_goes_before_the_query() {
        let body = json!({"x_chunks": 5, "stream": false, "max_tokens": 9});
        let knobs = Knobs::read(&body, Some("x_chunks=7&stream=true&x_pace_ms=20&x_drop=1"));
        assert_eq!(knobs.chunks, 5);
        assert!(!knobs.stream);
        assert!(knobs.drop);
        assert_eq!(knobs.pace, Duration::from_millis(20));
    }

    #[test]
    fn without_knobs_an_answer_is_whole_and_at_once() {
        let knobs = Knobs::read(&json!({}), None);
        assert_eq!(knobs.chunks, 3);
        assert_eq!(knobs.delay + knobs.pace, Duration::ZERO);
        assert_eq!((knobs.break_after, knobs.exit_after), (None, None));
        assert_eq!(Knobs::read(&json!({"max_tokens": 8}), None).chunks, 8);
    }
}
