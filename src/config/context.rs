//! What every check needs to know of the world, and of the defaults.

use std::path::{Path, PathBuf};

use super::env::Environment;
use super::section::Setting;

/// What the checks need to know of the world.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context<'a> {
    pub(super) working_dir: &'a Path,
    pub(super) environment: &'a Environment,
    /// Every file could be read; else what is missing may stand in the others.
    pub(super) is_whole: bool,
    /// Some file was named or found.
    pub(super) has_files: bool,
}

/// Takes a value that `configs/default.toml` sets, so that it is always there.
pub(super) fn given<T>(setting: Option<Setting<T>>) -> T {
    setting
        .expect("configs/default.toml sets every key that has a default")
        .value
}

/// Returns a path as seen from residentd's working directory.
pub(super) fn from_working_dir(context: &Context<'_>, path: &str) -> PathBuf {
    let path = path.strip_prefix("./").unwrap_or(path);
    context.working_dir.join(path)
}
