//! What of the bytes that come is the body of an answer, and where it ends.

use bytes::{Buf, Bytes, BytesMut};
use hyper::header::HeaderMap;
use memchr::{memchr, memchr_iter};

use super::WireError;
use super::head::{MOST_LINES, Places, malformed, refused};

/// Bytes of the line before a chunk, at most: its size, and extensions, which nobody
/// uses.
const LONGEST_LINE: usize = 4 << 10;
/// Bytes of trailers, at most.
const MOST_TRAILERS: usize = 16 << 10;

/// Reads one body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoder {
    /// All of it was read, or there is none.
    Done,
    /// So many bytes follow.
    Length(u64),
    /// It comes in chunks.
    Chunked(Chunk),
    /// It ends as the connection does.
    UntilClosed,
}

/// Where in a body of chunks it stands (RFC 9112, 7.1).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// Before the line with a size.
    Size,
    /// In a chunk of which so much follows.
    Data(u64),
    /// Behind a chunk, before the end of its line.
    End,
    /// Behind the last one.
    Trailers,
}

/// What is next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
    /// It is not known before more was read.
    More,
}

impl Decoder {
    pub(super) const fn chunked() -> Self {
        Self::Chunked(Chunk::Size)
    }

    /// Takes the next piece off the beginning of what was read.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Piece, WireError> {
        match self {
            Self::Done => Ok(Piece::End),
            Self::UntilClosed if buffer.is_empty() => Ok(Piece::More),
            Self::UntilClosed => Ok(Piece::Data(buffer.split().freeze())),
            Self::Length(left) => {
                let data = take(buffer, left);
                if *left == 0 {
                    *self = Self::Done;
                }
                Ok(data.map_or(Piece::More, Piece::Data))
            }
            Self::Chunked(chunk) => {
                let piece = chunk.next(buffer)?;
                if matches!(piece, Piece::Trailers(_) | Piece::End) {
                    *self = Self::Done;
                }
                Ok(piece)
            }
        }
    }

    /// The connection was closed.
    pub(super) fn close(&mut self) -> Result<(), WireError> {
        match self {
            Self::Done | Self::UntilClosed => {
                *self = Self::Done;
                Ok(())
            }
            Self::Length(_) | Self::Chunked(_) => {
                Err(WireError::Closed("in the midst of its answer"))
            }
        }
    }

    pub(super) fn is_done(&self) -> bool {
        *self == Self::Done
    }

    /// Returns how many bytes follow, if that is known.
    pub(super) fn left(&self) -> Option<u64> {
        match self {
            Self::Done => Some(0),
            Self::Length(left) => Some(*left),
            Self::Chunked(_) | Self::UntilClosed => None,
        }
    }
}

impl Chunk {
    fn next(&mut self, buffer: &mut BytesMut) -> Result<Piece, WireError> {
        loop {
            match self {
                Self::Size => {
                    let Some(size) = size(buffer)? else {
                        return Ok(Piece::More);
                    };
                    *self = match size {
                        0 => Self::Trailers,
                        size => Self::Data(size),
                    };
                }
                Self::Data(left) => {
                    let data = take(buffer, left);
                    if *left == 0 {
                        *self = Self::End;
                    }
                    return Ok(data.map_or(Piece::More, Piece::Data));
                }
                Self::End => match &buffer[..buffer.len().min(2)] {
                    b"\r\n" => {
                        buffer.advance(2);
                        *self = Self::Size;
                    }
                    b"" | b"\r" => return Ok(Piece::More),
                    _ => return Err(refused("a chunk is longer than its size")),
                },
                Self::Trailers => return trailers(buffer),
            }
        }
    }
}

/// Takes data up to so many bytes, and notes how many are left.
fn take(buffer: &mut BytesMut, left: &mut u64) -> Option<Bytes> {
    if buffer.is_empty() {
        return None;
    }
    let here = u64::try_from(buffer.len()).unwrap_or(u64::MAX);
    let data = match here <= *left {
        true => buffer.split(),
        false => buffer.split_to(usize::try_from(*left).unwrap_or(buffer.len())),
    };
    *left -= here.min(*left);
    Some(data.freeze())
}

/// Takes the line before a chunk, if it is here. Returns the chunk's size.
fn size(buffer: &mut BytesMut) -> Result<Option<u64>, WireError> {
    let bad = || refused("a chunk has no size");
    let Some(end) = memchr(b'\n', buffer) else {
        return match buffer.len() < LONGEST_LINE {
            true => Ok(None),
            false => Err(bad()),
        };
    };
    let line = buffer[..end].strip_suffix(b"\r").ok_or_else(bad)?;
    if line.contains(&b'\r') {
        return Err(bad());
    }
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit());
    let (digits, behind) = line.split_at(digits.count());
    let is_end = matches!(behind.trim_ascii_start().first(), None | Some(b';'));
    let text = str::from_utf8(digits).ok().filter(|_| is_end);
    // Sixteen digits are all that fit, and none is no number.
    let size = text.and_then(|text| u64::from_str_radix(text, 16).ok());
    buffer.advance(end + 1);
    size.ok_or_else(bad).map(Some)
}

/// Takes what is behind the last chunk, if all of it is here.
fn trailers(buffer: &mut BytesMut) -> Result<Piece, WireError> {
    if buffer.starts_with(b"\r\n") {
        buffer.advance(2);
        return Ok(Piece::End);
    }
    let mut lines = [httparse::EMPTY_HEADER; MOST_LINES];
    let parsed = httparse::parse_headers(buffer, &mut lines).map_err(malformed)?;
    let httparse::Status::Complete((length, lines)) = parsed else {
        return match buffer.len() < MOST_TRAILERS {
            true => Ok(Piece::More),
            false => Err(refused("its trailers are too large")),
        };
    };
    // httparse takes the end of a line alone; of chunks nobody does.
    let is_bare = |at: usize| at == 0 || buffer[at - 1] != b'\r';
    if memchr_iter(b'\n', &buffer[..length]).any(is_bare) {
        return Err(refused("a line of its trailers has no end"));
    }
    let places = Places::of(buffer, lines);
    let trailers = places.cut(&buffer.split_to(length).freeze(), 0)?;
    Ok(match trailers.is_empty() {
        true => Piece::End,
        false => Piece::Trailers(trailers),
    })
}
