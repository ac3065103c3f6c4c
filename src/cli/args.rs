//! The command line: what can be written, and what each word turns into.
//! Whatever cannot be understood is turned away here, with exit code 2.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::access::AccessArgs;
use super::client::Server;
use super::settings::SettingArgs;
use crate::config::units;
use crate::model::{Bytes, EvictionPolicy, ModelName};

/// Decides which models are resident in memory.
#[derive(Debug, Parser)]
#[command(name = "residentd", version, arg_required_else_help = true)]
pub(super) struct CommandLine {
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Command,
}

/// What can be asked for.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Serve the configured models
    Serve(Box<ServeArgs>),
    /// Check the configuration and name every problem
    Check(CheckArgs),
    /// Show each model, its worker and its memory
    Ps(ClientArgs),
    /// Make a model ready
    Load(LoadArgs),
    /// End a model's worker, after the requests inside
    Unload(ModelArgs),
    /// Keep a model from being evicted to make room
    Pin(ModelArgs),
    /// Let a model be evicted again
    Unpin(ModelArgs),
    /// Unload idle models and say what came back
    Cleanup(CleanupArgs),
    /// Set or show the memory limit
    Limit(LimitArgs),
    /// Read the configuration anew and say what that changed, or what is wrong with it
    Reload(ReloadArgs),
    /// Have the program file that lies there now take over, without a stream or a model lost
    Upgrade(ClientArgs),
    /// Show what a model's worker printed
    Logs(LogsArgs),
    /// Show what was decided, and why
    Events(EventsArgs),
    /// Play recorded requests under a virtual clock: will these models fit?
    Simulate(Box<SimulateArgs>),
    /// End the workers of a residentd that dies; started by it
    #[command(hide = true)]
    Guard(GuardArgs),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Where the configuration comes from.
#[derive(Args, Clone, Debug, Default)]
pub struct CheckArgs {
    /// A file, or a folder whose *.toml are read in name order; may be repeated
    #[arg(long, value_name = "PATH")]
    pub config: Vec<PathBuf>,
}

/// What `serve` is told.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub check: CheckArgs,
    /// Address to listen on, as 127.0.0.1:8080 or unix:PATH; may be repeated
    #[arg(long, value_name = "ADDR")]
    pub listen: Vec<String>,
    /// Keys of the configuration file that are given here instead.
    #[command(flatten)]
    pub settings: SettingArgs,
    /// Take over from the residentd that starts this one; it says so itself
    #[arg(long, hide = true)]
    pub take_over: bool,
}

/// What a guard is told by the residentd that starts it.
#[derive(Args, Clone, Debug)]
pub(super) struct GuardArgs {
    /// Name of its state
    #[arg(long)]
    pub(super) state: String,
    /// Its pid
    #[arg(long)]
    pub(super) pid: i32,
    /// When it started, in clock ticks since the machine came up
    #[arg(long)]
    pub(super) start_time: u64,
    /// Log lines are JSON objects
    #[arg(long)]
    pub(super) json: bool,
    /// How much is logged
    #[arg(long)]
    pub(super) log_level: String,
}

/// What every command needs that talks to a running residentd.
#[derive(Args, Clone, Debug)]
pub(super) struct ClientArgs {
    /// Where residentd listens: http://HOST:PORT, https://HOST:PORT or unix:PATH
    #[arg(
        long,
        value_name = "URL",
        env = "RESIDENTD_SERVER",
        default_value = "http://127.0.0.1:8080"
    )]
    pub(super) server: Server,
    /// How to get in.
    #[command(flatten)]
    pub(super) access: AccessArgs,
    /// Print the server's answer as it came
    #[arg(long)]
    pub(super) json: bool,
}

/// One model.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// Name or alias of the model
    #[arg(value_name = "NAME", value_parser = model_name)]
    pub(super) model: ModelName,
    /// Whom to ask.
    #[command(flatten)]
    pub(super) client: ClientArgs,
}

/// What `load` is told.
#[derive(Args, Clone, Debug)]
pub(super) struct LoadArgs {
    /// Do not wait until the model is ready
    #[arg(long)]
    pub(super) no_wait: bool,
    /// Which model, and whom to ask.
    #[command(flatten)]
    pub(super) model: ModelArgs,
}

