//! What happens to headers on their way: those of one connection are dropped,
//! framing is ours, and the worker is told who asked.

use std::net::SocketAddr;

use hyper::header::{CONNECTION, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, TE, UPGRADE};
use hyper::http::request;

use super::http1::Lines;
use crate::model::Upstream;

/// Names a client between a residentd and the one that has taken over from it.
/// Whoever else sends it means nothing by it.
pub const PEER: HeaderName = HeaderName::from_static("x-residentd-peer");
/// Says the same way that a worker broke over the request already, so that it is not
/// tried twice more.
pub const TRIED: HeaderName = HeaderName::from_static("x-residentd-tried");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Whether the client wants to leave HTTP, as for a websocket.
pub(super) fn asks_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(UPGRADE)
        && words(headers, &CONNECTION).any(|word| word.eq_ignore_ascii_case(b"upgrade"))
}

/// Returns whether a header is of one connection, never passed on (RFC 9110, 7.6.1;
/// the two about authentication are for the proxy they reach). Trailers pass, and so
/// does the header that announces them: HTTP/1 sends none that it does not.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    // Mostly told by the length already.
    let is_known = matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "transfer-encoding"
            | "upgrade"
    );
    is_known || *name == PEER || *name == TRIED
}

/// Returns whether a header is not passed on as it came. The client was told to go
/// on already, and the length is that of the body as it was understood here, not as
/// it was announced.
fn is_set_anew(name: &HeaderName) -> bool {
    matches!(name.as_str(), "host" | "content-length" | "expect")
}

/// Returns whether a header is passed on as one line.
fn is_joined(name: &HeaderName) -> bool {
    *name == COOKIE || *name == FORWARDED_FOR
}

/// Returns what workers are told of a client at this address.
#[must_use]
pub fn client(address: SocketAddr) -> HeaderValue {
    let text = address.ip().to_canonical().to_string();
    HeaderValue::try_from(text).expect("an address is plain text")
}

/// Writes a client's headers as they are fit for the worker, but for its `Host`, the
/// body's length, and what is `replaced`. `client` is what [`client()`] returned.
pub(super) fn towards_worker(
    head: &request::Parts,
    client: Option<&HeaderValue>,
    (upgrade, replaced): (bool, &[HeaderName]),
    to: &mut impl Lines,
) {
    let asked = &head.headers;
    let named = named_by_connection(asked);
    let goes = |name: &HeaderName| !named.contains(name) && !replaced.contains(name);
    for (name, value) in asked {
        let is_ours = is_hop_by_hop(name) || is_set_anew(name) || is_joined(name);
        if !is_ours && goes(name) {
            to.line(name, value);
        }
    }
    if asked.get(TE).is_some_and(|value| value == "trailers") {
        to.line(&TE, &HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = asked.get(UPGRADE).filter(|_| upgrade) {
        to.line(&CONNECTION, &HeaderValue::from_static("upgrade"));
        to.line(&UPGRADE, protocol);
    }
    // HTTP/2 may send a cookie in crumbs (RFC 9113, 8.2.3).
    for (name, between, last) in [(COOKIE, "; ", None), (FORWARDED_FOR, ", ", client)] {
        let lines = asked.get_all(&name).iter().filter(|_| goes(&name));
        if let Some(value) = joined(lines.chain(last), between) {
            to.line(&name, &value);
        }
    }
    let is_said = |name: &HeaderName| asked.contains_key(name) && goes(name);
    if !is_said(&FORWARDED_PROTO) {
        to.line(&FORWARDED_PROTO, &HeaderValue::from_static("http"));
    }
    if !is_said(&FORWARDED_HOST) {
        if let Some(host) = asked.get(HOST) {
            to.line(&FORWARDED_HOST, host);
        } else if let Some(authority) = head.uri.authority()
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            to.line(&FORWARDED_HOST, &host);
        }
    }
}

/// Takes off the headers of one connection, and those that it names.
pub(super) fn strip(headers: &mut HeaderMap) {
    let own = headers.keys().filter(|name| is_hop_by_hop(name));
    let mut dropped: Vec<HeaderName> = own.cloned().collect();
    // What names others is one of them.
    if !dropped.is_empty() {
        dropped.extend(named_by_connection(headers));
    }
    for name in dropped {
        headers.remove(name);
    }
}

/// Returns the headers that are of this connection because it says so, but for those
/// that always are.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let is_plain = |word: &&[u8]| {
        let always = ["close", "keep-alive", "upgrade", "te"];
        !always
            .iter()
            .any(|known| word.eq_ignore_ascii_case(known.as_bytes()))
    };
    let words = words(headers, &CONNECTION).filter(is_plain);
    words
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .collect()
}

