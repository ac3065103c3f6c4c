//! The host's memory and the cgroups above us: what physics still gives.

use std::path::{Path, PathBuf};

use sysinfo::System;

use super::cgroup::{Cgroup, Levels};
use super::kept::KeptFile;
use super::oom::{OomCounters, OomFiles};
use super::usage::kib_line;
use super::{HostReading, PsiReading, psi};
use crate::model::Bytes;

/// Reads the host. Owns the files it reads, and sysinfo's figures.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
    /// The real host's totals; `None` when another root was given.
    system: Option<System>,
    meminfo: KeptFile,
    pressure: KeptFile,
    cgroup: Option<Levels>,
    oom_files: OomFiles,
    oom: OomCounters,
    psi: Option<PsiReading>,
    text: Vec<u8>,
}

/// `/proc/meminfo`, as far as it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    total: Bytes,
    available: Bytes,
    swap_total: Bytes,
    swap_free: Bytes,
}

impl Host {
    /// Looks below `root`, which is `/` but for tests.
    pub(super) fn new(root: PathBuf) -> Self {
        let system = (root == Path::new("/"))
            .then(System::new)
            .and_then(Result::ok);
        let mut host = Self {
            system,
            meminfo: KeptFile::new(root.join("proc/meminfo")),
            pressure: KeptFile::new(root.join("proc/pressure/memory")),
            oom_files: OomFiles::new(&root, None),
            root,
            cgroup: None,
            oom: OomCounters::default(),
            psi: None,
            text: Vec::new(),
        };
        host.relocate();
        host
    }

    /// Looks again for what hardly ever changes: our cgroup, since someone may
    /// have moved us, and how much memory there is at all.
    pub(super) fn relocate(&mut self) {
        let place = Cgroup::locate(&self.root);
        if self.place() != place.as_ref() {
            self.oom_files = OomFiles::new(&self.root, place.as_ref());
            self.cgroup = place.map(Levels::of);
        }
        if let Some(system) = &mut self.system {
            system.refresh_memory();
        }
    }

    fn place(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref().map(Levels::place)
    }

    /// Reads everything; what explains and does not decide only when `all` is
    /// wanted: the kernel's counts of its kills and its averages of pressure.
    /// What cannot be read is zero or absent.
    pub(super) fn read(&mut self, all: bool) -> HostReading {
        if all {
            self.oom = self.oom_files.read(&mut self.text);
            self.psi = self.pressure.read(&mut self.text).and_then(psi::parse);
        }
        let totals = self.totals();
        let cgroup = self.cgroup.as_mut().and_then(Levels::read);
        let headroom = cgroup.as_ref().map_or(totals.available, |(_, margin)| {
            totals.available.min(*margin)
        });
        HostReading {
            total: totals.total,
            available: totals.available,
            swap_total: totals.swap_total,
            swap_free: totals.swap_free,
            headroom,
            cgroup: cgroup.map(|(reading, _)| reading),
            psi: self.psi,
            oom: self.oom,
        }
    }

    fn totals(&mut self) -> Totals {
        let text = self.meminfo.read(&mut self.text).unwrap_or_default();
        let read = Totals::parse(text.as_bytes());
        self.system.as_ref().map_or(read, |system| Totals {
            total: Bytes(system.total_memory()),
            swap_total: Bytes(system.total_swap()),
            ..read
        })
    }
}

impl Totals {
    fn parse(text: &[u8]) -> Self {
        let mut totals = Self::default();
        for (key, bytes) in text.split(|byte| *byte == b'\n').filter_map(kib_line) {
            match key {
                "MemTotal" => totals.total = bytes,
                "MemAvailable" => totals.available = bytes,
                "SwapTotal" => totals.swap_total = bytes,
                "SwapFree" => {
                    totals.swap_free = bytes;
                    break;
                }
                _ => {}
            }
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const MEMINFO: &str = "MemTotal:       1000 kB\nMemFree:         10 kB\n\
        MemAvailable:    800 kB\nHugePages_Total:       0\nSwapTotal:       50 kB\n\
        SwapFree:        40 kB\n";

    fn host_with(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        let host = Host::new(root.path().to_path_buf());
        (root, host)
    }

    #[test]
    fn without_a_cgroup_headroom_is_what_the_host_has_available() {
        let (_root, mut host) = host_with(&[("proc/meminfo", MEMINFO)]);
        let reading = host.read(true);
        assert_eq!(reading.total, Bytes::kib(1000));
        assert_eq!(reading.headroom, Bytes::kib(800));
        assert_eq!(
            (reading.swap_total, reading.swap_free),
            (Bytes::kib(50), Bytes::kib(40))
        );
        assert!(reading.cgroup.is_none() && reading.psi.is_none());
        assert_eq!(reading.domain_total(), Bytes::kib(1000));
    }

    #[test]
    fn a_cgroup_margin_below_the_hosts_is_the_headroom() {
        let (_root, mut host) = host_with(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/\n"),
            (
                "proc/self/mountinfo",
                "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            ),
            ("sys/fs/cgroup/memory.max", "512000\n"),
            ("sys/fs/cgroup/memory.current", "102400\n"),
        ]);
        let reading = host.read(true);
        assert_eq!(reading.headroom, Bytes::kib(400));
        assert_eq!(reading.domain_total(), Bytes::kib(500));
    }

    #[test]
    fn the_real_host_has_memory() {
        let reading = Host::new(PathBuf::from("/")).read(true);
        assert!(reading.total > Bytes::ZERO);
        assert!(reading.headroom > Bytes::ZERO && reading.headroom <= reading.available);
        let text = fs::read("/proc/meminfo").expect("meminfo");
        assert_eq!(reading.total, Totals::parse(&text).total);
    }
}
