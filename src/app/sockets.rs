//! The sockets that are listened on: bound here, or opened by the service
//! manager or the residentd before this one.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::net::SocketAddrUnix;
use tokio::net::{TcpListener, UnixListener};
use tracing::{debug, info};

use super::AppError;
use super::upgrade::Sent;
use crate::config::{Config, Listen};

/// A bound address.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
    /// Where the residentd that this one has replaced sends what still comes to it.
    Handover(UnixListener),
}

/// What is answered at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Everything.
    All,
    /// Inference and probes: operators have an address of their own.
    Inference,
    /// All but inference.
    Admin,
}

/// Which addresses are configured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// For inference.
    main: &'a [Listen],
    /// For operators; empty when it is the same.
    admin: &'a [Listen],
}

impl<'a> Wanted<'a> {
    pub(super) fn of(config: &'a Config) -> Self {
        Self {
            main: &config.server.listen,
            admin: &config.admin_listen,
        }
    }

    /// Returns whether a socket that was opened before is to be the operators'
    /// own; `None` when it is not wanted any more.
    fn is_admin(self, sent: &Sent) -> Option<bool> {
        let Some(text) = &sent.configured else {
            return Some(false);
        };
        let among = |all: &[Listen]| all.iter().any(|listen| listen.to_string() == *text);
        match (among(self.main), among(self.admin)) {
            (false, false) => None,
            // Only port 0 may be both.
            (true, true) => Some(sent.is_admin),
            (_, is_admin) => Some(is_admin),
        }
    }

    /// Returns what is answered at an address.
    fn scope(self, is_admin: bool) -> Scope {
        match (self.admin.is_empty(), is_admin) {
            (true, _) => Scope::All,
            (false, true) => Scope::Admin,
            (false, false) => Scope::Inference,
        }
    }
}

/// A socket that is listened on.
pub(super) struct Bound {
    pub(super) scope: Scope,
    pub(super) address: Listen,
    pub(super) listener: Listener,
    /// What another residentd that takes over is told of it.
    pub(super) sent: Sent,
}

/// Returns the addresses, and after them those of operators alone.
pub(super) fn addresses(bound: &[Bound]) -> (Vec<Listen>, Vec<Listen>) {
    let (admin, main): (Vec<_>, Vec<_>) =
        bound.iter().partition(|bound| bound.scope == Scope::Admin);
    let of = |all: Vec<&Bound>| all.iter().map(|bound| bound.address.clone()).collect();
    (of(main), of(admin))
}

/// Returns the files of Unix sockets that are not the service manager's.
pub(super) fn own_paths(bound: &[Bound]) -> Vec<PathBuf> {
    let ours = bound.iter().filter(|bound| bound.sent.configured.is_some());
    ours.filter_map(|bound| match &bound.address {
        Listen::Unix(path) => Some(path.clone()),
        Listen::Tcp(_) => None,
    })
    .collect()
}

/// Returns another descriptor of each, with what is told of it.
pub(super) fn share(bound: &[Bound]) -> Result<Vec<(Sent, OwnedFd)>, AppError> {
    let shared = bound.iter().map(|each| {
        let socket = each.listener.share().map_err(AppError::Passed)?;
        Ok((each.sent.clone(), socket))
    });
    shared.collect()
}

/// What other processes have opened.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// By the service manager.
    pub(super) passed: Vec<OwnedFd>,
    /// By the residentd before this one.
    pub(super) inherited: Vec<(Sent, OwnedFd)>,
}

/// Returns a listener for each configured address, and the files of Unix sockets on
/// which nobody listens any more. What the service manager has opened takes the
/// place of all that is configured but the operators' own.
pub(super) async fn open(
    wanted: Wanted<'_>,
    opened: Opened,
) -> Result<(Vec<Bound>, Vec<PathBuf>), AppError> {
    let (mut bound, mut dropped) = (Vec::new(), Vec::new());
    let by_manager = opened.passed.into_iter();
    let unnamed = Sent {
        configured: None,
        is_admin: false,
    };
    let by_manager = by_manager.map(|socket| (unnamed.clone(), socket));
    for (mut sent, socket) in by_manager.chain(opened.inherited) {
        let is_admin = wanted.is_admin(&sent);
        let (address, listener) = Listener::passed(socket)?;
        if let Some(is_admin) = is_admin {
            sent.is_admin = is_admin;
            bound.push(Bound {
                scope: wanted.scope(is_admin),
                address,
                listener,
                sent,
            });
        } else {
            info!(%address, "not listened on any more");
            if let Listen::Unix(path) = address {
                dropped.push(path);
            }
        }
    }
    let is_managed = bound.iter().any(|bound| bound.sent.configured.is_none());
    let main = match is_managed {
        true => {
            debug!("the service manager opened the sockets; server.listen is not used");
            &[]
        }
        false => wanted.main,
    };
    let main = main.iter().map(|listen| (listen, false));
    for (listen, is_admin) in main.chain(wanted.admin.iter().map(|listen| (listen, true))) {
        let sent = Sent {
            configured: Some(listen.to_string()),
            is_admin,
        };
        if !bound.iter().any(|bound| bound.sent == sent) {
            let (address, listener) = bind(listen).await?;
            bound.push(Bound {
                scope: wanted.scope(is_admin),
                address,
                listener,
                sent,
            });
        }
    }
    Ok((bound, dropped))
}

