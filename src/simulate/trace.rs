//! The trace: which request came when, and how long it took.

use std::path::Path;
use std::time::Duration;

use super::input::{InputError, Table};
use super::workload::Demand;
use crate::clock::Timestamp;
use crate::model::ModelName;

/// The columns that are read; others may be there.
const COLUMNS: [&str; 3] = ["timestamp_ms", "model_id", "duration_ms"];

/// Reads a trace: `timestamp_ms` (since its begin), `model_id`, `duration_ms`
/// (milliseconds inside the worker). Rows may be in any order; those of one
/// moment keep theirs.
///
/// # Errors
/// What is wrong with the file, where, and what would be right.
pub fn read(path: &Path) -> Result<Vec<Demand>, InputError> {
    let number = |text: &str| text.parse().ok();
    let mut all = Table::open(path, &COLUMNS)?.rows(|row| {
        let at = row.value(0, "a whole number of milliseconds", number)?;
        let name = "1 to 128 of letters, digits and ._-/:@+";
        let model = row.value(1, name, |text| ModelName::new(text).ok())?;
        let duration = row.value(2, "a whole number of milliseconds", number)?;
        Ok(Demand {
            at: Timestamp::from_millis(at),
            model,
            duration: Duration::from_millis(duration),
        })
    })?;
    all.sort_by_key(|demand| demand.at);
    Ok(all)
}
