//! Which files a model's last life mapped or opened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use redb::{
    Database, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction,
};

use super::{SEPARATOR, Store, Write};
use crate::model::ModelName;

/// Paths by `model ␟ fingerprint ␟`, each ended by a NUL, which no path holds.
const FILES: TableDefinition<&str, &str> = TableDefinition::new("files_v1");

/// What is kept of one model's files.
pub(super) struct Entry {
    /// What the keys of all that is kept of this model begin with.
    model: String,
    key: String,
    paths: String,
}

impl Store {
    /// Returns the files that the model's last life used, as long as its command
    /// and weight files are what they were.
    #[must_use]
    pub fn files(&self, model: &ModelName) -> Vec<PathBuf> {
        let known = self.known();
        let paths = known.prefix(model);
        let paths = paths.and_then(|prefix| known.files.get(&prefix));
        let paths = paths.map_or("", String::as_str).split_terminator('\0');
        paths.map(PathBuf::from).collect()
    }

    /// Keeps the files that a life used; a path that is no text is left out.
    pub fn keep_files(&self, model: &ModelName, files: &[PathBuf]) {
        let mut known = self.known();
        let Some(key) = known.prefix(model) else {
            return;
        };
        let paths = files.iter().filter_map(|path| Path::to_str(path));
        let paths: String = paths.flat_map(|path| [path, "\0"]).collect();
        if known.files.get(&key) == Some(&paths) {
            return;
        }
        let model = format!("{model}{SEPARATOR}");
        known.files.retain(|key, _| !key.starts_with(&model));
        known.files.insert(key.clone(), paths.clone());
        drop(known);
        self.write(Write::Files(Entry { model, key, paths }));
    }
}

/// Reads all there is.
pub(super) fn read(database: &Database) -> Result<BTreeMap<String, String>, redb::Error> {
    let read = database.begin_read()?;
    let table = match read.open_table(FILES) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(BTreeMap::new()),
        other => other?,
    };
    let mut all = BTreeMap::new();
    for entry in table.iter()? {
        let (key, paths) = entry?;
        all.insert(key.value().to_owned(), paths.value().to_owned());
    }
    Ok(all)
}

/// Writes one model's files.
pub(super) fn write(transaction: &WriteTransaction, entry: &Entry) -> Result<(), redb::Error> {
    let mut table = transaction.open_table(FILES)?;
    table.retain(|key, _| !key.starts_with(entry.model.as_str()))?;
    table.insert(entry.key.as_str(), entry.paths.as_str())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::ModelSpec;

    #[test]
    fn files_are_kept_over_restarts_until_the_command_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        let name = ModelName::new("a").expect("a good name");
        let spec = |word: &str| [Arc::new(ModelSpec::plain(name.clone(), vec![word.into()]))];
        let files = [PathBuf::from("/a b"), PathBuf::from("/c\nd")];
        let store = Store::open(folder.path(), &spec("x")).expect("it opens");
        assert!(store.files(&name).is_empty());
        store.keep_files(&name, &[PathBuf::from("/old")]);
        store.keep_files(&name, &files);
        assert_eq!(store.files(&name), files);
        store.flush();
        let reopen = |word| {
            let mut tries = 0..100;
            loop {
                // The thread that writes closes the database a moment later.
                match Store::open(folder.path(), &spec(word)) {
                    Ok(store) => break store,
                    Err(error) => assert!(tries.next().is_some(), "{error}"),
                }
                std::thread::yield_now();
            }
        };
        drop(store);
        let store = reopen("x");
        assert_eq!(store.files(&name), files);
        drop(store);
        assert!(reopen("y").files(&name).is_empty());
    }
}
