//! Whose GPU memory is whose: joins the driver's list of processes with the
//! workers' trees.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{VramSource, VramUsage};
use crate::model::Bytes;
use crate::procfs::{self, ProcessStat};

/// One process on one device, as the driver lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) device: u32,
    /// In our namespace with current drivers; some list a thread's id.
    pub(super) pid: i32,
    /// `None` when the driver lists the process without a number.
    pub(super) bytes: Option<Bytes>,
    /// Who lists it.
    pub(super) source: VramSource,
}

/// GPU memory by process and device.
#[derive(Debug, Default)]
pub(super) struct Vram(BTreeMap<(i32, u32), (Option<Bytes>, VramSource)>);

impl Vram {
    /// Joins the rows. `identify` finds the process of ours that a row means;
    /// those of strangers are left out.
    pub(super) fn new(rows: &[Row], identify: impl Fn(i32) -> Option<i32>) -> Self {
        let mut merged = BTreeMap::new();
        for row in rows {
            // `fdinfo` was read of our own processes: the pid is one of them.
            let own = row.source == VramSource::DrmFdinfo;
            let Some(pid) = (if own {
                Some(row.pid)
            } else {
                identify(row.pid)
            }) else {
                continue;
            };
            // NVIDIA's driver says 0 when it compares the wrong namespace's pid.
            let doubtful = row.source == VramSource::NvmlProcess;
            let bytes = row.bytes.filter(|bytes| !doubtful || *bytes > Bytes::ZERO);
            // A process that computes and draws is listed twice, each time
            // with all it holds. Unknown is less than any number.
            let entry = merged
                .entry((pid, row.device))
                .or_insert((None, row.source));
            if bytes > entry.0 {
                *entry = (bytes, row.source);
            }
        }
        Self(merged)
    }

    /// Adds up a tree's processes by device. A device with a process of
    /// unknown size is unknown as a whole.
    pub(super) fn of_tree(&self, pids: impl IntoIterator<Item = i32>) -> Vec<VramUsage> {
        let mut devices = BTreeMap::<u32, VramUsage>::new();
        for pid in pids {
            for ((_, device), (bytes, source)) in self.0.range((pid, 0)..=(pid, u32::MAX)) {
                let sum = devices.entry(*device).or_insert(VramUsage {
                    device: *device,
                    bytes: Some(Bytes::ZERO),
                    source: *source,
                    tainted: false,
                });
                sum.bytes = sum.bytes.zip(*bytes).map(|(sum, bytes)| sum + bytes);
                sum.source = match sum.bytes {
                    Some(_) => sum.source.max(*source),
                    None => VramSource::Unknown,
                };
            }
        }
        devices.into_values().collect()
    }
}

/// Returns the one of the `known` processes that a driver means by a number:
/// the process itself, a thread of it, or, where the host's `/proc` is mounted,
/// the number that the host gives to it.
pub(super) fn identify(
    number: i32,
    known: &BTreeSet<i32>,
    host_proc: Option<&Path>,
) -> Option<i32> {
    let known = |pid: &i32| known.contains(pid);
    let by_host = host_proc.and_then(|host| by_host(number, host));
    by_host
        .filter(known)
        .or_else(|| Some(number).filter(known))
        .or_else(|| leader_of_thread(Path::new("/proc"), number).filter(known))
}

/// Returns the process of our namespace that the host gives this number to.
///
/// The line `NSpid` of the host's `/proc/<pid>/status` lists a process' numbers
/// from the host's namespace inwards; see `pid_namespaces(7)`. The start time,
/// which is the same in every namespace, tells whether it is the same process.
fn by_host(number: i32, host: &Path) -> Option<i32> {
    let leader = leader_of_thread(host, number)?;
    let started = start_time(host, leader)?;
    let status = read_status(host, leader)?;
    let numbers = field(&status, "NSpid:")?.split_ascii_whitespace();
    let mut inner = numbers.skip(1).filter_map(|pid| pid.parse().ok());
    inner.find(|pid| start_time(Path::new("/proc"), *pid) == Some(started))
}

/// Returns the process that a thread belongs to.
fn leader_of_thread(proc: &Path, thread: i32) -> Option<i32> {
    let status = read_status(proc, thread)?;
    field(&status, "Tgid:")?.parse().ok()
}

fn read_status(proc: &Path, pid: i32) -> Option<String> {
    let text = procfs::read(proc.join(pid.to_string()).join("status")).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

fn field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim())
}

