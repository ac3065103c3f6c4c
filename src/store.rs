//! What is kept over restarts: learned footprints and persistent limits, in
//! one embedded database.
//!
//! The disk is read at start only. Writes go to a thread of their own, since a commit
//! waits for the disk and the controller may not. A write that fails is logged
//! and costs only what would have been remembered.

mod files;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as std_mpsc};
use std::time::Duration;

use redb::{Database, ReadOnlyDatabase, ReadableDatabase, ReadableTable, TableDefinition};
use tracing::warn;

use crate::model::{Bytes, Domain, Footprint, ModelName, ModelSpec};
use crate::telemetry;

/// Peak bytes by `model ␟ fingerprint ␟ domain`, and settled bytes by the same
/// with [`SETTLED`] behind.
const FOOTPRINTS: TableDefinition<&str, u64> = TableDefinition::new("footprints_v1");
/// Milliseconds of the last load by `model ␟ fingerprint ␟`.
const LOADS: TableDefinition<&str, u64> = TableDefinition::new("loads_v1");
/// Limits in bytes by domain.
const LIMITS: TableDefinition<&str, u64> = TableDefinition::new("limits_v1");
/// Facts about the database itself.
const META: TableDefinition<&str, &str> = TableDefinition::new("meta_v1");
/// Key of [`Store::name`] in [`META`].
const NAME: &str = "name";
/// Between the parts of a key; no name holds it.
const SEPARATOR: char = '\u{1f}';
/// Ends the key of what the last life held.
const SETTLED: &str = " settled";
/// Writes waiting for the disk at most; one more is dropped with a warning.
const WRITE_QUEUE: usize = 1024;

/// Why the database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder could not be made.
    #[error("create the state folder {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another residentd has the file open.
    #[error(
        "open the state database {path}: another residentd uses it; give each its own server.state_dir"
    )]
    Held {
        /// Which.
        path: PathBuf,
    },
    /// The file could not be opened: damaged, or of a newer version.
    #[error("open the state database {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<redb::DatabaseError>,
    },
    /// It could not be read, or nothing can be written to it.
    #[error("use the state database {path}")]
    Use {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
}

impl StoreError {
    fn opening(path: &Path, source: redb::DatabaseError) -> Self {
        let path = path.to_owned();
        match source {
            redb::DatabaseError::DatabaseAlreadyOpen => Self::Held { path },
            source => Self::Open {
                path,
                source: Box::new(source),
            },
        }
    }
}

/// The database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    known: Arc<Mutex<Known>>,
    limits: Arc<BTreeMap<String, u64>>,
    name: Arc<str>,
    writer: std_mpsc::SyncSender<Write>,
}

/// What is kept of models, as it is on the disk or about to be.
#[derive(Debug)]
struct Known {
    footprints: BTreeMap<String, u64>,
    files: BTreeMap<String, String>,
    fingerprints: Fingerprints,
}

/// What tells whether a model is still the one of which something was learned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprints(BTreeMap<ModelName, String>);

impl Fingerprints {
    /// Takes those of these models, for which it looks at their weight files.
    #[must_use]
    pub fn of(models: &[Arc<ModelSpec>]) -> Self {
        let each = models.iter();
        Self(each.map(|m| (m.name.clone(), fingerprint(m))).collect())
    }
}

enum Write {
    /// All that is kept of a model, whose keys begin with its name.
    Footprint {
        model: String,
        entries: BTreeMap<String, u64>,
    },
    Limit {
        key: String,
        bytes: u64,
    },
    /// How long the last load of a model took.
    Load {
        model: String,
        key: String,
        millis: u64,
    },
    Files(files::Entry),
    /// Tells when all that was sent before is on the disk.
    Flush(std_mpsc::Sender<()>),
}

/// What is known of one model from its past lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    /// What its lives used, by domain.
    pub footprint: BTreeMap<Domain, Footprint>,
    /// How long its last load took.
    pub load: Option<Duration>,
}

/// How long an end waits for the disk.
const FLUSH: Duration = Duration::from_secs(5);

