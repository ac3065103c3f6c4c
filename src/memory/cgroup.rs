//! How much the memory cgroups above us still give.
//!
//! A container sees the host's `MemAvailable`, but its own cgroup ends it
//! first. Version 2, version 1 and the hybrid of both are told apart by
//! `/proc/self/cgroup` and `/proc/self/mountinfo`. Every ancestor that is
//! visible below the mount counts; limits are read anew each time, because
//! they change while we run.

mod levels;

use std::path::{Component, Path, PathBuf};
use std::{fs, iter};

pub(super) use levels::Levels;

use super::CgroupReading;
use crate::model::Bytes;

/// Version 1 writes "no limit" as the largest multiple of a page below 2^63.
const NO_LIMIT: u64 = 1 << 62;

/// Where our memory cgroup is, if it can be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cgroup {
    version: Version,
    /// The mount point, below the root that was given.
    mount: PathBuf,
    /// From the mount point to our own cgroup; empty when they are the same.
    below: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Cgroup {
    /// Finds the memory controller's hierarchy and our place in it.
    pub(super) fn locate(root: &Path) -> Option<Self> {
        let own = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
        let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
        let (version, path) = own_path(&own)?;
        let mount = mounts
            .lines()
            .filter_map(Mount::parse)
            .find(|mount| mount.carries_memory(version))?;
        let below = path_below(&mount.shown, Path::new(path));
        let mount = root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
        // A path that is not there belongs to a namespace we do not see into.
        // The mount point is then the nearest ancestor in sight.
        let below = if mount.join(&below).is_dir() {
            below
        } else {
            PathBuf::new()
        };
        Some(Self {
            version,
            mount,
            below,
        })
    }

    /// Returns the file that tells, as `oom_kill`, how many processes of our own
    /// cgroup the kernel has ended for want of memory.
    pub(super) fn oom_file(&self) -> PathBuf {
        self.own().join(match self.version {
            Version::One => "memory.oom_control",
            Version::Two => "memory.events",
        })
    }

    /// Returns the folder of our own cgroup.
    pub(super) fn own(&self) -> PathBuf {
        self.mount.join(&self.below)
    }
}

impl Version {
    fn number(self) -> u8 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// Returns what the kernel can drop at once: active and inactive file
    /// pages that need no writing first, and reclaimable slab. Locked pages
    /// are on neither of these lists.
    fn droppable(self, stat: &str) -> Bytes {
        let of = |key: &str| number(stat, key).map_or(Bytes::ZERO, Bytes);
        let (files, unwritten, slab) = match self {
            Self::One => (
                of("total_active_file") + of("total_inactive_file"),
                of("total_dirty") + of("total_writeback"),
                Bytes::ZERO,
            ),
            Self::Two => (
                of("active_file") + of("inactive_file"),
                of("file_dirty") + of("file_writeback"),
                of("slab_reclaimable"),
            ),
        };
        files - unwritten + slab
    }
}

/// Returns our path in the hierarchy that has the memory controller.
fn own_path(text: &str) -> Option<(Version, &str)> {
    let lines = || {
        text.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            Some((parts.next()?, parts.next()?, parts.next()?))
        })
    };
    lines()
        .find(|(_, controllers, _)| controllers.split(',').any(|name| name == "memory"))
        .map(|(_, _, path)| (Version::One, path))
        .or_else(|| {
            lines()
                .find(|(id, controllers, _)| *id == "0" && controllers.is_empty())
                .map(|(_, _, path)| (Version::Two, path))
        })
}

/// Returns the way from a mount that shows `shown` of the hierarchy to `own`,
/// both as our namespace names them. Empty when `own` is not below `shown` by
/// name: the mount point is then the only ancestor in sight.
fn path_below(shown: &Path, own: &Path) -> PathBuf {
    match own.strip_prefix(shown) {
        Ok(rest) if rest.components().all(|c| matches!(c, Component::Normal(_))) => rest.into(),
        Ok(_) | Err(_) => PathBuf::new(),
    }
}

/// Returns the number behind a key of lines `key number`, as the files of
/// cgroups and `/proc/vmstat` have them.
pub(super) fn number(text: &str, key: &str) -> Option<u64> {
    let of_key = |line: &str| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    };
    text.lines().find_map(of_key)
}

