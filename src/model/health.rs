//! What is asked of a ready worker, and what may be wrong with it.

use std::fmt;
use std::time::Duration;

/// How a ready worker is watched. A time or count of zero switches its check
/// off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// Between two probes of a worker from which nothing is heard. Switched
    /// off, it is only probed when a request could not connect to it.
    pub probe: Duration,
    /// Longest a probe waits for its answer.
    pub timeout: Duration,
    /// Probes that fail in a row before it counts as unhealthy.
    pub failures: u32,
    /// Longest without a byte for any request while its processes stand still.
    pub still: Duration,
    /// Longest without a byte for any request, whatever its processes do.
    pub silent: Duration,
    /// Requests answered in a row with a server's error.
    pub errors: u32,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            probe: Duration::from_secs(10),
            timeout: Duration::from_secs(10),
            failures: 3,
            still: Duration::from_secs(120),
            silent: Duration::ZERO,
            errors: 20,
        }
    }
}

/// What is wrong with a worker that runs, with the numbers that say so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ailment {
    /// Nothing listens on its address any more.
    Refuses {
        /// Probes in a row.
        times: u32,
        /// From the first of them to the last.
        over: Duration,
    },
    /// Probes are not answered in time, or cut off.
    NoAnswer {
        /// Probes in a row.
        times: u32,
        /// From the first of them to the last.
        over: Duration,
    },
    /// The same, and its process is stopped by a signal.
    Stopped {
        /// Probes in a row.
        times: u32,
        /// From the first of them to the last.
        over: Duration,
    },
    /// Probes are answered, but not as its `ready` check wants.
    WrongStatus {
        /// Probes in a row.
        times: u32,
        /// From the first of them to the last.
        over: Duration,
        /// What the last one was answered.
        status: u16,
    },
    /// Requests wait for it and its processes do nothing.
    Still {
        /// Requests that wait.
        waiting: u32,
        /// How long no byte came for any.
        silent: Duration,
        /// For how much of it its processes have not computed.
        still: Duration,
        /// What they computed in that time.
        cpu: Duration,
    },
    /// Requests wait for it for longer than its `silent`.
    Silent {
        /// Requests that wait.
        waiting: u32,
        /// How long no byte came for any.
        silent: Duration,
    },
    /// It answers requests with nothing but errors.
    Errors {
        /// Requests in a row.
        times: u32,
        /// The last one's status.
        status: u16,
    },
}

impl Ailment {
    /// Returns the word used in metrics and the API.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Refuses { .. } => "refuses",
            Self::NoAnswer { .. } => "no_answer",
            Self::Stopped { .. } => "stopped",
            Self::WrongStatus { .. } => "wrong_status",
            Self::Still { .. } => "still",
            Self::Silent { .. } => "silent",
            Self::Errors { .. } => "errors",
        }
    }

    /// Returns whether it is of no use to ask the process to end: it runs no
    /// code that could hear.
    #[must_use]
    pub const fn is_deaf(&self) -> bool {
        matches!(self, Self::Stopped { .. })
    }
}

impl fmt::Display for Ailment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = Duration::as_secs_f64;
        match self {
            Self::Refuses { times, over } => write!(
                f,
                "it runs but refuses connections, {times} times in a row within {:.1} s",
                seconds(over)
            ),
            Self::NoAnswer { times, over } => write!(
                f,
                "it runs but did not answer {times} probes in a row within {:.1} s",
                seconds(over)
            ),
            Self::Stopped { times, over } => write!(
                f,
                "its process is stopped by a signal and did not answer {times} probes in a row within {:.1} s",
                seconds(over)
            ),
            Self::WrongStatus {
                times,
                over,
                status,
            } => write!(
                f,
                "its probe failed {times} times in a row within {:.1} s, last with status {status}",
                seconds(over)
            ),
            Self::Still {
                waiting,
                silent,
                still,
                cpu,
            } => write!(
                f,
                "it hangs: no byte for {:.1} s while requests wait ({waiting}), and its processes computed {:.2} s in the last {:.1} s",
                seconds(silent),
                seconds(cpu),
                seconds(still)
            ),
            Self::Silent { waiting, silent } => write!(
                f,
                "no byte for {:.1} s while requests wait ({waiting})",
                seconds(silent)
            ),
            Self::Errors { times, status } => write!(
                f,
                "it answered {times} requests in a row with an error, the last with status {status}"
            ),
        }
    }
}
