//! Who may read, and who may change state.
//!
//! Without operators' tokens everybody may read, and callers on this machine may
//! change. With them nobody may do either without one, on this machine neither:
//! what forwards from here, a reverse proxy or a service mesh's sidecar, would
//! make its callers local. Probes, metrics and the page that says what else
//! there is stay open.
//!
//! No web page that came from somewhere else changes anything.
//! A page in the operator's own browser reaches loopback too. Browsers name
//! where the page came from in `Origin`, so that must be the address called;
//! and because a hostile name server can make its own name point to loopback,
//! a call from a browser must also have called a local name or a plain
//! address.

use std::net::{IpAddr, SocketAddr};

use axum::extract::Request;
use axum::http::header::{HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::envelope::ApiError;
use super::{is_probe, only_reads};

/// Where a connection came from, put into each request's extensions by whoever
/// accepted it. `None` is a Unix socket, which counts as local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerAddr(pub Option<SocketAddr>);

impl PeerAddr {
    /// Returns whether the peer is on this machine.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.0
            .is_none_or(|addr| addr.ip().to_canonical().is_loopback())
    }
}

/// What a caller's tokens prove, put into each request's extensions by whoever
/// accepted it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// No operators' tokens are configured.
    #[default]
    NotAsked,
    /// None is right.
    Unknown,
    /// One is that of a user of models.
    Inference,
    /// One is an operator's.
    Admin,
}

/// Marks a call of a web page that `server.cors_origins` names.
#[derive(Clone, Copy, Debug)]
pub struct KnownPage;

/// Refuses a call unless it may. Nothing changes by `GET`.
pub(crate) async fn guard(request: Request, next: Next) -> Response {
    match check(&request) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Returns whether everybody may read a path, tokens or not.
fn is_open(path: &str) -> bool {
    is_probe(path) || matches!(path, "/" | "/metrics")
}

fn check(request: &Request) -> Result<(), ApiError> {
    let harmless = matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::OPTIONS
    ) || only_reads(request.uri().path());
    if harmless && is_open(request.uri().path()) {
        return Ok(());
    }
    let standing = request.extensions().get().copied().unwrap_or_default();
    match standing {
        Standing::Unknown => Err(ApiError::Unauthorized),
        Standing::Inference => Err(ApiError::Forbidden(
            "this token is for models only: see [auth] admin_tokens",
        )),
        Standing::NotAsked | Standing::Admin if harmless => Ok(()),
        Standing::NotAsked => {
            check_local(request)?;
            check_browser(request.headers(), request.uri(), false)
        }
        Standing::Admin if request.extensions().get::<KnownPage>().is_some() => Ok(()),
        Standing::Admin => check_browser(request.headers(), request.uri(), true),
    }
}

fn check_local(request: &Request) -> Result<(), ApiError> {
    // A request nobody marked came from who knows where.
    let local = request
        .extensions()
        .get::<PeerAddr>()
        .is_some_and(PeerAddr::is_local);
    match local {
        true => Ok(()),
        false => Err(ApiError::Forbidden(
            "only callers on this machine may change state, or those with a token: see [auth]",
        )),
    }
}

/// Refuses pages of other origins. One that has a token cannot be a hostile
/// name server's, so the address may have any name then.
fn check_browser(headers: &HeaderMap, uri: &Uri, has_token: bool) -> Result<(), ApiError> {
    let site = headers.get("sec-fetch-site");
    if site.is_some_and(|site| site != "same-origin" && site != "none") {
        return Err(ApiError::Forbidden("a page of another site called"));
    }
    let Some(origin) = headers.get(ORIGIN) else {
        return Ok(());
    };
    let called = match headers.get(HOST) {
        Some(host) => host.to_str().ok(),
        None => uri.authority().map(Authority::as_str),
    };
    let came_from = origin.to_str().ok().and_then(|origin| {
        origin
            .strip_prefix("http://")
            .or_else(|| origin.strip_prefix("https://"))
    });
    let (Some(called), Some(came_from)) = (called, came_from) else {
        return Err(ApiError::Forbidden("a page of unknown origin called"));
    };
    if !came_from.eq_ignore_ascii_case(called) {
        return Err(ApiError::Forbidden("a page of another origin called"));
    }
    if !has_token && !is_local_name(called) {
        return Err(ApiError::Forbidden(
            "a page called by a name that is neither localhost nor an address",
        ));
    }
    Ok(())
}

/// Returns whether `host`, with or without a port, is `localhost`, a name
/// below it or a plain address: names that no foreign name server answers for.
fn is_local_name(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let name = authority.host().to_ascii_lowercase();
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.ends_with(".localhost") || bare.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn call(host: &str, origin: Option<&str>, site: Option<&str>) -> Result<(), String> {
        let mut headers = HeaderMap::new();
        let value = |text: &str| HeaderValue::from_str(text).expect("a valid header");
        headers.insert(HOST, value(host));
        if let Some(origin) = origin {
            headers.insert(ORIGIN, value(origin));
        }
        if let Some(site) = site {
            headers.insert("sec-fetch-site", value(site));
        }
        check_browser(&headers, &Uri::from_static("/"), false).map_err(|error| error.to_string())
    }

    #[test]
    fn a_loopback_peer_is_local_also_as_a_mapped_address() {
        let peer = |text: &str| PeerAddr(Some(text.parse().expect("an address")));
        assert!(PeerAddr(None).is_local());
        assert!(peer("127.0.0.1:5").is_local() && peer("127.9.9.9:5").is_local());
        assert!(peer("[::1]:5").is_local() && peer("[::ffff:127.0.0.1]:5").is_local());
        assert!(!peer("192.168.1.4:5").is_local() && !peer("[::ffff:10.0.0.1]:5").is_local());
    }

    #[test]
    fn a_page_may_act_only_on_the_address_it_came_from() {
        assert_eq!(call("localhost:8080", None, None), Ok(()));
        assert_eq!(call("anything.example", None, None), Ok(()));
        let own = Some("http://localhost:8080");
        assert_eq!(call("LocalHost:8080", own, Some("same-origin")), Ok(()));
        assert_eq!(call("[::1]:8080", Some("http://[::1]:8080"), None), Ok(()));
        assert_eq!(call("10.0.0.7", Some("https://10.0.0.7"), None), Ok(()));
        for (host, origin) in [
            ("localhost:8080", "http://localhost:9999"),
            ("localhost:8080", "http://evil.example"),
            ("localhost:8080", "null"),
            ("localhost:8080", "http://localhost:8080.evil.example"),
        ] {
            assert!(call(host, Some(origin), None).is_err(), "{host} {origin}");
        }
        assert!(call("localhost:8080", None, Some("cross-site")).is_err());
    }

    #[test]
    fn a_foreign_name_that_points_to_loopback_is_refused() {
        let rebound = call("evil.example:8080", Some("http://evil.example:8080"), None);
        assert!(rebound.is_err());
        assert!(!is_local_name("localhost.evil.example") && !is_local_name("127.0.0.1.evil"));
        assert!(is_local_name("a.localhost:1") && is_local_name("127.0.0.1"));
    }
}
