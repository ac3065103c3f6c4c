//! residentd as a proxy beside nginx, haproxy and the worker itself, in paired
//! rounds: `docs/benchmarks/README.md` says how, and how to read what it prints.
//!
//! ```text
//! cargo bench --bench proxy -- [ROW]... [--short] [--json FILE] [--peer PATH | --peer COMMAND]...
//! ```

mod admin;
mod bare;
mod calls;
mod cost;
mod load;
mod memory;
mod peers;
mod report;
mod requests;
mod streams;
mod training;
mod uploads;
mod wire;
mod worker;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::load::MODEL;
use crate::peers::Target;
use crate::report::{Report, Rounds, Visit, say};

type Row = fn(&Options, &mut Report) -> io::Result<()>;
/// What is measured, by the names of its goals.
const ROWS: [(&[&str], Row); 6] = [
    (&requests::ROWS, requests::run),
    (&["S03"], streams::run),
    (&["S04"], memory::run),
    (&["S05"], uploads::run),
    (&["S06"], calls::run),
    (&["S22"], admin::run),
];
/// What another residentd is called.
const BEFORE: &str = "before";

/// Measures residentd as a proxy.
#[derive(Debug, Parser)]
#[command(name = "proxy")]
pub(crate) struct Options {
    #[command(subcommand)]
    role: Option<Role>,
    /// Rows to run, such as S03, or one part of S01 and S02, such as S01-64; all without
    /// any.
    rows: Vec<String>,
    /// Three rounds and goals twice as wide: whether it works, on any machine.
    #[arg(long)]
    short: bool,
    /// Rounds of every row.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Passes of a round over visits that are short, half as many over streams: the
    /// more, the less what else runs on the machine matters.
    #[arg(long, default_value_t = 4)]
    passes: usize,
    /// Adds all that is measured to this file, as JSON lines.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Another proxy: a program that takes `--listen ADDR --upstream ADDR`, or a
    /// command in which {listen} and {upstream} stand where these go.
    #[arg(long)]
    peer: Vec<String>,
    /// The residentd that is measured; its build without what tests need is what is
    /// shipped.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_residentd"))]
    residentd: PathBuf,
    /// Another residentd, of before a change, as one more target.
    #[arg(long)]
    before: Option<PathBuf>,
    /// What cargo says.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

/// What else this program is.
#[derive(Debug, Subcommand)]
enum Role {
    /// The worker behind every target.
    Worker {
        #[arg(long)]
        port: u16,
    },
    /// The least proxy that hyper makes.
    Bare {
        #[arg(long)]
        listen: String,
        #[arg(long)]
        upstream: String,
    },
    /// Traffic for a residentd that is to learn from it what is often run.
    Train,
}

impl Options {
    fn wants(&self, row: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|wanted| wanted == row)
    }

    /// Returns how many rounds there are of visits that are short, and their passes.
    fn rounds(&self) -> (usize, usize) {
        (self.rounds, self.passes)
    }

    /// Returns the names of the peers that were given.
    fn peers(&self) -> Vec<String> {
        let given = self.peer.iter().map(|peer| peers::name(peer));
        let before = self.before.iter().map(|_| BEFORE.to_owned());
        given.chain(before).collect()
    }
}

/// All that answer small requests, one worker behind them all.
#[derive(Debug)]
struct Stage(Vec<Target>);

impl Stage {
    /// Starts every target; `server` are lines of residentd's configuration.
    fn new(options: &Options, report: &mut Report, server: &str) -> Self {
        let residentd = peers::residentd(&options.residentd, server, 1, false);
        let worker = peers::whoami(&residentd.address, MODEL);
        let mut targets = vec![residentd];
        for (name, peer) in [
            ("nginx", peers::nginx(&worker)),
            ("haproxy", peers::haproxy(&worker)),
        ] {
            match peer {
                Some(peer) => targets.push(peer),
                None => report.skip(
                    name,
                    "it is neither installed nor fetched by scripts/setup-peers",
                ),
            }
        }
        targets.extend(before(options, server));
        targets.extend(options.peer.iter().map(|peer| peers::other(peer, &worker)));
        targets.push(Target::direct(worker));
        Self(targets)
    }

