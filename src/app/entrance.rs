//! Who may come in: tokens, and web pages of other origins.
//!
//! What a request may reach is asked here, once, before the proxy or the API
//! hears of it. What an operator's token is worth is the API's to say.

use std::sync::Arc;

use arc_swap::ArcSwap;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, HeaderMap,
    HeaderName, HeaderValue, ORIGIN, VARY,
};
use hyper::{Method, Response, StatusCode};

use crate::api::Standing;
use crate::config::Config;
use crate::model::Secret;
use crate::proxy::ProxyBody;
use crate::reply::Fault;

/// Where clients of Anthropic's API put their token.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// What a page may do once it may do anything.
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE");
/// How long a browser may rely on the answer to its question, in seconds.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
/// What a page may read of an answer, beside what it always may.
const EXPOSED: HeaderValue = HeaderValue::from_static("retry-after, x-request-id");
/// Any origin.
const ANY: &str = "*";

/// Who may come in, as it is configured now. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Entrance(Arc<ArcSwap<Rules>>);

#[derive(Debug, Default)]
pub(super) struct Rules {
    inference: Vec<Secret>,
    admin: Vec<Secret>,
    origins: Vec<String>,
}

impl Entrance {
    pub(super) fn new(config: &Config) -> Self {
        let made = Self(Arc::default());
        made.set(config);
        made
    }

    /// Has other rules hold for requests that come from now on.
    pub(super) fn set(&self, config: &Config) {
        self.0.store(Arc::new(Rules {
            inference: config.auth.inference.clone(),
            admin: config.auth.admin.clone(),
            origins: config.server.cors_origins.clone(),
        }));
    }

    /// Returns the rules for one request.
    pub(super) fn rules(&self) -> Arc<Rules> {
        self.0.load_full()
    }
}

impl Rules {
    /// Returns what a request's tokens prove of its sender.
    pub(super) fn standing(&self, headers: &HeaderMap) -> Standing {
        if self.admin.is_empty() {
            return Standing::NotAsked;
        }
        if given(headers).any(|(_, token)| is_among(&self.admin, token)) {
            return Standing::Admin;
        }
        match given(headers).any(|(_, token)| is_among(&self.inference, token)) {
            true => Standing::Inference,
            false => Standing::Unknown,
        }
    }

    /// Lets a request to a model in, without the tokens that were meant for
    /// residentd.
    ///
    /// # Errors
    /// [`Fault::Unauthorized`] when a token is asked for and none is right.
    pub(super) fn admit(&self, headers: &mut HeaderMap) -> Result<(), Fault> {
        if self.inference.is_empty() && self.admin.is_empty() {
            return Ok(());
        }
        let is_ours =
            |token: &[u8]| is_among(&self.inference, token) | is_among(&self.admin, token);
        let ours = given(headers).filter(|(_, token)| is_ours(token));
        let ours: Vec<HeaderName> = ours.map(|(name, _)| name).collect();
        if ours.is_empty() && !self.inference.is_empty() {
            return Err(Fault::Unauthorized);
        }
        for name in ours {
            headers.remove(name);
        }
        Ok(())
    }

    /// Returns the page that calls, when its origin may.
    pub(super) fn page(&self, headers: &HeaderMap) -> Option<Page> {
        let origin = headers.get(ORIGIN)?;
        let named = origin.to_str().ok()?;
        let is_known = |known: &String| known == ANY || known.eq_ignore_ascii_case(named);
        self.origins
            .iter()
            .any(is_known)
            .then(|| Page(origin.clone()))
    }
}

/// Returns every token of a request, and where it stands.
fn given(headers: &HeaderMap) -> impl Iterator<Item = (HeaderName, &[u8])> {
    let bearers = headers.get_all(AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("bearer ".len())?;
        let is_bearer = scheme.eq_ignore_ascii_case(b"bearer ");
        is_bearer.then(|| (AUTHORIZATION, token.trim_ascii()))
    });
    let keys = headers.get_all(API_KEY).iter();
    bearers.chain(keys.map(|value| (API_KEY, value.as_bytes().trim_ascii())))
}

/// Returns whether `token` is one of these. All are looked at, so that the time
/// it takes does not tell which.
fn is_among(known: &[Secret], token: &[u8]) -> bool {
    known.iter().fold(false, |found, one| found | one.is(token))
}

/// A web page whose origin may call.
#[derive(Clone, Debug)]
pub(super) struct Page(HeaderValue);

/// Returns whether a browser asks what a page of another origin may do.
pub(super) fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && headers.contains_key(ORIGIN)
        && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// Answers such a question; `page` is there when it may.
