//! Reads the configuration anew while residentd runs, one reload at a time:
//! all sources as at the start, checked as a whole. A problem anywhere changes
//! nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::warn;

use super::inputs::Defaults;
use super::listen::Server;
use crate::config::{self, Config, Problems, Severity, Sources, diff};
use crate::control::{
    Controller, Reconfiguration, Refusal, ReloadError, ReloadOrigin, ReloadProblem, ReloadReport,
    ReloadRequest,
};
use crate::model::{Bytes, Difference, ModelName, Takes};
use crate::policy::{Change, ModelChange, Setup};
use crate::proxy::ProxySettings;
use crate::store::{Fingerprints, Store};
use crate::telemetry;

/// `server.shutdown_grace` as it is now.
#[derive(Debug)]
pub(super) struct Grace(AtomicU64);

impl Grace {
    pub(super) fn new(grace: Duration) -> Self {
        let made = Self(AtomicU64::new(0));
        made.set(grace);
        made
    }

    fn set(&self, grace: Duration) {
        let millis = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.0.store(millis, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Returns what bounds requests.
pub(super) fn proxy_settings(config: &Config) -> ProxySettings {
    ProxySettings {
        max_body: config.server.max_body,
        model_prefix: config.server.model_prefix,
    }
}

/// The one who reloads.
#[derive(Debug)]
pub(super) struct Reloading {
    pub(super) sources: Arc<Sources>,
    /// What holds now.
    pub(super) running: Config,
    pub(super) defaults: Defaults,
    pub(super) store: Store,
    pub(super) controller: Controller,
    pub(super) server: Server,
    pub(super) grace: Arc<Grace>,
    /// What was wrong with the last one, until one was right.
    pub(super) refused: Option<Vec<ReloadProblem>>,
}

/// A configuration that was read and is valid.
struct Fresh {
    config: Config,
    difference: Difference,
    hash: String,
    fingerprints: Fingerprints,
    /// Sizes of the weight files of models that are added or changed.
    weights: BTreeMap<ModelName, Bytes>,
}

impl Reloading {
    /// Reloads whenever somebody asks, until nobody can ask any more.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<ReloadRequest>) {
        while let Some(request) = requests.recv().await {
            let done = self.reload(request.origin, request.dry_run).await;
            // Whoever asked may have left.
            let _ = request.reply.send(done);
        }
    }

    async fn reload(
        &mut self,
        origin: ReloadOrigin,
        dry_run: bool,
    ) -> Result<ReloadReport, ReloadError> {
        let (sources, running) = (Arc::clone(&self.sources), self.running.clone());
        // Reading files and looking at weights waits for the disk.
        let read = tokio::task::spawn_blocking(move || read(&sources, &running));
        // Only a panic of it could fail, which has been told.
        let read = read.await.map_err(|_| Refusal::Overloaded)?;
        let fresh = match read {
            Ok(fresh) => fresh,
            Err(problems) => return Err(self.refuse(origin, dry_run, &problems).await),
        };
        let report = ReloadReport {
            difference: fresh.difference.clone(),
            warnings: told(&fresh.config.warnings),
            hash: fresh.hash.clone(),
        };
        // A file that was only touched is nothing to tell of.
        let is_quiet =
            origin == ReloadOrigin::Watch && report.difference.is_empty() && self.refused.is_none();
        if dry_run || is_quiet {
            return Ok(report);
        }
        for problem in fresh.config.warnings.iter() {
            warn!(%problem, "configuration");
        }
        let config = fresh.config.clone();
        let new = self.reconfiguration(fresh, report.clone());
        self.controller.reload(origin, Ok(Box::new(new))).await?;
        self.take_in(config);
        Ok(report)
    }

    /// Tells what is wrong; what was told of a watched file is not told again.
    async fn refuse(
        &mut self,
        origin: ReloadOrigin,
        dry_run: bool,
        problems: &Problems,
    ) -> ReloadError {
        let problems = told(problems);
        let is_known = origin == ReloadOrigin::Watch && self.refused.as_deref() == Some(&*problems);
        if !dry_run && !is_known {
            let refused = self.controller.reload(origin, Err(problems.clone())).await;
            if let Err(refusal) = refused {
                return refusal.into();
            }
            self.refused = Some(problems.clone());
        }
        ReloadError::Invalid(problems)
    }

    fn reconfiguration(&self, fresh: Fresh, report: ReloadReport) -> Reconfiguration {
        let Fresh {
            config,
            difference,
            fingerprints,
            weights,
            hash: _,
        } = fresh;
        let (settings, limit_source) = self.defaults.settings(&config, &self.store);
        let models = config.models.iter().filter_map(|spec| {
            let changed = difference.changed.iter().find(|c| c.model == spec.name);
            let new_worker = match changed {
                Some(changed) => changed.takes == Takes::NewWorker,
                None if difference.added.contains(&spec.name) => true,
                None => return None,
            };
            let setup = Setup {
                spec: Arc::clone(spec),
                weights: weights.get(&spec.name).copied().unwrap_or_default(),
                footprint: self.store.footprint_under(&fingerprints, &spec.name),
            };
            Some(ModelChange { setup, new_worker })
        });
        let change = Change {
            settings,
            models: models.collect(),
            removed: difference.removed,
        };
        Reconfiguration {
            change,
            specs: config.models,
            limit_source,
            fingerprints,
            report,
        }
    }

    /// Has hold what neither policy nor routes know of.
    fn take_in(&mut self, config: Config) {
        self.grace.set(config.server.shutdown_grace);
        self.server.set(&config);
        if config.server.log_level != self.running.server.log_level
            && let Err(why) = telemetry::set_level(&config.server.log_level)
        {
            warn!(why, "the log level stays as it is");
        }
        self.running = config;
        self.refused = None;
    }
}

fn read(sources: &Sources, running: &Config) -> Result<Fresh, Problems> {
    let (config, difference) = diff::apply(running, config::load(sources)?);
    let is_new = |name: &ModelName| {
        let mut changed = difference.changed.iter();
        difference.added.contains(name) || changed.any(|changed| changed.model == *name)
    };
    let new = config.models.iter().filter(|spec| is_new(&spec.name));
    let size = |weights| config::weights::total(weights);
    Ok(Fresh {
        weights: new
            .map(|spec| (spec.name.clone(), size(&spec.weights)))
            .collect(),
        hash: diff::hash(&config),
        fingerprints: Fingerprints::of(&config.models),
        config,
        difference,
    })
}

fn told(problems: &Problems) -> Vec<ReloadProblem> {
    let each = problems.iter();
    each.map(|problem| ReloadProblem {
        is_warning: problem.severity() == Severity::Warning,
        key: problem.key().to_owned(),
        text: problem.to_string(),
    })
    .collect()
}
