//! Every state that a small world can get into (A15).
//!
//! Two or three models, and a [`Budget`] of what may happen to them: requests,
//! clients that leave, crashes, operators. What the budget does not bound, that
//! workers do what they are told, requests end, memory is measured and time
//! passes, may happen whenever it can. All orders of all of that are played, the
//! shortest first, and a state that was there before is not gone on from. So
//! each case is closed: no number of steps bounds it.
//!
//! In each state the laws hold that `court` and [`State`] name. And from each
//! state with an open ticket, in whatever order what is owed happens, the ticket
//! is answered after a bounded number of steps, without anybody's time being
//! up: no such state is an end, and none leads back to itself.
//!
//! `RESIDENTD_SPACE=1` plays with larger budgets, as `scripts/laws` does.

mod cases;
mod state;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};

use state::{Budget, Happening, State};

use super::super::Effect;

/// More states than this are too many for one case.
const MOST: usize = 20_000_000;

/// A state that was reached.
struct Node {
    /// From which state, by what.
    from: Option<(usize, Happening)>,
    /// Somebody waits for an answer.
    open: bool,
    /// Where what is owed leads, to other states.
    owed: Vec<(Happening, usize)>,
}

/// What was found.
#[derive(Debug)]
struct Found {
    states: usize,
    steps: usize,
    /// The most steps of what is owed from any state until all are answered.
    longest: usize,
}

/// The states that were reached so far.
struct Space<'a> {
    start: &'a State,
    nodes: Vec<Node>,
}

/// Plays everything that can happen from here.
///
/// # Panics
/// When a law is broken, with the shortest way there.
fn explore(start: &State) -> Found {
    let first = Node {
        from: None,
        open: start.is_open(),
        owed: Vec::new(),
    };
    let mut space = Space {
        start,
        nodes: vec![first],
    };
    let mut ids = BTreeMap::from([(start.key(), 0)]);
    let mut ahead = VecDeque::from([(0, start.clone())]);
    let mut steps = 0;
    while let Some((id, state)) = ahead.pop_front() {
        for happening in state.possible() {
            let mut next = state.clone();
            if catch_unwind(AssertUnwindSafe(|| next.play(happening))).is_err() {
                panic!("a law is broken:\n{}", space.way(id, &[happening]));
            }
            steps += 1;
            let reached = match ids.entry(next.key()) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let reached = *new.insert(space.nodes.len());
                    space.nodes.push(Node {
                        from: Some((id, happening)),
                        open: next.is_open(),
                        owed: Vec::new(),
                    });
                    ahead.push_back((reached, next));
                    reached
                }
            };
            if happening.is_owed() && reached != id {
                space.nodes[id].owed.push((happening, reached));
            }
        }
        assert!(
            space.nodes.len() < MOST,
            "too many states: lower the budget"
        );
    }
    Found {
        states: space.nodes.len(),
        steps,
        longest: space.longest_wait(),
    }
}

impl Space<'_> {
    /// Follows what is owed from every state with an open ticket until all are
    /// answered, and returns the most steps that took.
    fn longest_wait(&self) -> usize {
        let mut waits: Vec<Option<usize>> = vec![None; self.nodes.len()];
        let mut on_the_way = vec![false; self.nodes.len()];
        for root in 0..self.nodes.len() {
            // A state, and how many of its ways were followed.
            let mut path = vec![(root, 0)];
            while let Some((id, followed)) = path.pop() {
                let node = &self.nodes[id];
                if waits[id].is_some() {
                    continue;
                }
                if !node.open {
                    waits[id] = Some(0);
                    continue;
                }
                if node.owed.is_empty() {
                    panic!("a waiter is stuck:\n{}", self.way(id, &[]));
                }
                on_the_way[id] = true;
                let Some((_, next)) = node.owed.get(followed) else {
                    let after = node.owed.iter().filter_map(|(_, next)| waits[*next]);
                    waits[id] = Some(1 + after.max().unwrap_or(0));
                    on_the_way[id] = false;
                    continue;
                };
                path.push((id, followed + 1));
                if on_the_way[*next] {
                    let round = path.iter().skip_while(|(of, _)| of != next);
                    let round = round.map(|(of, n)| self.nodes[*of].owed[n - 1].0);
                    let round: Vec<_> = round.collect();
                    panic!(
                        "a waiter waits for ever, round and round by the last {} of:\n{}",
                        round.len(),
                        self.way(*next, &round)
                    );
                }
                path.push((*next, 0));
            }
        }
        waits.into_iter().flatten().max().unwrap_or(0)
    }

    /// Tells how a state was reached, and what happens from there.
    fn way(&self, id: usize, then: &[Happening]) -> String {
        let mut back = Vec::new();
        let mut at = id;
        while let Some((from, happening)) = self.nodes[at].from {
            back.push(happening);
            at = from;
        }
        let all = back.iter().rev().chain(then);
        let mut state = self.start.clone();
        let mut told = Vec::new();
        for happening in all {
            state.court.journal = Some(Vec::new());
            let ended = catch_unwind(AssertUnwindSafe(|| state.play(*happening)));
            let effects = state.court.journal.take().unwrap_or_default();
            let now = state.court.world.now;
            told.push(format!("{now}  {}", happening.in_words()));
            let effects = effects.iter().filter_map(in_words);
            told.extend(effects.map(|effect| format!("          → {effect}")));
            if ended.is_err() {
                break;
            }
        }
        told.join("\n")
    }
}

/// What an effect says to whoever reads a trace; `None` of what is only told.
fn in_words(effect: &Effect) -> Option<String> {
    match effect {
        Effect::Grant { ticket, worker } => Some(format!("#{ticket} enters {worker}")),
        Effect::Done { ticket } => Some(format!("#{ticket} is done")),
        Effect::Reject { ticket, refusal } => Some(format!("#{ticket} refused: {refusal}")),
        Effect::CleanedUp { ticket, .. } => Some(format!("#{ticket} is cleaned up")),
        Effect::Spawn { worker, .. } => Some(format!("spawn {worker}")),
        Effect::Evict { worker, reason, .. } => Some(format!("evict {worker}: {reason}")),
        Effect::Drain { worker, reason } => Some(format!("drain {worker}: {reason}")),
        Effect::Resume { worker } => Some(format!("resume {worker}")),
        Effect::Terminate { worker, reason, .. } => Some(format!("terminate {worker}: {reason}")),
        Effect::Reclaimed {
            worker, missing, ..
        } => Some(format!("bytes of {worker} are back, {missing} missing")),
        Effect::Park { worker, reason, .. } => Some(format!("park {worker}: {reason}")),
        Effect::Unpark { worker, .. } => Some(format!("unpark {worker}")),
        Effect::Parked { worker, .. } => Some(format!("{worker} is parked")),
        Effect::Forget { model, .. } => Some(format!("forget {model}")),
        Effect::Learn { .. } | Effect::Prefetch { .. } | Effect::CallOff { .. } => None,
        Effect::Finished => Some("finished".to_owned()),
    }
}
