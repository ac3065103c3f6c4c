//! Where a connection to a worker is waited for.

use std::sync::atomic::{AtomicUsize, Ordering};

static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static HERE: Home = Home(NEXT.fetch_add(1, Ordering::Relaxed));
}

/// A thread on which a connection was last used, and whose runtime waits for what
/// comes on it. On another one each piece would wake two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Home(usize);

impl Home {
    /// Returns this thread.
    pub(super) fn here() -> Self {
        HERE.with(|here| *here)
    }
}
