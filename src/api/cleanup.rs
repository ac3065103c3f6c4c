//! `POST /api/v1/memory/cleanup`: what to unload, as a JSON body, a query or
//! not at all, and what came back.

use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use serde_json::{Map, Value};

use super::ApiState;
use super::envelope::{ApiError, success};
use super::memory::join;
use super::query::{Params, bad_value};
use crate::control::{CleanupReport, CleanupRequest, Skipped};
use crate::model::{Bytes, ModelName};

/// The largest body that is read: room for the names of thousands of models.
const MAX_BODY: usize = 1 << 20;
/// The longest anyone may wait for bytes.
const MAX_TIMEOUT: f64 = 3600.0;

/// Answers `POST /cleanup`.
pub(crate) async fn cleanup(
    State(state): State<ApiState>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let mut wish = Wish::from_query(Params::of(&parts.uri)?)?;
    let body = to_bytes(body, MAX_BODY)
        .await
        .map_err(|_| ApiError::BodyTooLarge(Bytes::mib(1)))?;
    wish.add_body(&body)?;
    let request = wish.into_request(|name| {
        let route = state.controller.routes().get(name);
        route.map(|route| route.name().clone())
    })?;
    let dry_run = request.dry_run;
    let report = state.controller.cleanup(request).await?;
    Ok(success(&Cleaned::of(&report, dry_run)))
}

/// What is asked for, as given: nothing resolved, nothing assumed.
#[derive(Debug, Default, PartialEq)]
struct Wish {
    target_bytes: Option<u64>,
    models: Option<Vec<String>>,
    all: Option<bool>,
    force: Option<bool>,
    timeout_seconds: Option<f64>,
    dry_run: Option<bool>,
}

impl Wish {
    fn from_query(mut params: Params) -> Result<Self, ApiError> {
        let flag = |params: &mut Params, key| match params.flag(key, false) {
            Ok(false) => Ok(None),
            Ok(true) => Ok(Some(true)),
            Err(error) => Err(error),
        };
        let wish = Self {
            target_bytes: params.parsed("target_bytes", "a number of bytes")?,
            models: params.text("models").map(|list| split_names(&list)),
            all: flag(&mut params, "all")?,
            force: flag(&mut params, "force")?,
            timeout_seconds: params.parsed("timeout_seconds", "a number of seconds")?,
            dry_run: flag(&mut params, "dry_run")?,
        };
        params.finish()?;
        Ok(wish)
    }

    fn add_body(&mut self, body: &[u8]) -> Result<(), ApiError> {
        if body.trim_ascii().is_empty() {
            return Ok(());
        }
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| ApiError::BadRequest(format!("the body is not JSON: {error}")))?;
        let fields: Map<String, Value> = match value {
            Value::Object(fields) => fields,
            Value::Null => return Ok(()),
            _ => {
                return Err(ApiError::BadRequest(
                    "the body must be a JSON object".to_owned(),
                ));
            }
        };
        for (key, value) in fields {
            self.add_field(&key, value)?;
        }
        Ok(())
    }

    fn add_field(&mut self, key: &str, value: Value) -> Result<(), ApiError> {
        if value.is_null() {
            return Ok(());
        }
        match key {
            "target_bytes" => set(&mut self.target_bytes, key, "a number of bytes", value),
            "models" => set(&mut self.models, key, "a list of model names", value),
            "all" => set(&mut self.all, key, "true or false", value),
            "force" => set(&mut self.force, key, "true or false", value),
            "timeout_seconds" => set(&mut self.timeout_seconds, key, "a number of seconds", value),
            "dry_run" => set(&mut self.dry_run, key, "true or false", value),
            _ => Err(ApiError::BadRequest(format!("unknown field {key}"))),
        }
    }

    /// Turns the wish into the controller's terms; `resolve` finds a model by
    /// its name or alias.
    fn into_request(
        self,
        resolve: impl Fn(&str) -> Option<ModelName>,
    ) -> Result<CleanupRequest, ApiError> {
        let all = self.all.unwrap_or(false);
        if all && self.models.is_some() {
            return Err(ApiError::BadRequest(
                "all and models exclude each other".to_owned(),
            ));
        }
        let find = |name: String| resolve(&name).ok_or(ApiError::UnknownModel(name));
        let models = self
            .models
            .map(|names| names.into_iter().map(find).collect::<Result<Vec<_>, _>>())
            .transpose()?;
        Ok(CleanupRequest {
            target: self.target_bytes.map(Bytes),
            models,
            all,
            force: self.force.unwrap_or(false),
            timeout: self.timeout_seconds.map(timeout).transpose()?,
            dry_run: self.dry_run.unwrap_or(false),
        })
    }
}

fn set<T: serde::de::DeserializeOwned>(
    slot: &mut Option<T>,
    key: &str,
    expected: &str,
    value: Value,
) -> Result<(), ApiError> {
    if slot.is_some() {
        return Err(ApiError::BadRequest(format!("{key} is given twice")));
    }
    let shown = value.to_string();
    *slot = Some(serde_json::from_value(value).map_err(|_| bad_value(key, &shown, expected))?);
    Ok(())
}

