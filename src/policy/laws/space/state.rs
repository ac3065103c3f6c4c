//! One state of a small world, what may happen in it, and what it is judged by.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::super::*;
use super::super::court::Court;
use super::super::{MODELS, Move, digest};

/// Nothing has a deadline so soon after a second begins: see [`State::pass`].
const MOMENTS: Duration = Duration::from_millis(400);

/// How often things may happen that nobody owes: after that they do not.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct Budget {
    /// Requests, by the gate or by the controller.
    pub requests: u8,
    /// Whatever else: clients that leave or are left to their deadlines,
    /// workers that crash or are never ready, orders of operators, requests
    /// that slip in before a gate closes, VRAM that is late.
    pub unusual: u8,
}

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Happening {
    Request(usize),
    /// A request that the policy does not hear of, as on the proxy's fast path.
    Enter(usize),
    /// The client of the nth open ticket leaves.
    Gone(usize),
    Load(usize),
    Unload(usize),
    Pin(usize, bool),
    Shutdown,
    Ready(usize),
    NeverReady(usize),
    /// A worker that was told to end is gone.
    Ends(usize),
    /// The same, and the driver keeps its VRAM for a while.
    EndsLate(usize),
    /// A worker ends that nobody told to.
    Crash(usize),
    Leave(usize),
    GivenBack,
    Measure,
    /// Somebody will be inside when the next eviction comes to its gate.
    Race,
    /// Time passes until something is due.
    Time,
    /// Time passes until a waiter's is up.
    TooLate,
}

impl Happening {
    /// Returns whether it happens sooner or later when nobody wants anything
    /// new: workers do what they are told, requests end, time passes.
    pub(super) fn is_owed(self) -> bool {
        match self {
            Self::Ready(_)
            | Self::Ends(_)
            | Self::Leave(_)
            | Self::GivenBack
            | Self::Measure
            | Self::Time => true,
            Self::Request(_)
            | Self::Enter(_)
            | Self::Gone(_)
            | Self::Load(_)
            | Self::Unload(_)
            | Self::Pin(..)
            | Self::Shutdown
            | Self::NeverReady(_)
            | Self::EndsLate(_)
            | Self::Crash(_)
            | Self::Race
            | Self::TooLate => false,
        }
    }

    /// Returns whose budget it takes from.
    fn taken_from(self, left: &mut Budget) -> Option<&mut u8> {
        match self {
            Self::Request(_) | Self::Enter(_) => Some(&mut left.requests),
            Self::Gone(_)
            | Self::NeverReady(_)
            | Self::Crash(_)
            | Self::Load(_)
            | Self::Unload(_)
            | Self::Pin(..)
            | Self::Shutdown
            | Self::Race
            | Self::EndsLate(_)
            | Self::TooLate => Some(&mut left.unusual),
            Self::Ready(_)
            | Self::Ends(_)
            | Self::Leave(_)
            | Self::GivenBack
            | Self::Measure
            | Self::Time => None,
        }
    }

    /// Says what happens, with the models' names.
    pub(super) fn in_words(self) -> String {
        let of = |verb: &str, m: usize| format!("{verb} {}", MODELS[m]);
        match self {
            Self::Request(m) => of("request", m),
            Self::Enter(m) => of("request by the gate alone:", m),
            Self::Gone(nth) => format!("the client of waiter {nth} leaves"),
            Self::Load(m) => of("load", m),
            Self::Unload(m) => of("unload", m),
            Self::Pin(m, true) => of("pin", m),
            Self::Pin(m, false) => of("unpin", m),
            Self::Shutdown => "shut down".to_owned(),
            Self::Ready(m) => of("ready:", m),
            Self::NeverReady(m) => of("never ready:", m),
            Self::Ends(m) => of("told to end, gone:", m),
            Self::EndsLate(m) => of("told to end, gone, its VRAM late:", m),
            Self::Crash(m) => of("crash:", m),
            Self::Leave(m) => of("a request leaves", m),
            Self::GivenBack => "the driver gives VRAM back".to_owned(),
            Self::Measure => "memory is measured".to_owned(),
            Self::Race => "somebody is about to enter a gate".to_owned(),
            Self::Time => "time passes".to_owned(),
            Self::TooLate => "time passes until a waiter's is up".to_owned(),
        }
    }
}

