//! What a request is called: `x-request-id`, and W3C's `traceparent`.
//!
//! Both come from clients, so they go into a log only when they are what they
//! should be.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

/// Names a request in the answer, in the log, and for the worker.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Where a request belongs in a trace.
pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What other tracing systems keep beside that.
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// A client's name for a request has at most so many bytes.
const LONGEST: usize = 128;
const HEX: &[u8; 16] = b"0123456789abcdef";

/// Makes names that no other request has, of this residentd or another: random
/// bits drawn once, and a count.
#[derive(Debug)]
pub(super) struct Names {
    random: u64,
    next: AtomicU64,
}

impl Names {
    pub(super) fn new() -> Self {
        // The standard library draws the keys of its hashes from the system.
        Self {
            random: RandomState::new().hash_one(0),
            next: AtomicU64::new(1),
        }
    }

    /// Returns the request's name: its client's own when that may stand in a log,
    /// else a new one, which takes the place of what the client said.
    pub(super) fn of(&self, headers: &mut HeaderMap) -> HeaderValue {
        let given = sole(headers, &REQUEST_ID).filter(|given| is_name(given));
        let mut name = given.cloned().unwrap_or_else(|| self.make());
        // Said once only: HTTP/2 is not to remember it in place of what comes again
        // (RFC 7541, 7.1.3).
        name.set_sensitive(true);
        headers.insert(REQUEST_ID, name.clone());
        name
    }

    fn make(&self) -> HeaderValue {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let mut text = [0; 32];
        write_hex(&mut text[..16], self.random.into());
        write_hex(&mut text[16..], count.into());
        // In one piece with its count of those who have it.
        let text = Bytes::from_owner(text);
        HeaderValue::from_maybe_shared(text).expect("digits are visible")
    }
}

/// Writes the last digits of a number, as many as there is room for.
fn write_hex(out: &mut [u8], number: u128) {
    let mut rest = number;
    for place in out.iter_mut().rev() {
        *place = HEX[usize::from(rest.to_le_bytes()[0] & 0xF)];
        rest >>= 4;
    }
}

/// Returns the value of a header that is there once.
fn sole<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    values.next().is_none().then_some(first)
}

fn is_name(given: &HeaderValue) -> bool {
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=@~".contains(byte);
    (1..=LONGEST).contains(&given.len()) && given.as_bytes().iter().all(good)
}

/// A place in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TraceParent {
    /// Which trace.
    pub(super) trace: u128,
    /// The span in it.
    pub(super) span: u64,
    /// Whether the trace is recorded, in its last bit.
    pub(super) flags: u8,
}

impl TraceParent {
    /// Reads a request's place; `None` when it says none, or none that is valid.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let value = sole(headers, &TRACEPARENT)?.as_bytes();
        let (version, rest) = value.split_first_chunk::<2>()?;
        let version = hex(version)?;
        let (trace, rest) = rest.strip_prefix(b"-")?.split_first_chunk::<32>()?;
        let (span, rest) = rest.strip_prefix(b"-")?.split_first_chunk::<16>()?;
        let (flags, rest) = rest.strip_prefix(b"-")?.split_first_chunk::<2>()?;
        // Later versions may add to it.
        let ends = rest.is_empty() || version > 0 && rest.starts_with(b"-");
        let (trace, span) = (hex(trace)?, u64::try_from(hex(span)?).ok()?);
        let flags = u8::try_from(hex(flags)?).ok()?;
        let is_valid = version != 0xFF && ends && trace != 0 && span != 0;
        is_valid.then_some(Self { trace, span, flags })
    }

    /// Writes it as a header.
    pub(super) fn header(self) -> HeaderValue {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&mut text[3..35], self.trace);
        write_hex(&mut text[36..52], self.span.into());
        write_hex(&mut text[53..], self.flags.into());
        HeaderValue::from_bytes(&text).expect("digits are visible")
    }
}

/// Reads a number in lower-case digits.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number: u128, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn headers(name: &HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            let value = HeaderValue::from_bytes(value.as_bytes()).expect("a value");
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn a_name_that_may_stand_in_a_log_is_kept_and_any_other_is_replaced() {
        let names = Names::new();
        let most = "x".repeat(LONGEST);
        for good in ["a", "3f2b-1_2.3:4/5+6=7@8~9", &most] {
            let mut sent = headers(&REQUEST_ID, &[good]);
            assert_eq!(names.of(&mut sent), good);
            assert_eq!(sent[REQUEST_ID], good);
        }
        let more = "x".repeat(LONGEST + 1);
        let mut seen = BTreeSet::new();
        for bad in [
            &[][..],
            &[""],
            &["a b"],
            &["a\"b"],
            &["\u{fc}"],
            &["{x}"],
            &[&more],
            &["a", "b"],
        ] {
            let mut sent = headers(&REQUEST_ID, bad);
            let made = names.of(&mut sent);
            let all: Vec<_> = sent.get_all(REQUEST_ID).iter().collect();
            assert_eq!(all, [&made], "{bad:?}");
            assert!(is_name(&made) && made.len() == 32, "{made:?}");
            assert!(seen.insert(made.as_bytes().to_vec()), "twice: {made:?}");
        }
    }

    #[test]
    fn a_place_in_a_trace_is_read_as_the_recommendation_says() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let read = |text: &str| TraceParent::of(&headers(&TRACEPARENT, &[text]));
        let place = read(text).expect("a valid one");
        assert_eq!(place.trace, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!((place.span, place.flags), (0xb7ad_6b71_6920_3331, 1));
        assert_eq!(place.header(), text);
        assert_eq!(read(&text.replace("00-", "cc-")), Some(place));
        assert_eq!(read(&format!("cc{}-more", &text[2..])), Some(place));
        for wrong in [
            "",
            "00",
            &text.to_uppercase(),
            &text.replace("00-", "ff-"),
            &format!("{text}-more"),
            &format!("cc{}more", &text[2..]),
            &text[..text.len() - 1],
            &text.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &text.replace("b7ad6b7169203331", &"0".repeat(16)),
            &text.replace("-b7", "_b7"),
            &text.replace("b7ad", "g7ad"),
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        let twice = headers(&TRACEPARENT, &[text, text]);
        assert_eq!(TraceParent::of(&twice), None);
    }
}
