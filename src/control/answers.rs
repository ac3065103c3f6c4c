//! Answers that are given once everyone can see what they tell of.
//!
//! Whoever hears that a limit is set may look at the published view at once, and
//! must find it there. So answers wait until the view after the step is out.
//! Leases do not wait: whoever gets one looks at nothing. Whoever is refused one may.

use super::Refusal;
use super::command::Reply;

/// Answers that wait for the next view.
#[derive(Default)]
pub(super) struct Answers(Vec<Box<dyn FnOnce() + Send>>);

impl Answers {
    /// Puts an answer off until [`Self::give`].
    pub(super) fn put<T: Send + 'static>(&mut self, reply: Reply<T>, answer: Result<T, Refusal>) {
        self.0.push(Box::new(move || {
            // Whoever asked may have left.
            let _ = reply.send(answer);
        }));
    }

    /// Gives every answer, in the order they came.
    pub(super) fn give(&mut self) {
        for answer in self.0.drain(..) {
            answer();
        }
    }
}
