//! The vocabulary every other module speaks: names, sizes, domains, and what
//! the configuration says of a model. Plain data without I/O.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

mod bytes;
mod difference;
mod fingerprint;
mod gaps;
mod health;
mod park;
mod prefetch;
mod record;
mod requests;
mod secret;

pub use bytes::Bytes;
pub use difference::{ChangedModel, Difference, Takes};
pub use fingerprint::Fingerprint;
pub use gaps::{GAP_CLASSES, Gaps};
pub use health::{Ailment, Live};
pub use park::{ParkCall, ParkSpec};
pub use prefetch::{Prefetch, PrefetchEnd, PrefetchReason};
pub use record::{LastUse, WorkerRecord};
pub use requests::{Filter, RequestSpec};
pub use secret::Secret;

/// What a client asks for: 1 to 128 of letters, digits and `._-/:@+`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelName(Arc<str>);

/// Why a text is not a model's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a model's name is 1 to 128 of letters, digits and ._-/:@+")]
pub struct InvalidName;

impl ModelName {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`InvalidName`] when the text is empty, longer than 128 bytes or holds
    /// another character than letters, digits and `._-/:@+`.
    pub fn new(text: &str) -> Result<Self, InvalidName> {
        let good = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
        if text.is_empty() || text.len() > 128 || !text.chars().all(good) {
            return Err(InvalidName);
        }
        Ok(Self(Arc::from(text)))
    }

    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for ModelName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One life of a model: its name and a generation that only grows.
///
/// An event of an older generation changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId {
    /// The model the worker serves.
    pub model: ModelName,
    /// Which life of the model this is, from 1.
    pub generation: u64,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.model, self.generation)
    }
}

/// A place bytes come from: host RAM or one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Domain {
    /// The RAM of this host or container.
    Host,
    /// The GPU (or MIG instance) with this index.
    Gpu(u32),
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Gpu(index) => write!(f, "gpu:{index}"),
        }
    }
}

/// Why a text names no domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a domain is host, or gpu: and an index")]
pub struct InvalidDomain;

impl FromStr for Domain {
    type Err = InvalidDomain;

    fn from_str(text: &str) -> Result<Self, InvalidDomain> {
        match text.strip_prefix("gpu:") {
            Some(index) => index.parse().map(Self::Gpu).map_err(|_| InvalidDomain),
            None if text == "host" => Ok(Self::Host),
            None => Err(InvalidDomain),
        }
    }
}

/// A GPU as a user names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceRef {
    /// Its place in the list of devices, as in `gpu:0`.
    Index(u32),
    /// Its UUID, or the beginning of it.
    Uuid(Arc<str>),
}

impl DeviceRef {
    /// Returns whether this names the device with that index and UUID.
    #[must_use]
    pub fn is(&self, index: u32, uuid: &str) -> bool {
        match self {
            Self::Index(wanted) => *wanted == index,
            Self::Uuid(wanted) => uuid.starts_with(&**wanted),
        }
    }
}

impl fmt::Display for DeviceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "gpu:{index}"),
            Self::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

/// Who goes to make room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// The least recently used.
    #[default]
    Lru,
    /// Those whose reload is expected to cost least.
    Cost,
}

impl EvictionPolicy {
    /// Every policy.
    pub const ALL: [Self; 2] = [Self::Lru, Self::Cost];

    /// Returns the word used in the configuration, the API and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Cost => "cost",
        }
    }

    /// Returns the policy of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == name)
    }
}

/// Which GPUs a model's worker is placed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GpuRequest {
    /// On none: its environment is left alone.
    #[default]
    None,
    /// On this many, whichever fit best.
    Count(u32),
    /// On exactly these, all at once.
    These(Vec<DeviceRef>),
}

impl GpuRequest {
    /// Returns on how many GPUs the worker runs.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Count(count) => usize::try_from(*count).unwrap_or(usize::MAX),
            Self::These(list) => list.len(),
        }
    }
}

