//! Which files a worker maps and has open: what its next life will want too.
//!
//! Weights are closed by many loaders once they are read, so it is looked while
//! the worker loads as well as when it is ready. See `proc_pid_maps(5)`,
//! `proc_pid_fd(5)` and `proc_pid_fdinfo(5)`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::procfs::{self, ProcessTree};
use crate::telemetry;

/// Smaller files are read sooner than they are looked for.
const SMALLEST: u64 = 1 << 20;
/// The first look at a worker that loads; each next one comes after twice as
/// long, at most after [`SLOWEST`].
const FIRST: Duration = Duration::from_millis(50);
/// See [`FIRST`].
const SLOWEST: Duration = Duration::from_secs(5);
/// So long after it is ready it is looked for again, when the first answer, which
/// this would hold up, is under way.
const SETTLES: Duration = Duration::from_millis(100);
/// So long after that it is looked for the last time: the first request
/// may bring more libraries.
const LAST: Duration = Duration::from_secs(1);
/// More files than any engine has of this size.
const MOST: usize = 1024;
/// What lies below is no file on a disk.
const NO_DISK: [&str; 4] = ["/proc/", "/dev/", "/sys/", "/memfd:"];

/// Watches one worker while it loads; none by default.
#[derive(Debug, Default)]
pub(crate) struct Used {
    ready: Option<oneshot::Sender<()>>,
    /// Absent once it was taken or cannot come any more.
    found: Option<oneshot::Receiver<Vec<PathBuf>>>,
}

impl Used {
    /// Begins to look at the worker's processes.
    pub(crate) fn watch(tree: Arc<ProcessTree>) -> Self {
        let (ready, is_ready) = oneshot::channel();
        let (tell, found) = oneshot::channel();
        telemetry::spawn("used", async move {
            if let Some(files) = watch(tree, is_ready).await {
                // Nobody waits for it when the worker has ended meanwhile.
                let _ = tell.send(files);
            }
        });
        Self {
            ready: Some(ready),
            found: Some(found),
        }
    }

    /// Notes that the worker is ready.
    pub(crate) fn ready(&mut self) {
        if let Some(ready) = self.ready.take() {
            // It ends by itself only when it is told.
            let _ = ready.send(());
        }
    }

    /// Waits for the files; for ever when they were given.
    pub(crate) async fn found(&mut self) -> Vec<PathBuf> {
        let Some(found) = &mut self.found else {
            return std::future::pending().await;
        };
        let files = found.await;
        self.found = None;
        match files {
            Ok(files) => files,
            Err(_) => std::future::pending().await,
        }
    }
}

async fn watch(tree: Arc<ProcessTree>, mut ready: oneshot::Receiver<()>) -> Option<Vec<PathBuf>> {
    let mut found = Found::default();
    let mut pause = FIRST;
    let is_ready = loop {
        tokio::select! {
            told = &mut ready => break told.is_ok(),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(SLOWEST);
        found = found.look(&tree).await?;
    };
    if !is_ready {
        return None;
    }
    tokio::time::sleep(SETTLES).await;
    found = found.look(&tree).await?;
    tokio::time::sleep(LAST).await;
    Some(found.look(&tree).await?.files)
}

#[derive(Debug, Default)]
struct Found {
    /// In the order they were first seen.
    files: Vec<PathBuf>,
    /// Paths that were looked at.
    paths: BTreeSet<PathBuf>,
    inodes: BTreeSet<(u64, u64)>,
}

impl Found {
    /// Looks at all processes of a tree, as far as they are known; `/proc` may
    /// take long. `None` only when residentd is ending.
    async fn look(mut self, tree: &Arc<ProcessTree>) -> Option<Self> {
        let tree = Arc::clone(tree);
        let looked = tokio::task::spawn_blocking(move || {
            for member in tree.known() {
                self.look_at(member.pid);
            }
            self
        });
        looked.await.ok()
    }

    fn look_at(&mut self, pid: i32) {
        let maps = procfs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        for path in String::from_utf8_lossy(&maps).lines().filter_map(mapped) {
            self.add(Path::new(path));
        }
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return;
        };
        for descriptor in descriptors.flatten() {
            let Ok(path) = fs::read_link(descriptor.path()) else {
                continue;
            };
            let number = descriptor.file_name();
            let info = format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy());
            if path.is_absolute() && is_read_only(&procfs::read(info).unwrap_or_default()) {
                self.add(&path);
            }
        }
    }

    /// Takes a file that is large enough and still where it was.
    fn add(&mut self, path: &Path) {
        let shown = path.to_string_lossy();
        let is_none =
            NO_DISK.iter().any(|root| shown.starts_with(root)) || shown.ends_with(" (deleted)");
        if is_none || self.files.len() == MOST || !self.paths.insert(path.to_owned()) {
            return;
        }
        let Ok(metadata) = fs::metadata(path) else {
            return;
        };
        let inode = (metadata.dev(), metadata.ino());
        if metadata.is_file() && metadata.len() >= SMALLEST && self.inodes.insert(inode) {
            self.files.push(path.to_owned());
        }
    }
}