impl Listener {
    /// Returns another descriptor of it.
    pub(super) fn share(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
            Self::Unix(listener) | Self::Handover(listener) => {
                listener.as_fd().try_clone_to_owned()
            }
        }
    }

    /// Takes a socket that another process has opened, and its address.
    pub(super) fn passed(socket: OwnedFd) -> Result<(Listen, Self), AppError> {
        let taken = || {
            let address = rustix::net::getsockname(&socket)?;
            rustix::io::ioctl_fionbio(&socket, true)?;
            if let Ok(address) = SocketAddr::try_from(address.clone()) {
                let listener = TcpListener::from_std(socket.into())?;
                return Ok((Listen::Tcp(address), Self::Tcp(listener)));
            }
            let address = SocketAddrUnix::try_from(address)?;
            let path = address
                .path_bytes()
                .map(OsStr::from_bytes)
                .unwrap_or_default();
            let listener = UnixListener::from_std(socket.into())?;
            Ok((Listen::Unix(path.into()), Self::Unix(listener)))
        };
        taken().map_err(AppError::Passed)
    }

    /// Listens at `path` for what comes to the residentd that is replaced.
    pub(super) fn handover(path: &Path) -> Result<Self, AppError> {
        // What comes there is believed: nobody else can connect at any moment.
        let private = path.with_extension("new");
        let bound = || {
            if private.exists() {
                std::fs::remove_file(&private)?;
            }
            let listener = UnixListener::bind(&private)?;
            let ours = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&private, ours)?;
            std::fs::rename(&private, path)?;
            Ok(listener)
        };
        let bound = bound().map_err(|source| AppError::Listen {
            address: address_text(&Listen::Unix(path.to_owned())),
            source,
        });
        bound.map(Self::Handover)
    }
}

/// Binds an address; the one that comes back has the port that the system gave.
pub(super) async fn bind(listen: &Listen) -> Result<(Listen, Listener), AppError> {
    let failed = |source: std::io::Error| {
        let address = address_text(listen);
        match source.kind() {
            std::io::ErrorKind::AddrInUse => AppError::Taken { address },
            _ => AppError::Listen { address, source },
        }
    };
    match listen {
        Listen::Tcp(address) => {
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?;
            Ok((Listen::Tcp(bound), Listener::Tcp(listener)))
        }
        Listen::Unix(path) => {
            remove_stale_socket(path).await.map_err(failed)?;
            let listener = UnixListener::bind(path).map_err(failed)?;
            Ok((Listen::Unix(path.clone()), Listener::Unix(listener)))
        }
    }
}

/// Shows an address as it is written in the configuration, `http://` before a
/// TCP one.
#[must_use]
pub fn address_text(listen: &Listen) -> String {
    match listen {
        Listen::Tcp(address) => format!("http://{address}"),
        Listen::Unix(path) => format!("unix:{}", path.display()),
    }
}

/// Takes away a socket file that nobody listens on; one that answers stays.
async fn remove_stale_socket(path: &PathBuf) -> std::io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    match tokio::net::UnixStream::connect(path).await {
        Ok(_) => Err(std::io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(text: &str) -> Listen {
        Listen::Tcp(text.parse().expect("an address"))
    }

    fn sent(text: Option<&str>, is_admin: bool) -> Sent {
        Sent {
            configured: text.map(str::to_owned),
            is_admin,
        }
    }

    #[test]
    fn a_socket_that_is_handed_over_is_for_whom_the_new_configuration_says() {
        let (main, admin) = (
            [tcp("127.0.0.1:1"), tcp("127.0.0.1:0")],
            [tcp("127.0.0.1:2"), tcp("127.0.0.1:0")],
        );
        let wanted = Wanted {
            main: &main,
            admin: &admin,
        };
        for was in [false, true] {
            assert_eq!(
                wanted.is_admin(&sent(Some("127.0.0.1:1"), was)),
                Some(false)
            );
            assert_eq!(wanted.is_admin(&sent(Some("127.0.0.1:2"), was)), Some(true));
            assert_eq!(wanted.is_admin(&sent(Some("127.0.0.1:3"), was)), None);
            assert_eq!(wanted.is_admin(&sent(Some("127.0.0.1:0"), was)), Some(was));
            assert_eq!(wanted.is_admin(&sent(None, was)), Some(false));
        }
        assert_eq!(wanted.scope(true), Scope::Admin);
        assert_eq!(wanted.scope(false), Scope::Inference);
        let alone = Wanted {
            admin: &[],
            ..wanted
        };
        assert_eq!(alone.scope(false), Scope::All);
    }
}
