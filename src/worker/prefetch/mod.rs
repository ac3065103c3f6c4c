//! Reads a model's files into the page cache before its worker asks for them,
//! and tells how much of them is there.
//!
//! Who orders it says how much memory is to spare and corrects that while it
//! goes on; before each piece it is looked whether any is left, and whether it
//! is still wanted. Nothing is decided here.

mod cached;
mod files;
mod job;
mod survey;
mod used;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::warn;

use self::files::Files;
use self::job::Control;
pub use self::survey::{Cached, CachedModels, Survey};
pub(super) use self::used::Used;
use super::WorkerEvent;
use crate::clock::Clock;
use crate::model::{Bytes, ModelName, PrefetchEnd, PrefetchReason};

/// What to read, and how much of it.
#[derive(Clone, Debug)]
pub struct PrefetchOrder {
    /// Told apart from every other order.
    pub number: u64,
    /// For which model.
    pub model: ModelName,
    /// Why; somebody waits unless it is idle time.
    pub reason: PrefetchReason,
    /// What to read, in this order.
    pub files: Vec<PathBuf>,
    /// At most so much.
    pub most: Bytes,
    /// Memory that is to spare beyond all that is needed; nothing is read while
    /// there is none.
    pub spare: Bytes,
}

/// What became of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefetchReport {
    /// Of the order.
    pub number: u64,
    /// For which model.
    pub model: ModelName,
    /// Why.
    pub reason: PrefetchReason,
    /// Of all files together.
    pub size: Bytes,
    /// Was in the page cache already, as far as it was looked.
    pub found: Bytes,
    /// Was read; where the kernel does not tell what is cached, that as well.
    pub read: Bytes,
    /// How long it took.
    pub took: Duration,
    /// How it ended.
    pub end: PrefetchEnd,
}

/// An order that is carried out. Called off by dropping it.
#[derive(Debug)]
pub struct Prefetching(Arc<Control>);

impl Prefetching {
    /// Starts to read and returns at once; the report comes as an event,
    /// exactly once, also when it was called off.
    #[must_use]
    pub fn start(
        order: PrefetchOrder,
        clock: Clock,
        events: mpsc::UnboundedSender<WorkerEvent>,
    ) -> Self {
        let control = Arc::new(Control::new(order.spare));
        let shared = Arc::clone(&control);
        // A disk that hangs must hold up nobody else, so a thread of its own.
        let thread = std::thread::Builder::new().name("prefetch".into());
        let started = thread.spawn(move || {
            let report = carry_out(order, &shared, clock);
            // Nobody listens any more when residentd is ending.
            let _ = events.send(WorkerEvent::Prefetched(report));
        });
        if let Err(error) = started {
            warn!(%error, "no thread to read files ahead with");
        }
        Self(control)
    }

    /// Says how much memory is to spare now.
    pub fn set_spare(&self, spare: Bytes) {
        self.0.set_spare(spare);
    }
}

impl Drop for Prefetching {
    fn drop(&mut self) {
        self.0.call_off();
    }
}

fn carry_out(order: PrefetchOrder, control: &Control, clock: Clock) -> PrefetchReport {
    let began = clock.now();
    let files = Files::look(&order.files);
    let urgent = order.reason != PrefetchReason::Idle;
    let outcome = job::read(&files, order.most, control, urgent);
    PrefetchReport {
        number: order.number,
        model: order.model,
        reason: order.reason,
        size: outcome.size,
        found: outcome.found,
        read: outcome.read,
        took: clock.now().since(began),
        end: outcome.end,
    }
}

#[cfg(test)]
mod tests;
