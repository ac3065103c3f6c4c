//! The thread that writes.
//!
//! What is to be written lies on a desk, by key: a newer value of the same key
//! takes the older one's place, so that a disk that is slow or full costs no
//! more memory than there is to remember. The thread takes what lies there into
//! one transaction. What could not be written stays and is tried again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redb::Database;
use tokio::sync::oneshot;
use tracing::{error, info};

use super::scribe::{DECISIONS_KEPT, Scribe};
use crate::clock::{Clock, Timestamp};
use crate::model::Domain;
use crate::telemetry;

/// Between two tries while writing fails.
const RETRY: Duration = Duration::from_secs(5);

/// What is written under one key replaces what was there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// All footprints of the model whose keys begin so.
    Footprint(String),
    /// The last load's time of the model whose keys begin so.
    Load(String),
    /// The files of the model whose keys begin so.
    Files(String),
    /// A limit.
    Limit(Domain),
    /// A live worker.
    Worker(String),
    /// A decision, by its number.
    Decision(u64),
    /// The first decision of the run with this number.
    Run(u64),
}

/// What is to be there from now on.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Numbers(BTreeMap<String, u64>),
    Texts(BTreeMap<String, String>),
    Number(u64),
    Text(String),
    Nothing,
}

pub(super) type Pending = BTreeMap<Key, Value>;

/// The thread's desk. It ends when this is dropped, and what lies there then is
/// written before.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    desk: Arc<Desk>,
}

/// Where everybody puts what is to be written.
#[derive(Debug, Default)]
pub(super) struct Desk {
    papers: Mutex<Papers>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Papers {
    pending: Pending,
    /// The thread has some of it in hand.
    writing: bool,
    /// Somebody waits: the next try is now.
    hurry: bool,
    closed: bool,
    thread: Thread,
    trouble: Option<Arc<str>>,
    /// Who wants to know when all of it is written.
    witnesses: Vec<Witness>,
}

/// Whether somebody works at the desk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Thread {
    #[default]
    Works,
    /// It saw that the desk is closed, and closes the file.
    Leaves,
    Gone,
}

/// Is told that a write is done, or why it failed.
type Witness = oneshot::Sender<Result<(), Arc<str>>>;

impl Writer {
    /// Starts the thread.
    pub(super) fn start(path: PathBuf, database: Database) -> std::io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let writer = Self { path, desk };
        writer.work(Some(database))?;
        Ok(writer)
    }

    fn work(&self, database: Option<Database>) -> std::io::Result<()> {
        let (desk, path) = (Arc::clone(&self.desk), self.path.clone());
        let thread = std::thread::Builder::new().name("store".into());
        thread.spawn(move || {
            let open = || Database::create(&path);
            let mut scribe = Scribe { database, open };
            desk.work(|pending| scribe.write(pending));
            // The file is closed before it is told.
            drop(scribe);
            desk.lock().thread = Thread::Gone;
            desk.changed.notify_all();
        })?;
        Ok(())
    }

    /// Writes what lies there and closes the file, so that another process can
    /// open it. What is put there from now on lies there.
    ///
    /// # Errors
    /// Why not everything is written, or that it takes longer than `patience`.
    /// [`Writer::resume`] has to follow then too.
    pub(super) fn pause(&self, patience: Duration) -> Result<(), Arc<str>> {
        let mut papers = self.desk.lock();
        papers.closed = true;
        papers.hurry = true;
        self.desk.changed.notify_all();
        let works = |papers: &mut Papers| papers.thread != Thread::Gone;
        let waited = (self.desk.changed).wait_timeout_while(papers, patience, works);
        let (papers, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        match (&papers.trouble, waited.timed_out()) {
            (_, true) => Err("the disk does not answer".into()),
            (Some(why), false) if !papers.pending.is_empty() => Err(Arc::clone(why)),
            _ => Ok(()),
        }
    }

    /// Opens the file again and writes what was put there since.
    pub(super) fn resume(&self) -> std::io::Result<()> {
        {
            let mut papers = self.desk.lock();
            papers.closed = false;
            self.desk.changed.notify_all();
            if papers.thread == Thread::Works {
                return Ok(());
            }
            let leaves = |papers: &mut Papers| papers.thread == Thread::Leaves;
            let waited = self.desk.changed.wait_while(papers, leaves);
            waited.unwrap_or_else(PoisonError::into_inner).thread = Thread::Works;
        }
        self.work(None)
    }

    pub(super) fn desk(&self) -> &Desk {
        &self.desk
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.desk.lock().closed = true;
        self.desk.changed.notify_all();
    }
}

