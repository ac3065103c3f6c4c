//! The functions only newer drivers have: processes, and MIG.
//!
//! Layouts and codes are those of `nvml.h`.

#![expect(
    unsafe_code,
    reason = "functions with C linkage that write through their caller's pointers"
)]

use std::sync::atomic::{AtomicU32, Ordering};

use crate::driver::{Driver, Holding, Rows, code, hang, place};

/// `nvmlProcessInfo_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Process {
    pid: u32,
    used: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

const NOT_SUPPORTED: i32 = 3;
/// Instead of a number of bytes: there is none.
const UNAVAILABLE: u64 = u64::MAX;
/// Added to pids that are to mean nothing here: over the kernel's largest.
const FOREIGN: u32 = 5_000_000;

/// How often the list has grown.
static GROWN: AtomicU32 = AtomicU32::new(0);

/// # Safety
/// `count` can be read and written, and `list` has room for that many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: usize,
    count: *mut u32,
    list: *mut Process,
) -> i32 {
    hang(|driver| driver.hang_ms);
    let driver = Driver::read();
    let rows = match rows(&driver, device) {
        Ok(rows) => rows,
        Err(error) => return error,
    };
    // SAFETY: as promised by the caller.
    let asks_for_rows = unsafe { count.read() } > 0;
    let grows = asks_for_rows && GROWN.fetch_add(1, Ordering::Relaxed) < driver.grow;
    // SAFETY: as promised by the caller.
    unsafe { give(&rows, grows, count, list) }
}

/// # Safety
/// `count` can be read and written, and `list` has room for that many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGraphicsRunningProcesses_v3(
    device: usize,
    count: *mut u32,
    list: *mut Process,
) -> i32 {
    let driver = Driver::read();
    let mut rows = match rows(&driver, device) {
        Ok(rows) => rows,
        Err(error) => return error,
    };
    rows.retain(|_| driver.graphics);
    // SAFETY: as promised by the caller.
    unsafe { give(&rows, false, count, list) }
}

/// # Safety
/// `current` and `pending` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(
    device: usize,
    current: *mut u32,
    pending: *mut u32,
) -> i32 {
    let driver = Driver::read();
    let found = match driver.device(device) {
        Ok(found) => found,
        Err(error) => return error,
    };
    if found.mig_mode != code::OK {
        return found.mig_mode;
    }
    let mode = u32::from(!found.mig.is_empty());
    // SAFETY: as promised by the caller.
    unsafe {
        current.write(mode);
        pending.write(mode);
    }
    code::OK
}

/// # Safety
/// `count` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(_device: usize, count: *mut u32) -> i32 {
    // Places, of which some are empty.
    // SAFETY: as promised by the caller.
    unsafe { count.write(7) };
    code::OK
}

/// # Safety
/// `instance` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    device: usize,
    index: u32,
    instance: *mut usize,
) -> i32 {
    let driver = Driver::read();
    let found = device + 1 + place(index);
    if let Err(error) = driver.device(found) {
        return error;
    }
    // SAFETY: as promised by the caller.
    unsafe { instance.write(found) };
    code::OK
}

fn rows(driver: &Driver, device: usize) -> Result<Vec<Process>, i32> {
    let found = driver.device(device)?;
    if driver.rows == Rows::NotSupported {
        return Err(NOT_SUPPORTED);
    }
    let holdings = driver.holdings(&found.uuid);
    let living = holdings.iter().filter(|holding| holding.alive);
    Ok(living
        .filter_map(|holding| row(driver.rows, *holding))
        .collect())
}

fn row(rows: Rows, holding: Holding) -> Option<Process> {
    let pid = match rows {
        Rows::None => return None,
        Rows::Threads => last_thread(holding.pid)?,
        _ => holding.pid,
    };
    let pid = u32::try_from(pid).ok()?;
    Some(Process {
        pid: if rows == Rows::Foreign {
            pid + FOREIGN
        } else {
            pid
        },
        used: match rows {
            Rows::Zero => 0,
            Rows::Unavailable => UNAVAILABLE,
            _ => holding.bytes,
        },
        gpu_instance: u32::MAX,
        compute_instance: u32::MAX,
    })
}

fn last_thread(pid: i32) -> Option<i32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let ids = threads
        .flatten()
        .filter_map(|t| t.file_name().to_str()?.parse().ok());
    ids.max()
}

/// Writes a list by NVML's rule: with too little room only its length.
///
/// # Safety
/// `count` can be read and written, and `list` has room for that many.
unsafe fn give(rows: &[Process], grows: bool, count: *mut u32, list: *mut Process) -> i32 {
    let length = u32::try_from(rows.len()).unwrap_or(u32::MAX);
    // SAFETY: as promised by the caller.
    let room = unsafe { count.replace(length + u32::from(grows) * 10) };
    if room < length || grows {
        return code::INSUFFICIENT_SIZE;
    }
    for (index, row) in rows.iter().enumerate() {
        // SAFETY: there is room for `length`, as just checked.
        unsafe { list.add(index).write(*row) };
    }
    code::OK
}
