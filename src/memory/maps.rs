//! Parses what `/proc/<pid>` says of single mappings: `maps`, `smaps` and
//! `smaps_rollup`. `maps` is cheap; the other two walk page tables, which costs
//! up to 20 ms per GB and stalls the process for as long.

use std::collections::BTreeMap;
use std::io::{self, BufRead};

use super::usage::kib_line;
use crate::model::Bytes;

/// A mapping smaller than this is not worth the books: it is counted in every
/// process that maps it.
pub(super) const SMALLEST: Bytes = Bytes::mib(1);

/// Names a file, a memfd or a piece of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Inode {
    pub(super) device: (u32, u32),
    pub(super) number: u64,
}

/// Resident bytes, once as mapped and once as a fair share of all mappers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) rss: Bytes,
    pub(super) pss: Bytes,
}

/// What one process has of one inode in memory, its own copies not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holding {
    pub(super) share: Share,
    /// The part of the file that is mapped: its first byte and the one after
    /// its last.
    pub(super) span: (u64, u64),
    /// Whether it is shared memory, not a file.
    pub(super) shmem: bool,
}

/// The outcome of one walk of a process' page tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PageWalk {
    /// The process' proportional share of all it maps.
    pub(super) pss: Bytes,
    /// Its anonymous pages, which a forked process may share.
    pub(super) anon: Share,
    /// Its inodes of which 1 MiB or more is mapped; empty after a rollup.
    pub(super) inodes: BTreeMap<Inode, Holding>,
}

/// One line of `maps`.
struct Mapping {
    inode: Option<Inode>,
    length: u64,
    offset: u64,
    shmem: bool,
}

impl Mapping {
    /// Parses `555e79a95000-555e79a97000 r--p 00000000 fe:00 247282   /usr/bin/head`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = fields.next()?.split_once('-')?;
        let length = hex(end)?.checked_sub(hex(start)?)?;
        let offset = hex(fields.nth(1)?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        );
        let number = fields.next()?.parse::<u64>().ok()?;
        let path = fields.next().unwrap_or_default();
        Some(Self {
            inode: (number != 0).then_some(Inode { device, number }),
            length,
            offset,
            shmem: is_shared_memory(path),
        })
    }
}

