//! A ready worker's admission gate.
//!
//! One atomic word holds an open bit, a watched bit and the number of requests
//! inside. The proxy enters and leaves without a message or a lock; the
//! controller closes the gate to evict, which succeeds only when nobody is
//! inside. The gate decides nothing: the controller copies it into the policy
//! as data.
//!
//! ```text
//! bit 63  open     requests may enter
//! bit 62  watched  the controller wants to hear when the last one leaves
//! bit 61  held     only the controller lets requests in, since some wait; it
//!                  wants to hear of everyone who leaves
//! 31..0            requests inside
//! ```

mod home;
mod pulse;

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

pub use home::Home;
pub use pulse::{Pulse, PulseReading, Visit};

use crate::clock::Timestamp;
use crate::model::{GAP_CLASSES, Gaps};

const OPEN: u64 = 1 << 63;
const WATCHED: u64 = 1 << 62;
const HELD: u64 = 1 << 61;
const INSIDE: u64 = (1 << 32) - 1;
/// The capacity of a gate without any bound.
const UNBOUNDED: u32 = u32::MAX;

/// Admits requests to one ready worker.
#[derive(Debug)]
pub struct Gate {
    word: AtomicU64,
    /// Most requests inside at once.
    capacity: AtomicU32,
    entered: AtomicU64,
    last_left_micros: AtomicU64,
    last_entered_micros: AtomicU64,
    /// Times between two requests that nobody has taken yet, and how many.
    gaps: [AtomicU32; GAP_CLASSES],
    gaps_count: AtomicU32,
}

/// A copy of a gate's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateReading {
    /// Requests inside now.
    pub inside: u32,
    /// Requests that ever entered.
    pub entered: u64,
    /// When a request last left; the time of opening when none has.
    pub last_left: Timestamp,
    /// When a request last entered; the time of opening when none has.
    pub last_entered: Timestamp,
}

/// What leaving did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nobody needs to know.
    Quiet,
    /// The controller wants to hear of it: the last request left a gate that it
    /// watches, or one left a gate where others wait.
    Heard,
}

impl Gate {
    /// Returns an open gate with nobody inside, for at most `capacity` requests
    /// at once; without any bound when absent.
    #[must_use]
    pub fn open(now: Timestamp, capacity: Option<NonZeroU32>) -> Self {
        Self {
            word: AtomicU64::new(OPEN),
            capacity: AtomicU32::new(capacity.map_or(UNBOUNDED, NonZeroU32::get)),
            entered: AtomicU64::new(0),
            last_left_micros: AtomicU64::new(now.as_micros()),
            last_entered_micros: AtomicU64::new(now.as_micros()),
            gaps: [const { AtomicU32::new(0) }; GAP_CLASSES],
            gaps_count: AtomicU32::new(0),
        }
    }

    /// Sets how many may be inside from now on; whoever is inside stays. The
    /// controller's only: a gate without a bound is held for nobody.
    pub fn set_capacity(&self, capacity: Option<NonZeroU32>) {
        let most = capacity.map_or(UNBOUNDED, NonZeroU32::get);
        self.capacity.store(most, Ordering::Relaxed);
        if capacity.is_none() {
            self.hold(false);
        }
    }

