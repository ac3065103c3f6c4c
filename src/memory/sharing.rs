//! Which pages are counted more than once, and by how much.
//!
//! Resident sizes count a shared page in every process that maps it. Two
//! processes can share a file, shared memory (both known by their inode), or,
//! after a fork, anonymous pages. For each such thing the truth lies between
//! the largest holding and the sum of all; the sum of the proportional shares
//! is exact as long as only our processes map it, so
//!
//! ```text
//! union = max(largest rss, Σ pss), no more than the part of the file mapped
//! ```
//!
//! Where the figures come from, cheapest first: `maps` shows who maps what;
//! page tables are walked only in processes that hold a thing together with
//! another one, again when their company or size changes, and else once a
//! minute while they share. Until a process was looked at, nothing is taken
//! off its figures; later growth counts in full and shrinking scales what was
//! seen.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use super::Usage;
use super::maps::{Holding, Inode, PageWalk, SMALLEST, Share};
use super::usage::{ProcessMemory, moved_much, page_size};
use super::walker::{Find, Look, Seen};
use crate::clock::Timestamp;
use crate::model::{Bytes, WorkerId};
use crate::procfs::ProcessKey;

/// A process of one of our workers, as just measured.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) worker: WorkerId,
    pub(super) process: ProcessKey,
    pub(super) memory: ProcessMemory,
    /// Minor faults so far, where [`Sharing::watches_faults`] wants them.
    pub(super) faults: Option<u64>,
}

/// Time between two walks of a process that shares and does not change.
const AGAIN: Duration = Duration::from_secs(60);
/// Time between two walks only for the proportional share of a lone process.
const AGAIN_ALONE: Duration = Duration::from_secs(300);
/// A change brings a walk forward, but walking takes at most this part of the
/// time: one 200th.
const WALK_SHARE: u32 = 200;
const SOONEST: Duration = Duration::from_secs(1);
/// A process that kept its size for so long has settled.
const SETTLED: Duration = Duration::from_secs(3);

/// What is known of every process' mappings.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    known: BTreeMap<ProcessKey, Known>,
}

#[derive(Debug)]
struct Known {
    /// The size it last moved away from, and when.
    steady_at: Bytes,
    steady_since: Timestamp,
    maps: Option<KnownMaps>,
    walk: Option<KnownWalk>,
    /// Hash of those it may share with.
    company: u64,
    /// Faults when it was last seen to have written much.
    faults: Option<u64>,
    /// How often it was.
    writes: u64,
}

#[derive(Debug)]
struct KnownMaps {
    at: Timestamp,
    mapped: Bytes,
    inodes: BTreeMap<Inode, Bytes>,
}

#[derive(Debug)]
struct KnownWalk {
    at: Timestamp,
    took: Duration,
    memory: ProcessMemory,
    company: u64,
    /// `None` when the process did not let us look.
    found: Option<PageWalk>,
}

/// What a process may share with others of ours, at most.
#[derive(Clone, Copy, Debug, Default)]
struct Stake {
    mapped: Bytes,
    anon: Bytes,
    company: u64,
}

impl Stake {
    fn matters(&self, memory: &ProcessMemory) -> bool {
        matters(self.mapped + self.anon, memory)
    }
}

/// Returns whether so much of a process is worth a walk: 2 % and 1 MiB.
fn matters(bytes: Bytes, memory: &ProcessMemory) -> bool {
    bytes >= memory.rss().percent(2).max(SMALLEST)
}

impl Sharing {
    /// Takes in what the walker found and forgets processes that are gone.
    pub(super) fn learn(&mut self, now: Timestamp, members: &[Member], finds: Vec<Find>) {
        let mut known = std::mem::take(&mut self.known);
        for member in members {
            let entry = known.remove(&member.process);
            let rss = member.memory.rss();
            let mut entry = entry.unwrap_or(Known {
                steady_at: rss,
                steady_since: now,
                maps: None,
                walk: None,
                company: 0,
                faults: None,
                writes: 0,
            });
            entry.note_faults(member);
            if moved_much(entry.steady_at, rss) {
                entry.steady_at = rss;
                entry.steady_since = now;
            }
            self.known.insert(member.process, entry);
        }
        let sizes: BTreeMap<_, _> = members.iter().map(|m| (m.process, m.memory)).collect();
        for find in finds {
            if let Some(entry) = self.known.get_mut(&find.process) {
                entry.take(find, &sizes);
            }
        }
    }

