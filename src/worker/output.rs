//! A worker's output: an append-only log file that outlives residentd, and the
//! last lines of it in memory.
//!
//! The worker writes to the file itself, never to a pipe of ours: a pipe would
//! end the worker when residentd ends. The file is read as it grows, on
//! inotify's word, and is cut back when it is over its cap, or when its disk is
//! about to be full: the last lines are in memory anyway.

use std::collections::VecDeque;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use super::watched::readable;
use crate::model::Bytes;

/// Lines a [`Tail`] keeps: enough for a stack trace of an engine.
pub const TAIL_LINES: usize = 200;
/// A line longer than this is split.
const LONGEST_LINE: usize = 16 << 10;
/// Read at most this much of a burst at once.
const PIECE: usize = 64 << 10;
/// Pieces after which other tasks get their turn.
const PIECES: usize = 16;
/// Read at most this much of what comes while a log is cut back: it is held in
/// memory for a moment.
const MEANWHILE: u64 = 2 << 20;
/// A disk of which less than this part is free is full, and so is one on which
/// a log does not fit a second time.
const FULL: u64 = 64;
/// Emptying a smaller log helps nobody.
const WORTH_EMPTYING: u64 = 64 << 10;

/// The last lines of one worker's output, bounded in lines and bytes.
#[derive(Debug, Default)]
pub struct Tail {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    lines: VecDeque<String>,
    pushed: u64,
}

impl Tail {
    /// Adds a line; the oldest goes when there are more than [`TAIL_LINES`].
    pub fn push(&self, line: String) {
        let mut kept = self.lock();
        if kept.lines.len() == TAIL_LINES {
            kept.lines.pop_front();
        }
        kept.lines.push_back(line);
        kept.pushed += 1;
    }

    /// Returns the last `count` lines, oldest first.
    #[must_use]
    pub fn last(&self, count: usize) -> Vec<String> {
        self.read(count).0
    }

    /// Returns the last `count` lines, oldest first, and how many lines were
    /// ever added: the last one returned is the line of that number.
    #[must_use]
    pub fn read(&self, count: usize) -> (Vec<String>, u64) {
        let kept = self.lock();
        let skipped = kept.lines.len().saturating_sub(count);
        let lines = kept.lines.iter().skip(skipped).cloned().collect();
        (lines, kept.pushed)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log file of one model, read from where this life's output begins.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    /// Appends; kept, since opening it anew costs more than writing a line.
    writer: File,
    reader: File,
    position: u64,
    partial: Vec<u8>,
    /// There is more to read than was read at the last turn.
    behind: bool,
    /// The first line that is read is the end of one, and is left out.
    begins_within_a_line: bool,
    cap: Bytes,
    /// That the disk is full was told.
    told_full: bool,
    watch: Option<AsyncFd<OwnedFd>>,
}

impl Log {
    /// Opens `folder/logs/<model>.log`, making the folders when absent.
    pub(super) fn open(folder: &Path, model: &str, cap: Bytes) -> io::Result<Self> {
        let logs = folder.join("logs");
        std::fs::create_dir_all(&logs)?;
        let path = logs.join(format!("{}.log", file_name(model)));
        let writer = OpenOptions::new().append(true).create(true).open(&path)?;
        let reader = File::open(&path)?;
        let position = reader.metadata()?.len();
        Ok(Self {
            path,
            writer,
            reader,
            position,
            partial: Vec::new(),
            behind: false,
            begins_within_a_line: false,
            cap,
            told_full: false,
            watch: None,
        })
    }

    /// Opens the log of a worker that an earlier residentd spawned, to read on
    /// from `from`; with `last_only` only the last piece of what is there.
    pub(super) fn resume(
        (folder, model): (&Path, &str),
        cap: Bytes,
        (from, last_only): (u64, bool),
    ) -> io::Result<Self> {
        let mut log = Self::open(folder, model, cap)?;
        log.watch = watch(&log.path).ok();
        let length = log.position;
        // Somebody cut the file back: all of it is newer.
        log.position = if from > length { 0 } else { from };
        let last = length.saturating_sub(u64::try_from(PIECE).unwrap_or(0));
        if last_only && last > log.position {
            log.position = last;
            log.begins_within_a_line = true;
        }
        Ok(log)
    }

