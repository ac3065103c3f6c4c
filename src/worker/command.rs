//! From a model's templates to a command that can be spawned.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::model::{Fingerprint, GpuVendor, ModelSpec, PlacedGpu, Upstream, UpstreamSpec};
use crate::procfs::mark::{self, Mark};
use crate::template::Template;

/// What a service manager says to residentd and not to workers; see
/// `sd_listen_fds(3)` and `sd_watchdog_enabled(3)`.
const OF_THE_SERVICE: [&str; 5] = [
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];
/// What residentd is told that no worker needs to know.
const SECRET: [&str; 3] = [
    "RESIDENTD_INFERENCE_TOKENS",
    "RESIDENTD_ADMIN_TOKENS",
    "RESIDENTD_TOKEN",
];
/// Tells a worker the file in which it may report its own GPU memory.
const REPORT: &str = "RESIDENTD_REPORT";

/// A command with every `${…}` filled in.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    program: PathBuf,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
    /// Names of the GPUs it may see, and the variable that says so.
    visible: Option<(&'static str, String)>,
    cwd: Option<String>,
    pub(super) upstream: Upstream,
    pub(super) grpc_upstream: Option<Upstream>,
}

/// What a template may name in one life.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names<'a> {
    pub(super) port: Option<u16>,
    pub(super) grpc_port: Option<u16>,
    pub(super) socket: Option<&'a Path>,
    pub(super) gpus: &'a [PlacedGpu],
}

/// Returns whether any of the model's templates names this variable.
pub(super) fn uses(spec: &ModelSpec, name: &str) -> bool {
    let upstreams = [&spec.upstream].into_iter().chain(&spec.grpc_upstream);
    let texts = spec
        .command
        .iter()
        .chain(spec.env.values())
        .chain(&spec.cwd)
        .chain(upstreams.map(UpstreamSpec::text));
    texts
        .filter_map(|text| Template::parse(text).ok())
        .any(|template| template.uses(name))
}

impl Launch {
    /// Fills in the model's templates; the text of an error says what is wrong.
    pub(super) fn new(spec: &ModelSpec, names: Names<'_>) -> Result<Self, String> {
        let fill = |text: &str| fill(spec, names, text);
        let mut words = spec.command.iter().map(|word| fill(word));
        let program = words.next().ok_or("the command is empty")??;
        let arguments = words.collect::<Result<_, _>>()?;
        let environment = spec
            .env
            .iter()
            .map(|(name, value)| Ok((name.clone(), fill(value)?)))
            .collect::<Result<_, String>>()?;
        let upstream = |spec: &UpstreamSpec| match spec {
            UpstreamSpec::Tcp(text) => Ok::<_, String>(Upstream::Tcp(address(&fill(text)?)?)),
            UpstreamSpec::Unix(text) => Ok(Upstream::Unix(PathBuf::from(fill(text)?))),
        };
        Ok(Self {
            upstream: upstream(&spec.upstream)?,
            grpc_upstream: spec.grpc_upstream.as_ref().map(upstream).transpose()?,
            program: PathBuf::from(program),
            arguments,
            environment,
            visible: visible(names.gpus),
            cwd: spec.cwd.as_deref().map(fill).transpose()?,
        })
    }

    /// Returns the program, for messages.
    pub(super) fn program(&self) -> std::path::Display<'_> {
        self.program.display()
    }

    /// Builds the command: a process group of its own, the worker's mark and
    /// what it needs to know of GPUs in the environment, nothing on standard
    /// input, and nothing that would make the spawn a fork.
    pub(super) fn command(
        &self,
        mark: &Mark,
        report: &Path,
        output: std::fs::File,
        errors: std::fs::File,
    ) -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(&self.program);
        for variable in OF_THE_SERVICE.iter().chain(&SECRET) {
            command.env_remove(variable);
        }
        command
            .args(&self.arguments)
            .env(REPORT, report)
            .envs(self.visible.as_ref().map(|(name, gpus)| (*name, gpus)))
            // The user's own have the last word.
            .envs(&self.environment)
            .env(mark::VARIABLE, mark.as_str())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0);
        if let Some(cwd) = &self.cwd {
            command.current_dir(cwd);
        }
        command
    }
}