impl Desk {
    /// Has this written.
    pub(super) fn keep(&self, key: Key, value: Value) {
        self.lock().pending.insert(key, value);
        self.changed.notify_all();
    }

    /// Has decisions written, and forgets those that are too old by then.
    pub(super) fn keep_decisions(&self, decisions: impl Iterator<Item = (u64, String)>) {
        let mut papers = self.lock();
        let before = papers.pending.len();
        for (id, text) in decisions {
            papers.pending.insert(Key::Decision(id), Value::Text(text));
        }
        let newest = papers.pending.keys().filter_map(|key| match key {
            Key::Decision(id) => Some(*id),
            _ => None,
        });
        if let Some(oldest) = newest
            .max()
            .map(|newest| newest.saturating_sub(DECISIONS_KEPT))
        {
            let is_old = |key: &Key| matches!(key, Key::Decision(id) if *id <= oldest);
            papers.pending.retain(|key, _| !is_old(key));
        }
        if papers.pending.len() > before {
            self.changed.notify_all();
        }
    }

    /// Returns where it is told once everything that lies here is written, or that
    /// the next try, which is now, failed.
    pub(super) fn witness(&self) -> oneshot::Receiver<Result<(), Arc<str>>> {
        let (witness, told) = oneshot::channel();
        let mut papers = self.lock();
        papers.witnesses.push(witness);
        papers.hurry = true;
        self.changed.notify_all();
        told
    }

