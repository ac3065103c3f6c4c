//! A worker's processes, and what is held as long as they run.

use std::collections::BTreeMap;
use std::sync::Arc;

use tracing::{debug, warn};

use super::Shared;
use super::adopt::{self, Adoptee};
use super::command::{self, Launch, Names};
use super::notify::{self, Notices};
use super::opened::Opened;
use super::output::Log;
use super::port::{Held, Ports};
use super::process::Process;
use crate::model::{LastUse, ModelSpec, PlacedGpu, ReadyCheck, WorkerId, WorkerRecord};

/// Raised for workers, so that the kernel's OOM killer takes one of them
/// before it takes residentd.
const OOM_SCORE_ADJ: &[u8] = b"500";

/// What a life holds while its processes run.
pub(super) struct Body {
    pub(super) process: Process,
    pub(super) log: Log,
    pub(super) ports: Vec<Held>,
    /// Where it says that it is ready, when it is to say so.
    pub(super) notices: Option<Notices>,
    /// The connection of the probe that it passed.
    pub(super) opened: Opened,
    /// What a later residentd must know of it.
    pub(super) record: WorkerRecord,
}

impl Body {
    /// Spawns a worker. Returns its pid too; the text of an error says what is
    /// wrong.
    pub(super) fn spawn(
        shared: &Shared,
        worker: &WorkerId,
        (spec, gpus): (&ModelSpec, &[PlacedGpu]),
        hold_port: bool,
    ) -> Result<(i32, Self), String> {
        let port = |name| take_port(shared, spec, name, hold_port);
        let held = (port("PORT")?, port("GRPC_PORT")?);
        let number = |held: &Option<Held>| held.as_ref().map(|held| held.port);
        let (port, grpc_port) = (number(&held.0), number(&held.1));
        let socket = command::uses(spec, "SOCKET")
            .then(|| shared.socket())
            .transpose()?;
        let names = Names {
            port,
            grpc_port,
            socket: socket.as_deref(),
            gpus,
        };
        let report = shared.own_file("reports")?;
        let notices = listen(shared, spec)?;
        let launch = Launch::new(spec, names)?;
        let failed = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
        let mut log = open_log(shared, worker, spec).map_err(failed("open its log"))?;
        if let Err(error) = log.note(&format!("--- {worker} starts: {} ---", launch.program())) {
            warn!(%worker, %error, "a log cannot be written; what the worker prints may be lost");
        }
        // Before the spawn, so that a worker that ends at once loses no line.
        let log_from = log.skip();
        let output = log.writer().map_err(failed("open its log"))?;
        let errors = output.try_clone().map_err(failed("open its log"))?;
        let mark = shared.owner.mark(worker);
        let mut command = launch.command(&mark, &report, output, errors);
        // Never that of residentd itself.
        command.env_remove(notify::VARIABLE);
        if let Some(notices) = &notices {
            command.env(notify::VARIABLE, notices.path());
        }
        // Held until the child is noted, so that the reaper leaves it alone.
        let mut leaders = shared.leaders.lock();
        let child = command
            .spawn()
            .map_err(|error| format!("{}: {error}", launch.program()))?;
        let stamp = i32::try_from(child.id())
            .map_err(std::io::Error::other)
            .and_then(|pid| shared.marks.stamp(pid, &mark))
            .inspect_err(|error| {
                debug!(%worker, %error, "not stamped; a daemon that renames itself may be missed");
            });
        let process = Process::spawned(child.id(), mark.clone(), Arc::clone(&shared.marks))
            .map_err(failed("take charge of it"))?;
        leaders.insert(process.pid(), Arc::clone(&process.tree));
        drop(leaders);
        if let Some(guard) = shared.guard.get() {
            guard.protect(process.tree.leader(), stamp.as_ref().ok().copied());
        }
        let pid = process.pid();
        // Best effort: raising it needs no right, but it may be gone already.
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE_ADJ);
        let record = WorkerRecord {
            worker: worker.clone(),
            pid,
            start_time: process.tree.leader().start_time,
            home: adopt::home().to_owned(),
            mark: mark.as_str().to_owned(),
            stamp: stamp.ok(),
            origin: String::new(),
            upstream: launch.upstream,
            grpc_upstream: launch.grpc_upstream,
            port,
            grpc_port,
            socket,
            notify: notices.as_ref().map(|notices| notices.path().to_owned()),
            report,
            log_from,
            gpus: gpus.iter().map(|gpu| gpu.uuid.clone()).collect(),
            ready: false,
            parked: false,
            last_use: LastUse::default(),
            peak: BTreeMap::new(),
        };
        let body = Self {
            process,
            log,
            ports: held.0.into_iter().chain(held.1).collect(),
            notices,
            opened: Opened::default(),
            record,
        };
        Ok((pid, body))
    }

    /// Takes up what an earlier residentd left.
    pub(super) fn adopted(shared: &Shared, adoptee: Adoptee) -> Result<Self, String> {
        let (mark, key) = (adoptee.mark(), adoptee.leader());
        let record = adoptee.record;
        let process = Process::adopted(
            (adoptee.leader, key, adoptee.parent),
            (mark, record.stamp),
            Arc::clone(&shared.marks),
        )
        .map_err(text)?;
        let place = (shared.state_dir.as_path(), record.worker.model.as_str());
        let from = (record.log_from, record.ready);
        let mut log = Log::resume(place, shared.log_cap, from).map_err(text)?;
        log.look_at_once();
        let mut leaders = shared.leaders.lock();
        leaders.insert(process.pid(), Arc::clone(&process.tree));
        drop(leaders);
        let held = record.port.into_iter().chain(record.grpc_port);
        Ok(Self {
            ports: held.map(Ports::rejoin).collect(),
            notices: listen_again(&record),
            opened: Opened::default(),
            process,
            log,
            record,
        })
    }
}

