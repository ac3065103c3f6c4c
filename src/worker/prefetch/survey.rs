//! How much of each model's weights is in the page cache, looked at from time
//! to time by a thread of its own.
//!
//! A look costs up to 90 ms for each GiB that is cached, so looking takes at
//! most one part in [`REST`] of the time, and one in [`HURRY`] when something
//! has changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::watch;
use tracing::warn;

use super::cached::cached;
use super::files::Files;
use super::job;
use crate::clock::{Clock, Timestamp};
use crate::model::{Bytes, ModelName};

/// At least this long between two looks when nothing was said to have changed.
const EVERY: Duration = Duration::from_secs(30);
/// So many times as long as a look took is rested after it.
const REST: u32 = 500;
/// The same when something has changed.
const HURRY: u32 = 50;
/// Changes said at once are looked at together.
const TOGETHER: Duration = Duration::from_millis(100);
/// Questions to the kernel are at most about this much of a file.
const WINDOW: u64 = 1 << 30;

/// What is cached of one model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cached {
    /// Bytes in the page cache; `None` where the kernel does not tell.
    pub bytes: Option<Bytes>,
    /// Size of the files.
    pub size: Bytes,
}

/// The newest look at each model.
pub type CachedModels = Arc<BTreeMap<ModelName, Cached>>;

/// Looks at files. Ends when this is dropped.
#[derive(Debug)]
pub struct Survey {
    wishes: mpsc::SyncSender<Wish>,
    found: watch::Receiver<CachedModels>,
}

enum Wish {
    /// From now on these.
    Models(BTreeMap<ModelName, Vec<PathBuf>>),
    /// Something has changed.
    Again,
}

impl Survey {
    /// Starts the thread; without one nothing is ever known.
    #[must_use]
    pub fn start(clock: Clock) -> Self {
        // Reloads are rare, and one "again" more says nothing new.
        let (wishes, inbox) = mpsc::sync_channel(64);
        let (publish, found) = watch::channel(CachedModels::default());
        let thread = std::thread::Builder::new().name("survey".into());
        if let Err(error) = thread.spawn(move || run(&inbox, &publish, clock)) {
            warn!(%error, "no thread to look at the page cache with");
        }
        Self { wishes, found }
    }

    /// Names the weight files of every model.
    pub fn look_at(&self, models: BTreeMap<ModelName, Vec<PathBuf>>) {
        if self.wishes.try_send(Wish::Models(models)).is_err() {
            warn!("what is cached of models is no longer looked at");
        }
    }

    /// Says that something has changed.
    pub fn again(&self) {
        // A full queue holds one already.
        let _ = self.wishes.try_send(Wish::Again);
    }

    /// Returns what was found last. Never waits.
    #[must_use]
    pub fn found(&self) -> CachedModels {
        self.found.borrow().clone()
    }
}

fn run(inbox: &mpsc::Receiver<Wish>, publish: &watch::Sender<CachedModels>, clock: Clock) {
    job::give_way(false);
    let mut models = BTreeMap::new();
    let (mut soonest, mut latest) = (clock.now(), clock.now() + EVERY);
    loop {
        let changed = match inbox.recv_timeout(latest.since(clock.now())) {
            Ok(wish) => Some(wish),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        };
        if let Some(wish) = changed {
            soonest = soonest.max(clock.now() + TOGETHER);
            if !gather(inbox, wish, &mut models, (soonest, clock)) {
                return;
            }
        }
        let began = clock.now();
        let found = models
            .iter()
            .map(|(name, files)| (ModelName::clone(name), look(files)));
        let found = Arc::new(found.collect::<BTreeMap<_, _>>());
        publish.send_if_modified(|last| {
            let differs = *last != found;
            *last = found;
            differs
        });
        let took = clock.now().since(began);
        soonest = clock.now() + took * HURRY;
        latest = clock.now() + EVERY.max(took * REST);
    }
}

/// Takes wishes until `soonest`; false when there can be no more.
fn gather(
    inbox: &mpsc::Receiver<Wish>,
    first: Wish,
    models: &mut BTreeMap<ModelName, Vec<PathBuf>>,
    (soonest, clock): (Timestamp, Clock),
) -> bool {
    let mut wish = first;
    loop {
        if let Wish::Models(new) = wish {
            *models = new;
        }
        wish = match inbox.recv_timeout(soonest.since(clock.now())) {
            Ok(next) => next,
            Err(mpsc::RecvTimeoutError::Timeout) => return true,
            Err(mpsc::RecvTimeoutError::Disconnected) => return false,
        };
    }
}

fn look(paths: &[PathBuf]) -> Cached {
    let files = Files::look(paths);
    let of_file = |(path, size): (&std::path::Path, u64)| -> Option<Bytes> {
        let file = File::open(path).ok()?;
        let begins = (0..size.div_ceil(WINDOW)).map(|index| index * WINDOW);
        begins
            .map(|offset| cached(&file, offset, WINDOW.min(size - offset)))
            .sum()
    };
    let known: Option<Bytes> = files.each().map(of_file).sum();
    Cached {
        bytes: known.filter(|_| !paths.is_empty()),
        size: files.size(),
    }
}
