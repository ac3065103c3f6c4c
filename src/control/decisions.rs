//! The newest decisions, for those who ask why. The controller writes through
//! a [`Recorder`] and never waits for a reader; whoever reads keeps its own
//! place, and is told how many decisions it came too late for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::decision::{Decision, Kind, What};
use crate::clock::{Clock, Timestamp};
use crate::model::ModelName;

/// Decisions that are kept: enough for hours of swapping, well under a MiB.
pub const KEPT: usize = 1000;

/// Decisions looked at in one go, so that the lock is held for microseconds.
const LOOKED_AT: usize = 256;

type Ring = Mutex<VecDeque<Arc<Decision>>>;

/// The controller's end.
#[derive(Debug)]
pub struct Recorder {
    ring: Arc<Ring>,
    newest: watch::Sender<u64>,
}

/// The readers' end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Decisions {
    ring: Arc<Ring>,
    newest: watch::Receiver<u64>,
    epoch: u64,
}

/// Which decisions are looked for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// About this model only.
    pub model: Option<ModelName>,
    /// Of these kinds only; of any when empty.
    pub kinds: Vec<Kind>,
}

/// What a look found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Oldest first.
    pub decisions: Vec<Arc<Decision>>,
    /// Decisions of any kind that were asked for and are no longer kept.
    pub missed: u64,
    /// Everything up to this one was looked at: the next look begins after it.
    pub seen: u64,
}

/// Returns both ends of a new record, whose first decision gets this number.
#[must_use]
pub fn record(clock: Clock, first: u64) -> (Recorder, Decisions) {
    let ring: Arc<Ring> = Arc::default();
    let (sender, newest) = watch::channel(first.saturating_sub(1));
    let recorder = Recorder {
        ring: Arc::clone(&ring),
        newest: sender,
    };
    let epoch = std::time::Duration::try_from_secs_f64(clock.unix(clock.began()));
    let decisions = Decisions {
        ring,
        newest,
        epoch: u64::try_from(epoch.unwrap_or_default().as_millis()).unwrap_or(0),
    };
    (recorder, decisions)
}

impl Recorder {
    /// Keeps a decision, and forgets the oldest when there are too many.
    pub fn keep(
        &self,
        at: Timestamp,
        (model, generation): (Option<ModelName>, Option<u64>),
        what: What,
    ) -> Arc<Decision> {
        let id = *self.newest.borrow() + 1;
        let decision = Arc::new(Decision {
            id,
            at,
            model,
            generation,
            what,
        });
        let mut ring = lock(&self.ring);
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(Arc::clone(&decision));
        drop(ring);
        self.newest.send_replace(id);
        decision
    }
}

impl Decisions {
    /// Returns a number that no other run of residentd shares, the Unix
    /// milliseconds of its start, so that the decisions of two runs are not
    /// taken for each other's.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Returns the newest `limit` of those wanted.
    #[must_use]
    pub fn newest(&self, wanted: &Wanted, limit: usize) -> Found {
        let ring = lock(&self.ring);
        let matching = ring.iter().rev().filter(|decision| wanted.has(decision));
        let mut decisions: Vec<_> = matching.take(limit).cloned().collect();
        decisions.reverse();
        Found {
            decisions,
            missed: 0,
            seen: ring.back().map_or(*self.newest.borrow(), |last| last.id),
        }
    }

    /// Returns the oldest of those wanted that come after the decision `id`, at
    /// most `limit`.
    #[must_use]
    pub fn after(&self, id: u64, wanted: &Wanted, limit: usize) -> Found {
        let mut found = Found {
            seen: id,
            ..Found::default()
        };
        while found.decisions.len() < limit && self.look(&mut found, wanted, limit) {}
        found
    }

    /// Looks at the next few. Returns whether there may be more.
    fn look(&self, found: &mut Found, wanted: &Wanted, limit: usize) -> bool {
        let ring = lock(&self.ring);
        let Some(oldest) = ring.front().map(|first| first.id) else {
            return false;
        };
        let gap = oldest.saturating_sub(found.seen + 1);
        found.missed += gap;
        found.seen += gap;
        let skip = usize::try_from(found.seen + 1 - oldest).unwrap_or(usize::MAX);
        let mut looked = 0;
        for decision in ring.iter().skip(skip).take(LOOKED_AT) {
            if found.decisions.len() == limit {
                break;
            }
            looked += 1;
            found.seen = decision.id;
            if wanted.has(decision) {
                found.decisions.push(Arc::clone(decision));
            }
        }
        looked == LOOKED_AT
    }

