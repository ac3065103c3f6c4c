//! NVIDIA GPUs, by the driver's own library (NVML).
//!
//! The library is opened at run time. Without it, or without a driver, there
//! are no devices and nothing is wrong. Its calls can block for long when a
//! GPU hangs, so it lives on a thread of its own: a sweep that does not come
//! back by a deadline leaves the last figures in place, marked as stale.

mod pools;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{mem, thread};

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};

use self::pools::{Pool, list_pools};
use super::vram::Row;
use super::{DeviceReading, VramSource};
use crate::clock::{Clock, Timestamp};
use crate::model::{Bytes, GpuVendor};

/// Opening the library wakes every GPU, which takes seconds for some.
const FIRST_DEADLINE: Duration = Duration::from_secs(5);
/// A sweep takes milliseconds; the sampler waits this long once for a driver
/// that hangs.
const DEADLINE: Duration = Duration::from_millis(500);
/// Time between two attempts to open a library that did not work.
const REOPEN: Duration = Duration::from_secs(60);
/// How long a drop waits for the driver to be shut down.
const SHUTDOWN: Duration = Duration::from_millis(500);

/// What one pass over all devices found.
#[derive(Clone, Debug, Default)]
pub(super) struct Sweep {
    pub(super) devices: Vec<DeviceReading>,
    /// One for each process and device, as the driver tells them.
    pub(super) rows: Vec<Row>,
    /// What is wrong with a driver that is there.
    pub(super) error: Option<String>,
    /// When the driver was asked for these figures.
    pub(super) at: Timestamp,
}

/// The thread that owns the library, from outside.
#[derive(Debug)]
pub(super) struct Gpus {
    link: Arc<Link>,
}

#[derive(Debug, Default)]
struct Link {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    asked: u64,
    answered: u64,
    asked_at: Timestamp,
    last: Sweep,
    /// The sampler is gone.
    stop: bool,
    /// The thread has ended: there is no library, or it was told to stop.
    ended: bool,
}

impl Gpus {
    /// Opens `library`, or the system's own, on a new thread.
    pub(super) fn start(clock: Clock, library: Option<PathBuf>) -> Self {
        let link = Arc::new(Link::default());
        let thread = thread::Builder::new().name("memory-nvml".into()).spawn({
            let link = Arc::clone(&link);
            move || {
                run(clock, library.as_deref().map(AsRef::as_ref), &link);
                link.lock().ended = true;
                link.changed.notify_all();
            }
        });
        if let Err(error) = thread {
            tracing::error!(%error, "gpus are not measured: no thread");
            link.lock().ended = true;
        }
        Self { link }
    }

