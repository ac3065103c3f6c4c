//! How a decision reads: a line of the log, and one sentence.

use std::collections::BTreeMap;
use std::fmt;

use tracing::{info, warn};

use super::ReloadReport;
use super::decision::{Decision, End, LoadReason, What};
use crate::model::{Bytes, Difference, Domain, ModelName, PrefetchReason};

impl Decision {
    /// Writes it to the log: a constant message, and every number as a field.
    #[expect(clippy::too_many_lines, reason = "a table: one arm for each kind")]
    pub(super) fn log(&self) {
        let id = self.id;
        let worker = self.worker().map(tracing::field::display);
        let reason = self.what.reason();
        match &self.what {
            What::Spawn {
                waiting,
                expected,
                gpus,
                ..
            } => {
                info!(id, worker, reason, waiting, need = %expected, ?gpus, "spawning worker");
            }
            What::Adopt {
                pid,
                age,
                ready,
                held,
            } => {
                info!(
                    id,
                    worker,
                    pid,
                    age_s = age.as_secs(),
                    ready,
                    held = list(held),
                    "worker of an earlier residentd taken back"
                );
            }
            What::Ready { took, reload } => {
                info!(
                    id,
                    worker,
                    load_s = took.as_secs_f64(),
                    reload,
                    "worker ready"
                );
            }
            What::Prefetch {
                read,
                found,
                size,
                took,
                end,
                ..
            } => {
                info!(id, worker, reason, %read, %found, %size, took_s = took.as_secs_f64(), end = end.as_str(), "read files ahead");
            }
            What::Wait { outlook } => info!(id, worker, why = %outlook, "waiting for room"),
            What::Evict {
                reason: why,
                charge,
                kill,
            } => {
                info!(id, worker, reason, %why, charge = list(charge), kill, "evicting worker");
            }
            What::Park {
                reason: why,
                charge,
                holds,
            } => {
                info!(id, worker, reason, %why, charge = list(charge), holds = list(holds), "parking worker");
            }
            What::Parked { freed, took } => {
                info!(
                    id,
                    worker,
                    freed = list(freed),
                    park_s = took.as_secs_f64(),
                    "worker parked"
                );
            }
            What::Unpark {
                waiting, expected, ..
            } => info!(id, worker, reason, waiting, need = %expected, "unparking worker"),
            What::Unparked { took } => {
                info!(id, worker, unpark_s = took.as_secs_f64(), "worker unparked");
            }
            What::Keep {
                reason: why,
                inside,
            } => info!(id, worker, reason, %why, inside, "keeping worker that is in use"),
            What::Drain {
                reason: why,
                inside,
            } => info!(id, worker, reason, %why, inside, "draining worker"),
            What::Resume { inside } => info!(id, worker, inside, "worker takes requests again"),
            What::Terminate {
                reason: why,
                charge,
                kill,
            } => {
                info!(id, worker, reason, %why, charge = list(charge), kill, "terminating worker");
            }
            What::Exit { status, .. } => info!(id, worker, reason, status, "worker is gone"),
            What::Backoff {
                cause,
                failures,
                retry_in,
            } => {
                warn!(
                    id,
                    worker,
                    failures,
                    retry_in_s = retry_in.as_secs_f64(),
                    cause,
                    "backing off"
                );
            }
            What::Reclaim {
                domain,
                freed,
                missing,
            } if *missing > Bytes::ZERO => {
                warn!(id, worker, %domain, %freed, %missing, "memory of an ended worker did not come back in time");
            }
            What::Reclaim { domain, freed, .. } => {
                info!(id, worker, %domain, %freed, "memory is back");
            }
            What::Refuse { refusal, requests } => {
                info!(id, worker, code = reason, why = %refusal, requests, "refusing");
            }
            What::Cleanup {
                unloaded,
                freed,
                missing,
            } => {
                info!(id, unloaded = unloaded.len(), %freed, shortfall = %missing, "cleanup done");
            }
            What::Pin { pinned } => info!(id, worker, pinned, "pinning model"),
            What::Limit { domain, limit } => info!(id, %domain, %limit, "setting limit"),
            What::Pressure {
                domain,
                level,
                usage,
                headroom,
            } => {
                info!(id, %domain, level = level.as_str(), %usage, %headroom, "pressure changed");
            }
            What::Reload { origin, report } => {
                let origin = origin.as_str();
                info!(id, origin, changes = %brief(report), "configuration reloaded");
            }
            What::ReloadRefused { origin, problems } => {
                let origin = origin.as_str();
                warn!(
                    id,
                    origin,
                    problems = problems.len(),
                    "configuration is not valid, nothing is changed"
                );
                for problem in problems.iter() {
                    warn!(id, %problem, "configuration");
                }
            }
            What::Shutdown { grace } => {
                info!(id, grace_s = grace.as_secs_f64(), "shutting down");
            }
        }
    }

