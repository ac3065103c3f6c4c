//! What is kept over restarts: learned footprints, files of past lives, live
//! workers, decisions and persistent limits, in one embedded database.
//!
//! The disk is read at start only. Writes go to a thread of their own, since a commit
//! waits for the disk and the controller may not. A write that fails is kept
//! and tried again; [`Store::trouble`] says so meanwhile.
//!
//! Beside the database lie two small files: `residentd.lock`, held by the one
//! residentd that uses the folder, and `residentd.name`, the name that marks
//! workers as ours, so that they are known even when the database is damaged.

mod files;
mod handover;
mod open;
mod scribe;
mod workers;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redb::{Database, ReadOnlyDatabase, TableDefinition};
use tokio::sync::oneshot;
use tracing::warn;
use writer::{Key, Value, Writer};

use crate::model::{
    Bytes, Domain, Fingerprint, Footprint, ModelName, ModelSpec, WorkerId, WorkerRecord,
};

/// Peak bytes by `model ␟ fingerprint ␟ domain`, and settled bytes by the same
/// with [`SETTLED`] behind.
const FOOTPRINTS: TableDefinition<&str, u64> = TableDefinition::new("footprints_v1");
/// Milliseconds of the last load by `model ␟ fingerprint ␟`.
const LOADS: TableDefinition<&str, u64> = TableDefinition::new("loads_v1");
/// Files of the last life by `model ␟ fingerprint ␟`: paths, each ended by a
/// NUL, which no path holds.
const FILES: TableDefinition<&str, &str> = TableDefinition::new("files_v1");
/// Limits in bytes by domain.
const LIMITS: TableDefinition<&str, u64> = TableDefinition::new("limits_v1");
/// Live workers as JSON by `model ␟ generation`.
const WORKERS: TableDefinition<&str, &str> = TableDefinition::new("workers_v1");
/// Decisions as JSON by number.
const DECISIONS: TableDefinition<u64, &str> = TableDefinition::new("decisions_v1");
/// First decisions by run.
const RUNS: TableDefinition<u64, u64> = TableDefinition::new("runs_v1");
/// Facts about the database itself.
const META: TableDefinition<&str, &str> = TableDefinition::new("meta_v1");
/// The database's file.
const FILE: &str = "residentd.redb";
/// Between the parts of a key; no name holds it.
const SEPARATOR: char = '\u{1f}';
/// Ends the key of what the last life held.
const SETTLED: &str = " settled";
/// What to do about a folder that cannot be written to.
const WRITABLE: &str = "make it writable for the user that residentd runs as, or name another with --state-dir or server.state_dir";

/// Why the database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder is not there and could not be made, or may not be written to.
    #[error("write to the state folder {path}: {WRITABLE}")]
    NotWritable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is no space left.
    #[error(
        "write to the state folder {path}: its disk is full; free a few MiB, or name another folder with --state-dir or server.state_dir"
    )]
    Full {
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
    /// A newer residentd has written it.
    #[error(
        "read the state database {path}: a newer residentd has written it (version {found}, this one knows {known}); start that one, or name another folder with --state-dir or server.state_dir"
    )]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: String,
        /// Ours.
        known: u32,
    },
    /// It could not be opened, read or written.
    #[error("use the state database {path}")]
    Use {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// A file beside it could not be used.
    #[error("use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    kept: Arc<Kept>,
    known: Arc<Mutex<Known>>,
    writer: Arc<Writer>,
    /// Held as long as somebody may write.
    lock: Arc<File>,
}

/// What was in the database when it was opened.
#[derive(Debug, Default)]
struct Kept {
    name: String,
    footprints: BTreeMap<String, u64>,
    files: BTreeMap<String, String>,
    limits: BTreeMap<String, u64>,
    workers: Vec<WorkerRecord>,
    decisions: Vec<(u64, String)>,
    runs: BTreeMap<u64, u64>,
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

/// What is known of one model from its past lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    /// What its lives used, by domain.
    pub footprint: BTreeMap<Domain, Footprint>,
    /// How long its last load took.
    pub load: Option<Duration>,
}

/// Tells when what was kept is on the disk.
#[derive(Debug)]
pub struct Written(oneshot::Receiver<Result<(), Arc<str>>>);

impl Written {
    /// Waits until it is there.
    ///
    /// # Errors
    /// Why it could not be written now, or that it takes some seconds.
    pub async fn wait(self) -> Result<(), Arc<str>> {
        match tokio::time::timeout(FLUSH, self.0).await {
            Ok(Ok(done)) => done,
            Ok(Err(_)) => Err("residentd ends".into()),
            Err(_) => Err("the disk does not answer".into()),
        }
    }
}

/// How long an end waits for the disk.
const FLUSH: Duration = Duration::from_secs(5);

