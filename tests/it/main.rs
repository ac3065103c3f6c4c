//! Integration tests: the app with real stub workers.

mod api;
mod cli;
mod config;
mod failures;
mod memory;
mod proxy;
mod story;
mod stub;
mod support;
