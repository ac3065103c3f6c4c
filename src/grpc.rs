//! The little of gRPC that is spoken here: which requests are calls, their
//! deadline, the frame around a message, a few fields of protobuf, and answers
//! without a message.
//!
//! Messages are looked into for one name and written with a handful of fields,
//! by hand: a generated codec would bring a compiler and a framework for that.
//! Everything else of a call is bytes that pass.

mod code;
mod rename;

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, Version};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

pub use self::code::{given, http_of};
pub use self::rename::Renamer;

/// Where the status of a call stands: in the trailers, or in the headers of an
/// answer without a message.
pub const STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// What the status means, for people.
pub const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// How long the client waits.
pub const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// What stands before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;
/// What a status message may not hold as it is; the rest of ASCII may.
const ENCODED: &AsciiSet = &CONTROLS.add(b'%');

/// A status code; those that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// All is well.
    Ok = 0,
    /// The call makes no sense.
    InvalidArgument = 3,
    /// It took longer than the client or the configuration allows.
    DeadlineExceeded = 4,
    /// What was asked for does not exist.
    NotFound = 5,
    /// The client may not do that.
    PermissionDenied = 7,
    /// Too large, or too many.
    ResourceExhausted = 8,
    /// The state does not allow it.
    FailedPrecondition = 9,
    /// No such method.
    Unimplemented = 12,
    /// A fault of ours.
    Internal = 13,
    /// Not now.
    Unavailable = 14,
    /// The client did not say who it is.
    Unauthenticated = 16,
}

/// Returns whether a request is a call.
#[must_use]
pub fn is_call<B>(request: &Request<B>) -> bool {
    request.version() == Version::HTTP_2 && has_kind(request.headers())
}

/// Whether the content type is `application/grpc`, perhaps with the format of
/// its messages; not that of `grpc-web`, which is another protocol.
fn has_kind(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let rest = kind.and_then(|kind| {
        let (name, rest) = kind.split_at_checked("application/grpc".len())?;
        name.eq_ignore_ascii_case(b"application/grpc")
            .then_some(rest)
    });
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Returns how long the client waits, where it says so: up to eight digits and
/// a unit.
#[must_use]
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Writes a time that is left in the largest number of digits that is allowed.
#[must_use]
pub fn timeout_text(left: Duration) -> HeaderValue {
    const MOST: u128 = 99_999_999;
    let (number, unit) = if left.as_micros() <= MOST {
        (left.as_micros(), 'u')
    } else if left.as_millis() <= MOST {
        (left.as_millis(), 'm')
    } else {
        (u128::from(left.as_secs()).min(MOST), 'S')
    };
    HeaderValue::try_from(format!("{number}{unit}")).expect("digits and a letter")
}

/// Returns the status as headers or trailers.
#[must_use]
pub fn status(code: Code, message: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(STATUS, HeaderValue::from(u16::from(code as u8)));
    if !message.is_empty() {
        let text = utf8_percent_encode(message, ENCODED).to_string();
        let value = HeaderValue::try_from(text).expect("what is left is printable ASCII");
        headers.insert(MESSAGE, value);
    }
    headers
}

/// Builds an answer that has a status and no message.
pub fn refusal<B>(code: Code, message: &str, empty: B) -> Response<B> {
    let mut response = Response::new(empty);
    *response.headers_mut() = status(code, message);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// A message that is being written. A field of the default value is left out,
/// as protobuf does.
#[derive(Clone, Debug, Default)]
pub struct Message(Vec<u8>);

impl Message {
    /// Adds a text.
    #[must_use]
    pub fn text(self, field: u32, text: &str) -> Self {
        if text.is_empty() {
            return self;
        }
        self.bytes(field, text.as_bytes())
    }

    /// Adds a message; also an empty one is told.
    #[must_use]
    pub fn message(self, field: u32, message: &Self) -> Self {
        self.bytes(field, &message.0)
    }

    /// Adds a number, a truth value or one of an enumeration.
    #[must_use]
    pub fn number(mut self, field: u32, number: u64) -> Self {
        if number != 0 {
            self.varint(u64::from(field) << 3);
            self.varint(number);
        }
        self
    }

    /// Returns the message with its prefix.
    #[must_use]
    pub fn frame(&self) -> Bytes {
        let length = u32::try_from(self.0.len()).expect("our own messages are small");
        let mut frame = vec![0];
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&self.0);
        frame.into()
    }

    fn bytes(mut self, field: u32, bytes: &[u8]) -> Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(u64::try_from(bytes.len()).expect("a length fits 64 bits"));
        self.0.extend_from_slice(bytes);
        self
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number.to_le_bytes()[0] | 0x80);
            number >>= 7;
        }
        self.0.push(number.to_le_bytes()[0]);
    }
}

