//! Reads `/proc`: who runs, who descends from whom.
//!
//! Own code instead of a crate because it is measured to be 5 to 120 times
//! cheaper than the alternatives and because the manager rests on it. Formats:
//! `proc_pid_stat(5)`. Memory numbers live in `memory/`, signals in `worker/`;
//! both walk the same [`ProcessTree`].

mod effort;
pub mod mark;
pub mod tree;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::DirEntryExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

pub use effort::Effort;
pub use tree::ProcessTree;

/// 52 numbers of at most 20 digits, and a name of at most 64 bytes.
const LONGEST_STAT: usize = 2048;
/// Room for most files of a process.
const ROOM: usize = 4096;

/// `PF_EXITING` of the kernel's `sched.h`: the process ends, and its files are
/// closed or about to be.
const EXITING: u32 = 4;

/// A process, told apart from a later one with the same pid by its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessKey {
    /// The process id in our namespace.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks since boot.
    pub start_time: u64,
}

/// What `/proc/<pid>/stat` says, as far as it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessStat {
    /// Who it is.
    pub key: ProcessKey,
    /// One letter: `R`, `S`, `D`, `T`, `Z`, …
    pub state: char,
    /// Parent.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Resident pages, file and shared ones included.
    pub rss_pages: u64,
}

impl ProcessKey {
    /// Returns whether this very process runs and has not begun to end, which
    /// comes before its files are closed: it holds all it held, sockets too.
    #[must_use]
    pub fn runs(self) -> bool {
        let mut line = [0_u8; LONGEST_STAT];
        let read = read_stat(Path::new("/proc"), self.pid, &mut line);
        let text = String::from_utf8_lossy(&line[..read.unwrap_or(0)]);
        // Fields 9 and 22; what is after the name begins with field 3.
        let after = text.rfind(')').and_then(|end| text.get(end + 1..));
        let mut fields = after.unwrap_or_default().split_ascii_whitespace();
        let flags = fields.nth(6).and_then(|flags| flags.parse::<u32>().ok());
        let start_time = fields.nth(12).and_then(|time| time.parse().ok());
        start_time == Some(self.start_time) && flags.is_some_and(|flags| flags & EXITING == 0)
    }
}

impl ProcessStat {
    /// Reads one process; `None` when it is gone.
    #[must_use]
    pub fn read(pid: i32) -> Option<Self> {
        Self::read_in(Path::new("/proc"), pid)
    }

    /// Reads one process of another mount of `/proc`.
    #[must_use]
    pub fn read_in(proc: &Path, pid: i32) -> Option<Self> {
        let mut line = [0_u8; LONGEST_STAT];
        let read = read_stat(proc, pid, &mut line)?;
        Self::parse(&line[..read])
    }

    /// Returns the wait status of a process that has ended and was not reaped, as
    /// `waitpid(2)` would tell its parent. The kernel shows it to whoever may
    /// trace the process: to its own user, that is.
    #[must_use]
    pub fn wait_status(key: ProcessKey) -> Option<i32> {
        use std::os::unix::fs::MetadataExt;
        let folder = format!("/proc/{}", key.pid);
        let me = rustix::process::geteuid().as_raw();
        let may = me == 0 || fs::metadata(&folder).is_ok_and(|folder| folder.uid() == me);
        let line = fs::read_to_string(folder + "/stat").ok().filter(|_| may)?;
        let zombie = Self::parse(line.as_bytes()).filter(Self::is_zombie)?;
        // Field 52; the state is field 3.
        let mut fields = line[line.rfind(')')? + 1..].split_ascii_whitespace();
        let status = fields.nth(49)?.parse().ok()?;
        (zombie.key == key).then_some(status)
    }

