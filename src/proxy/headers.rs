//! What happens to headers on their way: those of one connection are dropped,
//! framing is ours, and the worker is told who asked.

use std::net::SocketAddr;

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, Entry, HOST, HeaderMap, HeaderName, HeaderValue,
    TE, UPGRADE,
};
use hyper::http::request;

use crate::model::Upstream;

/// Names a client between a residentd and the one that has taken over from it.
/// Whoever else sends it means nothing by it.
pub const PEER: HeaderName = HeaderName::from_static("x-residentd-peer");
/// Says the same way that a worker broke over the request already, so that it is not
/// tried twice more.
pub const TRIED: HeaderName = HeaderName::from_static("x-residentd-tried");
/// Headers of one connection, never passed on (RFC 9110, 7.6.1; the two about
/// authentication are for the proxy they reach). Trailers pass, and so does the
/// header that announces them: HTTP/1 sends none that it does not.
const HOP_BY_HOP: [HeaderName; 10] = [
    CONNECTION,
    PEER,
    TRIED,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("proxy-authorization"),
    HeaderName::from_static("proxy-connection"),
    TE,
    HeaderName::from_static("transfer-encoding"),
    UPGRADE,
];
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Whether the client wants to leave HTTP, as for a websocket.
pub(super) fn asks_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(UPGRADE)
        && connection_words(headers).any(|word| word.eq_ignore_ascii_case("upgrade"))
}

/// Makes a client's headers fit for the worker; its `Host` and the body's
/// length are set for each try. `peer` is the client's address.
pub(super) fn towards_worker(head: &mut request::Parts, peer: Option<SocketAddr>, upgrade: bool) {
    let host = match head.headers.get(HOST) {
        Some(host) => Some(host.clone()),
        None => head
            .uri
            .authority()
            .and_then(|authority| HeaderValue::from_str(authority.as_str()).ok()),
    };
    let headers = &mut head.headers;
    let protocol = headers.get(UPGRADE).filter(|_| upgrade).cloned();
    let trailers = headers.get(TE).is_some_and(|value| value == "trailers");
    strip(headers);
    // The client was told to go on already, and the length is that of the body
    // as it was understood here, not as it was announced.
    headers.remove(EXPECT);
    headers.remove(CONTENT_LENGTH);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = protocol {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
    // HTTP/2 may send a cookie in crumbs (RFC 9113, 8.2.3).
    join(headers, COOKIE, "; ", None);
    let address = peer.map(|peer| peer.ip().to_canonical().to_string());
    join(headers, FORWARDED_FOR, ", ", address.as_deref());
    set_default(headers, FORWARDED_PROTO, HeaderValue::from_static("http"));
    if let Some(host) = host {
        set_default(headers, FORWARDED_HOST, host);
    }
}

/// Takes off the headers of one connection, and those that it names.
pub(super) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = connection_words(headers)
        .filter_map(|name| name.parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Returns the value of `Host` for a worker.
pub(super) fn host(upstream: &Upstream) -> HeaderValue {
    HeaderValue::try_from(upstream.host()).unwrap_or_else(|_| HeaderValue::from_static("localhost"))
}

fn connection_words(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// Makes one line of several, `last` at its end.
fn join(headers: &mut HeaderMap, name: HeaderName, between: &str, last: Option<&str>) {
    let lines = headers.get_all(&name);
    if last.is_none() && lines.iter().nth(1).is_none() {
        return;
    }
    let values = lines.iter().map(HeaderValue::as_bytes);
    let all: Vec<&[u8]> = values.chain(last.map(str::as_bytes)).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(between.as_bytes())) {
        headers.insert(name, joined);
    }
}

fn set_default(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    if let Entry::Vacant(place) = headers.entry(name) {
        place.insert(value);
    }
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
        let (mut head, ()) = request.into_parts();
        towards_worker(&mut head, "10.1.2.3:4".parse().ok(), upgrade);
        let mut all: Vec<_> = head
            .headers
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
            ("host", "models.example"),
            ("x-forwarded-for", "192.0.2.1, 192.0.2.2, 10.1.2.3"),
            ("x-forwarded-host", "models.example"),
            ("x-forwarded-proto", "https"),
        ];
        assert_eq!(sent(&lines, false), pairs(&expected));
    }
}