/// The value of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// A number, a truth value or one of an enumeration.
    Number(u64),
    /// A text, a message or bytes.
    Bytes(&'a [u8]),
    /// Four or eight bytes, of no interest here.
    Fixed,
}

/// These bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a protobuf message")]
pub struct Malformed;

/// A field's number, its value, and how many bytes both take.
pub type Field<'a> = (u64, Value<'a>, usize);

/// Reads the first field; `None` when it is not here as a whole.
///
/// # Errors
/// When this cannot become a field. Groups, which nobody writes any more, are
/// not read.
pub fn first_field(bytes: &[u8]) -> Result<Option<Field<'_>>, Malformed> {
    let Some((tag, mut used)) = varint(bytes)? else {
        return Ok(None);
    };
    let number = tag >> 3;
    if number == 0 {
        return Err(Malformed);
    }
    let rest = &bytes[used..];
    let fixed = |length| (rest.len() >= length).then_some((Value::Fixed, length));
    let value = match tag & 7 {
        0 => varint(rest)?.map(|(number, length)| (Value::Number(number), length)),
        1 => fixed(8),
        5 => fixed(4),
        2 => match varint(rest)? {
            None => None,
            Some((length, before)) => {
                let length = usize::try_from(length).map_err(|_| Malformed)?;
                let end = before.checked_add(length).ok_or(Malformed)?;
                let bytes = rest.get(before..end);
                bytes.map(|bytes| (Value::Bytes(bytes), end))
            }
        },
        _ => return Err(Malformed),
    };
    Ok(value.map(|(value, length)| {
        used += length;
        (number, value, used)
    }))
}

fn varint(bytes: &[u8]) -> Result<Option<(u64, usize)>, Malformed> {
    let mut number = 0_u64;
    for (at, byte) in bytes.iter().take(10).enumerate() {
        number |= u64::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((number, at + 1)));
        }
    }
    if bytes.len() >= 10 {
        return Err(Malformed);
    }
    Ok(None)
}

/// What is known of the text that is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// More of the body is needed.
    More,
    /// This is it.
    Text(String),
    /// The first message does not have it.
    Absent,
    /// The message is compressed, so it is not looked into.
    Compressed,
    /// This is no message.
    Malformed,
}

/// Looks for a text in the first message of a body that comes in pieces. Each
/// field is looked at once, and once more while it is not whole.
#[derive(Debug)]
pub struct Finder {
    field: u64,
    read: Vec<u8>,
    /// What is before this was looked at.
    done: usize,
    /// So long is the field that was found.
    length: usize,
}

impl Finder {
    /// Looks for the field of this number.
    #[must_use]
    pub fn new(field: u64) -> Self {
        Self {
            field,
            read: Vec::new(),
            done: PREFIX,
            length: 0,
        }
    }

    /// Returns where the field is that was found, its number among it.
    fn place(&self) -> Option<Range<usize>> {
        (self.length > 0).then(|| self.done..self.done + self.length)
    }

    /// Returns where the message ends, once its length is known.
    fn end(&self) -> Option<u64> {
        let [_, length @ ..] = self.read.first_chunk::<PREFIX>()?;
        let prefix = u64::try_from(PREFIX).expect("a length fits 64 bits");
        Some(prefix + u64::from(u32::from_be_bytes(*length)))
    }

    /// Returns how much of the message is still to come, or of its prefix.
    fn room(&self) -> usize {
        let end = self.end().and_then(|end| usize::try_from(end).ok());
        end.unwrap_or(PREFIX).saturating_sub(self.read.len())
    }

