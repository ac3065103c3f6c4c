//! The spans of one request: one for the whole and one for each step of its walk.
//!
//! Steps are noted as they come and become spans when the request has ended; a
//! request that is not traced has none of this.

use std::time::{Duration, SystemTime};

use hyper::Method;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::{
    Span, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{SdkTracer, Span as SdkSpan};

use super::ids::{TRACEPARENT, TRACESTATE, TraceParent};
use crate::clock::{Clock, Timestamp};
use crate::control::{Lease, Passed};
use crate::telemetry::Traces;

/// Steps of a request's walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Its head and as much of its body are read as finding its model needs.
    FindModel,
    /// As much of its body is read as its model's configuration wants.
    ReadBody,
    /// It waits for a place in a worker, and for the worker.
    Wait,
    /// It gets a connection.
    Connect,
    /// The worker has it and does not answer yet.
    FirstByte,
    /// The answer passes.
    Body,
}

impl Step {
    const fn as_str(self) -> &'static str {
        match self {
            Self::FindModel => "find model",
            Self::ReadBody => "read body",
            Self::Wait => "wait for worker",
            Self::Connect => "connect",
            Self::FirstByte => "first byte",
            Self::Body => "body",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Spans {
    tracer: SdkTracer,
    clock: Clock,
    root: SdkSpan,
    /// A client's place that its parent is.
    parent: Option<TraceParent>,
    began: Timestamp,
    /// Steps that have ended, with that moment.
    done: Vec<(Step, Timestamp)>,
    now: Step,
    /// From when to when the worker loaded that was waited for.
    load: Option<(Timestamp, Timestamp)>,
}

impl Spans {
    /// Begins the spans of a request that came at `began`.
    pub(super) fn begin(
        traces: &Traces,
        (method, path): (&Method, &str),
        headers: &HeaderMap,
        (clock, began): (Clock, Timestamp),
        is_call: bool,
    ) -> Box<Self> {
        let parent = TraceParent::of(headers);
        let context = parent.map_or_else(Context::new, remote);
        let route = route(path, is_call);
        let attributes = [
            KeyValue::new("http.request.method", method_word(method)),
            KeyValue::new("http.route", route),
            KeyValue::new("url.path", path.to_owned()),
        ];
        let tracer = traces.tracer().clone();
        let root = tracer
            .span_builder(format!("{} {route}", method_word(method)))
            .with_kind(SpanKind::Server)
            .with_start_time(at(clock, began))
            .with_attributes(attributes)
            .start_with_context(&tracer, &context);
        Box::new(Self {
            tracer,
            clock,
            root,
            parent,
            began,
            done: Vec::with_capacity(6),
            now: Step::FindModel,
            load: None,
        })
    }

    /// Returns what tells the worker where in the trace it is, and which headers that
    /// replaces. Where the trace is not recorded by a client's will, its word stays.
    pub(super) fn place(&self) -> Option<(HeaderValue, &'static [HeaderName])> {
        // The second is of another trace, if the first is.
        static REPLACED: [HeaderName; 2] = [TRACEPARENT, TRACESTATE];
        let context = self.root.span_context();
        let replaced = match self.parent {
            Some(_) if !context.is_sampled() => return None,
            Some(_) => &REPLACED[..1],
            None => &REPLACED[..],
        };
        Some((place(context), replaced))
    }

    /// The next step begins.
    pub(super) fn step(&mut self, next: Step) {
        let ended = std::mem::replace(&mut self.now, next);
        self.done.push((ended, self.clock.now()));
    }

    /// It has a lease, after it has waited for a load if it `is_cold`.
    pub(super) fn leased(&mut self, lease: &Lease, is_cold: bool) {
        let worker = lease.worker();
        let generation = i64::try_from(worker.id.generation).unwrap_or(i64::MAX);
        self.root
            .set_attribute(KeyValue::new("residentd.worker.generation", generation));
        if let Some(took) = worker.loaded_in.filter(|_| is_cold) {
            let spawned = worker.since.since_start().saturating_sub(took);
            self.load = Some((Timestamp::from_start(spawned), worker.since));
        }
    }

    /// Ends all spans.
    pub(super) fn end(mut self: Box<Self>, now: Timestamp, request: &Ended<'_>) {
        if !self.root.is_recording() {
            return;
        }
        self.done.push((self.now, now));
        let context = Context::new().with_remote_span_context(self.root.span_context().clone());
        let mut from = self.began;
        for (step, to) in std::mem::take(&mut self.done) {
            let span = self.child(step.as_str(), (from, to), &context);
            // Of several waits the one at whose end it was ready.
            let load = self
                .load
                .filter(|(_, ready)| from <= *ready && *ready <= to);
            if let (Step::Wait, Some(load)) = (step, load) {
                let wait = Context::new().with_remote_span_context(span);
                self.child("load", load, &wait);
            }
            from = to;
        }
        self.root.set_attributes(request.attributes());
        if let Some(error) = request.error() {
            self.root.set_attribute(KeyValue::new("error.type", error));
            self.root.set_status(Status::error(""));
        }
        self.root.end_with_timestamp(at(self.clock, now));
    }

    fn child(
        &self,
        name: &'static str,
        (from, to): (Timestamp, Timestamp),
        parent: &Context,
    ) -> SpanContext {
        let builder = self.tracer.span_builder(name);
        let builder = builder.with_start_time(at(self.clock, from));
        let mut span = builder.start_with_context(&self.tracer, parent);
        span.end_with_timestamp(at(self.clock, to));
        span.span_context().clone()
    }
}

/// What a request's span says when it has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended<'a> {
    pub(super) model: Option<&'a str>,
    pub(super) name: Option<&'a str>,
    /// The status of HTTP that was answered.
    pub(super) status: Option<u16>,
    /// Why residentd refused it.
    pub(super) code: Option<&'static str>,
    pub(super) passed: &'a Passed,
}

impl Ended<'_> {
    fn attributes(&self) -> Vec<KeyValue> {
        let passed = self.passed;
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let mut all = vec![
            KeyValue::new("http.request.body.size", number(passed.request_bytes)),
            KeyValue::new("http.response.body.size", number(passed.answer_bytes)),
            KeyValue::new("residentd.end", passed.ending.as_str()),
            KeyValue::new("residentd.cold_start", passed.cold.is_some()),
        ];
        let text = |key: &'static str, value: Option<&str>| {
            value.map(|value| KeyValue::new(key, value.to_owned()))
        };
        all.extend(text("gen_ai.request.model", self.model));
        all.extend(text("residentd.request_id", self.name));
        let status = self.status.map(i64::from);
        all.extend(status.map(|status| KeyValue::new("http.response.status_code", status)));
        let call = passed.call.map(i64::from);
        all.extend(call.map(|call| KeyValue::new("rpc.grpc.status_code", call)));
        all
    }

    /// What went wrong on this side: a client's mistake is no error of a server.
    fn error(&self) -> Option<String> {
        use crate::control::Ending;
        let passed = self.passed;
        match (passed.ending, self.code) {
            (Ending::Broke | Ending::Late, _) => Some(passed.ending.as_str().to_owned()),
            _ if passed.status < 500 => None,
            (_, Some(code)) => Some(code.to_owned()),
            (_, None) => Some(passed.status.to_string()),
        }
    }
}

/// A client's place as the parent of ours.
fn remote(parent: TraceParent) -> Context {
    Context::new().with_remote_span_context(SpanContext::new(
        TraceId::from(parent.trace),
        SpanId::from(parent.span),
        TraceFlags::new(parent.flags),
        true,
        TraceState::default(),
    ))
}

fn place(context: &SpanContext) -> HeaderValue {
    let place = TraceParent {
        trace: u128::from_be_bytes(context.trace_id().to_bytes()),
        span: u64::from_be_bytes(context.span_id().to_bytes()),
        flags: u8::from(context.is_sampled()),
    };
    place.header()
}

fn at(clock: Clock, at: Timestamp) -> SystemTime {
    let unix = Duration::try_from_secs_f64(clock.unix(at)).unwrap_or_default();
    SystemTime::UNIX_EPOCH + unix
}

/// Which of a few kinds of paths it is.
fn route(path: &str, is_call: bool) -> &'static str {
    if is_call {
        "gRPC"
    } else if path.starts_with("/upstream/") {
        "/upstream/{model}"
    } else if path.starts_with("/v2/") {
        "/v2/models/{model}"
    } else {
        "/v1"
    }
}

/// A method that is known, or the word that stands for all others.
fn method_word(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}
