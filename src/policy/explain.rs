//! Why a model is not ready, what would have to go for it, and when it would
//! be ready.
//!
//! What asking for it would lead to is not guessed: a copy of the policy takes
//! the request, and its effects are read. Nothing is changed by asking.

mod sentence;

use std::collections::BTreeMap;
use std::time::Duration;

use super::Policy;
use super::event::{Effect, Event, Ticket};
use super::ledger::Need;
use super::lifecycle::ModelState;
use super::reason::EvictReason;
use super::verdict::{Plan, missing};
use super::words::{Phase, Protection, Refusal, Shortage};
use crate::clock::Timestamp;
use crate::model::{Bytes, Domain, ModelName, WorkerId};

/// No real wish has this ticket: they are counted from one.
const TRIAL: Ticket = Ticket::MAX;
/// The request of a trial waits this long, so that it is not turned away for
/// being late.
const TRIAL_PATIENCE: Duration = Duration::from_secs(3600);

/// How things stand with one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Which.
    pub model: ModelName,
    /// When this was found out.
    pub at: Timestamp,
    /// Where its worker is in its life.
    pub phase: Phase,
    /// Why no worker is ready.
    pub why: Why,
    /// Since when that is so.
    pub since: Timestamp,
    /// What a request for it would lead to now.
    pub outlook: Outlook,
    /// Spawn to ready of its last load.
    pub last_load: Option<Duration>,
    /// How long a request would wait, as far as that is known: it is not while
    /// others have to become idle. The time victims take to end is not in it.
    pub ready_in: Option<Duration>,
}

/// Why no worker is ready for a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// One is.
    Ready,
    /// One is being loaded.
    Loading,
    /// One gives its memory back and lives on.
    Parking,
    /// One lives without most of its memory.
    Parked,
    /// One takes its memory again.
    Unparking,
    /// None was spawned since residentd started.
    NeverLoaded,
    /// The last one was evicted.
    Evicted(EvictReason),
    /// An operator had the last one unloaded.
    Unloaded,
    /// The last one failed; the next request starts another.
    Failed {
        /// What it said.
        cause: String,
    },
    /// The last one failed, and the next try has to wait.
    BackingOff {
        /// What it said.
        cause: String,
        /// Failures in the last minutes.
        failures: usize,
        /// When it may be tried again.
        until: Timestamp,
    },
    /// The last one is on its way out.
    Leaving(Option<EvictReason>),
    /// It is asked for, and waits; the outlook says for what.
    Waiting,
    /// It cannot be loaded, whoever goes.
    Impossible(Refusal),
    /// residentd ends.
    ShuttingDown,
}

/// What a request for a model would lead to now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// It is served at once.
    Served,
    /// It waits for the load only.
    Starts,
    /// It waits for the parked worker to be ready again.
    Unparks,
    /// These workers go first; those in use after the requests inside.
    Evicts {
        /// Who, in the order they are told.
        victims: Vec<Holder>,
        /// Where most is missing, how much it needs there and what there is.
        shortage: Shortage,
    },
    /// It waits for others.
    Waits {
        /// Workers that hold what it needs and cannot be ended now.
        holders: Vec<Holder>,
        /// Models whose requests came earlier.
        behind: Vec<ModelName>,
        /// Where most is missing; absent when nothing is but what is on its way
        /// back.
        shortage: Option<Shortage>,
        /// After how long busy workers are drained for it.
        drains_in: Option<Duration>,
    },
    /// It is turned away.
    Refused(Refusal),
}

/// A worker that holds what another model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Which.
    pub model: ModelName,
    /// Why it cannot go; absent when it can.
    pub protection: Option<Protection>,
    /// Requests inside.
    pub inside: u32,
    /// When it was last used, or became ready.
    pub idle_since: Timestamp,
    /// What it is charged with, by domain.
    pub holds: BTreeMap<Domain, Bytes>,
    /// It would be parked and not end.
    pub parks: bool,
}

impl Why {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Loading => "loading",
            Self::Parking => "parking",
            Self::Parked => "parked",
            Self::Unparking => "unparking",
            Self::NeverLoaded => "never_loaded",
            Self::Evicted(EvictReason::Idle { .. }) => "idle",
            Self::Evicted(_) => "evicted",
            Self::Unloaded => "unloaded",
            Self::Failed { .. } => "failed",
            Self::BackingOff { .. } => "backing_off",
            Self::Leaving(_) => "leaving",
            Self::Waiting => "waiting",
            Self::Impossible(refusal) => refusal.code(),
            Self::ShuttingDown => "shutting_down",
        }
    }
}

impl Outlook {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Starts => "starts",
            Self::Unparks => "unparks",
            Self::Evicts { .. } => "evicts",
            Self::Waits { .. } => "waits",
            Self::Refused(_) => "refused",
        }
    }

    /// Returns whether it waits for workers that nobody has told to go: busy,
    /// pinned or loading ones.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        let Self::Waits { holders, .. } = self else {
            return false;
        };
        let goes = [Some(Protection::Draining), Some(Protection::Parking)];
        let stays = |holder: &Holder| !goes.contains(&holder.protection);
        holders.iter().any(stays)
    }
}

