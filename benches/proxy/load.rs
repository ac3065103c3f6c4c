//! The bytes that requests and answers are made of, known to the driver and to
//! the worker, so that each compares what came with what was sent.

use std::sync::OnceLock;

/// Length of a small request's and a small answer's body, in bytes.
pub(crate) const SMALL: usize = 1024;
/// Length of a large request's body, in bytes.
pub(crate) const LARGE: usize = 10_000_000;
/// Length of one event of a stream, in bytes.
pub(crate) const EVENT: usize = 200;
/// Where the time stands in an event, in ns of the monotonic clock.
pub(crate) const STAMP: std::ops::Range<usize> = 12..32;
/// The model that every request names.
pub(crate) const MODEL: &str = "bench";
/// What a request asks of the worker: `stream`, `hold`, or a small answer to a large
/// body (`first`, `last`), to one that it does not know (`any`), or else to a small one.
pub(crate) const ASK: &str = "x-bench";
/// The moment at which the first byte of a request's body came to the worker.
pub(crate) const FIRST_BYTE: &str = "x-first-byte-ns";

/// Returns JSON of this length: the model first or last, and a prompt.
fn document(length: usize, model_first: bool) -> Vec<u8> {
    let (before, after) = match model_first {
        true => (format!(r#"{{"model":"{MODEL}","prompt":""#), "\"}".into()),
        false => (r#"{"prompt":""#.into(), format!(r#"","model":"{MODEL}"}}"#)),
    };
    let mut text = before.into_bytes();
    let words = b"a prompt of no great sense, ".iter().copied().cycle();
    text.extend(words.take(length - text.len() - after.len()));
    text.extend(after.as_bytes());
    text
}

/// Returns the body of a small request.
pub(crate) fn small() -> &'static [u8] {
    static BODY: OnceLock<Vec<u8>> = OnceLock::new();
    BODY.get_or_init(|| document(SMALL, true))
}

/// Returns the body of every small answer.
pub(crate) fn answer() -> &'static [u8] {
    static BODY: OnceLock<Vec<u8>> = OnceLock::new();
    BODY.get_or_init(|| {
        let mut text = br#"{"object":"text_completion","text":""#.to_vec();
        text.resize(SMALL - 2, b'.');
        text.extend(b"\"}");
        text
    })
}

/// Returns the body of a large request, its model first or last.
pub(crate) fn large(model_first: bool) -> &'static [u8] {
    static FIRST: OnceLock<Vec<u8>> = OnceLock::new();
    static LAST: OnceLock<Vec<u8>> = OnceLock::new();
    let body = if model_first { &FIRST } else { &LAST };
    body.get_or_init(|| document(LARGE, model_first))
}

/// Returns event `number` of a stream, sent at this time.
pub(crate) fn event(number: usize, stamp: u64) -> Vec<u8> {
    let mut text = format!(r#"data: {{"t":"{stamp:020}","n":{number:08},"text":""#).into_bytes();
    text.resize(EVENT - 4, b'.');
    text.extend(b"\"}\n\n");
    text
}

/// Returns the message of a call of gRPC, with its frame.
pub(crate) fn message() -> &'static [u8] {
    static MESSAGE: OnceLock<Vec<u8>> = OnceLock::new();
    MESSAGE.get_or_init(|| {
        let length = u32::try_from(SMALL).expect("a small number");
        let mut text = vec![0];
        text.extend(length.to_be_bytes());
        text.resize(SMALL + 5, 7);
        text
    })
}

/// Returns the time of the clock that all processes share, in ns.
pub(crate) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.expect("it began at 0") * 1_000_000_000 + nanos.expect("it is less than a second")
}

/// Returns a number of bytes, requests or ns for reckoning.
#[expect(clippy::cast_precision_loss, reason = "figures have a few digits")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
}

/// As [`float`], of a length.
pub(crate) fn float_of(length: usize) -> f64 {
    float(u64::try_from(length).expect("a length fits"))
}
