//! `POST /api/v1/reload`: reads the configuration anew and says what that
//! changed, or everything that is wrong with it.

use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use serde::Serialize;

use super::ApiState;
use super::envelope::{ApiError, success};
use super::query::Params;
use crate::control::{ReloadError, ReloadOrigin, ReloadProblem};
use crate::model::{Difference, ModelName};

/// Answers `POST /api/v1/reload`; with `dry_run` nothing changes.
pub(crate) async fn reload(State(state): State<ApiState>, uri: Uri) -> Result<Response, ApiError> {
    let mut params = Params::of(&uri)?;
    let dry_run = params.flag("dry_run", false)?;
    params.finish()?;
    let reloader = state.reloader.as_ref();
    let reloader = reloader.ok_or(ApiError::Reload(ReloadError::Impossible))?;
    let report = reloader.reload(ReloadOrigin::Api, dry_run).await;
    let report = report.map_err(ApiError::Reload)?;
    let message = match (report.difference.is_empty(), dry_run) {
        (true, _) => "nothing is different",
        (false, true) => "the configuration would be reloaded",
        (false, false) => "the configuration is reloaded",
    };
    Ok(success(&Reloaded {
        dry_run,
        message,
        config_hash: &report.hash,
        difference: DifferenceEntry::of(&report.difference),
        warnings: ProblemEntry::list(&report.warnings),
    }))
}

#[derive(Debug, Serialize)]
struct Reloaded<'a> {
    dry_run: bool,
    message: &'static str,
    config_hash: &'a str,
    #[serde(flatten)]
    difference: DifferenceEntry<'a>,
    warnings: Vec<ProblemEntry<'a>>,
}

/// What is different from before.
#[derive(Debug, Serialize)]
pub(crate) struct DifferenceEntry<'a> {
    added: Vec<&'a str>,
    removed: Vec<&'a str>,
    changed: Vec<ChangedEntry<'a>>,
    settings: &'a [&'static str],
    needs_restart: &'a [&'static str],
}

#[derive(Debug, Serialize)]
struct ChangedEntry<'a> {
    name: &'a str,
    keys: &'a [&'static str],
    takes: &'static str,
}

impl<'a> DifferenceEntry<'a> {
    /// Builds the entry of `difference`.
    pub(crate) fn of(difference: &'a Difference) -> Self {
        let names = |models: &'a [ModelName]| models.iter().map(ModelName::as_str).collect();
        let changed = difference.changed.iter();
        Self {
            added: names(&difference.added),
            removed: names(&difference.removed),
            changed: changed
                .map(|changed| ChangedEntry {
                    name: changed.model.as_str(),
                    keys: &changed.keys,
                    takes: changed.takes.as_str(),
                })
                .collect(),
            settings: &difference.settings,
            needs_restart: &difference.needs_restart,
        }
    }
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Serialize)]
pub(crate) struct ProblemEntry<'a> {
    severity: &'static str,
    key: &'a str,
    message: &'a str,
}

impl<'a> ProblemEntry<'a> {
    /// Builds the entries of `problems`.
    pub(crate) fn list(problems: &'a [ReloadProblem]) -> Vec<Self> {
        let each = problems.iter();
        each.map(|problem| Self {
            severity: if problem.is_warning {
                "warning"
            } else {
                "error"
            },
            key: &problem.key,
            message: &problem.text,
        })
        .collect()
    }
}
