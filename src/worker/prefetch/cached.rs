//! How much of a file is in the page cache.
//!
//! `cachestat(2)` of Linux 6.5 counts what is there and maps nothing. It takes
//! 0.1 to 90 ms for each GiB that is there, by how large the pieces are in which
//! the kernel keeps it. Older kernels are asked by `mincore(2)` over a mapping.
//! Both tell only whom the file belongs to or who may write to it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use rustix::mm::{MapFlags, ProtFlags};

use crate::model::Bytes;

/// The kernel's number of the call, the same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;
/// `mincore` is asked about this much at once: a byte for each page.
const WINDOW: u64 = 1 << 30;

/// What the call is asked about.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// What it answers, in pages.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Returns how much of a part of a file is in the page cache; `None` where the
/// kernel does not tell.
pub(super) fn cached(file: &File, offset: u64, length: u64) -> Option<Bytes> {
    if length == 0 {
        return Some(Bytes::ZERO);
    }
    let pages = match cachestat(file, offset, length) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            mincore(file, offset, length).ok()?
        }
        counted => counted.ok()?,
    };
    // The last page may reach over the end.
    Some(Bytes(pages.saturating_mul(page()).min(length)))
}

fn page() -> u64 {
    u64::try_from(rustix::param::page_size()).unwrap_or(4096)
}

#[expect(unsafe_code, reason = "no crate has a function for this system call")]
fn cachestat(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    let range = Range { offset, length };
    let mut stat = Stat::default();
    // SAFETY: the descriptor is open; both structures are laid out as the call
    // takes them, and live until it returns.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    match result {
        0 => Ok(stat.cached),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The same by a mapping. Of a file that is not ours the kernel would say that
/// all is there.
#[expect(unsafe_code, reason = "there is no safe way to map memory")]
fn mincore(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    let metadata = file.metadata()?;
    let me = rustix::process::geteuid();
    if metadata.uid() != me.as_raw() && !me.is_root() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let end = offset.saturating_add(length).min(metadata.size());
    let mut at = offset - offset % page();
    let mut pages = 0;
    while at < end {
        let length = usize::try_from(WINDOW.min(end - at)).map_err(io::Error::other)?;
        let mut there = vec![0_u8; length.div_ceil(rustix::param::page_size())];
        // SAFETY: the kernel chooses the address, so no memory of ours is
        // replaced; nothing of the mapping is touched, and it is removed below.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                at,
            )
        }?;
        // SAFETY: the range is that of the mapping, and there is a byte for
        // each of its pages.
        let asked = match unsafe { libc::mincore(start, length, there.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        // SAFETY: nobody else knows of the mapping.
        unsafe { rustix::mm::munmap(start, length) }?;
        asked?;
        let found = there.iter().filter(|byte| **byte & 1 == 1).count();
        pages += u64::try_from(found).unwrap_or(0);
        at += WINDOW;
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn both_ways_count_the_same_and_a_file_that_was_just_written_is_there() {
        let mut file = tempfile::tempfile().expect("a file");
        let length = (5 << 20) + 77;
        file.write_all(&vec![7; length]).expect("written");
        let length = u64::try_from(length).expect("a size");
        assert_eq!(cached(&file, 0, length), Some(Bytes(length)));
        assert_eq!(cached(&file, 1 << 20, 1 << 20), Some(Bytes::mib(1)));
        let by_map = mincore(&file, 0, length).expect("it is ours");
        assert_eq!(by_map, length.div_ceil(page()));
        assert_eq!(cached(&file, 0, 0), Some(Bytes::ZERO));
    }
}
