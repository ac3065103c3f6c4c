//! Which thread this is.

use std::sync::atomic::{AtomicUsize, Ordering};

static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static HERE: Home = Home(NEXT.fetch_add(1, Ordering::Relaxed));
}

/// A thread: that on which a connection was last used, and whose runtime waits for what
/// comes on it; on another one each piece would wake two. Or that on which something
/// is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home(usize);

impl Home {
    /// Returns this thread.
    #[must_use]
    pub fn here() -> Self {
        HERE.with(|here| *here)
    }

    /// Returns which of so many parts of something this thread has, with others if
    /// there are more threads.
    #[must_use]
    pub const fn part(self, parts: usize) -> usize {
        self.0 % parts
    }
}
