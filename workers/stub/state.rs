//! What all connections of one worker share: its arguments, its memory and its
//! books.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::args::Args;
use crate::memory::Memory;
use crate::sleep::Sleep;

/// The last answer leaves within this time.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(20);

/// One stub worker.
#[derive(Debug)]
pub(crate) struct Stub {
    pub(crate) args: Args,
    pub(crate) memory: Memory,
    pub(crate) sleep: Sleep,
    pub(crate) children: Vec<u32>,
    /// Cancelled when no new connection is to be taken.
    pub(crate) closing: CancellationToken,
    /// Changes whenever a request ended.
    pub(crate) request_ended: watch::Sender<()>,
    ready: AtomicBool,
    ready_at_ns: AtomicU64,
    connections: AtomicU64,
    probes: AtomicU64,
    started: AtomicU64,
    served: AtomicU64,
    cancelled: AtomicU64,
}

impl Stub {
    pub(crate) fn new(args: Args, children: Vec<u32>) -> Self {
        Self {
            args,
            memory: Memory::default(),
            sleep: Sleep::default(),
            children,
            closing: CancellationToken::new(),
            request_ended: watch::Sender::new(()),
            ready: AtomicBool::new(false),
            ready_at_ns: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            probes: AtomicU64::new(0),
            started: AtomicU64::new(0),
            served: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
        }
    }

    /// Makes the worker ready, which became so at this monotonic time.
    pub(crate) fn set_ready(&self, monotonic_ns: u64) {
        self.ready_at_ns.store(monotonic_ns, Ordering::Relaxed);
        self.ready.store(true, Ordering::Release);
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    pub(crate) fn count_connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_probe(&self) {
        self.probes.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the number of requests that were answered to their end.
    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Returns the number of requests that began and did not end.
    pub(crate) fn in_flight(&self) -> u64 {
        let ended = self.served() + self.cancelled.load(Ordering::Relaxed);
        self.started.load(Ordering::Relaxed).saturating_sub(ended)
    }

    /// Opens the books for one request, which is the n-th from 1.
    pub(crate) fn begin(self: &Arc<Self>) -> InFlight {
        let number = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        self.memory.grow(self.args.grow, self.args.grow_max);
        InFlight {
            stub: Arc::clone(self),
            number,
            finished: false,
        }
    }

    /// Waits until this many requests were answered and the last answer has
    /// left; for ever without a number.
    pub(crate) async fn answered(&self, most: Option<u64>) {
        let Some(most) = most else {
            return std::future::pending().await;
        };
        let mut ended = self.request_ended.subscribe();
        // The sender lives in `self`, so this cannot fail.
        let _ = ended.wait_for(|()| self.served() >= most).await;
        sleep(LAST_WORDS).await;
    }

    /// Returns the books, for `GET /stats`.
    pub(crate) fn stats(&self) -> Value {
        json!({
            "name": self.args.name,
            "pid": std::process::id(),
            "children": self.children,
            "ready": self.is_ready(),
            "ready_monotonic_ns": self.ready_at_ns.load(Ordering::Relaxed),
            "connections": self.connections.load(Ordering::Relaxed),
            "probes": self.probes.load(Ordering::Relaxed),
            "requests": self.started.load(Ordering::Relaxed),
            "served": self.served(),
            "cancelled": self.cancelled.load(Ordering::Relaxed),
            "in_flight": self.in_flight(),
            "grown_bytes": self.memory.grown(),
            "sleep": self.sleep.stats(),
        })
    }
}

/// One request between its head and the end of its answer. Dropped before
/// [`InFlight::finish`] it counts as cancelled: the client left.
#[derive(Debug)]
pub(crate) struct InFlight {
    stub: Arc<Stub>,
    number: u64,
    finished: bool,
}

impl InFlight {
    /// Returns which request this is, from 1.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Marks the answer as whole, or as broken off by the worker itself.
    pub(crate) fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let book = if self.finished {
            &self.stub.served
        } else {
            &self.stub.cancelled
        };
        book.fetch_add(1, Ordering::Relaxed);
        self.stub.request_ended.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn a_request_dropped_before_its_end_counts_as_cancelled() {
        let stub = Arc::new(Stub::new(Args::parse_from(["stub-worker"]), Vec::new()));
        let mut whole = stub.begin();
        let cut = stub.begin();
        assert_eq!((whole.number(), cut.number(), stub.in_flight()), (1, 2, 2));
        whole.finish();
        drop(whole);
        drop(cut);
        let stats = stub.stats();
        assert_eq!(stats["served"], 1);
        assert_eq!(stats["cancelled"], 1);
        assert_eq!(stats["in_flight"], 0);
    }

    #[test]
    fn growth_stops_at_its_most() {
        let args = ["stub-worker", "--grow=1MiB", "--grow-max=2MiB"];
        let stub = Arc::new(Stub::new(Args::parse_from(args), Vec::new()));
        for _ in 0..5 {
            stub.begin().finish();
        }
        assert_eq!(stub.stats()["grown_bytes"], 2 << 20);
    }
}