    /// Returns whether the process has ended and only waits to be reaped.
    #[must_use]
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    /// Parses the one line of `/proc/<pid>/stat`. The command name may hold
    /// spaces and parentheses, so the fields are counted after the last `)`.
    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text)
            .ok()
            .map_or_else(|| String::from_utf8_lossy(text), Into::into);
        let pid = text.split(' ').next()?.parse().ok()?;
        let rest = &text[text.rfind(')')? + 1..];
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let ppid = fields.next()?.parse().ok()?;
        let pgrp = fields.next()?.parse().ok()?;
        let session = fields.next()?.parse().ok()?;
        // Fields 7 to 21 lie between the session and the start time.
        let start_time = fields.nth(15)?.parse().ok()?;
        let rss_pages = fields.nth(1)?.parse::<i64>().ok()?;
        Some(Self {
            key: ProcessKey { pid, start_time },
            state,
            ppid,
            pgrp,
            session,
            rss_pages: u64::try_from(rss_pages).unwrap_or(0),
        })
    }
}

/// Reads a file of `/proc` to its end. These files say that they are empty, so
/// that `fs::read` takes its room in many small steps, each a call; here two are
/// enough for most.
///
/// # Errors
/// When the file cannot be opened or read.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut text = Vec::with_capacity(ROOM);
    fs::File::open(path)?.read_to_end(&mut text)?;
    Ok(text)
}

/// Reads a process' line and returns its length. One read into a buffer that
/// holds any such line.
fn read_stat(proc: &Path, pid: i32, line: &mut [u8; LONGEST_STAT]) -> Option<usize> {
    let file = fs::File::open(proc.join(format!("{pid}/stat")));
    file.and_then(|mut file| file.read(line)).ok()
}

/// Every process that could be read, by pid, at one pass over `/proc`.
#[derive(Clone, Debug, Default)]
pub struct ProcessTable {
    processes: BTreeMap<i32, Entry>,
    /// Who is next to whom: pids by parent, by group and by session, so that a
    /// tree is found without a look at every process.
    by_parent: BTreeMap<i32, Vec<i32>>,
    by_group: BTreeMap<i32, Vec<i32>>,
    by_session: BTreeMap<i32, Vec<i32>>,
    /// Grows from scan to scan, so that a tree that two tasks refresh can tell
    /// an older table from a newer one.
    order: u64,
}

/// One process, and the number of its folder.
#[derive(Clone, Copy, Debug)]
struct Entry {
    stat: ProcessStat,
    folder: u64,
}

/// What the kernel says when it cannot number a folder.
const NO_FOLDER: u64 = 1;

/// Counts the scans of this process.
static SCANS: AtomicU64 = AtomicU64::new(1);

impl ProcessTable {
    /// Reads `/proc/*/stat` once. A process that ends meanwhile is left out.
    ///
    /// # Errors
    /// When `/proc` itself cannot be listed.
    pub fn scan() -> io::Result<Self> {
        Self::default().rescan()
    }

