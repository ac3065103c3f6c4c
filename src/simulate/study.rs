//! One workload under one policy and limit, and the figures of it.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::machine::{Fault, Machine, Outcome, Program, Wish};
use super::offline;
use crate::clock::Timestamp;
use crate::model::{Bytes, DeviceRef, Domain, GpuRequest, ModelName, ModelSpec};
use crate::policy::{Settings, Threshold};

/// Which policy chooses the victims.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Eviction {
    /// Whoever was used the longest time ago.
    #[default]
    Lru,
}

/// A policy that is none, or that this build has not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownPolicy {
    /// A name of the documentation that is not built in.
    #[error("the policy {0} is not supported by this build; it has lru")]
    NotBuiltIn(String),
    /// No such policy.
    #[error("{0:?} is no policy; write lru")]
    NoSuch(String),
}

impl Eviction {
    /// Returns the word used in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lru => "lru",
        }
    }
}

impl FromStr for Eviction {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        match text {
            "lru" => Ok(Self::Lru),
            "cost" => Err(UnknownPolicy::NotBuiltIn(text.to_owned())),
            _ => Err(UnknownPolicy::NoSuch(text.to_owned())),
        }
    }
}

/// How time passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Requests and loads take their time; busy models are no victims.
    #[default]
    Timed,
    /// One request after another, each over before the next: every resident
    /// model may be a victim, and only the sum of load times counts.
    Serial,
}

impl Mode {
    /// Returns the word used in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Timed => "timed",
            Self::Serial => "serial",
        }
    }
}

/// Which memory is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Host RAM: what fits may load side by side.
    Host,
    /// One GPU: one load or end at a time.
    Gpu,
}

impl Memory {
    fn domain(self) -> Domain {
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

    fn program(&self, memory: Memory, mode: Mode) -> Program {
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
            load: match mode {
                Mode::Timed => self.load,
                Mode::Serial => Duration::ZERO,
            },
            stop: Duration::ZERO,
            fault: Fault::None,
        }
    }
}

/// Longer than any trace.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

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

/// How long requests waited for their model, in seconds; those that did not
/// wait count with zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Waits {
    /// On average.
    pub mean: f64,
    /// 99 of 100 waited no longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Waits {
    fn of(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        let Some(max) = all.last() else {
            return Self::default();
        };
        let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
        let sum: f64 = all.iter().map(Duration::as_secs_f64).sum();
        let rank = (all.len() * 99).div_ceil(100).max(1);
        Self {
            mean: sum / f64::from(count),
            p99: all[rank - 1].as_secs_f64(),
            max: max.as_secs_f64(),
        }
    }
}

/// What one run came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Who chose the victims.
    pub policy: Eviction,
    /// The limit on memory.
    pub limit: Bytes,
    /// How time passed.
    pub mode: Mode,
    /// How many requests came.
    pub requests: usize,
    /// How many of them were turned away: too large a model, or too long a wait.
    pub refused: usize,
    /// How many found their model ready.
    pub hits: usize,
    /// How often a model was loaded.
    pub loads: u64,
    /// How long all loads took together, in seconds.
    pub load_seconds: f64,
    /// How long requests waited that were answered.
    pub waits: Waits,
    /// What a plan that knows the future would need.
    pub offline: offline::Plan,
}

impl Figures {
    /// Returns the share of requests that found their model ready.
    #[must_use]
    pub fn hit_ratio(&self) -> f64 {
        share(self.hits, self.requests)
    }

    /// Returns load seconds as a multiple of the offline plan's; one when
    /// neither loads anything.
    #[must_use]
    pub fn gap(&self) -> f64 {
        if self.offline.load_seconds > 0.0 {
            return self.load_seconds / self.offline.load_seconds;
        }
        1.0
    }
}

/// Returns `part` of `whole` as a fraction; zero of nothing.
#[must_use]
pub(super) fn share(part: usize, whole: usize) -> f64 {
    let float = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    match whole {
        0 => 0.0,
        _ => float(part) / float(whole),
    }
}

