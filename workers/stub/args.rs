//! The command line of the stub worker: every knob that is set at start.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser, ValueEnum};

use crate::size;
use crate::sleep::Fault;

/// A scriptable worker: a real process that loads, holds memory, answers HTTP
/// and misbehaves as told. Sizes are written 64MiB, durations 200ms.
#[derive(Clone, Debug, Parser)]
#[command(name = "stub-worker", version, max_term_width = 100)]
pub(crate) struct Args {
    /// Signature: every answer carries it, with the pid.
    #[arg(long, default_value = "stub")]
    pub(crate) name: String,

    /// TCP port; 0 takes a free one, which the first line of output tells.
    #[arg(long, default_value_t = 0, conflicts_with = "socket")]
    pub(crate) port: u16,
    /// Port that takes calls of gRPC; the other one then takes none.
    #[arg(long)]
    pub(crate) grpc_port: Option<u16>,
    /// Address to bind.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Listen on this Unix socket instead of TCP.
    #[arg(long)]
    pub(crate) socket: Option<PathBuf>,

    /// Loading takes at least this long, counted from the start.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub(crate) ready_after: Duration,
    /// Load for ever.
    #[arg(long)]
    pub(crate) never_ready: bool,
    /// Whether connections are refused while loading, or answered 503.
    #[arg(long, value_enum, default_value_t = Listen::Early)]
    pub(crate) listen: Listen,
    /// Print a line when ready.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1,
        default_missing_value = "true")]
    pub(crate) ready_line: bool,
    /// When ready, say so to the socket in `NOTIFY_SOCKET`, as `sd_notify` does.
    #[arg(long)]
    pub(crate) notify: bool,
    /// Where to.
    #[arg(long, env = "NOTIFY_SOCKET")]
    pub(crate) notify_socket: Option<PathBuf>,
    /// Print nothing at all.
    #[arg(long)]
    pub(crate) silent: bool,
    /// Write the moment of the first possible answer to this file, as JSON
    /// with `monotonic_ns` and `unix_ns`.
    #[arg(long)]
    pub(crate) ready_stamp: Option<PathBuf>,

    /// Anonymous memory to touch and hold.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) anon: u64,
    /// Take it 2 MiB at a time, with this pause after each.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub(crate) anon_pause: Duration,
    /// File to map shared and read-only, every page touched.
    #[arg(long)]
    pub(crate) map: Option<PathBuf>,
    /// Shared memory (a memfd) to touch and hold.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) shm: u64,
    /// Anonymous memory added by each request.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) grow: u64,
    /// Most memory that requests add together.
    #[arg(long, default_value = "1GiB", value_parser = size::parse)]
    pub(crate) grow_max: u64,

    /// Memory to claim on each visible GPU of the fake driver in `--vram-dir`.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) vram: u64,
    /// The same for each child.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) child_vram: u64,
    /// Folder of the fake driver; nothing is claimed without it.
    #[arg(long)]
    pub(crate) vram_dir: Option<PathBuf>,
    /// UUIDs of the visible GPUs.
    #[arg(long, env = "CUDA_VISIBLE_DEVICES", value_delimiter = ',')]
    pub(crate) gpus: Vec<String>,
    /// A line for the file in which residentd lets workers report their own
    /// GPU memory, as "gpu:0 1000000".
    #[arg(long)]
    pub(crate) report: Option<String>,
    /// That file.
    #[arg(long, env = "RESIDENTD_REPORT")]
    pub(crate) report_file: Option<PathBuf>,

    /// Offer `/sleep` and `/wake_up`, as vLLM, and `/release_memory_occupation` and
    /// `/resume_memory_occupation`, as SGLang: memory is given back and taken
    /// again. Asked anything else meanwhile, the worker dies.
    #[arg(long)]
    pub(crate) sleep_mode: bool,
    /// Anonymous memory held while asleep.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) sleep_anon: u64,
    /// Memory held of each GPU while asleep.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) sleep_vram: u64,
    /// Going to sleep and waking each take at least this long.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub(crate) sleep_time: Duration,
    /// How going to sleep goes wrong.
    #[arg(long, value_enum, default_value_t = Fault::None)]
    pub(crate) sleep_fault: Fault,
    /// How waking goes wrong.
    #[arg(long, value_enum, default_value_t = Fault::None)]
    pub(crate) wake_fault: Fault,

    /// Ignore SIGTERM.
    #[arg(long)]
    pub(crate) ignore_term: bool,
    /// Time from SIGTERM to the exit.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub(crate) slow_exit: Duration,
    /// After SIGTERM exit only when no request is in flight; a second SIGTERM
    /// exits at once with code 1. So does llama-server.
    #[arg(long)]
    pub(crate) finish_requests: bool,

    /// Start a child in the same process group that only holds memory.
    #[arg(long)]
    pub(crate) child: bool,
    /// Start such a process by a double fork, in a session of its own.
    #[arg(long)]
    pub(crate) daemon_child: bool,
    /// Anonymous memory of each child.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    pub(crate) child_anon: u64,
    /// The children ignore SIGTERM.
    #[arg(long)]
    pub(crate) child_ignore_term: bool,
    /// Name of the process in `/proc/PID/comm`, at most 15 bytes.
    #[arg(long)]
    pub(crate) comm: Option<String>,

    /// Exit this long after the start.
    #[arg(long, value_parser = duration)]
    pub(crate) exit_after: Option<Duration>,
    /// Code of an exit that a knob asked for.
    #[arg(long, default_value_t = 1)]
    pub(crate) exit_code: u8,
    /// Print a few lines to standard error and exit at once.
    #[arg(long)]
    pub(crate) crash_on_start: bool,
    /// Exit after this many answered requests.
    #[arg(long)]
    pub(crate) die_after_requests: Option<u64>,
    /// Answer this many requests, then only `/health` and `/stats`.
    #[arg(long)]
    pub(crate) hang_after_requests: Option<u64>,
    /// Answer this many requests, then stop listening and live on.
    #[arg(long)]
    pub(crate) close_after_requests: Option<u64>,
    /// Answer this many requests, then take connections and never answer.
    #[arg(long)]
    pub(crate) mute_after_requests: Option<u64>,
    /// A file of words that are looked at at the start, at each request and at SIGTERM, as long
    /// as they stand there: crash, never-ready, hang, ignore-term, grow=SIZE; pid=N: only there.
    #[arg(long)]
    pub(crate) orders: Option<PathBuf>,
    /// Add a line to this file for each completion or chat that has an `x_id`.
    #[arg(long)]
    pub(crate) journal: Option<PathBuf>,
    /// Print this many lines while loading.
    #[arg(long, default_value_t = 0)]
    pub(crate) spam_lines: u64,
    /// Length of those lines.
    #[arg(long, default_value_t = 80)]
    pub(crate) spam_width: usize,

    /// Serve nothing, only hold memory: what the children run.
    #[arg(long)]
    pub(crate) idle: bool,
    /// Start the idle process in a new session, print its pid and exit.
    #[arg(long, hide = true)]
    pub(crate) daemonize: bool,
}

/// What a client sees while the worker loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Listen {
    /// Connections are refused until the worker is ready.
    Late,
    /// The worker answers 503 until it is ready, as llama-server does.
    Early,
}

/// Reads `250us`, `200ms`, `2s`, `1.5m`; a bare number is in seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}, use us, ms, s, m or h")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a duration such as 200ms"))?;
    Duration::try_from_secs_f64(number * seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("250us"), Ok(Duration::from_micros(250)));
        assert_eq!(duration("200ms"), Ok(Duration::from_millis(200)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("3"), Ok(Duration::from_secs(3)));
        assert!(duration("3 parsecs").is_err());
        assert!(duration("ms").is_err());
    }

    #[test]
    fn the_ready_line_can_be_switched_off() {
        let line = |args: &[&str]| Args::parse_from(args).ready_line;
        assert!(line(&["stub-worker"]));
        assert!(line(&["stub-worker", "--ready-line"]));
        assert!(!line(&["stub-worker", "--ready-line=false"]));
    }
}
