//! The part of a request's body that was read to find its model, and the rest.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::{Body, Incoming};

use crate::reply::Fault;

/// Pieces smaller than this are put together, so that a body sent byte by byte
/// costs little more than its bytes.
const SMALL: usize = 1 << 10;
/// Small pieces are put together up to this.
const TOGETHER: usize = 16 << 10;

/// A body of which the beginning is held.
#[derive(Debug)]
pub(super) struct Held {
    pieces: VecDeque<Bytes>,
    small: BytesMut,
    size: u64,
    rest: Option<Incoming>,
    trailers: Option<HeaderMap>,
    spent: bool,
}

impl Held {
    pub(super) fn new(body: Incoming) -> Self {
        let rest = (!body.is_end_stream()).then_some(body);
        Self {
            pieces: VecDeque::new(),
            small: BytesMut::new(),
            size: 0,
            rest,
            trailers: None,
            spent: false,
        }
    }

    /// Returns whether the body is here as a whole, so that sending it uses
    /// nothing up.
    pub(super) fn is_whole(&self) -> bool {
        self.rest.is_none() && !self.spent
    }

    /// Returns whether nothing of the rest was given away, so that the body can
    /// be sent (again) from its beginning.
    pub(super) fn can_be_sent(&self) -> bool {
        !self.spent
    }

    /// Returns how many bytes were read.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Returns how many bytes the body has at least, as far as that is known.
    pub(super) fn least(&self) -> u64 {
        let rest = self.rest.as_ref();
        rest.map_or(self.size, |rest| {
            self.size.saturating_add(rest.size_hint().lower())
        })
    }

    /// Returns what was read.
    pub(super) fn pieces(&self) -> VecDeque<Bytes> {
        let mut pieces = self.pieces.clone();
        if !self.small.is_empty() {
            pieces.push_back(Bytes::copy_from_slice(&self.small));
        }
        pieces
    }

    /// Gives away what was not read, once.
    pub(super) fn take_rest(&mut self) -> Option<Incoming> {
        let rest = self.rest.take();
        self.spent |= rest.is_some();
        rest
    }

    /// Returns what came behind the body, if that was read to its end.
    pub(super) fn trailers(&self) -> Option<HeaderMap> {
        self.trailers.clone()
    }

    /// Reads one more piece; `None` at the end.
    pub(super) async fn read(&mut self) -> Result<Option<Bytes>, Fault> {
        while let Some(body) = &mut self.rest {
            match body.frame().await {
                None => self.rest = None,
                Some(Err(error)) => {
                    return Err(Fault::BadRequest(format!("the body broke off: {error}")));
                }
                Some(Ok(frame)) => {
                    let piece = match frame.into_data() {
                        Ok(piece) => piece,
                        Err(frame) => {
                            self.trailers = frame.into_trailers().ok();
                            continue;
                        }
                    };
                    if body.is_end_stream() {
                        self.rest = None;
                    }
                    self.keep(piece.clone());
                    return Ok(Some(piece));
                }
            }
        }
        Ok(None)
    }

    /// Reads the body to its end, or until it is longer than `most`; not at all
    /// when that is known before. Returns whether all of it is here.
    pub(super) async fn read_up_to(&mut self, most: u64) -> Result<bool, Fault> {
        let known = self
            .rest
            .as_ref()
            .map_or(0, |rest| rest.size_hint().lower());
        if self.size.saturating_add(known) > most {
            return Ok(false);
        }
        while self.size <= most {
            if self.read().await?.is_none() {
                return Ok(self.is_whole());
            }
        }
        Ok(false)
    }

    /// Returns what was read, in one piece.
    pub(super) fn joined(&self) -> Bytes {
        let mut pieces = self.pieces();
        if pieces.len() == 1 {
            return pieces.pop_front().unwrap_or_default();
        }
        let mut all = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
        for piece in &pieces {
            all.extend_from_slice(piece);
        }
        all.freeze()
    }

    /// Reads the body to its end, when it is known to be at most `size`.
    pub(super) async fn read_whole(&mut self, size: u64) -> Result<(), Fault> {
        let left = self.rest.as_ref().and_then(|rest| rest.size_hint().exact());
        if left.is_some_and(|left| left <= size) {
            while self.read().await?.is_some() {}
        }
        Ok(())
    }

    fn keep(&mut self, piece: Bytes) {
        self.size += u64::try_from(piece.len()).unwrap_or(u64::MAX);
        let first = self.pieces.is_empty() && self.small.is_empty();
        if first || piece.len() >= SMALL {
            self.put_together();
            self.pieces.push_back(piece);
            return;
        }
        self.small.extend_from_slice(&piece);
        if self.small.len() >= TOGETHER {
            self.put_together();
        }
    }

    fn put_together(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push_back(self.small.split().freeze());
        }
    }
}
