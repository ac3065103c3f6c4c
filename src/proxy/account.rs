//! The one place where a request's end is recorded: in the model's counts, in
//! the access log, in our own log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use tracing::debug;

use super::access::{AccessLog, Line};
use super::ids::{REQUEST_ID, TraceParent};
use super::rpc::Call;
use super::spans::{Ended, Spans, Step};
use crate::clock::{Clock, Timestamp};
use crate::control::{Ending, Lease, ModelRoute, Passed};
use crate::grpc::{self, Code};
use crate::reply::Fault;

/// The status of a request whose client left before there was an answer, as
/// other servers write it.
const LEFT: u16 = 499;
/// The same of a call.
const CANCELLED: u16 = 1;

/// One request for a model, from its arrival to the end of its answer. Dropped
/// early when the client leaves.
#[derive(Debug)]
pub(super) struct Account {
    route: Arc<ModelRoute>,
    clock: Clock,
    log: Option<AccessLog>,
    name: Option<HeaderValue>,
    trace: Option<TraceParent>,
    began: Timestamp,
    /// Since when it waits for a lease, while it does.
    asked: Option<Timestamp>,
    leased: Option<Timestamp>,
    /// How long it waited for leases; worth more than the last one's wait when a
    /// worker broke.
    queued: Option<Duration>,
    is_cold: bool,
    /// The one who has taken over accounts for it.
    is_heirs: bool,
    generation: Option<u64>,
    status: Option<u16>,
    code: Option<&'static str>,
    call: Option<Call>,
    call_status: Option<u16>,
    first_byte: Option<Timestamp>,
    request_bytes: u64,
    /// What was passed on as it came, on top.
    streamed: Option<Arc<AtomicU64>>,
    bytes: u64,
    is_stream: bool,
    ending: Ending,
    /// Of a request that is traced.
    spans: Option<Box<Spans>>,
}

impl Account {
    /// Begins with a request that came at `began` with these headers.
    pub(super) fn new(
        route: Arc<ModelRoute>,
        headers: &HeaderMap,
        (clock, began): (Clock, Timestamp),
        call: Option<Call>,
    ) -> Self {
        Self {
            route,
            clock,
            log: None,
            name: headers.get(REQUEST_ID).cloned(),
            trace: TraceParent::of(headers),
            began,
            asked: None,
            leased: None,
            queued: None,
            is_cold: false,
            is_heirs: false,
            generation: None,
            status: None,
            code: None,
            call,
            call_status: None,
            first_byte: None,
            request_bytes: 0,
            streamed: None,
            bytes: 0,
            is_stream: false,
            ending: Ending::Left,
            spans: None,
        }
    }

    /// Also writes it to this access log.
    pub(super) fn logged(mut self, log: Option<AccessLog>) -> Self {
        self.log = log;
        self
    }

    /// Also makes these spans of it, from the reading of its body on.
    pub(super) fn traced(mut self, spans: Option<Box<Spans>>) -> Self {
        self.spans = spans;
        self.step(Step::ReadBody);
        self
    }

    /// Its next step begins.
    pub(super) fn step(&mut self, step: Step) {
        if let Some(spans) = &mut self.spans {
            spans.step(step);
        }
    }

    /// Returns what [`Spans::place`] does.
    pub(super) fn place(&self) -> Option<(HeaderValue, &'static [HeaderName])> {
        self.spans.as_ref().and_then(|spans| spans.place())
    }

    /// It asks for a lease.
    pub(super) fn asks(&mut self) {
        self.step(Step::Wait);
        self.asked = Some(self.clock.now());
    }

    /// It has one. Returns since when.
    pub(super) fn leased(&mut self, lease: &Lease) -> Timestamp {
        let (worker, now) = (lease.worker(), self.clock.now());
        let is_cold = self.asked.is_some_and(|asked| worker.since > asked);
        self.is_cold |= is_cold;
        self.stop_waiting(now);
        if let Some(spans) = &mut self.spans {
            spans.leased(lease, is_cold);
        }
        self.leased = Some(now);
        self.generation = Some(worker.id.generation);
        self.is_heirs = worker.is_heir;
        now
    }

    fn stop_waiting(&mut self, now: Timestamp) {
        if let Some(asked) = self.asked.take() {
            let before = self.queued.unwrap_or_default();
            self.queued = Some(before + now.since(asked));
        }
    }

    /// So much of its body is here; where there is more, that is counted as it
    /// passes.
    pub(super) fn sends(&mut self, bytes: u64, has_more: bool) -> Option<Arc<AtomicU64>> {
        self.request_bytes = bytes;
        self.streamed = has_more.then(Arc::default);
        self.streamed.clone()
    }

