//! Which processes belong to one worker.
//!
//! A process belongs when it is the leader, is in a known process group or
//! session led by a member, has a member as its parent, was seen to belong
//! before, or came to us as an orphan and carries the worker's mark: whoever
//! forks twice stays in the tree. Identity is always pid and start time.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::mark::{Mark, Marks};
use super::{ProcessKey, ProcessTable};

/// One worker's processes. Shared by the worker task, which signals them, and
/// the sampler, which measures them; the lock is held for one pass over a
/// table that was read before.
#[derive(Debug)]
pub struct ProcessTree {
    leader: ProcessKey,
    mark: Option<(Mark, Arc<Marks>)>,
    members: Mutex<Members>,
}

#[derive(Debug)]
struct Members {
    known: BTreeSet<ProcessKey>,
    /// Order of the newest table they were taken from.
    newest: u64,
}

impl ProcessTree {
    /// Returns the tree that so far holds its leader, which leads its own
    /// process group.
    #[must_use]
    pub fn new(leader: ProcessKey) -> Self {
        Self {
            leader,
            mark: None,
            members: Mutex::new(Members {
                known: BTreeSet::from([leader]),
                newest: 0,
            }),
        }
    }

    /// Returns a tree whose roots are these processes; `None` without any.
    #[must_use]
    pub fn of(roots: &[ProcessKey]) -> Option<Self> {
        let tree = Self::new(*roots.first()?);
        tree.join(roots.iter().copied());
        Some(tree)
    }

    /// As [`ProcessTree::new`], for a leader that was spawned with `mark` in
    /// its environment.
    #[must_use]
    pub fn marked(leader: ProcessKey, mark: Mark, marks: Arc<Marks>) -> Self {
        Self {
            mark: Some((mark, marks)),
            ..Self::new(leader)
        }
    }

    /// Takes in processes that are known to belong.
    pub fn join(&self, members: impl IntoIterator<Item = ProcessKey>) {
        let mut own = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        own.known.extend(members);
    }

    /// Returns the process that was spawned.
    #[must_use]
    pub fn leader(&self) -> ProcessKey {
        self.leader
    }

    /// Takes in new descendants and forgets processes that are gone. Returns
    /// the members that live and are no zombies.
    ///
    /// A table older than one that was seen forgets nobody: a process that is
    /// not in it yet may belong only because it was seen to.
    pub fn refresh(&self, table: &ProcessTable) -> Vec<ProcessKey> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pids: BTreeSet<i32> = members
            .known
            .iter()
            .filter(|key| table.get(key.pid).is_some_and(|stat| stat.key == **key))
            .map(|key| key.pid)
            .collect();
        if let Some((mark, marks)) = &self.mark {
            pids.extend(marks.carriers(mark, table));
        }
        // The group outlives its leader; its number cannot be given away while
        // the group has a member, and a group without one matches nobody.
        let leader_reused = table
            .get(self.leader.pid)
            .is_some_and(|stat| stat.key != self.leader);
        let mut look_at: Vec<i32> = pids.iter().copied().collect();
        if !leader_reused {
            look_at.extend(table.group(self.leader.pid));
            pids.extend(table.group(self.leader.pid));
        }
        while let Some(pid) = look_at.pop() {
            let next_to_it = table.children(pid).chain(table.group(pid));
            for found in next_to_it.chain(table.session(pid)) {
                if pids.insert(found) {
                    look_at.push(found);
                }
            }
        }
        let live: Vec<ProcessKey> = pids
            .iter()
            .filter_map(|pid| table.get(*pid))
            .filter(|stat| !stat.is_zombie())
            .map(|stat| stat.key)
            .collect();
        // Zombies are kept as known: a child forked before the end may only
        // be found through them in the next pass.
        if table.order >= members.newest {
            members.newest = table.order;
            members.known.clear();
        }
        let found = pids.iter().filter_map(|pid| table.get(*pid));
        members.known.extend(found.map(|stat| stat.key));
        members.known.insert(self.leader);
        live
    }

    /// Returns the processes known to belong, living or not yet reaped, as of
    /// the last refresh.
    #[must_use]
    pub fn known(&self) -> Vec<ProcessKey> {
        self.members
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .known
            .iter()
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ProcessStat;
    use super::*;

    fn process(pid: i32, ppid: i32, pgrp: i32, session: i32) -> ProcessStat {
        ProcessStat {
            key: ProcessKey {
                pid,
                start_time: u64::try_from(pid).expect("positive"),
            },
            state: 'S',
            ppid,
            pgrp,
            session,
            rss_pages: 1,
        }
    }

    fn pids(keys: &[ProcessKey]) -> Vec<i32> {
        keys.iter().map(|k| k.pid).collect()
    }

    #[test]
    fn children_groups_and_sessions_belong_and_strangers_do_not() {
        let tree = ProcessTree::new(process(10, 1, 10, 1).key);
        let table = ProcessTable::of([
            process(1, 0, 1, 1),
            process(10, 1, 10, 1),
            process(11, 10, 10, 1),
            process(12, 11, 12, 12),
            process(13, 1, 12, 12),
            process(20, 1, 20, 1),
        ]);
        assert_eq!(pids(&tree.refresh(&table)), [10, 11, 12, 13]);
    }

    #[test]
    fn a_double_forked_daemon_seen_once_stays_in_the_tree() {
        let tree = ProcessTree::new(process(10, 1, 10, 1).key);
        tree.refresh(&ProcessTable::of([
            process(10, 1, 10, 1),
            process(11, 10, 11, 11),
            process(12, 11, 11, 11),
        ]));
        // The middle process died; its child re-parented and leads nothing.
        let later = ProcessTable::of([process(10, 1, 10, 1), process(12, 1, 99, 99)]);
        assert_eq!(pids(&tree.refresh(&later)), [10, 12]);
    }

    #[test]
    fn an_older_table_that_arrives_late_forgets_nobody() {
        let tree = ProcessTree::new(process(10, 1, 10, 1).key);
        let older = ProcessTable::of([process(10, 1, 10, 1)]);
        let newer = ProcessTable::of([
            process(10, 1, 10, 1),
            process(11, 10, 11, 11),
            process(12, 11, 99, 99),
        ]);
        tree.refresh(&newer);
        assert_eq!(pids(&tree.refresh(&older)), [10]);
        // Its parent is gone; it is known only because it was seen before.
        let later = ProcessTable::of([process(10, 1, 10, 1), process(12, 1, 99, 99)]);
        assert_eq!(pids(&tree.refresh(&later)), [10, 12]);
    }

    #[test]
    fn a_reused_pid_is_a_stranger() {
        let tree = ProcessTree::new(process(10, 1, 10, 1).key);
        let mut reused = process(10, 1, 10, 1);
        reused.key.start_time = 999;
        assert!(tree.refresh(&ProcessTable::of([reused])).is_empty());
    }
}
