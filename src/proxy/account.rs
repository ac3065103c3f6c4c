//! The one place where a request's end is recorded.

use std::time::Duration;

use tracing::debug;

use crate::clock::{Clock, Timestamp};
use crate::model::WorkerId;

/// One request, from its arrival to the end of its answer. Dropped early when
/// the client leaves.
#[derive(Debug)]
pub(super) struct Account {
    worker: WorkerId,
    clock: Clock,
    began: Timestamp,
    waited: Duration,
    status: u16,
    bytes: u64,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Left,
    Whole,
    Broke,
}

impl Account {
    /// Begins with the head of the answer; `began` is when the request came,
    /// `leased` when it got its lease.
    pub(super) fn new(
        worker: WorkerId,
        clock: Clock,
        began: Timestamp,
        leased: Timestamp,
        status: u16,
    ) -> Self {
        Self {
            worker,
            clock,
            began,
            waited: leased.since(began),
            status,
            bytes: 0,
            end: End::Left,
        }
    }

    pub(super) fn passed(&mut self, bytes: usize) {
        self.bytes = self
            .bytes
            .saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    pub(super) fn finish(&mut self) {
        self.end = End::Whole;
    }

    pub(super) fn broke(&mut self) {
        self.end = End::Broke;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        debug!(
            worker = %self.worker,
            status = self.status,
            bytes = self.bytes,
            waited_ms = self.waited.as_secs_f64() * 1e3,
            took_ms = self.clock.now().since(self.began).as_secs_f64() * 1e3,
            end = ?self.end,
            "request"
        );
    }
}
