//! Ends what nobody is in charge of: workers of a residentd that died, and
//! orphans that no tree has claimed.

use std::time::Duration;

use tracing::warn;

use super::process;
use crate::clock::Clock;
use crate::procfs::mark::{self, Owner};
use crate::procfs::{ProcessKey, ProcessTable, ProcessTree};

/// A process that lives this long after SIGKILL hangs in the kernel; nothing
/// waits for it longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ends the workers, with all their descendants, that were spawned by a
/// residentd which held the same state as `owner` and is no more.
pub async fn end_left_behind(owner: &Owner, clock: Clock) {
    let Ok(table) = ProcessTable::scan() else {
        return;
    };
    let left = mark::left_behind(owner, &table);
    end(
        &left,
        clock,
        "ending workers that an earlier residentd left behind",
    )
    .await;
}

/// Ends all children of this process. For the end of residentd, when every
/// worker is gone: what is left came from one and hid from us.
pub async fn end_orphans(clock: Clock) {
    let Ok(table) = ProcessTable::scan() else {
        return;
    };
    let me = i32::try_from(std::process::id()).unwrap_or_default();
    let children = table.iter().filter(|p| p.ppid == me && !p.is_zombie());
    let orphans: Vec<_> = children.map(|stat| stat.key).collect();
    end(&orphans, clock, "ending processes that workers left behind").await;
}

async fn end(roots: &[ProcessKey], clock: Clock, why: &'static str) {
    let Some(tree) = ProcessTree::of(roots) else {
        return;
    };
    let pids: Vec<_> = roots.iter().map(|key| key.pid).collect();
    warn!(?pids, "{why}");
    process::end(&tree, clock, Some(PATIENCE)).await;
}
