//! Integration tests: the app with real stub workers.

mod access_log;
mod adapter;
mod adopt;
mod api;
mod cli;
mod config;
mod events;
mod failures;
mod gpu;
mod memory;
mod patience;
mod pressure;
mod proxy;
mod replay;
mod scenarios;
mod simulate;
mod state;
mod story;
mod stub;
mod support;
mod worker;
