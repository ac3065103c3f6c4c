//! Workers that outlived the residentd before this one, and those that are not
//! to outlive this one.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::AppError;
use crate::clock::Clock;
use crate::config::{Config, LogFormat};
use crate::control::{Controller, ModelView, Phase};
use crate::model::{ModelName, ModelSpec};
use crate::procfs::ProcessKey;
use crate::procfs::mark::Owner;
use crate::store::Store;
use crate::worker::{self, Adoptee, Guard, ProcessSpawner};

/// Longest wait at the start for workers to answer again and to be measured;
/// one that takes longer is waited for by its requests.
const SETTLE: Duration = Duration::from_secs(2);

/// Finds the workers that can be taken back, and ends what else is left.
pub(super) async fn find(
    config: &Config,
    store: &Store,
    owner: &Owner,
    clock: Clock,
) -> Vec<Adoptee> {
    let origin = |spec: &ModelSpec| {
        let files = store.fingerprint(&spec.name).unwrap_or_default();
        worker::origin(spec, &files)
    };
    let mut found = worker::inspect(store.workers(), &config.models, origin);
    if !config.server.adopt {
        found.refuse_all();
    }
    // The state is held by us now: whoever held it before is no more.
    worker::end_left_behind(owner, &found, clock).await;
    worker::tidy(&config.server.state_dir, &found);
    let kept = |record: &crate::model::WorkerRecord| {
        let mut all = found.adoptees.iter();
        all.any(|adoptee| adoptee.record.worker == record.worker)
    };
    for gone in store.workers().iter().filter(|record| !kept(record)) {
        store.forget_worker(&gone.worker);
    }
    found.adoptees
}

/// Returns the models of those that had answered before.
pub(super) fn ready(adoptees: &[Adoptee]) -> Vec<ModelName> {
    let ready = adoptees.iter().filter(|adoptee| adoptee.record.ready);
    ready.map(|adoptee| adoptee.spec.name.clone()).collect()
}

/// Waits until those that had answered before do so again and are measured, so
/// that from the first answer on everything is as it was.
pub(super) async fn settle(controller: &Controller, ready: &[ModelName]) {
    if ready.is_empty() {
        return;
    }
    let settled = |view: &ModelView| {
        let leaves = !matches!(view.phase, Phase::Starting);
        leaves && (view.usage.is_some() || view.phase != Phase::Ready)
    };
    let mut views = controller.watch();
    let all = views.wait_for(|snapshot| {
        let mut models = ready.iter().filter_map(|name| snapshot.models.get(name));
        models.all(settled)
    });
    match tokio::time::timeout(SETTLE, all).await {
        Ok(Ok(_)) => info!(workers = ready.len(), "workers are taken back"),
        // A closed channel has been told elsewhere.
        Ok(Err(_)) => {}
        Err(_) => warn!("workers that are taken back do not answer yet"),
    }
}

/// Starts the guard of workers of `owner`: this very program, whatever has been
/// put in its file's place meanwhile.
pub(super) fn start_guard(
    spawner: &ProcessSpawner,
    config: &Config,
    owner: &Owner,
) -> Result<Arc<Guard>, AppError> {
    let ProcessKey { pid, start_time } = owner.process;
    let mut arguments: Vec<OsString> = vec![
        "guard".into(),
        "--state".into(),
        owner.state.clone().into(),
        "--pid".into(),
        pid.to_string().into(),
        "--start-time".into(),
        start_time.to_string().into(),
        "--log-level".into(),
        config.server.log_level.clone().into(),
    ];
    if config.server.log_format == LogFormat::Json {
        arguments.push("--json".into());
    }
    let started = spawner.start_guard("/proc/self/exe".into(), arguments);
    started.map_err(AppError::Guard)
}

/// Is the guard of the residentd with this state, pid and start time: returns
/// when that has ended and nothing is left of its workers.
///
/// # Errors
/// When standard input, the pipe from it, cannot be read.
pub fn keep_guard(state: String, pid: i32, start_time: u64) -> std::io::Result<()> {
    let process = ProcessKey { pid, start_time };
    worker::keep_guard(&Owner { state, process })
}