/// One line of `/proc/self/mountinfo`.
struct Mount {
    /// Which part of the file system is mounted.
    shown: PathBuf,
    point: PathBuf,
    kind: String,
    options: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let mut file_system = file_system.split(' ');
        Some(Self {
            shown: unescape(mount.next()?).into(),
            point: unescape(mount.next()?).into(),
            kind: file_system.next()?.to_owned(),
            options: file_system.nth(1)?.to_owned(),
        })
    }

    fn carries_memory(&self, version: Version) -> bool {
        match version {
            Version::One => {
                self.kind == "cgroup" && self.options.split(',').any(|option| option == "memory")
            }
            Version::Two => self.kind == "cgroup2",
        }
    }
}

/// Undoes the kernel's `\040` for a blank, a tab, a line break or a backslash.
fn unescape(text: &str) -> String {
    let mut rest = text;
    iter::from_fn(|| {
        let octal = rest
            .strip_prefix('\\')
            .and_then(|tail| u8::from_str_radix(tail.get(..3)?, 8).ok());
        let (found, length) = match octal {
            Some(byte) => (char::from(byte), 4),
            None => {
                let first = rest.chars().next()?;
                (first, first.len_utf8())
            }
        };
        rest = &rest[length..];
        Some(found)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::super::oom::OomFiles;
    use super::*;

    /// A root folder with the given files.
    fn root(files: &[(&str, &str)]) -> TempDir {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        root
    }

    fn read(root: &TempDir) -> Option<(CgroupReading, Bytes)> {
        Levels::of(Cgroup::locate(root.path())?).read()
    }

    const V2_MOUNT: (&str, &str) = (
        "proc/self/mountinfo",
        "24 1 0:22 / /proc rw - proc proc rw\n\
         30 1 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    );

    #[test]
    fn the_tightest_of_all_visible_v2_ancestors_counts() {
        let root = root(&[
            V2_MOUNT,
            ("proc/self/cgroup", "0::/kubepods/pod1/main\n"),
            ("sys/fs/cgroup/kubepods/memory.max", "max\n"),
            ("sys/fs/cgroup/kubepods/memory.current", "9000\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.max", "10000\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.current", "9000\n"),
            (
                "sys/fs/cgroup/kubepods/pod1/memory.stat",
                "anon 100\nactive_file 3000\ninactive_file 2000\nslab_reclaimable 500\n\
                 file_dirty 300\nfile_writeback 200\n",
            ),
            ("sys/fs/cgroup/kubepods/pod1/main/memory.max", "20000\n"),
            ("sys/fs/cgroup/kubepods/pod1/main/memory.current", "8000\n"),
            (
                "sys/fs/cgroup/kubepods/pod1/main/memory.stat",
                "active_file 0\n",
            ),
        ]);
        let (reading, margin) = read(&root).expect("a limit");
        assert_eq!(
            reading,
            CgroupReading {
                version: 2,
                path: "/kubepods/pod1".into(),
                limit: Some(Bytes(10_000)),
                current: Bytes(9_000),
                // 9000 less 5000 of files, of which 500 must be written, and 500 of slab.
                working_set: Bytes(4_000),
            }
        );
        assert_eq!(margin, Bytes(6_000));
    }

    #[test]
    fn a_private_namespace_shows_its_own_limit_at_the_mount_point() {
        let root = root(&[
            V2_MOUNT,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "4096\n"),
            ("sys/fs/cgroup/memory.current", "8192\n"),
        ]);
        let (reading, margin) = read(&root).expect("a limit");
        assert_eq!((reading.path.as_str(), margin), ("/", Bytes::ZERO));
    }

    #[test]
    fn version_one_is_found_in_a_hybrid_and_its_totals_are_used() {
        let root = root(&[
            (
                "proc/self/mountinfo",
                "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                 35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
                 41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            ),
            (
                "proc/self/cgroup",
                "4:memory:/docker/abc/inner\n3:cpuset:/\n0::/\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000\n"),
            ("sys/fs/cgroup/memory/inner/memory.limit_in_bytes", "6000\n"),
            ("sys/fs/cgroup/memory/inner/memory.usage_in_bytes", "5000\n"),
            (
                "sys/fs/cgroup/memory/inner/memory.stat",
                "active_file 1\ninactive_file 1\ntotal_active_file 1000\n\
                 total_inactive_file 500\ntotal_dirty 100\ntotal_writeback 0\n",
            ),
        ]);
        let (reading, margin) = read(&root).expect("a limit");
        assert_eq!((reading.version, reading.path.as_str()), (1, "/inner"));
        assert_eq!(reading.working_set, Bytes(3_600));
        assert_eq!(margin, Bytes(2_400));
    }

    #[test]
    fn a_number_is_found_by_its_whole_key() {
        let events = "low 0\nmax 18\noom 1\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(number(events, "oom_kill"), Some(2));
        let control = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n";
        assert_eq!(number(control, "oom_kill"), Some(5));
        assert_eq!(number("", "oom_kill"), None);
    }

    #[test]
    fn kills_are_counted_in_either_version() {
        let two = root(&[
            V2_MOUNT,
            ("proc/self/cgroup", "0::/pod\n"),
            (
                "sys/fs/cgroup/pod/memory.events",
                "max 9\noom 2\noom_kill 1\n",
            ),
        ]);
        let cgroup = Cgroup::locate(two.path()).expect("a cgroup");
        let count =
            |root: &TempDir, cgroup| OomFiles::new(root.path(), cgroup).read(&mut Vec::new());
        assert_eq!(count(&two, Some(&cgroup)).cgroup, Some(1));
        let one = root(&[
            (
                "proc/self/mountinfo",
                "35 31 0:32 / /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ),
            ("proc/self/cgroup", "4:memory:/\n"),
            (
                "sys/fs/cgroup/memory/memory.oom_control",
                "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n",
            ),
        ]);
        let cgroup = Cgroup::locate(one.path()).expect("a cgroup");
        assert_eq!(count(&one, Some(&cgroup)).cgroup, Some(7));
    }

    #[test]
    fn a_limit_that_changes_is_seen_by_the_next_read() {
        let root = root(&[
            V2_MOUNT,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "10000\n"),
            ("sys/fs/cgroup/memory.current", "1000\n"),
        ]);
        let mut cgroup = Levels::of(Cgroup::locate(root.path()).expect("a cgroup"));
        assert_eq!(cgroup.read().expect("a limit").1, Bytes(9_000));
        fs::write(root.path().join("sys/fs/cgroup/memory.max"), "3000\n").expect("a file");
        assert_eq!(cgroup.read().expect("a limit").1, Bytes(2_000));
        fs::write(root.path().join("sys/fs/cgroup/memory.max"), "max\n").expect("a file");
        assert_eq!(cgroup.read(), None);
    }

    #[test]
    fn over_memory_high_there_is_nothing_to_give() {
        // It was not looked at: there was room up to `memory.max`.
        let root = root(&[
            V2_MOUNT,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "10000\n"),
            ("sys/fs/cgroup/memory.high", "6000\n"),
            ("sys/fs/cgroup/memory.current", "1000\n"),
        ]);
        let margin = || read(&root).map(|(_, margin)| margin);
        let set = |file: &str, limit: &str| {
            let path = root.path().join("sys/fs/cgroup").join(file);
            fs::write(path, limit).expect("a file");
        };
        assert_eq!(margin(), Some(Bytes(5_000)));
        set("memory.max", "max\n");
        assert_eq!(margin(), Some(Bytes(5_000)));
        set("memory.high", "max\n");
        assert_eq!(margin(), None);
        set("memory.max", "10000\n");
        assert_eq!(margin(), Some(Bytes(9_000)));
    }

    #[test]
    fn a_path_outside_the_mount_ends_at_the_mount_point() {
        let none = PathBuf::new();
        assert_eq!(
            path_below(Path::new("/"), Path::new("/a/b")),
            Path::new("a/b")
        );
        assert_eq!(
            path_below(Path::new("/a"), Path::new("/a/b")),
            Path::new("b")
        );
        assert_eq!(path_below(Path::new("/a"), Path::new("/ab")), none);
        assert_eq!(path_below(Path::new("/.."), Path::new("/")), none);
        assert_eq!(path_below(Path::new("/"), Path::new("/../other")), none);
        assert_eq!(
            path_below(Path::new("/.."), Path::new("/../other")),
            Path::new("other")
        );
    }

    #[test]
    fn a_machine_without_the_controller_has_no_limit() {
        let root = root(&[
            (
                "proc/self/mountinfo",
                "24 1 0:22 / /proc rw - proc proc rw\n",
            ),
            ("proc/self/cgroup", "0::/\n"),
        ]);
        assert_eq!(read(&root), None);
        assert_eq!(Cgroup::locate(Path::new("/nonexistent")), None);
    }

    #[test]
    fn escaped_blanks_in_a_mount_point_are_undone() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
    }
}
