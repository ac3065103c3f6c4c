//! The life of one worker, from spawn to the last reaped process.
//!
//! ```text
//! spawn ── starting ──┬─ ready ──── serving ──┬─ asked to stop ── stopping ──┐
//!                     ├─ never ready ─────────┼──────────────────────────────┤
//!                     └─ ended by itself ─────┴─ ended by itself ────────────┴─ tree gone ── Exited
//! ```

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::adopt::Adoptee;
use super::body::Body;
use super::listener::Doorkeeper;
use super::liveness::Watched;
use super::notify::Notices;
use super::opened::Opened;
use super::orders::{killed, let_go, ordered, stopped};
use super::output::Tail;
use super::prefetch::Used;
use super::{ExitStatus, Residence, Shared, SpawnOrder, Stop, WorkerEvent, park, probe};
use crate::gate::Pulse;
use crate::model::{ModelSpec, PlacedGpu, ReadyCheck, WorkerId};
use crate::procfs::ProcessTree;
use crate::telemetry;

/// The net under the log lines: polls come after 2.5 % of the time waited,
/// within these bounds.
const POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// How long what the leader left behind may take to end by itself after a
/// graceful stop.
const STRAGGLERS: Duration = Duration::from_secs(2);
/// How long a worker that had answered an earlier residentd may take to answer
/// again: it may still be busy with what it was asked then.
const ANSWERS_AGAIN: Duration = Duration::from_secs(10);
/// A worker that was still loading has at least this long.
const LEAST_PATIENCE: Duration = Duration::from_secs(2);
/// Lines searched for the sign that a port was taken.
const SIGN_LINES: usize = 20;

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
    origin: String,
    events: mpsc::UnboundedSender<WorkerEvent>,
    stop: watch::Receiver<Stop>,
    residence: watch::Receiver<Residence>,
    tail: Arc<Tail>,
    pulse: Arc<Pulse>,
}

