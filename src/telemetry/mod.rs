//! Logs, and what every task needs of them: tracing set-up, the printer of
//! error chains, and spawning with a name.

mod otlp;

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io::IsTerminal;
use std::sync::OnceLock;

pub use otlp::{Traces, TracesError};
use tokio::runtime::{Handle, RuntimeFlavor};
use tracing::Instrument;
use tracing_subscriber::{EnvFilter, reload};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error. `level` is a level or a filter such as
/// `info,residentd::worker=debug`. A second call in one process changes
/// nothing.
///
/// # Errors
/// The text of what is wrong with `level`.
pub fn init(format: LogFormat, level: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|error| error.to_string())?;
    let mut builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if !std::io::stderr().is_terminal() {
        // Colours only where they are seen; `NO_COLOR` is respected anyway.
        builder = builder.with_ansi(false);
    }
    // A logger set earlier in this process stays: tests start several apps.
    let done = match format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            let done = builder.try_init();
            done.map(|()| keep(move |filter| handle.reload(filter)))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            let done = builder.try_init();
            done.map(|()| keep(move |filter| handle.reload(filter)))
        }
    };
    let _ = done;
    Ok(())
}

/// Changes what is logged from now on, as [`init`] takes it. Without a logger
/// of ours nothing changes.
///
/// # Errors
/// The text of what is wrong with `level`.
pub fn set_level(level: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|error| error.to_string())?;
    match FILTER.get() {
        Some(change) => change(filter).map_err(|error| error.to_string()),
        None => Ok(()),
    }
}

type ChangeFilter = dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync;

/// Changes the filter of the logger that [`init`] made.
static FILTER: OnceLock<Box<ChangeFilter>> = OnceLock::new();

fn keep(change: impl Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync + 'static) {
    // There is one logger in a process, made once.
    let _ = FILTER.set(Box::new(change));
}

/// Shows an error with all its causes: `outer: inner: innermost`.
#[must_use]
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(error)
}

/// See [`chain`].
#[derive(Debug)]
pub struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Spawns a task that logs under `name`. The handle may be dropped: the task
/// runs on and ends by itself or by a message.
pub fn spawn<F>(name: &'static str, task: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    spawn_in(tracing::info_span!(parent: None, "task", name), task)
}

fn spawn_in<F>(span: tracing::Span, task: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the wrapper that names the task"
    )]
    match span.is_disabled() {
        true => tokio::spawn(task),
        false => tokio::spawn(task.instrument(span)),
    }
}

/// As [`spawn`], for tasks of which there is one for each connection: they take
/// turns so often that their name is kept at level `debug` only.
pub fn spawn_often<F>(name: &'static str, task: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    spawn_in(tracing::debug_span!(parent: None, "task", name), task)
}

/// Does in a task what may wait for the disk, on the thread that the task is on:
/// other tasks go on elsewhere, and nobody has to be woken to begin or to go on.
/// In a runtime of one thread, as in tests, they wait.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("read {path}")]
    struct Outer {
        path: &'static str,
        source: std::io::Error,
    }

    #[test]
    fn a_chain_prints_every_cause_once() {
        let error = Outer {
            path: "a.toml",
            source: std::io::Error::other("disk on fire"),
        };
        assert_eq!(chain(&error).to_string(), "read a.toml: disk on fire");
    }
}