impl Store {
    /// Opens `folder/residentd.redb`, making both when absent.
    ///
    /// # Errors
    /// When the folder cannot be made or the file cannot be opened or read.
    pub fn open(folder: &Path, models: &[Arc<ModelSpec>]) -> Result<Self, StoreError> {
        std::fs::create_dir_all(folder).map_err(|source| StoreError::Folder {
            path: folder.to_owned(),
            source,
        })?;
        let path = folder.join("residentd.redb");
        let database =
            Database::create(&path).map_err(|source| StoreError::opening(&path, source))?;
        let failed = |source| StoreError::Use {
            path: path.clone(),
            source: Box::new(source),
        };
        let footprints = read_all(&database, FOOTPRINTS).map_err(failed)?;
        let limits = read_all(&database, LIMITS).map_err(failed)?;
        let files = files::read(&database).map_err(failed)?;
        let name = name(&database).map_err(failed)?;
        let (writer, writes) = std_mpsc::sync_channel(WRITE_QUEUE);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || write_all(&database, &writes))
            .map_err(|source| StoreError::Folder {
                path: path.clone(),
                source,
            })?;
        Ok(Self {
            known: Arc::new(Mutex::new(Known {
                footprints,
                files,
                fingerprints: Fingerprints::of(models),
            })),
            limits: Arc::new(limits),
            name: name.into(),
            writer,
        })
    }

    /// Reads what is known of each model and writes nothing, unless the database
    /// was not closed and has to be mended; nothing is known where there is none.
    ///
    /// # Errors
    /// When a residentd has it open, or it cannot be read.
    pub fn peek(
        folder: &Path,
        models: &[Arc<ModelSpec>],
    ) -> Result<BTreeMap<ModelName, Learned>, StoreError> {
        let path = folder.join("residentd.redb");
        if !path.exists() {
            return Ok(BTreeMap::new());
        }
        let opened = ReadOnlyDatabase::open(&path).or_else(|error| match error {
            // It was not closed the last time, which opening it to write mends.
            redb::DatabaseError::RepairAborted => {
                drop(Database::open(&path)?);
                ReadOnlyDatabase::open(&path)
            }
            other => Err(other),
        });
        let database = opened.map_err(|source| StoreError::opening(&path, source))?;
        let failed = |source| StoreError::Use {
            path: path.clone(),
            source: Box::new(source),
        };
        let footprints = read_all(&database, FOOTPRINTS).map_err(failed)?;
        let loads = read_all(&database, LOADS).map_err(failed)?;
        let learned = |spec: &Arc<ModelSpec>| {
            let prefix = prefix(&spec.name, &fingerprint(spec));
            let learned = Learned {
                footprint: footprint(&footprints, &prefix),
                load: loads.get(&prefix).copied().map(Duration::from_millis),
            };
            (spec.name.clone(), learned)
        };
        Ok(models.iter().map(learned).collect())
    }

    /// Returns the name that the database was given when it was made: no other
    /// has it, and only one residentd at a time can have this one open.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns what past lives of this model used, as long as its command and
    /// weight files are what they were.
    #[must_use]
    pub fn footprint(&self, model: &ModelName) -> BTreeMap<Domain, Footprint> {
        let known = self.known();
        known.prefix(model).map_or_else(BTreeMap::new, |prefix| {
            footprint(&known.footprints, &prefix)
        })
    }

    /// Returns the same as it will be once `fingerprints` hold.
    #[must_use]
    pub fn footprint_under(
        &self,
        fingerprints: &Fingerprints,
        model: &ModelName,
    ) -> BTreeMap<Domain, Footprint> {
        let fingerprint = fingerprints.0.get(model);
        fingerprint.map_or_else(BTreeMap::new, |fingerprint| {
            footprint(&self.known().footprints, &prefix(model, fingerprint))
        })
    }

    /// Has `fingerprints` hold from now on: models were added or changed.
    pub fn now_of(&self, fingerprints: Fingerprints) {
        self.known().fingerprints = fingerprints;
    }

    /// Returns the limit that an operator set to persist.
    #[must_use]
    pub fn limit(&self, domain: Domain) -> Option<Bytes> {
        self.limits.get(&domain.to_string()).copied().map(Bytes)
    }

    /// Returns the limits on GPUs that an operator set to persist.
    pub fn gpu_limits(&self) -> impl Iterator<Item = (u32, Bytes)> {
        self.limits
            .iter()
            .filter_map(|(key, limit)| match parse_domain(key)? {
                Domain::Gpu(index) => Some((index, Bytes(*limit))),
                Domain::Host => None,
            })
    }

    /// Keeps what a model's lives used; what was kept under another command or
    /// other weight files is forgotten.
    pub fn learn(&self, model: &ModelName, footprint: &BTreeMap<Domain, Footprint>) {
        let mut known = self.known();
        let Some(prefix) = known.prefix(model) else {
            return;
        };
        let entries = footprint.iter().flat_map(|(domain, footprint)| {
            [
                (format!("{prefix}{domain}"), footprint.peak.get()),
                (
                    format!("{prefix}{domain}{SETTLED}"),
                    footprint.settled.get(),
                ),
            ]
        });
        let model = format!("{model}{SEPARATOR}");
        let entries: BTreeMap<_, _> = entries.collect();
        known.footprints.retain(|key, _| !key.starts_with(&model));
        known.footprints.extend(entries.clone());
        drop(known);
        self.write(Write::Footprint { model, entries });
    }

    /// Keeps how long a load took.
    pub fn loaded(&self, model: &ModelName, took: Duration) {
        let Some(key) = self.known().prefix(model) else {
            return;
        };
        self.write(Write::Load {
            model: format!("{model}{SEPARATOR}"),
            key,
            millis: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        });
    }

    /// Keeps a limit.
    pub fn keep_limit(&self, domain: Domain, limit: Bytes) {
        self.write(Write::Limit {
            key: domain.to_string(),
            bytes: limit.get(),
        });
    }

    /// Waits until everything is written, or some seconds have passed. Blocks.
    pub fn flush(&self) {
        let (written, wait) = std_mpsc::channel();
        // A full queue is waited for: this is the end.
        if self.writer.send(Write::Flush(written)).is_err() || wait.recv_timeout(FLUSH).is_err() {
            warn!("the state database did not write everything in time");
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Plain maps are as good as they were, whoever panicked.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, write: Write) {
        if self.writer.try_send(write).is_err() {
            warn!("the state database does not keep up; a write is dropped");
        }
    }
}

