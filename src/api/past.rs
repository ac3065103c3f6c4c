//! Events of earlier runs of residentd, as they were written down then.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use super::decision::DecisionEntry;
use crate::clock::Clock;
use crate::control::{Decision, Decisions, Found, Wanted};
use crate::model::ModelName;

/// The newest of them, and which run had which.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// Oldest first.
    events: Vec<PastEvent>,
    /// The first event of each run, by the run's number.
    runs: BTreeMap<u64, u64>,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct PastEvent {
    #[serde(skip)]
    pub(crate) id: u64,
    text: Map<String, Value>,
}

/// What a look found among them.
#[derive(Debug, Default)]
pub(crate) struct PastFound<'a> {
    pub(crate) events: Vec<&'a PastEvent>,
    pub(crate) missed: u64,
    pub(crate) seen: u64,
}

/// Returns the text of a decision that is kept for later runs.
#[must_use]
pub fn written(decision: &Decision, clock: Clock) -> String {
    let entry = DecisionEntry::of(decision, clock);
    serde_json::to_string(&entry).expect("text and numbers serialize")
}

impl Past {
    /// Takes in what was written, oldest first. What cannot be read is left out.
    #[must_use]
    pub fn read<'a>(
        events: impl IntoIterator<Item = (u64, &'a str)>,
        runs: BTreeMap<u64, u64>,
    ) -> Self {
        let event = |(id, text)| {
            let text = serde_json::from_str(text).ok()?;
            Some(PastEvent { id, text })
        };
        Self {
            events: events.into_iter().filter_map(event).collect(),
            runs,
        }
    }

    /// Returns the number of the last event that whoever saw the event `id` of
    /// `run` has seen of what is kept now: the end of that run may have been lost,
    /// and its numbers given again. `None` for a run that nobody knows.
    pub(crate) fn place(&self, run: u64, id: u64) -> Option<u64> {
        self.runs.get(&run)?;
        let mut later = self.runs.range(run + 1..);
        let next = later.next().map(|(_, first)| first.saturating_sub(1));
        Some(next.map_or(id, |last| last.min(id)))
    }

    /// Returns the newest `limit` of those wanted.
    pub(crate) fn newest(&self, wanted: &Wanted, limit: usize) -> Vec<&PastEvent> {
        let matching = self.events.iter().rev().filter(|event| event.is(wanted));
        let mut events: Vec<_> = matching.take(limit).collect();
        events.reverse();
        events
    }

    /// Returns the oldest of those wanted that come after the event `id`, at most
    /// `limit`.
    pub(crate) fn after(&self, id: u64, wanted: &Wanted, limit: usize) -> PastFound<'_> {
        let oldest = self.events.first().map_or(0, |first| first.id);
        let missed = oldest.saturating_sub(id + 1);
        let mut found = PastFound {
            events: Vec::new(),
            missed,
            seen: id + missed,
        };
        for event in self.events.iter().filter(|event| event.id > id) {
            if found.events.len() == limit {
                break;
            }
            found.seen = event.id;
            if event.is(wanted) {
                found.events.push(event);
            }
        }
        found
    }
}

impl PastEvent {
    fn is(&self, wanted: &Wanted) -> bool {
        let word = |key: &str| self.text.get(key).and_then(Value::as_str);
        let model = wanted.model.as_ref().map(ModelName::as_str);
        let kinds = &wanted.kinds;
        (model.is_none() || word("model") == model)
            && (kinds.is_empty() || kinds.iter().any(|kind| word("kind") == Some(kind.as_str())))
    }
}

/// What was found in earlier runs and in this one.
#[derive(Debug)]
pub(crate) struct Both<'a> {
    pub(crate) past: Vec<&'a PastEvent>,
    pub(crate) found: Found,
}

impl<'a> Both<'a> {
    /// Returns the newest `limit` of those wanted.
    pub(crate) fn newest(
        (past, decisions): (&'a Past, &Decisions),
        wanted: &Wanted,
        limit: usize,
    ) -> Self {
        let found = decisions.newest(wanted, limit);
        let left = limit.saturating_sub(found.decisions.len());
        Self {
            past: past.newest(wanted, left),
            found,
        }
    }

    /// Returns the oldest of those wanted that come after the event `id`, at most
    /// `limit`.
    pub(crate) fn after(
        id: u64,
        (past, decisions): (&'a Past, &Decisions),
        wanted: &Wanted,
        limit: usize,
    ) -> Self {
        let earlier = past.after(id, wanted, limit);
        let left = limit.saturating_sub(earlier.events.len());
        let mut found = decisions.after(earlier.seen, wanted, left);
        found.missed += earlier.missed;
        Self {
            past: earlier.events,
            found,
        }
    }
}

impl From<Found> for Both<'_> {
    fn from(found: Found) -> Self {
        let past = Vec::new();
        Self { past, found }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Kind;

    fn past() -> Past {
        let texts: Vec<_> = (5..=9_u64)
            .map(|id| {
                (
                    id,
                    format!("{{\"id\":{id},\"kind\":\"pin\",\"model\":\"m{}\"}}", id % 2),
                )
            })
            .collect();
        let texts = texts.iter().map(|(id, text)| (*id, text.as_str()));
        Past::read(texts, [(100, 1), (200, 8)].into())
    }

    fn ids(events: &[&PastEvent]) -> Vec<u64> {
        events.iter().map(|event| event.id).collect()
    }

    #[test]
    fn earlier_events_are_found_by_number_model_and_kind() {
        let past = past();
        let all = Wanted::default();
        let m0 = Wanted {
            model: Some(ModelName::new("m0").expect("a good name")),
            kinds: vec![Kind::Pin],
        };
        let limits = Wanted {
            kinds: vec![Kind::Limit],
            ..Wanted::default()
        };
        assert_eq!(ids(&past.newest(&all, 2)), [8, 9]);
        assert_eq!(ids(&past.newest(&m0, 9)), [6, 8]);
        assert!(past.newest(&limits, 9).is_empty());
        let found = past.after(2, &all, 2);
        assert_eq!(
            (ids(&found.events), found.missed, found.seen),
            (vec![5, 6], 2, 6)
        );
        let found = past.after(6, &m0, 9);
        assert_eq!(
            (ids(&found.events), found.missed, found.seen),
            (vec![8], 0, 9)
        );
        assert_eq!(Past::default().after(7, &all, 9).seen, 7);
    }

    #[test]
    fn numbers_that_a_run_lost_and_another_gave_again_are_told_apart() {
        let past = past();
        assert_eq!(past.place(100, 6), Some(6));
        assert_eq!(
            past.place(100, 12),
            Some(7),
            "8 and later are another run's now"
        );
        assert_eq!(past.place(200, 9), Some(9));
        assert_eq!(past.place(300, 9), None);
    }
}
