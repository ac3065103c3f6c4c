//! A fake driver library of one test's own, and processes that hold its memory.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::residentd::STUB;
use super::wait_until;

/// One GiB, in which these tests count.
pub(crate) const GIB: u64 = 1 << 30;

/// The library in a folder of its own, and what it is to say.
#[derive(Debug)]
pub(crate) struct FakeDriver {
    folder: tempfile::TempDir,
    state: Value,
}

impl FakeDriver {
    /// A driver with so many GPUs of 16 GiB, named `GPU-fake-0` and so on.
    pub(crate) fn new(gpus: u32) -> Self {
        Self::of("libfake_nvml.so", gpus)
    }

    /// The same of an older time: it knows no processes and no MIG.
    pub(crate) fn old(gpus: u32) -> Self {
        Self::of("libfake_nvml_old.so", gpus)
    }

    fn of(file: &str, gpus: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the driver");
        let library = built().join(file);
        std::fs::copy(&library, folder.path().join("libnvidia-ml.so.1"))
            .unwrap_or_else(|error| panic!("{}: {error}; cargo builds it", library.display()));
        let devices: Vec<_> = (0..gpus)
            .map(|index| {
                json!({
                    "uuid": uuid(index),
                    "name": format!("Fake {index}"),
                    "total": 16 * GIB,
                })
            })
            .collect();
        let mut driver = Self {
            folder,
            state: json!({ "devices": devices }),
        };
        driver.set(|_| {});
        driver
    }

    /// Changes what the driver says from its next call on.
    pub(crate) fn set(&mut self, change: impl FnOnce(&mut Value)) {
        change(&mut self.state);
        let unfinished = self.folder.path().join("driver.tmp");
        std::fs::write(&unfinished, self.state.to_string()).expect("the state can be written");
        std::fs::rename(unfinished, self.folder.path().join("driver.json"))
            .expect("the state can be replaced");
    }

    /// Returns the file to load.
    pub(crate) fn library(&self) -> PathBuf {
        self.folder.path().join("libnvidia-ml.so.1")
    }

    /// Returns the folder in which processes say what they hold.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a process that holds this much of a GPU, or of several, and
    /// waits until it does.
    pub(crate) fn holder(&self, gpu: &str, bytes: u64) -> Holder {
        self.holder_with(gpu, bytes, &[])
    }

    /// The same with more flags for the stub worker.
    pub(crate) fn holder_with(&self, gpu: &str, bytes: u64, flags: &[&str]) -> Holder {
        let child = Command::new(STUB)
            .args(["--idle", "--silent", "--gpus", gpu, "--vram"])
            .arg(bytes.to_string())
            .arg("--vram-dir")
            .arg(self.folder())
            .args(flags)
            .process_group(0)
            .stdin(Stdio::null())
            .spawn()
            .expect("the stub worker runs");
        let holder = Holder {
            child,
            ended: false,
        };
        let file = self
            .folder()
            .join("processes")
            .join(holder.pid().to_string());
        wait_until("the process holds its memory", || {
            file.exists().then_some(())
        });
        holder
    }
}

/// Returns the UUID of a fake GPU.
pub(crate) fn uuid(index: u32) -> String {
    format!("GPU-fake-{index}")
}

/// Returns where cargo puts examples: beside the folder of the test itself.
fn built() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a file");
    let profile = test
        .parent()
        .and_then(Path::parent)
        .expect("target/PROFILE/deps");
    profile.join("examples")
}

/// A process that is gone with its children when this is dropped.
#[derive(Debug)]
pub(crate) struct Holder {
    child: Child,
    ended: bool,
}

impl Holder {
    /// Returns its pid.
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid fits")
    }

    /// Ends it with its children and reaps it.
    pub(crate) fn end(&mut self) {
        // Once it is reaped the number may be somebody else's.
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let _ = killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}
