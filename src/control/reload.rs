//! Reload: who asks for one and what it comes to, and how the controller takes
//! a changed configuration in.
//!
//! ```text
//! API, signal, watched file ── Reloader ──► reads and checks all sources, one
//!                                           reload at a time (in `app`)
//!                                              │ Command::Reload
//!                                              ▼
//!                          controller: gates, policy, routes, in one go
//! ```

use std::fmt;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::command::Reply;
use super::task::Task;
use super::{Counters, LimitSource, Refusal, What};
use crate::clock::Timestamp;
use crate::model::{Difference, ModelName, ModelSpec};
use crate::policy::{Change, Event, History};
use crate::store::Fingerprints;

/// Reloads that wait for the one that is made. One more is refused: each of
/// those that wait will read what is there then.
const WAITING: usize = 8;

/// Who asks for a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadOrigin {
    /// `POST /api/v1/reload`.
    Api,
    /// SIGHUP.
    Signal,
    /// A file that changed.
    Watch,
}

impl ReloadOrigin {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Signal => "signal",
            Self::Watch => "watch",
        }
    }
}

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReloadProblem {
    /// It only is a warning.
    pub is_warning: bool,
    /// The key path, variable, flag or file that is wrong.
    pub key: String,
    /// What is wrong and how to mend it, with the key and the place.
    pub text: String,
}

impl fmt::Display for ReloadProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a reload changed, or would change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReloadReport {
    /// What is different from before.
    pub difference: Difference,
    /// What may not work later.
    pub warnings: Vec<ReloadProblem>,
    /// Tells this configuration from others.
    pub hash: String,
}

/// Why a reload changed nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReloadError {
    /// The configuration is not valid; all that is wrong with it, and warnings.
    #[error("the configuration is not valid: {} is wrong with it and nothing was changed", things(.0))]
    Invalid(Vec<ReloadProblem>),
    /// The controller did not take it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This residentd cannot: it was not started from files.
    #[error("this residentd has no configuration to read anew")]
    Impossible,
}

fn things(problems: &[ReloadProblem]) -> String {
    match problems.iter().filter(|p| !p.is_warning).count() {
        1 => "1 thing".to_owned(),
        count => format!("{count} things"),
    }
}

/// A wish to have the configuration read anew.
#[derive(Debug)]
pub struct ReloadRequest {
    /// Who asks.
    pub origin: ReloadOrigin,
    /// Only say what would change.
    pub dry_run: bool,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<ReloadReport, ReloadError>>,
}

/// Everyone's way to a reload. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reloader(mpsc::Sender<ReloadRequest>);

impl Reloader {
    /// Returns a handle, and where its requests arrive.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<ReloadRequest>) {
        let (requests, arrivals) = mpsc::channel(WAITING);
        (Self(requests), arrivals)
    }

    /// Has the configuration read anew and taken in, and waits for that.
    ///
    /// # Errors
    /// Why nothing changed.
    pub async fn reload(
        &self,
        origin: ReloadOrigin,
        dry_run: bool,
    ) -> Result<ReloadReport, ReloadError> {
        let (reply, answer) = oneshot::channel();
        let request = ReloadRequest {
            origin,
            dry_run,
            reply,
        };
        self.0.try_send(request).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ReloadError::Refused(Refusal::Overloaded),
            mpsc::error::TrySendError::Closed(_) => ReloadError::Impossible,
        })?;
        answer
            .await
            .unwrap_or(Err(ReloadError::Refused(Refusal::ShuttingDown)))
    }
}

/// A valid configuration, as the controller takes it in.
#[derive(Clone, Debug)]
pub struct Reconfiguration {
    /// What it means for the policy.
    pub change: Change,
    /// Every model there is from now on.
    pub specs: Vec<Arc<ModelSpec>>,
    /// Who sets the host's limit, unless an operator did.
    pub limit_source: LimitSource,
    /// By which learned footprints are kept.
    pub fingerprints: Fingerprints,
    /// What it changes.
    pub report: ReloadReport,
}

/// What became of reloads.
#[derive(Clone, Debug, Default)]
pub struct Reloads {
    /// Those that were taken in.
    pub applied: u64,
    /// Those that were not, since something was wrong.
    pub refused: u64,
    /// When the last one was taken in.
    pub last_applied: Option<Timestamp>,
    /// The last one was not taken in.
    pub last_refused: bool,
    /// Tells the configuration that holds from others.
    pub hash: String,
}

impl Task {
    /// Takes in a configuration that was read anew, or notes that it could not
    /// be.
    pub(super) fn reload(
        &mut self,
        origin: ReloadOrigin,
        outcome: Result<Box<Reconfiguration>, Vec<ReloadProblem>>,
        reply: Reply<()>,
    ) {
        let done = if self.policy.is_draining() {
            Err(Refusal::ShuttingDown)
        } else {
            match outcome {
                Ok(new) => self.reconfigure(origin, *new),
                Err(problems) => {
                    self.counters.config.refused += 1;
                    self.counters.config.last_refused = true;
                    let problems = problems.into();
                    self.tell_of(None, What::ReloadRefused { origin, problems });
                }
            }
            Ok(())
        };
        self.answers.put(reply, done);
    }

    fn reconfigure(&mut self, origin: ReloadOrigin, new: Reconfiguration) {
        let config = &mut self.counters.config;
        config.applied += 1;
        config.last_refused = false;
        config.last_applied = Some(self.clock.now());
        config.hash.clone_from(&new.report.hash);
        let report = Arc::new(new.report);
        self.tell_of(None, What::Reload { origin, report });
        if self.limit_source != LimitSource::Api {
            self.limit_source = new.limit_source;
        }
        self.auto_cleanup = new.change.settings.auto_cleanup;
        self.store.now_of(new.fingerprints);
        self.widen_gates(&new.change);
        // Before the routes: a worker that has to go is withdrawn from the one
        // it has, and who still comes by that one is answered by the policy.
        self.feed(Event::Configure(Box::new(new.change)));
        self.files.look_at(new.specs.iter());
        self.routes.replace(new.specs);
    }

    /// Sets how many requests fit into workers that stay, before those that
    /// wait for a place are let in.
    fn widen_gates(&self, change: &Change) {
        for (id, live) in &self.workers {
            let Some(ready) = &live.ready else { continue };
            let mut changed = change.models.iter();
            let changed = changed.find(|c| c.setup.spec.name == id.model && !c.new_worker);
            if let Some(changed) = changed {
                ready.gate.set_capacity(changed.setup.spec.concurrency);
            }
        }
    }

    /// Keeps the counts of a model that is no more.
    pub(super) fn forget_model(&mut self, model: &ModelName, history: &History) {
        self.files.call_off(model);
        self.counters.add(history);
        let record = self.records.remove(model).unwrap_or_default();
        self.counters.admitted += record.accesses;
    }
}

impl Counters {
    /// Adds what happened to one model.
    pub(super) fn add(&mut self, history: &History) {
        self.loads += history.loads;
        self.reloads += history.reloads;
        self.crashes += history.crashes;
        for (ailment, count) in &history.unhealthy {
            *self.unhealthy.entry(ailment).or_default() += count;
        }
        for (reason, count) in &history.evictions {
            *self.evictions.entry(reason).or_default() += count;
        }
        self.unparks += history.unparks;
        for (reason, count) in &history.parks {
            *self.parks.entry(reason).or_default() += count;
        }
    }
}