fn start_time(proc: &Path, pid: i32) -> Option<u64> {
    ProcessStat::read_in(proc, pid).map(|stat| stat.key.start_time)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn row(device: u32, pid: i32, mib: Option<u64>) -> Row {
        Row {
            device,
            pid,
            bytes: mib.map(Bytes::mib),
            source: VramSource::NvmlProcess,
        }
    }

    fn measured(device: u32, mib: u64) -> VramUsage {
        VramUsage {
            device,
            bytes: Some(Bytes::mib(mib)),
            source: VramSource::NvmlProcess,
            tainted: false,
        }
    }

    fn vram(rows: &[Row]) -> Vram {
        // Thread 11 belongs to process 10.
        Vram::new(rows, |pid| match pid {
            10 | 11 => Some(10),
            20 => Some(20),
            _ => None,
        })
    }

    #[test]
    fn a_tree_is_added_up_on_each_device() {
        let vram = vram(&[
            row(0, 10, Some(100)),
            row(0, 20, Some(50)),
            row(1, 20, Some(7)),
            row(0, 99, Some(1000)),
        ]);
        assert_eq!(vram.of_tree([10, 20]), [measured(0, 150), measured(1, 7)]);
        assert_eq!(vram.of_tree([10]), [measured(0, 100)]);
        assert_eq!(vram.of_tree([30]), []);
    }

    #[test]
    fn compute_and_graphics_rows_of_one_process_are_one() {
        let vram = vram(&[
            row(0, 10, Some(100)),
            row(0, 10, Some(120)),
            row(0, 10, None),
        ]);
        assert_eq!(vram.of_tree([10]), [measured(0, 120)]);
    }

    #[test]
    fn a_listed_thread_counts_for_its_process() {
        let vram = vram(&[row(0, 11, Some(64)), row(0, 10, Some(64))]);
        assert_eq!(vram.of_tree([10]), [measured(0, 64)]);
    }

    #[test]
    fn a_row_without_a_number_or_with_zero_is_unknown_never_zero() {
        for unknown in [None, Some(0)] {
            let vram = vram(&[row(0, 10, Some(64)), row(0, 20, unknown)]);
            assert_eq!(
                vram.of_tree([10, 20]),
                [VramUsage {
                    device: 0,
                    bytes: None,
                    source: VramSource::Unknown,
                    tainted: false,
                }]
            );
        }
    }

    #[test]
    fn the_kernels_own_zero_is_a_zero_and_its_pids_are_ours() {
        let none = Row {
            source: VramSource::DrmFdinfo,
            ..row(0, 30, Some(0))
        };
        // 30 is nobody that `identify` knows.
        assert_eq!(vram(&[none]).of_tree([30])[0].bytes, Some(Bytes::ZERO));
    }

    #[test]
    fn this_process_leads_its_threads() {
        let me = i32::try_from(std::process::id()).expect("a pid fits");
        let thread = nix::unistd::gettid().as_raw();
        assert_eq!(identify(thread, &BTreeSet::from([me]), None), Some(me));
        assert_eq!(identify(thread, &BTreeSet::new(), None), None);
    }

    #[test]
    fn a_hosts_number_is_resolved_by_its_proc_and_the_start_time() {
        let me = i32::try_from(std::process::id()).expect("a pid fits");
        let started = ProcessStat::read(me)
            .expect("this process runs")
            .key
            .start_time;
        // A number that no process here can have.
        let foreign = 99_999_999;
        let host = tempfile::tempdir().expect("a temporary folder");
        let folder = host.path().join(foreign.to_string());
        fs::create_dir(&folder).expect("a folder");
        let status = format!("Name:\tx\nTgid:\t{foreign}\nNSpid:\t{foreign}\t17\t{me}\n");
        fs::write(folder.join("status"), status).expect("a file");
        let stat = |start: u64| {
            let zeros = "0 ".repeat(15);
            let line = format!("{foreign} (x) S 1 1 1 {zeros}{start} 0 77");
            fs::write(folder.join("stat"), line).expect("a file");
        };
        stat(started);
        let known = BTreeSet::from([me]);
        assert_eq!(identify(foreign, &known, Some(host.path())), Some(me));
        assert_eq!(identify(foreign, &known, None), None);
        stat(started + 1);
        assert_eq!(identify(foreign, &known, Some(host.path())), None);
    }
}