    /// Returns whether there is a bound on how many may be inside.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        self.capacity.load(Ordering::Relaxed) != UNBOUNDED
    }

    /// Enters, at `now`, when the gate is open, not held, and has room. Returns
    /// whether it was.
    #[must_use]
    pub fn try_enter(&self, now: Timestamp) -> bool {
        self.enter(now, HELD)
    }

    /// Enters when the gate is open and has room, held or not. The controller's
    /// only, for whoever it lets in.
    #[must_use]
    pub fn try_enter_held(&self, now: Timestamp) -> bool {
        self.enter(now, 0)
    }

    fn enter(&self, now: Timestamp, barred_by: u64) -> bool {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let full = inside(word) >= self.capacity.load(Ordering::Relaxed);
            if word & OPEN == 0 || word & barred_by != 0 || full {
                return false;
            }
            match self.word.compare_exchange_weak(
                word,
                word + 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(other) => word = other,
            }
        }
        let micros = now.as_micros();
        let before = self
            .last_entered_micros
            .fetch_max(micros, Ordering::Relaxed);
        if self.entered.fetch_add(1, Ordering::Relaxed) > 0 {
            let gap = Duration::from_micros(micros.saturating_sub(before));
            self.gaps[Gaps::class(gap)].fetch_add(1, Ordering::Relaxed);
            self.gaps_count.fetch_add(1, Ordering::Release);
        }
        true
    }

    /// Takes the times between requests since the last call; `None` without any.
    #[must_use]
    pub fn take_gaps(&self) -> Option<Gaps> {
        if self.gaps_count.swap(0, Ordering::Acquire) == 0 {
            return None;
        }
        let taken = self.gaps.iter().map(|gap| gap.swap(0, Ordering::Relaxed));
        let mut gaps = Gaps::default();
        for (class, taken) in gaps.0.iter_mut().zip(taken) {
            *class = taken;
        }
        Some(gaps)
    }

    /// Leaves after a successful [`Gate::try_enter`], at `now`.
    pub fn leave(&self, now: Timestamp) -> Left {
        // Written before the count falls, so that whoever sees zero inside
        // also sees when it became so.
        self.last_left_micros
            .fetch_max(now.as_micros(), Ordering::AcqRel);
        let before = self.word.fetch_sub(1, Ordering::AcqRel);
        debug_assert_ne!(before & INSIDE, 0, "left a gate nobody was inside");
        if before & HELD != 0 || (before & INSIDE == 1 && before & WATCHED != 0) {
            Left::Heard
        } else {
            Left::Quiet
        }
    }

    /// Closes the gate only if nobody is inside. Returns whether it closed.
    #[must_use]
    pub fn close_if_empty(&self) -> bool {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            if word & INSIDE != 0 {
                return false;
            }
            match self.word.compare_exchange_weak(
                word,
                word & !OPEN,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
    }

    /// Closes the gate whoever is inside: no new request enters.
    pub fn close(&self) {
        self.word.fetch_and(!OPEN, Ordering::AcqRel);
    }

    /// Opens the gate again.
    pub fn reopen(&self) {
        self.word.fetch_or(OPEN, Ordering::AcqRel);
    }

    /// Sets whether only the controller lets requests in. Whoever leaves from
    /// then on is heard of.
    pub fn hold(&self, held: bool) {
        if held {
            self.word.fetch_or(HELD, Ordering::AcqRel);
        } else {
            self.word.fetch_and(!HELD, Ordering::AcqRel);
        }
    }

    /// Sets whether the controller wants to hear when the last request leaves.
    /// Returns the number inside at that moment: with zero there is nobody
    /// left to tell it.
    pub fn watch(&self, watched: bool) -> u32 {
        let before = if watched {
            self.word.fetch_or(WATCHED, Ordering::AcqRel)
        } else {
            self.word.fetch_and(!WATCHED, Ordering::AcqRel)
        };
        inside(before)
    }

    /// Returns a copy of the gate's numbers.
    #[must_use]
    pub fn read(&self) -> GateReading {
        let word = self.word.load(Ordering::Acquire);
        GateReading {
            inside: inside(word),
            entered: self.entered.load(Ordering::Relaxed),
            last_left: self.last_left(),
            last_entered: time(&self.last_entered_micros),
        }
    }

    fn last_left(&self) -> Timestamp {
        time(&self.last_left_micros)
    }
}

fn time(micros: &AtomicU64) -> Timestamp {
    Timestamp::from_micros(micros.load(Ordering::Acquire))
}