    /// Returns a log that keeps nothing, for a worker whose own cannot be
    /// opened.
    pub(super) fn nowhere() -> io::Result<Self> {
        let path = PathBuf::from("/dev/null");
        Ok(Self {
            writer: OpenOptions::new().append(true).open(&path)?,
            reader: File::open(&path)?,
            path,
            position: 0,
            partial: Vec::new(),
            behind: false,
            begins_within_a_line: false,
            cap: Bytes(u64::MAX),
            told_full: true,
            watch: None,
        })
    }

    /// Returns what was printed of a line that has not ended yet.
    pub(super) fn unfinished(&self) -> String {
        text(&self.partial)
    }

    /// Returns a handle the worker writes to.
    pub(super) fn writer(&self) -> io::Result<File> {
        self.writer.try_clone()
    }

    /// Writes a line of our own.
    pub(super) fn note(&self, text: &str) -> io::Result<()> {
        (&self.writer).write_all(format!("{text}\n").as_bytes())
    }

    /// Leaves out what is in the file now, our own lines among it, and watches
    /// what comes. Returns how much is left out.
    pub(super) fn skip(&mut self) -> u64 {
        let file = self.reader.metadata().ok().filter(Metadata::is_file);
        // Everybody writes to `/dev/null`.
        self.watch = file.as_ref().and_then(|_| watch(&self.path).ok());
        self.position = file.map_or(self.position, |file| file.len());
        self.position
    }

    /// There is more to read than inotify will tell of.
    pub(super) fn look_at_once(&mut self) {
        self.behind = true;
    }

    /// Waits until there is something to read. Without inotify it never returns: the
    /// caller looks from time to time anyway.
    pub(super) async fn changed(&self) {
        if self.behind {
            return tokio::task::yield_now().await;
        }
        let Some(watch) = &self.watch else {
            return std::future::pending().await;
        };
        let Ok(mut ready) = watch.readable().await else {
            return std::future::pending().await;
        };
        let mut buffer = [0_u8; 4096];
        while rustix::io::read(watch.get_ref(), &mut buffer).is_ok_and(|read| read > 0) {}
        ready.clear_ready();
    }

    /// Reads what is new into `tail`, as far as one turn goes. Returns the new
    /// whole lines. What a worker prints faster than it can be read is left
    /// out, so that its file stays bounded.
    pub(super) async fn drain(&mut self, tail: &Tail) -> Vec<String> {
        let mut lines = Vec::new();
        if self
            .reader
            .metadata()
            .is_ok_and(|m| m.len() == self.position)
        {
            self.behind = false;
            return lines;
        }
        let mut piece = vec![0_u8; PIECE];
        self.behind = true;
        for _ in 0..PIECES {
            let length = self.reader.metadata().map_or(0, |m| m.len());
            if length < self.position {
                // Somebody cut the file back.
                self.position = 0;
            }
            if length - self.position > self.cap.get() {
                // The last piece is kept: it says how it went.
                let kept = length.saturating_sub(u64::try_from(PIECE).unwrap_or(0));
                let left_out = kept.saturating_sub(self.position);
                self.partial.clear();
                lines.push(format!("… {left_out} bytes of output left out …"));
                self.position = kept.max(self.position);
            }
            let read = self
                .reader
                .seek(SeekFrom::Start(self.position))
                .and_then(|_| self.reader.read(&mut piece))
                .unwrap_or(0);
            if read == 0 {
                self.behind = false;
                break;
            }
            self.position += u64::try_from(read).unwrap_or(0);
            self.split(&piece[..read], &mut lines);
        }
        let full = self.position >= WORTH_EMPTYING && self.disk_is_full();
        if full && !std::mem::replace(&mut self.told_full, true) {
            tracing::warn!(path = %self.path.display(), "the disk is full: logs of workers are not kept");
            lines.push(
                "… the disk is full: earlier output is not kept in the log file …".to_owned(),
            );
        }
        if full || self.position >= self.cap.get() {
            let meanwhile = self.cut_back(!full).await;
            self.split(&meanwhile, &mut lines);
        }
        for line in &lines {
            tail.push(line.clone());
        }
        lines
    }