    /// Lists who runs, and reads `stat` only of processes that are not in this
    /// table: what it says of the others may be old, but for their being there.
    /// The kernel numbers the folder of each process anew, so that a pid that
    /// was given away is noticed.
    ///
    /// # Errors
    /// When `/proc` itself cannot be listed.
    pub fn rescan(&self) -> io::Result<Self> {
        // Taken first: what another scan saw earlier is older.
        let order = SCANS.fetch_add(1, Ordering::Relaxed);
        let mut found = Vec::new();
        for entry in fs::read_dir(Path::new("/proc"))? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let folder = entry.ino();
            let known = self.processes.get(&pid);
            let known = known.filter(|known| known.folder == folder && folder > NO_FOLDER);
            let stat = known.map_or_else(|| ProcessStat::read(pid), |known| Some(known.stat));
            found.extend(stat.map(|stat| Entry { stat, folder }));
        }
        Ok(Self::with(found, order))
    }

    fn with(entries: impl IntoIterator<Item = Entry>, order: u64) -> Self {
        let mut table = Self {
            order,
            ..Self::default()
        };
        for entry in entries {
            let (stat, pid) = (entry.stat, entry.stat.key.pid);
            table.by_parent.entry(stat.ppid).or_default().push(pid);
            table.by_group.entry(stat.pgrp).or_default().push(pid);
            table.by_session.entry(stat.session).or_default().push(pid);
            table.processes.insert(pid, entry);
        }
        table
    }

    /// Returns the children of a process.
    pub(super) fn children(&self, pid: i32) -> impl Iterator<Item = i32> {
        self.by_parent.get(&pid).into_iter().flatten().copied()
    }

    /// Returns the members of a process group.
    pub(super) fn group(&self, pgrp: i32) -> impl Iterator<Item = i32> {
        self.by_group.get(&pgrp).into_iter().flatten().copied()
    }

    /// Returns the members of the session that a process leads.
    pub(super) fn session(&self, session: i32) -> impl Iterator<Item = i32> {
        self.by_session.get(&session).into_iter().flatten().copied()
    }

    /// Returns the processes by pid.
    pub fn iter(&self) -> impl Iterator<Item = &ProcessStat> {
        self.processes.values().map(|entry| &entry.stat)
    }

    /// Returns the process with this pid.
    #[must_use]
    pub fn get(&self, pid: i32) -> Option<&ProcessStat> {
        self.processes.get(&pid).map(|entry| &entry.stat)
    }

    #[cfg(test)]
    pub(crate) fn of(stats: impl IntoIterator<Item = ProcessStat>) -> Self {
        let entries = stats.into_iter().map(|stat| Entry { stat, folder: 0 });
        Self::with(entries, SCANS.fetch_add(1, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

    use super::*;

    #[test]
    fn a_process_runs_until_it_begins_to_end_and_not_as_another_one() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("it runs");
        let pid = i32::try_from(child.id()).expect("a pid fits");
        let key = ProcessStat::read(pid).expect("it runs").key;
        assert!(key.runs());
        let later = ProcessKey {
            start_time: key.start_time + 1,
            ..key
        };
        assert!(!later.runs());
        child.kill().expect("it is ours");
        let ended = WaitId::Pid(Pid::from_raw(pid).expect("a pid"));
        // It is left as it is.
        waitid(ended, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).expect("it ends");
        assert!(!key.runs(), "it is a zombie");
        child.wait().expect("it is reaped");
        assert!(!key.runs());
    }

    #[test]
    fn a_command_name_with_parentheses_and_spaces_is_parsed() {
        let line = b"4242 (a) S 9 (b)) S 17 4242 99 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 1000000 77 18446744073709551615 0";
        let stat = ProcessStat::parse(line).expect("a valid line");
        assert_eq!(
            stat.key,
            ProcessKey {
                pid: 4242,
                start_time: 123_456
            }
        );
        assert_eq!(
            (
                stat.state,
                stat.ppid,
                stat.pgrp,
                stat.session,
                stat.rss_pages
            ),
            ('S', 17, 4242, 99, 77)
        );
    }

    #[test]
    fn how_a_process_ended_is_seen_until_it_is_reaped() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "exit 7"])
            .spawn()
            .expect("sh can be spawned");
        let pid = i32::try_from(child.id()).expect("a pid fits");
        let key = ProcessStat::read(pid).expect("it is not reaped").key;
        let status = loop {
            if let Some(status) = ProcessStat::wait_status(key) {
                break status;
            }
            std::thread::yield_now();
        };
        child.wait().expect("it is our child");
        assert_eq!((status, ProcessStat::wait_status(key)), (7 << 8, None));
    }

    #[test]
    fn the_table_holds_this_process() {
        let table = ProcessTable::scan().expect("/proc can be listed");
        let me = i32::try_from(std::process::id()).expect("a pid fits");
        let stat = table.get(me).expect("this process runs");
        assert!(stat.rss_pages > 0 && !stat.is_zombie());
    }

    #[test]
    fn a_second_look_reads_who_is_new_and_forgets_who_is_gone() {
        let table = ProcessTable::scan().expect("/proc can be listed");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep can be spawned");
        let pid = i32::try_from(child.id()).expect("a pid fits");
        let with_child = table.rescan().expect("/proc can be listed");
        let found = with_child.get(pid).copied();
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert_eq!(table.get(pid), None);
        let found = found.expect("it ran");
        let me = i32::try_from(std::process::id()).expect("a pid fits");
        assert_eq!((found.ppid, found.key.pid), (me, pid));
        assert!(with_child.children(me).any(|child| child == pid));
        let later = with_child.rescan().expect("/proc can be listed");
        assert_eq!(later.get(pid), None);
        assert!(later.order > with_child.order && with_child.order > table.order);
        assert_eq!(
            later.get(me).map(|stat| stat.key),
            table.get(me).map(|stat| stat.key)
        );
    }
}
