//! A real memory cgroup of one test's own, where the machine allows it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{pause, wait_until};

/// A memory cgroup; taken away when it is dropped and nothing runs in it.
#[derive(Debug)]
pub(crate) struct MemoryCgroup {
    folder: PathBuf,
    files: Files,
}

/// What the files of a version are called.
#[derive(Clone, Copy, Debug)]
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Has a line `oom_kill <count>`.
    kills: &'static str,
}

const ONE: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    kills: "memory.oom_control",
};
const TWO: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    kills: "memory.events",
};

impl MemoryCgroup {
    /// Makes a cgroup with this limit; says why not where that is not possible:
    /// it takes root and a controller.
    pub(crate) fn new(limit: u64) -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("residentd-test-{}-{number}", std::process::id());
        let places = [
            (Path::new("/sys/fs/cgroup/memory"), ONE),
            (Path::new("/sys/fs/cgroup"), TWO),
        ];
        let mut why = Vec::new();
        for (place, files) in places {
            let folder = place.join(&name);
            let made = fs::create_dir(&folder)
                .and_then(|()| write(&folder.join(files.limit), &limit.to_string()));
            match made {
                Ok(()) => return Ok(Self { folder, files }),
                Err(error) => {
                    // It may not have been made at all.
                    let _ = fs::remove_dir(&folder);
                    why.push(format!("{}: {error}", folder.display()));
                }
            }
        }
        Err(why.join("; "))
    }

    /// Makes a cgroup without a limit of its own in this one, in which nothing
    /// may run then.
    pub(crate) fn inner(&self) -> Self {
        let (folder, files) = (self.folder.join("inner"), self.files);
        if files.limit == TWO.limit {
            write(&self.folder.join("cgroup.subtree_control"), "+memory")
                .expect("what is in it has the controller too");
        }
        fs::create_dir(&folder).expect("a cgroup in a cgroup");
        Self { folder, files }
    }

    /// Returns the path of the cgroup below the mount point.
    pub(crate) fn path(&self) -> String {
        let below = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"]
            .iter()
            .find_map(|mount| self.folder.strip_prefix(mount).ok());
        format!("/{}", below.expect("it is made there").display())
    }

    /// Returns the bytes that the kernel counts here, files among them.
    pub(crate) fn usage(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join(self.files.usage));
        let text = text.expect("the usage can be read");
        text.trim().parse().expect("a number")
    }

    /// Sets another limit.
    pub(crate) fn set_limit(&self, limit: u64) {
        write(&self.folder.join(self.files.limit), &limit.to_string())
            .expect("the limit can be changed");
    }

    /// Sets the limit over which the kernel slows down whoever takes more;
    /// says why not where there is none: version 1 has no such thing.
    pub(crate) fn slow_over(&self, limit: u64) -> Result<(), String> {
        let file = self.folder.join("memory.high");
        write(&file, &limit.to_string()).map_err(|error| format!("{}: {error}", file.display()))
    }

    /// Returns how many processes the kernel ended for want of memory here.
    pub(crate) fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join(self.files.kills)).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or_else(|| panic!("{text:?} has no oom_kill"))
    }

    /// Returns a command that runs this one within the cgroup.
    pub(crate) fn within(&self, command: &Command) -> Command {
        let mut within = Command::new("sh");
        within
            .arg("-c")
            .arg("echo $$ > \"$0\" && exec \"$@\"")
            .arg(self.folder.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                within.env(name, value);
            }
        }
        if let Some(folder) = command.get_current_dir() {
            within.current_dir(folder);
        }
        within
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Processes of a failed test may still be ending.
            for _ in 0..100 {
                if fs::remove_dir(&self.folder).is_ok() {
                    break;
                }
                pause(Duration::from_millis(20));
            }
            return;
        }
        wait_until("the cgroup to be empty", || {
            fs::remove_dir(&self.folder).ok()
        });
    }
}

/// Writes to a file of the kernel's; none is made, as there would be where a
/// hierarchy is not mounted.
fn write(file: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::File::options().write(true).open(file)?;
    file.write_all(text.as_bytes())
}
