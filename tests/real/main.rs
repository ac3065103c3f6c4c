//! The main job with real engines and real models. Run by `scripts/real`,
//! which installs them first.

mod quickstart;
#[path = "../it/support/mod.rs"]
#[expect(dead_code, reason = "shared with the other integration tests")]
mod support;
mod tiny;
