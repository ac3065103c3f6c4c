//! What two configurations differ in.

use super::ModelName;

/// What a configuration changes of the one before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Models that are new.
    pub added: Vec<ModelName>,
    /// Models that are gone.
    pub removed: Vec<ModelName>,
    /// Models that both have, of which something is different.
    pub changed: Vec<ChangedModel>,
    /// Keys outside of models that take effect at once.
    pub settings: Vec<&'static str>,
    /// Keys that only take effect when residentd is started anew.
    pub needs_restart: Vec<&'static str>,
}

/// A model of which something is different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedModel {
    /// Which.
    pub model: ModelName,
    /// What is different of it.
    pub keys: Vec<&'static str>,
    /// When all of that has taken effect.
    pub takes: Takes,
}

/// When a change of a model takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Takes {
    /// At once, also for the worker it has.
    AtOnce,
    /// With its next worker; the one it has stays.
    NextWorker,
    /// With its next worker, for which the one it has goes.
    NewWorker,
}

impl Takes {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AtOnce => "at_once",
            Self::NextWorker => "next_worker",
            Self::NewWorker => "new_worker",
        }
    }
}

impl Difference {
    /// Returns whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
