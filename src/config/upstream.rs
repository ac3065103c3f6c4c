//! `upstream = "…"`: where a worker is asked.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::Listen;
use super::context::Context;
use super::problem::Complaint;
use crate::model::UpstreamSpec;
use crate::template::Template;

/// What each worker is given of its own to listen on.
pub(super) const OF_LIFE: [&str; 3] = ["PORT", "GRPC_PORT", "SOCKET"];

/// An upstream that is in order.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) spec: UpstreamSpec,
    /// The address, when it is the same at every spawn.
    pub(super) fixed: Option<Address>,
}

/// An address that is known before any worker is spawned.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// Returns whether residentd listens there.
    pub(super) fn is(&self, listen: &Listen, context: &Context<'_>) -> bool {
        match (self, listen) {
            (Self::Tcp(ours), Listen::Tcp(theirs)) => {
                let is_any = theirs.ip().is_unspecified();
                ours.port() == theirs.port() && (is_any || ours.ip() == theirs.ip())
            }
            (Self::Unix(ours), Listen::Unix(theirs)) => context.working_dir.join(ours) == *theirs,
            (Self::Tcp(_), Listen::Unix(_)) | (Self::Unix(_), Listen::Tcp(_)) => false,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Reads the text of a checked template, which `sample` is filled in of.
pub(super) fn read(text: &str, template: &Template, sample: &str) -> Result<Checked, Complaint> {
    let fix = r#"write "http://127.0.0.1:${PORT}" or "unix:${SOCKET}""#;
    let refuse = |what: &str| Err(Complaint::new(format!("{text:?} {what}"), fix));
    let is_fixed = !OF_LIFE.iter().any(|name| template.uses(name));
    if let (Some(path), Some(sample)) = (text.strip_prefix("unix:"), sample.strip_prefix("unix:")) {
        if !Path::new(sample).is_absolute() {
            return refuse("is not an absolute path");
        }
        return Ok(Checked {
            spec: UpstreamSpec::Unix(path.to_owned()),
            fixed: is_fixed.then(|| Address::Unix(PathBuf::from(sample))),
        });
    }
    let (Some(address), Some(sample)) =
        (text.strip_prefix("http://"), sample.strip_prefix("http://"))
    else {
        return refuse("is neither http:// nor unix:");
    };
    let Ok(sample) = sample.trim_end_matches('/').parse::<SocketAddr>() else {
        return refuse("is not an address and a port");
    };
    if sample.ip().is_unspecified() || sample.port() == 0 {
        return refuse("is not an address to ask");
    }
    Ok(Checked {
        spec: UpstreamSpec::Tcp(address.trim_end_matches('/').to_owned()),
        fixed: is_fixed.then_some(Address::Tcp(sample)),
    })
}
