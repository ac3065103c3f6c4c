//! The set of victims whose reloads are expected to cost least together.
//!
//! Exact by branch and bound for as many candidates as a machine usually has;
//! above that, and where the search would take long, by what each costs for
//! what it gives.

use super::{Candidate, take_until_covered};
use crate::policy::ledger::Need;

/// Up to so many candidates the best set is searched for.
const MOST_EXACT: usize = 24;
/// The search looks at no more sets than this, then takes the best it has seen:
/// about half a millisecond.
const MOST_STEPS: u32 = 4096;

/// Returns candidates that cover `missing`; some of them may be unneeded.
pub(super) fn choose(mut candidates: Vec<Candidate>, missing: &Need) -> Option<Vec<Candidate>> {
    candidates.retain(|candidate| share(candidate, missing) > 0.0);
    candidates.sort_by(|a, b| dear(a, missing).total_cmp(&dear(b, missing)));
    let greedy = take_until_covered(candidates.clone(), missing)?;
    if candidates.len() > MOST_EXACT {
        return Some(greedy);
    }
    let mut search = Search::new(&candidates, missing);
    search.best = greedy
        .iter()
        .map(|candidate| u128::from(candidate.worth))
        .sum();
    let short = missing.values().copied().collect();
    search.descend(0, 0, short);
    let Some(found) = search.found else {
        return Some(greedy);
    };
    let chosen = candidates.into_iter().enumerate();
    let chosen = chosen.filter(|(index, _)| found & (1 << index) != 0);
    Some(chosen.map(|(_, candidate)| candidate).collect())
}

/// What a candidate costs for its part of what is missing.
fn dear(candidate: &Candidate, missing: &Need) -> f64 {
    as_f64(i128::from(candidate.worth)) / share(candidate, missing)
}

/// How much of what is missing it gives, each constraint as one.
fn share(candidate: &Candidate, missing: &Need) -> f64 {
    let of = |(key, bytes): (_, &i128)| {
        let gives = candidate.gives.get(key).copied().unwrap_or(0);
        as_f64(gives.clamp(0, *bytes)) / as_f64((*bytes).max(1))
    };
    missing.iter().map(of).sum()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes and worths are compared, not counted"
)]
fn as_f64(number: i128) -> f64 {
    number as f64
}

/// Looks through the sets of candidates, the cheap ones for their bytes first.
struct Search {
    worth: Vec<u128>,
    /// What each gives, by constraint.
    gives: Vec<Vec<i128>>,
    /// What those from a candidate on give together, by constraint.
    rest: Vec<Vec<i128>>,
    /// By constraint: the candidates, cheapest for their bytes there first.
    order: Vec<Vec<usize>>,
    best: u128,
    /// The candidates of the best set, one bit each.
    found: Option<u32>,
    taken: u32,
    steps: u32,
}

impl Search {
    fn new(candidates: &[Candidate], missing: &Need) -> Self {
        let gives: Vec<Vec<i128>> = candidates
            .iter()
            .map(|candidate| {
                let keys = missing.keys();
                keys.map(|key| candidate.gives.get(key).copied().unwrap_or(0).max(0))
                    .collect()
            })
            .collect();
        let worth: Vec<_> = candidates.iter().map(|c| u128::from(c.worth)).collect();
        let mut rest = vec![vec![0; missing.len()]; candidates.len() + 1];
        for index in (0..candidates.len()).rev() {
            for key in 0..missing.len() {
                rest[index][key] = rest[index + 1][key] + gives[index][key];
            }
        }
        let order = |key: usize| {
            let mut order: Vec<usize> = (0..worth.len()).filter(|i| gives[*i][key] > 0).collect();
            let price = |i: usize| worth[i] * 1_000_000 / gives[i][key].unsigned_abs().max(1);
            order.sort_by_key(|index| price(*index));
            order
        };
        Self {
            order: (0..missing.len()).map(order).collect(),
            worth,
            gives,
            rest,
            best: u128::MAX,
            found: None,
            taken: 0,
            steps: 0,
        }
    }

    /// Tries the candidates from `index` on, when those taken cost `cost` and
    /// `short` is still missing.
    fn descend(&mut self, index: usize, cost: u128, short: Vec<i128>) {
        if cost >= self.best {
            return;
        }
        if short.iter().all(|bytes| *bytes <= 0) {
            self.best = cost;
            self.found = Some(self.taken);
            return;
        }
        self.steps += 1;
        let is_possible = short.iter().zip(&self.rest[index]).all(|(s, r)| s <= r);
        if !is_possible || self.steps > MOST_STEPS || cost + self.least(index, &short) >= self.best
        {
            return;
        }
        let with = short.iter().zip(&self.gives[index]).map(|(s, g)| s - g);
        let with = with.collect();
        self.taken |= 1 << index;
        self.descend(index + 1, cost + self.worth[index], with);
        self.taken &= !(1 << index);
        self.descend(index + 1, cost, short);
    }