    /// Returns whether a process' faults should be told: it shares anonymous
    /// pages, which become its own when it writes to them.
    pub(super) fn watches_faults(&self, process: &ProcessKey) -> bool {
        let walk = self
            .known
            .get(process)
            .and_then(|known| known.walk.as_ref());
        walk.and_then(|walk| walk.found.as_ref())
            .is_some_and(|found| found.anon.repeated() >= SMALLEST)
    }

    /// Returns what the walker should look at next. With `recheck`, also at
    /// mappings that seem not to have changed; `wanted` workers in any case.
    pub(super) fn plan(
        &mut self,
        now: Timestamp,
        members: &[Member],
        recheck: bool,
        wanted: &BTreeSet<WorkerId>,
    ) -> Vec<(ProcessKey, Look)> {
        let stakes = self.stakes(members);
        let mappers = members
            .iter()
            .filter(|m| m.memory.mapped() >= SMALLEST)
            .count();
        let mut list = Vec::new();
        for (member, stake) in members.iter().zip(stakes) {
            let Some(known) = self.known.get_mut(&member.process) else {
                continue;
            };
            known.company = stake.company;
            let is_wanted = wanted.contains(&member.worker);
            if !is_wanted && mappers > 1 && known.maps_are_due(now, &member.memory, recheck) {
                list.push((member.process, Look::Maps));
            } else if is_wanted || known.walk_is_due(now, &member.memory, &stake) {
                let look = if stake.mapped >= SMALLEST {
                    Look::Smaps
                } else {
                    Look::Rollup
                };
                list.push((member.process, look));
            }
        }
        list
    }

    /// Returns for each member what it may share: inodes that another member
    /// maps too, and anonymous pages when others of its tree have some.
    fn stakes(&self, members: &[Member]) -> Vec<Stake> {
        let mut holders = BTreeMap::<Inode, Vec<(usize, Bytes)>>::new();
        let mut trees = BTreeMap::<&WorkerId, Vec<(usize, Bytes)>>::new();
        for (index, member) in members.iter().enumerate() {
            let maps = self
                .known
                .get(&member.process)
                .and_then(|k| k.maps.as_ref());
            for (inode, length) in maps.iter().flat_map(|maps| &maps.inodes) {
                let most = (*length).min(member.memory.mapped());
                holders.entry(*inode).or_default().push((index, most));
            }
            if member.memory.anon >= SMALLEST {
                let tree = trees.entry(&member.worker).or_default();
                tree.push((index, member.memory.anon));
            }
        }
        let mut stakes = vec![Stake::default(); members.len()];
        for group in holders.values().filter(|group| group.len() > 1) {
            let company = company_of(members, group);
            for (index, most) in group {
                stakes[*index].mapped += *most;
                // Libraries that everyone maps do not make company.
                if matters(*most, &members[*index].memory) {
                    stakes[*index].company ^= company;
                }
            }
        }
        for group in trees.values() {
            let sizes = || group.iter().map(|(_, anon)| *anon);
            let repeated = sizes().sum::<Bytes>() - sizes().max().unwrap_or_default();
            if repeated < SMALLEST {
                continue;
            }
            // When one writes to common pages, the shares of all change.
            let writes: u64 = group
                .iter()
                .filter_map(|(index, _)| self.known.get(&members[*index].process))
                .map(|known| known.writes)
                .sum();
            let company = company_of(members, group).wrapping_add(writes);
            for (index, anon) in group {
                stakes[*index].anon = repeated.min(*anon);
                stakes[*index].company ^= company.rotate_left(1);
            }
        }
        for (stake, member) in stakes.iter_mut().zip(members) {
            stake.mapped = stake.mapped.min(member.memory.mapped());
        }
        stakes
    }

