//! Whose GPU memory it is when the driver does not say.
//!
//! A ladder, best first: what the driver lists by process; what the device
//! used more once a worker had loaded there than before, since only one worker
//! at a time loads on a device; what the worker itself reports; unknown. Each
//! figure carries its rung.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::{DeviceReading, VramSource, VramUsage};
use crate::clock::Timestamp;
use crate::model::{Bytes, WorkerId};

/// A device whose use moves by more than this while nothing of ours loads or
/// dies there is used by somebody else as well.
const NOISE: Bytes = Bytes::mib(64);
/// Drivers give memory of an ended process back within this time.
const LATE: Duration = Duration::from_secs(10);
/// The longest report that is read.
const LONGEST_REPORT: usize = 4096;

/// One worker, and what is known of it so far.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    pub(super) worker: &'a WorkerId,
    /// The devices it was placed on.
    pub(super) gpus: &'a [u32],
    pub(super) loading: bool,
    /// What the driver lists of its processes.
    pub(super) told: Vec<VramUsage>,
    /// The file it may report in.
    pub(super) report: Option<&'a Path>,
    /// What it was known to hold before we saw it.
    pub(super) held: Option<&'a BTreeMap<u32, Bytes>>,
}

/// Keeps what each load added to its devices.
#[derive(Debug, Default)]
pub(super) struct Attribution {
    loads: BTreeMap<(WorkerId, u32), Load>,
    devices: BTreeMap<u32, Device>,
    workers: BTreeSet<WorkerId>,
    /// When a worker was last seen to be gone.
    gone_at: Option<Timestamp>,
}

/// What one load added to one device.
#[derive(Clone, Copy, Debug)]
struct Load {
    /// Use of the device, less what other workers held, before it.
    before: Bytes,
    added: Bytes,
    settled: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Device {
    /// Use less what workers are known to hold, at the last pass.
    rest: Bytes,
    /// The driver has told a figure of one of our processes: one that it does
    /// not list holds nothing.
    lists_processes: bool,
    /// Somebody else was seen to use it.
    has_strangers: bool,
}

impl Attribution {
    /// Returns every claimant's memory by device.
    pub(super) fn attribute(
        &mut self,
        at: Timestamp,
        devices: &[DeviceReading],
        claims: Vec<Claim<'_>>,
    ) -> BTreeMap<WorkerId, Vec<VramUsage>> {
        self.forget_the_gone(at, &claims);
        for told in claims.iter().flat_map(|claim| &claim.told) {
            let device = self.devices.entry(told.device).or_default();
            device.lists_processes |= told.bytes.is_some();
        }
        for device in devices {
            if let Some(used) = device.used {
                self.recognize(device.index, used, &claims);
                self.weigh(device.index, used, &claims);
                self.watch(at, device.index, used, &claims);
            }
        }
        claims
            .into_iter()
            .map(|claim| (claim.worker.clone(), self.figures(&claim)))
            .collect()
    }

