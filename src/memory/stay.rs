//! Keeps the program itself in memory.
//!
//! In a cgroup that is full the kernel drops pages of files first, our own
//! program's among them. Reading one again may be what its OOM killer comes for
//! when nobody else is left to kill. Heap and stacks are not locked: the
//! allocator could not give any of them back.

use std::ffi::c_void;
use std::{io, ptr};

use rustix::mm::{MlockFlags, mlock_with};

/// Keeps the kernel's OOM killer away from this process: when it has just ended
/// the only worker of a cgroup, whose bytes are not back yet, a page that we
/// need would otherwise make us the next. See `oom_score_adj` in `proc(5)`;
/// workers get a score of their own.
///
/// # Errors
/// When this process may not (`CAP_SYS_RESOURCE`).
pub fn spare_from_oom() -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "-1000")
}

/// Locks what this process has mapped of files and does not write to, each page
/// from its first use on. Returns how many bytes that are at most.
///
/// # Errors
/// When the maps cannot be read, or `RLIMIT_MEMLOCK` does not allow as much.
pub fn stay_in_memory() -> io::Result<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut locked = 0;
    for (start, length) in maps.lines().filter_map(program) {
        lock(start, length)?;
        locked += u64::try_from(length).unwrap_or(0);
    }
    Ok(locked)
}

/// Returns where a line of `/proc/<pid>/maps` is of a file that is only read or
/// executed: its address and length.
fn program(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let inode = fields.nth(2)?;
    if !permissions.starts_with("r-") || inode == "0" {
        return None;
    }
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    Some((start, end.checked_sub(start)?))
}

#[expect(
    unsafe_code,
    reason = "no crate has a safe function for this system call"
)]
fn lock(start: usize, length: usize) -> io::Result<()> {
    let start = ptr::with_exposed_provenance_mut::<c_void>(start);
    // SAFETY: nothing is read or written through the pointer; locking pages
    // changes only whether the kernel may drop them, and fails when the range
    // is not mapped.
    unsafe { mlock_with(start, length, MlockFlags::ONFAULT) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_only_read_are_locked_and_nothing_else() {
        let text = "55d0a000-55d0c000 r-xp 00002000 08:01 4711 /usr/bin/a name";
        assert_eq!(program(text), Some((0x55d0_a000, 0x2000)));
        let data = "55d0c000-55d0e000 rw-p 00002000 08:01 4711 /usr/bin/a";
        let heap = "55d0e000-55d10000 r--p 00000000 00:00 0 [heap]";
        let hidden = "55d0e000-55d10000 ---p 00000000 08:01 4711 /usr/bin/a";
        assert_eq!([data, heap, hidden, ""].map(program), [None; 4]);
    }
}
