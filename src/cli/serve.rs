//! `serve` and `check`: the commands that read the configuration.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::{CheckArgs, ServeArgs};
use crate::app::{self, App, ExitStatus, Heir, Options, Predecessor, Program, Signal};
use crate::config::{self, Config, Problems, Sources};
use crate::telemetry::{self, LogFormat};

/// Exit code of wrong use and of a configuration with errors.
pub(super) const WRONG_CONFIG: u8 = 2;
/// How long answers that are complete may take to reach their clients when nobody
/// serves any more.
const LAST_PIECES: Duration = Duration::from_secs(2);

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
    let predecessor = args.take_over.then(Predecessor::of_stdin).transpose()?;
    let config = match config::load(&sources) {
        Ok(config) => config,
        Err(problems) => {
            if let Some(predecessor) = predecessor {
                predecessor.fail(&problems.to_string());
            }
            return complain(&problems);
        }
    };
    let format = match config.server.log_format {
        config::LogFormat::Text => LogFormat::Text,
        config::LogFormat::Json => LogFormat::Json,
    };
    telemetry::init(format, &config.server.log_level)
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("set up logging")?;
    let options = Options {
        owns_process: true,
        program: Program::of_this_process()
            .inspect_err(|error| warn!(%error, "no other residentd can take over from this one"))
            .ok(),
        // While there is one thread.
        sockets: app::passed_sockets()?,
        inherited: predecessor.map(|p| p.inherit(&config)).transpose()?,
    };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(app::threads())
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(serve(sources, config, options))
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

async fn serve(sources: Sources, config: Config, options: Options) -> anyhow::Result<ExitCode> {
    for problem in config.warnings.iter() {
        warn!(%problem, "configuration");
    }
    // Before the first worker, so that no signal finds nobody listening.
    let mut signals = Signals::listen()?;
    let is_encrypted = config.tls.is_some();
    let app = App::start(sources, config, options).await?;
    let shown = |address| match app::address_text(address) {
        text if is_encrypted => text.replacen("http:", "https:", 1),
        text => text,
    };
    let own = app.admin_addresses().iter().map(shown);
    let own = own.map(|address| format!("{address} for operators"));
    for address in app.addresses().iter().map(shown).chain(own) {
        // Scripts wait for this line; logs go to standard error. Whoever started
        // this may have stopped to read by the time another one takes over.
        let line = format!("residentd is listening on {address}");
        if let Err(error) = writeln!(std::io::stdout().lock(), "{line}") {
            info!(%error, "{line}");
        }
    }
    loop {
        let heard = tokio::select! {
            heard = signals.next() => heard,
            heir = app.handed_over() => return follow(&app, &heir, signals).await,
            () = app.abandoned() => {
                warn!("the process that watched over this one has ended; this one ends too, and leaves workers to the next");
                app.close().await;
                return Ok(ExitCode::FAILURE);
            }
        };
        match heard {
            Signal::HUP => {
                info!("SIGHUP: reloading the configuration");
                app.reload();
            }
            Signal::USR2 => {
                info!("SIGUSR2: having another residentd take over");
                app.upgrade();
            }
            _ => break,
        }
    }
    info!("draining");
    let graceful = app.shutdown(app.grace());
    tokio::pin!(graceful);
    let mut at_once = false;
    let shortened = async |at_once: bool| match at_once {
        true => app.shutdown(Duration::ZERO).await,
        false => std::future::pending().await,
    };
    loop {
        tokio::select! {
            () = &mut graceful => break,
            () = shortened(at_once) => break,
            heir = app.handed_over() => {
                heir.signal(Signal::TERM);
                if at_once {
                    heir.signal(Signal::TERM);
                }
                return follow(&app, &heir, signals).await;
            }
            heard = signals.next() => match heard {
                Signal::HUP | Signal::USR2 => info!("residentd ends: no reload and no upgrade"),
                _ => at_once = true,
            }
        }
    }
    info!("ended");
    Ok(ExitCode::SUCCESS)
}

/// Another residentd has taken over: waits for the streams that are left here
/// and, where nobody else can watch over that one, for its end.
async fn follow(app: &App, heir: &Heir, mut signals: Signals) -> anyhow::Result<ExitCode> {
    let finished = app.finish(heir);
    tokio::pin!(finished);
    let (mut streams, mut runs, mut is_to_end) = (true, true, false);
    let ended = heir.exited();
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut finished, if streams => {
                info!("what came here before the upgrade has ended");
                streams = false;
                if heir.is_on_its_own() {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            status = &mut ended, if runs => {
                info!(%status, "the residentd that took over has ended");
                runs = false;
                if heir.is_on_its_own() {
                    continue;
                }
                if streams {
                    // The last pieces are on their way.
                    let _ = tokio::time::timeout(LAST_PIECES, &mut finished).await;
                }
                return Ok(match status {
                    ExitStatus::Code(code) => u8::try_from(code).unwrap_or(1).into(),
                    // As a shell tells of a signal.
                    ExitStatus::Signal(signal) => u8::try_from(128 + signal).unwrap_or(1).into(),
                    // The kernel tells its parent only, which may be another one that
                    // still has a stream.
                    ExitStatus::Unknown if is_to_end => ExitCode::SUCCESS,
                    ExitStatus::NotSpawned(_) | ExitStatus::Unknown => ExitCode::FAILURE,
                });
            }
            heard = signals.next() => {
                let ends = !matches!(heard, Signal::HUP | Signal::USR2);
                if heir.gets_signals() {
                    is_to_end |= ends;
                    heir.signal(heard);
                } else if ends {
                    info!("cutting what is left");
                    return Ok(ExitCode::SUCCESS);
                }
            }
        }
    }
}

/// The signals that are listened to.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    upgrade: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            hangup: signal(SignalKind::hangup()).context("listen for SIGHUP")?,
            upgrade: signal(SignalKind::user_defined2()).context("listen for SIGUSR2")?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.hangup.recv() => Signal::HUP,
            _ = self.upgrade.recv() => Signal::USR2,
        }
    }
}
