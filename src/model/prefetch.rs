//! When files are read ahead of a load, and what became of it.

use std::fmt;

/// When a model's files are read into the page cache before its worker asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefetch {
    /// Never: for loaders that pass the page cache by.
    #[default]
    Off,
    /// While the model is waited for, and until its worker is ready.
    Waiting,
    /// Also when nothing else happens and there is memory to spare, if it is
    /// likely to be asked for soon.
    Idle,
}

impl Prefetch {
    /// Every way.
    pub const ALL: [Self; 3] = [Self::Off, Self::Waiting, Self::Idle];

    /// Returns the word used in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Waiting => "waiting",
            Self::Idle => "idle",
        }
    }

    /// Returns the way of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.as_str() == name)
    }
}

/// Why files are read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefetchReason {
    /// Somebody waits for the model, and its room is still being made.
    Waiting,
    /// Its worker starts.
    Starting,
    /// It is likely to be asked for next, and there is memory to spare.
    Idle,
}

impl PrefetchReason {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Starting => "starting",
            Self::Idle => "idle",
        }
    }
}

/// How reading ahead ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefetchEnd {
    /// Everything is in the page cache.
    Done,
    /// It is of no use any more: the worker is ready, or nobody waits.
    CalledOff,
    /// There was no memory to spare for more.
    NoRoom,
    /// A file could not be read.
    Failed,
}

impl PrefetchEnd {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::CalledOff => "called_off",
            Self::NoRoom => "no_room",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for PrefetchEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "all of it is there",
            Self::CalledOff => "called off, since its worker is ready or nobody waits any more",
            Self::NoRoom => "stopped, since there is no memory to spare for more",
            Self::Failed => "stopped, since a file cannot be read",
        })
    }
}
