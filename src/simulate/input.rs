//! Reading CSV tables, with errors that name file, line, column and the fix.

use std::path::{Path, PathBuf};

use csv::StringRecord;

/// Why a table could not be read.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The file could not be opened.
    #[error("open {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not CSV.
    #[error("read {path}: write one row a line, as many values as there are columns")]
    Shape {
        /// Which.
        path: PathBuf,
        /// What is wrong, and where.
        source: csv::Error,
    },
    /// The first line names no such column.
    #[error("{path}: there is no column {column}; its first line has to name {}", wanted.join(", "))]
    Column {
        /// Which file.
        path: PathBuf,
        /// What is missing.
        column: &'static str,
        /// All columns that are read.
        wanted: &'static [&'static str],
    },
    /// A value is not what its column holds.
    #[error("{path}:{line}: {column} is {text:?}; write {fix}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// Which column.
        column: &'static str,
        /// What is written there.
        text: String,
        /// What would be right.
        fix: &'static str,
    },
    /// A model has two rows.
    #[error("{path}:{line}: {model} has a row already; keep one")]
    Twice {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// Which model.
        model: String,
    },
    /// A line of an access log is none.
    #[error("{path}:{line}: {text:?} is no line of an access log; take it out")]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// Its begin.
        text: String,
    },
    /// An access log has no line.
    #[error("{path}: there are no requests in it; serve some with server.access_log = true")]
    NoRequests {
        /// Which file.
        path: PathBuf,
    },
    /// There is no row.
    #[error("{path}: there is nothing below its first line")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
}

/// A table that is read row by row, its columns by name.
pub(super) struct Table {
    path: PathBuf,
    reader: csv::Reader<std::fs::File>,
    places: Vec<usize>,
    columns: &'static [&'static str],
}

/// One row of a [`Table`].
pub(super) struct Row<'a> {
    path: &'a Path,
    record: StringRecord,
    places: &'a [usize],
    columns: &'static [&'static str],
}

impl Table {
    /// Opens a file whose first line names at least these columns.
    pub(super) fn open(path: &Path, columns: &'static [&'static str]) -> Result<Self, InputError> {
        let file = std::fs::File::open(path).map_err(|source| InputError::Open {
            path: path.to_owned(),
            source,
        })?;
        let mut reader = csv::ReaderBuilder::new()
            .trim(csv::Trim::All)
            .from_reader(file);
        let head = reader.headers().map_err(|source| InputError::Shape {
            path: path.to_owned(),
            source,
        })?;
        let place = |column: &&'static str| {
            let place = head.iter().position(|name| name == *column);
            place.ok_or_else(|| InputError::Column {
                path: path.to_owned(),
                column,
                wanted: columns,
            })
        };
        let places = columns.iter().map(place).collect::<Result<_, _>>()?;
        Ok(Self {
            path: path.to_owned(),
            reader,
            places,
            columns,
        })
    }

    /// Reads every row with `read`; none at all is an error.
    pub(super) fn rows<T>(
        mut self,
        mut read: impl FnMut(&Row<'_>) -> Result<T, InputError>,
    ) -> Result<Vec<T>, InputError> {
        let mut rows = Vec::new();
        for record in self.reader.records() {
            let record = record.map_err(|source| InputError::Shape {
                path: self.path.clone(),
                source,
            })?;
            rows.push(read(&Row {
                path: &self.path,
                record,
                places: &self.places,
                columns: self.columns,
            })?);
        }
        if rows.is_empty() {
            return Err(InputError::Empty { path: self.path });
        }
        Ok(rows)
    }
}

impl Row<'_> {
    /// Returns the text in the column with this place among those asked for.
    pub(super) fn text(&self, column: usize) -> &str {
        self.record.get(self.places[column]).unwrap_or_default()
    }

    /// Returns the value in a column as `read` understands it.
    pub(super) fn value<T>(
        &self,
        column: usize,
        fix: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, InputError> {
        let text = self.text(column);
        read(text).ok_or_else(|| InputError::Value {
            path: self.path.to_owned(),
            line: self.line(),
            column: self.columns[column],
            text: text.to_owned(),
            fix,
        })
    }

    /// Says that this row's model has one already.
    pub(super) fn twice(&self, model: &str) -> InputError {
        InputError::Twice {
            path: self.path.to_owned(),
            line: self.line(),
            model: model.to_owned(),
        }
    }

    fn line(&self) -> u64 {
        self.record.position().map_or(0, csv::Position::line)
    }
}
