//! The life of one worker, from spawn to the last reaped process.
//!
//! ```text
//! spawn ── starting ──┬─ ready ──── serving ──┬─ asked to stop ── stopping ──┐
//!                     ├─ never ready ─────────┼──────────────────────────────┤
//!                     └─ ended by itself ─────┴─ ended by itself ────────────┴─ tree gone ── Exited
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::command::{self, Launch, Names};
use super::listener::{self, Owner};
use super::notify::{self, Notices};
use super::opened::Opened;
use super::output::{Log, Tail};
use super::port::Held;
use super::prefetch::Used;
use super::process::Process;
use super::{ExitStatus, Shared, SpawnOrder, Stop, WorkerEvent, probe};
use crate::clock::Timestamp;
use crate::model::{ModelSpec, PlacedGpu, ReadyCheck, Upstream, WorkerId};
use crate::procfs::ProcessTree;

/// At most one probe in this time, however many lines a worker prints.
const PROBE_GAP: Duration = Duration::from_millis(2);
/// The net under the log lines: polls come after 2 % of the time waited,
/// within these bounds.
const POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// How long what the leader left behind may take to end by itself after a
/// graceful stop.
const STRAGGLERS: Duration = Duration::from_secs(2);
/// Lines searched for the sign that a port was taken.
const SIGN_LINES: usize = 20;
/// Raised for workers, so that the kernel's OOM killer takes one of them
/// before it takes residentd.
const OOM_SCORE_ADJ: &[u8] = b"500";

/// Why a worker stopped starting or serving.
enum End {
    Ready,
    NeverReady,
    Asked,
    ByItself,
}

/// One worker's task.
pub(super) struct Life {
    shared: Arc<Shared>,
    worker: WorkerId,
    spec: Arc<ModelSpec>,
    gpus: Arc<[PlacedGpu]>,
    events: mpsc::UnboundedSender<WorkerEvent>,
    stop: watch::Receiver<Stop>,
    tail: Arc<Tail>,
}

impl Life {
    pub(super) fn new(
        shared: Arc<Shared>,
        order: SpawnOrder,
        stop: watch::Receiver<Stop>,
        tail: Arc<Tail>,
    ) -> Self {
        let SpawnOrder {
            worker,
            spec,
            gpus,
            events,
        } = order;
        Self {
            shared,
            worker,
            spec,
            gpus: gpus.into(),
            events,
            stop,
            tail,
        }
    }

    /// Runs the life to its end and says `Exited`.
    pub(super) async fn run(mut self) {
        let mut status = self.live(true).await;
        if status.is_none() {
            info!(worker = %self.worker, "the port was taken; trying another one");
            status = self.live(false).await;
        }
        let status =
            status.unwrap_or_else(|| ExitStatus::NotSpawned("its port was taken twice".into()));
        let last_lines = self.tail.last(SIGN_LINES);
        self.say(WorkerEvent::Exited {
            worker: self.worker.clone(),
            status,
            last_lines,
        });
    }

    /// One try; `None` when the worker ended because its port was taken.
    async fn live(&mut self, hold_port: bool) -> Option<ExitStatus> {
        if *self.stop.borrow() != Stop::Run {
            return Some(ExitStatus::NotSpawned("it was stopped before".into()));
        }
        let mut body = match self.spawn(hold_port).await {
            Ok(body) => body,
            Err(why) => {
                self.tail.push(format!("not spawned: {why}"));
                return Some(ExitStatus::NotSpawned(why));
            }
        };
        let tree = Arc::clone(&body.process.tree);
        let mut used = Used::watch(Arc::clone(&tree));
        self.say(WorkerEvent::Spawned {
            worker: self.worker.clone(),
            tree,
            report: body.report.clone(),
        });
        let mut end = self.starting(&mut body).await;
        let started = matches!(end, End::Ready);
        if started {
            self.say(WorkerEvent::Ready {
                worker: self.worker.clone(),
                upstream: body.upstream.clone(),
                opened: std::mem::take(&mut body.opened),
            });
            used.ready();
            end = self.serving(&mut body, &mut used).await;
        }
        match end {
            End::Ready | End::ByItself => {}
            End::NeverReady => {
                let (worker, after) = (self.worker.clone(), self.spec.start_timeout);
                self.say(WorkerEvent::NeverReady { worker, after });
                self.stopping(&mut body).await;
            }
            End::Asked => self.stopping(&mut body).await,
        }
        // Whatever is left of the tree ends now; for most there is nothing.
        body.process
            .kill_tree(&self.shared.leaders, self.shared.clock)
            .await;
        let status = body.process.exited().await;
        body.log.finish(&self.tail).await;
        // Written last, so that a gone worker's log says how it went.
        let _ = body
            .log
            .note(&format!("--- {} ended: {status} ---", self.worker));
        self.shared.leaders.lock().remove(&body.process.pid());
        for file in body.socket.iter().chain([&body.report]) {
            // It may never have been made, or taken away by the worker itself.
            let _ = std::fs::remove_file(file);
        }
        let retry = !started && hold_port && body.port.is_some() && self.port_was_taken();
        (!retry).then_some(status)
    }

