//! Which model a request is for.
//!
//! In order: the path, the header `x-model`, the body's top-level `model` or
//! multipart field `model`, the query's `model`; with one model configured and
//! none named, that one. For gRPC see [`super::rpc`].

use std::borrow::Cow;
use std::sync::Arc;

use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderName};
use hyper::http::request;
use hyper::http::uri::PathAndQuery;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::held::Held;
use super::multipart::{self, Finder, Seen};
use super::scan::{Scan, Scanner};
use crate::control::{ModelRoute, Routes};
use crate::model::Bytes;
use crate::reply::Fault;

/// A name has at most 128 bytes, each of which may be written as `%2F`.
const LONGEST_IN_PATH: usize = 3 * 128;
/// Names the model.
const MODEL: HeaderName = HeaderName::from_static("x-model");
/// What of a name is written as `%XX` in a path.
const IN_PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// What the path alone says.
#[derive(Debug)]
pub(super) enum ByPath {
    /// This model, and the path and query the worker gets.
    Model(Arc<ModelRoute>, PathAndQuery),
    /// Whether this model is ready, in the Open Inference Protocol.
    Readiness(Arc<ModelRoute>, String),
    /// A model that is not configured.
    Unknown(String),
    /// Nothing.
    Silent,
}

/// Looks for the model in the path. Names may hold slashes, as they are or as
/// `%2F`; the longest configured name wins.
///
/// # Errors
/// When what the worker would be asked for is no path.
pub(super) fn by_path(routes: &Routes, path: &str, query: Option<&str>) -> Result<ByPath, Fault> {
    let (rest, strips) = match (
        path.strip_prefix("/upstream/"),
        path.strip_prefix("/v2/models/"),
    ) {
        (Some(rest), _) => (rest, true),
        (None, Some(rest)) => (rest, false),
        (None, None) => return Ok(ByPath::Silent),
    };
    let ends = rest
        .match_indices('/')
        .map(|(at, _)| at)
        .chain([rest.len()])
        .take_while(|end| *end <= LONGEST_IN_PATH);
    let mut found = None;
    for end in ends {
        let name = percent_decode_str(&rest[..end]).decode_utf8_lossy();
        if let Some(route) = routes.get(&name) {
            found = Some((route, end));
        }
    }
    let Some((route, end)) = found else {
        let first = rest.split('/').next().unwrap_or_default();
        let name = percent_decode_str(first).decode_utf8_lossy();
        return Ok(ByPath::Unknown(name.into_owned()));
    };
    if !strips && asks_readiness(&rest[end..]) {
        let name = percent_decode_str(&rest[..end]).decode_utf8_lossy();
        return Ok(ByPath::Readiness(route, name.into_owned()));
    }
    let mut target = if !strips {
        match &route.spec().requests.filter.model {
            Some(model) => format!(
                "/v2/models/{}{}",
                utf8_percent_encode(model, IN_PATH),
                &rest[end..]
            ),
            None => path.to_owned(),
        }
    } else if end == rest.len() {
        "/".to_owned()
    } else {
        rest[end..].to_owned()
    };
    if let Some(query) = query {
        target.push('?');
        target.push_str(query);
    }
    let bad = |error| Fault::BadRequest(format!("the path cannot be passed on: {error}"));
    Ok(ByPath::Model(route, target.try_into().map_err(bad)?))
}

/// Whether this, behind a model's name, is `/ready`, of a version or not.
fn asks_readiness(rest: &str) -> bool {
    let version = rest.strip_prefix("/versions/");
    let version = version.and_then(|version| version.strip_suffix("/ready"));
    rest == "/ready" || version.is_some_and(|version| !version.contains('/'))
}

/// Returns the path when it is one of those that park or unpark the worker,
/// however it is written.
pub(super) fn parks(route: &ModelRoute, path: &str) -> Option<String> {
    let park = route.spec().park.as_ref()?;
    let path = percent_decode_str(path).decode_utf8_lossy();
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    let path = format!("/{}", parts.join("/"));
    park.is_control(&path).then_some(path)
}

/// Looks for the model in body and query, reading no more of the body
/// than needed.
pub(super) async fn by_content(
    head: &request::Parts,
    held: &mut Held,
    prefix: Bytes,
) -> Result<Option<String>, Fault> {
    let in_query = by_query(head);
    Ok(match by_body(head, held, prefix).await? {
        Named::Model(name) => Some(name),
        Named::Nothing => in_query,
        // What cannot be read for a model is the worker's to understand.
        Named::Unreadable(_) if in_query.is_some() => in_query,
        Named::Unreadable(fault) => return Err(fault),
    })
}

/// Looks for the model in the header `x-model`.
pub(super) fn by_header(head: &request::Parts) -> Result<Option<String>, Fault> {
    let Some(value) = head.headers.get(MODEL) else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .map_err(|_| Fault::BadRequest("the header x-model is not plain text".into()))?;
    Ok(Some(text.to_owned()))
}

