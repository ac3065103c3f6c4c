//! What passed for each model: counted by the proxy at each request's end, read
//! by the metrics.
//!
//! The counts are atomics that belong to the model's route, so a request that
//! knows its route neither locks nor looks anything up to be counted. They are
//! independent of each other: a reader may see one request in some and not yet
//! in others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Statuses that are counted by themselves; of others their class is.
const STATUSES: [(u16, &str); 18] = [
    (101, "101"),
    (200, "200"),
    (400, "400"),
    (401, "401"),
    (403, "403"),
    (404, "404"),
    (405, "405"),
    (408, "408"),
    (409, "409"),
    (413, "413"),
    (422, "422"),
    (429, "429"),
    (499, "499"),
    (500, "500"),
    (501, "501"),
    (502, "502"),
    (503, "503"),
    (504, "504"),
];
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
const CODES: usize = STATUSES.len() + CLASSES.len();

/// Statuses of gRPC by number; an unknown one counts as `UNKNOWN`, which is
/// what clients take it for.
const CALLS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
const UNKNOWN_CALL: usize = 2;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The client has the whole answer.
    Whole,
    /// The client left before that.
    Left,
    /// The worker broke off.
    Broke,
    /// It took longer than `request_timeout`.
    Late,
    /// No worker answered it.
    Refused,
}

impl Ending {
    const ALL: [Self; 5] = [
        Self::Whole,
        Self::Left,
        Self::Broke,
        Self::Late,
        Self::Refused,
    ];

    /// Returns the word used in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Left => "left",
            Self::Broke => "broke",
            Self::Late => "late",
            Self::Refused => "refused",
        }
    }
}

/// One request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// The status of HTTP; of a call of gRPC the one that its status stands for.
    pub status: u16,
    /// The status of a call of gRPC.
    pub call: Option<u16>,
    /// How it ended.
    pub ending: Ending,
    /// How long it waited for a lease, if it asked for one.
    pub queued: Option<Duration>,
    /// The same, if its worker became ready meanwhile.
    pub cold: Option<Duration>,
    /// From its arrival to the first byte of the answer's body, or to the answer if
    /// that has none; absent when no worker answered.
    pub first_byte: Option<Duration>,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Bytes of the answer's body.
    pub answer_bytes: u64,
}

impl Passed {
    /// Returns one that residentd answered before it asked for a lease.
    #[must_use]
    pub const fn refused(status: u16, call: Option<u16>) -> Self {
        Self {
            status,
            call,
            ending: Ending::Refused,
            queued: None,
            cold: None,
            first_byte: None,
            request_bytes: 0,
            answer_bytes: 0,
        }
    }
}

/// The counts of one model.
#[derive(Debug)]
pub struct Traffic {
    codes: [AtomicU64; CODES],
    calls: [AtomicU64; CALLS.len()],
    endings: [AtomicU64; Ending::ALL.len()],
    request_bytes: AtomicU64,
    answer_bytes: AtomicU64,
    queued: Durations,
    cold: Durations,
    first_byte: Durations,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            codes: [const { AtomicU64::new(0) }; CODES],
            calls: [const { AtomicU64::new(0) }; CALLS.len()],
            endings: [const { AtomicU64::new(0) }; Ending::ALL.len()],
            request_bytes: AtomicU64::new(0),
            answer_bytes: AtomicU64::new(0),
            queued: Durations::default(),
            cold: Durations::default(),
            first_byte: Durations::default(),
        }
    }
}

impl Traffic {
    /// Counts a request.
    pub fn count(&self, passed: &Passed) {
        one_more(&self.codes[code(passed.status)]);
        if let Some(call) = passed.call {
            let known = usize::from(call) < CALLS.len();
            one_more(
                &self.calls[if known {
                    usize::from(call)
                } else {
                    UNKNOWN_CALL
                }],
            );
        }
        one_more(&self.endings[passed.ending as usize]);
        self.request_bytes
            .fetch_add(passed.request_bytes, Ordering::Relaxed);
        self.answer_bytes
            .fetch_add(passed.answer_bytes, Ordering::Relaxed);
        for (durations, took) in [
            (&self.queued, passed.queued),
            (&self.cold, passed.cold),
            (&self.first_byte, passed.first_byte),
        ] {
            if let Some(took) = took {
                durations.count(took);
            }
        }
    }

    /// Returns requests by code, those that occurred.
    pub fn codes(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let names = STATUSES.iter().map(|(_, name)| *name).chain(CLASSES);
        occurred(names, &self.codes)
    }

    /// Returns calls of gRPC by status, those that occurred.
    pub fn calls(&self) -> impl Iterator<Item = (&'static str, u64)> {
        occurred(CALLS.into_iter(), &self.calls)
    }

