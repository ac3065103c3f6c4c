//! What the service manager is told, and what it hands us: `sd_notify(3)`,
//! `sd_listen_fds(3)`, `sd_watchdog_enabled(3)`. Nothing is told, and nothing
//! fails, where there is none.

use std::os::fd::OwnedFd;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tracing::warn;

use crate::control::Controller;
use crate::telemetry;

/// Returns whether there is a service manager that, told of another main process,
/// watches that one. The first process of a container cannot be replaced: the
/// container ends with it.
pub(super) fn follows() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some() && std::process::id() != 1
}

/// Requests are served.
pub(super) fn ready() {
    let status = format!("serving; version {}", env!("CARGO_PKG_VERSION"));
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// A reload begins; [`ready`] says that it has ended.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => warn!(%error, "reading the clock for the service manager"),
    }
}

/// residentd ends: requests finish, then workers end.
pub(super) fn stopping() {
    tell(&[
        NotifyState::Stopping,
        NotifyState::Status("requests finish, then workers end"),
    ]);
}

/// Another process is the service from now on.
pub(super) fn main_process(pid: i32) {
    if let Ok(pid) = u32::try_from(pid) {
        tell(&[NotifyState::MainPid(pid)]);
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "telling the service manager");
    }
}

/// Tells the service manager that the controller answers, as often as it wants to
/// hear that (`WatchdogSec=`).
pub(super) fn watch(controller: Controller) {
    let Some(within) = sd_notify::watchdog_enabled() else {
        return;
    };
    telemetry::spawn("watchdog", async move {
        loop {
            // One that hangs is not told of, and so is ended.
            if controller.answers().await {
                tell(&[NotifyState::Watchdog]);
            }
            tokio::time::sleep((within / 3).max(Duration::from_millis(1))).await;
        }
    });
}

/// A descriptor that the service manager passed and that is of no use.
#[derive(Debug, thiserror::Error)]
#[error(
    "use socket {0} of those that the service manager passed: only listening stream sockets are, see ListenStream= in systemd.socket(5)"
)]
pub struct PassedError(usize, #[source] std::io::Error);

/// Takes the sockets that the service manager has opened for this process.
/// Called while the process has one thread, since it changes the environment.
///
/// # Errors
/// When one of them is no listening socket.
pub fn passed_sockets() -> Result<Vec<OwnedFd>, PassedError> {
    let mut passed = ListenFd::from_env();
    let mut sockets = Vec::new();
    for index in 0..passed.len() {
        let tcp = passed.take_tcp_listener(index);
        let socket = match tcp {
            Ok(socket) => socket.map(OwnedFd::from),
            Err(_) => passed
                .take_unix_listener(index)
                .map_err(|error| PassedError(index, error))?
                .map(OwnedFd::from),
        };
        let Some(socket) = socket else { continue };
        let listens = rustix::net::sockopt::socket_acceptconn(&socket);
        if !listens.map_err(|error| PassedError(index, error.into()))? {
            let why = std::io::Error::other("nobody listens on it");
            return Err(PassedError(index, why));
        }
        sockets.push(socket);
    }
    Ok(sockets)
}
