//! The command line: `serve` and `check` here, and the commands that ask a
//! running residentd over its REST API.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong use or configuration.

mod access;
mod args;
mod client;
mod events;
mod logs;
mod memory;
mod models;
mod output;
mod ps;
mod reload;
pub mod serve;
mod settings;
mod simulate;
mod upgrade;

use std::process::ExitCode;

use anyhow::Context;
pub use args::{CheckArgs, ServeArgs};
use args::{Command, CommandLine, GuardArgs};
use clap::{CommandFactory, Parser};
pub use client::Server;
use client::{Answer, CallError};
use output::OutputError;
pub use settings::SettingArgs;

use crate::app;
use crate::telemetry::{self, LogFormat};

/// Does what the command line says.
#[must_use]
pub fn run() -> ExitCode {
    let command = match CommandLine::try_parse() {
        Ok(line) => line.command,
        Err(error) => {
            // Help goes to standard output, mistakes to standard error; with
            // neither open there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match dispatch(command) {
        Ok(code) => code,
        Err(error) => {
            let closed = error.downcast_ref::<OutputError>();
            if closed.is_some_and(OutputError::is_closed_pipe) {
                return ExitCode::SUCCESS;
            }
            output::complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => serve::run(&args),
        Command::Check(args) => serve::check(&args),
        Command::Simulate(args) => simulate::run(&args),
        Command::Guard(args) => guard(&args),
        Command::Completions { shell } => completions(shell),
        asking => block_on(ask(asking)),
    }
}

async fn ask(command: Command) -> anyhow::Result<ExitCode> {
    let json = wants_json(&command);
    let done = match command {
        Command::Ps(args) => ps::ps(args).await,
        Command::Load(args) => models::load(args).await,
        Command::Unload(args) => models::act(args, "unload").await,
        Command::Pin(args) => models::act(args, "pin").await,
        Command::Unpin(args) => models::act(args, "unpin").await,
        Command::Cleanup(args) => memory::cleanup(args).await,
        Command::Limit(args) => memory::limit(args).await,
        Command::Reload(args) => reload::reload(args).await,
        Command::Upgrade(args) => upgrade::upgrade(args).await,
        Command::Logs(args) => logs::logs(args).await,
        Command::Events(args) => events::events(args).await,
        Command::Serve(_)
        | Command::Check(_)
        | Command::Simulate(_)
        | Command::Guard(_)
        | Command::Completions { .. } => Ok(()),
    };
    let Err(error) = done else {
        return Ok(ExitCode::SUCCESS);
    };
    let Some(refused @ CallError::Refused { body, .. }) = error.downcast_ref() else {
        return Err(error);
    };
    if json {
        output::write_text(body)?;
    } else {
        output::complain(&error);
    }
    Ok(match refused.is_wrong_config() {
        true => ExitCode::from(serve::WRONG_CONFIG),
        false => ExitCode::FAILURE,
    })
}

fn wants_json(command: &Command) -> bool {
    match command {
        Command::Ps(client) | Command::Upgrade(client) => client.json,
        Command::Load(args) => args.model.client.json,
        Command::Unload(args) | Command::Pin(args) | Command::Unpin(args) => args.client.json,
        Command::Cleanup(args) => args.client.json,
        Command::Limit(args) => args.client.json,
        Command::Reload(args) => args.client.json,
        Command::Logs(args) => args.model.client.json,
        Command::Events(args) => args.client.json,
        Command::Simulate(args) => args.json,
        Command::Serve(_) | Command::Check(_) | Command::Guard(_) | Command::Completions { .. } => {
            false
        }
    }
}

/// Prints an answer: as it came, or as `shown` turns it into words.
fn show(
    answer: &Answer,
    json: bool,
    shown: impl FnOnce(&Answer) -> Result<String, CallError>,
) -> anyhow::Result<()> {
    if json {
        output::write_text(&answer.body)?;
    } else {
        output::write_text(&shown(answer)?)?;
    }
    Ok(())
}

fn guard(args: &GuardArgs) -> anyhow::Result<ExitCode> {
    let format = if args.json {
        LogFormat::Json
    } else {
        LogFormat::Text
    };
    telemetry::init(format, &args.log_level)
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("set up logging")?;
    app::keep_guard(args.state.clone(), args.pid, args.start_time)
        .context("guard the workers of a residentd")?;
    Ok(ExitCode::SUCCESS)
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut CommandLine::command(), "residentd", &mut script);
    output::write(&script)?;
    Ok(ExitCode::SUCCESS)
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(work)
}