    fn rounds(
        &self,
        rounds: (usize, usize),
        visit: impl FnMut(&Target) -> io::Result<Visit>,
    ) -> io::Result<Rounds> {
        Rounds::run(rounds, &self.0, |target| &target.name, visit)
    }
}

/// Starts the residentd of before a change, if one was given, with the same lines of
/// configuration.
fn before(options: &Options, server: &str) -> Option<Target> {
    let binary = options.before.as_ref()?;
    let mut target = peers::residentd(binary, server, 1, false);
    peers::whoami(&target.address, MODEL);
    BEFORE.clone_into(&mut target.name);
    Some(target)
}

/// Returns the runtime that asks: one thread, so that it is no proxy's rival for
/// more than a core.
fn driver() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().expect("a runtime")
}

fn main() -> ExitCode {
    // `cargo test --benches` asks for a list; nothing here is a test.
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    let mut options = Options::parse();
    allow_many_files();
    match options.role.take() {
        Some(Role::Worker { port }) => worker::run(worker::serve(port)),
        Some(Role::Bare { listen, upstream }) => bare::run(&listen, &upstream),
        Some(Role::Train) => return train(&options),
        None => return measure(options),
    }
    ExitCode::SUCCESS
}

/// A thousand streams need that many files here, and twice as many in a proxy.
fn allow_many_files() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("it can be read");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("up to the hard limit");
}

fn train(options: &Options) -> ExitCode {
    match training::run(&options.residentd) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("VOID training: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn measure(mut options: Options) -> ExitCode {
    if options.short {
        options.rounds = 3;
    }
    if let Some(row) = options.rows.iter().find(|row| !knows(row)) {
        let known: Vec<_> = ROWS.iter().flat_map(|(names, _)| *names).copied().collect();
        say(&format!(
            "there is no row {row}; there are {}",
            known.join(" ")
        ));
        return ExitCode::FAILURE;
    }
    let file = options.json.as_ref().map(|path| {
        let file = File::options().append(true).create(true).open(path);
        file.expect("results can be written there")
    });
    let mut report = Report::new(file, if options.short { 2.0 } else { 1.0 });
    tell_machine(&options, &mut report);
    for (names, row) in ROWS {
        let is_run = names.iter().any(|name| options.wants(name));
        if is_run && let Err(error) = row(&options, &mut report) {
            report.void(&names.join("+"), &error.to_string());
        }
    }
    // The long form is read by people, who see what was missed.
    match options.short && report.missed() > 0 {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

fn knows(row: &str) -> bool {
    ROWS.iter().any(|(names, _)| names.contains(&row))
}

/// Tells what a result depends on beside the programs.
fn tell_machine(options: &Options, report: &mut Report) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let of = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        text.unwrap_or_default().trim().to_owned()
    };
    let cpu = read("/proc/cpuinfo");
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "));
    let run = json!({
        "date": of("date", &["-u", "+%FT%TZ"]),
        "commit": of("git", &["rev-parse", "--short=10", "HEAD"]),
        "dirty": !of("git", &["status", "--porcelain", "--", "src", "benches", "Cargo.lock"]).is_empty(),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": cpu,
        "load_average": read("/proc/loadavg").trim(),
        "residentd": env!("CARGO_PKG_VERSION"),
        "nginx": peers::version("nginx"),
        "haproxy": peers::version("haproxy"),
        "threads_of_each_proxy": peers::threads(),
        "rounds": options.rounds,
        "passes": options.passes,
        "goals_times": if options.short { 2 } else { 1 },
    });
    say(&format!("# {run}"));
    report.keep(&json!({"run": run}));
}
