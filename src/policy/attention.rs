//! How closely the machine and the gates should be watched.

use super::Policy;
use super::lifecycle::ModelState;
use super::pressure::Levels;
use super::words::{Phase, PressureLevel};
use crate::model::Domain;

impl Policy {
    /// Returns whether something loads, dies or presses, so that measurements
    /// should come quickly.
    #[must_use]
    pub fn is_restless(&self) -> bool {
        self.models.values().any(|m| {
            m.is_leaving() || matches!(m.phase, Phase::Starting | Phase::Parking | Phase::Unparking)
        }) || self
            .ledger
            .domains
            .keys()
            .any(|domain| self.ledger.is_settling(*domain))
            || self.levels.worst() != PressureLevel::None
    }

    /// Returns whether headroom of the host could be short within a second, so
    /// that it should be watched closely; not while there is nobody to end.
    #[must_use]
    pub fn is_watchful(&self) -> bool {
        let (look, thresholds) = (self.look(Domain::Host), self.thresholds(Domain::Host));
        self.models.values().any(ModelState::is_live) && Levels::is_near(look, thresholds)
    }

    /// Returns whether somebody waits for busy workers to become idle, so that
    /// their gates should be watched.
    #[must_use]
    pub fn awaits_idle(&self) -> bool {
        self.blocked
            || self
                .models
                .values()
                .any(|m| m.phase == Phase::Draining || m.over_ceiling().is_some())
            || self.levels.worst() != PressureLevel::None
    }
}
