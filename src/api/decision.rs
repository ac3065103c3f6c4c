//! How a decision and an explanation look: a kind or reason in one word, the
//! numbers under names of their own, and a sentence. What does not apply is
//! left out.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::reload::DifferenceEntry;
use crate::clock::{Clock, Timestamp};
use crate::control::{
    Decision, EvictReason, Expected, Explanation, Holder, Outlook, ParkFault, Protection, Refusal,
    Shortage, What, Why,
};
use crate::model::{Ailment, Bytes, Domain, ModelName};

/// One decision.
#[derive(Debug, Serialize)]
pub(crate) struct DecisionEntry<'a> {
    id: u64,
    at: f64,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    message: String,
    #[serde(flatten)]
    numbers: Map<String, Value>,
}

impl<'a> DecisionEntry<'a> {
    /// Builds the entry of `decision`.
    pub(crate) fn of(decision: &'a Decision, clock: Clock) -> Self {
        Self {
            id: decision.id,
            at: clock.unix(decision.at),
            kind: decision.what.kind().as_str(),
            reason: decision.what.reason(),
            model: decision.model.as_ref().map(ModelName::as_str),
            generation: decision.generation,
            message: decision.to_string(),
            numbers: object(numbers(&decision.what)),
        }
    }
}

#[expect(clippy::too_many_lines, reason = "a table: one arm for each kind")]
fn numbers(what: &What) -> Value {
    match what {
        What::Spawn {
            waiting,
            expected,
            gpus,
            ..
        } => {
            json!({"waiting": waiting, "expected": known(expected), "gpus": gpus})
        }
        What::Adopt {
            pid,
            age,
            ready,
            held,
        } => {
            json!({"pid": pid, "age_seconds": age.as_secs(), "ready": ready, "held": by_domain(held)})
        }
        What::Ready { took, reload } => {
            json!({"load_ms": took.as_millis(), "reload": reload})
        }
        What::Prefetch {
            read,
            found,
            size,
            took,
            end,
            ..
        } => json!({
            "read": read.get(),
            "found": found.get(),
            "size": size.get(),
            "took_ms": took.as_millis(),
            "end": end.as_str(),
        }),
        What::Wait { outlook } => outlook_numbers(outlook),
        What::Evict {
            reason,
            charge,
            kill,
        }
        | What::Terminate {
            reason,
            charge,
            kill,
        } => with(
            reason_numbers(reason),
            json!({"charge": by_domain(charge), "kill": kill}),
        ),
        What::Park {
            reason,
            charge,
            holds,
        } => with(
            reason_numbers(reason),
            json!({"charge": by_domain(charge), "holds": by_domain(holds)}),
        ),
        What::Parked { freed, took } => {
            json!({"freed": by_domain(freed), "park_ms": took.as_millis()})
        }
        What::Unpark {
            waiting, expected, ..
        } => json!({"waiting": waiting, "expected": known(expected)}),
        What::Unparked { took } => json!({"unpark_ms": took.as_millis()}),
        What::Keep { reason, inside } | What::Drain { reason, inside } => {
            with(reason_numbers(reason), json!({"in_flight": inside}))
        }
        What::Resume { inside } => json!({"in_flight": inside}),
        What::Exit { status, .. } => json!({"status": status}),
        What::Backoff {
            cause,
            failures,
            retry_in,
        } => {
            json!({"cause": cause, "failures": failures, "retry_in_seconds": retry_in.as_secs_f64()})
        }
        What::Reclaim {
            domain,
            freed,
            missing,
        } => json!({"domain": domain.to_string(), "freed": freed.get(), "missing": missing.get()}),
        What::Refuse { refusal, requests } => {
            with(refusal_numbers(refusal), json!({"requests": requests}))
        }
        What::Cleanup {
            unloaded,
            freed,
            missing,
        } => json!({"unloaded": names(unloaded), "freed": freed.get(), "missing": missing.get()}),
        What::Pin { pinned } => json!({"pinned": pinned}),
        What::Limit { domain, limit } => {
            json!({"domain": domain.to_string(), "limit": limit.get()})
        }
        What::Pressure {
            domain,
            usage,
            headroom,
            ..
        } => {
            json!({"domain": domain.to_string(), "usage": usage.get(), "headroom": headroom.get()})
        }
        What::Reload { origin, report } => with(
            json!({"origin": origin.as_str()}),
            json!(DifferenceEntry::of(&report.difference)),
        ),
        What::ReloadRefused { origin, problems } => {
            let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
            json!({"origin": origin.as_str(), "problems": texts})
        }
        What::Shutdown { grace } => json!({"grace_seconds": grace.as_secs_f64()}),
    }
}

