//! The rules once more, as plainly as they can be said, to compare with.
//!
//! One domain, sizes that are declared and true, least recently used first. No
//! reservations, no ledger, no phases but those that a client could tell. It
//! shares no code with the policy it is held against: where the two differ, one
//! of them is wrong.
//!
//! After every event, in this order:
//!
//! 1. Whoever has waited to the deadline is refused.
//! 2. Whoever waits for a ready worker with a place goes in, first come first.
//! 3. Who drains and has nobody inside is ended; so is one that an operator
//!    unloads, thirty seconds later, whoever is inside.
//! 4. Who drains for a model that needs no room any more opens again.
//! 5. Models that are waited for and have no worker are looked at, the one of
//!    the oldest waiter first. What is there and what is coming, less what is
//!    meant for those before it, is the room of each:
//!    - it can never fit beside what is pinned: all its waiters are refused;
//!    - there is room now: it starts, unless another was surely to get that, or
//!      was to get it with what drains for this one;
//!    - what is surely coming suffices: it waits, and that is meant for it;
//!    - idle workers suffice: the longest unused go, and none too many;
//!    - what drains suffices too: it waits, and that is meant for it;
//!    - else it waits for busy workers. After `patience`, and when for twelve
//!      times as long nobody began to drain for another, the least set of all is
//!      chosen, idle ones first, then those that were asked for the longest ago,
//!      and the busy ones of it drain.

mod compare;

use std::time::Duration;

use super::super::Ticket;
use crate::clock::Timestamp;

/// How long an operator's unload lets requests finish.
const UNLOAD_WITHIN: Duration = Duration::from_secs(30);
/// How many requests may wait for one model.
const LINE: usize = 4;
/// For so many times the patience nobody drains for another model.
const ALONE: u32 = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Gone,
    Loading,
    Ready,
    /// Closed to new requests, to make room for that model, since then.
    DrainsFor(usize, Timestamp),
    /// Closed to new requests, by an operator, until then.
    Unloads(Timestamp),
    Ending,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    ticket: Ticket,
    since: Timestamp,
    /// Of a request; an operator only waits until the model is ready.
    enters: bool,
}

#[derive(Clone, Debug)]
struct Model {
    size: u64,
    at_once: Option<u32>,
    pinned: bool,
    life: Life,
    inside: u32,
    /// When a request last left, or when its worker opened.
    used: Timestamp,
    /// When a request last came in, or when its worker opened.
    asked: Timestamp,
    line: Vec<Waiter>,
    operators: Vec<Ticket>,
}

/// What is done, in either telling of the rules.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Deed {
    Enters(Ticket, usize),
    Done(Ticket),
    Refused(Ticket),
    Start(usize),
    End(usize),
    Drain(usize),
    Reopen(usize),
}

/// The whole house.
#[derive(Clone, Debug)]
struct Naive {
    limit: u64,
    patience: Duration,
    gives_up: Duration,
    models: Vec<Model>,
    now: Timestamp,
    deeds: Vec<Deed>,
}

impl Model {
    fn is_full(&self) -> bool {
        self.at_once.is_some_and(|most| self.inside >= most)
    }

    fn has_worker(&self) -> bool {
        self.life != Life::Gone
    }

    fn is_leaving(&self) -> bool {
        matches!(
            self.life,
            Life::DrainsFor(..) | Life::Unloads(_) | Life::Ending
        )
    }

    fn may_go(&self) -> bool {
        self.life == Life::Ready && !self.pinned
    }
}

impl Naive {
    fn ask(&mut self, m: usize, ticket: Ticket, enters: bool) {
        let waiter = Waiter {
            ticket,
            since: self.now,
            enters,
        };
        let model = &mut self.models[m];
        let ahead = model.line.iter().filter(|w| w.enters).count();
        if enters && ahead >= LINE {
            self.deeds.push(Deed::Refused(ticket));
        } else {
            model.line.push(waiter);
        }
        self.look();
    }

    fn gone(&mut self, ticket: Ticket) {
        for model in &mut self.models {
            model.line.retain(|w| w.ticket != ticket);
            model.operators.retain(|t| *t != ticket);
        }
        self.look();
    }