    /// Returns requests by how they ended.
    pub fn endings(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let words = Ending::ALL.into_iter().map(Ending::as_str);
        words.zip(self.endings.iter().map(read))
    }

    /// Returns the bytes of all requests' bodies.
    #[must_use]
    pub fn request_bytes(&self) -> u64 {
        read(&self.request_bytes)
    }

    /// Returns the bytes of all answers' bodies.
    #[must_use]
    pub fn answer_bytes(&self) -> u64 {
        read(&self.answer_bytes)
    }

    /// Returns how long requests waited for a lease.
    #[must_use]
    pub const fn queued(&self) -> &Durations {
        &self.queued
    }

    /// Returns how long those waited whose worker became ready meanwhile.
    #[must_use]
    pub const fn cold(&self) -> &Durations {
        &self.cold
    }

    /// Returns how long requests took to the first byte of their answer.
    #[must_use]
    pub const fn first_byte(&self) -> &Durations {
        &self.first_byte
    }
}

fn code(status: u16) -> usize {
    let own = STATUSES.iter().position(|(known, _)| *known == status);
    let class = usize::from(status / 100).clamp(1, CLASSES.len()) - 1;
    own.unwrap_or(STATUSES.len() + class)
}

fn occurred(
    names: impl Iterator<Item = &'static str>,
    counts: &[AtomicU64],
) -> impl Iterator<Item = (&'static str, u64)> {
    let all = names.zip(counts.iter().map(read));
    all.filter(|(_, count)| *count > 0)
}

fn one_more(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

fn read(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

/// Upper bounds of the classes of durations, in µs and in seconds.
const BOUNDS: [(u64, f64); 15] = [
    (1_000, 0.001),
    (5_000, 0.005),
    (10_000, 0.01),
    (25_000, 0.025),
    (50_000, 0.05),
    (100_000, 0.1),
    (250_000, 0.25),
    (500_000, 0.5),
    (1_000_000, 1.0),
    (2_500_000, 2.5),
    (5_000_000, 5.0),
    (10_000_000, 10.0),
    (30_000_000, 30.0),
    (60_000_000, 60.0),
    (300_000_000, 300.0),
];

/// Durations by class. Not the library's histogram, which takes a lock for each.
#[derive(Debug, Default)]
pub struct Durations {
    classes: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

impl Durations {
    fn count(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let class = BOUNDS.partition_point(|(bound, _)| *bound < micros);
        one_more(&self.classes[class]);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Returns the number in each class with the class' upper bound in seconds,
    /// the last of which is infinite.
    #[must_use]
    pub fn classes(&self) -> Vec<(f64, u64)> {
        let bounds = BOUNDS.iter().map(|(_, seconds)| *seconds);
        let bounds = bounds.chain([f64::INFINITY]);
        bounds.zip(self.classes.iter().map(read)).collect()
    }

    /// Returns all of them together.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_micros(read(&self.micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(status: u16) -> Passed {
        Passed {
            status,
            call: None,
            ending: Ending::Whole,
            queued: None,
            cold: None,
            first_byte: None,
            request_bytes: 1,
            answer_bytes: 2,
        }
    }

    #[test]
    fn whatever_the_status_it_is_one_of_few_codes() {
        let traffic = Traffic::default();
        for status in 0..=u16::MAX {
            traffic.count(&passed(status));
        }
        let codes: Vec<_> = traffic.codes().collect();
        assert_eq!(codes.len(), CODES);
        assert_eq!(codes.iter().map(|(_, count)| count).sum::<u64>(), 1 << 16);
        assert!(codes.contains(&("404", 1)) && codes.contains(&("3xx", 100)));
        assert_eq!(traffic.request_bytes() * 2, traffic.answer_bytes());
    }

    #[test]
    fn a_status_of_grpc_that_does_not_exist_is_unknown() {
        let traffic = Traffic::default();
        for call in [0, 14, 17, u16::MAX] {
            traffic.count(&Passed::refused(200, Some(call)));
        }
        let calls: Vec<_> = traffic.calls().collect();
        assert_eq!(calls, [("OK", 1), ("UNKNOWN", 2), ("UNAVAILABLE", 1)]);
        assert!(traffic.endings().any(|ending| ending == ("refused", 4)));
    }

    #[test]
    fn a_duration_is_in_the_first_class_that_is_not_below_it() {
        let durations = Durations::default();
        for micros in [0, 1_000, 1_001, 300_000_000, 300_000_001] {
            durations.count(Duration::from_micros(micros));
        }
        let classes = durations.classes();
        let filled: Vec<_> = classes.iter().filter(|(_, count)| *count > 0).collect();
        let expected = [(0.001, 2), (0.005, 1), (300.0, 1), (f64::INFINITY, 1)];
        assert_eq!(filled, expected.iter().collect::<Vec<_>>());
        assert_eq!(durations.sum(), Duration::from_micros(600_002_002));
    }
}