impl Store {
    /// Opens `folder/residentd.redb`, making both when absent. A damaged file is
    /// set aside and begun anew.
    ///
    /// # Errors
    /// When the folder cannot be written to, another residentd uses it, or a
    /// newer one has written the file.
    pub fn open(folder: &Path, models: &[Arc<ModelSpec>]) -> Result<Self, StoreError> {
        let lock = open::lock(folder)?;
        let path = folder.join(FILE);
        let (database, mut kept) = open::open(folder)?;
        let writer = Writer::start(path.clone(), database)
            .map_err(|source| StoreError::File { path, source })?;
        Ok(Self {
            known: Arc::new(Mutex::new(Known {
                footprints: std::mem::take(&mut kept.footprints),
                files: std::mem::take(&mut kept.files),
                fingerprints: Fingerprints::of(models),
            })),
            kept: Arc::new(kept),
            writer: Arc::new(writer),
            lock: Arc::new(lock),
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
        let path = folder.join(FILE);
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
        let database = opened.map_err(|source| open::failed(&path, source.into()))?;
        let failed = |source| open::failed(&path, source);
        let footprints = open::read_all(&database, FOOTPRINTS).map_err(failed)?;
        let loads = open::read_all(&database, LOADS).map_err(failed)?;
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
        &self.kept.name
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
        self.kept
            .limits
            .get(&domain.to_string())
            .copied()
            .map(Bytes)
    }

    /// Returns the limits on GPUs that an operator set to persist.
    pub fn gpu_limits(&self) -> impl Iterator<Item = (u32, Bytes)> {
        self.kept
            .limits
            .iter()
            .filter_map(|(key, limit)| match key.parse().ok()? {
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
        let (key, value) = (Key::Footprint(model), Value::Numbers(entries));
        self.writer.desk().keep(key, value);
    }

    /// Keeps how long a load took.
    pub fn loaded(&self, model: &ModelName, took: Duration) {
        let Some(key) = self.known().prefix(model) else {
            return;
        };
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.writer.desk().keep(
            Key::Load(format!("{model}{SEPARATOR}")),
            Value::Numbers([(key, millis)].into()),
        );
    }

    /// Keeps a limit.
    pub fn keep_limit(&self, domain: Domain, limit: Bytes) {
        let numbers = [(domain.to_string(), limit.get())].into();
        self.writer
            .desk()
            .keep(Key::Limit(domain), Value::Numbers(numbers));
    }

    /// Returns the workers that ran when the residentd before this one ended, as
    /// far as it could write.
    #[must_use]
    pub fn workers(&self) -> &[WorkerRecord] {
        &self.kept.workers
    }

    /// Keeps a live worker, so that a later residentd can take it back.
    pub fn keep_worker(&self, record: &WorkerRecord) {
        let text = workers::write(record);
        self.writer
            .desk()
            .keep(worker_key(&record.worker), Value::Text(text));
    }

    /// Forgets a worker that is gone.
    pub fn forget_worker(&self, worker: &WorkerId) {
        self.writer.desk().keep(worker_key(worker), Value::Nothing);
    }

    /// Returns the newest decisions of earlier runs, as they were written, by
    /// number.
    #[must_use]
    pub fn decisions(&self) -> &[(u64, String)] {
        &self.kept.decisions
    }

    /// Returns the number of the first decision of each of the last runs.
    #[must_use]
    pub fn runs(&self) -> &BTreeMap<u64, u64> {
        &self.kept.runs
    }

    /// Keeps decisions, and forgets the oldest when there are too many.
    pub fn keep_decisions(&self, decisions: impl Iterator<Item = (u64, String)>) {
        self.writer.desk().keep_decisions(decisions);
    }

    /// Keeps with which decision a run begins.
    pub fn keep_run(&self, run: u64, first: u64) {
        self.writer.desk().keep(Key::Run(run), Value::Number(first));
    }

    /// Returns what a worker of this model that is started now is started from,
    /// as far as files tell: changes with its command and weight files.
    #[must_use]
    pub fn fingerprint(&self, model: &ModelName) -> Option<String> {
        self.known().fingerprints.0.get(model).cloned()
    }

    /// Returns why what happens is not written down now; `None` when it is.
    #[must_use]
    pub fn trouble(&self) -> Option<Arc<str>> {
        self.writer.desk().trouble()
    }

    /// Returns what tells when everything that was kept so far is on the disk.
    #[must_use]
    pub fn written(&self) -> Written {
        Written(self.writer.desk().witness())
    }

    /// Waits until everything is written, or some seconds have passed. Blocks.
    pub fn flush(&self) {
        if !self.writer.desk().flush(FLUSH) {
            warn!("the state database did not write everything in time");
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Plain maps are as good as they were, whoever panicked.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn worker_key(worker: &WorkerId) -> Key {
    Key::Worker(format!("{}{SEPARATOR}{}", worker.model, worker.generation))
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
        let Ok(domain) = domain.parse() else {
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

/// Changes when the command or a weight file changes (path, size, time of the
/// last write).
fn fingerprint(spec: &ModelSpec) -> String {
    let mut print = Fingerprint::default();
    for part in spec.command.iter().chain(spec.cwd.as_ref()) {
        print.feed(part.as_bytes());
    }
    for (name, value) in &spec.env {
        print.feed(name.as_bytes());
        print.feed(value.as_bytes());
    }
    for path in &spec.weights {
        print.feed(path.as_os_str().as_encoded_bytes());
        if let Ok(metadata) = std::fs::metadata(path) {
            print.feed(&metadata.len().to_le_bytes());
            let modified = metadata.modified().ok();
            let age = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            print.feed(&age.map_or(0, |age| age.as_nanos()).to_le_bytes());
        }
    }
    print.to_string()
}
