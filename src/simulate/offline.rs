//! A plan that knows the future, to compare a policy with.
//!
//! It serves the requests in order, loads each model that is missing when it is
//! asked for, and ends whoever it likes. The best such plan is too hard to find
//! (with sizes it is a knapsack at every step), so this is the cheapest of three:
//! end what is used again the furthest in the future; the same with the distance
//! weighed by size and load time; and end what was used the longest ago, which
//! needs no future and keeps the comparison sound where the others blunder. Each
//! can be carried out, so no policy is compared with something impossible.

use super::workload::Workload;
use crate::model::Bytes;

/// What a plan costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Plan {
    /// How many loads.
    pub loads: u64,
    /// How long they take, in seconds.
    pub load_seconds: f64,
}

/// Never asked for again.
const NEVER: usize = usize::MAX;

/// What makes a resident model worth its place.
#[derive(Clone, Copy)]
enum Rule {
    /// Its next use is near.
    NextUse,
    /// Its next use is near, its load is long and its memory small.
    Weighed,
    /// It was used a short while ago.
    LastUse,
}

/// Returns the cheapest of the plans for a limit. Requests for models that
/// are larger than the limit are left out.
#[must_use]
pub fn plan(workload: &Workload, limit: Bytes) -> Plan {
    let sequence = sequence(workload, limit);
    let by = |rule| Run::new(workload, limit, rule).over(&sequence);
    [Rule::NextUse, Rule::Weighed, Rule::LastUse]
        .map(by)
        .into_iter()
        .min_by(|a, b| a.load_seconds.total_cmp(&b.load_seconds))
        .unwrap_or_default()
}

/// Each request's model, and the place in this list where it is asked for next.
fn sequence(workload: &Workload, limit: Bytes) -> Vec<(usize, usize)> {
    let fits = |model: &usize| workload.models()[*model].size <= limit;
    let models = workload.requests().iter().map(|request| request.model);
    let mut sequence: Vec<_> = models.filter(fits).map(|model| (model, NEVER)).collect();
    let mut next = vec![NEVER; workload.models().len()];
    for (place, (model, next_use)) in sequence.iter_mut().enumerate().rev() {
        *next_use = std::mem::replace(&mut next[*model], place);
    }
    sequence
}

struct Run<'a> {
    workload: &'a Workload,
    rule: Rule,
    room: Bytes,
    /// When each model is used next; `None` when it is not resident.
    resident: Vec<Option<usize>>,
    /// When each model was used last.
    used: Vec<usize>,
    plan: Plan,
}

impl<'a> Run<'a> {
    fn new(workload: &'a Workload, limit: Bytes, rule: Rule) -> Self {
        Self {
            workload,
            rule,
            room: limit,
            resident: vec![None; workload.models().len()],
            used: vec![0; workload.models().len()],
            plan: Plan::default(),
        }
    }

    fn over(mut self, sequence: &[(usize, usize)]) -> Plan {
        for (place, (model, next_use)) in sequence.iter().enumerate() {
            let facts = &self.workload.models()[*model];
            if self.resident[*model].is_none() {
                self.make_room(facts.size, place);
                self.room -= facts.size;
                self.plan.loads += 1;
                self.plan.load_seconds += facts.load.as_secs_f64();
            }
            self.resident[*model] = Some(*next_use);
            self.used[*model] = place;
            if *next_use == NEVER {
                self.end(*model);
            }
        }
        self.plan
    }

    /// Ends models, the least worth first, until `size` fits; then takes off
    /// that list again whom the rest can do without.
    fn make_room(&mut self, size: Bytes, place: usize) {
        let mut order: Vec<usize> = (0..self.resident.len())
            .filter(|model| self.resident[*model].is_some())
            .collect();
        order.sort_by(|a, b| {
            let (a, b) = (self.distance(*a, place), self.distance(*b, place));
            b.total_cmp(&a)
        });
        let mut room = self.room;
        let mut victims = Vec::new();
        for model in order {
            if room >= size {
                break;
            }
            room += self.workload.models()[model].size;
            victims.push(model);
        }
        for index in (0..victims.len()).rev() {
            let without = room - self.workload.models()[victims[index]].size;
            if without >= size {
                room = without;
                victims.remove(index);
            }
        }
        for victim in victims {
            self.end(victim);
        }
    }

