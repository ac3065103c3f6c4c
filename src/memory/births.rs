//! Has anybody been born?
//!
//! Listing `/proc` costs more than all else in a pass over a few processes, and
//! is needed only to see who is new. The kernel tells in `/proc/loadavg` which
//! number it gave out last, to a process or a thread of our pid namespace; see
//! `proc_loadavg(5)`.

use std::time::Duration;

use super::kept::KeptFile;
use crate::clock::Timestamp;

/// After this all are listed whatever the kernel says: a process shows a moment
/// after it has its number, and its mark only when it has begun its program.
const ANYWAY: Duration = Duration::from_secs(1);

/// Tells when it is time to look for new processes.
#[derive(Debug)]
pub(super) struct Births {
    file: KeptFile,
    text: Vec<u8>,
    last: Option<u64>,
    listed: Option<Timestamp>,
}

impl Births {
    pub(super) fn new() -> Self {
        Self {
            file: KeptFile::new("/proc/loadavg".into()),
            text: Vec::new(),
            last: None,
            listed: None,
        }
    }

    /// Returns whether processes are to be listed now. Whoever is told so does it:
    /// it is not told again for those that were born until now.
    pub(super) fn are_due(&mut self, now: Timestamp) -> bool {
        let last = self.file.read(&mut self.text).and_then(last_number);
        let lately = self.listed.is_some_and(|at| now.since(at) < ANYWAY);
        let due = last.is_none() || last != self.last || !lately;
        if due {
            self.last = last;
            self.listed = Some(now);
        }
        due
    }
}

/// Reads the last field: `0.00 0.01 0.05 1/80 11206`.
fn last_number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().nth(4)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_birth_is_told_once_and_a_second_is_the_longest_without_a_list() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("loadavg");
        let born = |number: u64| {
            let text = format!("0.00 0.01 0.05 1/80 {number}\n");
            std::fs::write(&path, text).expect("written");
        };
        let at = Timestamp::from_millis;
        let mut births = Births {
            file: KeptFile::new(path.clone()),
            ..Births::new()
        };
        assert!(births.are_due(at(0)) && births.are_due(at(1)), "no file");
        born(7);
        assert!(births.are_due(at(2)));
        assert!(!births.are_due(at(100)));
        born(8);
        assert!(births.are_due(at(101)));
        assert!(!births.are_due(at(1100)));
        assert!(births.are_due(at(1101)));
    }

    #[test]
    fn this_kernel_tells_of_a_new_process() {
        let mut births = Births::new();
        births.are_due(Timestamp::START);
        let mut child = std::process::Command::new("true").spawn().expect("it runs");
        assert!(births.are_due(Timestamp::START));
        child.wait().expect("it is our child");
    }
}
