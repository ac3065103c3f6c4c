//! Reads files into the page cache, piece by piece.
//!
//! By plain reads of several blocks side by side, each of which begins small. One
//! large `WILLNEED` reads a few MiB and no more, and a loop of small ones fills the
//! cache as fast as this does, but in single pages, and who maps a file pays for
//! each piece of the cache that it is in. The kernel's pieces grow with each of its
//! read-aheads from single pages on, and its read-aheads from the size of the first
//! read on: a first read of 1 MiB leaves some 30 MiB in small pieces behind, small
//! ones some 7 MiB. To map and touch 1 GiB took 400 ms after `WILLNEED`, 25 ms after
//! blocks of 64 MiB by 1 MiB, 10 ms after such of 256 MiB, 7 ms after this, and 7 ms
//! after one reader from begin to end, which takes longer to read (medians on two
//! cores). Blocks that are there already are passed over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use rustix::process::setpriority_process;
use tracing::debug;

use super::cached::cached;
use super::files::Files;
use crate::model::{Bytes, PrefetchEnd};

/// Each reader takes a block of this size, so that the kernel sees as many
/// sequential readers.
const BLOCK: u64 = 128 << 20;
/// Before each read of this size it is looked whether it is still wanted.
const PIECE: usize = 1 << 20;
/// A block begins with reads of this size, so that the kernel's read-ahead begins
/// small as well.
const FIRST_PIECE: usize = 64 << 10;
/// Up to here in a block; by then the read-ahead has grown past [`PIECE`].
const FIRST: u64 = 2 << 20;
/// Readers side by side while somebody waits.
const READERS: usize = 4;
/// Niceness of readers: the worker that starts comes first.
const NICE: i32 = 10;
/// `IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)`; see `ioprio_set(2)`.
const IO_IDLE: libc::c_long = 3 << 13;
/// `IOPRIO_WHO_PROCESS`.
const IO_WHO_PROCESS: libc::c_long = 1;

/// What one who reads and one who orders it share.
#[derive(Debug)]
pub(super) struct Control {
    called_off: AtomicBool,
    spare: AtomicU64,
}

impl Control {
    pub(super) fn new(spare: Bytes) -> Self {
        Self {
            called_off: AtomicBool::new(false),
            spare: AtomicU64::new(spare.get()),
        }
    }

    pub(super) fn call_off(&self) {
        self.called_off.store(true, Ordering::Relaxed);
    }

    pub(super) fn set_spare(&self, spare: Bytes) {
        self.spare.store(spare.get(), Ordering::Relaxed);
    }

    /// Why not to read on, if so.
    fn verdict(&self) -> Option<PrefetchEnd> {
        if self.called_off.load(Ordering::Relaxed) {
            Some(PrefetchEnd::CalledOff)
        } else if self.spare.load(Ordering::Relaxed) == 0 {
            Some(PrefetchEnd::NoRoom)
        } else {
            None
        }
    }
}

/// What reading came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Of all files together.
    pub(super) size: Bytes,
    /// Was there already.
    pub(super) found: Bytes,
    /// Was read.
    pub(super) read: Bytes,
    pub(super) end: PrefetchEnd,
}

/// One part of one file.
struct Block<'a> {
    path: &'a Path,
    offset: u64,
    length: u64,
}

/// What the readers of one job share.
struct Job<'a> {
    blocks: Vec<Block<'a>>,
    next: AtomicUsize,
    found: AtomicU64,
    read: AtomicU64,
    /// Most to read.
    most: u64,
    control: &'a Control,
}

