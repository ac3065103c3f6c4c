//! A list of files, each once, with their sizes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::model::Bytes;

/// Regular files that exist, each once however it is named.
#[derive(Clone, Debug, Default)]
pub(super) struct Files(Vec<(PathBuf, u64)>);

impl Files {
    /// Looks at these paths, in order. Links are followed; what is no regular
    /// file, or cannot be looked at, is left out.
    pub(super) fn look<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Self {
        let mut seen = BTreeSet::new();
        let mut files = Vec::new();
        for path in paths {
            let Ok(metadata) = fs::metadata(path) else {
                continue;
            };
            if metadata.is_file() && seen.insert((metadata.dev(), metadata.ino())) {
                files.push((path.clone(), metadata.len()));
            }
        }
        Self(files)
    }

    pub(super) fn each(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.0.iter().map(|(path, size)| (path.as_path(), *size))
    }

    pub(super) fn size(&self) -> Bytes {
        self.0.iter().map(|(_, size)| Bytes(*size)).sum()
    }
}
