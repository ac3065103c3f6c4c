//! Opening what may be absent, held, read-only, full, newer or damaged.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tracing::{error, warn};

use super::{
    DECISIONS, FILE, FILES, FOOTPRINTS, Kept, LIMITS, META, RUNS, StoreError, WORKERS, workers,
};
use crate::model::WorkerRecord;
use crate::telemetry;

/// Held by the one residentd that uses the folder.
const LOCK: &str = "residentd.lock";
/// Holds the database's name once more.
const NAME_FILE: &str = "residentd.name";
/// Key of the database's name in [`META`].
const NAME: &str = "name";
/// Key of [`VERSION`] in [`META`].
const VERSION_KEY: &str = "version";
/// Grows when an older residentd would misread what a newer one writes.
const VERSION: u32 = 1;

/// Makes the folder and takes it for this process; given back when the file is
/// dropped, however this process ends.
pub(super) fn lock(folder: &Path) -> Result<File, StoreError> {
    std::fs::create_dir_all(folder).map_err(|error| of_folder(folder, error))?;
    let path = folder.join(LOCK);
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let file = opened.map_err(|error| of_folder(folder, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Held {
            path: folder.join(FILE),
        }),
        Err(TryLockError::Error(source)) => Err(StoreError::File { path, source }),
    }
}

/// Opens the database and reads it. A damaged one is set aside.
pub(super) fn open(folder: &Path) -> Result<(Database, Kept), StoreError> {
    let path = folder.join(FILE);
    let name_file = folder.join(NAME_FILE);
    let known = std::fs::read_to_string(&name_file).ok();
    let known = known.map(|text| text.trim().to_owned());
    let known = known.filter(|name| !name.is_empty());
    if known.is_some() && std::fs::metadata(&path).is_ok_and(|file| file.len() == 0) {
        warn!(path = %path.display(), "the state database is empty: learned footprints, limits and live workers are forgotten");
    }
    let (database, kept) = match attempt(&path, known.as_deref()) {
        Err(Failed::Damaged(why)) => {
            set_aside(&path, &why, known.is_some())?;
            attempt(&path, known.as_deref())
        }
        other => other,
    }
    .map_err(|failed| match failed {
        Failed::Damaged(why) => StoreError::File {
            path: path.clone(),
            source: io::Error::other(why),
        },
        Failed::Told(error) => error,
    })?;
    if known.as_deref() != Some(kept.name.as_str()) {
        std::fs::write(&name_file, format!("{}\n", kept.name))
            .map_err(|error| of_folder(folder, error))?;
    }
    Ok((database, kept))
}

/// Why one attempt did not work.
enum Failed {
    /// What is in the file makes no sense.
    Damaged(String),
    Told(StoreError),
}

fn attempt(path: &Path, name: Option<&str>) -> Result<(Database, Kept), Failed> {
    let opened = || -> Result<_, redb::Error> {
        let database = Database::create(path)?;
        let version = begin(&database, name)?;
        let kept = match version {
            Ok(()) => Ok(read(&database)?),
            Err(newer) => Err(newer),
        };
        Ok((database, kept))
    };
    // A library that trips over a damaged file must not take residentd along.
    let opened = catch_unwind(AssertUnwindSafe(opened))
        .map_err(|_| Failed::Damaged("reading it failed".into()))?;
    match opened {
        Ok((database, Ok(kept))) => Ok((database, kept)),
        Ok((_, Err(found))) => Err(Failed::Told(StoreError::Newer {
            path: path.to_owned(),
            found,
            known: VERSION,
        })),
        Err(error) if is_damage(&error) => {
            Err(Failed::Damaged(telemetry::chain(&error).to_string()))
        }
        Err(error) => Err(Failed::Told(failed(path, error))),
    }
}

/// Writes name and version where they are not. Returns the version when it is
/// a newer one's. It is also the first write: a full disk shows here.
fn begin(database: &Database, name: Option<&str>) -> Result<Result<(), String>, redb::Error> {
    let transaction = database.begin_write()?;
    let version = {
        let mut meta = transaction.open_table(META)?;
        let version = meta.get(VERSION_KEY)?.map(|text| text.value().to_owned());
        if version.is_none() {
            meta.insert(VERSION_KEY, VERSION.to_string().as_str())?;
        }
        if meta.get(NAME)?.is_none() {
            // A new one at each read; see `random(4)`.
            let new = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
            meta.insert(NAME, name.unwrap_or(new.trim()))?;
        }
        version
    };
    match version {
        Some(version) if version.parse().map_or(true, |found: u32| found > VERSION) => {
            transaction.abort()?;
            Ok(Err(version))
        }
        _ => {
            transaction.commit()?;
            Ok(Ok(()))
        }
    }
}