/// Reads these files, at most so much of them, as long as `control` lets it.
/// Blocks.
pub(super) fn read(files: &Files, most: Bytes, control: &Control, urgent: bool) -> Outcome {
    let job = Job {
        blocks: blocks(files),
        next: AtomicUsize::new(0),
        found: AtomicU64::new(0),
        read: AtomicU64::new(0),
        most: most.get(),
        control,
    };
    let readers = if urgent { READERS } else { 1 };
    let readers = readers.min(job.blocks.len()).max(1);
    let end = std::thread::scope(|scope| {
        let more: Vec<_> = (1..readers)
            .filter_map(|_| {
                let reader = std::thread::Builder::new().name("prefetch".into());
                // Fewer readers read as well.
                reader.spawn_scoped(scope, || job.work(urgent)).ok()
            })
            .collect();
        let mut end = job.work(urgent);
        for reader in more {
            // A reader that panicked has been told of.
            let other = reader.join().unwrap_or(PrefetchEnd::Failed);
            if end == PrefetchEnd::Done {
                end = other;
            }
        }
        end
    });
    Outcome {
        size: files.size(),
        found: Bytes(job.found.into_inner()),
        read: Bytes(job.read.into_inner()),
        end,
    }
}

fn blocks(files: &Files) -> Vec<Block<'_>> {
    let of_file = |(path, size): (_, u64)| {
        let begins = (0..size.div_ceil(BLOCK)).map(|index| index * BLOCK);
        begins.map(move |offset| Block {
            path,
            offset,
            length: BLOCK.min(size - offset),
        })
    };
    files.each().flat_map(of_file).collect()
}

impl Job<'_> {
    /// Takes blocks until none is left, or why not.
    fn work(&self, urgent: bool) -> PrefetchEnd {
        give_way(urgent);
        let mut piece = vec![0_u8; PIECE];
        while let Some(block) = self.blocks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            match self.read_block(block, &mut piece) {
                Ok(None) => {}
                Ok(Some(end)) => return end,
                Err(error) => {
                    debug!(path = %block.path.display(), %error, "a file cannot be read ahead");
                    return PrefetchEnd::Failed;
                }
            }
        }
        PrefetchEnd::Done
    }

    fn read_block(&self, block: &Block<'_>, piece: &mut [u8]) -> io::Result<Option<PrefetchEnd>> {
        if let Some(end) = self.control.verdict() {
            return Ok(Some(end));
        }
        let file = File::open(block.path)?;
        let there = cached(&file, block.offset, block.length).map_or(0, Bytes::get);
        self.found.fetch_add(there, Ordering::Relaxed);
        if there == block.length {
            return Ok(None);
        }
        let mut done = 0;
        let mut end = None;
        while done < block.length {
            end = self.control.verdict();
            if end.is_none() && self.read.load(Ordering::Relaxed) + done >= self.most {
                end = Some(PrefetchEnd::NoRoom);
            }
            if end.is_some() {
                break;
            }
            let most = if done < FIRST { FIRST_PIECE } else { PIECE };
            let wanted = usize::try_from(block.length - done).unwrap_or(PIECE);
            let wanted = wanted.min(most);
            let read = file.read_at(&mut piece[..wanted], block.offset + done)?;
            if read == 0 {
                // It has become shorter.
                break;
            }
            done += u64::try_from(read).unwrap_or(0);
        }
        // What was there is among what was passed over it.
        let new = done.min(block.length - there);
        self.read.fetch_add(new, Ordering::Relaxed);
        Ok(end)
    }
}

/// Lets everybody else go first; the priorities are this thread's own.
pub(super) fn give_way(urgent: bool) {
    // Without it reading is no gentler, and all the same right.
    if let Err(error) = setpriority_process(None, NICE) {
        debug!(%error, "a reader has the priority of residentd itself");
    }
    if !urgent {
        idle_io();
    }
}

#[expect(unsafe_code, reason = "no crate has a function for this system call")]
fn idle_io() {
    // SAFETY: the call takes three numbers; 0 is this thread.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IO_WHO_PROCESS, 0_i32, IO_IDLE) };
    if result != 0 {
        debug!(error = %io::Error::last_os_error(), "a reader's I/O has the usual priority");
    }
}
