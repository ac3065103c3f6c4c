//! One transaction: what is to be written, into the tables of the database.

use std::collections::BTreeMap;

use redb::{Database, ReadableTableMetadata};

use super::writer::{Key, Pending, Value};
use super::{DECISIONS, FILES, FOOTPRINTS, LIMITS, LOADS, RUNS, WORKERS};

/// Decisions that are kept: as many as a run keeps in memory.
pub(super) const DECISIONS_KEPT: u64 = 1000;
/// Runs of which it is kept where they began.
const RUNS_KEPT: u64 = 32;

/// Writes to a database, and opens it anew after a failure: it takes no more
/// writes then.
pub(super) struct Scribe<F> {
    pub(super) database: Option<Database>,
    pub(super) open: F,
}

impl<F: FnMut() -> Result<Database, redb::DatabaseError>> Scribe<F> {
    pub(super) fn write(&mut self, pending: &Pending) -> Result<(), redb::Error> {
        let database = match self.database.take() {
            Some(database) => database,
            None => (self.open)()?,
        };
        commit(&database, pending)?;
        self.database = Some(database);
        Ok(())
    }
}

fn commit(database: &Database, pending: &Pending) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut footprints = transaction.open_table(FOOTPRINTS)?;
        let mut limits = transaction.open_table(LIMITS)?;
        let mut loads = transaction.open_table(LOADS)?;
        let mut files = transaction.open_table(FILES)?;
        let mut workers = transaction.open_table(WORKERS)?;
        let mut decisions = transaction.open_table(DECISIONS)?;
        let mut runs = transaction.open_table(RUNS)?;
        for (key, value) in pending {
            match (key, value) {
                (Key::Footprint(model), Value::Numbers(numbers)) => {
                    replace(&mut footprints, model, of_numbers(numbers))?;
                }
                (Key::Load(model), Value::Numbers(numbers)) => {
                    replace(&mut loads, model, of_numbers(numbers))?;
                }
                (Key::Files(model), Value::Texts(texts)) => {
                    let texts = texts
                        .iter()
                        .map(|(key, text)| (key.as_str(), text.as_str()));
                    replace(&mut files, model, texts)?;
                }
                (Key::Limit(_), Value::Numbers(numbers)) => {
                    for (key, bytes) in numbers {
                        limits.insert(key.as_str(), bytes)?;
                    }
                }
                (Key::Worker(key), Value::Text(text)) => {
                    workers.insert(key.as_str(), text.as_str())?;
                }
                (Key::Worker(key), _) => {
                    workers.remove(key.as_str())?;
                }
                (Key::Decision(id), Value::Text(text)) => {
                    decisions.insert(id, text.as_str())?;
                    let oldest = id.saturating_sub(DECISIONS_KEPT);
                    decisions.retain_in(..=oldest, |_, _| false)?;
                }
                (Key::Run(run), Value::Number(first)) => {
                    runs.insert(run, first)?;
                    while runs.len()? > RUNS_KEPT {
                        runs.pop_first()?;
                    }
                }
                // No key goes with any other value.
                (
                    Key::Footprint(_)
                    | Key::Load(_)
                    | Key::Files(_)
                    | Key::Limit(_)
                    | Key::Decision(_)
                    | Key::Run(_),
                    _,
                ) => {}
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn of_numbers(numbers: &BTreeMap<String, u64>) -> impl Iterator<Item = (&str, u64)> {
    numbers.iter().map(|(key, number)| (key.as_str(), *number))
}

/// Puts these entries in the place of all whose keys begin so.
fn replace<'a, V: redb::Value + 'static>(
    table: &mut redb::Table<'_, &'static str, V>,
    beginning: &str,
    entries: impl Iterator<Item = (&'a str, V::SelfType<'a>)>,
) -> Result<(), redb::Error> {
    table.retain(|key, _| !key.starts_with(beginning))?;
    for (key, value) in entries {
        table.insert(key, value)?;
    }
    Ok(())
}