pub(super) fn preflight(page: Option<&Page>, headers: &HeaderMap) -> Response<ProxyBody> {
    let mut response = Response::new(ProxyBody::empty());
    if page.is_none() {
        *response.status_mut() = StatusCode::FORBIDDEN;
        return response;
    }
    *response.status_mut() = StatusCode::NO_CONTENT;
    let answer = response.headers_mut();
    answer.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    answer.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    if let Some(wanted) = headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
        answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    response
}

/// Says in an answer whose pages may read it: what a worker says of that does
/// not count. Credentials of a browser's own are never allowed.
pub(super) fn tell(page: Option<&Page>, answer: &mut HeaderMap) {
    answer.remove(ACCESS_CONTROL_ALLOW_ORIGIN);
    answer.remove(ACCESS_CONTROL_ALLOW_CREDENTIALS);
    let Some(Page(origin)) = page else {
        return;
    };
    answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    answer.append(VARY, HeaderValue::from_static("origin"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(inference: &[&str], admin: &[&str]) -> Rules {
        let secrets = |texts: &[&str]| {
            let all = texts.iter().map(|text| Secret::new(text));
            all.collect::<Option<Vec<_>>>().expect("good tokens")
        };
        Rules {
            inference: secrets(inference),
            admin: secrets(admin),
            origins: vec!["https://chat.example".to_owned()],
        }
    }

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn a_request_gets_in_by_either_header_and_loses_what_was_ours() {
        let rules = rules(&["user"], &["boss"]);
        for good in [
            ("authorization", "Bearer user"),
            ("authorization", "bearer  boss "),
            ("x-api-key", "user"),
            ("x-api-key", "boss"),
        ] {
            let mut sent = headers(&[good, ("x-other", "1")]);
            assert_eq!(rules.admit(&mut sent), Ok(()), "{good:?}");
            assert_eq!(sent, headers(&[("x-other", "1")]), "{good:?}");
        }
        for bad in [
            ("authorization", "Bearer use"),
            ("authorization", "user"),
            ("authorization", "Basic user"),
            ("authorization", "Bearer"),
            ("x-api-key", ""),
            ("cookie", "user"),
        ] {
            let mut sent = headers(&[bad]);
            assert_eq!(rules.admit(&mut sent), Err(Fault::Unauthorized), "{bad:?}");
        }
        // The worker's own key is the worker's.
        let mut sent = headers(&[("authorization", "Bearer user"), ("x-api-key", "theirs")]);
        assert_eq!(rules.admit(&mut sent), Ok(()));
        assert_eq!(sent, headers(&[("x-api-key", "theirs")]));
    }

    #[test]
    fn without_tokens_for_models_everybody_may_and_an_operators_still_goes_no_further() {
        let mut sent = headers(&[("authorization", "Bearer anything")]);
        assert_eq!(rules(&[], &[]).admit(&mut sent), Ok(()));
        assert_eq!(sent.len(), 1);
        let with_admin = rules(&[], &["boss"]);
        assert_eq!(with_admin.admit(&mut sent), Ok(()));
        assert_eq!(sent.len(), 1);
        let mut sent = headers(&[("x-api-key", "boss")]);
        assert_eq!(with_admin.admit(&mut sent), Ok(()));
        assert!(sent.is_empty());
    }

    #[test]
    fn what_a_token_proves_is_told_from_what_it_does_not() {
        let both = rules(&["user"], &["boss"]);
        let of = |rules: &Rules, token| rules.standing(&headers(&[("x-api-key", token)]));
        assert_eq!(of(&both, "boss"), Standing::Admin);
        assert_eq!(of(&both, "user"), Standing::Inference);
        assert_eq!(of(&both, "else"), Standing::Unknown);
        assert_eq!(both.standing(&HeaderMap::new()), Standing::Unknown);
        assert_eq!(of(&rules(&["user"], &[]), "user"), Standing::NotAsked);
    }

    #[test]
    fn a_page_is_answered_only_when_its_origin_is_configured() {
        let rules = rules(&[], &[]);
        let known = headers(&[("origin", "https://chat.example")]);
        assert!(rules.page(&known).is_some());
        for other in ["https://chat.example.evil", "http://chat.example", "null"] {
            assert!(rules.page(&headers(&[("origin", other)])).is_none());
        }
        let mut answer = headers(&[
            ("access-control-allow-origin", "*"),
            ("access-control-allow-credentials", "true"),
        ]);
        tell(None, &mut answer);
        assert!(answer.is_empty(), "{answer:?}");
        tell(rules.page(&known).as_ref(), &mut answer);
        assert_eq!(answer[ACCESS_CONTROL_ALLOW_ORIGIN], "https://chat.example");
        assert_eq!(answer[VARY], "origin");
    }
}