/// What `cleanup` is told.
#[derive(Args, Clone, Debug)]
pub(super) struct CleanupArgs {
    /// Every idle model, not only until there is no pressure
    #[arg(long, conflicts_with = "models")]
    pub(super) all: bool,
    /// Also busy models, after the requests inside
    #[arg(long)]
    pub(super) force: bool,
    /// Exactly this model; may be repeated
    #[arg(long = "model", value_name = "NAME", value_parser = model_name)]
    pub(super) models: Vec<ModelName>,
    /// Free at least this much, as 2GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) target: Option<Bytes>,
    /// Say what would be done and do nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Whom to ask.
    #[command(flatten)]
    pub(super) client: ClientArgs,
}

/// What `limit` is told.
#[derive(Args, Clone, Debug)]
pub(super) struct LimitArgs {
    /// The new limit, as 8GiB; without it the limit is shown
    #[arg(value_name = "SIZE", value_parser = size)]
    pub(super) size: Option<Bytes>,
    /// The limit of a GPU: index, gpu:INDEX or UUID
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// Keep it over restarts
    #[arg(long, requires = "size")]
    pub(super) persist: bool,
    /// Whom to ask.
    #[command(flatten)]
    pub(super) client: ClientArgs,
}

/// What `reload` is told.
#[derive(Args, Clone, Debug)]
pub(super) struct ReloadArgs {
    /// Say what would change and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Whom to ask.
    #[command(flatten)]
    pub(super) client: ClientArgs,
}

/// What `logs` is told.
#[derive(Args, Clone, Debug)]
pub(super) struct LogsArgs {
    /// How many of the last lines
    #[arg(short = 'n', long, value_name = "LINES", default_value_t = 100)]
    pub(super) lines: usize,
    /// Go on with the lines that come
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Which model, and whom to ask.
    #[command(flatten)]
    pub(super) model: ModelArgs,
}

/// What `events` is told.
#[derive(Args, Clone, Debug)]
pub(super) struct EventsArgs {
    /// How many of the last events
    #[arg(short = 'n', long, value_name = "EVENTS", default_value_t = 100)]
    pub(super) limit: usize,
    /// Go on with the events that come
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Those about this model only
    #[arg(long, value_name = "NAME", value_parser = model_name)]
    pub(super) model: Option<ModelName>,
    /// Of this kind only, as evict or refuse; may be repeated
    #[arg(long = "kind", value_name = "KIND")]
    pub(super) kinds: Vec<String>,
    /// Those after the event with this id
    #[arg(long, value_name = "ID")]
    pub(super) since: Option<String>,
    /// Whom to ask.
    #[command(flatten)]
    pub(super) client: ClientArgs,
}

/// What `simulate` is told.
#[derive(Args, Clone, Debug)]
pub(super) struct SimulateArgs {
    /// Requests: a CSV file with timestamp_ms, model_id and duration_ms
    #[arg(
        long,
        value_name = "FILE",
        requires = "models",
        required_unless_present = "log",
        conflicts_with = "log"
    )]
    pub(super) trace: Option<PathBuf>,
    /// Models: a CSV file with model_id, size_mib and load_cold_ms
    #[arg(long, value_name = "FILE", requires = "trace")]
    pub(super) models: Option<PathBuf>,
    /// Requests: residentd's own access log; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(super) log: Vec<PathBuf>,
    /// Models: the configuration, with what was learned of them; may be repeated
    #[arg(long, value_name = "PATH", requires = "log")]
    pub(super) config: Vec<PathBuf>,
    /// A limit to play with, as 64GiB; may be repeated
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) limit: Vec<Bytes>,
    /// Limits from one to another, as limit=4GiB..64GiB, or with a step as limit=4GiB..64GiB/4GiB
    #[arg(long, value_name = "RANGE")]
    pub(super) sweep: Option<Sweep>,
    /// Who goes to make room, lru or cost; several with commas between
    #[arg(long, value_name = "POLICY", value_delimiter = ',', value_parser = policy)]
    pub(super) policy: Vec<EvictionPolicy>,
    /// How long a request waits before busy models are drained for it, as 5s
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(super) patience: Option<Duration>,
    /// One request after another, whatever they take: only loads count
    #[arg(long)]
    pub(super) serial: bool,
    /// Which memory is short: on a GPU one model loads at a time. Of a configuration without GPUs
    /// it is the host's, else a GPU's
    #[arg(long, value_enum)]
    pub(super) device: Option<Device>,
    /// How much more memory to look at
    #[arg(long, value_name = "SIZE", default_value = "16GiB", value_parser = size)]
    pub(super) more: Bytes,
    /// Print the figures as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Draw the figures into an SVG file
    #[arg(long, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
}