    async fn spawn(&self, hold_port: bool) -> Result<Body, String> {
        let shared = Arc::clone(&self.shared);
        let (worker, spec) = (self.worker.clone(), Arc::clone(&self.spec));
        let gpus = Arc::clone(&self.gpus);
        // Opening files and the spawn itself wait for the disk.
        let spawned = tokio::task::spawn_blocking(move || {
            Body::spawn(&shared, &worker, (&spec, &gpus), hold_port)
        });
        let (pid, body) = spawned.await.map_err(|error| error.to_string())??;
        debug!(worker = %self.worker, pid, "spawned");
        Ok(body)
    }

    /// Probes until the worker answers, ends, is to stop, or its time is over.
    async fn starting(&mut self, body: &mut Body) -> End {
        let clock = self.shared.clock;
        let since = clock.now();
        let deadline = clock.instant(since + self.spec.start_timeout);
        let mut warned = false;
        let mut probed = Timestamp::START;
        let tree = Arc::clone(&body.process.tree);
        loop {
            let waited = clock.now().since(since);
            let poll = (waited / 50).clamp(POLL.0, POLL.1);
            let lines;
            tokio::select! {
                _ = body.process.exited() => return End::ByItself,
                () = stopped(&mut self.stop) => return End::Asked,
                () = tokio::time::sleep_until(deadline) => return End::NeverReady,
                () = noticed(body.notices.as_ref(), &tree) => return End::Ready,
                () = body.log.changed() => lines = body.log.drain(&self.tail).await,
                () = tokio::time::sleep(poll) => lines = body.log.drain(&self.tail).await,
            }
            if let ReadyCheck::Log(pattern) = &self.spec.ready {
                if lines.iter().any(|line| pattern.is_match(line)) {
                    return End::Ready;
                }
                continue;
            }
            if body.notices.is_some() {
                continue;
            }
            let gap = PROBE_GAP.saturating_sub(clock.now().since(probed));
            let asked = async {
                tokio::time::sleep(gap).await;
                probe::passes(&self.spec.ready, &body.upstream).await
            };
            let passes = tokio::select! {
                passes = asked => passes,
                _ = body.process.exited() => return End::ByItself,
                () = stopped(&mut self.stop) => return End::Asked,
                () = tokio::time::sleep_until(deadline) => return End::NeverReady,
            };
            probed = clock.now();
            if let Some(opened) = passes
                && self.answers_for(body, &mut warned)
            {
                body.opened = Opened::new(opened);
                return End::Ready;
            }
        }
    }

    /// Whether it is the worker that answered, and not a stranger on its port.
    fn answers_for(&self, body: &Body, warned: &mut bool) -> bool {
        let owner = listener::owner(&body.upstream, &body.process.tree);
        if owner == Owner::Stranger && !*warned {
            *warned = true;
            warn!(worker = %self.worker, upstream = %body.upstream, "another program answers on the worker's address");
            self.tail
                .push(format!("another program answers on {}", body.upstream));
        }
        owner != Owner::Stranger
    }

    async fn serving(&mut self, body: &mut Body, used: &mut Used) -> End {
        loop {
            tokio::select! {
                _ = body.process.exited() => return End::ByItself,
                () = stopped(&mut self.stop) => return End::Asked,
                () = body.log.changed() => {
                    body.log.drain(&self.tail).await;
                }
                files = used.found() => self.say(WorkerEvent::Used {
                    worker: self.worker.clone(),
                    files,
                }),
            }
        }
    }

