//! `/v1/models`: the models there are, in OpenAI's shape; and whether one is
//! ready, in that of the Open Inference Protocol.

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::Proxy;
use super::body::ProxyBody;
use crate::control::{ModelRoute, Phase};
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
        Ok(document(&value))
    }

    /// Says whether a worker of the model takes requests, and loads nothing. A
    /// version is the worker's own matter.
    pub(super) fn readiness(&self, name: &str, route: &ModelRoute) -> Response<ProxyBody> {
        let snapshot = self.controller.snapshot();
        let phase = snapshot.models.get(route.name()).map(|view| view.phase);
        if phase == Some(Phase::Ready) {
            return document(&json!({"name": name, "ready": true}));
        }
        let phase = phase.map_or("gone", Phase::as_str);
        let why = format!("model {name} is not ready: it is {phase}");
        let mut response = document(&json!({"name": name, "ready": false, "error": why}));
        // The protocol wants 4xx, and Triton answers this one.
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response
    }

    /// The model under its name and under each alias.
    fn entries(&self, route: &ModelRoute) -> Vec<Value> {
        let names = std::iter::once(route.name()).chain(&route.spec().aliases);
        names.map(|name| self.entry(name.as_str(), route)).collect()
    }

    fn entry(&self, name: &str, route: &ModelRoute) -> Value {
        let clock = self.controller.clock();
        let created = clock.unix(clock.began()).floor();
        json!({
            "id": name,
            "object": "model",
            "created": serde_json::Number::from_f64(created).and_then(|n| n.as_f64()).map(whole),
            "owned_by": "residentd",
            "kind": route.spec().kind,
        })
    }
}

fn document(value: &Value) -> Response<ProxyBody> {
    let mut response = Response::new(ProxyBody::text(value.to_string()));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Whole seconds, as OpenAI's clients expect them.
#[expect(
    clippy::cast_possible_truncation,
    reason = "Unix seconds of this age are far below 2^53"
)]
fn whole(seconds: f64) -> i64 {
    seconds as i64
}