    /// No worker answers it.
    pub(super) fn refused(mut self, fault: &Fault) {
        let status = fault.status();
        self.status = Some(status.as_u16());
        self.code = Some(fault.code());
        self.ending = Ending::Refused;
        let now = self.clock.now();
        self.call_status = self.call.map(|call| call.refused_by(fault, now) as u16);
    }

    /// A worker answers, by this head.
    pub(super) fn answered(&mut self, status: u16, headers: &HeaderMap) {
        self.step(Step::Body);
        self.status = Some(status);
        if self.call.is_some() {
            self.call_status = grpc::given(headers);
        }
    }

    /// There is nothing behind the head.
    pub(super) fn has_no_body(&mut self) {
        self.first_byte = Some(self.clock.now());
    }

    /// The answer is a stream of events.
    pub(super) fn streams(&mut self) {
        self.is_stream = true;
    }

    pub(super) fn passed(&mut self, bytes: usize) {
        if self.first_byte.is_none() {
            self.first_byte = Some(self.clock.now());
        }
        self.add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// A call ends with this status.
    pub(super) fn call_ends(&mut self, status: u16) {
        self.call_status = Some(status);
    }

    /// So many bytes went each way on a connection that left HTTP.
    pub(super) fn exchanged(&mut self, from_client: u64, to_client: u64) {
        self.request_bytes = self.request_bytes.saturating_add(from_client);
        self.add(to_client);
    }

    fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    pub(super) fn finish(&mut self) {
        self.ending = Ending::Whole;
    }

    pub(super) fn broke(&mut self) {
        self.ending = Ending::Broke;
        self.call_status = Some(Code::Unavailable as u16);
    }

    pub(super) fn late(&mut self) {
        self.ending = Ending::Late;
        self.call_status = Some(Code::DeadlineExceeded as u16);
    }

    fn request_bytes(&self) -> u64 {
        let streamed = self.streamed.as_ref();
        let streamed = streamed.map_or(0, |streamed| streamed.load(Ordering::Relaxed));
        self.request_bytes.saturating_add(streamed)
    }

    /// Returns what is counted.
    fn result(&self) -> Passed {
        let status = self.status.unwrap_or(LEFT);
        let call = self.call.map(|_| self.call_status.unwrap_or(CANCELLED));
        let first_byte = self.first_byte.map(|first| first.since(self.began));
        Passed {
            status: match call {
                Some(call) if status == 200 => grpc::http_of(call),
                _ => status,
            },
            call,
            ending: self.ending,
            queued: self.queued,
            cold: self.queued.filter(|_| self.is_cold),
            first_byte,
            request_bytes: self.request_bytes(),
            answer_bytes: self.bytes,
        }
    }

    fn line(&self, passed: &Passed, waited: Duration, served: Duration) -> Line {
        let seconds = |time: Duration| time.as_secs_f64();
        Line {
            time: self.clock.unix(self.began),
            model: self.route.name().to_string(),
            generation: self.generation,
            request_id: self.name().map(str::to_owned),
            trace_id: self.trace.map(|trace| format!("{:032x}", trace.trace)),
            status: self.status.unwrap_or(LEFT),
            grpc_status: passed.call,
            code: self.code,
            wait_s: seconds(waited),
            queue_s: passed.queued.map(seconds),
            cold_s: passed.cold.map(seconds),
            first_byte_s: passed.first_byte.map(seconds),
            duration_s: seconds(served),
            request_bytes: passed.request_bytes,
            bytes: passed.answer_bytes,
            stream: self.is_stream,
            end: passed.ending.as_str(),
        }
    }

    fn name(&self) -> Option<&str> {
        self.name.as_ref().and_then(|name| name.to_str().ok())
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let now = self.clock.now();
        self.stop_waiting(now);
        let passed = self.result();
        let waited = self.leased.unwrap_or(now).since(self.began);
        let served = self
            .leased
            .map_or(Duration::ZERO, |leased| now.since(leased));
        if !self.is_heirs {
            self.route.traffic().count(&passed);
            if let Some(log) = self.log.take() {
                log.write(self.line(&passed, waited, served));
            }
        }
        if let Some(spans) = self.spans.take() {
            let ended = Ended {
                model: Some(self.route.name().as_str()),
                name: self.name(),
                status: self.status,
                code: self.code,
                passed: &passed,
            };
            spans.end(now, &ended);
        }
        debug!(
            model = %self.route.name(),
            generation = self.generation,
            request = self.name(),
            status = passed.status,
            bytes = passed.answer_bytes,
            waited_ms = waited.as_secs_f64() * 1e3,
            took_ms = now.since(self.began).as_secs_f64() * 1e3,
            end = passed.ending.as_str(),
            "request"
        );
    }
}
