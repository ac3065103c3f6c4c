//! What happened in the virtual machine, in the words of the policy.

use std::fmt;

use super::machine::Wish;
use crate::clock::Timestamp;
use crate::model::{ModelName, WorkerId};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When.
    pub at: Timestamp,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Somebody asked for something.
    Asked {
        /// Who.
        wish: Wish,
        /// For what: `request`, `load`, `unload`, `cleanup`.
        verb: &'static str,
        /// Which model; none for a cleanup.
        model: Option<ModelName>,
    },
    /// A request entered a worker.
    Entered {
        /// Which.
        wish: Wish,
        /// Which worker.
        worker: WorkerId,
    },
    /// A wish was answered otherwise.
    Answered {
        /// Which.
        wish: Wish,
        /// How.
        text: String,
    },
    /// Something became of a worker.
    Worker {
        /// Which.
        worker: WorkerId,
        /// What, with the reason if there is one.
        text: String,
    },
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9.3} ", self.at.since_start().as_secs_f64())?;
        match &self.what {
            What::Asked { wish, verb, model } => {
                write!(f, "{verb} {wish}")?;
                model.as_ref().map_or(Ok(()), |model| write!(f, " {model}"))
            }
            What::Entered { wish, worker } => write!(f, "  {wish} enters {worker}"),
            What::Answered { wish, text } => write!(f, "  {wish} {text}"),
            What::Worker { worker, text } => write!(f, "  {worker} {text}"),
        }
    }
}
