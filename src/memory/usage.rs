//! What one process holds, by `/proc/<pid>/statm` and `/proc/<pid>/status`.
//!
//! Both cost the same for a small and a huge process (5 and 11 µs): neither
//! walks page tables. `statm` tells anonymous from the rest, `status` tells
//! all parts.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::Usage;
use crate::model::Bytes;
use crate::procfs;

/// One process' memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ProcessMemory {
    pub(super) anon: Bytes,
    pub(super) file: Bytes,
    pub(super) shmem: Bytes,
    pub(super) swap: Bytes,
    pub(super) hugetlb: Bytes,
    pub(super) locked: Bytes,
}

impl ProcessMemory {
    /// Reads `/proc/<pid>/status`; `None` when the process is gone or holds no
    /// memory of its own any more, as a zombie.
    pub(super) fn read(pid: i32) -> Option<Self> {
        Self::parse(&procfs::read(format!("/proc/{pid}/status")).ok()?)
    }

    /// Parses the lines of `/proc/<pid>/status`. The command's name may hold
    /// anything but a line break, so keys count at the start of a line only.
    fn parse(text: &[u8]) -> Option<Self> {
        let mut memory = Self::default();
        let mut has_memory = false;
        for line in text.split(|byte| *byte == b'\n') {
            let Some((key, bytes)) = kib_line(line) else {
                continue;
            };
            match key {
                "VmRSS" => has_memory = true,
                "RssAnon" => memory.anon = bytes,
                "RssFile" => memory.file = bytes,
                "RssShmem" => memory.shmem = bytes,
                "VmSwap" => memory.swap = bytes,
                "VmLck" => memory.locked = bytes,
                "HugetlbPages" => memory.hugetlb = bytes,
                _ => {}
            }
        }
        has_memory.then_some(memory)
    }

    /// Returns `RssAnon + RssFile + RssShmem`.
    pub(super) fn rss(&self) -> Bytes {
        self.anon + self.file + self.shmem
    }

    /// Returns what can be the same pages as another process': mapped files
    /// and shared memory.
    pub(super) fn mapped(&self) -> Bytes {
        self.file + self.shmem
    }

    /// Brings the parts up to date with newer sizes. `statm` does not tell
    /// files from shared memory: shared memory is taken to have stayed, because
    /// the kernel drops file pages only.
    pub(super) fn with_sizes(mut self, sizes: Sizes) -> Self {
        self.anon = sizes.resident - sizes.shared;
        self.shmem = self.shmem.min(sizes.shared);
        self.file = sizes.shared - self.shmem;
        self
    }
}

/// Parses `Key:   123 kB`, as `status`, `smaps` and `meminfo` write it.
pub(super) fn kib_line(line: &[u8]) -> Option<(&str, Bytes)> {
    let line = std::str::from_utf8(line).ok()?;
    let (key, rest) = line.split_once(':')?;
    let kib = rest.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some((key, Bytes::kib(kib)))
}

/// Returns the size of a page.
pub(super) fn page_size() -> u64 {
    u64::try_from(rustix::param::page_size()).expect("a page size fits 64 bits")
}

/// The two figures of `/proc/<pid>/statm` that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// All resident pages.
    pub(super) resident: Bytes,
    /// Those of files and shared memory.
    pub(super) shared: Bytes,
}

/// Seven numbers of at most 20 digits.
const LONGEST_STATM: usize = 160;

impl Sizes {
    /// Opens `/proc/<pid>/statm`; `None` when the process is gone. The file
    /// stays that process' own, also when its pid is given away.
    pub(super) fn open(pid: i32) -> Option<File> {
        File::open(format!("/proc/{pid}/statm")).ok()
    }

    /// Reads it; `None` when the process is gone or a zombie.
    pub(super) fn read(file: &File) -> Option<Self> {
        let mut text = [0; LONGEST_STATM];
        let length = file.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..length]).ok()?;
        Self::parse(text).filter(|sizes| sizes.resident > Bytes::ZERO)
    }

    fn parse(text: &str) -> Option<Self> {
        let page = page_size();
        let mut pages = text.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
        let mut next = || Some(Bytes(pages.next()?.ok()?.saturating_mul(page)));
        Some(Self {
            resident: next()?,
            shared: next()?,
        })
    }
}

/// Reads how often the process took a page fault that needed no disk: field 10
/// of `/proc/<pid>/stat`. Writing to inherited pages shows in no other figure.
pub(super) fn minor_faults(pid: i32) -> Option<u64> {
    let text = procfs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_minor_faults(&String::from_utf8_lossy(&text))
}