    /// Returns the worker as text, as far as it is about one.
    fn worker(&self) -> Option<String> {
        let model = self.model.as_ref()?;
        Some(match self.generation {
            Some(generation) => format!("{model}#{generation}"),
            None => model.to_string(),
        })
    }
}

/// Says it in one sentence.
impl fmt::Display for Decision {
    #[expect(clippy::too_many_lines, reason = "a table: one arm for each kind")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(model) = &self.model {
            write!(f, "{model} ")?;
        }
        match &self.what {
            What::Spawn {
                reason, expected, ..
            } => {
                let whom = whom(*reason);
                write!(f, "is loaded for {whom}; it is expected to need {expected}")
            }
            What::Adopt {
                pid,
                age,
                ready,
                held,
            } => {
                let how = if *ready { "" } else { " while it loads" };
                let (age, held) = (age.as_secs(), list(held));
                write!(
                    f,
                    "is taken back{how}: pid {pid} has run for {age} s and holds {held}"
                )
            }
            What::Ready { took, reload } => {
                let again = if *reload { " again" } else { "" };
                write!(f, "is ready{again} after {:.3} s", took.as_secs_f64())
            }
            What::Prefetch {
                reason,
                read,
                found,
                size,
                took,
                end,
            } => {
                let why = match reason {
                    PrefetchReason::Waiting => "while its room is made",
                    PrefetchReason::Starting => "while its worker starts",
                    PrefetchReason::Idle => "in idle time, since it is likely to come next",
                };
                write!(
                    f,
                    "had {read} of its files ({size}, of which {found} were there) read into the page cache in {:.3} s, {why}: {end}",
                    took.as_secs_f64()
                )
            }
            What::Wait { outlook } => write!(f, "has to wait: {outlook}"),
            What::Evict { reason, charge, .. } => {
                write!(f, "is evicted, which gives back {}: {reason}", list(charge))
            }
            What::Park { reason, holds, .. } => {
                let holds = list(holds);
                write!(f, "is parked, and expected to hold {holds} then: {reason}")
            }
            What::Parked { freed, took } => {
                let (freed, took) = (list(freed), took.as_secs_f64());
                write!(f, "is parked after {took:.3} s, which gave back {freed}")
            }
            What::Unpark {
                reason, expected, ..
            } => {
                let whom = whom(*reason);
                write!(
                    f,
                    "is unparked for {whom}; it is expected to need {expected}"
                )
            }
            What::Unparked { took } => {
                write!(f, "is out of its park after {:.3} s", took.as_secs_f64())
            }
            What::Keep { reason, inside } => {
                write!(
                    f,
                    "stays, with requests inside: {inside}; it was to go: {reason}"
                )
            }
            What::Drain { reason, inside } => {
                write!(f, "is drained, with requests inside: {inside}: {reason}")
            }
            What::Resume { inside } => write!(
                f,
                "takes requests again, with {inside} inside: nobody needs its memory any more"
            ),
            What::Terminate { reason, kill, .. } => {
                let how = if *kill { "is killed" } else { "is ended" };
                write!(f, "{how}: {reason}")
            }
            What::Exit { status, end } => match end {
                End::Told(reason) => {
                    write!(f, "is gone with {status}; it was told to go: {reason}")
                }
                End::LoadFailed(_) => write!(f, "failed with {status} before it was ready"),
                End::Crashed => write!(f, "crashed with {status} while it served"),
            },
            What::Backoff {
                cause,
                failures,
                retry_in,
            } => write!(
                f,
                "is not tried again for {:.1} s (recent failures: {failures}): {cause}",
                retry_in.as_secs_f64()
            ),
            What::Reclaim {
                domain,
                freed,
                missing,
            } => {
                write!(f, "gave back {freed} on {domain}")?;
                if *missing > Bytes::ZERO {
                    write!(f, "; {missing} did not come back in time")?;
                }
                Ok(())
            }
            What::Refuse { refusal, requests } => {
                write!(f, "is refused (requests: {requests}): {refusal}")
            }
            What::Cleanup {
                unloaded, freed, ..
            } => {
                let names: Vec<_> = unloaded.iter().map(ModelName::as_str).collect();
                if names.is_empty() {
                    return f.write_str("cleanup found nothing to unload");
                }
                write!(f, "cleanup gave back {freed} of {}", names.join(", "))
            }
            What::Pin { pinned: true } => f.write_str("is pinned by an operator"),
            What::Pin { pinned: false } => f.write_str("is unpinned by an operator"),
            What::Limit { domain, limit } => write!(f, "limit on {domain} is {limit} from now on"),
            What::Pressure {
                domain,
                level,
                usage,
                headroom,
            } => write!(
                f,
                "pressure on {domain} is {} from now on: usage {usage}, headroom {headroom}",
                level.as_str()
            ),
            What::Reload { origin, report } => write!(
                f,
                "configuration reloaded ({}): {}",
                origin.as_str(),
                brief(report)
            ),
            What::ReloadRefused { origin, problems } => {
                let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "configuration is not valid ({}) and nothing is changed: {}",
                    origin.as_str(),
                    texts.join("; ")
                )
            }
            What::Shutdown { grace } => {
                write!(
                    f,
                    "residentd shuts down within {:.0} s",
                    grace.as_secs_f64()
                )
            }
        }
    }
}