/// Looks for the model in the query.
fn by_query(head: &request::Parts) -> Option<String> {
    let pairs = head.uri.query()?.split('&');
    let value = pairs
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == "model")?
        .1;
    let text: Cow<'_, str> = percent_decode_str(value).decode_utf8_lossy();
    Some(text.into_owned())
}

/// What a body says.
enum Named {
    Model(String),
    Nothing,
    /// It cannot be told, for this reason.
    Unreadable(Fault),
}

impl Named {
    fn bad(why: &str) -> Self {
        Self::Unreadable(Fault::BadRequest(why.to_owned()))
    }
}

/// Looks for the model in the body, reading at most `prefix` of it. An error
/// is the body's end: it broke off.
async fn by_body(head: &request::Parts, held: &mut Held, prefix: Bytes) -> Result<Named, Fault> {
    if held.is_whole() {
        return Ok(Named::Nothing);
    }
    if is_encoded(head) {
        return Ok(Named::bad(
            "the body is compressed, so its model cannot be read: name it in the header x-model",
        ));
    }
    let kind = kind(head);
    match multipart::boundary(kind) {
        // Boxed, since few need it and all would have room for it.
        Some(boundary) => Box::pin(by_multipart(held, Finder::new(&boundary), prefix)).await,
        None => by_json(held, prefix, may_be_else(kind)).await,
    }
}

/// Whether the body is compressed.
pub(super) fn is_encoded(head: &request::Parts) -> bool {
    let encoding = head.headers.get(CONTENT_ENCODING);
    encoding.is_some_and(|value| value != "identity")
}

/// Returns what the body is said to be.
pub(super) fn kind(head: &request::Parts) -> &str {
    let kind = head.headers.get(CONTENT_TYPE);
    let kind = kind.and_then(|value| value.to_str().ok());
    kind.unwrap_or_default()
}

/// Whether a body of this type is something else than JSON and need not name a
/// model. Forms are what `curl -d` calls its JSON.
pub(super) fn may_be_else(kind: &str) -> bool {
    let has = |word: &[u8; 4]| {
        let mut fours = kind.as_bytes().windows(word.len());
        fours.any(|four| four.eq_ignore_ascii_case(word))
    };
    !kind.is_empty() && !has(b"json") && !has(b"form")
}

async fn by_json(held: &mut Held, prefix: Bytes, may_be_else: bool) -> Result<Named, Fault> {
    let mut scanner = Scanner::new();
    let mut seen = Scan::More;
    while seen == Scan::More {
        let left = left(held, prefix);
        if left == 0 {
            return Ok(Named::Unreadable(Fault::PrefixTooLong(prefix)));
        }
        seen = match held.read().await? {
            Some(piece) => scanner.feed(&piece[..piece.len().min(left)]),
            None if held.size() == 0 => Scan::Absent,
            None => scanner.end(),
        };
    }
    Ok(match seen {
        Scan::Found(name) => Named::Model(name),
        Scan::Absent | Scan::More => Named::Nothing,
        Scan::NotText => Named::bad("`model` is not a string"),
        Scan::NotJson if may_be_else => Named::Nothing,
        Scan::NotJson => Named::bad("the body is not a JSON object"),
    })
}

async fn by_multipart(held: &mut Held, mut finder: Finder, prefix: Bytes) -> Result<Named, Fault> {
    loop {
        let left = left(held, prefix);
        if left == 0 {
            return Ok(Named::Unreadable(Fault::PrefixTooLong(prefix)));
        }
        let Some(piece) = held.read().await? else {
            return Ok(Named::Nothing);
        };
        match finder.feed(&piece[..piece.len().min(left)]) {
            Seen::Found(name) => return Ok(Named::Model(name)),
            Seen::Absent => return Ok(Named::Nothing),
            Seen::More => {}
        }
    }
}

/// How much more of the body may be looked at.
fn left(held: &Held, prefix: Bytes) -> usize {
    usize::try_from(prefix.get().saturating_sub(held.size())).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    fn query(uri: &str) -> Option<String> {
        let request = Request::builder().uri(uri).body(());
        by_query(&request.expect("a good address").into_parts().0)
    }

    #[test]
    fn a_name_in_the_query_is_decoded_and_its_plus_stays() {
        assert_eq!(query("/v1/x?a=1&model=a%2Fb").as_deref(), Some("a/b"));
        assert_eq!(query("/v1/x?model=c++").as_deref(), Some("c++"));
        assert_eq!(query("/v1/x?models=a&mod=b"), None);
        assert_eq!(query("/v1/x"), None);
    }

    #[test]
    fn a_path_of_slashes_is_looked_at_no_further_than_a_name_can_reach() {
        let routes = Routes::new([]);
        let path = format!("/upstream/{}", "a/".repeat(30_000));
        let clock = crate::clock::Clock::start();
        let found = by_path(&routes, &path, None);
        assert!(matches!(found, Ok(ByPath::Unknown(_))));
        // Quadratic work took seconds.
        assert!(clock.now().since_start() < std::time::Duration::from_millis(500));
    }
}
