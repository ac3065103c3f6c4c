//! What `/proc` says of residentd and its workers, read by other means than
//! residentd's own.

use std::fs;

/// A process of this run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i64,
    pub(crate) parent: i64,
    /// In clock ticks since the boot: with the pid, who it is.
    pub(crate) started: u64,
    pub(crate) arguments: Vec<String>,
}

impl Process {
    /// Returns the word after this flag.
    pub(crate) fn after(&self, flag: &str) -> Option<&str> {
        let at = self.arguments.iter().position(|word| word == flag)?;
        self.arguments.get(at + 1).map(String::as_str)
    }

    /// Returns the port it serves on.
    pub(crate) fn port(&self) -> Option<u16> {
        self.after("--port")?.parse().ok()
    }

    /// Returns whether it is the process that serves this model.
    pub(crate) fn serves(&self, model: &str) -> bool {
        let program = self.arguments.first();
        program.is_some_and(|program| program.ends_with("stub-worker"))
            && self.after("--name") == Some(model)
    }

    /// Returns whether it still runs, and is no zombie.
    pub(crate) fn runs(&self) -> bool {
        stat(self.pid).is_some_and(|(state, _, started)| state != 'Z' && started == self.started)
    }

    /// Returns how long it has run, in seconds.
    pub(crate) fn age(&self) -> f64 {
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let uptime: f64 = uptime
            .split(' ')
            .next()
            .and_then(|seconds| seconds.parse().ok())
            .unwrap_or(0.0);
        let ticks = u32::try_from(self.started).unwrap_or(u32::MAX);
        uptime - f64::from(ticks) / 100.0
    }

    /// Returns what is resident of it, in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid));
        let rollup = rollup.unwrap_or_default();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) << 10
    }
}

/// Returns state, parent and start time.
fn stat(pid: i64) -> Option<(char, i64, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.rsplit(") ").next()?;
    let words: Vec<&str> = rest.split(' ').collect();
    Some((
        words.first()?.chars().next()?,
        words.get(1)?.parse().ok()?,
        words.get(19)?.parse().ok()?,
    ))
}

fn pids() -> Vec<i64> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

fn process(pid: i64) -> Option<Process> {
    let (state, parent, started) = stat(pid)?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = line.split(|byte| *byte == 0);
    let arguments = words
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    (state != 'Z').then_some(Process {
        pid,
        parent,
        started,
        arguments,
    })
}

/// Returns all processes that have `mark` in their environment: residentd and
/// whatever came of it.
pub(crate) fn marked(mark: &str) -> Vec<Process> {
    let has_mark = |pid: &i64| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mut windows = environment.windows(mark.len());
        windows.any(|window| window == mark.as_bytes())
    };
    pids()
        .into_iter()
        .filter(has_mark)
        .filter_map(process)
        .collect()
}

/// Returns the children of this process.
pub(crate) fn children(parent: i64) -> Vec<Process> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task"));
    let lists = tasks
        .into_iter()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    lists
        .flat_map(|list| {
            let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<i64>>()
        })
        .filter_map(process)
        .collect()
}

/// Returns the zombies among the children of this process.
pub(crate) fn zombies(parent: i64) -> Vec<i64> {
    let is_one = |pid: &i64| {
        stat(*pid).is_some_and(|(state, its_parent, _)| state == 'Z' && its_parent == parent)
    };
    pids().into_iter().filter(is_one).collect()
}

/// Returns how many files a process has open.
pub(crate) fn open_files(pid: i64) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Returns the TCP ports on which anybody listens, with the inodes of the sockets.
pub(crate) fn listening() -> Vec<(u16, u64)> {
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let port = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (_, port) = words.get(1)?.split_once(':')?;
        let listens = *words.get(3)? == "0A";
        let port = u16::from_str_radix(port, 16).ok().filter(|_| listens)?;
        Some((port, words.get(9)?.parse().ok()?))
    };
    table.lines().filter_map(port).collect()
}

/// Returns the processes that have this socket open.
pub(crate) fn holders(inode: u64) -> Vec<i64> {
    let link = format!("socket:[{inode}]");
    let holds = |pid: &i64| {
        let files = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        let mut links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        links.any(|target| target.as_os_str() == link.as_str())
    };
    pids().into_iter().filter(holds).collect()
}
