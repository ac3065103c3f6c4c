//! Notices that files of the configuration changed, however that is done:
//! written in place, renamed over as editors do, or by a symlink that is
//! swapped as Kubernetes does with a mounted ConfigMap.
//!
//! The kernel tells of changes in the folders that hold a file, or a symlink on
//! the way to one. That only says when to look: whether something changed is
//! seen by what the files look like, which is looked at every few seconds
//! anyway, since the kernel does not tell of every file system.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::config::{self, Sources};
use crate::control::{ReloadError, ReloadOrigin, Reloader};
use crate::worker;

/// Files are taken as they are once they have stayed so for this long: several
/// files, or a file written in pieces, make one reload.
const SETTLED: Duration = Duration::from_millis(500);
/// They are taken as they are after so many of these in any case.
const MOST_WAITS: u32 = 20;
/// How often they are looked at without a word of the kernel.
const LOOK: Duration = Duration::from_secs(5);
/// Symlinks followed on the way to one file; the kernel's own bound.
const MOST_LINKS: u32 = 40;

/// Asks for a reload whenever files of the configuration changed.
pub(super) async fn watch(sources: Arc<Sources>, reloader: Reloader, closing: CancellationToken) {
    let mut state = State {
        sources,
        warned: false,
    };
    let (mut watcher, mut known) = state.look().await;
    // They may have changed since they were read for the start.
    reload(&reloader).await;
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            () = told(watcher.as_ref()) => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        let (fresh, mut stamps) = state.look().await;
        watcher = fresh;
        if stamps == known {
            // Folders have other files too; at most one look for each of these.
            tokio::time::sleep(SETTLED).await;
            continue;
        }
        for _ in 0..MOST_WAITS {
            tokio::time::sleep(SETTLED).await;
            let (fresh, again) = state.look().await;
            watcher = fresh;
            if again == stamps {
                break;
            }
            stamps = again;
        }
        if stamps == known {
            continue;
        }
        known = stamps;
        reload(&reloader).await;
    }
}

/// Has the files read; when nothing is different in them, nothing is told.
async fn reload(reloader: &Reloader) {
    match reloader.reload(ReloadOrigin::Watch, false).await {
        // The controller has told what is wrong.
        Ok(_) | Err(ReloadError::Invalid(_)) => {}
        Err(error @ (ReloadError::Refused(_) | ReloadError::Impossible)) => {
            debug!(%error, "a changed configuration was not read");
        }
    }
}

/// What a file looks like from outside; `None` when it is not there.
type Stamp = Option<[u64; 5]>;
type Stamps = BTreeMap<PathBuf, Stamp>;

struct State {
    sources: Arc<Sources>,
    warned: bool,
}

impl State {
    /// Watches the folders as they are now, then looks at the files, so that no
    /// change between the two is missed.
    async fn look(&mut self) -> (Option<AsyncFd<OwnedFd>>, Stamps) {
        let sources = Arc::clone(&self.sources);
        let looked = tokio::task::spawn_blocking(move || {
            let places = config::places(&sources);
            let watcher = watch_folders(&places);
            (watcher, places.into_iter().map(stamped).collect())
        });
        // Only a panic of it could fail, which has been told.
        let Ok((watcher, stamps)) = looked.await else {
            return (None, Stamps::new());
        };
        let watcher = watcher.and_then(worker::readable);
        if let Err(error) = &watcher
            && !std::mem::replace(&mut self.warned, true)
        {
            warn!(%error, "the kernel does not tell of changed files; they are looked at every 5 s instead");
        }
        (watcher.ok(), stamps)
    }
}

/// Waits until the kernel tells of a change.
async fn told(watcher: Option<&AsyncFd<OwnedFd>>) {
    match watcher {
        // What it tells is not read: the next look watches anew.
        Some(watcher) => drop(watcher.readable().await),
        None => std::future::pending().await,
    }
}

fn stamped(path: PathBuf) -> (PathBuf, Stamp) {
    let unsigned = |number: i64| u64::from_ne_bytes(number.to_ne_bytes());
    let stamp = std::fs::metadata(&path).ok().map(|meta| {
        let changed = meta.ctime().wrapping_mul(1_000_000_000);
        [
            meta.dev(),
            meta.ino(),
            // Files that come into a folder are places of their own.
            if meta.is_dir() { 0 } else { meta.size() },
            if meta.is_dir() {
                0
            } else {
                unsigned(changed.wrapping_add(meta.ctime_nsec()))
            },
            u64::from(meta.mode()),
        ]
    });
    (path, stamp)
}

fn watch_folders(places: &[PathBuf]) -> io::Result<OwnedFd> {
    let watcher = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let mut folders = BTreeSet::new();
    for place in places {
        let mut links = 0;
        collect_folders(place, &mut links, &mut folders);
    }
    let events = WatchFlags::CREATE
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::MOVED_TO
        | WatchFlags::MOVED_FROM
        | WatchFlags::DELETE
        | WatchFlags::ONLYDIR;
    let mut failed = None;
    for folder in folders {
        match inotify::add_watch(&watcher, &folder, events) {
            // Gone since, or not ours to read: the look from time to time is left.
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => {}
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(watcher),
    }
}

/// Collects the folders in which something can change that `path` leads to:
/// the one it is in, itself when it is one, and those of symlinks on the way.
fn collect_folders(path: &Path, links: &mut u32, folders: &mut BTreeSet<PathBuf>) {
    let mut reached = PathBuf::new();
    let mut rest = path.components();
    while let Some(component) = rest.next() {
        if component == Component::ParentDir {
            reached.pop();
            continue;
        }
        let next = reached.join(component);
        match std::fs::read_link(&next) {
            Ok(target) => {
                folders.insert(reached.clone());
                *links += 1;
                if *links <= MOST_LINKS {
                    let target = reached.join(target).join(rest.as_path());
                    collect_folders(&target, links, folders);
                }
                return;
            }
            Err(_) if next.exists() => reached = next,
            Err(_) => break,
        }
    }
    if reached.is_dir() {
        // What is missing may come where the way ends.
        folders.insert(reached.clone());
    }
    if let Some(parent) = reached.parent() {
        folders.insert(parent.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn folders(path: &Path) -> BTreeSet<PathBuf> {
        let (mut links, mut found) = (0, BTreeSet::new());
        collect_folders(path, &mut links, &mut found);
        found
    }

    #[test]
    fn the_folders_of_every_link_on_the_way_are_watched() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| {
            let root = folder.path().canonicalize().expect("it exists");
            root.join(name)
        };
        std::fs::create_dir_all(at("mount/..one")).expect("made");
        std::fs::write(at("mount/..one/a.toml"), "").expect("written");
        symlink("..one", at("mount/..data")).expect("linked");
        symlink("..data/a.toml", at("mount/a.toml")).expect("linked");
        symlink("mount", at("current")).expect("linked");
        let found = folders(&at("current/a.toml"));
        for watched in ["", "mount", "mount/..one"] {
            let watched = match watched {
                "" => at("mount").parent().expect("a parent").to_owned(),
                name => at(name),
            };
            assert!(found.contains(&watched), "{watched:?} in {found:?}");
        }
        symlink("loop", at("loop")).expect("linked");
        let is_dir = |path: &PathBuf| path.is_dir();
        assert!(found.iter().all(is_dir), "{found:?}");
        assert!(!folders(&at("loop")).is_empty(), "a loop ends");
        let missing = folders(&at("mount/none/b.toml"));
        assert!(missing.contains(&at("mount")), "{missing:?}");
    }
}
