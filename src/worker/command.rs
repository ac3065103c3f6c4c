//! From a model's templates to a command that can be spawned.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::model::{ModelSpec, Upstream, UpstreamSpec};
use crate::procfs::mark::{self, Mark};
use crate::template::Template;

/// A command with every `${…}` filled in.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    program: PathBuf,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
    cwd: Option<String>,
    pub(super) upstream: Upstream,
}

/// What a template may name in one life.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names<'a> {
    pub(super) port: Option<u16>,
    pub(super) socket: Option<&'a Path>,
}

/// Returns whether any of the model's templates names this variable.
pub(super) fn uses(spec: &ModelSpec, name: &str) -> bool {
    let upstream = match &spec.upstream {
        UpstreamSpec::Tcp(text) | UpstreamSpec::Unix(text) => text,
    };
    let texts = spec
        .command
        .iter()
        .chain(spec.env.values())
        .chain(&spec.cwd)
        .chain([upstream]);
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
        let upstream = match &spec.upstream {
            UpstreamSpec::Tcp(text) => Upstream::Tcp(address(&fill(text)?)?),
            UpstreamSpec::Unix(text) => Upstream::Unix(PathBuf::from(fill(text)?)),
        };
        Ok(Self {
            program: PathBuf::from(program),
            arguments,
            environment,
            cwd: spec.cwd.as_deref().map(fill).transpose()?,
            upstream,
        })
    }

    /// Returns the program, for messages.
    pub(super) fn program(&self) -> std::path::Display<'_> {
        self.program.display()
    }

    /// Builds the command: a process group of its own, the worker's mark in
    /// the environment, nothing on standard input, and nothing that would make
    /// the spawn a fork.
    pub(super) fn command(
        &self,
        mark: &Mark,
        output: std::fs::File,
        errors: std::fs::File,
    ) -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
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

fn fill(spec: &ModelSpec, names: Names<'_>, text: &str) -> Result<String, String> {
    let template = Template::parse(text).map_err(|error| format!("{text:?}: {error}"))?;
    let value = |name: &str| -> Option<std::borrow::Cow<'_, str>> {
        match name {
            "PORT" => names.port.map(|port| port.to_string().into()),
            "SOCKET" => names
                .socket
                .map(|path| path.to_string_lossy().into_owned().into()),
            "MODEL" => Some(spec.name.as_str().to_owned().into()),
            other => spec.variables.get(other).map(|value| value.clone().into()),
        }
    };
    template
        .expand(&value)
        .map_err(|error| format!("{text:?}: {error}"))
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