    /// Takes the next piece.
    pub fn feed(&mut self, piece: &[u8]) -> Found {
        self.read.extend_from_slice(piece);
        let [compressed, length @ ..] = match self.read.first_chunk::<PREFIX>() {
            Some(prefix) => *prefix,
            None => return Found::More,
        };
        match compressed {
            0 => {}
            1 => return Found::Compressed,
            _ => return Found::Malformed,
        }
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        let end = PREFIX.saturating_add(length);
        loop {
            if self.done == end {
                return Found::Absent;
            }
            let message = &self.read[self.done..self.read.len().min(end)];
            match first_field(message) {
                Ok(Some((number, Value::Bytes(text), used))) if number == self.field => {
                    self.length = used;
                    return match std::str::from_utf8(text) {
                        Ok("") => Found::Absent,
                        Ok(text) => Found::Text(text.to_owned()),
                        Err(_) => Found::Malformed,
                    };
                }
                Ok(Some((_, _, used))) => self.done += used,
                Ok(None) if self.read.len() < end => return Found::More,
                Ok(None) | Err(Malformed) => return Found::Malformed,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find(field: u64, body: &[u8], piece: usize) -> Found {
        let mut finder = Finder::new(field);
        let found = body.chunks(piece).map(|part| finder.feed(part));
        found
            .into_iter()
            .find(|found| *found != Found::More)
            .unwrap_or(Found::More)
    }

    #[test]
    fn a_name_is_found_wherever_it_stands_and_whatever_the_pieces() {
        let nested = Message::default().text(1, "wrong").number(3, 1 << 40);
        let message = Message::default()
            .number(9, u64::MAX)
            .message(7, &nested)
            .text(1, "org/blue")
            .text(1, "second")
            .frame();
        for piece in 1..=message.len() {
            assert_eq!(find(1, &message, piece), Found::Text("org/blue".into()));
            assert_eq!(find(2, &message, piece), Found::Absent);
        }
        // As protoc writes `ModelInferRequest { model_name: "a", id: "b" }`.
        let bytes = b"\0\0\0\0\x06\x0a\x01a\x1a\x01b";
        assert_eq!(find(1, bytes, 3), Found::Text("a".into()));
    }

    #[test]
    fn what_has_no_name_says_so_at_the_end_of_the_message() {
        let empty = Message::default().frame();
        assert_eq!(find(1, &empty, 2), Found::Absent);
        assert_eq!(find(1, &empty[..4], 2), Found::More);
        let cut = Message::default().text(1, "blue").frame();
        assert_eq!(find(1, &cut[..8], 8), Found::More);
        for (bytes, found) in [
            (&b"\x01\0\0\0\x02\x0a\0"[..], Found::Compressed),
            (b"\x02\0\0\0\x02\x0a\0", Found::Malformed),
            // A field that is longer than its message.
            (b"\0\0\0\0\x03\x0a\x05ablue", Found::Malformed),
            // A group, field 0, a number without end, text that is none.
            (b"\0\0\0\0\x02\x0b\x0c", Found::Malformed),
            (b"\0\0\0\0\x02\x02\0", Found::Malformed),
            (
                b"\0\0\0\0\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
                Found::Malformed,
            ),
            (b"\0\0\0\0\x03\x0a\x01\xff", Found::Malformed),
        ] {
            assert_eq!(find(1, bytes, 3), found, "{bytes:?}");
        }
    }

    #[test]
    fn a_megabyte_of_small_fields_in_single_bytes_is_looked_through_at_once() {
        let mut body = vec![0, 0, 0x10, 0, 0];
        body.extend([0x18, 0x01].repeat(1 << 19));
        let clock = crate::clock::Clock::start();
        assert_eq!(find(1, &body, 1), Found::Absent);
        assert!(clock.now().since_start() < Duration::from_secs(5));
    }

    #[test]
    fn only_grpc_itself_is_a_call() {
        for (kind, is) in [
            ("application/grpc", true),
            ("Application/GRPC+proto", true),
            ("application/grpc; charset=x", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            let mut request = Request::new(());
            request
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            assert!(!is_call(&request), "HTTP/1.1 has no calls");
            *request.version_mut() = Version::HTTP_2;
            assert_eq!(is_call(&request), is, "{kind}");
        }
    }

    #[test]
    fn a_deadline_is_read_and_written_within_eight_digits() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT, HeaderValue::from_str(text).expect("a value"));
            timeout(&headers)
        };
        assert_eq!(read("100m"), Some(Duration::from_millis(100)));
        assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(read("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for wrong in ["", "m", "1", "1x", "+1m", "123456789m"] {
            assert_eq!(read(wrong), None, "{wrong:?}");
        }
        for left in [
            Duration::ZERO,
            Duration::from_micros(1_500),
            Duration::from_secs(300),
            Duration::from_secs(200_000),
        ] {
            let text = timeout_text(left);
            assert_eq!(read(text.to_str().expect("text")), Some(left));
        }
    }

    #[test]
    fn a_status_message_is_percent_encoded() {
        let headers = status(Code::NotFound, "100 % of \u{fc}\n");
        assert_eq!(headers[STATUS], "5");
        assert_eq!(headers[MESSAGE], "100 %25 of %C3%BC%0A");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), piece in 1..40_usize) {
            find(1, &bytes, piece);
        }
    }
}