    /// Reads to the end, for a worker that is gone, and ends a line that was
    /// never ended.
    pub(super) async fn finish(&mut self, tail: &Tail) {
        if let Some(watch) = self.watch.take() {
            // The kernel takes some 10 ms to close it, waiting for others.
            let watch = watch.into_inner();
            tokio::task::spawn_blocking(move || drop(watch));
        }
        self.drain(tail).await;
        while self.behind {
            self.drain(tail).await;
        }
        if !self.partial.is_empty() {
            tail.push(text(&std::mem::take(&mut self.partial)));
        }
    }

    /// A line ends at a newline, at a lone carriage return (a progress bar
    /// redraws) or when it is too long.
    fn split(&mut self, bytes: &[u8], lines: &mut Vec<String>) {
        for byte in bytes {
            match byte {
                b'\n' if std::mem::take(&mut self.begins_within_a_line) => self.partial.clear(),
                b'\n' => lines.push(text(&std::mem::take(&mut self.partial))),
                byte => {
                    let redraws = self.partial.last() == Some(&b'\r');
                    if redraws {
                        self.partial.clear();
                    }
                    self.partial.push(*byte);
                    if self.partial.len() >= LONGEST_LINE {
                        let mut line = text(&std::mem::take(&mut self.partial));
                        line.push('…');
                        lines.push(line);
                    }
                }
            }
        }
    }

    fn disk_is_full(&self) -> bool {
        let Ok(disk) = rustix::fs::fstatvfs(&self.reader) else {
            return false;
        };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let total = disk.f_blocks.saturating_mul(disk.f_frsize);
        free < (total / FULL).min(self.cap.get())
    }

    /// Begins anew, and keeps one older file if it is to be kept and can be. The
    /// worker appends, so its next write goes to the new beginning. Returns
    /// what it wrote meanwhile.
    async fn cut_back(&mut self, keep: bool) -> Vec<u8> {
        let (path, position, cap) = (self.path.clone(), self.position, self.cap.get());
        // Copying waits for the disk.
        let cut = tokio::task::spawn_blocking(move || {
            let kept = keep.then(|| cut(&path, position, cap));
            match kept {
                Some(Ok(rest)) => Ok(rest),
                Some(Err(_)) | None => throw_away(&path, position),
            }
        });
        match cut.await.map_err(io::Error::other).flatten() {
            Ok(rest) => {
                self.position = 0;
                rest
            }
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "a log file cannot be cut back");
                Vec::new()
            }
        }
    }
}

/// Copies a log aside, at most `cap` bytes of it, empties it, and returns what
/// was behind `position` in it.
fn cut(path: &Path, position: u64, cap: u64) -> io::Result<Vec<u8>> {
    let mut older = File::create(path.with_extension("log.1"))?;
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    file.seek(SeekFrom::Start(position.saturating_sub(cap)))?;
    io::copy(
        &mut Read::by_ref(&mut file).take(cap.min(position)),
        &mut older,
    )?;
    let rest = empty(&mut file, position)?;
    older.write_all(&rest)?;
    Ok(rest)
}

/// Empties a log and keeps nothing of it. Returns what was behind `position`
/// in it.
fn throw_away(path: &Path, position: u64) -> io::Result<Vec<u8>> {
    // It may not be there.
    let _ = std::fs::remove_file(path.with_extension("log.1"));
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    empty(&mut file, position)
}

