//! Random changes of the configuration: a model changes so that its worker has
//! to go, or not, is removed, and comes back.

use std::num::NonZeroU32;
use std::sync::Arc;

use super::super::*;
use super::MODELS;
use super::court::Court;
use crate::policy::testing::name;

/// What changes of a model.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    /// How many requests fit into its worker.
    Live(u32),
    /// What its worker is started with.
    Worker,
    /// It is no longer configured.
    Gone,
}

impl Court {
    /// Changes one model, or configures it again.
    pub(super) fn reconfigure(&mut self, m: usize, how: How) {
        let known = self.world.policy.models().get(MODELS[m]);
        let is_there = known.is_some_and(|state| !state.removed);
        let mut spec = self.specs[m].clone();
        let new_worker = match how {
            How::Live(most) => {
                spec.concurrency = NonZeroU32::new(most);
                !is_there
            }
            How::Worker | How::Gone => true,
        };
        let removed = matches!(how, How::Gone) && is_there;
        self.specs[m].clone_from(&spec);
        let setup = Setup {
            spec: Arc::new(spec),
            weights: Bytes::ZERO,
            footprint: BTreeMap::new(),
        };
        let change = Change {
            settings: self.world.policy.settings.clone(),
            models: match removed {
                true => Vec::new(),
                false => vec![ModelChange { setup, new_worker }],
            },
            removed: match removed {
                true => vec![name(MODELS[m])],
                false => Vec::new(),
            },
        };
        self.step(Event::Configure(Box::new(change)));
    }

    /// A worker goes for a changed configuration when nobody is inside, or
    /// after as long as a drain may take.
    pub(super) fn judge_replaced(&self, worker: &WorkerId, reason: &EvictReason) {
        if matches!(reason, EvictReason::Changed | EvictReason::Removed) {
            let inside = self.world.inside.get(worker).map_or(0, |a| a.inside);
            let until = self.world.policy.models()[&worker.model].drain_until;
            let is_over = until.is_some_and(|at| at <= self.world.now);
            assert!(inside == 0 || is_over, "{worker} is cut for {reason:?}");
        }
    }
}