fn read(database: &Database) -> Result<Kept, redb::Error> {
    let name = database.begin_read()?.open_table(META)?.get(NAME)?;
    let mut decisions = Vec::new();
    for_each(database, DECISIONS, |id, text| {
        decisions.push((id, text.to_owned()));
    })?;
    let mut runs = BTreeMap::new();
    for_each(database, RUNS, |run, first| {
        runs.insert(run, first);
    })?;
    let mut files = BTreeMap::new();
    for_each(database, FILES, |key, paths| {
        files.insert(key.to_owned(), paths.to_owned());
    })?;
    Ok(Kept {
        decisions,
        runs,
        name: name.map(|name| name.value().to_owned()).unwrap_or_default(),
        footprints: read_all(database, FOOTPRINTS)?,
        files,
        limits: read_all(database, LIMITS)?,
        workers: read_workers(database)?,
    })
}

fn read_workers(database: &Database) -> Result<Vec<WorkerRecord>, redb::Error> {
    let mut all = Vec::new();
    for_each(database, WORKERS, |key, text| match workers::read(text) {
        Ok(record) => all.push(record),
        Err(why) => {
            let key = key.replace(super::SEPARATOR, "#");
            warn!(worker = key, error = %telemetry::chain(&why), "the record of a worker cannot be read: it is ended if it runs");
        }
    })?;
    Ok(all)
}

/// Reads all numbers of a table.
pub(super) fn read_all(
    database: &impl ReadableDatabase,
    table: TableDefinition<&str, u64>,
) -> Result<BTreeMap<String, u64>, redb::Error> {
    let mut all = BTreeMap::new();
    for_each(database, table, |key, number| {
        all.insert(key.to_owned(), number);
    })?;
    Ok(all)
}

/// Shows every entry of a table, if there is such a table.
fn for_each<K: redb::Key + 'static, V: redb::Value + 'static>(
    database: &impl ReadableDatabase,
    table: TableDefinition<K, V>,
    mut show: impl FnMut(K::SelfType<'_>, V::SelfType<'_>),
) -> Result<(), redb::Error> {
    let table = match database.begin_read()?.open_table(table) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
        other => other?,
    };
    for entry in table.iter()? {
        let (key, value) = entry?;
        show(key.value(), value.value());
    }
    Ok(())
}

/// Returns whether the file's content is to blame.
fn is_damage(error: &redb::Error) -> bool {
    match error {
        redb::Error::Corrupted(_) | redb::Error::TableTypeMismatch { .. } => true,
        redb::Error::Io(error) => matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        ),
        _ => false,
    }
}

fn set_aside(path: &Path, why: &str, named: bool) -> Result<(), StoreError> {
    let aside = free_name(path);
    std::fs::rename(path, &aside).map_err(|source| StoreError::File {
        path: path.to_owned(),
        source,
    })?;
    let workers = match named {
        true => "workers of this state folder that still run are ended",
        false => "workers that still run are not known any more: end them yourself",
    };
    error!(path = %path.display(), aside = %aside.display(), error = why, workers, "the state database is damaged and was set aside; learned footprints and persistent limits are forgotten");
    Ok(())
}

fn free_name(path: &Path) -> PathBuf {
    #[expect(
        clippy::disallowed_methods,
        reason = "a file's name, for people; nothing is decided by it"
    )]
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |since| since.as_secs());
    let name = |number: u64| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".damaged-{number}"));
        PathBuf::from(name)
    };
    let mut numbers = (seconds..).map(name);
    numbers
        .find(|name| !name.exists())
        .unwrap_or_else(|| name(seconds))
}

/// Says what to do about an error of the folder itself.
fn of_folder(folder: &Path, source: io::Error) -> StoreError {
    let path = folder.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            StoreError::Full { path, source }
        }
        _ => StoreError::NotWritable { path, source },
    }
}