/// Shared memory shows by the names the kernel gives it. Another tmpfs is
/// taken for a file here; the sums are right all the same.
fn is_shared_memory(path: &str) -> bool {
    const NAMES: [&str; 5] = ["/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "[anon_shmem:"];
    NAMES.iter().any(|name| path.starts_with(name))
}

/// Reads `maps`: how much of each inode is mapped, from 1 MiB on.
///
/// # Errors
/// When the file cannot be read to its end.
pub(super) fn read_maps(source: impl BufRead) -> io::Result<BTreeMap<Inode, Bytes>> {
    let mut inodes = BTreeMap::<Inode, Bytes>::new();
    for_each_line(source, |line| {
        if let Some(mapping) = Mapping::parse(line)
            && let Some(inode) = mapping.inode
        {
            *inodes.entry(inode).or_default() += Bytes(mapping.length);
        }
    })?;
    inodes.retain(|_, mapped| *mapped >= SMALLEST);
    Ok(inodes)
}

/// Reads `smaps`: every mapping with what is resident of it.
///
/// # Errors
/// When the file cannot be read to its end.
pub(super) fn read_smaps(source: impl BufRead) -> io::Result<PageWalk> {
    let mut walk = PageWalk::default();
    let mut mapped = BTreeMap::<Inode, Bytes>::new();
    let mut current: Option<(Mapping, Figures)> = None;
    let mut close = |open: Option<(Mapping, Figures)>| {
        if let Some((mapping, figures)) = open {
            if let Some(inode) = mapping.inode {
                *mapped.entry(inode).or_default() += Bytes(mapping.length);
            }
            walk.add(&mapping, figures);
        }
    };
    for_each_line(source, |line| {
        if let Some((key, bytes)) = kib_line(line.as_bytes()) {
            if let Some((_, figures)) = &mut current {
                figures.set(key, bytes);
            }
        } else if let Some(mapping) = Mapping::parse(line) {
            close(current.replace((mapping, Figures::default())));
        }
    })?;
    close(current);
    walk.inodes.retain(|inode, _| mapped[inode] >= SMALLEST);
    Ok(walk)
}

/// Reads `smaps_rollup`: the sums only, which is less text than `smaps`.
///
/// # Errors
/// When the file cannot be read to its end.
pub(super) fn read_rollup(source: impl BufRead) -> io::Result<PageWalk> {
    let mut figures = Figures::default();
    for_each_line(source, |line| {
        if let Some((key, bytes)) = kib_line(line.as_bytes()) {
            figures.set(key, bytes);
        }
    })?;
    Ok(PageWalk {
        pss: figures.pss,
        anon: Share {
            rss: figures.anonymous,
            pss: figures.pss_anon.unwrap_or(figures.anonymous),
        },
        inodes: BTreeMap::new(),
    })
}

/// The lines below one mapping, or of the rollup.
#[derive(Clone, Copy, Default)]
struct Figures {
    rss: Bytes,
    pss: Bytes,
    anonymous: Bytes,
    pss_anon: Option<Bytes>,
}

impl Figures {
    fn set(&mut self, key: &str, bytes: Bytes) {
        match key {
            "Rss" => self.rss = bytes,
            "Pss" => self.pss = bytes,
            "Anonymous" => self.anonymous = bytes,
            "Pss_Anon" => self.pss_anon = Some(bytes),
            _ => {}
        }
    }
}

impl PageWalk {
    /// Takes in one mapping. A private mapping of a file holds pages of the
    /// file and the process' own copies; the copies are anonymous.
    fn add(&mut self, mapping: &Mapping, figures: Figures) {
        let anon_pss = figures.anonymous.min(figures.pss);
        self.pss += figures.pss;
        self.anon.rss += figures.anonymous;
        self.anon.pss += anon_pss;
        let Some(inode) = mapping.inode else {
            return;
        };
        let end = mapping.offset.saturating_add(mapping.length);
        let holding = self.inodes.entry(inode).or_insert(Holding {
            span: (mapping.offset, end),
            shmem: mapping.shmem,
            share: Share::default(),
        });
        holding.share.rss += figures.rss - figures.anonymous;
        holding.share.pss += figures.pss - anon_pss;
        holding.span.0 = holding.span.0.min(mapping.offset);
        holding.span.1 = holding.span.1.max(end);
    }
}

/// Calls `take` with each line. Names may be any bytes; only ASCII is looked at.
fn for_each_line(mut source: impl BufRead, mut take: impl FnMut(&str)) -> io::Result<()> {
    let mut line = Vec::with_capacity(256);
    while source.read_until(b'\n', &mut line)? > 0 {
        take(&String::from_utf8_lossy(&line));
        line.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
55d000000000-55d000002000 r--p 00000000 fe:00 247282                     /usr/bin/head
7f0000000000-7f0000200000 r--s 00100000 fe:00 4711                       /models/a b.gguf
7f0000400000-7f0000480000 rw-s 00000000 00:01 9                          /memfd:ring (deleted)
7f0000800000-7f0000880000 rw-s 00080000 00:01 9                          /memfd:ring (deleted)
7f0001000000-7f0009000000 rw-p 00000000 00:00 0                          [heap]
\xff\xfe nonsense
";

    #[test]
    fn maps_adds_up_the_pieces_of_an_inode_and_leaves_out_small_ones() {
        let inodes = read_maps(MAPS).expect("readable");
        let numbers: Vec<_> = inodes.iter().map(|(i, b)| (i.number, b.get())).collect();
        assert_eq!(numbers, [(9, 1 << 20), (4711, 2 << 20)]);
    }

    #[test]
    fn smaps_tells_file_pages_from_own_copies() {
        let text = b"\
7f0000000000-7f0000200000 rw-p 00100000 fe:00 4711                       /models/a.gguf
Size:               2048 kB
Rss:                1000 kB
Pss:                 600 kB
Pss_Dirty:             1 kB
Anonymous:           200 kB
VmFlags: rd wr mr mw me
7f0000400000-7f0000600000 r--p 00300000 fe:00 4711                       /models/a.gguf
Rss:                 100 kB
Pss:                  50 kB
Anonymous:             0 kB
7f0001000000-7f0009000000 rw-p 00000000 00:00 0                          [heap]
Rss:                5000 kB
Pss:                2500 kB
Anonymous:          5000 kB
";
        let walk = read_smaps(text.as_slice()).expect("readable");
        assert_eq!(walk.pss, Bytes::kib(3150));
        assert_eq!(
            walk.anon,
            Share {
                rss: Bytes::kib(5200),
                pss: Bytes::kib(2700)
            }
        );
        let inode = Inode {
            device: (0xfe, 0),
            number: 4711,
        };
        assert_eq!(
            walk.inodes[&inode],
            Holding {
                share: Share {
                    rss: Bytes::kib(900),
                    pss: Bytes::kib(450)
                },
                span: (0x0010_0000, 0x0050_0000),
                shmem: false,
            }
        );
    }

    #[test]
    fn the_rollup_gives_the_share_of_anonymous_pages() {
        let text = b"\
56427ad6c000-7ffe2e146000 ---p 00000000 00:00 0                          [rollup]
Rss:                1740 kB
Pss:                 254 kB
Pss_Anon:            112 kB
Anonymous:           220 kB
";
        let walk = read_rollup(text.as_slice()).expect("readable");
        assert_eq!(
            (walk.pss, walk.anon.rss),
            (Bytes::kib(254), Bytes::kib(220))
        );
        assert_eq!(walk.anon.pss, Bytes::kib(112));
    }

    #[test]
    fn shared_memory_is_known_by_its_name() {
        for name in ["/memfd:x", "/dev/shm/psm_1", "/dev/zero", "/SYSV00000000"] {
            assert!(is_shared_memory(name), "{name}");
        }
        assert!(!is_shared_memory("/models/dev/shm/x"));
    }
}
