//! The same driver as `lib.rs` of an older time: it has no functions for
//! processes and MIG.

#![expect(
    unreachable_pub,
    dead_code,
    reason = "the names and the linkage are NVML's, and half of the driver is not used"
)]

mod driver;
mod totals;
