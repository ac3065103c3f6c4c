//! A stand-in for NVIDIA's `libnvidia-ml.so.1` that follows real processes.
//!
//! Tests copy the library into a folder, say there how the driver is to behave
//! and who holds how much, and let residentd load it through the real bindings.

#![expect(unreachable_pub, reason = "the names and the linkage are NVML's")]

mod driver;
mod processes;
mod totals;