    /// Reads all devices, or returns the last figures with an error when the
    /// driver does not answer in time.
    pub(super) fn sweep(&self, now: Timestamp) -> Sweep {
        let mut state = self.link.lock();
        if state.ended {
            return state.last.clone();
        }
        let deadline = if state.answered == 0 {
            FIRST_DEADLINE
        } else {
            DEADLINE
        };
        // A sweep that is still under way was waited for once already.
        if state.asked == state.answered {
            state.asked += 1;
            state.asked_at = now;
            self.link.changed.notify_all();
            state = self
                .link
                .changed
                .wait_timeout_while(state, deadline, |s| s.answered < s.asked && !s.ended)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let mut sweep = state.last.clone();
        if state.answered < state.asked && !state.ended {
            let since = now.since(state.asked_at).max(deadline).as_secs_f64();
            sweep.error = Some(format!("the driver has not answered for {since:.1} s"));
        }
        sweep
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        state.stop = true;
        self.link.changed.notify_all();
        // A driver that hangs keeps its thread; it must not keep us.
        drop(
            self.link
                .changed
                .wait_timeout_while(state, SHUTDOWN, |s| !s.ended),
        );
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next question. Returns false when there will be none.
    fn next_question(&self) -> bool {
        let state = self
            .changed
            .wait_while(self.lock(), |s| s.asked == s.answered && !s.stop)
            .unwrap_or_else(PoisonError::into_inner);
        !state.stop
    }

    fn answer(&self, sweep: Sweep) {
        let mut state = self.lock();
        if state.last.error != sweep.error {
            match &sweep.error {
                Some(error) => tracing::warn!(error, "gpu driver does not work"),
                None => tracing::info!("gpu driver works"),
            }
        }
        state.last = sweep;
        state.answered = state.asked;
        self.changed.notify_all();
    }
}

/// Answers questions until told to stop, or until it is clear that there is no
/// library.
fn run(clock: Clock, library: Option<&std::ffi::OsStr>, link: &Link) {
    let mut failed: Option<Timestamp> = None;
    while link.next_question() {
        if failed.is_some_and(|at| clock.now().since(at) < REOPEN) {
            let last = link.lock().last.clone();
            link.answer(last);
            continue;
        }
        let mut builder = Nvml::builder();
        if let Some(path) = library {
            builder.lib_path(path);
        }
        match builder.init() {
            Ok(nvml) => {
                tracing::info!(devices = nvml.device_count().ok(), "gpu driver found");
                if answer_with(&nvml, link) {
                    close(nvml);
                    return;
                }
                close(nvml);
            }
            Err(NvmlError::LibloadingError(error)) => {
                tracing::debug!(%error, "no gpu driver library");
                return;
            }
            // The library is there and the driver is not, as in a GPU image
            // on a machine without one.
            Err(NvmlError::DriverNotLoaded | NvmlError::LibraryNotFound | NvmlError::NotFound) => {
                link.answer(Sweep::default());
            }
            Err(error) => link.answer(Sweep {
                error: Some(format!("open the driver: {error}")),
                ..Sweep::default()
            }),
        }
        failed = Some(clock.now());
    }
}

/// Answers questions with an open library. Returns whether it was told to
/// stop; otherwise the library must be opened anew.
fn answer_with(nvml: &Nvml, link: &Link) -> bool {
    let mut pools = Vec::new();
    let mut outdated = true;
    loop {
        if outdated {
            match list_pools(nvml, mem::take(&mut pools)) {
                Ok(listed) => pools = listed,
                Err(error) => {
                    let last = link.lock().last.clone();
                    link.answer(Sweep {
                        error: Some(format!("list the devices: {error}")),
                        ..last
                    });
                    return false;
                }
            }
        }
        let (at, last) = {
            let state = link.lock();
            (state.asked_at, state.last.rows.clone())
        };
        let sweep = Sweep {
            at,
            ..sweep_pools(&pools, &last)
        };
        // Handles may be out of date: a MIG instance is gone, a GPU lost.
        outdated = sweep.error.is_some();
        link.answer(sweep);
        if !link.next_question() {
            return true;
        }
    }
}

/// Shuts the library down. The wrapper panics at drop when the function for it
/// is missing; such a library is left open.
fn close(nvml: Nvml) {
    if nvml.lib().nvmlShutdown.is_err() {
        mem::forget(nvml);
    } else if let Err(error) = nvml.shutdown() {
        tracing::debug!(%error, "gpu driver did not shut down");
    }
}

/// Reads all pools; `last` are the rows of the sweep before.
fn sweep_pools(pools: &[Pool<'_>], last: &[Row]) -> Sweep {
    let mut sweep = Sweep::default();
    for (pool, index) in pools.iter().zip(0..) {
        let mut reading = DeviceReading {
            index,
            uuid: pool.uuid.clone(),
            name: pool.name.clone(),
            vendor: GpuVendor::Nvidia,
            unified: false,
            total: None,
            used: None,
            free: None,
            source: "nvml",
        };
        match &pool.device {
            Ok(device) => sweep.read(device, &mut reading, last),
            Err(error) => sweep.note(index, error),
        }
        sweep.devices.push(reading);
    }
    sweep
}

/// Returns whether a GPU of this name is known to share the host's memory:
/// Grace Blackwell desktops and the Jetson family.
fn is_integrated(name: &str) -> bool {
    let integrated = ["GB10", "Orin", "Xavier", "Thor", "Tegra", "Jetson"];
    integrated.iter().any(|known| name.contains(known))
}

impl Sweep {
    /// Reads the processes of a device and then its memory: what is taken in
    /// between counts twice rather than not at all.
    fn read(&mut self, device: &Device<'_>, reading: &mut DeviceReading, last: &[Row]) {
        let lists = [
            retried(|| device.running_compute_processes()),
            retried(|| device.running_graphics_processes()),
        ];
        for list in lists {
            match list {
                Ok(processes) => {
                    let rows = processes.iter().map(|p| row(reading.index, p));
                    self.rows.extend(rows);
                }
                Err(error) => {
                    self.note(reading.index, &error);
                    if !cannot_tell(&error) {
                        self.keep_processes(reading.index, last);
                    }
                }
            }
        }
        match device.memory_info() {
            // A GPU without memory of its own uses the host's.
            Ok(info) if info.total == 0 => reading.unified = true,
            Ok(info) => {
                reading.total = Some(Bytes(info.total));
                reading.used = Some(Bytes(info.used));
                reading.free = Some(Bytes(info.free));
            }
            Err(error) => {
                reading.unified =
                    matches!(error, NvmlError::NotSupported) && is_integrated(&reading.name);
                self.note(reading.index, &error);
            }
        }
    }

    /// Keeps the processes that were last on a device whose list failed. What
    /// they hold is unknown now; unlisted they would seem to hold nothing.
    fn keep_processes(&mut self, device: u32, last: &[Row]) {
        let here = last.iter().filter(|row| row.device == device);
        let kept: BTreeMap<i32, Row> = here.map(|row| (row.pid, *row)).collect();
        let rows = kept.into_values().map(|row| Row { bytes: None, ..row });
        self.rows.extend(rows);
    }

    /// Keeps an error that needs a person.
    fn note(&mut self, device: u32, error: &NvmlError) {
        if !cannot_tell(error) {
            self.error
                .get_or_insert_with(|| format!("read gpu:{device}: {error}"));
        }
    }
}

/// Returns whether a device or a driver cannot tell this at all: it is unknown,
/// not wrong.
fn cannot_tell(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::NotSupported
            | NvmlError::NoPermission
            | NvmlError::NotFound
            | NvmlError::FailedToLoadSymbol(_)
    )
}

/// Asks a second time when the list grew between asking for its length and for
/// itself.
fn retried<T>(ask: impl Fn() -> Result<T, NvmlError>) -> Result<T, NvmlError> {
    match ask() {
        Err(NvmlError::InsufficientSize(_)) => ask(),
        answer => answer,
    }
}

fn row(device: u32, process: &ProcessInfo) -> Row {
    Row {
        device,
        pid: i32::try_from(process.pid).unwrap_or(0),
        bytes: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
            UsedGpuMemory::Unavailable => None,
        },
        source: VramSource::NvmlProcess,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_means_no_devices_and_no_error() {
        let clock = Clock::start();
        let gpus = Gpus::start(clock, Some("/nonexistent/libnvidia-ml.so.1".into()));
        for _ in 0..3 {
            let sweep = gpus.sweep(clock.now());
            assert!(sweep.devices.is_empty() && sweep.rows.is_empty());
            assert_eq!(sweep.error, None);
        }
        // Found out at once, not at the deadline.
        assert!(clock.now().since_start() < FIRST_DEADLINE);
        assert!(gpus.link.lock().ended);
    }

    #[test]
    fn a_driver_that_hangs_is_waited_for_once_and_then_marked_stale() {
        // No thread answers this link: it is what a hanging call looks like.
        let gpus = Gpus {
            link: Arc::new(Link::default()),
        };
        gpus.link.answer(Sweep {
            devices: vec![DeviceReading {
                index: 0,
                uuid: "GPU-1".into(),
                name: "a".into(),
                total: None,
                used: None,
                free: None,
                vendor: GpuVendor::Nvidia,
                unified: false,
                source: "nvml",
            }],
            ..Sweep::default()
        });
        gpus.link.lock().answered = 1;
        gpus.link.lock().asked = 1;
        let clock = Clock::start();
        let first = gpus.sweep(clock.now());
        let waited = clock.now();
        assert!(waited.since_start() >= DEADLINE);
        assert_eq!(
            first.error.as_deref(),
            Some("the driver has not answered for 0.5 s")
        );
        assert_eq!(first.devices.len(), 1);
        let second = gpus.sweep(waited + Duration::from_secs(7));
        assert!(clock.now().since(waited) < DEADLINE);
        assert!(second.error.is_some_and(|error| error.contains("for 7.")));
        // The driver comes back.
        gpus.link.answer(Sweep::default());
        assert_eq!(gpus.link.lock().last.error, None);
    }

    #[test]
    fn what_a_device_cannot_tell_is_not_an_error() {
        let mut sweep = Sweep::default();
        sweep.note(0, &NvmlError::NotSupported);
        sweep.note(0, &NvmlError::NoPermission);
        assert_eq!(sweep.error, None);
        sweep.note(1, &NvmlError::GpuLost);
        assert!(sweep.error.is_some_and(|e| e.starts_with("read gpu:1: ")));
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn a_real_driver_lists_its_devices() {
        let clock = Clock::start();
        let gpus = Gpus::start(clock, None);
        let sweep = gpus.sweep(clock.now());
        assert_eq!(sweep.error, None);
        for device in &sweep.devices {
            assert!(device.uuid.starts_with("GPU-") || device.uuid.starts_with("MIG-"));
            assert!(device.total >= device.free && device.free.is_some());
        }
        assert!(!sweep.devices.is_empty());
    }
}
