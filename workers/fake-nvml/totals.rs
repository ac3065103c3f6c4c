//! The functions every driver has: devices, their names and their memory.
//!
//! Layouts and codes are those of `nvml.h`.

#![expect(
    unsafe_code,
    reason = "functions with C linkage that write through their caller's pointers"
)]

use std::ffi::c_char;

use crate::driver::{Driver, code, handle, hang};

/// `nvmlMemory_v2_t`.
#[repr(C)]
#[derive(Debug)]
pub struct Memory {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> i32 {
    hang(|driver| driver.init_hang_ms);
    Driver::read().init
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> i32 {
    code::OK
}

/// # Safety
/// `text` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(text: *mut c_char, length: u32) -> i32 {
    // SAFETY: as promised by the caller.
    unsafe { write_text("575.57.08", text, length) }
}

/// # Safety
/// `count` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut u32) -> i32 {
    let devices = u32::try_from(Driver::read().devices.len()).unwrap_or(0);
    // SAFETY: as promised by the caller.
    unsafe { count.write(devices) };
    code::OK
}

/// # Safety
/// `device` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: u32, device: *mut usize) -> i32 {
    let found = handle(index);
    if let Err(error) = Driver::read().device(found) {
        return error;
    }
    // SAFETY: as promised by the caller.
    unsafe { device.write(found) };
    code::OK
}

/// # Safety
/// `text` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: usize, text: *mut c_char, length: u32) -> i32 {
    match Driver::read().device(device) {
        // SAFETY: as promised by the caller.
        Ok(found) => unsafe { write_text(&found.uuid, text, length) },
        Err(error) => error,
    }
}

/// # Safety
/// `text` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(device: usize, text: *mut c_char, length: u32) -> i32 {
    match Driver::read().device(device) {
        // SAFETY: as promised by the caller.
        Ok(found) => unsafe { write_text(&found.name, text, length) },
        Err(error) => error,
    }
}

/// # Safety
/// `memory` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: usize, memory: *mut Memory) -> i32 {
    hang(|driver| driver.hang_ms);
    let driver = Driver::read();
    let found = match driver.device(device) {
        Ok(found) => found,
        Err(error) => return error,
    };
    if found.memory != code::OK {
        return found.memory;
    }
    let held: u64 = driver.holdings(&found.uuid).iter().map(|h| h.bytes).sum();
    let used = found.baseline + held;
    // SAFETY: as promised by the caller; the version stays as it was set.
    unsafe {
        (*memory).total = found.total;
        (*memory).reserved = found.reserved;
        (*memory).used = used;
        (*memory).free = found.total.saturating_sub(used + found.reserved);
    }
    code::OK
}

/// # Safety
/// `to` has room for `length` bytes.
unsafe fn write_text(text: &str, to: *mut c_char, length: u32) -> i32 {
    let room = usize::try_from(length).unwrap_or(0);
    if text.len() >= room {
        return code::INSUFFICIENT_SIZE;
    }
    // SAFETY: the text and its closing zero fit, as just checked.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        to.add(text.len()).write(0);
    }
    code::OK
}
