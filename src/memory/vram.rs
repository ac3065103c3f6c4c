//! Whose GPU memory is whose: joins the driver's list of processes with the
//! workers' trees.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::{VramSource, VramUsage};
use crate::model::Bytes;

/// One process on one device, as the driver lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) device: u32,
    /// In our namespace with current drivers; some list a thread's id.
    pub(super) pid: i32,
    /// `None` when the driver lists the process without a number.
    pub(super) bytes: Option<Bytes>,
}

/// GPU memory by process and device.
#[derive(Debug, Default)]
pub(super) struct Vram(BTreeMap<(i32, u32), Option<Bytes>>);

impl Vram {
    /// Joins the rows. `known` are the processes of all trees; `leader_of`
    /// tells the process of a thread and is asked for strangers only.
    pub(super) fn new(
        rows: &[Row],
        known: &BTreeSet<i32>,
        leader_of: impl Fn(i32) -> Option<i32>,
    ) -> Self {
        let mut merged = BTreeMap::new();
        for row in rows {
            let pid = if known.contains(&row.pid) {
                row.pid
            } else {
                match leader_of(row.pid).filter(|pid| known.contains(pid)) {
                    Some(pid) => pid,
                    None => continue,
                }
            };
            // Drivers that compare the wrong namespace's pid say 0.
            let bytes = row.bytes.filter(|bytes| *bytes > Bytes::ZERO);
            // A process that computes and draws is listed twice, each time
            // with all it holds. Unknown is less than any number.
            let entry = merged.entry((pid, row.device)).or_insert(None);
            *entry = bytes.max(*entry);
        }
        Self(merged)
    }

    /// Adds up a tree's processes by device. A device with a process of
    /// unknown size is unknown as a whole.
    pub(super) fn of_tree(&self, pids: impl IntoIterator<Item = i32>) -> Vec<VramUsage> {
        let mut devices = BTreeMap::<u32, Option<Bytes>>::new();
        for pid in pids {
            for ((_, device), bytes) in self.0.range((pid, 0)..=(pid, u32::MAX)) {
                let entry = devices.entry(*device).or_insert(Some(Bytes::ZERO));
                *entry = entry.zip(*bytes).map(|(sum, bytes)| sum + bytes);
            }
        }
        devices
            .into_iter()
            .map(|(device, bytes)| VramUsage {
                device,
                bytes,
                source: match bytes {
                    Some(_) => VramSource::NvmlProcess,
                    None => VramSource::Unknown,
                },
            })
            .collect()
    }
}

/// Returns the process that a thread belongs to.
pub(super) fn leader_of_thread(thread: i32) -> Option<i32> {
    let text = fs::read(format!("/proc/{thread}/status")).ok()?;
    String::from_utf8_lossy(&text)
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:"))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(device: u32, pid: i32, mib: Option<u64>) -> Row {
        Row {
            device,
            pid,
            bytes: mib.map(Bytes::mib),
        }
    }

    fn measured(device: u32, mib: u64) -> VramUsage {
        VramUsage {
            device,
            bytes: Some(Bytes::mib(mib)),
            source: VramSource::NvmlProcess,
        }
    }

    fn vram(rows: &[Row]) -> Vram {
        // Thread 11 belongs to process 10.
        let known = BTreeSet::from([10, 20]);
        Vram::new(rows, &known, |pid| (pid == 11).then_some(10))
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
                    source: VramSource::Unknown
                }]
            );
        }
    }

    #[test]
    fn this_process_leads_its_threads() {
        let me = i32::try_from(std::process::id()).expect("a pid fits");
        let thread = nix::unistd::gettid().as_raw();
        assert_eq!(leader_of_thread(thread), Some(me));
    }
}
