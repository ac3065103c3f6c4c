//! What the user wants, read and checked.
//!
//! A [`Config`] can only be had from [`load`], so whoever holds one knows
//! that it is valid. Sources cover each other, weakest first: the defaults
//! within the binary ([`DEFAULTS`]), the files, `.env`, the environment, the
//! flags. Everything wrong is told at once, as [`Problems`].
//!
//! ```text
//! files ── raw ──┐
//! .env, env ─────┼── merged ── check ── Config
//! flags ─────────┘     each value is checked by itself in `raw`,
//!                      what values mean together in `check`
//! ```

mod access;
mod check;
mod context;
pub mod diff;
mod env;
mod files;
mod gpus;
mod live;
mod models;
mod park;
mod problem;
mod program;
mod raw;
mod ready;
mod requests;
mod section;
mod telemetry;
pub mod units;
mod upstream;
mod value;
mod variables;
pub mod weights;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use access::{Auth, Tls};
pub use env::{Environment, Sources};
pub use files::{DEFAULTS, places};
pub use problem::{Complaint, Problem, Problems, Severity};
pub use telemetry::Telemetry;

use crate::model::{Bytes, DeviceRef, EvictionPolicy, ModelSpec, Prefetch};

/// A valid configuration.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// Listeners, files, logs.
    pub server: Server,
    /// Where operators have an address of their own; empty: where everybody is.
    pub admin_listen: Vec<Listen>,
    /// Who may call.
    pub auth: Auth,
    /// What TCP listeners are encrypted with; absent: they are not.
    pub tls: Option<Tls>,
    /// Where spans of requests are sent.
    pub telemetry: Telemetry,
    /// The memory workers may have.
    pub memory: Memory,
    /// When memory counts as tight.
    pub pressure: Pressure,
    /// Most bytes workers may have on a GPU.
    pub gpu_limits: BTreeMap<DeviceRef, Bytes>,
    /// Every model, by name.
    pub models: Vec<Arc<ModelSpec>>,
    /// What does not keep residentd from starting but may not work later.
    pub warnings: Problems,
}

/// `[server]`.
#[derive(Clone, Debug)]
pub struct Server {
    /// Where to listen; at least one.
    pub listen: Vec<Listen>,
    /// Where files of our own are kept; absolute.
    pub state_dir: PathBuf,
    /// Longest wait for requests at shutdown.
    pub shutdown_grace: Duration,
    /// Whether workers outlive a residentd that dies and are taken back by the
    /// next; else they end with it.
    pub adopt: bool,
    /// How log lines look.
    pub log_format: LogFormat,
    /// A level, or a filter such as `info,residentd::worker=debug`.
    pub log_level: String,
    /// Largest request body.
    pub max_body: Bytes,
    /// How much of a body may be read to find its model.
    pub model_prefix: Bytes,
    /// Whether each request is written down in the state folder.
    pub access_log: bool,
    /// Whether the configuration is read anew when its files change.
    pub watch_config: bool,
    /// Origins, in lower case, whose pages may call in a browser; `*` is any.
    pub cors_origins: Vec<String>,
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address; port 0 is any.
    Tcp(SocketAddr),
    /// A Unix socket; absolute.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `[memory]`.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Most bytes all workers may have together, and who says so; absent: 80 %
    /// of what is available at start.
    pub limit: Option<(Bytes, LimitOrigin)>,
    /// Physical headroom never given to workers; absent: the larger of 5 % and
    /// 512 MiB.
    pub reserve: Option<Bytes>,
    /// Time between full checks when nothing is happening.
    pub check_interval: Duration,
    /// Whether soft pressure evicts by itself.
    pub auto_cleanup: bool,
    /// Who goes to make room.
    pub policy: EvictionPolicy,
    /// How long a request waits for busy workers before they are drained.
    pub patience: Duration,
    /// When files are read ahead of a worker, unless the model says it itself.
    pub prefetch: Prefetch,
    /// The NVIDIA driver's library; absent: the system's own.
    pub nvml_library: Option<PathBuf>,
    /// Where the host's `/proc` is mounted, when GPU drivers list processes as
    /// the host numbers them.
    pub host_proc: Option<PathBuf>,
}

/// Who set the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitOrigin {
    /// A configuration file, or a flag.
    Config,
    /// A variable of the environment or of `.env`.
    Env,
}

/// `[pressure]`.
#[derive(Clone, Debug)]
pub struct Pressure {
    /// Headroom under which idle workers go, one at a time.
    pub soft: Threshold,
    /// Headroom under which the least valuable worker goes at once.
    pub hard: Threshold,
    /// Whether hard pressure evicts even when `auto_cleanup` is off.
    pub emergency: bool,
}

/// An amount of headroom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threshold {
    /// Hundredths of the domain, 0 to 100.
    Percent(u8),
    /// An amount.
    Size(Bytes),
}

impl Threshold {
    /// Returns the amount in a domain of this size.
    #[must_use]
    pub fn of(self, domain: Bytes) -> Bytes {
        match self {
            Self::Percent(percent) => domain.percent(u64::from(percent)),
            Self::Size(bytes) => bytes,
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Size(bytes) => f.write_str(&units::write_size(*bytes)),
        }
    }
}

/// Reads all sources and checks them, each by itself and together.
///
/// # Errors
/// Every problem found, warnings among them, when at least one is an error.
pub fn load(sources: &Sources) -> Result<Config, Problems> {
    let mut problems = Problems::default();
    let built_in = files::built_in(&mut problems);
    let dotenv = env::read_dotenv(&sources.working_dir, &mut problems);
    let mut environment = dotenv.clone();
    environment.extend(sources.environment.clone());

    let files = files::read(sources, &environment, &mut problems);
    let layers = [
        files.merged,
        env::read(&dotenv, &problem::Origin::DotEnv, &mut problems),
        env::read(
            &sources.environment,
            &problem::Origin::Environment,
            &mut problems,
        ),
        env::read_flags(sources, &mut problems),
    ];
    let mut merged = built_in;
    for layer in layers {
        merged = layer.over(merged, &mut problems);
    }

    let context = context::Context {
        working_dir: &sources.working_dir,
        environment: &environment,
        is_whole: files.is_whole,
        has_files: files.count > 0,
    };
    let config = check::check(merged, &context, &mut problems);
    problems.sort();
    match config {
        Some(config) if !problems.has_errors() => Ok(Config {
            warnings: problems,
            ..config
        }),
        _ => Err(problems),
    }
}
