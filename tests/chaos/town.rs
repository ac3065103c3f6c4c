//! The models, their configuration, and the residentd that serves them: on a
//! small disk and in a cgroup of its own where the machine allows that, with a
//! clock that can jump.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::plan::SHARES;
use crate::support::cgroup::MemoryCgroup;
use crate::support::residentd::{STUB, command};
use crate::support::{Residentd, wait_until};

const MIB: u64 = 1 << 20;
/// What everything may use together, where that can be bounded: enough that only
/// a worker that takes far more than it should brings the kernel on.
const CGROUP: u64 = 900 * MIB;
/// The limit that is configured, of mebibytes: about half of what all need.
pub(crate) const LIMIT: u64 = 300;
/// In the environment of everything that is started.
pub(crate) const MARK: &str = "RESIDENTD_CHAOS";

/// Flags and keys of each model.
fn traits(name: &str) -> (&'static str, &'static str) {
    match name {
        "red" => ("--anon 48MiB", "memory = \"64MiB\""),
        "green" => ("--anon 16MiB --map SHARED", "memory = \"64MiB\""),
        "blue" => ("--anon 24MiB --map SHARED", "memory = \"72MiB\""),
        "gold" => (
            "--anon 16MiB",
            "memory = \"28MiB\"\npinned = true\npreload = true",
        ),
        "mist" => ("--anon 24MiB", "memory = \"40MiB\"\nidle_timeout = \"2s\""),
        "husk" => ("--anon 40MiB", "memory = \"60MiB\""),
        "pipe" => (
            "--anon 32MiB",
            "memory = \"48MiB\"\nupstream = \"unix:${SOCKET}\"",
        ),
        "clan" => (
            "--anon 24MiB --child --daemon-child --child-anon 16MiB",
            "memory = \"88MiB\"",
        ),
        _ => (
            "--anon 32MiB --listen late --ready-after 300ms",
            "memory = \"48MiB\"",
        ),
    }
}

/// What the configuration says now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shape {
    /// Models that are left out.
    pub(crate) without: Vec<&'static str>,
    /// How often each was changed.
    pub(crate) changes: BTreeMap<&'static str, u32>,
}

/// Everything that is started once.
#[derive(Debug)]
pub(crate) struct Town {
    pub(crate) residentd: Residentd,
    pub(crate) disk: Option<Disk>,
    pub(crate) cgroup: Option<MemoryCgroup>,
    /// What this machine does not allow.
    pub(crate) missing: Vec<String>,
}

impl Town {
    /// Sets everything up and starts residentd.
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder for the run");
        let place = folder.path().to_owned();
        let mut missing = Vec::new();
        std::fs::create_dir(place.join("state")).expect("a folder");
        let disk = Disk::mount(&place.join("state"));
        if disk.is_none() {
            missing.push("no small disk can be mounted: it is never full".to_owned());
        }
        let cgroup = MemoryCgroup::new(CGROUP);
        if let Err(why) = &cgroup {
            missing.push(format!("no memory cgroup ({why}): no OOM killer comes"));
        }
        let cgroup = cgroup.ok();
        let shared = vec![7; usize::try_from(32 * MIB).expect("a small number")];
        std::fs::write(place.join("shared.weights"), shared).expect("a file");
        std::fs::write(place.join("clock"), 0_i64.to_ne_bytes()).expect("a file");
        write_config(&place, &Shape::default());
        let residentd = Residentd::launch(folder, serve(&place, cgroup.as_ref()));
        Self {
            residentd,
            disk,
            cgroup,
            missing,
        }
    }

    /// Starts residentd again, after it has ended.
    pub(crate) fn start_again(&mut self) -> Result<(), String> {
        let command = serve(&self.residentd.folder(), self.cgroup.as_ref());
        self.residentd.launch_again(command)
    }

    pub(crate) fn configure(&self, shape: &Shape) {
        write_config(&self.residentd.folder(), shape);
    }

    /// Has the wall clock be wrong by so many seconds.
    pub(crate) fn set_clock(&self, seconds: i64) {
        // In place, since it is mapped; eight bytes are written at once.
        let path = self.residentd.folder().join("clock");
        let file = std::fs::File::options().write(true).open(path);
        let written = file.and_then(|mut file| file.write_all(&seconds.to_ne_bytes()));
        written.expect("the file of the clock can be written");
    }

    /// Gives orders to workers of a model; none when empty.
    pub(crate) fn order(&self, model: &str, words: &str) {
        let folder = self.residentd.folder();
        let unfinished = folder.join(format!("{model}.orders.tmp"));
        std::fs::write(&unfinished, words).expect("orders can be written");
        std::fs::rename(unfinished, orders(&folder, model)).expect("orders can be given");
    }
}

fn orders(folder: &Path, model: &str) -> PathBuf {
    folder.join(format!("{model}.orders"))
}