fn timeout(seconds: f64) -> Result<Duration, ApiError> {
    if (0.0..=MAX_TIMEOUT).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        let expected = format!("0 to {MAX_TIMEOUT} seconds");
        Err(bad_value("timeout_seconds", &seconds, &expected))
    }
}

fn split_names(list: &str) -> Vec<String> {
    let names = list.split(',').map(str::trim);
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[derive(Debug, Serialize)]
struct Cleaned<'a> {
    unloaded_models: Vec<&'a str>,
    message: String,
    freed_bytes: u64,
    freed_vram_bytes: u64,
    formatted_freed: String,
    skipped: Vec<SkippedEntry<'a>>,
    shortfall_bytes: u64,
    dry_run: bool,
    timed_out: bool,
}

impl<'a> Cleaned<'a> {
    fn of(report: &'a CleanupReport, dry_run: bool) -> Self {
        Self {
            unloaded_models: report.unloaded.iter().map(ModelName::as_str).collect(),
            message: message(report, dry_run),
            freed_bytes: report.freed.get(),
            freed_vram_bytes: report.freed_vram.get(),
            formatted_freed: report.freed.formatted(),
            skipped: report.skipped.iter().map(SkippedEntry::of).collect(),
            shortfall_bytes: report.shortfall.get(),
            dry_run,
            timed_out: report.timed_out,
        }
    }
}

#[derive(Debug, Serialize)]
struct SkippedEntry<'a> {
    name: &'a str,
    why: &'static str,
}

impl<'a> SkippedEntry<'a> {
    fn of(skipped: &'a Skipped) -> Self {
        Self {
            name: skipped.model.as_str(),
            why: skipped.why.as_str(),
        }
    }
}

fn message(report: &CleanupReport, dry_run: bool) -> String {
    if report.unloaded.is_empty() {
        return "nothing to unload".to_owned();
    }
    let names = join(&report.unloaded);
    let freed = report.freed.formatted();
    if dry_run {
        return format!("would unload {names}: {freed} expected back");
    }
    let mut text = format!("unloaded {names}: {freed} measured back");
    if report.timed_out {
        text.push_str(", more outstanding at the deadline");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(query: &str, body: &str) -> Result<Wish, String> {
        let uri = format!("/x?{query}").parse().expect("a valid address");
        let mut wish = Params::of(&uri)
            .and_then(Wish::from_query)
            .map_err(|error| error.to_string())?;
        wish.add_body(body.as_bytes())
            .map_err(|error| error.to_string())?;
        Ok(wish)
    }

    fn request(wish: Wish) -> Result<CleanupRequest, String> {
        wish.into_request(|name| (name != "gone").then(|| ModelName::new(name).expect("valid")))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_given_asks_for_nothing_special() {
        assert_eq!(wish("", ""), Ok(Wish::default()));
        assert_eq!(wish("", " null "), Ok(Wish::default()));
        assert_eq!(wish("", "{}"), Ok(Wish::default()));
        assert_eq!(wish("", r#"{"all": null}"#), Ok(Wish::default()));
    }

    #[test]
    fn query_and_body_say_the_same() {
        let body = r#"{"target_bytes": 5, "models": ["a", "b/c"], "force": true, "timeout_seconds": 1.5, "dry_run": true}"#;
        let query = "target_bytes=5&models=a,%20b/c&force=true&timeout_seconds=1.5&dry_run=1";
        assert_eq!(wish("", body), wish(query, ""));
        let request = request(wish("", body).expect("parses")).expect("valid");
        assert_eq!(request.target, Some(Bytes(5)));
        assert_eq!(request.models.map(|names| names.len()), Some(2));
        assert_eq!(request.timeout, Some(Duration::from_millis(1500)));
        assert!(request.force && request.dry_run && !request.all);
    }

    #[test]
    fn what_is_wrong_names_its_field() {
        for (query, body, message) in [
            ("", r#"{"frobnicate": 1}"#, "unknown field frobnicate"),
            ("frobnicate=1", "", "unknown parameter frobnicate"),
            (
                "",
                r#"{"target_bytes": -1}"#,
                "target_bytes must be a number of bytes, not -1",
            ),
            (
                "",
                r#"{"models": "a"}"#,
                "models must be a list of model names, not \"a\"",
            ),
            (
                "",
                r#"{"all": "yes"}"#,
                "all must be true or false, not \"yes\"",
            ),
            ("all=true", r#"{"all": true}"#, "all is given twice"),
            ("", "[1]", "the body must be a JSON object"),
        ] {
            assert_eq!(wish(query, body), Err(message.to_owned()), "{query} {body}");
        }
        let broken = wish("", "{").expect_err("not JSON");
        assert!(broken.starts_with("the body is not JSON: "), "{broken}");
    }

    #[test]
    fn what_contradicts_itself_or_does_not_exist_is_refused() {
        let both = wish("", r#"{"all": true, "models": []}"#).expect("parses");
        assert_eq!(
            request(both).expect_err("contradiction"),
            "all and models exclude each other"
        );
        let gone = wish("models=gone", "").expect("parses");
        assert_eq!(
            request(gone).expect_err("unknown"),
            "model gone is not configured"
        );
        for bad in ["-1", "nan", "inf", "1e9"] {
            let late = wish(&format!("timeout_seconds={bad}"), "").expect("parses");
            assert!(request(late).is_err(), "{bad}");
        }
    }
}