/// Returns a text that changes with what a worker of this model is started from:
/// `files`, which tells its command and weight files apart, and what templates
/// come to, but for what differs from one life to the next.
pub(super) fn origin(spec: &ModelSpec, files: &str) -> String {
    let mut print = Fingerprint::default();
    print.feed(files.as_bytes());
    let kind = |upstream: &UpstreamSpec| match upstream {
        UpstreamSpec::Tcp(_) => "tcp",
        UpstreamSpec::Unix(_) => "unix",
    };
    let upstreams = || [&spec.upstream].into_iter().chain(&spec.grpc_upstream);
    let of_life = ["PORT", "GRPC_PORT", "SOCKET", "GPU", "MODEL"];
    let value = |name: &str| -> Option<std::borrow::Cow<'_, str>> {
        let own = of_life.contains(&name).then(|| name.to_owned().into());
        own.or_else(|| spec.variables.get(name).map(|value| value.clone().into()))
    };
    let texts = spec.command.iter().chain(&spec.cwd);
    let texts = texts.chain(spec.env.values());
    for text in texts.chain(upstreams().map(UpstreamSpec::text)) {
        let filled = Template::parse(text).and_then(|template| template.expand(&value));
        print.feed(filled.as_deref().unwrap_or(text).as_bytes());
    }
    for upstream in upstreams() {
        print.feed(kind(upstream).as_bytes());
    }
    print.feed(spec.gpus.to_string().as_bytes());
    print.to_string()
}

fn fill(spec: &ModelSpec, names: Names<'_>, text: &str) -> Result<String, String> {
    let template = Template::parse(text).map_err(|error| format!("{text:?}: {error}"))?;
    let value = |name: &str| -> Option<std::borrow::Cow<'_, str>> {
        match name {
            "PORT" => names.port.map(|port| port.to_string().into()),
            "GRPC_PORT" => names.grpc_port.map(|port| port.to_string().into()),
            "SOCKET" => names
                .socket
                .map(|path| path.to_string_lossy().into_owned().into()),
            "GPU" => visible(names.gpus).map(|(_, gpus)| gpus.into()),
            "MODEL" => Some(spec.name.as_str().to_owned().into()),
            other => spec.variables.get(other).map(|value| value.clone().into()),
        }
    };
    template
        .expand(&value)
        .map_err(|error| format!("{text:?}: {error}"))
}

/// Returns the variable that shows a process its GPUs and no other, and its
/// value; `None` for a worker that is placed on none.
///
/// UUIDs mean the same whatever order a runtime counts in. See the CUDA
/// programming guide on `CUDA_VISIBLE_DEVICES`, ROCm's on GPU isolation for
/// `ROCR_VISIBLE_DEVICES`, and Level Zero's specification for
/// `ZE_AFFINITY_MASK`, which knows numbers only.
fn visible(gpus: &[PlacedGpu]) -> Option<(&'static str, String)> {
    let variable = match gpus.first()?.vendor {
        GpuVendor::Nvidia => "CUDA_VISIBLE_DEVICES",
        GpuVendor::Amd => "ROCR_VISIBLE_DEVICES",
        GpuVendor::Intel => "ZE_AFFINITY_MASK",
    };
    let name = |gpu: &PlacedGpu| match gpu.vendor {
        GpuVendor::Nvidia => gpu.uuid.clone(),
        // Devices without a number of their own are named by their place.
        GpuVendor::Amd if gpu.uuid.starts_with("GPU-") => gpu.uuid.clone(),
        GpuVendor::Amd | GpuVendor::Intel => gpu.ordinal.to_string(),
    };
    let names: Vec<_> = gpus.iter().map(name).collect();
    Some((variable, names.join(",")))
}

/// Finds the address of `HOST:PORT`.
fn address(text: &str) -> Result<SocketAddr, String> {
    let mut found = text
        .to_socket_addrs()
        .map_err(|error| format!("upstream {text:?}: {error}"))?;
    found
        .next()
        .ok_or_else(|| format!("upstream {text:?} has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(vendor: GpuVendor, uuid: &str, ordinal: u32) -> PlacedGpu {
        PlacedGpu {
            index: ordinal,
            uuid: uuid.into(),
            vendor,
            ordinal,
        }
    }

    #[test]
    fn a_worker_is_shown_its_gpus_in_its_vendors_own_way() {
        let nvidia = [
            gpu(GpuVendor::Nvidia, "GPU-a", 0),
            gpu(GpuVendor::Nvidia, "MIG-b", 3),
        ];
        let shown =
            |gpus: &[PlacedGpu]| visible(gpus).map(|(name, value)| format!("{name}={value}"));
        assert_eq!(
            shown(&nvidia).as_deref(),
            Some("CUDA_VISIBLE_DEVICES=GPU-a,MIG-b")
        );
        let amd = [
            gpu(GpuVendor::Amd, "GPU-1f", 0),
            gpu(GpuVendor::Amd, "pci-0000:03:00.0", 1),
        ];
        assert_eq!(
            shown(&amd).as_deref(),
            Some("ROCR_VISIBLE_DEVICES=GPU-1f,1")
        );
        let intel = [gpu(GpuVendor::Intel, "pci-0000:04:00.0", 2)];
        assert_eq!(shown(&intel).as_deref(), Some("ZE_AFFINITY_MASK=2"));
        assert_eq!(shown(&[]), None);
    }
}
