//! What is done with the requests for a model beside passing them on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What the proxy does with a model's requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestSpec {
    /// Longest from the lease to the end of the answer. Absent: no bound.
    pub timeout: Option<Duration>,
    /// What is changed in their bodies.
    pub filter: Filter,
    /// How often a client of a stream hears something while it waits for the
    /// head of its answer. Absent: never.
    pub heartbeat: Option<Duration>,
}

/// What is changed in the top level of a request's JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Put in the place of the model's name.
    pub model: Option<String>,
    /// Members that are put in, whatever the client says of them: their values
    /// as JSON.
    pub set: BTreeMap<String, String>,
    /// Members that are taken out.
    pub strip: BTreeSet<String>,
}

impl Filter {
    /// Returns whether it changes nothing, so that bodies pass as they come.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.model.is_none() && self.set.is_empty() && self.strip.is_empty()
    }
}
