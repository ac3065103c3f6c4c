//! `GET /api/v1/memory/system`: the machine, or the container when a cgroup
//! limits it, with its swap, cgroup, stall times and devices.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;

use super::ApiState;
use super::envelope::success;
use crate::control::Snapshot;
use crate::memory::{CgroupReading, DeviceReading, HostReading, PsiReading};
use crate::model::{Bytes, Domain};

/// Answers `GET /system`.
pub(crate) async fn system(State(state): State<ApiState>) -> Response {
    let snapshot = state.controller.snapshot();
    success(&SystemData::of(&snapshot))
}

/// RAM of the machine or container: what the rest of the API calls "system".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ram {
    /// All there is.
    pub(crate) total: Bytes,
    /// What can still be had without swapping or killing.
    pub(crate) available: Bytes,
    /// What is in use and cannot simply be dropped.
    pub(crate) used: Bytes,
}

impl Ram {
    /// Returns the container's RAM when a cgroup limits it, else the host's.
    pub(crate) fn here(host: &HostReading) -> Self {
        let limited = host.cgroup.as_ref().filter(|cgroup| cgroup.limit.is_some());
        let Some(cgroup) = limited else {
            return Self::of_host(host);
        };
        let total = host.domain_total();
        Self {
            total,
            available: host.headroom.min(total),
            used: cgroup.working_set,
        }
    }

    fn of_host(host: &HostReading) -> Self {
        Self {
            total: host.total,
            available: host.available,
            used: host.total - host.available,
        }
    }

    /// Returns the share that is not available, in percent. In a container on
    /// a crowded host this is more than its own use.
    fn percent(self) -> f64 {
        percent(self.total - self.available, self.total)
    }
}

#[derive(Debug, Serialize)]
struct SystemData<'a> {
    total: u64,
    available: u64,
    used: u64,
    percent: f64,
    #[serde(flatten)]
    swap: Swap,
    formatted: Formatted,
    host: HostEntry,
    cgroup: Option<CgroupEntry<'a>>,
    psi: Option<PsiEntry>,
    oom_kills: KillsEntry,
    devices: Vec<DeviceEntry<'a>>,
    device_error: Option<&'a str>,
}

impl<'a> SystemData<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let reading: &'a Arc<_> = &snapshot.memory.reading;
        let host = &reading.host;
        let ram = Ram::here(host);
        let swap = Swap::of(host);
        Self {
            total: ram.total.get(),
            available: ram.available.get(),
            used: ram.used.get(),
            percent: ram.percent(),
            swap,
            formatted: Formatted {
                total: ram.total.formatted(),
                available: ram.available.formatted(),
                used: ram.used.formatted(),
                swap_total: Bytes(swap.swap_total).formatted(),
                swap_used: Bytes(swap.swap_used).formatted(),
                swap_free: Bytes(swap.swap_free).formatted(),
            },
            host: HostEntry::of(host),
            cgroup: host.cgroup.as_ref().map(CgroupEntry::of),
            psi: host.psi.map(PsiEntry::of),
            oom_kills: KillsEntry {
                cgroup: host.oom.cgroup,
                system: host.oom.system,
            },
            devices: devices(snapshot),
            device_error: reading.device_error.as_deref(),
        }
    }
}

/// Processes that the kernel ended for want of memory, since the cgroup was made
/// and since the machine came up; `null` where it does not tell.
#[derive(Clone, Copy, Debug, Serialize)]
struct KillsEntry {
    cgroup: Option<u64>,
    system: Option<u64>,
}

/// Swap is the host's: the kernel does not say what of it a container may use.
#[derive(Clone, Copy, Debug, Serialize)]
struct Swap {
    swap_total: u64,
    swap_used: u64,
    swap_free: u64,
    swap_percent: f64,
}

impl Swap {
    fn of(host: &HostReading) -> Self {
        let used = host.swap_total - host.swap_free;
        Self {
            swap_total: host.swap_total.get(),
            swap_used: used.get(),
            swap_free: host.swap_free.get(),
            swap_percent: percent(used, host.swap_total),
        }
    }
}

#[derive(Debug, Serialize)]
struct Formatted {
    total: String,
    available: String,
    used: String,
    swap_total: String,
    swap_used: String,
    swap_free: String,
}

#[derive(Debug, Serialize)]
struct HostEntry {
    total: u64,
    available: u64,
    used: u64,
    percent: f64,
    #[serde(flatten)]
    swap: Swap,
}

