//! The fast path: which worker is ready, and a request's hold on it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Signal, Traffic};
use crate::clock::{Clock, Timestamp};
use crate::gate::{Gate, Left, Pulse};
use crate::model::{ModelName, ModelSpec, Upstream, WorkerId};
use crate::procfs::ProcessKey;
use crate::worker::Opened;

/// Every model there is, by name and alias. A reload replaces the whole table
/// at once, so no reader sees half of it.
#[derive(Debug)]
pub struct Routes {
    table: ArcSwap<Table>,
    overloads: AtomicU64,
    /// Of requests for no model that there is.
    stray: Traffic,
}

#[derive(Debug)]
struct Table {
    models: Vec<Arc<ModelRoute>>,
    by_name: HashMap<ModelName, Arc<ModelRoute>>,
}

impl Table {
    fn new(models: Vec<Arc<ModelRoute>>) -> Self {
        let mut by_name = HashMap::new();
        for route in &models {
            for name in route.spec.aliases.iter().chain([&route.spec.name]) {
                by_name.insert(name.clone(), Arc::clone(route));
            }
        }
        Self { models, by_name }
    }
}

impl Routes {
    /// Builds the table. Aliases lead to their model.
    #[must_use]
    pub fn new(specs: impl IntoIterator<Item = Arc<ModelSpec>>) -> Self {
        let models = specs.into_iter().map(ModelRoute::new).map(Arc::new);
        Self {
            table: ArcSwap::from_pointee(Table::new(models.collect())),
            overloads: AtomicU64::new(0),
            stray: Traffic::default(),
        }
    }

    /// Puts another table in the place of this one. A model that both have
    /// keeps its worker, also for requests that hold its old route. The
    /// controller's only.
    pub(super) fn replace(&self, specs: impl IntoIterator<Item = Arc<ModelSpec>>) {
        let old = self.table.load_full();
        let route = |spec: Arc<ModelSpec>| {
            let before = old.models.iter().find(|route| route.spec.name == spec.name);
            match before {
                Some(route) if Arc::ptr_eq(&route.spec, &spec) => Arc::clone(route),
                Some(route) => Arc::new(ModelRoute {
                    spec,
                    ready: Arc::clone(&route.ready),
                    traffic: Arc::clone(&route.traffic),
                }),
                None => Arc::new(ModelRoute::new(spec)),
            }
        };
        let models = specs.into_iter().map(route).collect();
        self.table.store(Arc::new(Table::new(models)));
    }

    /// Counts a request that the controller could not even hear.
    pub(super) fn count_overload(&self) {
        self.overloads.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns how many there were.
    pub(super) fn overloads(&self) -> u64 {
        self.overloads.load(Ordering::Relaxed)
    }

    /// Returns what became of requests that named no model that there is.
    #[must_use]
    pub const fn stray(&self) -> &Traffic {
        &self.stray
    }

    /// Returns the model with this name or alias.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<ModelRoute>> {
        self.table.load().by_name.get(name).map(Arc::clone)
    }

    /// Returns the models in the order of their names.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<ModelRoute>> {
        self.table.load().models.clone()
    }

    /// Has connections to the residentd that has taken over closed: nothing more goes
    /// there from here.
    pub fn leave_heir(&self) {
        let ready = self.all().into_iter().filter_map(|route| route.ready());
        for heir in ready.filter(|ready| ready.is_heir) {
            heir.closing.cancel();
        }
    }

    /// Returns the one model there is, when there is exactly one.
    #[must_use]
    pub fn only(&self) -> Option<Arc<ModelRoute>> {
        match self.table.load().models.as_slice() {
            [one] => Some(Arc::clone(one)),
            _ => None,
        }
    }
}

/// One model, and its ready worker if it has one.
#[derive(Debug)]
pub struct ModelRoute {
    spec: Arc<ModelSpec>,
    /// Shared with the routes that this one replaced and that replace it.
    ready: Arc<ArcSwapOption<ReadyWorker>>,
    /// Likewise.
    traffic: Arc<Traffic>,
}

impl ModelRoute {
    fn new(spec: Arc<ModelSpec>) -> Self {
        Self {
            spec,
            ready: Arc::default(),
            traffic: Arc::default(),
        }
    }

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

    /// Returns the counts of its requests.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
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
    /// Where it answers.
    pub upstream: Upstream,
    /// Where it takes gRPC, when that is elsewhere.
    pub grpc_upstream: Option<Upstream>,
    /// The connection on which it first answered, for the first request.
    pub opened: Opened,
    /// Admits requests.
    pub gate: Gate,
    /// What requests hear from it; watched by the worker's task.
    pub pulse: Arc<Pulse>,
    /// Cancelled when the worker is about to end or has ended: whoever keeps
    /// connections to it closes them now.
    pub closing: CancellationToken,
    /// Told apart from every other worker of this process, for tables of
    /// connections.
    pub serial: u64,
    /// When it became ready.
    pub since: Timestamp,
    /// From its spawn to that; absent when it was taken back.
    pub loaded_in: Option<Duration>,
    /// It is no worker but the residentd that has taken over: requests go there
    /// as they came.
    pub is_heir: bool,
    /// The process that was spawned, where it is known.
    pub leader: Option<ProcessKey>,
}

impl ReadyWorker {
    /// Returns where it is asked: calls of gRPC may go elsewhere.
    #[must_use]
    pub fn address(&self, calls: bool) -> &Upstream {
        let own = self.grpc_upstream.as_ref().filter(|_| calls);
        own.unwrap_or(&self.upstream)
    }

    /// Returns whether its process runs still. Asked after a connection was
    /// made: until its end is noticed, which takes milliseconds, somebody else
    /// may listen on its port already.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.leader.is_none_or(ProcessKey::runs)
    }
}

/// One request's hold on a ready worker. Dropping it gives the hold back.
#[derive(Debug)]
pub struct Lease {
    worker: Arc<ReadyWorker>,
    clock: Clock,
    signals: mpsc::UnboundedSender<Signal>,
}

impl Lease {
    /// Enters the worker's gate; `None` when it is closed, full, or held for
    /// those who wait.
    #[must_use]
    pub fn enter(
        worker: Arc<ReadyWorker>,
        clock: Clock,
        signals: mpsc::UnboundedSender<Signal>,
    ) -> Option<Self> {
        let entered = worker.gate.try_enter(clock.now());
        Self::of(entered, worker, clock, signals)
    }

    /// Enters the worker's gate as one whom the controller lets in; `None` when
    /// it is closed or full.
    #[must_use]
    pub(super) fn enter_held(
        worker: Arc<ReadyWorker>,
        clock: Clock,
        signals: mpsc::UnboundedSender<Signal>,
    ) -> Option<Self> {
        let entered = worker.gate.try_enter_held(clock.now());
        Self::of(entered, worker, clock, signals)
    }

    fn of(
        entered: bool,
        worker: Arc<ReadyWorker>,
        clock: Clock,
        signals: mpsc::UnboundedSender<Signal>,
    ) -> Option<Self> {
        // Not made unless entered: dropping one leaves the gate.
        entered.then(|| Self {
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
        if self.worker.gate.leave(self.clock.now()) == Left::Heard {
            // A closed channel means that the controller has gone already.
            let _ = self.signals.send(Signal::Idle {
                worker: self.worker.id.clone(),
            });
        }
    }
}