    /// Takes what is counted more than once within one tree off its usage, and
    /// adds the proportional share where it is known.
    pub(super) fn correct(&self, usage: &mut Usage, tree: &[Member]) {
        let (mut file, mut shmem) = (Bytes::ZERO, Bytes::ZERO);
        for holdings in self.holdings(tree).values() {
            let excess = total(holdings) - union(holdings);
            if holdings.iter().any(|holding| holding.shmem) {
                shmem += excess;
            } else {
                file += excess;
            }
        }
        let anon: Vec<Holding> = tree
            .iter()
            .filter_map(|member| self.anonymous(member))
            .collect();
        let largest = |part: fn(&ProcessMemory) -> Bytes| {
            tree.iter()
                .map(|m| part(&m.memory))
                .max()
                .unwrap_or_default()
        };
        usage.anon = (usage.anon - (total(&anon) - union(&anon))).max(largest(|m| m.anon));
        usage.file = (usage.file - file).max(largest(|m| m.file));
        usage.shmem = (usage.shmem - shmem).max(largest(|m| m.shmem));
        usage.rss = usage.anon + usage.file + usage.shmem;
        if let Some((pss, at)) = self.proportional(tree) {
            usage.pss = Some(pss);
            usage.pss_at = Some(at);
        }
    }

    /// Returns how many bytes the sum over all workers still counts more than
    /// once after each tree was corrected.
    pub(super) fn counted_twice(&self, members: &[Member]) -> Bytes {
        let mut by_worker = BTreeMap::<Inode, Vec<Bytes>>::new();
        for tree in members.chunk_by(|a, b| a.worker == b.worker) {
            for (inode, holdings) in self.holdings(tree) {
                by_worker.entry(inode).or_default().push(union(&holdings));
            }
        }
        let all = self.holdings(members);
        by_worker
            .iter()
            .filter(|(_, workers)| workers.len() > 1)
            .map(|(inode, workers)| workers.iter().copied().sum::<Bytes>() - union(&all[inode]))
            .sum()
    }

    /// Returns what each inode's holders hold of it, scaled to their size now.
    fn holdings(&self, members: &[Member]) -> BTreeMap<Inode, Vec<Holding>> {
        let mut all = BTreeMap::<Inode, Vec<Holding>>::new();
        for member in members {
            let Some((known, walk)) = self.walk_of(member) else {
                continue;
            };
            let (then, now) = (known.memory.mapped(), member.memory.mapped());
            for (inode, holding) in &walk.inodes {
                let holding = holding.scaled(then, now);
                all.entry(*inode).or_default().push(holding);
            }
        }
        all
    }

    fn anonymous(&self, member: &Member) -> Option<Holding> {
        let (known, walk) = self.walk_of(member)?;
        let holding = Holding {
            share: walk.anon,
            span: (0, u64::MAX),
            shmem: false,
        };
        Some(holding.scaled(known.memory.anon, member.memory.anon))
    }

    fn walk_of(&self, member: &Member) -> Option<(&KnownWalk, &PageWalk)> {
        let known = self.known.get(&member.process)?.walk.as_ref()?;
        Some((known, known.found.as_ref()?))
    }

    /// Returns the tree's proportional share and the age of its oldest part.
    /// A member that was not walked must be small; it counts by its size.
    fn proportional(&self, tree: &[Member]) -> Option<(Bytes, Timestamp)> {
        let small = tree
            .iter()
            .map(|m| m.memory.rss())
            .sum::<Bytes>()
            .percent(2);
        let mut pss = Bytes::ZERO;
        let mut oldest = None;
        for member in tree {
            match self.walk_of(member) {
                Some((known, walk)) => {
                    pss += walk.pss;
                    oldest = Some(oldest.unwrap_or(known.at).min(known.at));
                }
                None if member.memory.rss() <= small => pss += member.memory.rss(),
                None => return None,
            }
        }
        Some((pss, oldest?))
    }
}

impl Known {
    /// Counts how often a process that shares anonymous pages took so many
    /// faults that a good part of them may be its own by now.
    fn note_faults(&mut self, member: &Member) {
        let (Some(then), Some(now)) = (self.faults, member.faults) else {
            self.faults = member.faults;
            return;
        };
        let faulted = Bytes(now.saturating_sub(then).saturating_mul(page_size()));
        if faulted >= member.memory.rss().percent(2).max(Bytes::mib(16)) {
            self.faults = Some(now);
            self.writes += 1;
        }
    }

