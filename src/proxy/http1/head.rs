//! Heads: a request's is written, an answer's is read.

use std::mem::MaybeUninit;

use bytes::{BufMut, Bytes, BytesMut};
use hyper::StatusCode;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING,
};
use memchr::memchr;

use super::WireError;
use super::decode::Decoder;
use crate::proxy::headers::words;

/// Lines of a head or of trailers, at most.
pub(super) const MOST_LINES: usize = 100;
/// Bytes of a head, at most.
const LARGEST: usize = 400 << 10;
/// Headers that an answer gets on its way, at most: its request's name.
const ADDED: usize = 2;

/// Whatever takes headers, a line for each.
pub(in crate::proxy) trait Lines {
    fn line(&mut self, name: &HeaderName, value: &HeaderValue);
}

impl Lines for HeaderMap {
    fn line(&mut self, name: &HeaderName, value: &HeaderValue) {
        self.append(name, value.clone());
    }
}

/// As they are written. Neither names nor values can hold an end of a line.
impl Lines for BytesMut {
    fn line(&mut self, name: &HeaderName, value: &HeaderValue) {
        let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
        self.reserve(name.len() + value.len() + 4);
        self.put_slice(name);
        self.put_slice(b": ");
        self.put_slice(value);
        self.put_slice(b"\r\n");
    }
}

/// The head of an answer.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// What tells its body from what follows.
    pub(super) body: Decoder,
    /// The worker lets the connection serve more.
    pub(super) is_kept: bool,
}

/// Takes a head off the beginning of what was read, if all of it is here. `is_head`:
/// it answers a request that asked for nothing else. `seen` is how much was looked at
/// in vain, so that one that comes byte by byte is not looked at as often.
pub(super) fn read(
    buffer: &mut BytesMut,
    seen: &mut usize,
    is_head: bool,
) -> Result<Option<Head>, WireError> {
    let new = buffer.get(*seen..).unwrap_or_default();
    *seen = buffer.len();
    if memchr(b'\n', new).is_none() {
        return too_large(buffer);
    }
    let mut lines = [const { MaybeUninit::uninit() }; MOST_LINES];
    let mut parsed = httparse::Response::new(&mut []);
    let length = httparse::ParserConfig::default()
        .parse_response_with_uninit_headers(&mut parsed, buffer, &mut lines)
        .map_err(malformed)?;
    let httparse::Status::Complete(length) = length else {
        return too_large(buffer);
    };
    *seen = 0;
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or_else(|| refused("its status is none"))?;
    let is_old = parsed.version == Some(0);
    let places = Places::of(buffer, parsed.headers);
    let headers = places.cut(&buffer.split_to(length).freeze(), ADDED)?;
    let body = match status {
        _ if is_head => Decoder::Done,
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => Decoder::Done,
        status if status.is_informational() => Decoder::Done,
        _ => framing(&headers, is_old)?,
    };
    let says = |word: &str| {
        let mut said = words(&headers, &CONNECTION);
        said.any(|said| said.eq_ignore_ascii_case(word.as_bytes()))
    };
    let is_kept = match is_old {
        true => says("keep-alive") && !says("close"),
        false => !says("close"),
    };
    Ok(Some(Head {
        is_kept: is_kept && !matches!(body, Decoder::UntilClosed),
        status,
        headers,
        body,
    }))
}

fn too_large(buffer: &[u8]) -> Result<Option<Head>, WireError> {
    match buffer.len() < LARGEST {
        true => Ok(None),
        false => Err(refused("its head is too large")),
    }
}

/// Where the lines of a head stand in what was read, so that they can be cut out of it.
pub(super) struct Places {
    /// From where to where a name goes, and its value.
    lines: [[usize; 4]; MOST_LINES],
    count: usize,
}

impl Places {
    /// Notes where these stand.
    pub(super) fn of(all: &[u8], lines: &[httparse::Header<'_>]) -> Self {
        let start = all.as_ptr().addr();
        let mut places = [[0; 4]; MOST_LINES];
        for (place, line) in places.iter_mut().zip(lines) {
            let name = line.name.as_ptr().addr() - start;
            // What is empty may stand anywhere.
            let value = match line.value.is_empty() {
                true => name,
                false => line.value.as_ptr().addr() - start,
            };
            *place = [
                name,
                name + line.name.len(),
                value,
                value + line.value.len(),
            ];
        }
        Self {
            lines: places,
            count: lines.len(),
        }
    }

    /// Cuts them out, with room for so many more.
    pub(super) fn cut(&self, all: &Bytes, more: usize) -> Result<HeaderMap, WireError> {
        let mut headers = HeaderMap::with_capacity(self.count + more);
        for [name, name_end, value, value_end] in &self.lines[..self.count] {
            let name = HeaderName::from_bytes(&all[*name..*name_end]);
            let name = name.map_err(|_| refused("a header has no name"))?;
            let value = HeaderValue::from_maybe_shared(all.slice(*value..*value_end));
            let value = value.map_err(|_| refused("a header holds what none may hold"))?;
            headers.append(name, value);
        }
        Ok(headers)
    }
}

pub(super) fn malformed(error: httparse::Error) -> WireError {
    WireError::Malformed(error.to_string())
}

pub(super) fn refused(why: &str) -> WireError {
    WireError::Malformed(why.to_owned())
}

/// What ends the body of an answer that has one (RFC 9112, 6.3). We ask for no
/// coding of transfer, so there is none but the one of chunks.
fn framing(headers: &HeaderMap, is_old: bool) -> Result<Decoder, WireError> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        let is_chunked = coding.as_bytes().eq_ignore_ascii_case(b"chunked");
        return match is_chunked && codings.next().is_none() && !is_old {
            true => Ok(Decoder::chunked()),
            false => Err(refused(
                "it has a coding of transfer that was not asked for",
            )),
        };
    }
    let mut length = None;
    // One that is said twice the same way is one.
    for word in words(headers, &CONTENT_LENGTH) {
        let is_number = !word.is_empty() && word.iter().all(u8::is_ascii_digit);
        let text = str::from_utf8(word).ok().filter(|_| is_number);
        let said: Option<u64> = text.and_then(|text| text.parse().ok());
        let said = said.ok_or_else(|| refused("its length is no number"))?;
        if length.is_some_and(|length| length != said) {
            return Err(refused("it has two lengths"));
        }
        length = Some(said);
    }
    Ok(match length {
        Some(0) => Decoder::Done,
        Some(length) => Decoder::Length(length),
        None => Decoder::UntilClosed,
    })
}