    /// Returns what the rest costs at least: in the constraint where that is
    /// most, when parts of candidates could be had.
    fn least(&self, from: usize, short: &[i128]) -> u128 {
        let of = |key: usize| {
            let mut short = short[key].max(0);
            let mut cost = 0;
            for index in self.order[key].iter().copied().filter(|i| *i >= from) {
                let gives = self.gives[index][key];
                if gives >= short {
                    return cost + self.worth[index] * short.unsigned_abs() / gives.unsigned_abs();
                }
                short -= gives;
                cost += self.worth[index];
            }
            cost
        };
        (0..short.len()).map(of).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::choose_victims;
    use super::*;
    use crate::clock::Timestamp;
    use crate::model::{Domain, EvictionPolicy, ModelName, WorkerId};
    use crate::policy::ledger::Constraint;

    const KEYS: [(Domain, Constraint); 2] = [
        (Domain::Host, Constraint::Limit),
        (Domain::Gpu(0), Constraint::Physics),
    ];

    fn candidate(index: usize, worth: u64, gives: [i128; 2]) -> Candidate {
        Candidate {
            worker: WorkerId {
                model: ModelName::new(&format!("m{index}")).expect("a good name"),
                generation: 1,
            },
            busy: false,
            parked: false,
            idle_since: Timestamp::from_millis(u64::try_from(index).expect("few")),
            worth,
            gives: BTreeMap::from([(KEYS[0], gives[0]), (KEYS[1], gives[1])]),
        }
    }

    fn cost(chosen: &[Candidate]) -> u64 {
        chosen.iter().map(|c| c.worth).sum()
    }

    /// Tries every set.
    fn least_of_all(all: &[Candidate], missing: [i128; 2]) -> Option<u64> {
        let sets = 0..1_u32 << all.len();
        let of = |set: u32| {
            all.iter()
                .enumerate()
                .filter(move |(i, _)| set & (1 << i) != 0)
        };
        let covers = |set: &u32| {
            let gives = |key| of(*set).map(|(_, c)| c.gives[&key]).sum::<i128>();
            gives(KEYS[0]) >= missing[0] && gives(KEYS[1]) >= missing[1]
        };
        let cost = |set: u32| of(set).map(|(_, c)| c.worth).sum();
        sets.filter(covers).map(cost).min()
    }

    proptest! {
        #[test]
        fn no_set_that_covers_is_cheaper_and_nobody_in_it_is_unneeded(
            all in prop::collection::vec((0..1000_u64, 0..50_i128, 0..50_i128), 0..10),
            need in 0..120_i128,
            gpu in 0..80_i128,
        ) {
            let all: Vec<_> = (0..).zip(all).map(|(i, (w, a, b))| candidate(i, w, [a, b])).collect();
            let missing = Need::from([(KEYS[0], need), (KEYS[1], gpu)]);
            let chosen = choose_victims(EvictionPolicy::Cost, all.clone(), &missing);
            prop_assert_eq!(chosen.as_ref().map(|c| cost(c)), least_of_all(&all, [need, gpu]));
            for spared in 0..chosen.as_ref().map_or(0, Vec::len) {
                let mut fewer = chosen.clone().unwrap_or_default();
                fewer.remove(spared);
                let gives = |key| fewer.iter().map(|c: &Candidate| c.gives[&key]).sum::<i128>();
                prop_assert!(gives(KEYS[0]) < need || gives(KEYS[1]) < gpu);
            }
        }

        #[test]
        fn many_candidates_are_chosen_from_too(
            all in prop::collection::vec((0..1000_u64, 1..50_i128, 0..50_i128), 25..60),
            need in 1..600_i128,
        ) {
            let all: Vec<_> = (0..).zip(all).map(|(i, (w, a, b))| candidate(i, w, [a, b])).collect();
            let most: i128 = all.iter().map(|c| c.gives[&KEYS[0]]).sum();
            let missing = Need::from([(KEYS[0], need)]);
            let chosen = choose_victims(EvictionPolicy::Cost, all, &missing);
            prop_assert_eq!(chosen.is_some(), most >= need);
            let given = chosen.map(|c| c.iter().map(|c| c.gives[&KEYS[0]]).sum::<i128>());
            prop_assert!(given.is_none_or(|given| given >= need));
        }
    }

    #[test]
    fn one_large_cheap_worker_goes_before_two_small_old_ones() {
        let all = vec![
            candidate(0, 10, [4, 0]),
            candidate(1, 10, [4, 0]),
            candidate(2, 15, [9, 0]),
        ];
        let missing = Need::from([(KEYS[0], 8)]);
        let names = |policy| {
            let chosen = choose_victims(policy, all.clone(), &missing).expect("enough");
            let names = chosen.iter().map(|c| c.worker.model.to_string());
            names.collect::<Vec<_>>()
        };
        assert_eq!(names(EvictionPolicy::Cost), ["m2"]);
        assert_eq!(names(EvictionPolicy::Lru), ["m0", "m1"]);
    }
}