impl fmt::Display for GpuRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no GPU"),
            Self::Count(count) => write!(f, "{count} GPU(s)"),
            Self::These(list) => {
                let names: Vec<_> = list.iter().map(ToString::to_string).collect();
                f.write_str(&names.join(", "))
            }
        }
    }
}

/// Who made a GPU: decides which variable tells a process its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuVendor {
    /// `CUDA_VISIBLE_DEVICES`, by UUID.
    Nvidia,
    /// `ROCR_VISIBLE_DEVICES`, by UUID where the device has one.
    Amd,
    /// `ZE_AFFINITY_MASK`, by number.
    Intel,
}

impl GpuVendor {
    /// Returns the word used in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nvidia => "nvidia",
            Self::Amd => "amd",
            Self::Intel => "intel",
        }
    }
}

/// A GPU that a worker is placed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedGpu {
    /// Its index, as in `gpu:0`.
    pub index: u32,
    /// Its UUID.
    pub uuid: String,
    /// Who made it.
    pub vendor: GpuVendor,
    /// Its place among the devices of that vendor.
    pub ordinal: u32,
}

/// What past lives of a model used in one domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// The most, merged over lives.
    pub peak: Bytes,
    /// What the last life that served held when it was last measured.
    pub settled: Bytes,
}

/// How a worker shows that it can answer.
#[derive(Clone, Debug)]
pub enum ReadyCheck {
    /// `GET path` answers `status`, or any 2xx when no status is named.
    Http {
        /// Path of the probe, `/health` unless configured.
        path: String,
        /// The one status that counts; any 2xx when absent.
        status: Option<u16>,
    },
    /// The port accepts a connection.
    Tcp,
    /// It says so itself, by `sd_notify`.
    Notify,
    /// A line of the worker's output matches.
    Log(regex::Regex),
}

/// Where a worker listens, as configured; `${PORT}` and `${SOCKET}` are
/// filled in at spawn. The templates do not hold the scheme.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpstreamSpec {
    /// Of `http://`, the `HOST:PORT` template: `127.0.0.1:${PORT}`.
    Tcp(String),
    /// Of `unix:`, the path's template: `${SOCKET}`.
    Unix(String),
}

impl UpstreamSpec {
    /// Returns the template.
    #[must_use]
    pub fn text(&self) -> &String {
        match self {
            Self::Tcp(text) | Self::Unix(text) => text,
        }
    }
}