/// Says in a few words what a reload changed.
fn brief(report: &ReloadReport) -> String {
    let Difference {
        added,
        removed,
        changed,
        settings,
        needs_restart,
    } = &report.difference;
    let names =
        |models: &[ModelName]| -> Vec<String> { models.iter().map(ToString::to_string).collect() };
    let keys = |keys: &[&str]| -> Vec<String> { keys.iter().map(ToString::to_string).collect() };
    let changed = changed.iter().map(|c| c.model.to_string()).collect();
    let parts = [
        ("added", names(added)),
        ("removed", names(removed)),
        ("changed", changed),
        ("settings", keys(settings)),
        ("needs a restart", keys(needs_restart)),
    ];
    let parts = parts.iter().filter(|(_, list)| !list.is_empty());
    let parts: Vec<_> = parts
        .map(|(word, list)| format!("{word} {}", list.join(", ")))
        .collect();
    if parts.is_empty() {
        return "nothing is different".to_owned();
    }
    parts.join("; ")
}

const fn whom(reason: LoadReason) -> &'static str {
    match reason {
        LoadReason::Request => "a request",
        LoadReason::Operator => "an operator",
        LoadReason::Preload => "the configuration",
    }
}

fn list(bytes: &BTreeMap<Domain, Bytes>) -> String {
    let each = bytes.iter();
    let each: Vec<_> = each
        .map(|(domain, bytes)| format!("{domain} {bytes}"))
        .collect();
    each.join(", ")
}
