//! How an explanation reads.

use std::fmt;

use super::{Explanation, Holder, Outlook, Why};
use crate::model::ModelName;

/// Says it in a sentence or two.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ago = self.at.since(self.since).as_secs_f64();
        let model = &self.model;
        match &self.why {
            Why::Ready => write!(f, "{model} is ready"),
            Why::Loading => write!(f, "{model} has been loading for {ago:.1} s"),
            Why::Parking => write!(
                f,
                "{model} has been on its way into its park for {ago:.1} s"
            ),
            Why::Parked => write!(f, "{model} has been parked for {ago:.1} s"),
            Why::Unparking => write!(
                f,
                "{model} has been on its way out of its park for {ago:.1} s"
            ),
            Why::NeverLoaded => write!(f, "{model} was not loaded since residentd started"),
            Why::Evicted(reason) => write!(f, "{model} was evicted {ago:.1} s ago: {reason}"),
            Why::Unloaded => write!(f, "{model} was unloaded {ago:.1} s ago by an operator"),
            Why::Failed { cause } => write!(f, "{model} failed {ago:.1} s ago: {cause}"),
            Why::BackingOff {
                cause,
                failures,
                until,
            } => {
                let wait = until.since(self.at).as_secs_f64();
                write!(
                    f,
                    "{model} failed {ago:.1} s ago and is not tried again for {wait:.1} s (recent failures: {failures}): {cause}"
                )
            }
            Why::Leaving(Some(reason)) => write!(f, "{model} is on its way out: {reason}"),
            Why::Leaving(None) => write!(f, "{model} is on its way out: it did not get ready"),
            Why::Waiting => write!(f, "{model} has been waited for for {ago:.1} s"),
            Why::Impossible(refusal) => return write!(f, "{refusal}"),
            Why::ShuttingDown => return write!(f, "residentd is shutting down"),
        }?;
        write!(f, "; {}", self.outlook)?;
        match self.ready_in.filter(|wait| !wait.is_zero()) {
            Some(wait) => write!(f, "; ready in about {:.1} s", wait.as_secs_f64()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Outlook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Served => f.write_str("a request is served at once"),
            Self::Starts => f.write_str("a request waits for the load only"),
            Self::Unparks => f.write_str("a request waits for its unpark only"),
            Self::Evicts { victims, shortage } => {
                write!(f, "for a request {} would go: {shortage}", list(victims))
            }
            Self::Waits {
                holders,
                behind,
                shortage,
                drains_in,
            } => {
                f.write_str("a request waits")?;
                if !holders.is_empty() {
                    write!(f, " for {}", list(holders))?;
                }
                if !behind.is_empty() {
                    let names: Vec<_> = behind.iter().map(ModelName::as_str).collect();
                    write!(f, " behind {}", names.join(", "))?;
                }
                if holders.is_empty() && behind.is_empty() {
                    f.write_str(" until memory is measured to be back")?;
                }
                if let Some(shortage) = shortage {
                    write!(f, ": {shortage}")?;
                }
                match drains_in {
                    Some(patience) => {
                        let patience = patience.as_secs_f64();
                        write!(f, "; busy workers are drained for it in {patience:.1} s")
                    }
                    None => Ok(()),
                }
            }
            Self::Refused(refusal) => write!(f, "a request is refused: {refusal}"),
        }
    }
}

fn list(holders: &[Holder]) -> String {
    let named = holders.iter().map(|holder| {
        let held = holder.holds.iter();
        let held: Vec<_> = held
            .map(|(domain, bytes)| format!("{domain} {bytes}"))
            .collect();
        let why = match holder.protection {
            None if holder.parks => "idle, to be parked",
            None => "idle",
            Some(protection) => protection.as_str(),
        };
        format!("{} ({why}, {})", holder.model, held.join(", "))
    });
    named.collect::<Vec<_>>().join(", ")
}