    /// Stop signal, again half way, and when the grace is over SIGKILL to the
    /// whole tree. What the leader leaves behind gets a little of the grace.
    async fn stopping(&mut self, body: &mut Body) {
        let clock = self.shared.clock;
        let grace = self.spec.stop_timeout;
        let half = clock.instant(clock.now() + grace / 2);
        let end = clock.instant(clock.now() + grace);
        for until in [half, end] {
            if *self.stop.borrow() == Stop::Kill {
                return;
            }
            body.process.signal(self.spec.stop_signal);
            tokio::select! {
                _ = body.process.exited() => break,
                () = killed(&mut self.stop) => return,
                () = tokio::time::sleep_until(until) => {}
            }
        }
        if body.process.left_nothing(&self.shared.leaders) {
            return;
        }
        let stragglers = end.min(clock.instant(clock.now() + STRAGGLERS));
        let mut pause = Duration::from_millis(1);
        while !body.process.members().is_empty() {
            tokio::select! {
                () = killed(&mut self.stop) => return,
                () = tokio::time::sleep_until(stragglers) => return,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(50)),
            }
        }
    }

    fn port_was_taken(&self) -> bool {
        let signs = [
            "address already in use",
            "address in use",
            "eaddrinuse",
            "couldn't bind",
        ];
        self.tail.last(SIGN_LINES).iter().any(|line| {
            let line = line.to_ascii_lowercase();
            signs.iter().any(|sign| line.contains(sign))
        })
    }

    fn say(&self, event: WorkerEvent) {
        // Nobody listens any more when residentd is ending.
        let _ = self.events.send(event);
    }
}

/// Waits until the worker says that it is ready, where it is to say so.
async fn noticed(notices: Option<&Notices>, tree: &ProcessTree) {
    match notices {
        Some(notices) => notices.ready(tree).await,
        None => std::future::pending().await,
    }
}

/// Waits until the worker is to stop.
async fn stopped(stop: &mut watch::Receiver<Stop>) {
    wait_for(stop, Stop::Graceful).await;
}

/// Waits until the worker is to be killed.
async fn killed(stop: &mut watch::Receiver<Stop>) {
    wait_for(stop, Stop::Kill).await;
}

async fn wait_for(stop: &mut watch::Receiver<Stop>, least: Stop) {
    if stop.wait_for(|how| *how >= least).await.is_err() {
        // Whoever could order it is gone: then nobody will.
        std::future::pending::<()>().await;
    }
}

/// What a life holds while its processes run.
struct Body {
    process: Process,
    log: Log,
    upstream: Upstream,
    /// Where it says that it is ready, when it is to say so.
    notices: Option<Notices>,
    /// The connection of the probe that it passed.
    opened: Opened,
    port: Option<Held>,
    socket: Option<PathBuf>,
    report: PathBuf,
}

impl Body {
    fn spawn(
        shared: &Shared,
        worker: &WorkerId,
        (spec, gpus): (&ModelSpec, &[PlacedGpu]),
        hold_port: bool,
    ) -> Result<(i32, Self), String> {
        let mut port = command::uses(spec, "PORT")
            .then(|| shared.ports.take())
            .transpose()
            .map_err(text)?;
        if let Some(held) = port.as_mut().filter(|_| !hold_port) {
            held.release();
        }
        let socket = command::uses(spec, "SOCKET")
            .then(|| shared.socket())
            .transpose()?;
        let names = Names {
            port: port.as_ref().map(|held| held.port),
            socket: socket.as_deref(),
            gpus,
        };
        let report = shared.own_file("reports")?;
        let notices = matches!(spec.ready, ReadyCheck::Notify)
            .then(|| Notices::listen(shared.socket()?).map_err(text))
            .transpose()?;
        let launch = Launch::new(spec, names)?;
        let failed = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
        let mut log = Log::open(&shared.state_dir, spec.name.as_str(), shared.log_cap)
            .map_err(failed("open its log"))?;
        log.note(&format!("--- {worker} starts: {} ---", launch.program()))
            .map_err(failed("write its log"))?;
        // Before the spawn, so that a worker that ends at once loses no line.
        log.skip();
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
        if let Ok(pid) = i32::try_from(child.id())
            && let Err(error) = shared.marks.stamp(pid, &mark)
        {
            debug!(%worker, %error, "not stamped; a daemon that renames itself may be missed");
        }
        let process = Process::adopt(child.id(), mark, Arc::clone(&shared.marks))
            .map_err(failed("take charge of it"))?;
        leaders.insert(process.pid(), Arc::clone(&process.tree));
        drop(leaders);
        let pid = process.pid();
        // Best effort: raising it needs no right, but it may be gone already.
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE_ADJ);
        Ok((
            pid,
            Self {
                process,
                log,
                upstream: launch.upstream,
                notices,
                opened: Opened::default(),
                port,
                socket,
                report,
            },
        ))
    }
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
