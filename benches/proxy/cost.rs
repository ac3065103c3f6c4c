//! What a target's processes have used: processor time from schedstat, resident
//! memory from status, and the busy time of the whole host beside it.

use std::fs;

use crate::load::float;

/// The processes of a target: those that it started too, but for the workers
/// that residentd starts, which every target uses.
#[derive(Clone, Debug)]
pub(crate) struct Processes {
    pub(crate) main: u32,
    /// Whose command line holds this is no part of the target.
    pub(crate) except: &'static str,
}

impl Processes {
    fn all(&self) -> Vec<u32> {
        let mut found = vec![self.main];
        let mut next = 0;
        while let Some(pid) = found.get(next).copied() {
            next += 1;
            for task in names(&format!("/proc/{pid}/task")) {
                let path = format!("/proc/{pid}/task/{task}/children");
                let children = fs::read_to_string(path).unwrap_or_default();
                let children = children.split_whitespace();
                let children = children.filter_map(|child| child.parse().ok());
                found.extend(children.filter(|child| !self.is_worker(*child)));
            }
        }
        found
    }

    fn is_worker(&self, pid: u32) -> bool {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        !self.except.is_empty() && line.contains(self.except)
    }

    /// Returns for how long all threads have run, in µs.
    pub(crate) fn run_time(&self) -> f64 {
        let of = |pid: &u32| {
            let tasks = names(&format!("/proc/{pid}/task")).into_iter();
            let times = tasks.filter_map(|task| {
                let path = format!("/proc/{pid}/task/{task}/schedstat");
                let text = fs::read_to_string(path).ok()?;
                text.split(' ').next()?.parse::<f64>().ok()
            });
            times.sum::<f64>() / 1e3
        };
        self.all().iter().map(of).sum()
    }

    /// Returns how often threads that are there now gave up or lost their core.
    pub(crate) fn switches(&self) -> f64 {
        let of = |pid: &u32| {
            let tasks = names(&format!("/proc/{pid}/task")).into_iter();
            let counts = tasks.map(|task| {
                let path = format!("/proc/{pid}/task/{task}/status");
                let text = fs::read_to_string(path).unwrap_or_default();
                let lines = text.lines().filter(|line| line.contains("ctxt_switches:"));
                let counts = lines.filter_map(|line| line.split('\t').nth(1)?.parse::<f64>().ok());
                counts.sum::<f64>()
            });
            counts.sum::<f64>()
        };
        self.all().iter().map(of).sum()
    }

    /// Returns the resident memory of all processes, in bytes.
    pub(crate) fn resident(&self) -> f64 {
        let of = |pid: &u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = text.lines().find(|line| line.starts_with("VmRSS:"))?;
            line.split_whitespace().nth(1)?.parse::<f64>().ok()
        };
        self.all().iter().filter_map(of).sum::<f64>() * 1024.0
    }
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Returns for how long the host's cores have been busy, together, in µs: all but
/// idle time and waiting for a disk.
pub(crate) fn host_busy() -> f64 {
    let text = fs::read_to_string("/proc/stat").expect("Linux has it");
    let line = text.lines().next().expect("a line of all cores");
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal; what guests use is in the first two.
    let busy = ticks[..3].iter().sum::<u64>() + ticks[5..7].iter().sum::<u64>();
    float(busy) * 1e6 / float(rustix::param::clock_ticks_per_second())
}