/// Returns the value of `Host` for a worker.
pub(super) fn host(upstream: &Upstream) -> HeaderValue {
    HeaderValue::try_from(upstream.host()).unwrap_or_else(|_| HeaderValue::from_static("localhost"))
}

/// Returns the words of a header that is a list, whatever its lines.
pub(super) fn words<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    let values = headers.get_all(name).iter();
    let words = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    words.map(<[u8]>::trim_ascii)
}

/// Makes one line of several.
fn joined<'a>(
    mut lines: impl Iterator<Item = &'a HeaderValue>,
    between: &str,
) -> Option<HeaderValue> {
    let first = lines.next()?;
    let Some(second) = lines.next() else {
        return Some(first.clone());
    };
    let mut all = first.as_bytes().to_vec();
    for line in std::iter::once(second).chain(lines) {
        all.extend_from_slice(between.as_bytes());
        all.extend_from_slice(line.as_bytes());
    }
    HeaderValue::try_from(all).ok()
}

#[cfg(test)]
mod tests {
    use hyper::{Request, Version};

    use super::*;

    fn sent(lines: &[(&'static str, &'static str)], upgrade: bool) -> Vec<(String, String)> {
        let mut request = Request::new(());
        *request.version_mut() = Version::HTTP_11;
        for (name, value) in lines {
            request
                .headers_mut()
                .append(*name, HeaderValue::from_static(value));
        }
        let (head, ()) = request.into_parts();
        let asks = client("10.1.2.3:4".parse().expect("an address"));
        let mut headers = HeaderMap::new();
        towards_worker(&head, Some(&asks), (upgrade, &[]), &mut headers);
        let mut all: Vec<_> = headers
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_str().expect("text").to_owned()))
            .collect();
        all.sort();
        all
    }

    fn pairs(lines: &[(&str, &str)]) -> Vec<(String, String)> {
        lines
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn what_belongs_to_a_connection_stays_there_also_what_it_names() {
        let lines = [
            ("connection", "close, X-Secret"),
            ("connection", "content-type"),
            ("x-secret", "1"),
            ("content-type", "text/plain"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic x"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("expect", "100-continue"),
            ("upgrade", "websocket"),
            ("accept", "*/*"),
        ];
        let expected = [
            ("accept", "*/*"),
            ("te", "trailers"),
            ("x-forwarded-for", "10.1.2.3"),
            ("x-forwarded-proto", "http"),
        ];
        assert_eq!(sent(&lines, false), pairs(&expected));
    }

    #[test]
    fn an_upgrade_keeps_what_asks_for_it() {
        let lines = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ];
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(name, HeaderValue::from_static(value));
        }
        assert!(asks_upgrade(&headers));
        let sent = sent(&lines, true);
        assert!(sent.contains(&("connection".into(), "upgrade".into())));
        assert!(sent.contains(&("upgrade".into(), "websocket".into())));
        headers.remove(UPGRADE);
        assert!(!asks_upgrade(&headers));
    }

    #[test]
    fn who_asked_is_added_to_what_other_proxies_said() {
        let lines = [
            ("host", "models.example"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-for", "192.0.2.2"),
            ("x-forwarded-proto", "https"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
        ];
        let expected = [
            ("cookie", "a=1; b=2"),
            ("x-forwarded-for", "192.0.2.1, 192.0.2.2, 10.1.2.3"),
            ("x-forwarded-host", "models.example"),
            ("x-forwarded-proto", "https"),
        ];
        assert_eq!(sent(&lines, false), pairs(&expected));
    }
}