    fn unload(&mut self, m: usize, ticket: Ticket) {
        let model = &mut self.models[m];
        match model.life {
            Life::Gone => {
                self.refuse_all(m);
                self.deeds.push(Deed::Done(ticket));
            }
            Life::Loading => {
                model.operators.push(ticket);
                model.life = Life::Ending;
                self.refuse_all(m);
                self.deeds.push(Deed::End(m));
            }
            Life::Ready => {
                model.operators.push(ticket);
                model.life = Life::Unloads(self.now + UNLOAD_WITHIN);
                self.deeds.push(Deed::Drain(m));
            }
            Life::DrainsFor(..) => {
                model.operators.push(ticket);
                model.life = Life::Unloads(self.now + UNLOAD_WITHIN);
            }
            Life::Unloads(_) | Life::Ending => model.operators.push(ticket),
        }
        self.look();
    }

    fn pin(&mut self, m: usize, pinned: bool) {
        self.models[m].pinned = pinned;
        self.look();
    }

    fn ready(&mut self, m: usize) {
        self.models[m].life = Life::Ready;
        self.models[m].used = self.now;
        self.models[m].asked = self.now;
        // Who has waited to this very moment has not waited in vain.
        self.let_in(m);
        self.look();
    }

    /// A request comes in by the gate alone, where it is open and nobody waits.
    fn slips_in(&mut self, m: usize) {
        let model = &mut self.models[m];
        if model.life == Life::Ready && !model.is_full() && model.line.is_empty() {
            model.inside += 1;
            model.asked = self.now;
        }
    }

    fn leaves(&mut self, m: usize) {
        self.models[m].inside -= 1;
        self.models[m].used = self.now;
        self.look();
    }

    /// A worker that was told to end is gone, and its bytes are back.
    fn bytes_are_back(&mut self, m: usize) {
        let model = &mut self.models[m];
        model.life = Life::Gone;
        model.inside = 0;
        let operators = std::mem::take(&mut model.operators);
        self.deeds.extend(operators.into_iter().map(Deed::Done));
        self.look();
    }

    /// When something is due by itself.
    fn next_moment(&self) -> Option<Timestamp> {
        let mut moments = Vec::new();
        for model in &self.models {
            for waiter in &model.line {
                moments.push(waiter.since + self.gives_up);
                if model.life == Life::Gone {
                    moments.push(waiter.since + self.patience);
                }
            }
            if let Life::DrainsFor(_, since) = model.life {
                moments.push(since + self.patience * ALONE);
            }
            if let Life::Unloads(until) = model.life {
                moments.push(until);
            }
        }
        moments.into_iter().filter(|at| *at > self.now).min()
    }

    /// Does whatever is to be done now.
    fn look(&mut self) {
        for m in 0..self.models.len() {
            let (now, gives_up) = (self.now, self.gives_up);
            let line = std::mem::take(&mut self.models[m].line);
            for waiter in line {
                if waiter.since + gives_up <= now {
                    self.deeds.push(Deed::Refused(waiter.ticket));
                } else {
                    self.models[m].line.push(waiter);
                }
            }
        }
        for m in 0..self.models.len() {
            self.let_in(m);
        }
        for m in 0..self.models.len() {
            let model = &mut self.models[m];
            let is_over = match model.life {
                Life::DrainsFor(..) => model.inside == 0,
                Life::Unloads(until) => model.inside == 0 || until <= self.now,
                Life::Gone | Life::Loading | Life::Ready | Life::Ending => false,
            };
            if is_over {
                model.life = Life::Ending;
                model.inside = 0;
                self.deeds.push(Deed::End(m));
            }
        }
        self.reopen();
        self.make_room();
        if self.reopen() {
            self.make_room();
        }
    }

    fn let_in(&mut self, m: usize) {
        let model = &mut self.models[m];
        if model.life != Life::Ready {
            return;
        }
        for waiter in std::mem::take(&mut model.line) {
            if !waiter.enters {
                self.deeds.push(Deed::Done(waiter.ticket));
            } else if model.is_full() {
                model.line.push(waiter);
            } else {
                model.inside += 1;
                model.asked = self.now;
                self.deeds.push(Deed::Enters(waiter.ticket, m));
            }
        }
    }

    /// Opens what drains for nobody any more. Returns whether anything does.
    fn reopen(&mut self) -> bool {
        let mut any = false;
        for m in 0..self.models.len() {
            let Life::DrainsFor(whom, _) = self.models[m].life else {
                continue;
            };
            let waits = self.models[whom].life == Life::Gone && !self.models[whom].line.is_empty();
            if !waits {
                any = true;
                self.models[m].life = Life::Ready;
                self.deeds.push(Deed::Reopen(m));
                self.let_in(m);
            }
        }
        any
    }

