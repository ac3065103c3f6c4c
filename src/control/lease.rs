//! The fast path: which worker is ready, and a request's hold on it.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Signal;
use crate::clock::{Clock, Timestamp};
use crate::gate::{Gate, Left};
use crate::model::{ModelName, ModelSpec, Upstream, WorkerId};

/// Every model there is, by name and alias.
#[derive(Debug)]
pub struct Routes {
    models: Vec<Arc<ModelRoute>>,
    by_name: HashMap<ModelName, Arc<ModelRoute>>,
}

impl Routes {
    /// Builds the table. Aliases lead to their model.
    #[must_use]
    pub fn new(specs: impl IntoIterator<Item = Arc<ModelSpec>>) -> Self {
        let models: Vec<_> = specs
            .into_iter()
            .map(|spec| {
                Arc::new(ModelRoute {
                    spec,
                    ready: ArcSwapOption::empty(),
                })
            })
            .collect();
        let mut by_name = HashMap::new();
        for route in &models {
            for name in route.spec.aliases.iter().chain([&route.spec.name]) {
                by_name.insert(name.clone(), Arc::clone(route));
            }
        }
        Self { models, by_name }
    }

    /// Returns the model with this name or alias.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<ModelRoute>> {
        self.by_name.get(name)
    }

    /// Returns the models in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ModelRoute>> {
        self.models.iter()
    }

    /// Returns the one model there is, when there is exactly one.
    #[must_use]
    pub fn only(&self) -> Option<&Arc<ModelRoute>> {
        match self.models.as_slice() {
            [one] => Some(one),
            _ => None,
        }
    }
}

/// One model, and its ready worker if it has one.
#[derive(Debug)]
pub struct ModelRoute {
    spec: Arc<ModelSpec>,
    ready: ArcSwapOption<ReadyWorker>,
}

impl ModelRoute {
    /// Returns the model's own name.
    #[must_use]
    pub fn name(&self) -> &ModelName {
        &self.spec.name
    }

    /// Returns what the configuration says of it.
    #[must_use]
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    /// Returns its ready worker.
    #[must_use]
    pub fn ready(&self) -> Option<Arc<ReadyWorker>> {
        self.ready.load_full()
    }

    /// Publishes or withdraws the ready worker. The controller's only.
    pub fn set_ready(&self, worker: Option<Arc<ReadyWorker>>) {
        self.ready.store(worker);
    }

    /// Takes a lease when a worker is ready and its gate is open.
    #[must_use]
    pub fn try_lease(
        &self,
        clock: Clock,
        signals: &mpsc::UnboundedSender<Signal>,
    ) -> Option<Lease> {
        let worker = self.ready.load_full()?;
        Lease::enter(worker, clock, signals.clone())
    }
}

/// A worker that answers requests.
#[derive(Debug)]
pub struct ReadyWorker {
    /// Which life of which model.
    pub id: WorkerId,
    /// What the configuration says of its model.
    pub spec: Arc<ModelSpec>,
    /// Where it answers.
    pub upstream: Upstream,
    /// Admits requests.
    pub gate: Gate,
    /// Cancelled when the worker is about to end or has ended: whoever keeps
    /// connections to it closes them now.
    pub closing: CancellationToken,
    /// Told apart from every other worker of this process, for tables of
    /// connections.
    pub serial: u64,
    /// When it became ready.
    pub since: Timestamp,
}

/// One request's hold on a ready worker. Dropping it gives the hold back.
#[derive(Debug)]
pub struct Lease {
    worker: Arc<ReadyWorker>,
    clock: Clock,
    signals: mpsc::UnboundedSender<Signal>,
}

impl Lease {
    /// Enters the worker's gate; `None` when it is closed.
    #[must_use]
    pub fn enter(
        worker: Arc<ReadyWorker>,
        clock: Clock,
        signals: mpsc::UnboundedSender<Signal>,
    ) -> Option<Self> {
        worker.gate.try_enter(clock.now()).then(|| Self {
            worker,
            clock,
            signals,
        })
    }

    /// Returns the worker that is held.
    #[must_use]
    pub fn worker(&self) -> &Arc<ReadyWorker> {
        &self.worker
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.worker.gate.leave(self.clock.now()) == Left::LastOfWatched {
            // A closed channel means that the controller has gone already.
            let _ = self.signals.send(Signal::Idle {
                worker: self.worker.id.clone(),
            });
        }
    }
}