/// Plays a workload under a policy and a limit.
#[must_use]
pub fn run(
    workload: &Workload,
    memory: Memory,
    mode: Mode,
    policy: Eviction,
    limit: Bytes,
) -> Figures {
    let domain = memory.domain();
    // Only the memory that is asked about is short.
    let there = BTreeMap::from([(Domain::Host, Bytes::MAX), (domain, limit)]);
    let programs = workload
        .models
        .iter()
        .map(|facts| facts.program(memory, mode));
    let mut machine = Machine::new(settings(policy, limit), there, programs);
    let mut wishes = Vec::with_capacity(workload.requests.len());
    for request in &workload.requests {
        machine.run_until(request.at);
        let spec = &workload.models[request.model].spec;
        let duration = match mode {
            Mode::Timed => request.duration,
            Mode::Serial => Duration::ZERO,
        };
        wishes.push(machine.request(&spec.name, duration, spec.queue_timeout));
        if mode == Mode::Serial {
            machine.run_until(request.at);
        }
    }
    machine.run_out();
    let mut figures = tally(workload, mode, &machine, &wishes);
    figures.policy = policy;
    figures.limit = limit;
    figures.offline = offline::plan(workload, limit);
    figures
}

/// What the policy is told: the limit, and nothing else that would make anyone
/// go. The one place that knows how a policy is chosen.
fn settings(policy: Eviction, limit: Bytes) -> Settings {
    match policy {
        // The only one there is, so nothing has to be said.
        Eviction::Lru => {}
    }
    Settings {
        limit,
        reserve: Bytes::ZERO,
        gpu_limits: BTreeMap::new(),
        soft: Threshold::Size(Bytes::ZERO),
        hard: Threshold::Size(Bytes::ZERO),
        auto_cleanup: true,
        emergency: true,
        drain_timeout: FOR_EVER,
    }
}

fn tally(workload: &Workload, mode: Mode, machine: &Machine, wishes: &[Wish]) -> Figures {
    let mut waits = Vec::with_capacity(wishes.len());
    let (mut hits, mut refused) = (0, 0);
    for (wish, request) in wishes.iter().zip(&workload.requests) {
        match machine.outcome(*wish) {
            Outcome::Served { hit: true, .. } => {
                hits += 1;
                waits.push(Duration::ZERO);
            }
            Outcome::Served { hit: false, waited } => waits.push(match mode {
                Mode::Timed => *waited,
                // Loads take no time on this clock; a request waits for its own.
                Mode::Serial => workload.models[request.model].load,
            }),
            Outcome::Refused(_)
            | Outcome::Waiting
            | Outcome::Cut
            | Outcome::Done
            | Outcome::Left => refused += 1,
        }
    }
    let loads = |facts: &ModelFacts| machine.spawned().get(facts.name()).copied().unwrap_or(0);
    let seconds = |facts: &ModelFacts| Bytes(loads(facts)).as_f64() * facts.load.as_secs_f64();
    Figures {
        policy: Eviction::default(),
        limit: Bytes::ZERO,
        mode,
        requests: wishes.len(),
        refused,
        hits,
        loads: workload.models.iter().map(loads).sum(),
        load_seconds: workload.models.iter().map(seconds).sum(),
        waits: Waits::of(waits),
        offline: offline::Plan::default(),
    }
}

/// Returns limits from `from` to `to`: `step` apart, or in steps of a round
/// number of GiB that makes about a dozen. `to` is always one of them.
#[must_use]
pub fn steps(from: Bytes, to: Bytes, step: Option<Bytes>) -> Vec<Bytes> {
    let step = step.unwrap_or_else(|| {
        let whole = (to - from).get() / 12;
        let round = [1, 2, 4, 8, 16, 32, 64, 128, 256].map(Bytes::gib);
        let fits = round.into_iter().find(|step| step.get() >= whole);
        fits.unwrap_or(Bytes(whole))
    });
    let step = step.get().max(1);
    let count = (to - from).get() / step;
    let mut all: Vec<_> = (0..=count)
        .map(|nth| from + Bytes(nth.saturating_mul(step)))
        .collect();
    if all.last() != Some(&to) {
        all.push(to);
    }
    all
}