    /// How far away the next use of a resident model is, as the rule sees it.
    fn distance(&self, model: usize, place: usize) -> f64 {
        let steps = match self.rule {
            Rule::NextUse | Rule::Weighed => {
                let next_use = self.resident[model].unwrap_or(NEVER);
                next_use.saturating_sub(place)
            }
            Rule::LastUse => place - self.used[model],
        };
        let steps = u64::try_from(steps).unwrap_or(u64::MAX);
        // A count of requests is as good a float as a number of bytes.
        let steps = Bytes(steps).as_f64();
        let facts = &self.workload.models()[model];
        match self.rule {
            Rule::NextUse | Rule::LastUse => steps,
            Rule::Weighed => {
                steps * facts.size.as_f64() / facts.load.as_secs_f64().max(f64::MIN_POSITIVE)
            }
        }
    }

    fn end(&mut self, model: usize) {
        self.resident[model] = None;
        self.room += self.workload.models()[model].size;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::study::{Mode, Rules, run};
    use super::super::workload::{Demand, Memory, ModelFacts};
    use super::*;
    use crate::clock::Timestamp;
    use crate::model::{EvictionPolicy, ModelName};

    const LRU: Rules = Rules {
        eviction: EvictionPolicy::Lru,
        patience: None,
    };

    /// Models by size in GiB and load time in seconds, asked for in this order,
    /// a second between.
    fn workload(models: &[(u64, u64)], asked: &[usize]) -> Workload {
        let name = |model: usize| ModelName::new(&format!("m{model}")).expect("a good name");
        let facts = models.iter().enumerate().map(|(model, (size, load))| {
            ModelFacts::new(name(model), Bytes::gib(*size), Duration::from_secs(*load))
        });
        let demands = (0..).zip(asked).map(|(at, model)| Demand {
            at: Timestamp::from_millis(at * 1000),
            model: name(*model),
            duration: Duration::from_millis(100),
        });
        Workload::new(facts.collect(), demands.collect()).expect("every model is there")
    }

    /// The least that any plan needs, in seconds: tries every set of models that
    /// may be resident after each request.
    fn best(models: &[(u64, u64)], asked: &[usize], limit: u64) -> u64 {
        let sets = 1_usize << models.len();
        let has = |set: usize, model: usize| set & (1 << model) != 0;
        let size = |set: usize| -> u64 {
            let members = (0..models.len()).filter(|model| has(set, *model));
            members.map(|model| models[model].0).sum()
        };
        let mut costs = vec![u64::MAX; sets];
        costs[0] = 0;
        for model in asked {
            let mut next = vec![u64::MAX; sets];
            for (before, cost) in costs.iter().enumerate().filter(|(_, c)| **c < u64::MAX) {
                let load = if has(before, *model) {
                    0
                } else {
                    models[*model].1
                };
                // Only what was there and what is asked for can be there.
                let may = before | 1 << model;
                for after in (0..sets).filter(|set| set & !may == 0 && has(*set, *model)) {
                    if size(after) <= limit {
                        next[after] = next[after].min(cost + load);
                    }
                }
            }
            costs = next;
        }
        costs.into_iter().min().unwrap_or(0)
    }

    #[test]
    fn the_future_is_used_where_recency_is_wrong() {
        // In a circle one larger than the room, the most recent one has to go.
        let asked = [0, 1, 2, 0, 1, 2, 0, 1, 2];
        let circle = workload(&[(1, 10), (1, 10), (1, 10)], &asked);
        let limit = Bytes::gib(2);
        let lru = run(&circle, Memory::Gpu, Mode::Serial, LRU, limit);
        assert_eq!((lru.loads, lru.offline.loads), (9, 6));
    }

    proptest! {
        #[test]
        fn a_plan_lies_between_the_best_there_is_and_what_lru_does(
            models in prop::collection::vec((1..6_u64, 1..20_u64), 2..6),
            asked in prop::collection::vec(0..6_usize, 1..40),
            limit in 5..12_u64,
        ) {
            let asked: Vec<_> = asked.into_iter().map(|model| model % models.len()).collect();
            let workload = workload(&models, &asked);
            let limit_bytes = Bytes::gib(limit);
            let ours = plan(&workload, limit_bytes).load_seconds;
            let lru = run(&workload, Memory::Gpu, Mode::Serial, LRU, limit_bytes);
            prop_assert!(ours <= lru.load_seconds, "{ours} against {}", lru.load_seconds);
            let best = Bytes(best(&models, &asked, limit)).as_f64();
            prop_assert!(ours >= best, "{ours} against {best}");
        }
    }
}