/// Returns the last of what is behind `position`, and empties the file. What is
/// written between the last read and the cut, some microseconds, is lost.
fn empty(file: &mut File, position: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(
        position.max(length.saturating_sub(MEANWHILE)),
    ))?;
    let mut rest = Vec::new();
    Read::by_ref(file).take(MEANWHILE).read_to_end(&mut rest)?;
    file.set_len(0)?;
    Ok(rest)
}

fn watch(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
    let watch = inotify::init(flags)?;
    inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY)?;
    readable(watch)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.len() - bytes.iter().rev().take_while(|b| **b == b'\r').count();
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A model's name as a file's name: what is no letter, digit, dot, dash or
/// underscore is written as `%` and its code, so that no two names meet.
fn file_name(model: &str) -> String {
    let mut name = String::new();
    for byte in model.bytes() {
        if byte.is_ascii_alphanumeric() || b"._-".contains(&byte) {
            name.push(char::from(byte));
        } else {
            escape(&mut name, byte);
        }
    }
    match name.strip_prefix('.') {
        Some(rest) => format!("%2E{rest}"),
        None => name,
    }
}

fn escape(name: &mut String, byte: u8) {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F',
    ];
    name.push('%');
    name.push(DIGITS[usize::from(byte >> 4)]);
    name.push(DIGITS[usize::from(byte & 15)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_read_as_they_come_and_a_progress_bar_is_one_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut log = Log::open(folder.path(), "a/b", Bytes::mib(1)).expect("a log");
        let tail = Tail::default();
        let mut writer = log.writer().expect("a writer");
        writer.write_all(b"one\ntw").expect("written");
        assert_eq!(log.drain(&tail).await, ["one"]);
        writer
            .write_all(b"o\r\n10%\r20%\r30%\nrest")
            .expect("written");
        assert_eq!(log.drain(&tail).await, ["two", "30%"]);
        log.finish(&tail).await;
        assert_eq!(tail.last(9), ["one", "two", "30%", "rest"]);
    }

    #[tokio::test]
    async fn a_log_over_its_cap_is_cut_back_and_keeps_one_older_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut log = Log::open(folder.path(), "m", Bytes::kib(8)).expect("a log");
        let tail = Tail::default();
        let mut writer = log.writer().expect("a writer");
        for number in 0..3000 {
            writeln!(writer, "line {number}").expect("written");
            log.drain(&tail).await;
        }
        assert_eq!(tail.last(1), ["line 2999"]);
        let size = |name: &str| {
            std::fs::metadata(folder.path().join("logs").join(name)).map_or(0, |m| m.len())
        };
        assert!(size("m.log") <= 8 << 10 && size("m.log.1") > 0 && size("m.log.1") <= 9 << 10);
    }

    #[tokio::test]
    async fn a_burst_larger_than_the_cap_is_left_out_and_the_last_lines_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut log = Log::open(folder.path(), "m", Bytes::mib(2)).expect("a log");
        let tail = Tail::default();
        let mut writer = log.writer().expect("a writer");
        writer.write_all(&vec![b'x'; 3 << 20]).expect("written");
        writer.write_all(b"\nlast words\n").expect("written");
        log.drain(&tail).await;
        let kept = tail.last(99);
        assert_eq!(kept[0], "… 3080204 bytes of output left out …");
        assert_eq!(kept[kept.len() - 1], "last words");
        // More than one turn reads, less than the cap.
        let line = "y".repeat(99);
        for _ in 0..15_000 {
            writeln!(writer, "{line}").expect("written");
        }
        writer.write_all(b"the end\n").expect("written");
        log.drain(&tail).await;
        assert_eq!(tail.last(1), [line]);
        log.finish(&tail).await;
        assert_eq!(tail.last(1), ["the end"]);
    }

    #[test]
    fn names_that_differ_have_files_that_differ() {
        assert_eq!(file_name("meta/llama:8b"), "meta%2Fllama%3A8b");
        assert_ne!(file_name("a/b"), file_name("a:b"));
        assert_eq!(file_name(".."), "%2E.");
    }
}