    fn take(&mut self, find: Find, sizes: &BTreeMap<ProcessKey, ProcessMemory>) {
        let memory = sizes.get(&find.process).copied().unwrap_or_default();
        let found = match find.seen {
            Seen::Maps(inodes) => {
                self.maps = Some(KnownMaps {
                    at: find.at,
                    mapped: memory.mapped(),
                    inodes,
                });
                return;
            }
            Seen::Walk(walk) => Some(walk),
            Seen::Nothing => None,
        };
        if found.is_none() && self.maps.is_none() {
            // Its maps cannot be read either: do not ask again until it grows.
            self.maps = Some(KnownMaps {
                at: find.at,
                mapped: memory.mapped(),
                inodes: BTreeMap::new(),
            });
        }
        self.walk = Some(KnownWalk {
            at: find.at,
            took: find.took,
            memory,
            company: self.company,
            found,
        });
    }

    fn maps_are_due(&self, now: Timestamp, memory: &ProcessMemory, recheck: bool) -> bool {
        if memory.mapped() < SMALLEST {
            return false;
        }
        self.maps.as_ref().is_none_or(|maps| {
            let grown = moved_much(maps.mapped, memory.mapped());
            (grown || recheck) && now.since(maps.at) >= SOONEST
        })
    }

    fn walk_is_due(&self, now: Timestamp, memory: &ProcessMemory, stake: &Stake) -> bool {
        let has_settled = now.since(self.steady_since) >= SETTLED;
        let Some(last) = &self.walk else {
            return stake.matters(memory) || has_settled;
        };
        let age = now.since(last.at);
        let (then, size) = (last.memory.rss(), memory.rss());
        let moved = size.max(then) - size.min(then);
        let changed = moved >= then.percent(25).max(Bytes::mib(16));
        if !stake.matters(memory) {
            return changed && has_settled && age >= AGAIN_ALONE;
        }
        let soon = (last.took * WALK_SHARE).clamp(SOONEST, AGAIN);
        let other_company = last.company != stake.company;
        ((changed || other_company) && age >= soon) || (last.found_sharing(memory) && age >= AGAIN)
    }
}

impl KnownWalk {
    fn found_sharing(&self, memory: &ProcessMemory) -> bool {
        self.found.as_ref().is_some_and(|walk| {
            let inodes: Bytes = walk.inodes.values().map(|h| h.share.repeated()).sum();
            matters(inodes + walk.anon.repeated(), memory)
        })
    }
}

impl Share {
    /// Returns how much of it others are charged with.
    fn repeated(&self) -> Bytes {
        self.rss - self.pss
    }
}

impl Holding {
    /// Shrinks a holding as its process shrank since it was seen. Growth is
    /// not taken to be shared.
    fn scaled(&self, then: Bytes, now: Bytes) -> Self {
        let scale = |bytes: Bytes| {
            if now >= then {
                return bytes;
            }
            let scaled = u128::from(bytes.0) * u128::from(now.0) / u128::from(then.0);
            Bytes(u64::try_from(scaled).unwrap_or(bytes.0))
        };
        Self {
            share: Share {
                rss: scale(self.share.rss),
                pss: scale(self.share.pss),
            },
            ..*self
        }
    }
}

fn total(holdings: &[Holding]) -> Bytes {
    holdings.iter().map(|holding| holding.share.rss).sum()
}

/// Returns how much is resident of a thing that all of `holdings` hold, each
/// page counted once.
fn union(holdings: &[Holding]) -> Bytes {
    let [first, rest @ ..] = holdings else {
        return Bytes::ZERO;
    };
    let (mut from, mut to) = first.span;
    let mut largest = first.share.rss;
    let mut shares = first.share.pss;
    for holding in rest {
        from = from.min(holding.span.0);
        to = to.max(holding.span.1);
        largest = largest.max(holding.share.rss);
        shares += holding.share.pss;
    }
    let most = Bytes(to.saturating_sub(from)).min(total(holdings));
    shares.min(most).max(largest)
}

fn company_of(members: &[Member], group: &[(usize, Bytes)]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (index, _) in group {
        members[*index].process.hash(&mut hasher);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests;
