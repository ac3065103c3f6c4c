//! Who goes: whole sets of victims, planned before anyone is touched.
//!
//! By `lru`, the workers that were used longest ago; by `cost`, those whose
//! reloads are expected to cost least together. Either way the whole set covers
//! what is missing in every constraint, and nobody unneeded is in it.

mod cheapest;

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::ledger::Need;
use super::reuse::Worth;
use crate::clock::Timestamp;
use crate::model::{EvictionPolicy, WorkerId};

/// A worker that may be ended to make room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Which.
    pub worker: WorkerId,
    /// Requests are inside: it can only be drained, after all that are idle.
    pub busy: bool,
    /// It is parked: it serves nobody and goes before all that do.
    pub parked: bool,
    /// When it was last used, or became ready; of a busy one, when it was last
    /// asked for.
    pub idle_since: Timestamp,
    /// What its end is expected to cost.
    pub worth: Worth,
    /// What its end gives back, by constraint.
    pub gives: Need,
}

impl Candidate {
    /// Who goes first by recency.
    fn age(&self) -> impl Ord + use<> {
        (
            self.busy,
            !self.parked,
            self.idle_since,
            self.worker.clone(),
        )
    }
}

/// Chooses a set of candidates whose ends together cover `missing` in every
/// constraint, oldest first; `None` when all of them together do not suffice,
/// so that nobody is ended for nothing.
#[must_use]
pub(super) fn choose_victims(
    policy: EvictionPolicy,
    mut candidates: Vec<Candidate>,
    missing: &Need,
) -> Option<Vec<Candidate>> {
    candidates.sort_by_cached_key(Candidate::age);
    match policy {
        EvictionPolicy::Lru => {
            let chosen = take_until_covered(candidates, missing)?;
            // The warmest are spared first.
            Some(spare(chosen, missing, |index, _| index))
        }
        EvictionPolicy::Cost => {
            let chosen = cheapest::choose(candidates, missing)?;
            let mut chosen = spare(chosen, missing, |_, candidate| candidate.worth);
            chosen.sort_by_cached_key(Candidate::age);
            Some(chosen)
        }
    }
}

/// Takes candidates in their order until the set covers; `None` when it never
/// does.
fn take_until_covered(candidates: Vec<Candidate>, missing: &Need) -> Option<Vec<Candidate>> {
    let mut given: Need = BTreeMap::new();
    let mut chosen = Vec::new();
    for candidate in candidates {
        if covers(&given, missing) {
            break;
        }
        // Whoever gives nothing where something is missing helps nobody.
        let helps = missing.iter().any(|(key, bytes)| {
            *bytes > given.get(key).copied().unwrap_or(0)
                && candidate.gives.get(key).copied().unwrap_or(0) > 0
        });
        if helps {
            add(&mut given, &candidate.gives, 1);
            chosen.push(candidate);
        }
    }
    covers(&given, missing).then_some(chosen)
}

/// Takes off each candidate that the rest can do without, the most precious
/// first.
fn spare<K: Ord>(
    chosen: Vec<Candidate>,
    missing: &Need,
    precious: impl Fn(usize, &Candidate) -> K,
) -> Vec<Candidate> {
    let mut given: Need = BTreeMap::new();
    for candidate in &chosen {
        add(&mut given, &candidate.gives, 1);
    }
    let mut order: Vec<usize> = (0..chosen.len()).collect();
    order.sort_by_key(|index| Reverse((precious(*index, &chosen[*index]), *index)));
    let mut spared = vec![false; chosen.len()];
    for index in order {
        let mut without = given.clone();
        add(&mut without, &chosen[index].gives, -1);
        if covers(&without, missing) {
            given = without;
            spared[index] = true;
        }
    }
    let kept = chosen.into_iter().zip(spared);
    kept.filter_map(|(candidate, spared)| (!spared).then_some(candidate))
        .collect()
}

fn covers(given: &Need, missing: &Need) -> bool {
    missing
        .iter()
        .all(|(key, bytes)| given.get(key).copied().unwrap_or(0) >= *bytes)
}

fn add(total: &mut Need, part: &Need, sign: i128) {
    for (key, bytes) in part {
        *total.entry(*key).or_default() += sign * bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::super::ledger::Constraint;
    use super::*;
    use crate::model::{Domain, ModelName};

    const LIMIT: (Domain, Constraint) = (Domain::Host, Constraint::Limit);
    const GPU: (Domain, Constraint) = (Domain::Gpu(0), Constraint::Physics);

    fn candidate(name: &str, idle_since: u64, limit: i128, gpu: i128) -> Candidate {
        Candidate {
            worker: WorkerId {
                model: ModelName::new(name).expect("a good name"),
                generation: 1,
            },
            busy: false,
            parked: false,
            idle_since: Timestamp::from_millis(idle_since),
            worth: 1,
            gives: BTreeMap::from([(LIMIT, limit), (GPU, gpu)]),
        }
    }

    fn choose_victims(candidates: Vec<Candidate>, missing: &Need) -> Option<Vec<Candidate>> {
        super::choose_victims(EvictionPolicy::Lru, candidates, missing)
    }

    fn names(victims: Option<Vec<Candidate>>) -> Option<Vec<String>> {
        victims.map(|list| list.iter().map(|c| c.worker.model.to_string()).collect())
    }

    #[test]
    fn a14_the_oldest_that_cover_go_and_no_one_else() {
        let all = vec![
            candidate("new", 30, 5, 0),
            candidate("old", 10, 5, 0),
            candidate("mid", 20, 5, 0),
        ];
        assert_eq!(
            names(choose_victims(all.clone(), &Need::from([(LIMIT, 4)]))),
            Some(vec!["old".into()])
        );
        assert_eq!(
            names(choose_victims(all, &Need::from([(LIMIT, 6)]))),
            Some(vec!["old".into(), "mid".into()])
        );
    }

    #[test]
    fn a14_a_victim_that_turns_out_unneeded_is_taken_off_the_set() {
        let all = vec![candidate("small", 10, 1, 0), candidate("big", 20, 10, 0)];
        assert_eq!(
            names(choose_victims(all, &Need::from([(LIMIT, 8)]))),
            Some(vec!["big".into()])
        );
    }

    #[test]
    fn a13_when_all_together_do_not_suffice_nobody_goes() {
        let all = vec![candidate("a", 1, 3, 0), candidate("b", 2, 3, 0)];
        assert_eq!(choose_victims(all, &Need::from([(LIMIT, 7)])), None);
    }

    #[test]
    fn a14_the_set_covers_every_domain() {
        let all = vec![
            candidate("ram", 1, 9, 0),
            candidate("gpu", 2, 1, 4),
            candidate("both", 3, 9, 9),
        ];
        let missing = Need::from([(LIMIT, 5), (GPU, 4)]);
        assert_eq!(
            names(choose_victims(all, &missing)),
            Some(vec!["ram".into(), "gpu".into()])
        );
    }

    #[test]
    fn nothing_missing_means_nobody_goes() {
        assert_eq!(
            choose_victims(vec![candidate("a", 1, 3, 0)], &Need::new()),
            Some(Vec::new())
        );
    }

    #[test]
    fn busy_ones_go_after_all_that_are_idle() {
        let mut busy = candidate("busy", 1, 5, 0);
        busy.busy = true;
        let all = vec![busy, candidate("idle", 9, 5, 0)];
        let names = |bytes| names(choose_victims(all.clone(), &Need::from([(LIMIT, bytes)])));
        assert_eq!(names(5), Some(vec!["idle".into()]));
        assert_eq!(names(6), Some(vec!["idle".into(), "busy".into()]));
    }
}