/// Returns the file of a line of `maps`, unless it is written to through the
/// mapping:
/// `7f1c2a000000-7f1c2b000000 r--p 00000000 fe:00 247282   /usr/lib/libx.so`.
fn mapped(line: &str) -> Option<&str> {
    let mut fields = line.splitn(6, ' ');
    let rights = fields.nth(1)?;
    let path = fields.nth(3)?.trim_start();
    let is_written = rights.contains('w') && rights.ends_with('s');
    (path.starts_with('/') && !is_written).then_some(path)
}

/// Returns whether `fdinfo` says that a descriptor is only read from; its
/// flags are octal, and the last two bits say how it is open.
fn is_read_only(info: &[u8]) -> bool {
    let info = String::from_utf8_lossy(info);
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & 3 == 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::procfs::ProcessStat;

    #[test]
    fn a_line_of_maps_names_its_file_unless_it_is_written_to() {
        let line = "7f1c2a000000-7f1c2b000000 r--p 00000000 fe:00 247282                     /a folder/lib x.so";
        assert_eq!(mapped(line), Some("/a folder/lib x.so"));
        assert_eq!(mapped(&line.replace("r--p", "rw-s")), None);
        assert_eq!(
            mapped("7f1c2a000000-7f1c2b000000 rw-p 00000000 00:00 0 "),
            None
        );
        assert_eq!(
            mapped("7f1c2a000000-7f1c2b000000 rw-p 00000000 00:00 0 [heap]"),
            None
        );
        assert!(is_read_only(b"pos:\t0\nflags:\t0100000\nmnt_id:\t29\n"));
        assert!(!is_read_only(b"pos:\t0\nflags:\t0100001\n"));
        assert!(!is_read_only(b"pos:\t0\nflags:\t02100002\n"));
        assert!(!is_read_only(b""));
    }

    #[tokio::test(start_paused = true)]
    async fn large_files_that_are_open_to_read_are_found_and_no_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().canonicalize().expect("it exists");
        let make = |name: &str, size: usize| {
            let path = folder.join(name);
            fs::write(&path, vec![1; size]).expect("written");
            path
        };
        let [large, small, gone] = [
            make("large", 2 << 20),
            make("small", 4096),
            make("gone", 2 << 20),
        ];
        let mut written = fs::File::create(folder.join("log")).expect("a file");
        written.write_all(&vec![1; 2 << 20]).expect("written");
        let held = [&large, &small, &gone].map(|path| fs::File::open(path).expect("it is there"));
        fs::remove_file(&gone).expect("it is there");
        let pid = i32::try_from(std::process::id()).expect("a pid fits");
        let key = ProcessStat::read(pid).expect("it runs").key;
        let mut used = Used::watch(Arc::new(ProcessTree::new(key)));
        used.ready();
        let found = used.found().await;
        let ours: Vec<_> = found.iter().filter(|f| f.starts_with(&folder)).collect();
        assert_eq!(ours, [&large]);
        let program = std::env::current_exe().expect("a test has a file");
        let program = program.canonicalize().expect("it exists");
        assert!(found.contains(&program), "{found:?}");
        drop((held, written));
    }
}
