//! A plan that knows the future, to compare a policy with.
//!
//! It serves the requests in order, loads each model that is missing when it is
//! asked for, and ends whoever it likes. The best such plan is too hard to find
//! (with sizes it is a knapsack at every step), so this is the cheaper of two
//! that are known to be good: end what is used again the furthest in the future,
//! and the same with the distance weighed by size and load time. Both can be
//! carried out, so no policy is compared with something impossible.

use super::study::Workload;
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
}

/// Returns the cheaper of the two plans for a limit. Requests for models that
/// are larger than the limit are left out.
#[must_use]
pub fn plan(workload: &Workload, limit: Bytes) -> Plan {
    let sequence = sequence(workload, limit);
    let by = |rule| Run::new(workload, limit, rule).over(&sequence);
    let (plain, weighed) = (by(Rule::NextUse), by(Rule::Weighed));
    match weighed.load_seconds < plain.load_seconds {
        true => weighed,
        false => plain,
    }
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
    plan: Plan,
}

impl<'a> Run<'a> {
    fn new(workload: &'a Workload, limit: Bytes, rule: Rule) -> Self {
        Self {
            workload,
            rule,
            room: limit,
            resident: vec![None; workload.models().len()],
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
        let next_use = self.resident[model].unwrap_or(NEVER);
        let steps = u64::try_from(next_use.saturating_sub(place)).unwrap_or(u64::MAX);
        // A count of requests is as good a float as a number of bytes.
        let steps = Bytes(steps).as_f64();
        let facts = &self.workload.models()[model];
        match self.rule {
            Rule::NextUse => steps,
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