/// As it is configured.
impl fmt::Display for UpstreamSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// Where a ready worker answers HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Upstream {
    /// A TCP address, on loopback unless configured otherwise.
    Tcp(std::net::SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why a text names no upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an upstream is http://ADDRESS:PORT or unix:PATH")]
pub struct InvalidUpstream;

/// Reads what is shown of one.
impl FromStr for Upstream {
    type Err = InvalidUpstream;

    fn from_str(text: &str) -> Result<Self, InvalidUpstream> {
        match (text.strip_prefix("http://"), text.strip_prefix("unix:")) {
            (Some(address), _) => address.parse().map(Self::Tcp).map_err(|_| InvalidUpstream),
            (None, Some(path)) => Ok(Self::Unix(PathBuf::from(path))),
            (None, None) => Err(InvalidUpstream),
        }
    }
}

impl Upstream {
    /// Returns what a worker is called in `Host`.
    #[must_use]
    pub fn host(&self) -> String {
        match self {
            Self::Tcp(address) => address.to_string(),
            Self::Unix(_) => "localhost".to_owned(),
        }
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "http://{addr}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Everything the configuration says of one model, checked.
///
/// Texts that may hold `${…}` are kept as templates and filled in at spawn.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// The name clients ask for.
    pub name: ModelName,
    /// Other names for the same model.
    pub aliases: Vec<ModelName>,
    /// Shown as `type`; free text.
    pub kind: String,
    /// Program and arguments, templates. Never run by a shell. A program with
    /// a slash is absolute.
    pub command: Vec<String>,
    /// Working directory of the worker, an absolute template.
    pub cwd: Option<String>,
    /// Environment added to residentd's own, values are templates.
    pub env: BTreeMap<String, String>,
    /// What templates may need beside `PORT`, `SOCKET` and `MODEL`: the user's
    /// own `[variables]`, `STATE_DIR`, and each `env:NAME` that is used. Plain
    /// values; every variable of every template is known to have one.
    pub variables: Arc<BTreeMap<String, String>>,
    /// Where the worker listens.
    pub upstream: UpstreamSpec,
    /// Where its workers take gRPC, when that is elsewhere.
    pub grpc_upstream: Option<UpstreamSpec>,
    /// How it shows that it can answer.
    pub ready: ReadyCheck,
    /// How it is watched once it does.
    pub live: Live,
    /// Longest time from spawn to ready.
    pub start_timeout: Duration,
    /// Grace between the stop signal and SIGKILL of the tree.
    pub stop_timeout: Duration,
    /// The signal that asks the worker to end, as its number.
    pub stop_signal: i32,
    /// Unload after this long without a request.
    pub idle_timeout: Option<Duration>,
    /// Never evicted to make room.
    pub pinned: bool,
    /// Loaded at start.
    pub preload: bool,
    /// Expected need of host RAM, as declared.
    pub memory: Option<Bytes>,
    /// Which GPUs it runs on.
    pub gpus: GpuRequest,
    /// Expected need on each of its GPUs, as declared.
    pub vram: Option<Bytes>,
    /// A ceiling of its own for host RAM: over it, recycled when idle.
    pub max_memory: Option<Bytes>,
    /// How its worker gives memory back while it lives; absent when it cannot.
    pub park: Option<Arc<ParkSpec>>,
    /// Weight files: declared, else found among the command's arguments.
    pub weights: Vec<PathBuf>,
    /// When its files are read into the page cache ahead of its worker.
    pub prefetch: Prefetch,
    /// Most requests in its worker at once; more wait. Absent: no bound.
    pub concurrency: Option<NonZeroU32>,
    /// Most requests waiting at once; more are turned away.
    pub max_queue: usize,
    /// Longest a request waits for room and for the load.
    pub queue_timeout: Duration,
    /// What is done with requests beside passing them on.
    pub requests: RequestSpec,
}

impl ModelSpec {
    /// Returns a model of which nothing is said but its name and command:
    /// ready when its port accepts, two minutes to start, ten seconds to stop,
    /// 256 waiting at most, a minute each.
    #[must_use]
    pub fn plain(name: ModelName, command: Vec<String>) -> Self {
        Self {
            name,
            aliases: Vec::new(),
            kind: "llm".into(),
            command,
            cwd: None,
            env: BTreeMap::new(),
            variables: Arc::default(),
            upstream: UpstreamSpec::Tcp("127.0.0.1:${PORT}".into()),
            grpc_upstream: None,
            ready: ReadyCheck::Tcp,
            live: Live::default(),
            start_timeout: Duration::from_secs(120),
            stop_timeout: Duration::from_secs(10),
            stop_signal: 15,
            idle_timeout: None,
            pinned: false,
            preload: false,
            memory: None,
            gpus: GpuRequest::None,
            vram: None,
            max_memory: None,
            park: None,
            weights: Vec::new(),
            prefetch: Prefetch::Off,
            concurrency: None,
            max_queue: 256,
            queue_timeout: Duration::from_secs(60),
            requests: RequestSpec::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_letters_digits_and_a_few_signs() {
        assert!(ModelName::new("meta/Llama-3.1:8b@q4+x_y").is_ok());
        for bad in ["", "a b", "a,b", "ä", &"x".repeat(129)] {
            assert_eq!(ModelName::new(bad), Err(InvalidName), "{bad:?}");
        }
    }
}