    fn refuse_all(&mut self, m: usize) {
        for waiter in std::mem::take(&mut self.models[m].line) {
            self.deeds.push(Deed::Refused(waiter.ticket));
        }
    }

    /// Sums up what workers hold of whom this is true.
    fn held(&self, of: impl Fn(&Model) -> bool) -> i64 {
        let held: u64 = self.models.iter().filter(|m| of(m)).map(|m| m.size).sum();
        i64::try_from(held).expect("small numbers")
    }

    fn make_room(&mut self) {
        let mut cold: Vec<usize> = (0..self.models.len())
            .filter(|m| self.models[*m].life == Life::Gone && !self.models[*m].line.is_empty())
            .collect();
        cold.sort_by_key(|m| {
            (
                self.models[*m].line[0].since,
                self.models[*m].line[0].ticket,
            )
        });
        // What is meant for those before, and what of that needs no drain.
        let (mut meant, mut surely_meant) = (0, 0);
        for m in cold {
            let size = i64::try_from(self.models[m].size).expect("a small number");
            let limit = i64::try_from(self.limit).expect("a small number");
            let stays = self.held(|m| m.pinned && m.has_worker() && !m.is_leaving());
            if size > limit - stays {
                self.refuse_all(m);
                continue;
            }
            let there = limit - self.held(Model::has_worker);
            let drains = self.held(|m| matches!(m.life, Life::DrainsFor(..)));
            let room = there + self.held(Model::is_leaving);
            let (surely, room) = (room - drains - surely_meant, room - meant);
            // What drains for it opens again when it starts.
            let own =
                self.held(|other| matches!(other.life, Life::DrainsFor(whom, _) if whom == m));
            if size <= there && size <= room - own && size <= surely {
                self.models[m].life = Life::Loading;
                self.deeds.push(Deed::Start(m));
            } else if size <= room - drains {
                meant += size;
                surely_meant += size;
            } else if let Some(victims) = self.least(size - (room - drains), false) {
                for victim in victims {
                    self.models[victim].life = Life::Ending;
                    self.deeds.push(Deed::End(victim));
                }
                meant += size;
                surely_meant += size;
            } else if size <= room {
                meant += size;
            } else if self.may_drain(m)
                && let Some(victims) = self.least(size - room, true)
            {
                for victim in victims {
                    if self.models[victim].inside > 0 {
                        self.models[victim].life = Life::DrainsFor(m, self.now);
                        self.deeds.push(Deed::Drain(victim));
                    }
                }
                meant += size;
            }
        }
    }

    /// Returns whether busy workers may be closed for a model now.
    fn may_drain(&self, m: usize) -> bool {
        let lost_patience = self.models[m].line[0].since + self.patience <= self.now;
        let is_held_up = |other: &Model| match other.life {
            Life::DrainsFor(whom, since) => whom != m && since + self.patience * ALONE > self.now,
            Life::Gone | Life::Loading | Life::Ready | Life::Unloads(_) | Life::Ending => false,
        };
        lost_patience && !self.models.iter().any(is_held_up)
    }

    /// Chooses who gives so much: the longest unused, idle ones before busy ones
    /// if those may go too, and then none that is not needed.
    fn least(&self, missing: i64, busy_too: bool) -> Option<Vec<usize>> {
        let mut all: Vec<usize> = (0..self.models.len())
            .filter(|m| self.models[*m].may_go())
            .filter(|m| busy_too || self.models[*m].inside == 0)
            .collect();
        all.sort_by_key(|m| {
            let model = &self.models[*m];
            let is_busy = model.inside > 0;
            (is_busy, if is_busy { model.asked } else { model.used }, *m)
        });
        let gives = |set: &[usize]| -> i64 {
            let given = set.iter().map(|m| self.models[*m].size).sum::<u64>();
            i64::try_from(given).expect("small numbers")
        };
        let mut chosen: Vec<usize> = Vec::new();
        for m in all {
            if gives(&chosen) < missing {
                chosen.push(m);
            }
        }
        if gives(&chosen) < missing {
            return None;
        }
        for index in (0..chosen.len()).rev() {
            let mut without = chosen.clone();
            without.remove(index);
            if gives(&without) >= missing {
                chosen = without;
            }
        }
        Some(chosen)
    }
}
