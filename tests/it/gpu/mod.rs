//! GPUs, by a fake driver library and real processes.

mod ladder;
mod parked;
mod placed;
mod trouble;