fn known(expected: &Expected) -> BTreeMap<String, u64> {
    let known = expected.domains();
    let known = known.filter_map(|d| Some((d.to_string(), expected.known(d)?.get())));
    known.collect()
}

fn reason_numbers(reason: &EvictReason) -> Value {
    match reason {
        EvictReason::MakeRoom {
            for_model,
            domain,
            need,
            room,
        } => json!({
            "for_model": for_model.as_str(),
            "domain": domain.to_string(),
            "need": need.get(),
            "room": room.get(),
        }),
        EvictReason::Idle { after } => json!({"idle_seconds": after.as_secs_f64()}),
        EvictReason::Pressure {
            level,
            domain,
            usage,
            headroom,
        } => json!({
            "level": level.as_str(),
            "domain": domain.to_string(),
            "usage": usage.get(),
            "headroom": headroom.get(),
        }),
        EvictReason::Ceiling { usage, ceiling } => {
            json!({"usage": usage.get(), "max_memory": ceiling.get()})
        }
        EvictReason::ParkFailed(ParkFault::Park(cause) | ParkFault::Unpark(cause)) => {
            json!({"cause": cause})
        }
        EvictReason::ParkFailed(ParkFault::TooLittle {
            domain,
            freed,
            expected,
        }) => {
            json!({"domain": domain.to_string(), "freed": freed.get(), "expected": expected.get()})
        }
        EvictReason::Unhealthy { why } => ailment_numbers(why),
        EvictReason::Cleanup
        | EvictReason::Unload
        | EvictReason::Changed
        | EvictReason::Removed
        | EvictReason::Shutdown => json!({}),
    }
}

fn ailment_numbers(why: &Ailment) -> Value {
    let numbers = match why {
        Ailment::Refuses { times, over }
        | Ailment::NoAnswer { times, over }
        | Ailment::Stopped { times, over } => {
            json!({"times": times, "over_seconds": over.as_secs_f64()})
        }
        Ailment::WrongStatus {
            times,
            over,
            status,
        } => json!({"times": times, "over_seconds": over.as_secs_f64(), "status": status}),
        Ailment::Still {
            waiting,
            silent,
            still,
            cpu,
        } => json!({
            "waiting": waiting,
            "silent_seconds": silent.as_secs_f64(),
            "still_seconds": still.as_secs_f64(),
            "cpu_seconds": cpu.as_secs_f64(),
        }),
        Ailment::Silent { waiting, silent } => {
            json!({"waiting": waiting, "silent_seconds": silent.as_secs_f64()})
        }
        Ailment::Errors { times, status } => json!({"times": times, "status": status}),
    };
    with(json!({"ailment": why.as_str()}), numbers)
}

fn refusal_numbers(refusal: &Refusal) -> Value {
    match refusal {
        Refusal::QueueFull { queued, .. } => json!({"queued": queued}),
        Refusal::TooLarge {
            domain,
            need,
            budget,
            ..
        } => json!({"domain": domain.to_string(), "need": need.get(), "budget": budget.get()}),
        Refusal::NoRoom {
            domain, need, room, ..
        } => json!({"domain": domain.to_string(), "need": need.get(), "room": room.get()}),
        Refusal::NoDevice { present, .. } => json!({"present": present}),
        Refusal::BackingOff {
            retry_in, cause, ..
        } => json!({"cause": cause, "retry_in_seconds": retry_in.as_secs_f64()}),
        Refusal::WorkerFailed { cause, .. } => json!({"cause": cause}),
        Refusal::StartTimeout { after, .. } => json!({"waited_seconds": after.as_secs_f64()}),
        Refusal::QueueTimeout { waited, .. } => json!({"waited_seconds": waited.as_secs_f64()}),
        Refusal::UnknownModel(_)
        | Refusal::UnknownDomain(_)
        | Refusal::Unloaded(_)
        | Refusal::Overloaded
        | Refusal::ShuttingDown => json!({}),
    }
}

