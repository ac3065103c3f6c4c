//! Which files a model's last life mapped or opened.

use std::path::{Path, PathBuf};

use super::writer::{Key, Value};
use super::{SEPARATOR, Store};
use crate::model::ModelName;

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
        let value = Value::Texts([(key, paths)].into());
        self.writer.desk().keep(Key::Files(model), value);
    }
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
        let reopen = |before: Store, word| {
            before.let_go().expect("it is written");
            Store::open(folder.path(), &spec(word)).expect("it is free")
        };
        let store = reopen(store, "x");
        assert_eq!(store.files(&name), files);
        assert!(reopen(store, "y").files(&name).is_empty());
    }
}
