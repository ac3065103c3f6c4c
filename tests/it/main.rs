//! Integration tests: the app with real stub workers.

mod access;
mod access_log;
mod adapter;
mod adopt;
mod api;
mod cli;
mod config;
mod deaths;
mod events;
mod failures;
mod gpu;
mod liveness;
mod memory;
mod observed;
mod patience;
mod policies;
mod prefetch;
mod pressure;
mod proxy;
mod reload;
mod replay;
mod scenarios;
mod shutdown;
mod simulate;
mod state;
mod story;
mod stub;
mod support;
#[path = "../../benches/traffic.rs"]
mod traffic;
mod upgrade;
mod worker;
