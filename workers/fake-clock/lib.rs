//! A wall clock that is as wrong as a file says, for whatever program has this
//! library preloaded (`LD_PRELOAD`).
//!
//! `FAKE_CLOCK` names a file of eight bytes: the seconds to add, in the
//! machine's byte order. It is mapped, so a change is seen by the next look at
//! the clock. Only `CLOCK_REALTIME` of `clock_gettime` is wrong, which is what
//! Rust reads; all other clocks go on as they do when somebody sets the time.

use std::fs::File;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use libc::{c_int, clockid_t, timespec};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Tells the time, as `clock_gettime(2)` does.
///
/// # Safety
/// As there: `time` is where it may be written to.
#[expect(unsafe_code, reason = "takes the place of the C library's function")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    // SAFETY: the kernel checks both arguments itself, and sets errno.
    let done = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    if done != 0 {
        return -1;
    }
    if clock == libc::CLOCK_REALTIME {
        // SAFETY: the kernel has just written there.
        unsafe { (*time).tv_sec += shift() };
    }
    0
}

fn shift() -> i64 {
    static SHIFT: OnceLock<Option<&'static AtomicI64>> = OnceLock::new();
    let shift = SHIFT.get_or_init(map);
    shift.map_or(0, |shift| shift.load(Ordering::Relaxed))
}

/// Maps the file for the life of the process; `None` without one.
#[expect(unsafe_code, reason = "there is no safe way to map memory")]
fn map() -> Option<&'static AtomicI64> {
    let file = File::open(std::env::var_os("FAKE_CLOCK")?).ok()?;
    let length = size_of::<AtomicI64>();
    if file.metadata().ok()?.len() < u64::try_from(length).ok()? {
        return None;
    }
    // SAFETY: the kernel chooses the address, so no memory of ours is replaced;
    // the mapping is never removed, and holds eight bytes at an address that is
    // aligned to a page. Whoever changes them changes all at once.
    unsafe {
        let start = mmap(
            ptr::null_mut(),
            length,
            ProtFlags::READ,
            MapFlags::SHARED,
            &file,
            0,
        );
        Some(&*start.ok()?.cast::<AtomicI64>())
    }
}