    fn forget_the_gone(&mut self, at: Timestamp, claims: &[Claim<'_>]) {
        let present: BTreeSet<_> = claims.iter().map(|claim| claim.worker.clone()).collect();
        if self.workers.difference(&present).next().is_some() {
            self.gone_at = Some(at);
        }
        self.loads.retain(|(worker, _), _| present.contains(worker));
        self.workers = present;
    }

    /// Takes from workers that were taken back what they were known to hold.
    /// Nobody saw what was there before their loads: it is what none of us holds.
    fn recognize(&mut self, device: u32, used: Bytes, claims: &[Claim<'_>]) {
        let mut taken_back = Vec::new();
        for claim in claims {
            if !self.is_weighed(claim, device) {
                continue;
            }
            let key = (claim.worker.clone(), device);
            let added = claim.held.and_then(|held| held.get(&device).copied());
            if let Some(added) = added.filter(|_| !self.loads.contains_key(&key)) {
                let load = Load {
                    before: Bytes::ZERO,
                    added,
                    settled: true,
                };
                self.loads.insert(key.clone(), load);
                taken_back.push(key);
            }
        }
        let held = claims.iter().filter_map(|claim| self.held(claim, device));
        let before = used - held.sum::<Bytes>();
        for key in taken_back {
            if let Some(load) = self.loads.get_mut(&key) {
                load.before = before;
            }
        }
    }

    /// Brings the added use up to date of whoever loads on a device and is not
    /// told of.
    fn weigh(&mut self, device: u32, used: Bytes, claims: &[Claim<'_>]) {
        let rest = self.devices.get(&device).map(|device| device.rest);
        for claim in claims {
            if !self.is_weighed(claim, device) {
                continue;
            }
            let key = (claim.worker.clone(), device);
            if claim.held.is_some() && !self.loads.contains_key(&key) {
                continue;
            }
            let held_by = |other: &&Claim<'_>| other.worker != claim.worker;
            let others: Bytes = claims
                .iter()
                .filter(held_by)
                .filter_map(|other| self.held(other, device))
                .sum();
            let now = used - others;
            let load = self.loads.entry(key).or_insert(Load {
                before: rest.unwrap_or(now),
                added: Bytes::ZERO,
                settled: false,
            });
            // One that is parked or unparked is weighed anew.
            load.settled &= !claim.loading;
            if !load.settled {
                load.added = now - load.before;
                // The first pass after the load is the last that counts.
                load.settled = !claim.loading;
            }
        }
    }

    /// Notes a device's use by others, and whether it grew uncalled for.
    fn watch(&mut self, at: Timestamp, device: u32, used: Bytes, claims: &[Claim<'_>]) {
        let held: Bytes = claims
            .iter()
            .filter_map(|claim| self.held(claim, device))
            .sum();
        let rest = used - held;
        let loading = |claim: &Claim<'_>| claim.loading && claim.gpus.contains(&device);
        let moving =
            claims.iter().any(loading) || self.gone_at.is_some_and(|gone| at.since(gone) < LATE);
        let known = self.devices.contains_key(&device);
        let device = self.devices.entry(device).or_default();
        device.has_strangers |= known && !moving && rest > device.rest + NOISE;
        device.rest = rest;
    }

    /// Returns whether this worker's part of a device can only be weighed.
    fn is_weighed(&self, claim: &Claim<'_>, device: u32) -> bool {
        let told = claim.told.iter().find(|told| told.device == device);
        let lists = self
            .devices
            .get(&device)
            .is_some_and(|device| device.lists_processes);
        claim.gpus.contains(&device)
            && match told {
                Some(told) => told.bytes.is_none(),
                None => !lists,
            }
    }

    /// Returns what a worker is known to hold of a device.
    fn held(&self, claim: &Claim<'_>, device: u32) -> Option<Bytes> {
        let told = claim.told.iter().find(|told| told.device == device);
        told.and_then(|told| told.bytes).or_else(|| {
            let load = self.loads.get(&(claim.worker.clone(), device))?;
            Some(load.added)
        })
    }

    fn figures(&self, claim: &Claim<'_>) -> Vec<VramUsage> {
        let mut figures: BTreeMap<u32, VramUsage> = claim
            .told
            .iter()
            .map(|told| (told.device, told.clone()))
            .collect();
        let mut report = None;
        for device in claim.gpus.iter().filter(|d| self.is_weighed(claim, **d)) {
            let load = self.loads.get(&(claim.worker.clone(), *device));
            let weighed = load.map(|load| (load.added, VramSource::DeviceDelta));
            let reported = || {
                let all = report.get_or_insert_with(|| claim.report.map(read).unwrap_or_default());
                let bytes = all.get(device).copied()?;
                Some((bytes, VramSource::WorkerReport))
            };
            let (bytes, source) = match weighed.or_else(reported) {
                Some((bytes, source)) => (Some(bytes), source),
                None => (None, VramSource::Unknown),
            };
            let state = self.devices.get(device).copied().unwrap_or_default();
            let figure = VramUsage {
                device: *device,
                bytes,
                source,
                tainted: source == VramSource::DeviceDelta && state.has_strangers,
            };
            figures.insert(*device, figure);
        }
        figures.into_values().collect()
    }
}

/// Reads a worker's report: a line `gpu:<index> <bytes>` for each device.
fn read(path: &Path) -> BTreeMap<u32, Bytes> {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[..text.len().min(LONGEST_REPORT)]).into_owned();
    let line = |line: &str| {
        let (device, bytes) = line.trim().strip_prefix("gpu:")?.split_once(' ')?;
        Some((device.parse().ok()?, Bytes(bytes.trim().parse().ok()?)))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests;
