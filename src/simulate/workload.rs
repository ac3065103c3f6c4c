//! What is played: models, and the requests for them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::machine::{Fault, Program};
use crate::clock::Timestamp;
use crate::model::{Bytes, DeviceRef, Domain, GpuRequest, ModelName, ModelSpec};

/// Which memory is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Host RAM: what fits may load side by side.
    Host,
    /// One GPU: one load or end at a time.
    Gpu,
}

impl Memory {
    pub(super) fn domain(self) -> Domain {
        match self {
            Self::Host => Domain::Host,
            Self::Gpu => Domain::Gpu(0),
        }
    }
}

/// One model of a workload.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// Its name, and what the configuration says of it if there is one.
    pub spec: Arc<ModelSpec>,
    /// Memory it holds while it is resident.
    pub size: Bytes,
    /// From spawn to ready.
    pub load: Duration,
}

impl ModelFacts {
    /// Returns a model of which nothing is known but these; requests wait for
    /// it as long as it takes.
    #[must_use]
    pub fn new(name: ModelName, size: Bytes, load: Duration) -> Self {
        let spec = ModelSpec {
            max_queue: usize::MAX,
            queue_timeout: FOR_EVER,
            ..ModelSpec::plain(name, Vec::new())
        };
        Self {
            spec: Arc::new(spec),
            size,
            load,
        }
    }

    /// Returns the model's name.
    #[must_use]
    pub fn name(&self) -> &ModelName {
        &self.spec.name
    }

    pub(super) fn program(&self, memory: Memory) -> Program {
        let mut spec = (*self.spec).clone();
        match memory {
            Memory::Host => {
                spec.memory = Some(self.size);
                spec.gpus = GpuRequest::None;
            }
            Memory::Gpu => {
                spec.memory = Some(Bytes::ZERO);
                spec.vram = Some(self.size);
                spec.gpus = GpuRequest::These(vec![DeviceRef::Index(0)]);
            }
        }
        spec.max_memory = None;
        // Here a load takes what it is known to take.
        spec.start_timeout = FOR_EVER;
        Program {
            spec: Arc::new(spec),
            holds: BTreeMap::from([(memory.domain(), self.size)]),
            load: self.load,
            stop: Duration::ZERO,
            fault: Fault::None,
        }
    }
}

/// Longer than any trace.
pub(super) const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// One request as it is written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// When it came.
    pub at: Timestamp,
    /// For which model.
    pub model: ModelName,
    /// How long it was inside the worker.
    pub duration: Duration,
}

/// One request of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it comes.
    pub at: Timestamp,
    /// For which model, by its place in the list of models.
    pub model: usize,
    /// How long it is inside the worker.
    pub duration: Duration,
}

/// Models and the requests for them, in the order of their times.
#[derive(Clone, Debug)]
pub struct Workload {
    models: Vec<ModelFacts>,
    requests: Vec<Request>,
}

/// Why requests and models are no workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// Some are asked for and not known.
    #[error(
        "no model is called {}, and {requests} of the requests ask for it; name it, with its size and load time, or leave them out",
        names.join(" or ")
    )]
    UnknownModels {
        /// How many requests ask for them.
        requests: usize,
        /// Their names, in order.
        names: Vec<String>,
    },
}

impl Workload {
    /// Puts requests and models together.
    ///
    /// # Errors
    /// The models that are asked for and are not there.
    pub fn new(models: Vec<ModelFacts>, demands: Vec<Demand>) -> Result<Self, WorkloadError> {
        let places: BTreeMap<&str, usize> = (models.iter().enumerate())
            .flat_map(|(place, facts)| {
                let names = facts.spec.aliases.iter().chain([facts.name()]);
                names.map(move |name| (name.as_str(), place))
            })
            .collect();
        let mut unknown = BTreeSet::new();
        let mut lost = 0;
        let mut requests = Vec::with_capacity(demands.len());
        for demand in demands {
            match places.get(demand.model.as_str()) {
                Some(model) => requests.push(Request {
                    at: demand.at,
                    model: *model,
                    duration: demand.duration,
                }),
                None => {
                    lost += 1;
                    unknown.insert(demand.model.to_string());
                }
            }
        }
        if !unknown.is_empty() {
            return Err(WorkloadError::UnknownModels {
                requests: lost,
                names: unknown.into_iter().collect(),
            });
        }
        requests.sort_by_key(|request| request.at);
        Ok(Self { models, requests })
    }

    /// Returns the models.
    #[must_use]
    pub fn models(&self) -> &[ModelFacts] {
        &self.models
    }

    /// Returns the requests, the earliest first.
    #[must_use]
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// Returns the memory of all models together.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.models.iter().map(|facts| facts.size).sum()
    }

    /// Returns the memory of the largest model.
    #[must_use]
    pub fn largest(&self) -> Bytes {
        let sizes = self.models.iter().map(|facts| facts.size);
        sizes.max().unwrap_or_default()
    }

    /// Returns the time from the first request to the last.
    #[must_use]
    pub fn span(&self) -> Duration {
        match (self.requests.first(), self.requests.last()) {
            (Some(first), Some(last)) => last.at.since(first.at),
            _ => Duration::ZERO,
        }
    }
}