impl HostEntry {
    fn of(host: &HostReading) -> Self {
        let ram = Ram::of_host(host);
        Self {
            total: ram.total.get(),
            available: ram.available.get(),
            used: ram.used.get(),
            percent: ram.percent(),
            swap: Swap::of(host),
        }
    }
}

#[derive(Debug, Serialize)]
struct CgroupEntry<'a> {
    version: u8,
    path: &'a str,
    limit: Option<u64>,
    current: u64,
    working_set: u64,
}

impl<'a> CgroupEntry<'a> {
    fn of(cgroup: &'a CgroupReading) -> Self {
        Self {
            version: cgroup.version,
            path: &cgroup.path,
            limit: cgroup.limit.map(Bytes::get),
            current: cgroup.current.get(),
            working_set: cgroup.working_set.get(),
        }
    }
}

#[derive(Debug, Serialize)]
struct PsiEntry {
    some_avg10: f64,
    some_avg60: f64,
    full_avg10: f64,
    full_avg60: f64,
}

impl PsiEntry {
    const fn of(psi: PsiReading) -> Self {
        Self {
            some_avg10: psi.some_avg10,
            some_avg60: psi.some_avg60,
            full_avg10: psi.full_avg10,
            full_avg60: psi.full_avg60,
        }
    }
}

/// One GPU. What is unknown is `null`, never 0.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceEntry<'a> {
    id: String,
    uuid: &'a str,
    name: &'a str,
    total: Option<u64>,
    used: Option<u64>,
    free: Option<u64>,
    charged: Option<u64>,
    unattributed: Option<u64>,
    source: &'static str,
    vendor: &'static str,
    /// It has no memory of its own: what it uses is the host's.
    unified: bool,
    /// What workers may have of it; `null` when it does not tell its size.
    limit: Option<u64>,
}

/// Lists the devices with what workers were charged for on each.
pub(crate) fn devices(snapshot: &Snapshot) -> Vec<DeviceEntry<'_>> {
    let devices = snapshot.memory.reading.devices.iter();
    devices
        .map(|device| device_entry(snapshot, device))
        .collect()
}

fn device_entry<'a>(snapshot: &'a Snapshot, device: &'a DeviceReading) -> DeviceEntry<'a> {
    let domain = Domain::Gpu(device.index);
    let view = snapshot.memory.domains.iter().find(|d| d.domain == domain);
    DeviceEntry {
        id: domain.to_string(),
        uuid: &device.uuid,
        name: &device.name,
        total: device.total.map(Bytes::get),
        used: device.used.map(Bytes::get),
        free: device.free.map(Bytes::get),
        charged: view.map(|view| view.charged.get()),
        unattributed: snapshot.memory.reading.unattributed(device).map(Bytes::get),
        source: device.source,
        vendor: device.vendor.as_str(),
        unified: device.unified,
        limit: view.map(|view| view.limit.get()),
    }
}

/// Returns `part` of `whole` in percent with one decimal; 0 of nothing.
fn percent(part: Bytes, whole: Bytes) -> f64 {
    if whole == Bytes::ZERO {
        return 0.0;
    }
    (part.as_f64() / whole.as_f64() * 1000.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostReading {
        HostReading {
            total: Bytes::gib(64),
            available: Bytes::gib(16),
            headroom: Bytes::gib(16),
            ..HostReading::default()
        }
    }

    #[test]
    fn without_a_limit_the_system_is_the_host() {
        let mut reading = host();
        reading.cgroup = Some(CgroupReading {
            version: 2,
            path: "/".to_owned(),
            limit: None,
            current: Bytes::gib(1),
            working_set: Bytes::gib(1),
        });
        let ram = Ram::here(&reading);
        assert_eq!(ram.total, Bytes::gib(64));
        assert_eq!(ram.used, Bytes::gib(48));
        assert!((ram.percent() - 75.0).abs() < f64::EPSILON);
    }

    #[test]
    fn in_a_container_the_system_is_the_container() {
        let mut reading = host();
        reading.headroom = Bytes::gib(6);
        reading.cgroup = Some(CgroupReading {
            version: 2,
            path: "/pod".to_owned(),
            limit: Some(Bytes::gib(8)),
            current: Bytes::gib(3),
            working_set: Bytes::gib(2),
        });
        let ram = Ram::here(&reading);
        assert_eq!(
            (ram.total, ram.available, ram.used),
            (Bytes::gib(8), Bytes::gib(6), Bytes::gib(2))
        );
    }
}
