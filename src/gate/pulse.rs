//! What requests hear from a ready worker.
//!
//! The proxy counts, without a lock or a clock, and every thread what it does itself,
//! so that none waits for another's cache with each piece of a stream; the worker's task
//! looks from time to time and judges (`worker/liveness`). Only requests that ask for work
//! count, see [`Visit`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};

use tokio::sync::Notify;

use super::Home;

/// Parts of the counts: more than there are threads that serve connections, which are
/// among the first that count.
const PARTS: usize = 8;

/// The counts of one worker.
#[derive(Debug, Default)]
pub struct Pulse {
    parts: [Part; PARTS],
    refused: AtomicU32,
    errors: AtomicU32,
    error_status: AtomicU16,
    alarm: Notify,
}

/// What requests count that began on one thread, in cache lines of its own (two: they
/// are fetched in pairs). What it is added to is the sum: a request that ends elsewhere
/// counts where it began.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Part {
    inside: AtomicU32,
    waiting: AtomicU32,
    heard: AtomicU64,
}

/// A copy of a pulse's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PulseReading {
    /// Requests that are with the worker.
    pub inside: u32,
    /// Of those, requests that wait for the worker; the others are held up by
    /// their clients.
    pub waiting: u32,
    /// Changes whenever a request that waited heard from the worker.
    pub heard: u64,
    /// Changes whenever a request could not connect.
    pub refused: u32,
    /// Requests in a row that were answered with an error, and nobody heard
    /// anything better meanwhile.
    pub errors: u32,
    /// The last of these.
    pub error_status: u16,
}

impl Pulse {
    /// Returns a copy of the numbers.
    #[must_use]
    pub fn read(&self) -> PulseReading {
        // Wrapping, since one that waits no more may be subtracted on one thread just
        // before it is added on another.
        let sum = |count: fn(&Part) -> &AtomicU32| {
            let counts = self.parts.iter();
            let counts = counts.map(|part| count(part).load(Ordering::Relaxed));
            counts.fold(0, u32::wrapping_add)
        };
        let inside = sum(|part| &part.inside);
        let waiting = sum(|part| &part.waiting);
        let heard = self.parts.iter();
        let heard = heard.map(|part| part.heard.load(Ordering::Relaxed)).sum();
        PulseReading {
            inside,
            waiting,
            heard,
            refused: self.refused.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            error_status: self.error_status.load(Ordering::Relaxed),
        }
    }

    /// Says that a request could not connect to the worker.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.alarm.notify_one();
    }

    /// Waits until there is reason to look at once: a connection was refused,
    /// or an error answered.
    pub async fn alarmed(&self) {
        self.alarm.notified().await;
    }
}

/// One request's time with a worker, from the moment it is sent to the end of
/// its answer. Dropping the last copy ends it.
#[derive(Clone, Debug)]
pub struct Visit(Arc<Stay>);

#[derive(Debug)]
struct Stay {
    pulse: Arc<Pulse>,
    /// Where it counts.
    part: usize,
    waits: AtomicBool,
    owes: AtomicBool,
    failed: AtomicBool,
}

impl Visit {
    /// Begins a visit. The request does not wait for the worker yet.
    #[must_use]
    pub fn begin(pulse: Arc<Pulse>) -> Self {
        let part = Home::here().part(PARTS);
        pulse.parts[part].inside.fetch_add(1, Ordering::Relaxed);
        Self(Arc::new(Stay {
            pulse,
            part,
            waits: AtomicBool::new(false),
            owes: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        }))
    }

    /// A part of the request is still to come, so that a worker that says
    /// nothing may be waiting for it: a conversation may be quiet for long.
    pub fn owes(&self) {
        self.0.owes.store(true, Ordering::Relaxed);
    }

    /// The worker said something, and it is its turn again unless the client
    /// owes it something.
    pub fn waits_on(&self) {
        if !self.0.owes.load(Ordering::Relaxed) {
            self.waits();
        }
    }

