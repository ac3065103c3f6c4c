//! `serve` and `check`: the commands that read the configuration.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::{CheckArgs, ServeArgs};
use crate::app::{self, App, Options};
use crate::config::{self, Config, Problems, Sources};
use crate::telemetry::{self, LogFormat};

/// Exit code of wrong use and of a configuration with errors.
pub(super) const WRONG_CONFIG: u8 = 2;
/// Threads of the data path at most; more gain nothing on one box.
const MOST_THREADS: usize = 4;

/// Serves the configured models until a signal ends it.
///
/// # Errors
/// When the configuration's addresses or state folder cannot be used.
pub fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let given = args.settings.given().into_iter();
    let mut flags: Vec<_> = given
        .map(|(key, text)| (key.to_owned(), text.to_owned()))
        .collect();
    if !args.listen.is_empty() {
        flags.push(("server.listen".to_owned(), args.listen.join(",")));
    }
    let sources = sources(&args.check, flags)?;
    let config = match config::load(&sources) {
        Ok(config) => config,
        Err(problems) => return complain(&problems),
    };
    let format = match config.server.log_format {
        config::LogFormat::Text => LogFormat::Text,
        config::LogFormat::Json => LogFormat::Json,
    };
    telemetry::init(format, &config.server.log_level)
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("set up logging")?;
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, MOST_THREADS);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(serve(sources, config))
}

/// Reads the configuration and names every problem.
///
/// # Errors
/// When this process's working directory cannot be read.
pub fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    match config::load(&sources(args, Vec::new())?) {
        Ok(config) => {
            if !config.warnings.is_empty() {
                writeln!(std::io::stderr().lock(), "{}", config.warnings)?;
            }
            let count = config.models.len();
            let models = if count == 1 { "model" } else { "models" };
            writeln!(
                std::io::stdout().lock(),
                "the configuration is valid: {count} {models}"
            )?;
            Ok(ExitCode::SUCCESS)
        }
        Err(problems) => complain(&problems),
    }
}

/// Where the configuration of this process comes from.
///
/// # Errors
/// When its working directory cannot be read.
pub(super) fn sources(args: &CheckArgs, flags: Vec<(String, String)>) -> anyhow::Result<Sources> {
    Sources::of_process(args.config.clone(), flags).context("read the working directory")
}

fn complain(problems: &Problems) -> anyhow::Result<ExitCode> {
    writeln!(std::io::stderr().lock(), "{problems}")?;
    Ok(ExitCode::from(WRONG_CONFIG))
}

async fn serve(sources: Sources, config: Config) -> anyhow::Result<ExitCode> {
    for problem in config.warnings.iter() {
        warn!(%problem, "configuration");
    }
    // Before the first worker, so that no signal finds nobody listening.
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let options = Options { owns_process: true };
    let app = App::start(sources, config, options).await?;
    for address in app.addresses() {
        // Scripts wait for this line; logs go to standard error.
        writeln!(
            std::io::stdout().lock(),
            "residentd is listening on {}",
            app::address_text(address)
        )?;
    }
    loop {
        tokio::select! {
            _ = terminate.recv() => info!("SIGTERM: draining"),
            _ = interrupt.recv() => info!("SIGINT: draining"),
            _ = hangup.recv() => {
                info!("SIGHUP: reloading the configuration");
                app.reload();
                continue;
            }
        }
        break;
    }
    let graceful = app.shutdown(app.grace());
    tokio::pin!(graceful);
    tokio::select! {
        () = &mut graceful => {}
        _ = terminate.recv() => app.shutdown(std::time::Duration::ZERO).await,
        _ = interrupt.recv() => app.shutdown(std::time::Duration::ZERO).await,
    }
    info!("ended");
    Ok(ExitCode::SUCCESS)
}
