//! GPUs, by a fake driver library and real processes.

mod ladder;
pub(crate) mod parked;
mod placed;
mod trouble;
