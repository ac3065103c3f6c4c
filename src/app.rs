//! Builds everything, binds the listeners, and takes it apart again.
//!
//! Order of the start: store, workers of an earlier residentd, instruments,
//! policy, controller, listeners. A listener is bound before the first worker is
//! spawned, so that a port that is taken costs no model load. Order of the end:
//! the controller refuses new work and drains, workers end, listeners close.

mod again;
mod connection;
mod core;
mod entrance;
mod inputs;
mod keeper;
mod lanes;
mod listen;
mod parts;
mod reload;
mod sockets;
mod supervisor;
mod survivors;
mod upgrade;
mod watch;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use rustix::process::Signal;
use tokio::sync::watch as states;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::core::Core;
use self::lanes::Lanes;
use self::listen::{Doors, Server, listen};
use self::reload::{Grace, Reloading, proxy_settings};
pub use self::sockets::address_text;
use self::sockets::{Opened, Wanted};
pub use self::supervisor::{PassedError, passed_sockets};
pub use self::survivors::keep_guard;
pub use self::upgrade::{HandoverError, Heir, Inherited, Predecessor, Program};
use self::upgrade::{Succession, Upgrading};
use crate::api::ApiState;
use crate::config::{Config, Listen, Sources};
use crate::control::{Controller, ReloadOrigin, Reloader, Upgrader};
use crate::model::ModelName;
use crate::proxy::{AccessLog, Proxy};
pub use crate::store::Learned;
use crate::store::{Store, StoreError};
pub use crate::worker::ExitStatus;
use crate::{memory, telemetry, worker};

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
    /// A socket that another process has opened cannot be used.
    #[error("use a socket that another process has opened")]
    Passed(#[source] std::io::Error),
    /// The residentd that was to be replaced goes on, or has ended.
    #[error(
        "the residentd that was to be replaced did not leave; this one ends and leaves workers alone"
    )]
    CalledOff,
    /// Nothing can be heard from the residentd that hands over.
    #[error("listen to the residentd that hands over")]
    Handover(#[source] std::io::Error),
    /// The access log could not be opened.
    #[error("open the access log {path}")]
    AccessLog {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Spans of requests cannot be sent.
    #[error(transparent)]
    Traces(#[from] telemetry::TracesError),
    /// Workers are not to outlive residentd, and nobody could be found to see to it.
    #[error("start the guard that ends workers with residentd")]
    Guard(#[source] std::io::Error),
    /// There are no threads that could serve connections.
    #[error("start the threads that serve connections")]
    Threads(#[source] std::io::Error),
    /// The state could not be opened.
    #[error("open state")]
    Store(#[from] StoreError),
}

/// How this residentd differs from another with the same configuration.
#[derive(Debug, Default)]
pub struct Options {
    /// Reap every orphan, not only those of our workers, end every child at the
    /// end, and keep this program in memory. Right when residentd is its own process, wrong when it runs
    /// inside a test.
    pub owns_process: bool,
    /// What another residentd can be started from that takes over; absent: none
    /// can.
    pub program: Option<Program>,
    /// Sockets that the service manager has opened; they are listened on instead
    /// of `server.listen`.
    pub sockets: Vec<OwnedFd>,
    /// What another residentd has handed over.
    pub inherited: Option<Inherited>,
}

/// How long after an upgrade connections on which nothing happens are kept open,
/// so that their next request is answered and ends them.
const LINGER: Duration = Duration::from_secs(5);

/// A running residentd.
#[derive(Debug)]
pub struct App {
    core: Core,
    owns_process: bool,
    addresses: Vec<Listen>,
    admin_addresses: Vec<Listen>,
    /// Unix sockets that are not the service manager's; they are taken away at the end.
    own_paths: Vec<PathBuf>,
    doors: states::Receiver<Doors>,
    abandoned: CancellationToken,
    reloader: Reloader,
    upgrader: Upgrader,
    heir: states::Receiver<Option<Arc<Heir>>>,
    grace: Arc<Grace>,
    closing: CancellationToken,
    connections: tokio_util::task::TaskTracker,
}

/// Threads that serve connections at most; more gain nothing on one box.
const MOST_THREADS: usize = 4;

/// Returns how many threads serve connections, and how many do all else: one for each
/// core, and two at least, so that one which is held up does not stop everything.
#[must_use]
pub fn threads() -> usize {
    let cores = std::thread::available_parallelism();
    cores.map_or(2, usize::from).clamp(2, MOST_THREADS)
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
        let link = options.inherited.as_ref().map(Inherited::share);
        let link = link.transpose().map_err(AppError::Handover)?.flatten();
        let started = Self::begin(sources, config, options).await;
        if let (Err(error), Some(link)) = (&started, link) {
            link.fail(&telemetry::chain(error).to_string());
        }
        started
    }

    async fn begin(sources: Sources, config: Config, options: Options) -> Result<Self, AppError> {
        let owns_process = options.owns_process;
        let mut inherited = options.inherited.unwrap_or_default();
        let opened = Opened {
            passed: options.sockets,
            inherited: std::mem::take(&mut inherited.listeners),
        };
        let (bound, dropped) = sockets::open(Wanted::of(&config), opened).await?;
        let (addresses, admin_addresses) = sockets::addresses(&bound);
        let mut own_paths = sockets::own_paths(&bound);
        own_paths.extend(dropped);
        // One that was killed may have left it.
        own_paths.push(config.server.state_dir.join(upgrade::SOCKET));
        let handover = inherited.listener(&config)?;
        let core = Core::start(&config, owns_process, &inherited).await?;
        let (controller, store) = (core.controller.clone(), core.store.clone());
        let proxy = Proxy::new(controller.clone(), proxy_settings(&config))
            .with_access_log(core.access.clone())
            .with_traces(core.traces.clone());
        let (reloader, requests) = Reloader::channel();
        let (upgrader, upgrades) = Upgrader::channel();
        let (doors, seen) = states::channel(Doors::Open);
        let (heir, heirs) = states::channel(None);
        let state = ApiState::new(controller.clone(), Some(reloader.clone()));
        let state = state.with_upgrader(options.program.is_some().then(|| upgrader.clone()));
        let state = state.with_past(keeper::past(&store));
        let lanes = Lanes::start(threads()).map_err(AppError::Threads)?;
        let with = (seen.clone(), lanes);
        let server = Server::new(&config, controller.clock(), proxy, state, with);
        let grace = Arc::new(Grace::new(config.server.shutdown_grace));
        let sources = Arc::new(sources);
        if config.server.watch_config {
            let asks = reloader.clone();
            let watch = watch::watch(Arc::clone(&sources), asks, server.closing.clone());
            telemetry::spawn("watch", watch);
        }
        let succession = inherited.take_over(&config, &core, (&server, handover));
        let Succession { parent, abandoned } = succession.await?;
        if let Some(program) = options.program {
            let listeners = sockets::share(&bound)?;
            let said = (doors, heir);
            let upgrading = Upgrading::new(program, &core, &config, (listeners, parent), said);
            telemetry::spawn("upgrade", upgrading.run(upgrades));
        }
        let reloading = Reloading {
            sources,
            running: config,
            defaults: core.defaults,
            store,
            controller,
            server: server.clone(),
            grace: Arc::clone(&grace),
            refused: None,
        };
        telemetry::spawn("reload", reloading.run(requests));
        let app = Self {
            core,
            owns_process,
            addresses,
            admin_addresses,
            own_paths,
            doors: seen,
            abandoned,
            reloader,
            upgrader,
            heir: heirs,
            grace,
            closing: server.closing.clone(),
            connections: server.connections.clone(),
        };
        for each in bound {
            let serving = listen(each.listener, each.scope, server.clone());
            telemetry::spawn("listener", serving);
        }
        if owns_process {
            stay();
            supervisor::watch(app.core.controller.clone());
            supervisor::ready();
        }
        Ok(app)
    }

    /// Returns the addresses that are listened on, ports as given by the
    /// system, but for those that are the operators' own.
    #[must_use]
    pub fn addresses(&self) -> &[Listen] {
        &self.addresses
    }

    /// Returns the operators' own addresses.
    #[must_use]
    pub fn admin_addresses(&self) -> &[Listen] {
        &self.admin_addresses
    }

    /// Returns the handle to the controller.
    #[must_use]
    pub fn controller(&self) -> &Controller {
        &self.core.controller
    }

    /// Has the configuration read anew as a signal asks for it: by a task of its
    /// own, and what is wrong with it is logged.
    pub fn reload(&self) {
        let reloader = self.reloader.clone();
        telemetry::spawn("reload", async move {
            supervisor::reloading();
            if let Err(error) = reloader.reload(ReloadOrigin::Signal, false).await {
                warn!(%error, "the configuration stays as it is");
            }
            supervisor::ready();
        });
    }

    /// Has another residentd take over, as a signal asks for it: by a task of its
    /// own, and what keeps it from that is logged.
    pub fn upgrade(&self) {
        let upgrader = self.upgrader.clone();
        telemetry::spawn("upgrade", async move {
            if let Err(error) = upgrader.upgrade().await {
                warn!(%error, "residentd goes on as it is");
            }
        });
    }

    /// Waits until another residentd has taken over.
    pub async fn handed_over(&self) -> Arc<Heir> {
        let mut heirs = self.heir.clone();
        match heirs
            .wait_for(Option::is_some)
            .await
            .map(|heir| heir.clone())
        {
            Ok(Some(heir)) => heir,
            // Nobody can take over any more.
            _ => std::future::pending().await,
        }
    }

    /// Waits until the process has ended that watched over this one. Whoever watched
    /// that starts another one, which takes the workers back.
    pub async fn abandoned(&self) {
        self.abandoned.cancelled().await;
    }

    /// Waits until everything has ended that came here before `heir` took over.
    pub async fn finish(&self, heir: &Heir) {
        tokio::select! {
            () = tokio::time::sleep(LINGER) => {}
            () = heir.gone() => {}
        }
        self.closing.cancel();
        self.connections.close();
        self.connections.wait().await;
        self.core.controller.routes().leave_heir();
        let (access, traces) = (self.core.access.clone(), self.core.traces.clone());
        // Only a panic of it could fail, which has been told.
        let _ = tokio::task::spawn_blocking(move || {
            access.as_ref().map(AccessLog::flush);
            traces.as_ref().map(telemetry::Traces::finish);
        })
        .await;
        heir.is_done();
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
        supervisor::stopping();
        self.core.controller.shutdown(grace).await;
        if Doors::settled(&mut self.doors.clone()).await.is_some() {
            // Workers are another one's by now, which ends in this one's place.
            std::future::pending::<()>().await;
        }
        if let Some(guard) = &self.core.guard {
            guard.dismiss().await;
        }
        if self.owns_process {
            worker::end_orphans(self.core.clock).await;
        }
        self.close().await;
    }

    /// Writes what is to be kept and closes the listeners. Workers are left as
    /// they are: those that still run then are taken back by the next residentd
    /// with this state.
    pub async fn close(&self) {
        self.core.keeper.keep();
        let (store, access) = (self.core.store.clone(), self.core.access.clone());
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
        if let Some(traces) = self.core.traces.clone() {
            let _ = tokio::task::spawn_blocking(move || traces.finish()).await;
        }
        for path in &self.own_paths {
            // It may have been taken away already.
            let _ = std::fs::remove_file(path);
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
