//! The worker's own child processes, so that it is a tree and not one pid.
//!
//! ```text
//! stub-worker ── child           same process group and session
//!            └── (between) ── daemon   own session; "between" exits at once,
//!                                      so the daemon is given another parent
//! ```

use std::io::{self, Write};
use std::process::{Command, Stdio};

use crate::args::Args;

/// Starts the children that `args` ask for and returns their pids.
///
/// # Errors
/// When a process cannot be started.
pub(crate) fn start(args: &Args) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    if args.child {
        pids.push(idle(args)?.stdin(Stdio::null()).spawn()?.id());
    }
    if args.daemon_child {
        let between = idle(args)?
            .arg("--daemonize")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()?;
        let pid = String::from_utf8_lossy(&between.stdout);
        pids.push(pid.trim().parse().map_err(io::Error::other)?);
    }
    Ok(pids)
}

/// Is the process between a worker and its daemon: leads a new session, starts
/// the daemon in it and prints its pid.
///
/// # Errors
/// When there is no new session or no process.
pub(crate) fn daemonize(args: &Args) -> io::Result<()> {
    nix::unistd::setsid()?;
    let daemon = idle(args)?
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    writeln!(io::stdout(), "{}", daemon.id())
}

/// Returns the command of a process that only holds `--child-anon` and
/// `--child-vram`.
fn idle(args: &Args) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    // The process between passes on what it was given.
    let (name, held, vram) = if args.daemonize {
        (args.name.clone(), args.anon, args.vram)
    } else {
        let name = format!("{}-child", args.name);
        (name, args.child_anon, args.child_vram)
    };
    command.args(["--idle", "--silent", "--name", &name]);
    command.args(["--anon", &held.to_string()]);
    if let Some(folder) = args.vram_dir.as_ref().filter(|_| vram > 0) {
        command.args(["--vram", &vram.to_string(), "--vram-dir"]);
        command.arg(folder).args(["--gpus", &args.gpus.join(",")]);
    }
    if args.child_ignore_term || (args.daemonize && args.ignore_term) {
        command.arg("--ignore-term");
    }
    Ok(command)
}
