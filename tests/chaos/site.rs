//! What all threads of a run share: where residentd is, what was done to whom
//! and when, and what was found broken.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::support::{now, request};

/// For ever, as far as a run goes.
const NO_END: Duration = Duration::MAX;
/// Faults after which more would say nothing new.
const MOST_FAULTS: usize = 20;

/// What was done, by what may come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blow {
    /// A worker died, stopped or hung.
    Worker,
    /// Workers cannot start.
    Start,
    /// The model is not configured, or differently.
    Changed,
    /// An operator unloaded it.
    Unloaded,
    /// An operator pinned it.
    Pinned,
    /// The kernel, or residentd for want of headroom, may end anybody.
    Memory,
    /// The limit is or was below what is used.
    Limit,
    /// What is to be written may be lost.
    Disk,
    /// residentd refuses because it ends.
    Draining,
    /// residentd does not run.
    Down,
    /// residentd is stopped.
    Paused,
}

#[derive(Debug)]
struct Interval {
    /// Whose; `None`: everybody's.
    model: Option<&'static str>,
    blow: Blow,
    from: Duration,
    to: Duration,
}

/// The shared state of one run.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) seed: u64,
    pub(crate) folder: PathBuf,
    /// Set when deeds and requests are to end.
    pub(crate) over: AtomicBool,
    /// How often residentd was started.
    pub(crate) lives: AtomicU64,
    address: Mutex<String>,
    #[expect(clippy::disallowed_types, reason = "a run is measured from outside")]
    started: std::time::Instant,
    blows: Mutex<Vec<Interval>>,
    diary: Mutex<Vec<String>>,
    faults: Mutex<Vec<String>>,
    tallies: Mutex<BTreeMap<String, u64>>,
    answered: Mutex<BTreeMap<u64, i64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Site {
    pub(crate) fn new(seed: u64, folder: PathBuf, address: &str) -> Self {
        Self {
            seed,
            folder,
            over: AtomicBool::new(false),
            lives: AtomicU64::new(1),
            address: Mutex::new(address.to_owned()),
            started: now(),
            blows: Mutex::default(),
            diary: Mutex::default(),
            faults: Mutex::default(),
            tallies: Mutex::default(),
            answered: Mutex::default(),
        }
    }

    /// Returns the time since the start of the run.
    pub(crate) fn time(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(crate) fn address(&self) -> String {
        lock(&self.address).clone()
    }

    pub(crate) fn moved_to(&self, address: &str) {
        address.clone_into(&mut lock(&self.address));
    }

    /// Notes a blow that may show for so long from now on. Called before it
    /// falls.
    pub(crate) fn strike(&self, model: Option<&'static str>, blow: Blow, shows: Duration) {
        let from = self.time();
        let to = from.saturating_add(shows);
        lock(&self.blows).push(Interval {
            model,
            blow,
            from,
            to,
        });
    }

    /// Notes a blow that lasts until [`Site::heal`].
    pub(crate) fn strike_until_healed(&self, blow: Blow) {
        self.strike(None, blow, NO_END);
    }

    /// Ends blows of this kind, which may show for so long still.
    pub(crate) fn heal(&self, blow: Blow, shows: Duration) {
        let end = self.time() + shows;
        for interval in lock(&self.blows).iter_mut() {
            if interval.blow == blow && interval.to == NO_END {
                interval.to = end;
            }
        }
    }

    /// Returns whether any of these blows at the model, or at all, showed in
    /// this time.
    pub(crate) fn struck(
        &self,
        model: Option<&str>,
        blows: &[Blow],
        (from, to): (Duration, Duration),
    ) -> bool {
        lock(&self.blows).iter().any(|interval| {
            blows.contains(&interval.blow)
                && (interval.model.is_none() || model.is_none() || interval.model == model)
                && interval.from <= to
                && from <= interval.to
        })
    }

    /// Writes down what is done.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        let line = format!("{:8.3} {}", self.time().as_secs_f64(), text.as_ref());
        lock(&self.diary).push(line);
    }

    /// Writes down a broken invariant.
    pub(crate) fn fault(&self, text: impl AsRef<str>) {
        self.note(format!("BROKEN {}", text.as_ref()));
        let line = format!("{:8.3} {}", self.time().as_secs_f64(), text.as_ref());
        let mut faults = lock(&self.faults);
        faults.push(line);
        if faults.len() >= MOST_FAULTS {
            self.over.store(true, Ordering::Relaxed);
        }
    }

    /// Notes which process answered the request with this number.
    pub(crate) fn answered(&self, number: u64, pid: i64) {
        lock(&self.answered).insert(number, pid);
    }

    /// Returns who answered each request.
    pub(crate) fn all_answered(&self) -> BTreeMap<u64, i64> {
        lock(&self.answered).clone()
    }

    pub(crate) fn count(&self, what: impl Into<String>) {
        *lock(&self.tallies).entry(what.into()).or_default() += 1;
    }

    pub(crate) fn counted(&self, what: &str) -> u64 {
        lock(&self.tallies).get(what).copied().unwrap_or(0)
    }

    pub(crate) fn tallies(&self) -> BTreeMap<String, u64> {
        lock(&self.tallies).clone()
    }

    pub(crate) fn faults(&self) -> Vec<String> {
        lock(&self.faults).clone()
    }

    /// Returns the last so many lines of the diary.
    pub(crate) fn diary(&self, last: usize) -> String {
        let diary = lock(&self.diary);
        let mut text = String::new();
        for line in &diary[diary.len().saturating_sub(last)..] {
            let _ = writeln!(text, "{line}");
        }
        text
    }

    /// Asks the API, when residentd is there; `None` without an answer.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Option<(u16, Value)> {
        let answer = request(&self.address(), method, path, body).ok()?;
        let value = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
        answer.complete.then_some((answer.status, value))
    }

    /// Returns what the API says of all models.
    pub(crate) fn models(&self) -> Option<Vec<Value>> {
        let (status, answer) = self.ask("GET", "/api/v1/memory/models", None)?;
        let models = answer["data"]["models"].as_array().cloned();
        models.filter(|_| status == 200)
    }
}
