//! What is wrong with a configuration: every problem at once, each with its
//! place, and the fix.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// What is wrong with one value, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {fix}")]
pub struct Complaint {
    /// What is wrong, with the value as it was written.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

impl Complaint {
    pub(super) fn new(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            fix: fix.into(),
        }
    }
}

/// Where something was written. Sorts weakest source first, then by line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// The defaults within the binary.
    BuiltIn,
    /// A configuration file.
    File {
        /// Which of the files, in reading order.
        index: usize,
        /// Its path as given.
        name: Arc<str>,
        /// The line, from 1; 0 is the file as a whole.
        line: usize,
    },
    /// The `.env` file.
    DotEnv,
    /// The process environment.
    Environment,
    /// A command-line flag.
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("built in"),
            Self::File { name, line: 0, .. } => f.write_str(name),
            Self::File { name, line, .. } => write!(f, "{name}:{line}"),
            Self::DotEnv => f.write_str("from .env"),
            Self::Environment => f.write_str("from the environment"),
            Self::CommandLine => f.write_str("from the command line"),
        }
    }
}

/// What something is called where it was written, and where that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Key path, variable or flag: `models.llama.memory`.
    pub(super) key: String,
    /// Where it stands.
    pub(super) origin: Origin,
}

impl Place {
    /// Returns the place of a key below this one, on the same line.
    pub(super) fn below(&self, key: &str) -> Self {
        Self {
            key: key_path(&self.key, key),
            origin: self.origin.clone(),
        }
    }
}

/// Joins a table's path and a key as TOML writes them, the key quoted when it
/// must be.
pub(super) fn key_path(table: &str, key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let key = if !key.is_empty() && key.chars().all(bare) {
        key.to_owned()
    } else {
        format!("{key:?}")
    };
    if table.is_empty() {
        key
    } else {
        format!("{table}.{key}")
    }
}

/// Whether residentd can start with a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It can: something may not work later.
    Warning,
    /// It cannot.
    Error,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    severity: Severity,
    place: Place,
    what: String,
    fix: String,
}

impl Problem {
    /// Returns whether residentd can start with it.
    #[must_use]
    pub fn severity(&self) -> Severity {
        self.severity
    }

    /// Returns the key path, variable, flag or file that is wrong.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.place.key
    }
}

/// Shows `key: what; fix (where)`, after `warning: ` when it is only that.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        write!(f, "{}: {}", self.place.key, self.what)?;
        if !self.fix.is_empty() {
            write!(f, "; {}", self.fix)?;
        }
        match &self.place.origin {
            // The key names the file already.
            Origin::File { line: 0, .. } => Ok(()),
            origin => write!(f, " ({origin})"),
        }
    }
}

/// Every problem found, sorted by place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    list: Vec<Problem>,
}

impl Problems {
    /// Returns the problems, files in the order they were read, each from top
    /// to bottom.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.list.iter()
    }

    /// Returns whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Returns whether residentd cannot start.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.iter().any(|p| p.severity == Severity::Error)
    }

    pub(super) fn error(&mut self, place: &Place, what: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Error, place, what.into(), fix.into());
    }

    pub(super) fn warn(&mut self, place: &Place, what: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Warning, place, what.into(), fix.into());
    }

    pub(super) fn complain(&mut self, place: &Place, complaint: Complaint) {
        self.add(Severity::Error, place, complaint.what, complaint.fix);
    }

    /// Returns whether this key, or one below it, has an error already, so
    /// that what only follows from it need not be told.
    pub(super) fn mentions(&self, key: &str) -> bool {
        self.iter().any(|problem| {
            problem.severity == Severity::Error
                && problem
                    .key()
                    .strip_prefix(key)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    }

    pub(super) fn sort(&mut self) {
        self.list
            .sort_by(|a, b| a.place.origin.cmp(&b.place.origin));
    }

    fn add(&mut self, severity: Severity, place: &Place, what: String, fix: String) {
        let problem = Problem {
            severity,
            place: place.clone(),
            what,
            fix,
        };
        if !self.list.contains(&problem) {
            self.list.push(problem);
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl Error for Problems {}
