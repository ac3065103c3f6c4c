//! Who goes: whole sets of victims, planned before anyone is touched.

use std::collections::BTreeMap;

use super::ledger::Need;
use crate::clock::Timestamp;
use crate::model::WorkerId;

/// An idle worker that may be ended to make room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Which.
    pub worker: WorkerId,
    /// When it was last used, or became ready.
    pub idle_since: Timestamp,
    /// What its end gives back, by constraint.
    pub gives: Need,
}

/// Chooses the smallest coldest set of candidates whose ends together cover
/// `missing` in every constraint, oldest first; `None` when all of them
/// together do not suffice, so that nobody is ended for nothing.
///
/// Candidates are taken oldest first until the set covers; then, warmest
/// first, each one that the rest can do without is taken off again.
#[must_use]
pub(super) fn choose_victims(
    mut candidates: Vec<Candidate>,
    missing: &Need,
) -> Option<Vec<Candidate>> {
    candidates.sort_by(|a, b| {
        a.idle_since
            .cmp(&b.idle_since)
            .then_with(|| a.worker.cmp(&b.worker))
    });
    let covers = |given: &Need| {
        missing
            .iter()
            .all(|(key, bytes)| given.get(key).copied().unwrap_or(0) >= *bytes)
    };
    let mut given: Need = BTreeMap::new();
    let mut chosen = Vec::new();
    for candidate in candidates {
        if covers(&given) {
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
    if !covers(&given) {
        return None;
    }
    for index in (0..chosen.len()).rev() {
        let mut without = given.clone();
        add(&mut without, &chosen[index].gives, -1);
        if covers(&without) {
            given = without;
            chosen.remove(index);
        }
    }
    Some(chosen)
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
            idle_since: Timestamp::from_millis(idle_since),
            gives: BTreeMap::from([(LIMIT, limit), (GPU, gpu)]),
        }
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
}