    /// From now on it is the worker's turn: it has the whole request. Whoever
    /// waits already goes on.
    pub fn waits(&self) {
        let stay = &self.0;
        if stay.owes.load(Ordering::Relaxed) {
            stay.owes.store(false, Ordering::Relaxed);
        }
        if !stay.waits.load(Ordering::Relaxed) && !stay.waits.swap(true, Ordering::Relaxed) {
            stay.part().waiting.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Something came from the worker: now it is the client's turn.
    pub fn hears(&self) {
        let stay = &self.0;
        if stay.stop_waiting() {
            stay.part().heard.fetch_add(1, Ordering::Relaxed);
            if !stay.failed.load(Ordering::Relaxed) {
                stay.clear_errors();
            }
        }
    }

    /// The head of an answer came that does not tell yet how it will end.
    pub fn begun(&self) {
        let stay = &self.0;
        stay.stop_waiting();
        stay.part().heard.fetch_add(1, Ordering::Relaxed);
    }

    /// The head of the answer came, or the end of a call, with this status. A client's mistake (4xx)
    /// is no fault of the worker; that it is full (503) or does not know how
    /// (501) says nothing of it.
    pub fn answered(&self, status: u16) {
        let stay = &self.0;
        stay.stop_waiting();
        stay.part().heard.fetch_add(1, Ordering::Relaxed);
        stay.failed.store(status >= 500, Ordering::Relaxed);
        match status {
            500 | 502 | 504 => {
                stay.pulse.error_status.store(status, Ordering::Relaxed);
                stay.pulse.errors.fetch_add(1, Ordering::Relaxed);
                stay.pulse.alarm.notify_one();
            }
            501 | 503 | 505.. => {}
            _ => stay.clear_errors(),
        }
    }
}

impl Stay {
    fn part(&self) -> &Part {
        &self.pulse.parts[self.part]
    }

    fn stop_waiting(&self) -> bool {
        let waited =
            self.waits.load(Ordering::Relaxed) && self.waits.swap(false, Ordering::Relaxed);
        if waited {
            self.part().waiting.fetch_sub(1, Ordering::Relaxed);
        }
        waited
    }

    fn clear_errors(&self) {
        // Mostly there are none, and then nothing is written.
        if self.pulse.errors.load(Ordering::Relaxed) > 0 {
            self.pulse.errors.store(0, Ordering::Relaxed);
        }
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.stop_waiting();
        self.part().inside.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pulse: &Pulse) -> (u32, u32, u64) {
        let read = pulse.read();
        (read.inside, read.waiting, read.heard)
    }

    #[test]
    fn a_request_waits_hears_and_waits_again_until_it_goes() {
        let pulse = Arc::new(Pulse::default());
        let visit = Visit::begin(Arc::clone(&pulse));
        assert_eq!(counts(&pulse), (1, 0, 0), "its body is on its way");
        let upload = visit.clone();
        upload.waits();
        visit.waits();
        assert_eq!(counts(&pulse), (1, 1, 0));
        drop(upload);
        visit.answered(200);
        assert_eq!(counts(&pulse), (1, 0, 1));
        visit.waits();
        visit.hears();
        visit.hears();
        assert_eq!(counts(&pulse), (1, 0, 2), "only who waited hears");
        visit.waits();
        drop(visit);
        assert_eq!(counts(&pulse), (0, 0, 2));
    }

    #[test]
    fn requests_of_many_threads_are_counted_together_wherever_they_end() {
        let pulse = Arc::new(Pulse::default());
        let visits: Vec<_> = (0..3 * PARTS)
            .map(|_| {
                let pulse = Arc::clone(&pulse);
                let begun = std::thread::spawn(move || Visit::begin(pulse));
                begun.join().expect("it does not panic")
            })
            .collect();
        for visit in &visits {
            visit.waits();
        }
        assert_eq!(counts(&pulse), (24, 24, 0));
        visits[0].hears();
        assert_eq!(counts(&pulse), (24, 23, 1));
        drop(visits);
        assert_eq!(counts(&pulse), (0, 0, 1));
        // As it may be seen in the moment in which two threads are about it.
        pulse.parts[0].waiting.fetch_sub(1, Ordering::Relaxed);
        pulse.parts[1].waiting.fetch_add(3, Ordering::Relaxed);
        assert_eq!(counts(&pulse).1, 2);
    }

    #[test]
    fn errors_count_in_a_row_until_somebody_hears_something_better() {
        let pulse = Arc::new(Pulse::default());
        let answer = |status| Visit::begin(Arc::clone(&pulse)).answered(status);
        let errors = || (pulse.read().errors, pulse.read().error_status);
        let streams = Visit::begin(Arc::clone(&pulse));
        streams.answered(200);
        for status in [500, 503, 502, 501] {
            answer(status);
        }
        assert_eq!(errors(), (2, 502), "busy is no error and no success");
        let failed = Visit::begin(Arc::clone(&pulse));
        failed.answered(500);
        failed.waits();
        failed.hears();
        assert_eq!(errors(), (3, 500), "nor is the body of an error");
        streams.waits();
        streams.hears();
        assert_eq!(errors().0, 0, "a stream that goes on is");
        answer(500);
        answer(400);
        assert_eq!(errors().0, 0);
    }

    #[test]
    fn a_call_is_judged_by_its_end() {
        let pulse = Arc::new(Pulse::default());
        for _ in 0..3 {
            let call = Visit::begin(Arc::clone(&pulse));
            call.begun();
            call.answered(500);
        }
        assert_eq!(
            pulse.read().errors,
            3,
            "that they began well clears nothing"
        );
        assert_eq!(pulse.read().heard, 6);
        let call = Visit::begin(Arc::clone(&pulse));
        call.begun();
        call.answered(200);
        assert_eq!(pulse.read().errors, 0);
    }

    #[tokio::test]
    async fn an_error_and_a_refused_connection_raise_the_alarm() {
        let pulse = Arc::new(Pulse::default());
        Visit::begin(Arc::clone(&pulse)).answered(500);
        pulse.alarmed().await;
        pulse.refused();
        pulse.alarmed().await;
        assert_eq!((pulse.read().errors, pulse.read().refused), (1, 1));
    }
}
