//! Builds everything, binds the listeners, and takes it apart again.
//!
//! Order of the start: store, workers of an earlier residentd, instruments,
//! policy, controller, listeners. A listener is bound before the first worker is
//! spawned, so that a port that is taken costs no model load. Order of the end:
//! the controller refuses new work and drains, workers end, listeners close.

mod inputs;
mod keeper;
mod listen;
mod reload;
mod survivors;
mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::inputs::Defaults;
use self::keeper::Keeper;
pub use self::listen::address_text;
use self::listen::{Server, bind, listen};
use self::reload::{Grace, Reloading, proxy_settings};
pub use self::survivors::keep_guard;
use crate::api::{self, ApiState};
use crate::clock::Clock;
use crate::config::{Config, Listen, Sources, diff};
use crate::control::{self, Controller, ReloadOrigin, Reloader, Routes};
use crate::memory::{self, MemorySource, Sampler, SamplerSettings};
use crate::model::ModelName;
use crate::policy::{Policy, Setup};
use crate::procfs::mark::Owner;
use crate::proxy::{AccessLog, Proxy};
pub use crate::store::Learned;
use crate::store::{Store, StoreError};
use crate::telemetry;
use crate::worker::{self, Adoptee, Guard, ProcessSpawner, WorkerSettings};

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
    reloader: Reloader,
    grace: Arc<Grace>,
    closing: CancellationToken,
    connections: tokio_util::task::TaskTracker,
}

impl App {
    /// Starts everything that `config` says, which was read from `sources` and
    /// is read from there again at a reload.
    ///
    /// # Errors
    /// When an address is taken or the state folder cannot be used. No worker
    /// has been spawned then.
    pub async fn start(
        sources: Sources,
        config: Config,
        options: Options,
    ) -> Result<Self, AppError> {
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
        let ready = survivors::ready(&adoptees);
        let spawner = spawner(&config, owner.clone(), clock, options);
        let guard = match options.owns_process && !config.server.adopt {
            true => Some(survivors::start_guard(&spawner, &config, &owner)?),
            false => None,
        };
        let (controller, defaults) =
            start_controller(&config, store.clone(), spawner, clock, adoptees);
        survivors::settle(&controller, ready).await;
        let proxy =
            Proxy::new(controller.clone(), proxy_settings(&config)).with_access_log(access.clone());
        let (reloader, requests) = Reloader::channel();
        let state = ApiState::new(controller.clone(), Some(reloader.clone()));
        let server = Server {
            proxy: proxy.clone(),
            api: api::router(state.with_past(keeper::past(&store))),
            closing: CancellationToken::new(),
            connections: tokio_util::task::TaskTracker::new(),
        };
        let grace = Arc::new(Grace::new(config.server.shutdown_grace));
        let sources = Arc::new(sources);
        if config.server.watch_config {
            let (sources, closing) = (Arc::clone(&sources), server.closing.clone());
            let watch = watch::watch(sources, reloader.clone(), closing);
            telemetry::spawn("watch", watch);
        }
        let reloading = Reloading {
            sources,
            running: config,
            defaults,
            store: store.clone(),
            controller: controller.clone(),
            proxy,
            grace: Arc::clone(&grace),
            refused: None,
        };
        telemetry::spawn("reload", reloading.run(requests));
        let app = Self {
            keeper: Keeper::start(&controller, store.clone()),
            controller,
            store,
            access,
            clock,
            options,
            guard,
            addresses,
            reloader,
            grace,
            closing: server.closing.clone(),
            connections: server.connections.clone(),
        };
        for (_, listener) in listeners {
            telemetry::spawn("listener", listen(listener, server.clone()));
        }
        if options.owns_process {
            stay();
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

    /// Has the configuration read anew as a signal asks for it: by a task of its
    /// own, and what is wrong with it is logged.
    pub fn reload(&self) {
        let reloader = self.reloader.clone();
        telemetry::spawn("reload", async move {
            if let Err(error) = reloader.reload(ReloadOrigin::Signal, false).await {
                warn!(%error, "the configuration stays as it is");
            }
        });
    }

    /// Returns how long requests inside may take at the end, as it is
    /// configured now.
    #[must_use]
    pub fn grace(&self) -> Duration {
        self.grace.get()
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

/// Has the kernel look for memory elsewhere than here, as far as it lets us.
fn stay() {
    if let Err(error) = memory::spare_from_oom() {
        debug!(%error, "the OOM killer may come for residentd too; give it CAP_SYS_RESOURCE, or a low score from outside");
    }
    if let Err(error) = memory::stay_in_memory() {
        debug!(%error, "the kernel may drop pages of this program; raise RLIMIT_MEMLOCK to change that");
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
    let defaults = Defaults::of(&host);
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
        spawner: Arc::new(spawner),
        memory: sampler,
        store,
        clock,
        limit_source,
        auto_cleanup: config.memory.auto_cleanup,
        first_decision,
        adoptees,
        config_hash: diff::hash(config),
    });
    (controller, defaults)
}
