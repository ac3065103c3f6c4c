//! Which model a request is for.
//!
//! In order: the path, the header `x-model`, the body's top-level `model` or
//! multipart field `model`, the query's `model`; with one model configured and
//! none named, that one.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};
use hyper::http::request;
use percent_encoding::percent_decode_str;

use super::multipart;
use super::scan::{Scan, Scanner};
use crate::control::{ModelRoute, Routes};
use crate::model::Bytes as Size;
use crate::reply::Fault;

/// What the path alone says.
#[derive(Debug)]
pub(super) enum ByPath<'a> {
    /// This model, and the path and query the worker gets.
    Model(&'a Arc<ModelRoute>, String),
    /// A model that is not configured.
    Unknown(String),
    /// Nothing.
    Silent,
}

/// Looks for the model in the path. Names may hold slashes, as they are or as
/// `%2F`; the longest configured name wins.
pub(super) fn by_path<'a>(routes: &'a Routes, path: &str, query: Option<&str>) -> ByPath<'a> {
    let (rest, strips) = match (
        path.strip_prefix("/upstream/"),
        path.strip_prefix("/v2/models/"),
    ) {
        (Some(rest), _) => (rest, true),
        (None, Some(rest)) => (rest, false),
        (None, None) => return ByPath::Silent,
    };
    let ends = rest
        .match_indices('/')
        .map(|(at, _)| at)
        .chain([rest.len()]);
    let mut found = None;
    for end in ends {
        let name = percent_decode_str(&rest[..end]).decode_utf8_lossy();
        if let Some(route) = routes.get(&name) {
            found = Some((route, end));
        }
    }
    let Some((route, end)) = found else {
        let first = rest.split('/').next().unwrap_or_default();
        return ByPath::Unknown(percent_decode_str(first).decode_utf8_lossy().into_owned());
    };
    let mut target = if !strips {
        path.to_owned()
    } else if end == rest.len() {
        "/".to_owned()
    } else {
        rest[end..].to_owned()
    };
    if let Some(query) = query {
        target.push('?');
        target.push_str(query);
    }
    ByPath::Model(route, target)
}

/// Looks for the model in the header `x-model`.
pub(super) fn by_header(head: &request::Parts) -> Result<Option<String>, Fault> {
    let Some(value) = head.headers.get("x-model") else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .map_err(|_| Fault::BadRequest("the header x-model is not plain text".into()))?;
    Ok(Some(text.to_owned()))
}

/// Looks for the model in the query.
pub(super) fn by_query(head: &request::Parts) -> Option<String> {
    let pairs = head.uri.query()?.split('&');
    let value = pairs
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == "model")?
        .1;
    let spaced: Cow<'_, str> = value.replace('+', "%2B").into();
    Some(percent_decode_str(&spaced).decode_utf8_lossy().into_owned())
}

/// The part of a body that was read to find the model, and the rest.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) pieces: VecDeque<Bytes>,
    pub(super) size: usize,
    rest: Option<Incoming>,
    spent: bool,
}

impl Held {
    pub(super) fn new(body: Incoming) -> Self {
        let rest = (!body.is_end_stream()).then_some(body);
        Self {
            pieces: VecDeque::new(),
            size: 0,
            rest,
            spent: false,
        }
    }

    /// Returns whether the body is here as a whole, so that it can be sent
    /// again.
    pub(super) fn is_whole(&self) -> bool {
        self.rest.is_none() && !self.spent
    }

    /// Gives away what was not read, once.
    pub(super) fn take_rest(&mut self) -> Option<Incoming> {
        let rest = self.rest.take();
        self.spent |= rest.is_some();
        rest
    }

    /// Reads one more piece; `None` at the end. Trailers of a request are not
    /// passed on.
    pub(super) async fn read(&mut self) -> Result<Option<Bytes>, Fault> {
        while let Some(body) = &mut self.rest {
            match body.frame().await {
                None => self.rest = None,
                Some(Err(error)) => {
                    return Err(Fault::BadRequest(format!("the body broke off: {error}")));
                }
                Some(Ok(frame)) => {
                    let Ok(piece) = frame.into_data() else {
                        continue;
                    };
                    if body.is_end_stream() {
                        self.rest = None;
                    }
                    self.size += piece.len();
                    self.pieces.push_back(piece.clone());
                    return Ok(Some(piece));
                }
            }
        }
        Ok(None)
    }

    /// Reads the body to its end, when it is known to be at most `size`.
    pub(super) async fn read_whole(&mut self, size: u64) -> Result<(), Fault> {
        let left = self.rest.as_ref().and_then(|rest| rest.size_hint().exact());
        if left.is_some_and(|left| left <= size) {
            while self.read().await?.is_some() {}
        }
        Ok(())
    }
}

/// Looks for the model in the body, reading no more of it than needed and at
/// most `prefix`.
pub(super) async fn by_body(
    head: &request::Parts,
    held: &mut Held,
    prefix: Size,
) -> Result<Option<String>, Fault> {
    if held.is_whole() {
        return Ok(None);
    }
    let encoded = head
        .headers
        .get(CONTENT_ENCODING)
        .is_some_and(|value| value != "identity");
    if encoded {
        return Err(Fault::BadRequest(
            "the body is compressed, so its model cannot be read: name it in the header x-model"
                .into(),
        ));
    }
    let kind = head
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    match multipart::boundary(kind) {
        Some(boundary) => by_multipart(held, &boundary, prefix).await,
        None if may_be_json(kind) => by_json(held, prefix).await,
        None => Ok(None),
    }
}

/// Whether a body of this type is looked into: JSON by any name, and what
/// clients send it as that do not say so (none, text, `curl -d`).
fn may_be_json(kind: &str) -> bool {
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    kind.is_empty()
        || kind.ends_with("json")
        || kind.starts_with("text/")
        || kind == "application/x-www-form-urlencoded"
}

/// The first `model` of the body's top level counts; what follows it is not
/// looked at any more.
async fn by_json(held: &mut Held, prefix: Size) -> Result<Option<String>, Fault> {
    let mut scanner = Scanner::new();
    let mut seen = Scan::More;
    while seen == Scan::More {
        let left = left(held, prefix)?;
        seen = match held.read().await? {
            Some(piece) => scanner.feed(&piece[..piece.len().min(left)]),
            None if held.size == 0 => Scan::Absent,
            None => scanner.end(),
        };
    }
    match seen {
        Scan::Found(name) => Ok(Some(name)),
        Scan::Absent | Scan::More => Ok(None),
        Scan::NotText => Err(Fault::BadRequest("`model` is not a string".into())),
        Scan::NotJson => Err(Fault::BadRequest("the body is not a JSON object".into())),
    }
}

async fn by_multipart(
    held: &mut Held,
    boundary: &str,
    prefix: Size,
) -> Result<Option<String>, Fault> {
    let mut read = Vec::new();
    loop {
        let left = left(held, prefix)?;
        let Some(piece) = held.read().await? else {
            return Ok(multipart::field(&read, boundary, "model"));
        };
        read.extend_from_slice(&piece[..piece.len().min(left)]);
        if let Some(name) = multipart::field(&read, boundary, "model") {
            return Ok(Some(name));
        }
    }
}

/// How much more of the body may be looked at.
fn left(held: &Held, prefix: Size) -> Result<usize, Fault> {
    let prefix_bytes = usize::try_from(prefix.get()).unwrap_or(usize::MAX);
    match prefix_bytes.saturating_sub(held.size) {
        0 => Err(Fault::PrefixTooLong(prefix)),
        left => Ok(left),
    }
}
