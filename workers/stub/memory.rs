//! Memory that is really there: anonymous, mapped from a file, and shared.
//!
//! Every page is touched, and anonymous and shared pages each hold other bytes
//! so that nothing merges them. What is taken is held until the process ends, or
//! sleeps.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, ptr};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// The smallest page there is; touching more often than needed does no harm.
const PAGE: usize = 4096;
/// What is taken at a time when memory is taken at a pace.
const STEP: u64 = 2 << 20;

/// The memory this worker holds.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    anonymous: Mutex<Anonymous>,
}

#[derive(Debug, Default)]
struct Anonymous {
    blocks: Vec<Vec<u8>>,
    grown: u64,
}

impl Memory {
    /// Takes `bytes` of anonymous memory, at once or in steps with `pause`
    /// after each. It blocks meanwhile.
    #[expect(
        clippy::disallowed_methods,
        reason = "a thread of its own takes memory at a pace"
    )]
    pub(crate) fn take(&self, bytes: u64, pause: Duration) {
        let step = if pause.is_zero() { bytes } else { STEP };
        let mut left = bytes;
        while left > 0 {
            let block = touched(left.min(step));
            self.lock().blocks.push(block);
            left = left.saturating_sub(step);
            std::thread::sleep(pause);
        }
    }

    /// Gives back all there is, and then takes `bytes`. It blocks meanwhile.
    pub(crate) fn replace(&self, bytes: u64) {
        let mut anonymous = self.lock();
        *anonymous = Anonymous::default();
        if bytes > 0 {
            anonymous.blocks.push(touched(bytes));
        }
    }

    /// Takes `bytes` more unless that would be over `most` for all growth.
    pub(crate) fn grow(&self, bytes: u64, most: u64) {
        let mut anonymous = self.lock();
        if bytes > 0 && anonymous.grown + bytes <= most {
            anonymous.blocks.push(touched(bytes));
            anonymous.grown += bytes;
        }
    }

    /// Takes as much as is missing to `most` for all growth.
    pub(crate) fn grow_to(&self, most: u64) {
        let missing = most.saturating_sub(self.grown());
        self.grow(missing, most);
    }

    /// Returns the bytes taken by [`Memory::grow`].
    pub(crate) fn grown(&self) -> u64 {
        self.lock().grown
    }

    fn lock(&self) -> MutexGuard<'_, Anonymous> {
        self.anonymous
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Maps a whole file shared and read-only and reads a byte of every page.
///
/// # Errors
/// When the file cannot be opened or mapped. The process dies by SIGBUS when
/// somebody shortens the file while its pages are read.
pub(crate) fn map_file(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let length = length(file.metadata()?.len());
    map_each_page(&file, length, Touch::Read)
}

/// Takes `bytes` of memory that could be shared with another process.
///
/// # Errors
/// When the kernel gives no memfd or does not map it.
pub(crate) fn share(bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let file = File::from(rustix::fs::memfd_create(
        "stub-worker",
        MemfdFlags::CLOEXEC,
    )?);
    file.set_len(bytes)?;
    map_each_page(&file, length(bytes), Touch::Write)
}

/// What is done to each page of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    Read,
    Write,
}

/// Maps `file` shared and touches every page, for the life of the process.
#[expect(unsafe_code, reason = "there is no safe way to map memory")]
fn map_each_page(file: &File, length: usize, touch: Touch) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let access = match touch {
        Touch::Read => ProtFlags::READ,
        Touch::Write => ProtFlags::READ | ProtFlags::WRITE,
    };
    // SAFETY: the kernel chooses the address, so no memory of ours is replaced;
    // the mapping is never removed.
    let start = unsafe { mmap(ptr::null_mut(), length, access, MapFlags::SHARED, file, 0)? };
    for index in 0..length.div_ceil(PAGE) {
        // SAFETY: a page starts before `length`, so the address is in the
        // mapping; it is aligned to a page, and a mapping ends with a whole
        // page, so eight bytes fit. No reference to this memory exists, and
        // volatile access allows for others who map the file.
        unsafe {
            let page = start.cast::<u8>().add(index * PAGE).cast::<u64>();
            match touch {
                Touch::Read => drop(page.read_volatile()),
                Touch::Write => page.write_volatile(distinct(index)),
            }
        }
    }
    Ok(())
}

/// Returns `bytes` of anonymous memory, resident: an allocation of this size
/// is a fresh mapping of zero pages, and each page is written to.
fn touched(bytes: u64) -> Vec<u8> {
    let mut block = vec![0_u8; length(bytes)];
    for (index, page) in block.chunks_mut(PAGE).enumerate() {
        let mark = distinct(index).to_le_bytes();
        let marked = page.len().min(mark.len());
        page[..marked].copy_from_slice(&mark[..marked]);
    }
    std::hint::black_box(block)
}

/// Returns a number that no other page of any worker holds.
fn distinct(page: usize) -> u64 {
    let process = u64::from(std::process::id()) << 40;
    process | u64::try_from(page).unwrap_or(u64::MAX >> 24)
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a 64-bit machine")
}
