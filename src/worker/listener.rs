//! Whose listener is it that answers on a worker's port?
//!
//! A stranger on the port would pass for a ready worker. The socket that
//! listens is found in `/proc/net/tcp` and `tcp6` by its inode, and the inode
//! among the open files of the worker's tree (`proc_pid_net(5)`, `proc_pid_fd(5)`).

use std::collections::BTreeSet;
use std::path::Path;

use crate::model::Upstream;
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
    let Ok(table) = ProcessTable::scan() else {
        return Owner::Hidden;
    };
    let mut hidden = false;
    for member in tree.refresh(&table) {
        match sockets(member.pid) {
            Some(open) if !open.is_disjoint(&inodes) => return Owner::Ours,
            Some(_) => {}
            None => hidden = true,
        }
    }
    if hidden {
        Owner::Hidden
    } else {
        Owner::Stranger
    }
}

fn listening_on(port: u16, files: [&str; 2]) -> BTreeSet<u64> {
    let texts = files
        .iter()
        .filter_map(|file| std::fs::read_to_string(file).ok());
    texts.flat_map(|text| parse_tcp(&text, port)).collect()
}

/// Inodes of sockets in state LISTEN (`0A`) on `port`.
fn parse_tcp(text: &str, port: u16) -> Vec<u64> {
    let wanted = format!(":{port:04X}");
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let listens = fields.get(3) == Some(&"0A") && fields.get(1)?.ends_with(&wanted);
            listens.then(|| fields.get(9)?.parse().ok()).flatten()
        })
        .collect()
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

/// Inodes of the sockets a process has open; `None` when they cannot be seen.
fn sockets(pid: i32) -> Option<BTreeSet<u64>> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    Some(
        files
            .filter_map(|file| {
                let target = std::fs::read_link(file.ok()?.path()).ok()?;
                target
                    .to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse()
                    .ok()
            })
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_on_the_port_are_found() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n\
            1: 0100007F:1F90 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n\
            2: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0\n";
        assert_eq!(parse_tcp(text, 8080), [4711]);
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
