use std::collections::BTreeSet;

use super::*;
use crate::model::ModelName;

const F: Inode = Inode {
    device: (8, 1),
    number: 42,
};

fn worker(name: &str) -> WorkerId {
    WorkerId {
        model: ModelName::new(name).expect("a valid name"),
        generation: 1,
    }
}

fn key(pid: i32) -> ProcessKey {
    ProcessKey { pid, start_time: 7 }
}

/// A process with this many MiB of anonymous and file pages.
fn member(name: &str, pid: i32, anon: u64, file: u64) -> Member {
    Member {
        worker: worker(name),
        process: key(pid),
        memory: ProcessMemory {
            anon: Bytes::mib(anon),
            file: Bytes::mib(file),
            ..ProcessMemory::default()
        },
        faults: None,
    }
}

fn find(pid: i32, at: u64, seen: Seen) -> Find {
    Find {
        process: key(pid),
        at: Timestamp::from_millis(at),
        took: Duration::from_millis(1),
        seen,
    }
}

fn maps(pid: i32, length: u64) -> Find {
    let inodes = BTreeMap::from([(F, Bytes::mib(length))]);
    find(pid, 0, Seen::Maps(inodes))
}

/// A walk that found `rss` and `pss` MiB of a file of `size` MiB.
fn walk(pid: i32, size: u64, rss: u64, pss: u64) -> Find {
    let holding = Holding {
        share: Share {
            rss: Bytes::mib(rss),
            pss: Bytes::mib(pss),
        },
        span: (0, size << 20),
        shmem: false,
    };
    let walk = PageWalk {
        pss: Bytes::mib(pss),
        anon: Share::default(),
        inodes: BTreeMap::from([(F, holding)]),
    };
    find(pid, 0, Seen::Walk(walk))
}

fn anon_walk(pid: i32, rss: u64, pss: u64) -> Find {
    let walk = PageWalk {
        pss: Bytes::mib(pss),
        anon: Share {
            rss: Bytes::mib(rss),
            pss: Bytes::mib(pss),
        },
        inodes: BTreeMap::new(),
    };
    find(pid, 0, Seen::Walk(walk))
}

fn learned(members: &[Member], finds: Vec<Find>) -> Sharing {
    let mut sharing = Sharing::default();
    sharing.learn(Timestamp::START, members, finds);
    sharing
}

fn corrected(sharing: &Sharing, tree: &[Member]) -> Usage {
    let mut usage = super::super::usage::sum(tree.iter().map(|m| &m.memory));
    sharing.correct(&mut usage, tree);
    usage
}

fn plan(sharing: &mut Sharing, millis: u64, members: &[Member]) -> Vec<(i32, Look)> {
    let now = Timestamp::from_millis(millis);
    sharing.learn(now, members, Vec::new());
    let list = sharing.plan(now, members, false, &BTreeSet::new());
    list.into_iter()
        .map(|(key, look)| (key.pid, look))
        .collect()
}

#[test]
fn a_file_of_two_workers_counts_once_in_the_total_and_fully_in_each() {
    let members = [member("a", 1, 0, 100), member("b", 2, 0, 100)];
    let sharing = learned(&members, vec![walk(1, 100, 100, 50), walk(2, 100, 100, 50)]);
    assert_eq!(sharing.counted_twice(&members), Bytes::mib(100));
    assert_eq!(corrected(&sharing, &members[..1]).rss, Bytes::mib(100));
}

#[test]
fn halves_of_one_file_in_two_processes_are_added() {
    // Two ranks map the same weights and touch a half each: nothing is shared.
    let members = [member("a", 1, 0, 50), member("a", 2, 0, 50)];
    let sharing = learned(&members, vec![walk(1, 100, 50, 50), walk(2, 100, 50, 50)]);
    assert_eq!(corrected(&sharing, &members).rss, Bytes::mib(100));
}

#[test]
fn a_file_that_strangers_map_too_still_counts_once() {
    // Ten processes in all share it, so the proportional shares are small.
    let members = [member("a", 1, 0, 100), member("b", 2, 0, 100)];
    let sharing = learned(&members, vec![walk(1, 100, 100, 10), walk(2, 100, 100, 10)]);
    assert_eq!(sharing.counted_twice(&members), Bytes::mib(100));
}

#[test]
fn shares_read_before_a_third_came_do_not_exceed_the_file() {
    let members = [
        member("a", 1, 0, 90),
        member("b", 2, 0, 90),
        member("c", 3, 0, 90),
    ];
    let finds = vec![
        walk(1, 90, 90, 45),
        walk(2, 90, 90, 45),
        walk(3, 90, 90, 30),
    ];
    let sharing = learned(&members, finds);
    assert_eq!(sharing.counted_twice(&members), Bytes::mib(180));
    // One of them ends: what the others hold needs no new walk.
    assert_eq!(sharing.counted_twice(&members[1..]), Bytes::mib(90));
    assert_eq!(sharing.counted_twice(&members[2..]), Bytes::ZERO);
}

#[test]
fn forked_children_count_their_common_pages_once() {
    let members = [
        member("a", 1, 210, 0),
        member("a", 2, 200, 0),
        member("a", 3, 250, 0),
    ];
    // 200 MiB in common; 10 and 50 MiB of their own.
    let finds = vec![
        anon_walk(1, 210, 77),
        anon_walk(2, 200, 67),
        anon_walk(3, 250, 116),
    ];
    let sharing = learned(&members, finds);
    let usage = corrected(&sharing, &members);
    assert_eq!((usage.anon, usage.rss), (Bytes::mib(260), Bytes::mib(260)));
    assert_eq!(usage.pss, Some(Bytes::mib(260)));
}

