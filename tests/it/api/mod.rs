//! The REST API over a snapshot built by hand, and a controller that the test
//! plays itself.

mod events;
mod fixtures;
mod guard;
mod metrics;
mod models;
pub(crate) mod world;
