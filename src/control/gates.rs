//! What the controller reads from the gates of ready workers, and has them tell.

use super::task::Task;
use crate::policy::Activity;

impl Task {
    /// Tells the policy how the gates stand and what went through them.
    pub(super) fn read_gates(&mut self) {
        for (id, live) in &self.workers {
            let Some(ready) = &live.ready else { continue };
            if ready.gate.is_bounded() {
                // Nobody may come in between this look and who is let in by it.
                ready.gate.hold(true);
            }
            let read = ready.gate.read();
            let activity = Activity {
                inside: read.inside,
                last_left: read.last_left,
                last_entered: read.last_entered,
            };
            self.policy.observe([(id, activity)]);
            if let Some(gaps) = ready.gate.take_gaps() {
                self.policy.learn_gaps(&id.model, &gaps);
            }
        }
    }

    /// Lets requests in again where nobody waits.
    pub(super) fn release_gates(&self) {
        for (id, live) in &self.workers {
            let Some(ready) = &live.ready else { continue };
            if ready.gate.is_bounded() && self.policy.models()[&id.model].queue.is_empty() {
                ready.gate.hold(false);
            }
        }
    }

    /// Watches the gates somebody waits for. Returns whether one became empty
    /// before it was watched, so that nobody would tell.
    pub(super) fn watch_gates(&mut self) -> bool {
        let wanted = self.policy.awaits_idle();
        let mut missed = false;
        for (id, live) in &self.workers {
            let Some(ready) = &live.ready else { continue };
            let inside = ready.gate.watch(wanted);
            let believed = self.policy.models()[&id.model].activity.inside;
            missed |= wanted && inside == 0 && believed > 0;
        }
        missed
    }
}