#[test]
fn a_process_nobody_looked_at_counts_in_full() {
    let members = [member("a", 1, 100, 100), member("a", 2, 100, 100)];
    let sharing = learned(&members, vec![anon_walk(1, 100, 50)]);
    assert_eq!(corrected(&sharing, &members).rss, Bytes::mib(400));
    assert_eq!(corrected(&sharing, &members).pss, None);
}

#[test]
fn a_shrunken_mapping_takes_less_off() {
    let then = [member("a", 1, 0, 100), member("a", 2, 0, 100)];
    let sharing = learned(&then, vec![walk(1, 100, 100, 50), walk(2, 100, 100, 50)]);
    // The kernel dropped half of each; growth of one would count in full.
    let now = [member("a", 1, 0, 50), member("a", 2, 0, 50)];
    assert_eq!(corrected(&sharing, &now).rss, Bytes::mib(50));
    let grown = [member("a", 1, 0, 100), member("a", 2, 0, 130)];
    assert_eq!(corrected(&sharing, &grown).rss, Bytes::mib(130));
}

#[test]
fn a_correction_never_goes_below_the_largest_member() {
    let then = [member("a", 1, 0, 100), member("a", 2, 0, 100)];
    let sharing = learned(&then, vec![walk(1, 100, 100, 50), walk(2, 100, 100, 50)]);
    let now = [member("a", 1, 0, 100), member("a", 2, 0, 5)];
    assert!(corrected(&sharing, &now).rss >= Bytes::mib(100));
}

#[test]
fn a_lone_process_is_walked_once_and_only_when_it_has_settled() {
    let members = [member("a", 1, 1000, 100)];
    let mut sharing = Sharing::default();
    assert_eq!(plan(&mut sharing, 0, &members), []);
    assert_eq!(plan(&mut sharing, 2_000, &members), []);
    assert_eq!(plan(&mut sharing, 3_000, &members), [(1, Look::Rollup)]);
    let found = anon_walk(1, 1000, 1000);
    sharing.learn(Timestamp::from_millis(3_100), &members, vec![found]);
    for minutes in 1..20 {
        assert_eq!(plan(&mut sharing, minutes * 60_000, &members), []);
    }
}

#[test]
fn a_growing_process_has_not_settled() {
    let mut sharing = Sharing::default();
    for second in 0..30 {
        let members = [member("a", 1, 100 + second * 50, 0)];
        assert_eq!(plan(&mut sharing, second * 1000, &members), []);
    }
}

#[test]
fn two_who_map_one_file_are_walked_at_once_and_then_each_minute() {
    let members = [member("a", 1, 0, 100), member("b", 2, 0, 100)];
    let mut sharing = Sharing::default();
    let both = |look| vec![(1, look), (2, look)];
    assert_eq!(plan(&mut sharing, 0, &members), both(Look::Maps));
    sharing.learn(Timestamp::START, &members, vec![maps(1, 100), maps(2, 100)]);
    assert_eq!(plan(&mut sharing, 100, &members), both(Look::Smaps));
    sharing.learn(
        Timestamp::START,
        &members,
        vec![walk(1, 100, 100, 50), walk(2, 100, 100, 50)],
    );
    assert_eq!(plan(&mut sharing, 59_000, &members), []);
    assert_eq!(plan(&mut sharing, 60_000, &members), both(Look::Smaps));
}

#[test]
fn a_small_common_library_is_no_reason_to_walk_a_huge_process() {
    let members = [member("a", 1, 8000, 10), member("b", 2, 0, 10)];
    let mut sharing = learned(&members, vec![maps(1, 5), maps(2, 5)]);
    // The small one is looked at; it costs next to nothing.
    assert_eq!(plan(&mut sharing, 100, &members), [(2, Look::Smaps)]);
}

#[test]
fn a_tree_that_turned_out_not_to_share_is_walked_again_only_when_it_changes() {
    let mut members = vec![member("a", 1, 500, 0), member("a", 2, 800, 0)];
    let mut sharing = Sharing::default();
    let both = [(1, Look::Rollup), (2, Look::Rollup)];
    assert_eq!(plan(&mut sharing, 0, &members), both);
    let finds = vec![anon_walk(1, 500, 500), anon_walk(2, 800, 800)];
    sharing.learn(Timestamp::START, &members, finds);
    assert_eq!(plan(&mut sharing, 600_000, &members), []);
    members.push(member("a", 3, 400, 0));
    assert_eq!(plan(&mut sharing, 601_000, &members).len(), 3);
}

#[test]
fn a_process_that_does_not_let_us_look_is_not_asked_each_time() {
    let members = [member("a", 1, 0, 100), member("b", 2, 0, 100)];
    let refused = |pid| find(pid, 0, Seen::Nothing);
    let mut sharing = learned(&members, vec![refused(1), refused(2)]);
    assert_eq!(plan(&mut sharing, 59_000, &members), []);
    assert_eq!(sharing.counted_twice(&members), Bytes::ZERO);
}

#[test]
fn a_child_that_writes_what_it_inherited_has_its_tree_walked_again_soon() {
    let mut members = [member("a", 1, 200, 0), member("a", 2, 200, 0)];
    let mut sharing = Sharing::default();
    plan(&mut sharing, 0, &members);
    let finds = vec![anon_walk(1, 200, 100), anon_walk(2, 200, 100)];
    sharing.learn(Timestamp::START, &members, finds);
    assert!(sharing.watches_faults(&key(2)));
    members[1].faults = Some(1_000);
    assert_eq!(plan(&mut sharing, 100, &members), []);
    members[1].faults = Some(1_000 + (50 << 20) / page_size());
    assert_eq!(plan(&mut sharing, 900, &members), []);
    let both = [(1, Look::Rollup), (2, Look::Rollup)];
    assert_eq!(plan(&mut sharing, 1_100, &members), both);
}