/// Says what to do about an error of the database.
pub(super) fn failed(path: &Path, error: redb::Error) -> StoreError {
    let folder = path.parent().unwrap_or(path);
    match error {
        redb::Error::DatabaseAlreadyOpen => StoreError::Held {
            path: path.to_owned(),
        },
        redb::Error::Io(source)
            if matches!(
                source.kind(),
                io::ErrorKind::PermissionDenied
                    | io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::StorageFull
                    | io::ErrorKind::QuotaExceeded
            ) =>
        {
            of_folder(folder, source)
        }
        other => StoreError::Use {
            path: path.to_owned(),
            source: Box::new(other),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{Bytes, Domain, Footprint, ModelName, ModelSpec};
    use crate::store::Store;

    fn spec() -> std::sync::Arc<ModelSpec> {
        let name = ModelName::new("m").expect("a good name");
        std::sync::Arc::new(ModelSpec::plain(name, vec!["true".into()]))
    }

    /// Makes a state that remembers something, and returns its name.
    fn remember(folder: &Path) -> String {
        let spec = spec();
        let store = Store::open(folder, std::slice::from_ref(&spec)).expect("it can be opened");
        let footprint = Footprint {
            peak: Bytes::mib(5),
            settled: Bytes::mib(4),
        };
        store.learn(&spec.name, &[(Domain::Host, footprint)].into());
        store.flush();
        store.name().to_owned()
    }

    /// Opens when whoever had it open before is done: its thread ends after it.
    fn reopen(folder: &Path) -> Result<Store, StoreError> {
        let mut opened = Store::open(folder, &[spec()]);
        for _ in 0..20_000 {
            if !matches!(opened, Err(StoreError::Held { .. })) {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(1));
            opened = Store::open(folder, &[spec()]);
        }
        opened
    }

    fn set_aside_files(folder: &Path) -> usize {
        let files = std::fs::read_dir(folder).expect("it can be listed");
        let names = files.map(|file| file.expect("it is there").file_name());
        names
            .filter(|name| name.to_string_lossy().contains(".damaged-"))
            .count()
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_the_state_keeps_its_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let name = remember(folder.path());
        let path = folder.path().join(FILE);
        drop(reopen(folder.path()).expect("it is whole"));
        let whole = std::fs::read(&path).expect("it is there");
        assert!(whole.len() > 4096);
        let mut garbage = whole.clone();
        garbage[..512].fill(0xA5);
        let damaged: [&[u8]; 4] = [b"hello", &garbage, &whole[..whole.len() / 2], &whole[..100]];
        for (number, bytes) in damaged.into_iter().enumerate() {
            std::fs::write(&path, bytes).expect("written");
            let store = reopen(folder.path()).expect("it goes on with a new one");
            assert_eq!(store.name(), name);
            assert!(store.footprint(&spec().name).is_empty());
            assert_eq!(set_aside_files(folder.path()), number + 1);
            drop(store);
            drop(reopen(folder.path()).expect("the new one is whole"));
        }
    }

    #[test]
    fn flipped_bytes_are_noticed_or_harmless_and_never_end_the_process() {
        let folder = tempfile::tempdir().expect("a folder");
        remember(folder.path());
        let path = folder.path().join(FILE);
        drop(reopen(folder.path()).expect("it is whole"));
        let whole = std::fs::read(&path).expect("it is there");
        for page in (0..whole.len()).step_by(whole.len() / 24) {
            let mut flipped = whole.clone();
            let end = (page + 200).min(flipped.len());
            for byte in &mut flipped[page..end] {
                *byte ^= 0x5A;
            }
            std::fs::write(&path, flipped).expect("written");
            reopen(folder.path()).expect("it goes on");
        }
    }

    #[test]
    fn a_newer_residentds_file_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        remember(folder.path());
        let path = folder.path().join(FILE);
        drop(reopen(folder.path()).expect("it is whole"));
        let database = loop {
            match Database::open(&path) {
                Ok(database) => break database,
                Err(redb::DatabaseError::DatabaseAlreadyOpen) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        };
        let write = database.begin_write().expect("it can be written");
        {
            let mut meta = write.open_table(META).expect("it is there");
            meta.insert(VERSION_KEY, "2").expect("written");
        }
        write.commit().expect("written");
        drop(database);
        let error = reopen(folder.path()).expect_err("it is not ours to read");
        let text = error.to_string();
        assert!(
            text.contains("version 2") && text.contains("--state-dir"),
            "{text}"
        );
        assert_eq!(set_aside_files(folder.path()), 0);
    }

    #[test]
    fn a_folder_that_is_a_file_or_held_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "x").expect("written");
        let error = Store::open(&file, &[]).expect_err("it is no folder");
        assert!(matches!(error, StoreError::NotWritable { .. }), "{error:?}");
        assert!(error.to_string().contains("server.state_dir"), "{error}");
        let _first = Store::open(folder.path(), &[]).expect("it is free");
        let error = Store::open(folder.path(), &[]).expect_err("it is held");
        assert!(matches!(error, StoreError::Held { .. }), "{error:?}");
    }
}