/// One state.
#[derive(Clone)]
pub(super) struct State {
    pub court: Court,
    pub left: Budget,
}

impl State {
    /// Returns what tells it from others.
    pub(super) fn key(&self) -> u128 {
        digest::key(&self.court, self.left)
    }

    /// Returns whether somebody waits for an answer.
    pub(super) fn is_open(&self) -> bool {
        self.court.open().next().is_some()
    }

    /// Returns everything that may happen next.
    pub(super) fn possible(&self) -> Vec<Happening> {
        let policy = &self.court.world.policy;
        let mut all = Vec::new();
        for (m, model) in policy.models().values().enumerate() {
            self.of_model(m, model, &mut all);
        }
        all.extend((0..self.court.open().count()).map(Happening::Gone));
        if !self.court.world.late.is_empty() {
            all.push(Happening::GivenBack);
        }
        all.extend([Happening::Shutdown, Happening::Measure, Happening::Race]);
        if let Some(wake) = self.wake() {
            let waiters = policy.models().values().flat_map(|m| &m.queue);
            let first = waiters.map(|w| w.deadline).min();
            let in_time = first.is_none_or(|at| wake + Duration::from_secs(3) < at);
            all.push(if in_time {
                Happening::Time
            } else {
                Happening::TooLate
            });
        }
        let mut left = self.left;
        let race = self.court.race;
        let down = policy.is_draining();
        all.retain(|happening| {
            let affordable = happening.taken_from(&mut left).is_none_or(|left| *left > 0);
            affordable
                && !(race && *happening == Happening::Race)
                && !(down && *happening == Happening::Shutdown)
        });
        all
    }

    fn of_model(&self, m: usize, model: &ModelState, all: &mut Vec<Happening>) {
        all.extend([
            Happening::Request(m),
            Happening::Load(m),
            Happening::Unload(m),
        ]);
        all.push(Happening::Pin(m, !model.pinned));
        let gate = self.court.world.inside.get(&model.worker());
        if gate.is_some_and(|gate| gate.inside > 0) {
            all.push(Happening::Leave(m));
        }
        match model.phase {
            Phase::Starting => {
                all.extend([
                    Happening::Ready(m),
                    Happening::NeverReady(m),
                    Happening::Crash(m),
                ]);
            }
            Phase::Ready => {
                all.push(Happening::Crash(m));
                if model.queue.is_empty() {
                    all.push(Happening::Enter(m));
                }
            }
            Phase::Draining => all.push(Happening::Crash(m)),
            Phase::Stopping => {
                all.push(Happening::Ends(m));
                let world = &self.court.world;
                let placed = world.placed.get(&model.worker());
                let has_vram = placed.is_some_and(|gpus| !gpus.is_empty());
                if has_vram && world.holding.contains(&model.worker()) {
                    all.push(Happening::EndsLate(m));
                }
            }
            Phase::Parking | Phase::Parked | Phase::Unparking => {
                unreachable!("no model parks here")
            }
            Phase::Stopped | Phase::Backoff | Phase::Failed => {}
        }
    }

