//! Integration tests: the app with real stub workers.

mod adapter;
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
mod story;
mod stub;
mod support;
mod worker;