/// Takes a port for a model that names it so; one that is not held may be taken by
/// somebody else before the worker listens.
fn take_port(
    shared: &Shared,
    spec: &ModelSpec,
    name: &str,
    hold: bool,
) -> Result<Option<Held>, String> {
    let taken = command::uses(spec, name).then(|| shared.ports.take());
    let mut held = taken.transpose().map_err(text)?;
    if let Some(held) = held.as_mut().filter(|_| !hold) {
        held.release();
    }
    Ok(held)
}

/// Opens the worker's log. That it cannot be kept is no reason not to start a
/// worker, unless a line in it is what shows that it is ready.
fn open_log(shared: &Shared, worker: &WorkerId, spec: &ModelSpec) -> std::io::Result<Log> {
    let opened = Log::open(&shared.state_dir, spec.name.as_str(), shared.log_cap);
    match opened {
        Err(error) if !matches!(spec.ready, ReadyCheck::Log(_)) => {
            warn!(%worker, %error, "a log cannot be opened; what the worker prints is lost");
            Log::nowhere()
        }
        opened => opened,
    }
}

/// Listens for the worker to say that it is ready, when it is to say so.
fn listen(shared: &Shared, spec: &ModelSpec) -> Result<Option<Notices>, String> {
    matches!(spec.ready, ReadyCheck::Notify)
        .then(|| Notices::listen(shared.socket()?).map_err(text))
        .transpose()
}

/// Listens again where the worker was told to say that it is ready: its
/// environment cannot be changed. Where that cannot be done, a worker that still
/// loads counts as ready with the first connection that it accepts.
fn listen_again(record: &WorkerRecord) -> Option<Notices> {
    let path = record.notify.as_ref()?;
    // What lies there belonged to a residentd that is no more.
    let _ = std::fs::remove_file(path);
    Notices::listen(path.clone())
        .inspect_err(|error| {
            let worker = &record.worker;
            warn!(%worker, path = %path.display(), %error, "a worker is not heard when it says that it is ready");
        })
        .ok()
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