impl Policy {
    /// Explains why a model is not ready, and what asking for it would lead
    /// to, by letting a copy of this policy decide. `None` for a model that is
    /// not configured.
    #[must_use]
    pub fn explain(&self, name: &ModelName, now: Timestamp) -> Option<Explanation> {
        let model = self.models.get(name).filter(|m| !m.removed)?;
        let outlook = self.outlook(model, now);
        let (why, since) = self.why(model, &outlook, now);
        let ready_in = self.ready_in(model, &outlook, now);
        Some(Explanation {
            model: name.clone(),
            at: now,
            phase: model.phase,
            why,
            since,
            outlook,
            last_load: model.history.last_load,
            ready_in,
        })
    }

    fn why(&self, model: &ModelState, outlook: &Outlook, now: Timestamp) -> (Why, Timestamp) {
        let cause = || model.failures.last.clone().unwrap_or_default();
        let waiter = model.queue.front().map(|waiter| waiter.since);
        let why = match model.phase {
            Phase::Ready => Why::Ready,
            Phase::Starting => Why::Loading,
            Phase::Parking => Why::Parking,
            Phase::Parked => Why::Parked,
            Phase::Unparking => Why::Unparking,
            Phase::Draining | Phase::Stopping => Why::Leaving(model.leaving.clone()),
            Phase::Backoff | Phase::Failed => match model.failures.retry_at {
                Some(until) if until > now => Why::BackingOff {
                    cause: cause(),
                    failures: model.failures.recent.len(),
                    until,
                },
                _ => Why::Failed { cause: cause() },
            },
            Phase::Stopped if self.shutdown.is_some() => Why::ShuttingDown,
            Phase::Stopped => {
                if let Outlook::Refused(refusal) = outlook {
                    Why::Impossible(refusal.clone())
                } else if let Some(since) = waiter {
                    return (Why::Waiting, since);
                } else {
                    why_stopped(model, cause)
                }
            }
        };
        (why, model.since)
    }

    /// Lets a copy decide.
    fn outlook(&self, model: &ModelState, now: Timestamp) -> Outlook {
        let name = model.name();
        match model.phase {
            Phase::Ready if model.queue.is_empty() && !model.is_full() => return Outlook::Served,
            Phase::Starting => return Outlook::Starts,
            Phase::Unparking => return Outlook::Unparks,
            Phase::Ready
            | Phase::Parking
            | Phase::Parked
            | Phase::Stopped
            | Phase::Draining
            | Phase::Stopping
            | Phase::Backoff
            | Phase::Failed => {}
        }
        let mut trial = self.clone();
        // Whoever waits already stands for any further request.
        let event = if model.queue.is_empty() {
            Event::Acquire {
                ticket: TRIAL,
                model: name.clone(),
                deadline: now + TRIAL_PATIENCE,
            }
        } else {
            Event::Tick
        };
        let effects = trial.step(now, event);
        let waiter = model.queue.front().map_or(TRIAL, |waiter| waiter.ticket);
        let refused = effects
            .iter()
            .find_map(|effect| match_refusal(effect, waiter));
        if let Some(refusal) = refused {
            return Outlook::Refused(refusal);
        }
        let grants =
            |effect: &Effect| matches!(effect, Effect::Grant { ticket, .. } if *ticket == waiter);
        if effects.iter().any(grants) {
            // A drain that nobody needs any more is called off.
            return Outlook::Served;
        }
        if trial.models[name].phase == Phase::Starting {
            return Outlook::Starts;
        }
        if trial.models[name].phase == Phase::Unparking {
            return Outlook::Unparks;
        }
        let told = effects
            .iter()
            .filter_map(|effect| match_victim(effect, name));
        let parks = |worker: &WorkerId| trial.models[&worker.model].phase == Phase::Parking;
        let victims: Vec<_> = told
            .filter(|(worker, _)| trial.models[&worker.model].is_leaving() || parks(worker))
            .collect();
        if let Some((_, shortage)) = victims.first() {
            let holder = |(worker, _): &(WorkerId, _)| Holder {
                parks: parks(worker),
                ..self.holder(&self.models[&worker.model])
            };
            return Outlook::Evicts {
                shortage: *shortage,
                victims: victims.iter().map(holder).collect(),
            };
        }
        trial.waits(name, now)
    }

