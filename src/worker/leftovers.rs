//! Ends what nobody is in charge of: workers of a residentd that died, and
//! orphans that no tree has claimed.

use std::path::Path;
use std::time::Duration;

use tracing::warn;

use super::adopt::{Adoptee, Inspected};
use super::{OWN_FOLDERS, process};
use crate::clock::Clock;
use crate::procfs::mark::{self, Owner};
use crate::procfs::{ProcessKey, ProcessTable, ProcessTree};

/// A process that lives this long after SIGKILL hangs in the kernel; nothing
/// waits for it longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ends the workers, with all their descendants, that were spawned by a
/// residentd which held the same state as `owner` and is no more: those of
/// `found` that are not taken back, and whoever carries a mark that none of
/// those has which are.
pub async fn end_left_behind(owner: &Owner, found: &Inspected, clock: Clock) {
    let Ok(table) = ProcessTable::scan() else {
        return;
    };
    let kept: Vec<_> = found.adoptees.iter().map(Adoptee::mark).collect();
    let mut left = mark::left_behind(owner, &kept, &table);
    left.extend(&found.doomed);
    left.sort_unstable();
    left.dedup();
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

/// Takes away the files that lives of an earlier residentd had for themselves,
/// but for those of `found` that are taken back.
pub fn tidy(state: &Path, found: &Inspected) {
    let kept = |path: &Path| {
        let mut records = found.adoptees.iter().map(|adoptee| &adoptee.record);
        records.any(|record| {
            let sockets = [&record.socket, &record.notify];
            record.report == path || sockets.into_iter().flatten().any(|socket| socket == path)
        })
    };
    for folder in OWN_FOLDERS {
        let Ok(files) = std::fs::read_dir(state.join(folder)) else {
            continue;
        };
        for file in files.flatten().map(|file| file.path()) {
            if !kept(&file) {
                // What cannot be taken away lies there for nobody.
                let _ = std::fs::remove_file(file);
            }
        }
    }
}
