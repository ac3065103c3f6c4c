//! The table of models: name, size, load time.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use super::input::{InputError, Table};
use super::workload::ModelFacts;
use crate::model::{Bytes, ModelName};

/// The columns that are read; others may be there.
const COLUMNS: [&str; 3] = ["model_id", "size_mib", "load_cold_ms"];

/// Reads a table of models: `model_id`, `size_mib` (MiB of memory while it is
/// resident), `load_cold_ms` (milliseconds from spawn to ready).
///
/// # Errors
/// What is wrong with the file, where, and what would be right.
pub fn read(path: &Path) -> Result<Vec<ModelFacts>, InputError> {
    let mut seen = BTreeSet::new();
    Table::open(path, &COLUMNS)?.rows(|row| {
        let name = "1 to 128 of letters, digits and ._-/:@+";
        let name = row.value(0, name, |text| ModelName::new(text).ok())?;
        if !seen.insert(name.clone()) {
            return Err(row.twice(name.as_str()));
        }
        let size = row.value(1, "a whole number of MiB above zero", |text| {
            text.parse().ok().filter(|mib| *mib > 0)
        })?;
        let load = row.value(2, "a whole number of milliseconds", |text| {
            text.parse().ok()
        })?;
        Ok(ModelFacts::new(
            name,
            Bytes::mib(size),
            Duration::from_millis(load),
        ))
    })
}
