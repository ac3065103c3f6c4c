//! Writes decisions down, so that the next residentd can still tell of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::api::{self, Past};
use crate::clock::Clock;
use crate::control::{Controller, Decisions, KEPT, Wanted};
use crate::store::Store;
use crate::telemetry;

/// Decisions made within this time are written together.
const BATCH: Duration = Duration::from_millis(250);

/// Follows the record of decisions.
#[derive(Debug)]
pub(super) struct Keeper {
    decisions: Decisions,
    clock: Clock,
    store: Store,
    /// Everything up to this one is on its way to the disk.
    seen: Mutex<u64>,
}

/// Returns the number that the next decision gets.
pub(super) fn next_id(store: &Store) -> u64 {
    let last = store.decisions().last().map_or(0, |(id, _)| *id);
    let begun = store.runs().values().copied().max().unwrap_or(1);
    begun.max(last + 1)
}

/// Returns what earlier runs left.
pub(super) fn past(store: &Store) -> Past {
    let events = store.decisions().iter();
    let events = events.map(|(id, text)| (*id, text.as_str()));
    Past::read(events, store.runs().clone())
}

impl Keeper {
    /// Starts to follow.
    pub(super) fn start(controller: &Controller, store: Store) -> Arc<Self> {
        let first = next_id(&store);
        let decisions = controller.decisions();
        store.keep_run(decisions.epoch(), first);
        let keeper = Arc::new(Self {
            decisions: decisions.clone(),
            clock: controller.clock(),
            store,
            seen: Mutex::new(first - 1),
        });
        telemetry::spawn("decisions", {
            let keeper = Arc::clone(&keeper);
            let mut decisions = decisions;
            async move {
                let mut seen = first - 1;
                while decisions.wait_after(seen).await {
                    tokio::time::sleep(BATCH).await;
                    seen = keeper.keep();
                }
            }
        });
        keeper
    }

    /// Hands over what is new. Returns the number of the newest.
    pub(super) fn keep(&self) -> u64 {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.decisions.after(*seen, &Wanted::default(), KEPT);
        let texts = found.decisions.iter();
        let texts = texts.map(|each| (each.id, api::written(each, self.clock)));
        self.store.keep_decisions(texts);
        *seen = found.seen;
        *seen
    }
}