impl Life {
    pub(super) fn new(
        shared: Arc<Shared>,
        order: SpawnOrder,
        (stop, residence): (watch::Receiver<Stop>, watch::Receiver<Residence>),
        (tail, pulse): (Arc<Tail>, Arc<Pulse>),
    ) -> Self {
        let SpawnOrder {
            worker,
            spec,
            gpus,
            origin,
            events,
        } = order;
        Self {
            shared,
            worker,
            spec,
            gpus: gpus.into(),
            origin,
            events,
            stop,
            residence,
            tail,
            pulse,
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
        self.exited(status);
    }

    /// Goes on with a worker that an earlier residentd spawned, to its end.
    pub(super) async fn go_on(mut self, adoptee: Adoptee) {
        let begun = Begun {
            age: adoptee.age,
            was_ready: adoptee.record.ready,
            is_adopted: true,
            is_vouched_for: adoptee.is_vouched_for,
        };
        let worker = self.worker.clone();
        let status = match Body::adopted(&self.shared, adoptee) {
            Ok(body) => self.lead(body, begun).await.status,
            Err(why) => {
                warn!(%worker, error = why, "worker cannot be taken back");
                self.tail.push(format!("not taken back: {why}"));
                ExitStatus::Unknown
            }
        };
        self.exited(status);
    }

    fn exited(&self, status: ExitStatus) {
        self.say(WorkerEvent::Exited {
            worker: self.worker.clone(),
            status,
            last_lines: self.tail.last(SIGN_LINES),
        });
    }

    /// One try; `None` when the worker ended because its port was taken.
    async fn live(&mut self, hold_port: bool) -> Option<ExitStatus> {
        if *self.stop.borrow() != Stop::Run || self.stop.has_changed().is_err() {
            return Some(ExitStatus::NotSpawned("it was stopped before".into()));
        }
        let body = match self.spawn(hold_port) {
            Ok(body) => body,
            Err(why) => {
                self.tail.push(format!("not spawned: {why}"));
                return Some(ExitStatus::NotSpawned(why));
            }
        };
        let has_port = !body.ports.is_empty();
        let past = self.lead(body, Begun::default()).await;
        let retry = !past.started && hold_port && has_port && self.port_was_taken();
        (!retry).then_some(past.status)
    }

    /// Leads a worker whose processes run to its end.
    async fn lead(&mut self, mut body: Body, begun: Begun) -> Past {
        let mut used = match begun.is_adopted {
            false => Used::watch(Arc::clone(&body.process.tree)),
            // Files that were closed meanwhile are not seen: only a life that is
            // watched from its beginning teaches.
            true => Used::default(),
        };
        self.say(WorkerEvent::Spawned {
            worker: self.worker.clone(),
            tree: Arc::clone(&body.process.tree),
            record: Box::new(body.record.clone()),
        });
        let patience = begun.patience(self.spec.start_timeout);
        let mut stop = self.stop.clone();
        let led = tokio::select! {
            led = self.lead_to_end(&mut body, &mut used, (patience, begun)) => Some(led),
            () = let_go(&mut stop) => None,
        };
        let Some((end, started)) = led else {
            return self.outlive(body).await;
        };
        match end {
            End::Ready | End::ByItself => {}
            End::NeverReady => {
                let (worker, after) = (self.worker.clone(), begun.age + patience);
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
        if let Some(guard) = self.shared.guard.get() {
            guard.forget(body.process.tree.leader());
        }
        for file in body.record.socket.iter().chain([&body.record.report]) {
            // It may never have been made, or taken away by the worker itself.
            let _ = std::fs::remove_file(file);
        }
        Past { status, started }
    }

    /// Waits for it to be ready, and then for its end or the order to end it.
    async fn lead_to_end(
        &mut self,
        body: &mut Body,
        used: &mut Used,
        (patience, begun): (Duration, Begun),
    ) -> (End, bool) {
        let end = match begun.is_vouched_for {
            true => End::Ready,
            false => self.starting(body, patience, begun).await,
        };
        if !matches!(end, End::Ready) {
            return (end, false);
        }
        self.say(WorkerEvent::Ready {
            worker: self.worker.clone(),
            upstream: body.record.upstream.clone(),
            grpc_upstream: body.record.grpc_upstream.clone(),
            opened: std::mem::take(&mut body.opened),
        });
        used.ready();
        (self.serving(body, used).await, true)
    }

    /// Another residentd is in charge of it: it is our child, and reaped when it has
    /// ended; everything else is not ours to do.
    async fn outlive(&self, mut body: Body) -> Past {
        let status = body.process.exited().await;
        self.shared.leaders.lock().remove(&body.process.pid());
        Past {
            status,
            started: true,
        }
    }

    fn spawn(&self, hold_port: bool) -> Result<Body, String> {
        // Opening files and the spawn itself wait for the disk.
        let spawned = telemetry::in_place(|| {
            let placed = (&*self.spec, &*self.gpus);
            Body::spawn(&self.shared, &self.worker, placed, hold_port)
        });
        let (pid, mut body) = spawned?;
        body.record.origin.clone_from(&self.origin);
        debug!(worker = %self.worker, pid, "spawned");
        Ok(body)
    }

    /// Probes until the worker answers, ends, is to stop, or its time is over.
    async fn starting(&mut self, body: &mut Body, patience: Duration, begun: Begun) -> End {
        let was_ready = begun.was_ready;
        let clock = self.shared.clock;
        let since = clock.now();
        let deadline = clock.instant(since + patience);
        let mut doorkeeper = self.doorkeeper(body);
        let mut turns = probe::Turns::default();
        let mut kept = None;
        let tree = Arc::clone(&body.process.tree);
        let spec = Arc::clone(&self.spec);
        loop {
            let waited = clock.now().since(since);
            let poll = (waited / 40).clamp(POLL.0, POLL.1);
            let lines;
            tokio::select! {
                _ = body.process.exited() => return End::ByItself,
                () = stopped(&mut self.stop) => return End::Asked,
                () = tokio::time::sleep_until(deadline) => return self.late(body, begun).await,
                () = noticed(body.notices.as_ref(), &tree) => return End::Ready,
                () = body.log.changed() => lines = body.log.drain(&self.tail).await,
                () = tokio::time::sleep(poll) => lines = body.log.drain(&self.tail).await,
            }
            if was_ready && self.shows_once() && doorkeeper.lets_in() {
                return End::Ready;
            }
            if let ReadyCheck::Log(pattern) = &self.spec.ready {
                // Some print a sign and no end of the line.
                let unfinished = body.log.unfinished();
                let mut printed = lines.iter().chain([&unfinished]);
                if !was_ready && printed.any(|line| pattern.is_match(line)) {
                    return End::Ready;
                }
                continue;
            }
            if body.notices.is_some() {
                continue;
            }
            let asked = async {
                turns.next(clock).await;
                let upstream = &body.record.upstream;
                probe::passes(&spec.ready, upstream, &mut kept, || doorkeeper.lets_in()).await
            };
            let passes = tokio::select! {
                passes = asked => passes,
                _ = body.process.exited() => return End::ByItself,
                () = stopped(&mut self.stop) => return End::Asked,
                () = tokio::time::sleep_until(deadline) => return End::NeverReady,
            };
            if passes {
                body.opened = Opened::new(kept);
                return End::Ready;
            }
        }
    }

    /// Whether a worker shows only once that it is ready: long ago, for one that
    /// was ready already.
    fn shows_once(&self) -> bool {
        matches!(self.spec.ready, ReadyCheck::Log(_) | ReadyCheck::Notify)
    }

    /// What to think of a worker that did not show in time that it is ready. One
    /// that was taken back may have said so while no residentd listened; it is
    /// believed when it accepts a connection.
    async fn late(&self, body: &mut Body, begun: Begun) -> End {
        if !begun.is_adopted || body.notices.is_none() {
            return End::NeverReady;
        }
        let mut kept = None;
        let upstream = &body.record.upstream;
        let mut doorkeeper = self.doorkeeper(body);
        let is_ours = || doorkeeper.lets_in();
        if !probe::passes(&self.spec.ready, upstream, &mut kept, is_ours).await {
            return End::NeverReady;
        }
        body.opened = Opened::new(kept);
        End::Ready
    }

    /// Tells the worker from a stranger on its port.
    fn doorkeeper(&self, body: &Body) -> Doorkeeper {
        let tree = Arc::clone(&body.process.tree);
        Doorkeeper::new(
            self.worker.clone(),
            body.record.upstream.clone(),
            tree,
            &self.tail,
        )
    }

    async fn serving(&mut self, body: &mut Body, used: &mut Used) -> End {
        let watched = Watched {
            worker: self.worker.clone(),
            spec: Arc::clone(&self.spec),
            upstream: body.record.upstream.clone(),
            tree: Arc::clone(&body.process.tree),
            pulse: Arc::clone(&self.pulse),
        };
        let tree = Arc::clone(&body.process.tree);
        let ails = watched.ails(self.shared.clock);
        let mut ails = pin!(ails.fuse());
        loop {
            tokio::select! {
                why = &mut ails => {
                    // What follows is not decided here.
                    let worker = self.worker.clone();
                    self.say(WorkerEvent::Unhealthy { worker, why });
                }
                _ = body.process.exited() => return End::ByItself,
                () = stopped(&mut self.stop) => return End::Asked,
                () = body.log.changed() => {
                    body.log.drain(&self.tail).await;
                }
                // Nothing follows from it; but whoever says more waits when
                // nobody listens.
                () = noticed(body.notices.as_ref(), &tree) => {}
                files = used.found() => self.say(WorkerEvent::Used {
                    worker: self.worker.clone(),
                    files,
                }),
                residence = ordered(&mut self.residence) => {
                    if let Some(end) = self.moving(body, residence).await {
                        return end;
                    }
                }
            }
        }
    }

    /// Parks the worker or makes it ready again, and tells how that went. Returns
    /// how the worker ended, if it did meanwhile or was told to.
    async fn moving(&mut self, body: &mut Body, residence: Residence) -> Option<End> {
        let spec = Arc::clone(&self.spec);
        let upstream = body.record.upstream.clone();
        let mut calls = Box::pin(park::move_to(residence, &spec, &upstream));
        let moved = loop {
            tokio::select! {
                _ = body.process.exited() => return Some(End::ByItself),
                () = stopped(&mut self.stop) => return Some(End::Asked),
                () = body.log.changed() => {
                    body.log.drain(&self.tail).await;
                }
                moved = &mut calls => break moved,
            }
        };
        let worker = self.worker.clone();
        self.say(match (moved, residence) {
            (Ok(()), Residence::Parked) => WorkerEvent::Parked { worker },
            (Ok(()), Residence::Ready) => WorkerEvent::Unparked { worker },
            (Err(error), _) => WorkerEvent::ParkFailed {
                worker,
                said: telemetry::chain(&error).to_string(),
            },
        });
        None
    }

    /// Stop signal, again half way, and when the grace is over SIGKILL to the
    /// whole tree. What the leader leaves behind gets the signal then, and a
    /// little of the grace.
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
        // A wrapper may have gone without a word to the server that it started.
        let mut left = body.process.signal_members(self.spec.stop_signal);
        while !left.is_empty() {
            tokio::select! {
                () = killed(&mut self.stop) => return,
                () = tokio::time::sleep_until(stragglers) => return,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(50)),
            }
            left = body.process.members();
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

/// What an earlier residentd saw of a worker.
#[derive(Clone, Copy, Debug, Default)]
struct Begun {
    age: Duration,
    was_ready: bool,
    is_adopted: bool,
    is_vouched_for: bool,
}

impl Begun {
    /// How long it may take until it answers.
    fn patience(self, start_timeout: Duration) -> Duration {
        match self.was_ready {
            true => ANSWERS_AGAIN,
            // One that is late already gets one probe all the same.
            false => start_timeout.saturating_sub(self.age).max(LEAST_PATIENCE),
        }
    }
}

/// How a life went.
struct Past {
    status: ExitStatus,
    started: bool,
}
