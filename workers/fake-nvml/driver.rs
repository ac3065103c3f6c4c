//! What the fake driver knows: its devices, and who holds how much of each.
//!
//! All of it lies in the folder the library itself lies in, and is read anew at
//! each call:
//!
//! - `driver.json`: the devices and how they misbehave, see [`Driver`];
//! - `processes/<pid>`: a line `<uuid> <bytes>` for each device of a process.
//!
//! Memory of a process that is gone counts on for `late_free_ms`, as with real
//! drivers, and then no more: whoever is killed need not tidy up.

use std::collections::HashMap;
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Deserialize;

/// Codes of `nvmlReturn_t`.
pub(crate) mod code {
    pub(crate) const OK: i32 = 0;
    pub(crate) const INVALID_ARGUMENT: i32 = 2;
    pub(crate) const NOT_FOUND: i32 = 6;
    pub(crate) const INSUFFICIENT_SIZE: i32 = 7;
}

/// `driver.json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Driver {
    /// What `nvmlInit` returns.
    pub(crate) init: i32,
    /// `nvmlInit` takes this long.
    pub(crate) init_hang_ms: u64,
    /// Every call for memory takes this long.
    pub(crate) hang_ms: u64,
    /// Memory of a process that is gone comes back after this long.
    pub(crate) late_free_ms: u64,
    /// How processes are listed.
    pub(crate) rows: Rows,
    /// Every process draws as well, and is listed for that a second time.
    pub(crate) graphics: bool,
    /// The list of processes grows between its count and itself, this many
    /// times in the life of the library.
    pub(crate) grow: u32,
    pub(crate) devices: Vec<Device>,
}

/// How processes are listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Rows {
    /// Pids of this namespace, with their bytes.
    #[default]
    Plain,
    /// A thread of each process, with the process' bytes.
    Threads,
    /// Pids that mean nothing here, as the host's do in a container.
    Foreign,
    /// Right pids, each with zero bytes.
    Zero,
    /// Right pids, each without a number.
    Unavailable,
    /// Nobody.
    None,
    /// The call is not supported.
    NotSupported,
}

/// One GPU, or one MIG instance.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Device {
    pub(crate) uuid: String,
    pub(crate) name: String,
    pub(crate) total: u64,
    pub(crate) reserved: u64,
    /// In use by nobody that is listed.
    pub(crate) baseline: u64,
    /// What the call for its memory returns.
    pub(crate) memory: i32,
    /// What every call for it returns, the one for its handle among them.
    pub(crate) error: i32,
    /// What the call for its MIG mode returns.
    pub(crate) mig_mode: i32,
    /// Instances it is divided into.
    pub(crate) mig: Vec<Device>,
}

/// A process' holding on one device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holding {
    pub(crate) pid: i32,
    pub(crate) bytes: u64,
    pub(crate) alive: bool,
}

impl Driver {
    /// Reads the state; a driver without devices when there is none.
    pub(crate) fn read() -> Self {
        let text = std::fs::read(folder().join("driver.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Returns the device or instance behind a handle, see [`handle`], or the
    /// code that every call for it returns.
    pub(crate) fn device(&self, handle: usize) -> Result<&Device, i32> {
        let (gpu, instance) = (handle / 1000, handle % 1000);
        let gpu = gpu.checked_sub(1).and_then(|gpu| self.devices.get(gpu));
        let gpu = gpu.ok_or(code::INVALID_ARGUMENT)?;
        // An instance is lost with its GPU.
        let device = match instance.checked_sub(1) {
            _ if gpu.error != code::OK => gpu,
            Some(instance) => gpu.mig.get(instance).ok_or(code::NOT_FOUND)?,
            None => gpu,
        };
        match device.error {
            code::OK => Ok(device),
            error => Err(error),
        }
    }

    /// Returns who holds what of a device, the dead whose memory is late
    /// among them.
    pub(crate) fn holdings(&self, uuid: &str) -> Vec<Holding> {
        let entries = std::fs::read_dir(folder().join("processes"));
        let paths = entries.into_iter().flatten().flatten();
        let mut holdings: Vec<_> = paths
            .filter_map(|entry| self.holding(&entry.path(), uuid))
            .collect();
        holdings.sort_by_key(|holding| holding.pid);
        holdings
    }

    fn holding(&self, path: &Path, uuid: &str) -> Option<Holding> {
        let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
        let text = std::fs::read_to_string(path).ok()?;
        let of_device = text.lines().filter_map(|line| line.split_once(' '));
        let mut of_device = of_device.filter(|(device, _)| *device == uuid);
        let bytes = of_device.find_map(|(_, bytes)| bytes.trim().parse().ok())?;
        let alive = is_alive(pid);
        if !alive && dead_for(pid) >= self.late_free_ms {
            return None;
        }
        Some(Holding { pid, bytes, alive })
    }
}

/// Returns the handle of a GPU. That of its n-th MIG instance, from 0, is
/// larger by n and one.
pub(crate) fn handle(gpu: u32) -> usize {
    (place(gpu) + 1) * 1000
}

/// Returns an index as C counts it in the size of ours.
pub(crate) fn place(index: u32) -> usize {
    usize::try_from(index).expect("a 64-bit machine")
}

/// Hangs for as long as the driver is told to; it may be told otherwise
/// meanwhile.
pub(crate) fn hang(how_long: impl Fn(&Driver) -> u64) {
    let since = now_ms();
    while now_ms() - since < how_long(&Driver::read()) {
        #[expect(
            clippy::disallowed_methods,
            reason = "a driver that hangs blocks its caller's thread"
        )]
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// Returns for how many milliseconds a process has been seen to be gone.
fn dead_for(pid: i32) -> u64 {
    static SEEN: Mutex<Option<HashMap<i32, u64>>> = Mutex::new(None);
    let now = now_ms();
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let since = seen.get_or_insert_default().entry(pid).or_insert(now);
    now - *since
}

fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1000 + nanos / 1_000_000
}

/// Returns the folder in which this library's file lies.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let file = own_file().expect("a loaded library has a file");
        file.parent().map(Path::to_owned).unwrap_or_default()
    })
}

#[expect(unsafe_code, reason = "only the dynamic linker knows the file")]
fn own_file() -> Option<PathBuf> {
    let address = own_file as fn() -> Option<PathBuf>;
    let mut found = std::mem::MaybeUninit::<libc::Dl_info>::uninit();
    // SAFETY: the address is of a function of this library, and `found` is
    // written where the call succeeds.
    let info = unsafe {
        if libc::dladdr(address as *const libc::c_void, found.as_mut_ptr()) == 0 {
            return None;
        }
        found.assume_init()
    };
    // SAFETY: `dladdr` gives a string that lives as long as the library.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(name.to_str().ok()?))
}