    /// Waits until there is a decision after `id`. Returns false when there will
    /// be none, since the controller has ended.
    pub async fn wait_after(&mut self, id: u64) -> bool {
        self.newest.wait_for(|newest| *newest > id).await.is_ok()
    }
}

impl Wanted {
    fn has(&self, decision: &Decision) -> bool {
        let model = self.model.as_ref();
        (model.is_none() || decision.model.as_ref() == model)
            && (self.kinds.is_empty() || self.kinds.contains(&decision.what.kind()))
    }
}

/// A ring is whole between any two statements, also after a panic.
fn lock(ring: &Ring) -> MutexGuard<'_, VecDeque<Arc<Decision>>> {
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ModelName {
        ModelName::new(text).expect("a good name")
    }

    fn pin(recorder: &Recorder, model: &str, pinned: bool) {
        let about = (Some(name(model)), None);
        recorder.keep(Timestamp::START, about, What::Pin { pinned });
    }

    fn ids(found: &Found) -> Vec<u64> {
        found.decisions.iter().map(|decision| decision.id).collect()
    }

    #[tokio::test]
    async fn the_newest_thousand_are_kept_and_a_late_reader_is_told_what_it_missed() {
        let (recorder, decisions) = record(Clock::start_at(1_700_000_000.5), 1);
        assert_eq!(decisions.epoch(), 1_700_000_000_500);
        let all = Wanted::default();
        assert_eq!(decisions.after(0, &all, 10).seen, 0);
        for _ in 0..1500 {
            pin(&recorder, "a", true);
        }
        let found = decisions.after(0, &all, 5000);
        assert_eq!((found.decisions.len(), found.missed), (1000, 500));
        assert_eq!(ids(&found).first(), Some(&501));
        assert_eq!(found.seen, 1500);
        let found = decisions.after(300, &all, 2);
        assert_eq!(
            (ids(&found), found.missed, found.seen),
            (vec![501, 502], 200, 502)
        );
        assert_eq!(ids(&decisions.newest(&all, 3)), [1498, 1499, 1500]);
        assert_eq!(ids(&decisions.after(1500, &all, 3)), [] as [u64; 0]);
        assert_eq!(ids(&decisions.after(9999, &all, 3)), [] as [u64; 0]);
    }

    #[tokio::test]
    async fn a_reader_gets_each_once_whatever_it_looks_for_and_how_often() {
        let (recorder, decisions) = record(Clock::start(), 1);
        for number in 0..700_u32 {
            pin(&recorder, if number % 7 == 0 { "a" } else { "b" }, true);
        }
        let wanted = Wanted {
            model: Some(name("a")),
            kinds: vec![Kind::Pin],
        };
        let mut seen = 0;
        let mut got = Vec::new();
        loop {
            let found = decisions.after(seen, &wanted, 3);
            assert!(found.decisions.len() <= 3);
            if found.decisions.is_empty() {
                assert_eq!(found.seen, 700, "nothing wanted is left");
                break;
            }
            got.extend(ids(&found));
            seen = found.seen;
        }
        let expected: Vec<u64> = (0..100).map(|n| n * 7 + 1).collect();
        assert_eq!(got, expected);
        let other = Wanted {
            kinds: vec![Kind::Limit],
            ..Wanted::default()
        };
        assert_eq!(ids(&decisions.newest(&other, 9)), [] as [u64; 0]);
    }

    #[tokio::test]
    async fn numbers_go_on_where_an_earlier_run_ended() {
        let (recorder, decisions) = record(Clock::start(), 41);
        let all = Wanted::default();
        assert_eq!(decisions.newest(&all, 9).seen, 40);
        pin(&recorder, "a", true);
        pin(&recorder, "a", false);
        let found = decisions.after(40, &all, 9);
        assert_eq!((ids(&found), found.missed), (vec![41, 42], 0));
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_by_the_next_and_by_the_end() {
        let (recorder, mut decisions) = record(Clock::start(), 1);
        let mut waits = decisions.clone();
        let (woken, ()) = tokio::join!(waits.wait_after(0), async {
            pin(&recorder, "a", true);
        });
        assert!(woken);
        assert!(decisions.wait_after(0).await);
        drop(recorder);
        assert!(!decisions.wait_after(1).await);
        assert_eq!(decisions.newest(&Wanted::default(), 9).decisions.len(), 1);
    }
}