    /// Returns for what a model waits that was neither started nor refused.
    fn waits(&self, name: &ModelName, now: Timestamp) -> Outlook {
        let model = &self.models[name];
        if model.is_live() && model.phase != Phase::Parked {
            return Outlook::Waits {
                holders: vec![self.holder(model)],
                behind: Vec::new(),
                shortage: None,
                drains_in: None,
            };
        }
        let Ok(Plan { expected, need, .. }) = self.plan_of(model, &Need::new()) else {
            return Outlook::Waits {
                holders: Vec::new(),
                behind: Vec::new(),
                shortage: None,
                drains_in: None,
            };
        };
        let (there, later) = self.rooms(expected.domains());
        let short = missing(&need, &there);
        let comes_back = missing(&need, &later).is_empty();
        let domains: Vec<_> = match short.is_empty() {
            true => expected.domains().collect(),
            false => short.keys().map(|(domain, _)| *domain).collect(),
        };
        let wanted = self.wanted_in_order(now);
        let earlier = wanted.into_iter().take_while(|other| other != name);
        let holders = self.models.values().filter(|other| {
            let in_the_way = match other.protection() {
                Some(Protection::Draining | Protection::Parking) => true,
                // With enough on its way back, only what loads is waited for.
                Some(Protection::Loading) => short.is_empty() || !comes_back,
                Some(Protection::Busy | Protection::Pinned) => !comes_back,
                None => false,
            };
            in_the_way
                && other.name() != name
                && domains.iter().any(|d| other.charge(*d) > Bytes::ZERO)
        });
        let holders: Vec<_> = holders.map(|other| self.holder(other)).collect();
        let is_busy = |holder: &Holder| holder.protection == Some(Protection::Busy);
        let patience = self.drains_at(name, &short).filter(|at| *at > now);
        let patience = patience.filter(|_| holders.iter().any(is_busy));
        Outlook::Waits {
            drains_in: patience.map(|at| at.since(now)),
            holders,
            behind: earlier.collect(),
            shortage: (!short.is_empty()).then(|| self.shortage(&expected, &short)),
        }
    }

    fn holder(&self, model: &ModelState) -> Holder {
        let domains = model.domains().into_iter();
        Holder {
            model: model.name().clone(),
            protection: model.protection(),
            inside: model.activity.inside,
            idle_since: model.idle_since(),
            holds: domains.map(|d| (d, model.charge(d))).collect(),
            parks: false,
        }
    }

    fn ready_in(&self, model: &ModelState, outlook: &Outlook, now: Timestamp) -> Option<Duration> {
        let load = match model.phase == Phase::Parked {
            true => model.history.last_unpark,
            false => model.history.last_load,
        };
        match outlook {
            Outlook::Served => Some(Duration::ZERO),
            Outlook::Starts if model.phase == Phase::Starting => left(model, now),
            Outlook::Starts => load,
            Outlook::Unparks => {
                let since = Some(model.since).filter(|_| model.phase == Phase::Unparking);
                let unpark = model.history.last_unpark?;
                Some(unpark.saturating_sub(now.since(since.unwrap_or(now))))
            }
            // Requests inside have to end first, and nobody knows when they do.
            Outlook::Evicts { victims, .. } if victims.iter().any(|v| v.inside > 0) => None,
            Outlook::Evicts { .. } => load,
            Outlook::Refused(Refusal::BackingOff { retry_in, .. }) => Some(*retry_in + load?),
            Outlook::Refused(_) => None,
            Outlook::Waits { holders, .. } => {
                // The end of a load can be told, the end of requests cannot.
                let ends = holders.iter().map(|holder| match holder.protection {
                    Some(Protection::Loading) => left(&self.models[&holder.model], now),
                    Some(
                        Protection::Draining
                        | Protection::Parking
                        | Protection::Busy
                        | Protection::Pinned,
                    )
                    | None => None,
                });
                let last = ends.collect::<Option<Vec<_>>>()?.into_iter().max()?;
                Some(last + load?)
            }
        }
    }
}

/// Why a model without a worker, for which nobody waits, has none.
fn why_stopped(model: &ModelState, cause: impl Fn() -> String) -> Why {
    let evicted = model.history.last_eviction.as_ref();
    if model.generation == 0 {
        Why::NeverLoaded
    } else if let Some((reason, _)) = evicted.filter(|(_, at)| *at == model.since) {
        Why::Evicted(reason.clone())
    } else if model.failures.last.is_some() && !model.failures.recent.is_empty() {
        Why::Failed { cause: cause() }
    } else {
        Why::Unloaded
    }
}

/// Returns what is left of a load, judged by the last one; `None` when it
/// takes longer than that one.
fn left(model: &ModelState, now: Timestamp) -> Option<Duration> {
    model.history.last_load?.checked_sub(now.since(model.since))
}

fn match_refusal(effect: &Effect, of: Ticket) -> Option<Refusal> {
    let Effect::Reject { ticket, refusal } = effect else {
        return None;
    };
    (*ticket == of).then(|| refusal.clone())
}

/// Returns who is told to go by this effect to make room for the model.
fn match_victim(effect: &Effect, name: &ModelName) -> Option<(WorkerId, Shortage)> {
    let (Effect::Evict { worker, reason, .. }
    | Effect::Park { worker, reason, .. }
    | Effect::Drain { worker, reason }
    | Effect::Terminate { worker, reason, .. }) = effect
    else {
        return None;
    };
    let EvictReason::MakeRoom {
        for_model,
        domain,
        need,
        room,
    } = reason
    else {
        return None;
    };
    let shortage = Shortage {
        domain: *domain,
        need: *need,
        room: *room,
    };
    (for_model == name).then(|| (worker.clone(), shortage))
}