    /// Waits until everything is written; returns false when that takes longer.
    pub(super) fn flush(&self, patience: Duration) -> bool {
        let mut papers = self.lock();
        papers.hurry = true;
        self.changed.notify_all();
        let left = |papers: &mut Papers| {
            // Nothing comes of waiting between two tries.
            let tries = papers.trouble.is_none() || papers.hurry;
            papers.writing || (!papers.pending.is_empty() && tries)
        };
        let waited = self.changed.wait_timeout_while(papers, patience, left);
        let (papers, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !papers.writing && papers.pending.is_empty()
    }

    /// Returns why the last try failed.
    pub(super) fn trouble(&self) -> Option<Arc<str>> {
        self.lock().trouble.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Papers> {
        self.papers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what comes until the desk is closed.
    fn work(&self, mut write: impl FnMut(&Pending) -> Result<(), redb::Error>) {
        let clock = Clock::start();
        let mut retry_at = Timestamp::START;
        while let Some((taken, witnesses)) = self.take(clock, retry_at) {
            let done = write(&taken);
            retry_at = clock.now() + RETRY;
            let mut papers = self.lock();
            papers.writing = false;
            match done {
                Ok(()) => {
                    if papers.trouble.take().is_some() {
                        info!("the state database is written again");
                    }
                }
                Err(error) => {
                    let why: Arc<str> = telemetry::chain(&error).to_string().into();
                    if papers.trouble.is_none() {
                        error!(
                            error = %why,
                            "writing the state database failed; workers go on, and it is tried again, but what happens from now on may be forgotten when residentd ends"
                        );
                    }
                    papers.trouble = Some(why);
                    for (key, value) in taken {
                        // What came meanwhile is newer.
                        papers.pending.entry(key).or_insert(value);
                    }
                }
            }
            let told = papers.trouble.clone().map_or(Ok(()), Err);
            drop(papers);
            self.changed.notify_all();
            for witness in witnesses {
                // Whoever asked may have left.
                let _ = witness.send(told.clone());
            }
        }
    }

    /// Waits for something to write; `None` when nothing will come.
    fn take(&self, clock: Clock, retry_at: Timestamp) -> Option<(Pending, Vec<Witness>)> {
        let mut papers = self.lock();
        loop {
            let rest = retry_at.since(clock.now());
            if papers.pending.is_empty() {
                papers.hurry = false;
                for witness in papers.witnesses.drain(..) {
                    // Whoever asked may have left.
                    let _ = witness.send(Ok(()));
                }
                if papers.closed {
                    papers.thread = Thread::Leaves;
                    return None;
                }
                let waited = self.changed.wait(papers);
                papers = waited.unwrap_or_else(PoisonError::into_inner);
            } else if papers.trouble.is_none() || papers.hurry || rest.is_zero() {
                papers.hurry = false;
                papers.writing = true;
                let pending = std::mem::take(&mut papers.pending);
                return Some((pending, std::mem::take(&mut papers.witnesses)));
            } else if papers.closed {
                papers.thread = Thread::Leaves;
                return None;
            } else {
                let waited = self.changed.wait_timeout(papers, rest);
                papers = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use redb::backends::InMemoryBackend;
    use redb::{ReadableDatabase, StorageBackend};

    use super::super::WORKERS;
    use super::*;

    /// A disk that can be full, and keeps what is on it.
    #[derive(Clone, Debug, Default)]
    struct Disk {
        memory: Arc<InMemoryBackend>,
        full: Arc<AtomicBool>,
    }

    impl Disk {
        fn give(&self) -> std::io::Result<()> {
            match self.full.load(Ordering::Relaxed) {
                true => Err(std::io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        }

        fn open(&self) -> Result<Database, redb::DatabaseError> {
            Database::builder().create_with_backend(self.clone())
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> std::io::Result<u64> {
            self.memory.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
            self.memory.read(offset, out)
        }

        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.give()?;
            self.memory.set_len(len)
        }

        fn sync_data(&self) -> std::io::Result<()> {
            self.give()
        }

        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            self.give()?;
            self.memory.write(offset, data)
        }
    }

    fn worker(key: &str) -> (Key, Value) {
        (Key::Worker(key.into()), Value::Text(key.into()))
    }

    fn kept(disk: &Disk) -> Vec<String> {
        let database = disk.open().expect("it can be opened");
        let read = database.begin_read().expect("it can be read");
        let table = read.open_table(WORKERS).expect("it was written");
        let keys = redb::ReadableTable::iter(&table).expect("it can be read");
        keys.map(|entry| entry.expect("it can be read").0.value().to_owned())
            .collect()
    }

    #[test]
    fn a_full_disk_is_told_once_and_what_came_meanwhile_is_written_when_it_has_room() {
        let disk = Disk::default();
        let desk = Arc::new(Desk::default());
        let writer = Writer {
            path: PathBuf::new(),
            desk: Arc::clone(&desk),
        };
        let thread = std::thread::spawn({
            let (desk, disk) = (Arc::clone(&desk), disk.clone());
            move || {
                let open = || disk.open();
                let mut scribe = Scribe {
                    database: None,
                    open,
                };
                desk.work(|pending| scribe.write(pending));
            }
        });
        let patience = Duration::from_secs(20);
        let keep = |name: &str| {
            let (key, value) = worker(name);
            desk.keep(key, value);
        };
        keep("a");
        keep("b");
        let told = || desk.witness().blocking_recv().expect("the thread tells");
        assert_eq!((told(), told()), (Ok(()), Ok(())));
        assert!(desk.flush(patience));
        assert_eq!(desk.trouble(), None);
        disk.full.store(true, Ordering::Relaxed);
        keep("c");
        desk.keep(Key::Worker("a".into()), Value::Nothing);
        assert!(!desk.flush(patience), "it says that it is not written");
        let why = desk.trouble().expect("it is told");
        assert!(why.contains("no storage space"), "{why}");
        assert_eq!(told(), Err(why), "without waiting for the next try");
        keep("d");
        disk.full.store(false, Ordering::Relaxed);
        assert_eq!(told(), Ok(()), "nothing was dropped");
        assert_eq!(desk.trouble(), None);
        drop(writer);
        thread.join().expect("the thread ends");
        assert_eq!(kept(&disk), ["b", "c", "d"]);
    }
}
