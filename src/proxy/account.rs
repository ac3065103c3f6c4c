//! The one place where a request's end is recorded.

use std::time::Duration;

use tracing::debug;

use super::access::{AccessLog, Line};
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
    stream: bool,
    end: End,
    log: Option<AccessLog>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Left,
    Whole,
    Broke,
    Late,
}

impl End {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Whole => "whole",
            Self::Broke => "broke",
            Self::Late => "late",
        }
    }
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
            stream: false,
            end: End::Left,
            log: None,
        }
    }

    /// Also writes it to this access log.
    pub(super) fn logged(mut self, log: Option<AccessLog>) -> Self {
        self.log = log;
        self
    }

    /// The answer is a stream of events.
    pub(super) fn streams(&mut self) {
        self.stream = true;
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

    pub(super) fn late(&mut self) {
        self.end = End::Late;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let took = self.clock.now().since(self.began);
        if let Some(log) = self.log.take() {
            log.write(Line {
                time: self.clock.unix(self.began),
                model: self.worker.model.to_string(),
                generation: Some(self.worker.generation),
                status: self.status,
                code: None,
                wait_s: self.waited.as_secs_f64(),
                duration_s: took.saturating_sub(self.waited).as_secs_f64(),
                bytes: self.bytes,
                stream: self.stream,
                end: self.end.as_str(),
            });
        }
        debug!(
            worker = %self.worker,
            status = self.status,
            bytes = self.bytes,
            waited_ms = self.waited.as_secs_f64() * 1e3,
            took_ms = took.as_secs_f64() * 1e3,
            end = ?self.end,
            "request"
        );
    }
}
