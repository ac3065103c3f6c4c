//! GPUs, by a fake driver library and real processes.

mod ladder;
mod placed;
mod trouble;