fn inside(word: u64) -> u32 {
    u32::try_from(word & INSIDE).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn an_empty_gate_closes_and_a_busy_one_does_not() {
        let gate = Gate::open(Timestamp::START, None);
        assert!(gate.try_enter(Timestamp::START));
        assert!(!gate.close_if_empty());
        assert_eq!(gate.leave(Timestamp::from_millis(7)), Left::Quiet);
        assert!(gate.close_if_empty());
        assert!(!gate.try_enter(Timestamp::START));
        let read = gate.read();
        assert_eq!(
            (read.inside, read.entered, read.last_left),
            (0, 1, Timestamp::from_millis(7))
        );
    }

    #[test]
    fn the_last_to_leave_a_watched_gate_says_so() {
        let gate = Gate::open(Timestamp::START, None);
        assert!(gate.try_enter(Timestamp::START) && gate.try_enter(Timestamp::START));
        assert_eq!(gate.watch(true), 2);
        assert_eq!(gate.leave(Timestamp::START), Left::Quiet);
        assert_eq!(gate.leave(Timestamp::START), Left::Heard);
    }

    #[test]
    fn no_request_is_inside_a_gate_that_closed_empty() {
        // Eight threads enter and leave while one closes: after the close has
        // succeeded nobody may be or come inside. Each thread enters a bounded
        // number of times, since a gate that is never empty never closes.
        for _ in 0..50 {
            let gate = Arc::new(Gate::open(Timestamp::START, None));
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    let gate = Arc::clone(&gate);
                    std::thread::spawn(move || {
                        let enter = || {
                            gate.try_enter(Timestamp::START)
                                .then(|| gate.leave(Timestamp::START))
                        };
                        u64::try_from((0..500).map_while(|_| enter()).count()).expect("few")
                    })
                })
                .collect();
            while !gate.close_if_empty() {
                std::thread::yield_now();
            }
            assert_eq!(gate.read().inside, 0);
            let entered: u64 = threads
                .into_iter()
                .map(|t| t.join().expect("a thread without panics"))
                .sum();
            assert_eq!(gate.read().entered, entered);
        }
    }

    #[test]
    fn the_time_from_one_request_to_the_next_is_noted_once_and_that_before_the_first_is_not() {
        let gate = Gate::open(Timestamp::START, None);
        assert!(gate.try_enter(Timestamp::from_millis(9_000)));
        assert_eq!(gate.take_gaps(), None);
        assert!(gate.try_enter(Timestamp::from_millis(9_300)));
        gate.leave(Timestamp::from_millis(9_900));
        assert_eq!(
            gate.take_gaps(),
            Some(Gaps::one(Duration::from_millis(300)))
        );
        gate.leave(Timestamp::from_millis(10_000));
        assert!(gate.try_enter(Timestamp::from_millis(13_300)));
        assert_eq!(gate.take_gaps(), Some(Gaps::one(Duration::from_secs(4))));
        assert_eq!(gate.take_gaps(), None);
        assert_eq!(gate.read().last_entered, Timestamp::from_millis(13_300));
    }

    #[test]
    fn a_gate_with_a_capacity_lets_in_no_more_and_a_held_one_only_whom_it_is_told() {
        let gate = Gate::open(Timestamp::START, NonZeroU32::new(2));
        assert!(gate.try_enter(Timestamp::START) && gate.try_enter(Timestamp::START));
        assert!(!gate.try_enter(Timestamp::START) && !gate.try_enter_held(Timestamp::START));
        gate.hold(true);
        assert_eq!(gate.leave(Timestamp::START), Left::Heard);
        assert!(!gate.try_enter(Timestamp::START));
        assert!(gate.try_enter_held(Timestamp::START));
        gate.hold(false);
        assert_eq!(gate.leave(Timestamp::START), Left::Quiet);
        assert!(gate.try_enter(Timestamp::START));
    }

    #[test]
    fn never_more_than_its_capacity_are_inside() {
        let gate = Gate::open(Timestamp::START, NonZeroU32::new(3));
        let most = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        if gate.try_enter(Timestamp::START) {
                            let inside = u64::from(gate.read().inside);
                            most.fetch_max(inside, Ordering::Relaxed);
                            gate.leave(Timestamp::START);
                        }
                    }
                });
            }
        });
        assert!((1..=3).contains(&most.into_inner()));
        assert_eq!(gate.read().inside, 0);
    }
}
