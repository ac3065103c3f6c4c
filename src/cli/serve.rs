//! `serve` and `check`.

use std::process::ExitCode;

use anyhow::bail;

use super::{CheckArgs, ServeArgs};

/// Serves the configured models.
///
/// # Errors
/// Always: this build has no server.
pub fn run(_args: &ServeArgs) -> anyhow::Result<ExitCode> {
    bail!("serve is not wired in this build")
}

/// Checks the configuration.
///
/// # Errors
/// Always: this build has no configuration.
pub fn check(_args: &CheckArgs) -> anyhow::Result<ExitCode> {
    bail!("check is not wired in this build")
}