/// Which memory is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Device {
    /// Host RAM
    Host,
    /// One GPU
    Gpu,
}

/// Limits from one to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sweep {
    pub(super) from: Bytes,
    pub(super) to: Bytes,
    pub(super) step: Option<Bytes>,
}

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fix = "write limit=FROM..TO or limit=FROM..TO/STEP, as limit=4GiB..64GiB/4GiB";
        let range = text.strip_prefix("limit=").ok_or(fix)?;
        let (from, rest) = range.split_once("..").ok_or(fix)?;
        let (to, step) = match rest.split_once('/') {
            Some((to, step)) => (to, Some(size(step)?)),
            None => (rest, None),
        };
        let (from, to) = (size(from)?, size(to)?);
        if from > to {
            return Err(format!(
                "{from} is more than {to}; write the smaller one first"
            ));
        }
        let runs = step.map_or(0, |step| (to - from).get() / step.get());
        if runs > MOST_STEPS {
            return Err(format!("that is {runs} limits; write a larger step"));
        }
        Ok(Self { from, to, step })
    }
}

fn policy(text: &str) -> Result<EvictionPolicy, String> {
    EvictionPolicy::from_name(text).ok_or_else(|| "it is no policy; write lru or cost".to_owned())
}

fn time(text: &str) -> Result<Duration, String> {
    units::duration(text).map_err(|complaint| complaint.to_string())
}

/// Limits of one sweep at most.
const MOST_STEPS: u64 = 1000;

fn model_name(text: &str) -> Result<ModelName, String> {
    ModelName::new(text).map_err(|error| error.to_string())
}

/// Parses `8GiB`, `1.5 GB` or a plain number of bytes, above zero.
fn size(text: &str) -> Result<Bytes, String> {
    match units::size(text) {
        Ok(Bytes::ZERO) => Err("a size is above zero".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(complaint) => Err(complaint.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        let words = ["residentd"].into_iter().chain(line.split_whitespace());
        CommandLine::try_parse_from(words).map(|line| line.command)
    }

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn a_size_has_a_unit_of_1024_or_1000() {
        assert_eq!(size("8GiB"), Ok(Bytes::gib(8)));
        assert_eq!(size("1.5 KiB"), Ok(Bytes(1536)));
        assert_eq!(size("2GB"), Ok(Bytes(2_000_000_000)));
        assert_eq!(size("4096"), Ok(Bytes(4096)));
        for bad in ["", "0", "-1", "1gib", "GiB", "1.2.3", "nan", "inf", "1e9"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn wrong_use_is_exit_code_2() {
        for line in [
            "frobnicate",
            "load",
            "load a,b",
            "cleanup --all --model a",
            "limit much",
            "limit --persist",
            "logs gemma -n many",
            "events -n many",
            "events --model a,b",
            "ps --server ftp://example.org",
            "completions tcsh",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}: {error}");
        }
    }

    #[test]
    fn what_serve_is_told_keeps_its_key() {
        let line =
            "serve --config a.toml --config b --listen unix:/x --limit 8GiB --log-level debug";
        let Ok(Command::Serve(args)) = parse(line) else {
            panic!("serve parses");
        };
        assert_eq!(args.check.config.len(), 2);
        assert_eq!(args.listen, ["unix:/x"]);
        assert_eq!(
            args.settings.given(),
            [("server.log_level", "debug"), ("memory.limit", "8GiB")]
        );
    }
}
