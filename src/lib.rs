//! residentd decides which models are resident in memory. See ARCHITECTURE.md.

pub mod api;
pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod gate;
pub mod grpc;
pub mod memory;
pub mod model;
pub mod policy;
pub mod procfs;
pub mod proxy;
pub mod reply;
pub mod simulate;
pub mod store;
pub mod telemetry;
pub mod template;
pub mod worker;
