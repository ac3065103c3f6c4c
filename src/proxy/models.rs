//! `/v1/models`: the models there are, in OpenAI's shape.

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::Proxy;
use super::body::ProxyBody;
use crate::control::ModelRoute;
use crate::reply::Fault;

/// The path of the list; one model is below it.
const PATH: &str = "/v1/models";

/// Returns what of the path names one model: empty for the list, absent when
/// the path is none of ours.
pub(super) fn asked(path: &str) -> Option<&str> {
    match path.strip_prefix(PATH)? {
        "" | "/" => Some(""),
        rest => rest.strip_prefix('/'),
    }
}

impl Proxy {
    /// Answers the list, or one model.
    pub(super) fn models(&self, method: &Method, name: &str) -> Result<Response<ProxyBody>, Fault> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return Err(Fault::BadRequest(format!(
                "{method} is not for {PATH}: use GET"
            )));
        }
        let value = if name.is_empty() {
            let all = self.controller.routes().all();
            let data: Vec<Value> = all.iter().flat_map(|route| self.entries(route)).collect();
            json!({"object": "list", "data": data})
        } else {
            let name = percent_decode_str(name).decode_utf8_lossy();
            let route = self
                .controller
                .routes()
                .get(&name)
                .ok_or_else(|| self.not_found(&name))?;
            self.entry(&name, &route)
        };
        let mut response = Response::new(ProxyBody::text(value.to_string()));
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }

    /// The model under its name and under each alias.
    fn entries(&self, route: &ModelRoute) -> Vec<Value> {
        let names = std::iter::once(route.name()).chain(&route.spec().aliases);
        names.map(|name| self.entry(name.as_str(), route)).collect()
    }

    fn entry(&self, name: &str, route: &ModelRoute) -> Value {
        let clock = self.controller.clock();
        let created = clock.unix(crate::clock::Timestamp::START).floor();
        json!({
            "id": name,
            "object": "model",
            "created": serde_json::Number::from_f64(created).and_then(|n| n.as_f64()).map(whole),
            "owned_by": "residentd",
            "kind": route.spec().kind,
        })
    }
}

/// Whole seconds, as OpenAI's clients expect them.
#[expect(
    clippy::cast_possible_truncation,
    reason = "Unix seconds of this age are far below 2^53"
)]
fn whole(seconds: f64) -> i64 {
    seconds as i64
}
