//! Finds and reads the configuration files.

use std::io;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::env::{CONFIG_VARIABLE, Environment, Sources};
use super::problem::{Origin, Place, Problems};
use super::raw::RawConfig;
use super::section::{Lines, Text};

/// Every default, as a user would write it. What the binary assumes and what
/// the file shows cannot differ: this is where the binary takes it from.
pub const DEFAULTS: &str = include_str!("../../configs/default.toml");

const MISNAMED: &str = "name a file or folder that residentd may read";

/// Read when nobody names a file.
const FALLBACK: &str = "residentd.toml";

/// Parses the defaults within the binary.
pub(super) fn built_in(problems: &mut Problems) -> RawConfig {
    let (table, errors) = DeTable::parse_recoverable(DEFAULTS);
    debug_assert!(errors.is_empty(), "configs/default.toml: {errors:?}");
    RawConfig::read(table.get_ref(), &Text::BuiltIn, problems)
}

/// What the files say.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) merged: RawConfig,
    /// All could be read and parsed; else what is missing may be in the others.
    pub(super) is_whole: bool,
    pub(super) count: usize,
}

/// Reads every file, each laid over those before it.
pub(super) fn read(sources: &Sources, environment: &Environment, problems: &mut Problems) -> Files {
    let (paths, mut is_whole) = find(sources, environment, problems);
    let mut merged = RawConfig::default();
    for (index, path) in paths.iter().enumerate() {
        match read_file(index, path, &sources.working_dir, problems) {
            Some(raw) => merged = raw.over(merged, problems),
            None => is_whole = false,
        }
    }
    Files {
        merged,
        is_whole,
        count: paths.len(),
    }
}

fn read_file(
    index: usize,
    path: &Path,
    working_dir: &Path,
    problems: &mut Problems,
) -> Option<RawConfig> {
    let name = path.display().to_string();
    let place = whole(index, &name);
    let bytes = match std::fs::read(working_dir.join(path)) {
        Ok(bytes) => bytes,
        Err(error) => {
            problems.error(&place, unreadable(&error), MISNAMED);
            return None;
        }
    };
    let Ok(text) = String::from_utf8(bytes) else {
        problems.error(&place, "is not UTF-8 text", "save it as UTF-8");
        return None;
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines = Lines::new(index, &name, text);
    let (table, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        let text = Text::File(lines);
        return Some(RawConfig::read(table.get_ref(), &text, problems));
    }
    let offsets = errors.iter().map(|e| e.span().map_or(0, |span| span.start));
    let mut told: Vec<_> = offsets.zip(&errors).collect();
    told.sort_by_key(|(offset, _)| *offset);
    // After the first error of a line the parser only guesses.
    told.dedup_by_key(|(offset, _)| lines.at(*offset).0);
    for (offset, error) in told {
        let (line, start) = lines.at(offset);
        let before = text.get(start..offset).unwrap_or_default();
        let place = Place {
            key: format!("{name}:{line}:{}", before.chars().count() + 1),
            ..place.clone()
        };
        let message = error.message().replace('\n', ", ");
        problems.error(&place, format!("is not TOML: {message}"), "");
    }
    None
}

/// The place of a problem with a file or folder itself.
fn whole(index: usize, name: &str) -> Place {
    Place {
        key: name.to_owned(),
        origin: Origin::File {
            index,
            name: name.into(),
            line: 0,
        },
    }
}

/// Returns the files to read, in order, and whether every place named could
/// be looked at.
fn find(
    sources: &Sources,
    environment: &Environment,
    problems: &mut Problems,
) -> (Vec<PathBuf>, bool) {
    let mut named = named(sources, environment);
    let by_nobody = sources.paths.is_empty() && !environment.contains_key(CONFIG_VARIABLE);
    // Nobody has to have the one that nobody named.
    named.retain(|path| !by_nobody || sources.working_dir.join(path).exists());
    let mut files = Vec::new();
    let mut found_all = true;
    for path in named {
        if !sources.working_dir.join(&path).is_dir() {
            files.push(path);
            continue;
        }
        let index = files.len();
        let place = whole(index, &path.display().to_string());
        match files_within(&sources.working_dir, &path) {
            Ok(found) if found.is_empty() => {
                problems.error(&place, "holds no *.toml file", "name a file, or add one");
                found_all = false;
            }
            Ok(found) => files.extend(found),
            Err(error) => {
                problems.error(&place, unreadable(&error), MISNAMED);
                found_all = false;
            }
        }
    }
    (files, found_all)
}

/// Returns every file and folder that the configuration is read from, with those
/// of tokens, certificate and key, whether it is there or not, as absolute paths.
#[must_use]
pub fn places(sources: &Sources) -> Vec<PathBuf> {
    // What is wrong with them is told by whoever reads them.
    let mut ignored = Problems::default();
    let mut environment = super::env::read_dotenv(&sources.working_dir, &mut ignored);
    environment.extend(sources.environment.clone());
    let (files, _) = find(sources, &environment, &mut ignored);
    let named = named(sources, &environment);
    let fixed = [PathBuf::from(".env")];
    let theirs = read(sources, &environment, &mut ignored).merged;
    let theirs = theirs.auth.files().chain(theirs.tls.files()).cloned();
    let theirs: Vec<PathBuf> = theirs.collect();
    let by_variable = super::env::token_files(&environment);
    let all = fixed.into_iter().chain(named).chain(files);
    let all = all.chain(theirs).chain(by_variable);
    all.map(|path| sources.working_dir.join(path)).collect()
}

/// Returns the files and folders that somebody named, or the one that is looked
/// for when nobody did.
fn named(sources: &Sources, environment: &Environment) -> Vec<PathBuf> {
    match environment.get(CONFIG_VARIABLE) {
        _ if !sources.paths.is_empty() => sources.paths.clone(),
        Some(paths) => std::env::split_paths(paths).collect(),
        None => vec![PathBuf::from(FALLBACK)],
    }
}

/// Returns the `*.toml` of a folder in name order, less hidden ones, such as
/// an editor's lock files.
fn files_within(working_dir: &Path, folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(working_dir.join(folder))? {
        let name = entry?.file_name();
        let path = folder.join(&name);
        let is_hidden = name.to_string_lossy().starts_with('.');
        let is_toml = path
            .extension()
            .is_some_and(|extension| extension == "toml");
        if is_toml && !is_hidden && working_dir.join(&path).is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Says why a file cannot be read, without the error's number.
pub(super) fn unreadable(error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::NotFound => "no such file or folder".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    };
    format!("cannot be read: {why}")
}
