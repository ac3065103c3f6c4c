//! Everything beneath the listeners: state, workers of an earlier residentd,
//! instruments, policy, controller.

use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::inputs::Defaults;
use super::keeper::{self, Keeper};
use super::upgrade::Inherited;
use super::{AppError, survivors};
use crate::clock::Clock;
use crate::config::{Config, Telemetry, diff};
use crate::control::{self, Controller, Inheritance, Routes};
use crate::memory::{MemorySource, Sampler, SamplerSettings};
use crate::model::{Bytes, Domain, ModelName};
use crate::policy::{Policy, Setup};
use crate::procfs::mark::Owner;
use crate::proxy::AccessLog;
use crate::store::{Store, StoreError};
use crate::telemetry::Traces;
use crate::worker::{self, Adoptee, Guard, ProcessSpawner, WorkerSettings};

/// The access log is this long at most, and one as long is kept beside it.
const ACCESS_LOG: u64 = 64 << 20;

/// How long the state of a residentd that ends is waited for, and between two tries.
const HELD: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(20);

/// What the listeners stand on.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) clock: Clock,
    pub(super) store: Store,
    pub(super) access: Option<AccessLog>,
    pub(super) traces: Option<Traces>,
    pub(super) spawner: Arc<ProcessSpawner>,
    pub(super) guard: Option<Arc<Guard>>,
    pub(super) controller: Controller,
    pub(super) defaults: Defaults,
    pub(super) keeper: Arc<Keeper>,
    /// Models whose workers are taken back and had answered before.
    pub(super) ready: Vec<ModelName>,
}

impl Core {
    /// Starts it, and waits until workers that are taken back answer.
    pub(super) async fn start(
        config: &Config,
        owns_process: bool,
        inherited: &Inherited,
    ) -> Result<Self, AppError> {
        let clock = Clock::of_machine();
        let store = open_store(config, clock).await?;
        let access = access_log(config)?;
        let traces = traces(config)?;
        let owner = Owner::this_process(store.name().to_owned());
        let mut adoptees = survivors::find(config, &store, &owner, clock).await;
        for adoptee in &mut adoptees {
            adoptee.is_vouched_for = inherited.vouches_for(&adoptee.record.worker);
        }
        let ready = survivors::ready(&adoptees);
        let spawner = Arc::new(spawner(config, owner.clone(), clock, owns_process));
        let guard = match owns_process && !config.server.adopt {
            true => Some(survivors::start_guard(&spawner, config, &owner)?),
            false => None,
        };
        let inheritance = inherited.inheritance();
        let is_first = inheritance.is_none();
        let parts = (store.clone(), Arc::clone(&spawner), inheritance);
        let (controller, defaults) = start_controller(config, parts, clock, adoptees);
        if is_first {
            survivors::settle(&controller, &ready).await;
        }
        let keeper = Keeper::start(&controller, store.clone());
        Ok(Self {
            clock,
            store,
            access,
            traces,
            spawner,
            guard,
            controller,
            defaults,
            keeper,
            ready,
        })
    }
}

/// Opens the state. One that has just ended, or is about to since whoever watched
/// over it has, may hold it for a moment.
async fn open_store(config: &Config, clock: Clock) -> Result<Store, StoreError> {
    let deadline = clock.now() + HELD;
    loop {
        match Store::open(&config.server.state_dir, &config.models) {
            Err(StoreError::Held { .. }) if clock.now() < deadline => {
                tokio::time::sleep(AGAIN).await;
            }
            opened => return opened,
        }
    }
}

fn access_log(config: &Config) -> Result<Option<AccessLog>, AppError> {
    if !config.server.access_log {
        return Ok(None);
    }
    let path = config.server.state_dir.join("access.jsonl");
    match AccessLog::open(&path, ACCESS_LOG) {
        Ok(log) => Ok(Some(log)),
        Err(source) => Err(AppError::AccessLog { path, source }),
    }
}

fn traces(config: &Config) -> Result<Option<Traces>, AppError> {
    let Telemetry {
        otlp_endpoint,
        service_name,
        sample_ratio,
    } = &config.telemetry;
    let endpoint = otlp_endpoint.as_ref();
    let started = endpoint.map(|endpoint| Traces::start(endpoint, service_name, *sample_ratio));
    Ok(started.transpose()?)
}

fn spawner(config: &Config, owner: Owner, clock: Clock, reap_all: bool) -> ProcessSpawner {
    worker::become_subreaper();
    ProcessSpawner::new(WorkerSettings {
        reap_all,
        ..WorkerSettings::new(clock, config.server.state_dir.clone(), owner)
    })
}

fn start_controller(
    config: &Config,
    (store, spawner, inherited): (Store, Arc<ProcessSpawner>, Option<Inheritance>),
    clock: Clock,
    adoptees: Vec<Adoptee>,
) -> (Controller, Defaults) {
    let sampler = Sampler::start(
        clock,
        SamplerSettings {
            check_interval: config.memory.check_interval,
            nvml_library: config.memory.nvml_library.clone(),
            host_proc: config.memory.host_proc.clone(),
            ..SamplerSettings::default()
        },
    );
    let host = sampler.readings().borrow().host.clone();
    let defaults = Defaults::of(&host, held(&adoptees));
    let (settings, limit_source) = defaults.settings(config, &store);
    info!(limit = %settings.limit, source = limit_source.as_str(), reserve = %settings.reserve, headroom = %host.headroom, models = config.models.len(), "memory");
    let setups = config.models.iter().map(|spec| Setup {
        spec: Arc::clone(spec),
        weights: crate::config::weights::total(&spec.weights),
        footprint: store.footprint(&spec.name),
    });
    let policy = Policy::new(settings, setups);
    let first_decision = keeper::next_id(&store);
    let controller = control::start(control::Parts {
        policy,
        routes: Arc::new(Routes::new(config.models.iter().cloned())),
        spawner,
        memory: sampler,
        store,
        clock,
        limit_source,
        auto_cleanup: config.memory.auto_cleanup,
        first_decision,
        adoptees,
        config_hash: diff::hash(config),
        inherited,
    });
    (controller, defaults)
}

/// What workers that are taken back were known to hold of the host: available at
/// start is less by that.
fn held(adoptees: &[Adoptee]) -> Bytes {
    let records = adoptees.iter().map(|adoptee| &adoptee.record);
    let peaks = records.filter_map(|record| record.peak.get(&Domain::Host));
    peaks.copied().sum()
}
