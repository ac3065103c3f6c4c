//! Logs, and what every task needs of them: tracing set-up, the printer of
//! error chains, and spawning with a name.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io::IsTerminal;

use tracing::Instrument;
use tracing_subscriber::EnvFilter;

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
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
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
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the wrapper that names the task"
    )]
    tokio::spawn(task.instrument(tracing::info_span!(parent: None, "task", name)))
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