    /// Lets it happen, and judges what comes of it.
    pub(super) fn play(&mut self, happening: Happening) {
        if let Some(left) = happening.taken_from(&mut self.left) {
            *left -= 1;
        }
        let court = &mut self.court;
        court.world.pass(Duration::from_millis(1));
        match happening {
            Happening::Request(m) => court.play(&Move::Acquire(m)),
            Happening::Enter(m) => court.play(&Move::Enter(m)),
            Happening::Gone(nth) => court.play(&Move::Cancel(nth)),
            Happening::Load(m) => court.play(&Move::Load(m)),
            Happening::Unload(m) => court.play(&Move::Unload(m)),
            Happening::Pin(m, pinned) => court.play(&Move::Pin(m, pinned)),
            Happening::Shutdown => {
                let until = court.world.now + Duration::from_millis(3_500);
                court.step(Event::Shutdown { until });
            }
            Happening::Ready(m) => court.play(&Move::Ready(m)),
            Happening::NeverReady(m) => court.play(&Move::NeverReady(m)),
            Happening::Ends(m) | Happening::Crash(m) => court.play(&Move::Exit(m)),
            Happening::EndsLate(m) => {
                let worker = court.world.worker(MODELS[m]);
                for gpu in court.world.placed[&worker].clone() {
                    let mib = court.world.vram[&worker.model];
                    court.world.late.insert(gpu, mib);
                }
                court.play(&Move::Exit(m));
            }
            Happening::Leave(m) => court.play(&Move::Leave(m)),
            Happening::GivenBack => {
                court.world.late.clear();
                court.measure();
            }
            Happening::Measure => court.measure(),
            Happening::Race => court.race = true,
            Happening::Time | Happening::TooLate => self.pass(),
        }
        self.judge();
    }

    /// When something is due: the policy wants to be woken, or a model's rest
    /// after a failure is over.
    fn wake(&self) -> Option<Timestamp> {
        let world = &self.court.world;
        let resting = world.policy.models().values();
        let resting = resting.filter(|m| matches!(m.phase, Phase::Backoff | Phase::Failed));
        let rested = resting.filter_map(|m| m.failures.retry_at);
        let rested = rested.filter(|at| *at > world.now);
        rested.chain(world.policy.next_wake()).min()
    }

    /// Lets time pass until after what is due, to the beginning of a second in
    /// whose first moments nothing is due: all that happens until time passes
    /// again happens in these, so that it comes before every deadline.
    fn pass(&mut self) {
        let mut wake = self.wake();
        while let Some(due) = wake {
            let now = self.court.world.now.max(due);
            let second = now.since_start().as_secs() + 1;
            self.court.world.now = Timestamp::from_start(Duration::from_secs(second));
            self.court.step(Event::Tick);
            let (now, next) = (self.court.world.now, self.wake());
            assert!(
                next.is_none_or(|next| next > now),
                "the policy was woken, and still wants to be at {next:?}"
            );
            self.court.measure();
            let now = self.court.world.now;
            wake = self.wake().filter(|next| *next <= now + MOMENTS);
        }
    }

    /// What holds in every state, beside what the court says of every effect.
    fn judge(&self) {
        let world = &self.court.world;
        let models = || world.policy.models().values();
        let waiting = models().flat_map(|m| m.queue.iter().map(|w| w.ticket));
        let unloading = models().flat_map(|m| m.unloading.iter().copied());
        let known: BTreeSet<_> = waiting.chain(unloading).collect();
        let open: BTreeSet<_> = self.court.open().collect();
        assert_eq!(known, open, "tickets that the policy knows, and open ones");
        let alive: BTreeSet<_> = models()
            .filter(|m| m.is_live())
            .map(ModelState::name)
            .collect();
        let processes: BTreeSet<_> = self.court.live.keys().collect();
        assert_eq!(
            alive, processes,
            "workers that the policy knows, and processes"
        );
        // The truth, whatever the books say: what all processes hold or will hold.
        let held: u64 = processes.iter().map(|name| world.size[*name]).sum();
        let limit = world.policy.domains()[&Domain::Host].limit;
        assert!(
            Bytes::mib(held) <= limit,
            "processes take {held} MiB of {limit}"
        );
        for (gpu, total) in (0..).zip(&world.gpus) {
            let on_it = |m: &&ModelState| {
                let placed = world.placed.get(&m.worker());
                m.is_live() && placed.is_some_and(|gpus| gpus.contains(&gpu))
            };
            let held: u64 = models().filter(on_it).map(|m| world.vram[m.name()]).sum();
            assert!(
                held <= *total,
                "processes take {held} MiB of {total} on GPU {gpu}"
            );
        }
    }
}
