//! Builds everything, binds the listeners, and takes it apart again.
//!
//! Order of the start: store, workers of an earlier residentd, instruments,
//! policy, controller, listeners. A listener is bound before the first worker is
//! spawned, so that a port that is taken costs no model load. Order of the end: the controller refuses new
//! work and drains, workers end, listeners close.

mod keeper;
mod listeners;
mod survivors;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keeper::Keeper;
pub use listeners::address_text;
use listeners::{Server, bind, listen};
pub use survivors::keep_guard;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::api::{self, ApiState};
use crate::clock::Clock;
use crate::config::{Config, LimitOrigin, Listen};
use crate::control::{self, Controller, LimitSource, Routes};
use crate::memory::{self, HostReading, MemorySource, Sampler, SamplerSettings};
use crate::model::{Bytes, DeviceRef, Domain, ModelName};
use crate::policy::{Policy, Settings, Setup, Threshold};
use crate::procfs::mark::Owner;
use crate::proxy::{AccessLog, Proxy, ProxySettings};
pub use crate::store::Learned;
use crate::store::{Store, StoreError};
use crate::telemetry;
use crate::worker::{self, Adoptee, Guard, ProcessSpawner, WorkerSettings};

/// Share of what is available at start that workers get when no limit is set.
const DEFAULT_LIMIT_PERCENT: u64 = 80;
/// The default reserve is this share of the host, and at least
/// [`LEAST_RESERVE`].
const RESERVE_PERCENT: u64 = 5;
/// See [`RESERVE_PERCENT`].
const LEAST_RESERVE: Bytes = Bytes::mib(512);
/// The access log is this long at most, and one as long is kept beside it.
const ACCESS_LOG: u64 = 64 << 20;
/// How long open connections may take to end after the last worker is gone.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why residentd could not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// Somebody listens on an address already.
    #[error(
        "listen on {address}: another program does; end it, or name another address with --listen or server.listen"
    )]
    Taken {
        /// Which.
        address: String,
    },
    /// An address could not be listened on.
    #[error("listen on {address}")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The access log could not be opened.
    #[error("open the access log {path}")]
    AccessLog {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Workers are not to outlive residentd, and nobody could be found to see to it.
    #[error("start the guard that ends workers with residentd")]
    Guard(#[source] std::io::Error),
    /// The state could not be opened.
    #[error("open state")]
    Store(#[from] StoreError),
}

/// How this residentd differs from another with the same configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Reap every orphan, not only those of our workers, end every child at the
    /// end, and keep this program in memory. Right when residentd is its own process, wrong when it runs
    /// inside a test.
    pub owns_process: bool,
}

/// A running residentd.
#[derive(Debug)]
pub struct App {
    controller: Controller,
    store: Store,
    keeper: Arc<Keeper>,
    access: Option<AccessLog>,
    clock: Clock,
    options: Options,
    guard: Option<Arc<Guard>>,
    addresses: Vec<Listen>,
    closing: CancellationToken,
    connections: tokio_util::task::TaskTracker,
}

impl App {
    /// Starts everything the configuration says.
    ///
    /// # Errors
    /// When an address is taken or the state folder cannot be used. No worker
    /// has been spawned then.
    pub async fn start(config: Config, options: Options) -> Result<Self, AppError> {
        let clock = Clock::start();
        let mut listeners = Vec::new();
        for address in &config.server.listen {
            listeners.push(bind(address).await?);
        }
        let addresses = listeners.iter().map(|(listen, _)| listen.clone()).collect();
        let store = Store::open(&config.server.state_dir, &config.models)?;
        let access = access_log(&config)?;
        let owner = Owner::this_process(store.name().to_owned());
        let adoptees = survivors::find(&config, &store, &owner, clock).await;
        let ready = adoptees.iter().filter(|adoptee| adoptee.record.ready);
        let ready = ready.map(|adoptee| adoptee.spec.name.clone()).collect();
        let spawner = spawner(&config, owner.clone(), clock, options);
        let guard = match options.owns_process && !config.server.adopt {
            true => {
                let (program, arguments) = survivors::guard(&config, &owner);
                let started = spawner.start_guard(program, arguments);
                Some(started.map_err(AppError::Guard)?)
            }
            false => None,
        };
        let controller = start_controller(&config, store.clone(), spawner, clock, adoptees);
        survivors::settle(&controller, ready).await;
        let proxy = Proxy::new(
            controller.clone(),
            ProxySettings {
                max_body: config.server.max_body,
                model_prefix: config.server.model_prefix,
            },
        )
        .with_access_log(access.clone());
        let server = Server {
            proxy: proxy.clone(),
            api: api::router(ApiState::new(controller.clone()).with_past(keeper::past(&store))),
            closing: CancellationToken::new(),
            connections: tokio_util::task::TaskTracker::new(),
        };
        let app = Self {
            keeper: Keeper::start(&controller, store.clone()),
            controller,
            store,
            access,
            clock,
            options,
            guard,
            addresses,
            closing: server.closing.clone(),
            connections: server.connections.clone(),
        };
        for (_, listener) in listeners {
            telemetry::spawn("listener", listen(listener, server.clone()));
        }
        if options.owns_process
            && let Err(error) = memory::stay_in_memory()
        {
            debug!(%error, "the kernel may drop pages of this program; raise RLIMIT_MEMLOCK to change that");
        }
        Ok(app)
    }

    /// Returns the addresses that are listened on, ports as given by the
    /// system.
    #[must_use]
    pub fn addresses(&self) -> &[Listen] {
        &self.addresses
    }

    /// Returns the handle to the controller.
    #[must_use]
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Refuses new work, lets requests inside finish within `grace`, ends all
    /// workers, then closes the listeners. May be called again with a shorter
    /// grace while the first call waits.
    pub async fn shutdown(&self, grace: Duration) {
        self.controller.shutdown(grace).await;
        if let Some(guard) = &self.guard {
            guard.dismiss().await;
        }
        if self.options.owns_process {
            worker::end_orphans(self.clock).await;
        }
        self.close().await;
    }

    /// Writes what is to be kept and closes the listeners. Workers are left as
    /// they are: those that still run then are taken back by the next residentd
    /// with this state.
    pub async fn close(&self) {
        self.keeper.keep();
        let (store, access) = (self.store.clone(), self.access.clone());
        // Only a panic of it could fail, which has been told.
        let _ = tokio::task::spawn_blocking(move || {
            access.as_ref().map(AccessLog::flush);
            store.flush();
        })
        .await;
        self.closing.cancel();
        self.connections.close();
        if tokio::time::timeout(CLOSE_TIMEOUT, self.connections.wait())
            .await
            .is_err()
        {
            debug!(
                open = self.connections.len(),
                "connections are still open and will be cut"
            );
        }
        for address in &self.addresses {
            if let Listen::Unix(path) = address {
                // It may have been taken away already.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// Returns what past lives taught of each configured model.
///
/// # Errors
/// When a residentd that runs has the state open, or it cannot be read.
pub fn learned(config: &Config) -> Result<BTreeMap<ModelName, Learned>, AppError> {
    Ok(Store::peek(&config.server.state_dir, &config.models)?)
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

fn spawner(config: &Config, owner: Owner, clock: Clock, options: Options) -> ProcessSpawner {
    worker::become_subreaper();
    ProcessSpawner::new(WorkerSettings {
        reap_all: options.owns_process,
        ..WorkerSettings::new(clock, config.server.state_dir.clone(), owner)
    })
}

fn start_controller(
    config: &Config,
    store: Store,
    spawner: ProcessSpawner,
    clock: Clock,
    adoptees: Vec<Adoptee>,
) -> Controller {
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
    let (limit, limit_source) = limit(config, &store, &host);
    let reserve = config.memory.reserve.unwrap_or_else(|| {
        host.domain_total()
            .percent(RESERVE_PERCENT)
            .max(LEAST_RESERVE)
    });
    info!(%limit, source = limit_source.as_str(), %reserve, headroom = %host.headroom, models = config.models.len(), "memory");
    let settings = Settings {
        limit,
        reserve,
        gpu_limits: gpu_limits(config, &store),
        soft: threshold(config.pressure.soft),
        hard: threshold(config.pressure.hard),
        auto_cleanup: config.memory.auto_cleanup,
        eviction: config.memory.policy,
        patience: config.memory.patience,
        emergency: config.pressure.emergency,
        drain_timeout: config.server.shutdown_grace,
    };
    let setups = config.models.iter().map(|spec| Setup {
        spec: Arc::clone(spec),
        weights: crate::config::weights::total(&spec.weights),
        footprint: store.footprint(&spec.name),
    });
    let policy = Policy::new(settings, setups);
    let first_decision = keeper::next_id(&store);
    control::start(control::Parts {
        policy,
        routes: Arc::new(Routes::new(config.models.iter().cloned())),
        spawner: Arc::new(spawner),
        memory: sampler,
        store,
        clock,
        limit_source,
        first_decision,
        auto_cleanup: config.memory.auto_cleanup,
        adoptees,
    })
}

/// The limit on host RAM and who set it: kept by an operator, else
/// configured, else a share of what is available now.
fn limit(config: &Config, store: &Store, host: &HostReading) -> (Bytes, LimitSource) {
    if let Some(kept) = store.limit(Domain::Host) {
        return (kept, LimitSource::Api);
    }
    match config.memory.limit {
        Some((limit, LimitOrigin::Config)) => (limit, LimitSource::Config),
        Some((limit, LimitOrigin::Env)) => (limit, LimitSource::Env),
        None => {
            let by_cgroup = host.headroom < host.available;
            let source = if by_cgroup {
                LimitSource::Cgroup
            } else {
                LimitSource::Default
            };
            (host.headroom.percent(DEFAULT_LIMIT_PERCENT), source)
        }
    }
}

/// Limits on GPUs: kept by an operator, else configured.
fn gpu_limits(config: &Config, store: &Store) -> BTreeMap<DeviceRef, Bytes> {
    let mut limits = config.gpu_limits.clone();
    limits.extend(
        store
            .gpu_limits()
            .map(|(index, limit)| (DeviceRef::Index(index), limit)),
    );
    limits
}

fn threshold(threshold: crate::config::Threshold) -> Threshold {
    match threshold {
        crate::config::Threshold::Percent(percent) => Threshold::Percent(u64::from(percent)),
        crate::config::Threshold::Size(bytes) => Threshold::Size(bytes),
    }
}