/// Returns the command that serves the configuration in this folder.
fn serve(folder: &Path, cgroup: Option<&MemoryCgroup>) -> Command {
    let clock = folder.join("clock").display().to_string();
    let mark = folder.display().to_string();
    let library = built("libfake_clock.so").display().to_string();
    let environment = [
        (MARK, mark.as_str()),
        ("FAKE_CLOCK", clock.as_str()),
        ("LD_PRELOAD", library.as_str()),
    ];
    let mut command = command(&folder.join("residentd.toml"), &environment);
    command.current_dir(folder);
    match cgroup {
        Some(cgroup) => cgroup.within(&command),
        None => command,
    }
}

/// Returns a file that cargo built as an example.
fn built(name: &str) -> PathBuf {
    let stub = Path::new(STUB);
    let path = stub.with_file_name("examples").join(name);
    assert!(path.exists(), "{}: cargo builds it", path.display());
    path
}

/// Writes the configuration so that a reader sees all of it or what was before.
fn write_config(folder: &Path, shape: &Shape) {
    let state = folder.join("state");
    let mut text = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\nshutdown_grace = \"8s\"\n\
         [memory]\nlimit = \"{LIMIT}MiB\"\nreserve = \"32MiB\"\npatience = \"1s\"\n\
         [defaults]\nstart_timeout = \"8s\"\nstop_timeout = \"1s\"\nqueue_timeout = \"15s\"\nmax_queue = 64\n\
         live = {{ probe = \"1s\", timeout = \"1s\", failures = 2, still = \"3s\" }}\n"
    );
    for (name, _) in SHARES {
        if !shape.without.contains(&name) {
            let changes = shape.changes.get(name).copied().unwrap_or(0);
            text += &model(folder, name, changes);
        }
    }
    put(folder, &text);
}

/// Puts this text where residentd reads its configuration.
pub(crate) fn put(folder: &Path, text: &str) {
    let unfinished = folder.join("residentd.toml.tmp");
    std::fs::write(&unfinished, text).expect("the config can be written");
    std::fs::rename(unfinished, folder.join("residentd.toml")).expect("it can be replaced");
}

fn model(folder: &Path, name: &str, changes: u32) -> String {
    let (flags, keys) = traits(name);
    let shared = folder.join("shared.weights").display().to_string();
    let place = match name {
        "pipe" => "--socket ${SOCKET}",
        _ => "--port ${PORT}",
    };
    let mut words = vec![STUB.to_owned()];
    if name == "husk" {
        // A shell with more to do after its child does not become it.
        words = ["sh", "-c", "\"$0\" \"$@\"; exit $?", STUB]
            .map(str::to_owned)
            .into();
    }
    words.extend(["--name".to_owned(), name.to_owned()]);
    words.extend(place.split(' ').map(str::to_owned));
    words.extend(
        flags
            .replace("SHARED", &shared)
            .split(' ')
            .map(str::to_owned),
    );
    words.extend([
        "--orders".to_owned(),
        orders(folder, name).display().to_string(),
    ]);
    let journal = folder.join("journal").display().to_string();
    words.extend(["--journal".to_owned(), journal]);
    let mut text = format!("[models.{name}]\ncommand = {words:?}\n{keys}\n");
    let _ = writeln!(text, "env = {{ CHANGES = \"{changes}\" }}");
    // Not the other files that it names, which change all the time.
    let weights: Vec<_> = flags
        .contains("SHARED")
        .then_some(shared)
        .into_iter()
        .collect();
    let _ = writeln!(text, "weights = {weights:?}");
    text
}

/// A small disk.
#[derive(Debug)]
pub(crate) struct Disk {
    place: PathBuf,
}

const SIZE: &str = "size=16m";

impl Disk {
    fn mount(place: &Path) -> Option<Self> {
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", SIZE, "tmpfs"])
            .arg(place)
            .stderr(std::process::Stdio::null())
            .status();
        let place = place.to_owned();
        done.is_ok_and(|status| status.success())
            .then_some(Self { place })
    }

    /// Leaves no byte.
    pub(crate) fn fill(&self) {
        let mut options = std::fs::File::options();
        let filler = options.append(true).create(true).open(self.filler());
        if let Ok(mut file) = filler {
            while file.write_all(&[0; 4096]).is_ok() {}
        }
    }

    /// Gives back what [`Disk::fill`] took.
    pub(crate) fn free(&self) {
        // It may never have been there.
        let _ = std::fs::remove_file(self.filler());
    }

    /// Lets no file be made, or any number.
    pub(crate) fn allow_files(&self, any: bool) {
        // A file that is made in between makes it too few, which is refused.
        wait_until("the disk to be mounted anew", || {
            let used = rustix::fs::statvfs(&self.place)
                .map_or(0, |found| found.f_files.saturating_sub(found.f_ffree));
            let most = if any { 10_000 } else { used };
            let done = Command::new("mount")
                .args(["-o", &format!("remount,{SIZE},nr_inodes={most}")])
                .arg(&self.place)
                .stderr(std::process::Stdio::null())
                .status();
            done.is_ok_and(|status| status.success()).then_some(())
        });
    }

    fn filler(&self) -> PathBuf {
        self.place.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What is busy goes when it is no longer.
        let _ = Command::new("umount").arg("-l").arg(&self.place).status();
    }
}
