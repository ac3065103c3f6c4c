//! Whose listener is it that answers on a worker's port?
//!
//! A stranger on the port would pass for a ready worker. The socket that
//! listens is found in `/proc/net/tcp` and `tcp6` by its inode, and the inode
//! among the open files of the worker's tree (`proc_pid_net(5)`, `proc_pid_fd(5)`).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use tracing::warn;

use super::output::Tail;
use crate::model::{Upstream, WorkerId};
use crate::procfs::{ProcessTable, ProcessTree};

/// Who listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A process of the worker's tree.
    Ours,
    /// Somebody else.
    Stranger,
    /// It cannot be seen: open files of another user, another namespace.
    Hidden,
}

/// Looks who it is that answers on a worker's address while it starts.
#[derive(Debug)]
pub(super) struct Doorkeeper {
    worker: WorkerId,
    upstream: Upstream,
    tree: Arc<ProcessTree>,
    tail: Arc<Tail>,
    warned: bool,
}

impl Doorkeeper {
    pub(super) fn new(
        worker: WorkerId,
        upstream: Upstream,
        tree: Arc<ProcessTree>,
        tail: &Arc<Tail>,
    ) -> Self {
        Self {
            worker,
            upstream,
            tree,
            tail: Arc::clone(tail),
            warned: false,
        }
    }

    /// Returns whether it is the worker that listens, as far as that can be seen.
    /// Of a stranger is told once, in the log and in the worker's own.
    pub(super) fn lets_in(&mut self) -> bool {
        let owner = owner(&self.upstream, &self.tree);
        if owner == Owner::Stranger && !self.warned {
            self.warned = true;
            let upstream = &self.upstream;
            warn!(worker = %self.worker, %upstream, "another program answers on the worker's address");
            self.tail
                .push(format!("another program answers on {upstream}"));
        }
        owner != Owner::Stranger
    }
}

/// Returns who listens on `upstream`.
pub(super) fn owner(upstream: &Upstream, tree: &ProcessTree) -> Owner {
    let inodes = match upstream {
        Upstream::Tcp(address) if address.ip().is_loopback() => {
            listening_on(address.port(), ["/proc/net/tcp", "/proc/net/tcp6"])
        }
        // On another machine or behind a name nothing can be seen.
        Upstream::Tcp(_) => return Owner::Hidden,
        Upstream::Unix(path) => listening_at(path),
    };
    if inodes.is_empty() {
        return Owner::Hidden;
    }
    // Most workers are one process: it is asked before all are looked for.
    if holds(tree.leader().pid, &inodes) == Some(true) {
        return Owner::Ours;
    }
    let Ok(table) = ProcessTable::scan() else {
        return Owner::Hidden;
    };
    let mut hidden = false;
    for member in tree.refresh(&table) {
        match holds(member.pid, &inodes) {
            Some(true) => return Owner::Ours,
            Some(false) => {}
            None => hidden = true,
        }
    }
    if hidden {
        Owner::Hidden
    } else {
        Owner::Stranger
    }
}

/// A listener on `::` takes IPv4 too, but one on IPv4 is found first: reading
/// the other table costs milliseconds, because the kernel walks all its sockets.
fn listening_on(port: u16, files: [&str; 2]) -> BTreeSet<u64> {
    let texts = files.iter().filter_map(|file| File::open(file).ok());
    texts
        .map(|text| parse_tcp(BufReader::new(text), port))
        .find(|inodes| !inodes.is_empty())
        .unwrap_or_default()
        .into_iter()
        .collect()
}

/// Inodes of sockets in state LISTEN (`0A`) on `port`. The kernel lists them
/// before all others, of which there may be tens of thousands.
fn parse_tcp(text: impl BufRead, port: u16) -> Vec<u64> {
    let wanted = format!(":{port:04X}");
    let mut inodes = Vec::new();
    for line in text.lines().skip(1).map_while(Result::ok) {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, _remote, state) = (fields.next(), fields.next(), fields.next());
        if state != Some("0A") {
            break;
        }
        if local.is_some_and(|local| local.ends_with(&wanted)) {
            inodes.extend(fields.nth(5).and_then(|inode| inode.parse::<u64>().ok()));
        }
    }
    inodes
}

fn listening_at(path: &Path) -> BTreeSet<u64> {
    let text = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let path = path.to_string_lossy();
    text.lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            (fields.get(7).copied() == Some(&*path))
                .then(|| fields.get(6)?.parse().ok())
                .flatten()
        })
        .collect()
}

/// Returns whether a process has one of these sockets open; `None` when that
/// cannot be seen.
fn holds(pid: i32, inodes: &BTreeSet<u64>) -> Option<bool> {
    let mut files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    Some(files.any(|file| socket(file).is_some_and(|inode| inodes.contains(&inode))))
}

fn socket(file: std::io::Result<std::fs::DirEntry>) -> Option<u64> {
    let target = std::fs::read_link(file.ok()?.path()).ok()?;
    let inode = target.to_str()?.strip_prefix("socket:[")?;
    inode.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_on_the_port_are_found() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n\
            1: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0\n\
            2: 0100007F:1F90 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n";
        assert_eq!(parse_tcp(text.as_bytes(), 8080), [4711]);
        assert_eq!(parse_tcp(text.as_bytes(), 8081), [4713]);
        assert!(parse_tcp(text.as_bytes(), 0xA000).is_empty());
    }

    #[test]
    fn this_process_owns_its_listener_and_no_other_tree_does() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let upstream = Upstream::Tcp(listener.local_addr().expect("an address"));
        let stat = |pid: u32| {
            crate::procfs::ProcessStat::read(i32::try_from(pid).expect("fits")).expect("it runs")
        };
        let me = ProcessTree::new(stat(std::process::id()).key);
        assert_eq!(owner(&upstream, &me), Owner::Ours);
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep is there");
        let tree = ProcessTree::new(stat(other.id()).key);
        let seen = owner(&upstream, &tree);
        other.kill().expect("it is our child");
        other.wait().expect("it is our child");
        assert_eq!(seen, Owner::Stranger);
    }
}