/// Why a model is not ready, and what asking for it would lead to.
#[derive(Debug, Serialize)]
pub(crate) struct ExplanationEntry {
    reason: &'static str,
    since: f64,
    message: String,
    /// What decided: numbers of the reason.
    details: Map<String, Value>,
    /// What a request would lead to now.
    outlook: Map<String, Value>,
    last_load_seconds: Option<f64>,
    ready_in_seconds: Option<f64>,
}

impl ExplanationEntry {
    /// Builds the entry of `explanation`.
    pub(crate) fn of(explanation: &Explanation, clock: Clock) -> Self {
        let outlook = &explanation.outlook;
        let word = json!({"result": outlook.as_str()});
        let since = explanation.since;
        Self {
            reason: explanation.why.as_str(),
            since: if since == Timestamp::START {
                0.0
            } else {
                clock.unix(since)
            },
            message: explanation.to_string(),
            details: object(why_numbers(&explanation.why, clock)),
            outlook: object(with(word, outlook_numbers(outlook))),
            last_load_seconds: explanation.last_load.map(|took| took.as_secs_f64()),
            ready_in_seconds: explanation.ready_in.map(|wait| wait.as_secs_f64()),
        }
    }
}

fn why_numbers(why: &Why, clock: Clock) -> Value {
    match why {
        Why::Evicted(reason) | Why::Leaving(Some(reason)) => with(
            reason_numbers(reason),
            json!({"evicted_for": reason.as_str()}),
        ),
        Why::Failed { cause } => json!({"cause": cause}),
        Why::BackingOff {
            cause,
            failures,
            until,
        } => json!({"cause": cause, "failures": failures, "retry_at": clock.unix(*until)}),
        Why::Impossible(refusal) => refusal_numbers(refusal),
        Why::Ready
        | Why::Loading
        | Why::Parking
        | Why::Parked
        | Why::Unparking
        | Why::NeverLoaded
        | Why::Unloaded
        | Why::Leaving(None)
        | Why::Waiting
        | Why::ShuttingDown => json!({}),
    }
}

fn outlook_numbers(outlook: &Outlook) -> Value {
    match outlook {
        Outlook::Served | Outlook::Starts | Outlook::Unparks => json!({}),
        Outlook::Evicts { victims, shortage } => with(
            shortage_numbers(shortage),
            json!({"would_evict": holders(victims)}),
        ),
        Outlook::Waits {
            holders: held_by,
            behind,
            shortage,
            drains_in,
        } => with(
            shortage.as_ref().map_or(json!({}), shortage_numbers),
            json!({
                "waits_for": holders(held_by),
                "behind": names(behind),
                "drains_in_seconds": drains_in.map(|wait| wait.as_secs_f64()),
            }),
        ),
        Outlook::Refused(refusal) => {
            with(refusal_numbers(refusal), json!({"code": refusal.code()}))
        }
    }
}

fn shortage_numbers(shortage: &Shortage) -> Value {
    json!({
        "domain": shortage.domain.to_string(),
        "need": shortage.need.get(),
        "room": shortage.room.get(),
    })
}

fn holders(holders: &[Holder]) -> Vec<Value> {
    let each = holders.iter().map(|holder| {
        let told = json!({
            "name": holder.model.as_str(),
            "why": holder.protection.map_or("idle", Protection::as_str),
            "in_flight": holder.inside,
            "holds": by_domain(&holder.holds),
        });
        match holder.parks {
            true => with(told, json!({"parks": true})),
            false => told,
        }
    });
    each.collect()
}

fn by_domain(bytes: &BTreeMap<Domain, Bytes>) -> BTreeMap<String, u64> {
    let each = bytes.iter();
    each.map(|(domain, bytes)| (domain.to_string(), bytes.get()))
        .collect()
}

fn names(models: &[ModelName]) -> Vec<&str> {
    models.iter().map(ModelName::as_str).collect()
}

/// Returns both objects as one.
fn with(first: Value, second: Value) -> Value {
    let mut all = object(first);
    all.extend(object(second));
    Value::Object(all)
}

/// Returns the object that `json!` built.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Map::new()
        }
    }
}