fn parse_minor_faults(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(7)?.parse().ok()
}

/// Adds up a tree's processes, each page as often as it is mapped.
pub(super) fn sum<'a>(members: impl IntoIterator<Item = &'a ProcessMemory>) -> Usage {
    let mut usage = Usage::default();
    for memory in members {
        usage.processes += 1;
        usage.anon += memory.anon;
        usage.file += memory.file;
        usage.shmem += memory.shmem;
        usage.swap += memory.swap;
        usage.hugetlb += memory.hugetlb;
        usage.locked += memory.locked;
    }
    usage.rss = usage.anon + usage.file + usage.shmem;
    usage
}

/// Returns whether `now` is so far from `before` that what was derived from it
/// may be wrong: by more than 2 % and 16 MiB.
pub(super) fn moved_much(before: Bytes, now: Bytes) -> bool {
    now.max(before) - now.min(before) > before.percent(2).max(Bytes::mib(16))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &[u8] = b"Name:\tRssAnon:\t7 kB\nUmask:\t0022\nState:\tS (sleeping)\n\
        VmPeak:\t  999 kB\nVmLck:\t      64 kB\nVmRSS:\t    1234 kB\nRssAnon:\t    1000 kB\n\
        RssFile:\t     200 kB\nRssShmem:\t      34 kB\nVmSwap:\t      12 kB\n\
        HugetlbPages:\t    2048 kB\nThreads:\t1\n";

    #[test]
    fn every_part_of_status_is_read_and_the_name_cannot_fake_one() {
        let memory = ProcessMemory::parse(STATUS).expect("a living process");
        assert_eq!(
            memory,
            ProcessMemory {
                anon: Bytes::kib(1000),
                file: Bytes::kib(200),
                shmem: Bytes::kib(34),
                swap: Bytes::kib(12),
                hugetlb: Bytes::kib(2048),
                locked: Bytes::kib(64),
            }
        );
        assert_eq!(memory.rss(), Bytes::kib(1234));
    }

    #[test]
    fn a_zombie_has_no_memory() {
        assert_eq!(
            ProcessMemory::parse(b"Name:\tx\nState:\tZ (zombie)\n"),
            None
        );
    }

    #[test]
    fn newer_sizes_take_dropped_pages_off_the_files() {
        let before = ProcessMemory::parse(STATUS).expect("a living process");
        let after = before.with_sizes(Sizes {
            resident: Bytes::kib(1134),
            shared: Bytes::kib(84),
        });
        assert_eq!(
            (after.anon, after.file, after.shmem, after.locked),
            (
                Bytes::kib(1050),
                Bytes::kib(50),
                Bytes::kib(34),
                Bytes::kib(64)
            )
        );
    }

    #[test]
    fn statm_counts_pages() {
        let page = page_size();
        let sizes = Sizes::parse("1000 300 120 1 0 500 0\n").expect("a valid line");
        assert_eq!(sizes.resident, Bytes(300 * page));
        assert_eq!(sizes.shared, Bytes(120 * page));
        assert_eq!(Sizes::parse("1000"), None);
    }

    #[test]
    fn minor_faults_are_the_tenth_field() {
        let line = "4242 (a) S 9 (b)) S 17 4242 99 0 -1 4194560 1234 2 3 4 5";
        assert_eq!(parse_minor_faults(line), Some(1234));
    }

    #[test]
    fn this_process_is_the_same_by_both_files() {
        let me = i32::try_from(std::process::id()).expect("a pid fits");
        let status = ProcessMemory::read(me).expect("this process runs");
        let file = Sizes::open(me).expect("this process runs");
        let sizes = Sizes::read(&file).expect("this process runs");
        assert_eq!(
            Sizes::read(&file),
            Sizes::read(&file),
            "it can be read again"
        );
        assert!(!moved_much(status.rss(), sizes.resident));
    }

    #[test]
    fn much_is_more_than_two_percent_and_sixteen_mebibytes() {
        assert!(!moved_much(Bytes::mib(10), Bytes::mib(26)));
        assert!(moved_much(Bytes::mib(10), Bytes::mib(27)));
        assert!(!moved_much(
            Bytes::gib(10),
            Bytes::gib(10) + Bytes::mib(200)
        ));
        assert!(moved_much(Bytes::gib(10), Bytes::gib(10) - Bytes::mib(210)));
    }
}
