//! The Open Inference Protocol (version 2) over REST: what residentd answers
//! itself. Inference and a model's metadata are the worker's, and belong to
//! the proxy, as does a model's readiness, which shares their path.

use axum::Json;
use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};

use super::envelope::ApiError;
use super::repository::{self, Wish};
use super::{ApiState, probes};
use crate::model::Bytes;

/// Where the names of models begin that are loaded and unloaded.
const PREFIX: &str = "/v2/repository/models/";
/// The largest body that is read.
const MAX_BODY: Bytes = Bytes::mib(1);
/// What is there beside the protocol's core.
pub(super) const EXTENSIONS: [&str; 1] = ["model_repository"];

/// Answers `GET /v2`.
pub(crate) async fn metadata() -> Json<Value> {
    Json(json!({
        "name": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": EXTENSIONS,
    }))
}

/// Answers `GET /v2/health/live`: this answer is the proof.
pub(crate) async fn live() -> Json<Value> {
    Json(json!({"live": true}))
}

/// Answers `GET /v2/health/ready`: requests are welcome. Models are loaded when
/// they are asked for, so none need be.
pub(crate) async fn ready(State(state): State<ApiState>) -> Response {
    let ready = probes::is_ready(&state);
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(json!({"ready": ready}))).into_response()
}

/// Answers `POST /v2/repository/index`.
pub(crate) async fn index(
    State(state): State<ApiState>,
    request: Request,
) -> Result<Response, ApiError> {
    let only_ready = match object(request).await?.get("ready") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(ready)) => *ready,
        Some(_) => return Err(ApiError::BadRequest("ready is not true or false".into())),
    };
    Ok(Json(repository::index(&state, only_ready)).into_response())
}

/// Answers `POST /v2/repository/models/{model}/load` and `…/unload`.
pub(crate) async fn wish(
    State(state): State<ApiState>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = request.uri().path().to_owned();
    let rest = path.strip_prefix(PREFIX).unwrap_or_default();
    let (name, wish) = match rest.rsplit_once('/') {
        Some((name, "load")) => (name, Wish::Load),
        Some((name, "unload")) => (name, Wish::Unload),
        _ => return Err(ApiError::NotFound(path)),
    };
    let name = percent_decode_str(name).decode_utf8_lossy();
    let asked = object(request).await?;
    let parameters = match asked.get("parameters") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(parameters)) => parameters.clone(),
        Some(_) => return Err(ApiError::BadRequest("parameters is not an object".into())),
    };
    let names = parameters.keys().map(String::as_str);
    repository::carry_out(&state, &name, wish, names).await?;
    Ok(Json(json!({})).into_response())
}

/// Reads a body that may be missing.
async fn object(request: Request) -> Result<Map<String, Value>, ApiError> {
    let most = usize::try_from(MAX_BODY.get()).unwrap_or(usize::MAX);
    let body = to_bytes(request.into_body(), most).await;
    let body = body.map_err(|_| ApiError::BodyTooLarge(MAX_BODY))?;
    if body.trim_ascii().is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_slice(&body) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(ApiError::BadRequest(
            "the body must be a JSON object".into(),
        )),
        Err(error) => Err(ApiError::BadRequest(format!(
            "the body is not JSON: {error}"
        ))),
    }
}