impl Known {
    fn prefix(&self, model: &ModelName) -> Option<String> {
        Some(prefix(model, self.fingerprints.0.get(model)?))
    }
}

fn prefix(model: &ModelName, fingerprint: &str) -> String {
    format!("{model}{SEPARATOR}{fingerprint}{SEPARATOR}")
}

/// Reads one model's footprint out of all.
fn footprint(all: &BTreeMap<String, u64>, prefix: &str) -> BTreeMap<Domain, Footprint> {
    let mut found = BTreeMap::<Domain, Footprint>::new();
    let of_this = all.range(prefix.to_owned()..);
    for (key, bytes) in of_this.take_while(|(key, _)| key.starts_with(prefix)) {
        let key = &key[prefix.len()..];
        let (domain, is_settled) = match key.strip_suffix(SETTLED) {
            Some(domain) => (domain, true),
            None => (key, false),
        };
        let Some(domain) = parse_domain(domain) else {
            continue;
        };
        let footprint = found.entry(domain).or_default();
        match is_settled {
            true => footprint.settled = Bytes(*bytes),
            false => footprint.peak = Bytes(*bytes),
        }
    }
    found
}

fn parse_domain(text: &str) -> Option<Domain> {
    match text.strip_prefix("gpu:") {
        Some(index) => index.parse().ok().map(Domain::Gpu),
        None => (text == "host").then_some(Domain::Host),
    }
}

/// Changes when the command or a weight file changes (path, size, time of the
/// last write). FNV-1a, so that it is the same in every build.
fn fingerprint(spec: &ModelSpec) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut feed = |bytes: &[u8]| {
        for byte in bytes.iter().chain(&[0]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for part in spec.command.iter().chain(spec.cwd.as_ref()) {
        feed(part.as_bytes());
    }
    for (name, value) in &spec.env {
        feed(name.as_bytes());
        feed(value.as_bytes());
    }
    for path in &spec.weights {
        feed(path.as_os_str().as_encoded_bytes());
        if let Ok(metadata) = std::fs::metadata(path) {
            feed(&metadata.len().to_le_bytes());
            let modified = metadata.modified().ok();
            let age = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            feed(&age.map_or(0, |age| age.as_nanos()).to_le_bytes());
        }
    }
    format!("{hash:016x}")
}

fn read_all(
    database: &impl ReadableDatabase,
    table: TableDefinition<&str, u64>,
) -> Result<BTreeMap<String, u64>, redb::Error> {
    let read = database.begin_read()?;
    let table = match read.open_table(table) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeMap::new()),
        other => other?,
    };
    let mut all = BTreeMap::new();
    for entry in table.iter()? {
        let (key, value) = entry?;
        all.insert(key.value().to_owned(), value.value());
    }
    Ok(all)
}

/// Reads the database's name, giving it one at first.
fn name(database: &Database) -> Result<String, redb::Error> {
    let transaction = database.begin_write()?;
    let name = {
        let mut meta = transaction.open_table(META)?;
        let kept = meta.get(NAME)?.map(|name| name.value().to_owned());
        match kept {
            Some(name) => name,
            None => {
                // A new one at each read; see `random(4)`.
                let name = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
                meta.insert(NAME, name.trim())?;
                name.trim().to_owned()
            }
        }
    };
    transaction.commit()?;
    Ok(name)
}

/// Ends when the last [`Store`] is gone; what was sent before is written.
fn write_all(database: &Database, writes: &std_mpsc::Receiver<Write>) {
    while let Ok(first) = writes.recv() {
        let batch: Vec<Write> = std::iter::once(first).chain(writes.try_iter()).collect();
        if let Err(error) = commit(database, &batch) {
            warn!(error = %telemetry::chain(&error), "writing the state database failed");
        }
        for write in batch {
            if let Write::Flush(written) = write {
                // Whoever waited has waited long enough.
                let _ = written.send(());
            }
        }
    }
}

fn commit(database: &Database, batch: &[Write]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut footprints = transaction.open_table(FOOTPRINTS)?;
        let mut limits = transaction.open_table(LIMITS)?;
        let mut loads = transaction.open_table(LOADS)?;
        for write in batch {
            match write {
                Write::Footprint { model, entries } => {
                    footprints.retain(|key, _| !key.starts_with(model.as_str()))?;
                    for (key, bytes) in entries {
                        footprints.insert(key.as_str(), bytes)?;
                    }
                }
                Write::Limit { key, bytes } => {
                    limits.insert(key.as_str(), bytes)?;
                }
                Write::Load { model, key, millis } => {
                    loads.retain(|key, _| !key.starts_with(model.as_str()))?;
                    loads.insert(key.as_str(), millis)?;
                }
                Write::Files(entry) => files::write(&transaction, entry)?,
                Write::Flush(_) => {}
            }
        }
    }
    transaction.commit()?;
    Ok(())
}
