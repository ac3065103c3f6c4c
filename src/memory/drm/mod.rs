//! GPUs of AMD and Intel, by what the kernel's own drivers tell: sysfs for the
//! device, `fdinfo` and the compute driver's files for each process. No vendor's
//! library is needed.
//!
//! | driver | size and use of the device | a process' memory |
//! | --- | --- | --- |
//! | `amdgpu` | `mem_info_vram_total`, `mem_info_vram_used` | region `vram`; `/sys/class/kfd/kfd/proc/<pid>/vram_<gpu>` |
//! | `xe` | `tile*/physical_vram_size_bytes`; its use is not told | regions `vram0`, `vram1`, … |
//! | `i915` | not told | regions `local0`, … |
//!
//! What the device uses stays unknown where the table says so; nothing is made
//! up. The size that `xe` tells is the physical one, a little of which the driver
//! keeps.
//!
//! A GPU without memory of its own takes the host's:
//!
//! - An Intel GPU at 0000:00:02, where integrated ones and their virtual
//!   functions are, unless the driver shows what only GPUs with memory have
//!   (`hwmon`, `tile0/physical_vram_size_bytes`): a guest may see one there.
//! - An AMD GPU that may borrow more (`mem_info_gtt_total`) than is set aside for
//!   it (`mem_info_vram_total`), which is when `amdgpu` itself puts compute memory
//!   of an integrated one into the host's. More than 2 GiB set aside must also
//!   be known to be an integrated GPU's. What it borrows is then its figure;
//!   what is set aside is no part of the host's memory.

mod fdinfo;
mod kfd;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::vram::Row;
use super::{DeviceReading, VramSource};
use crate::model::{Bytes, GpuVendor};

/// No more than this is taken for memory set aside, not for a GPU's own,
/// without further proof.
const SET_ASIDE: Bytes = Bytes::gib(2);
/// Where Intel's integrated GPUs are, up to the function.
const INTEL_INTEGRATED: &str = "0000:00:02.";

/// Finds and reads the devices, and whose memory is whose.
#[derive(Debug)]
pub(super) struct Drm {
    root: PathBuf,
    cards: Vec<Card>,
}

/// One GPU.
#[derive(Debug)]
struct Card {
    /// Its folder in sysfs.
    device: PathBuf,
    /// Its address on its bus.
    pdev: String,
    driver: Driver,
    uuid: String,
    name: String,
    unified: bool,
    /// How the compute driver calls it, or each part of it when it is split.
    kfd: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    Amdgpu,
    Xe,
    I915,
}

impl Drm {
    /// Looks for devices below `root`, which is `/` but for tests.
    pub(super) fn new(root: PathBuf) -> Self {
        let mut drm = Self {
            root,
            cards: Vec::new(),
        };
        drm.relocate();
        drm
    }

    /// Looks again: devices may come and go.
    pub(super) fn relocate(&mut self) {
        let entries = fs::read_dir(self.root.join("sys/class/drm"));
        let names = entries.into_iter().flatten().flatten();
        let cards = names.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            // Connectors are called card0-DP-1.
            let number: u32 = name.strip_prefix("card")?.parse().ok()?;
            Some((number, entry.path().join("device")))
        });
        let mut cards: Vec<_> = cards.collect();
        cards.sort();
        let cards = cards.into_iter();
        self.cards = cards.filter_map(|(_, device)| Card::open(device)).collect();
        self.name_for_compute();
    }

    /// Finds out how the compute driver calls the cards.
    fn name_for_compute(&mut self) {
        if !self.cards.iter().any(Card::asks_compute) {
            return;
        }
        let nodes = kfd::nodes(&self.root);
        let addresses: Vec<_> = self.cards.iter().map(|card| card.pdev.clone()).collect();
        let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
        for card in self.cards.iter_mut().filter(|card| card.asks_compute()) {
            let parts = nodes
                .iter()
                .filter(|node| node.device_address(&addresses) == Some(&card.pdev));
            card.kfd = parts.map(|node| node.name.clone()).collect();
        }
    }

    /// Returns whether there is any device.
    pub(super) fn is_empty(&self) -> bool {
        self.cards.is_empty()
    }

    /// Reads every device; the first gets the index `first`.
    pub(super) fn devices(&self, first: u32) -> Vec<DeviceReading> {
        (first..)
            .zip(&self.cards)
            .map(|(index, card)| card.read(index))
            .collect()
    }

    /// Returns what these processes hold of each device. A client that several
    /// of them have inherited counts for the first.
    pub(super) fn rows(&self, first: u32, pids: &BTreeSet<i32>) -> Vec<Row> {
        let proc = self.root.join("proc");
        let mut seen = BTreeSet::new();
        let mut rows = Vec::new();
        for pid in pids {
            for client in fdinfo::clients(&proc, *pid) {
                let mut cards = (first..).zip(&self.cards);
                let Some((device, card)) = cards.find(|(_, card)| card.pdev == client.pdev) else {
                    continue;
                };
                if seen.insert((client.pdev.clone(), client.id)) {
                    rows.push(Row {
                        device,
                        pid: *pid,
                        bytes: client.held(|region| card.counts(region)),
                        source: VramSource::DrmFdinfo,
                    });
                }
            }
            rows.extend((first..).zip(&self.cards).filter_map(|(device, card)| {
                Some(Row {
                    device,
                    pid: *pid,
                    bytes: Some(kfd::held(&self.root, &card.kfd, *pid)?),
                    source: VramSource::Kfd,
                })
            }));
        }
        sum_clients(rows)
    }
}

/// Adds up the clients of one process on one device: each has its own memory.
fn sum_clients(rows: Vec<Row>) -> Vec<Row> {
    let mut summed: Vec<Row> = Vec::with_capacity(rows.len());
    for row in rows {
        let same = |other: &&mut Row| {
            (other.device, other.pid, other.source) == (row.device, row.pid, row.source)
        };
        match summed.iter_mut().find(same) {
            // One client that tells nothing makes the sum unknown.
            Some(sum) => sum.bytes = sum.bytes.zip(row.bytes).map(|(a, b)| a + b),
            None => summed.push(row),
        }
    }
    summed
}

impl Card {
    fn open(device: PathBuf) -> Option<Self> {
        let driver = match link_name(&device.join("driver"))?.as_str() {
            "amdgpu" => Driver::Amdgpu,
            "xe" => Driver::Xe,
            "i915" => Driver::I915,
            // NVIDIA's has its own library; others have no memory to speak of.
            _ => return None,
        };
        let facts = fs::read_to_string(device.join("uevent")).unwrap_or_default();
        let fact = |key: &str| facts.lines().find_map(|line| line.strip_prefix(key));
        let pdev = match fact("PCI_SLOT_NAME=") {
            Some(pdev) => pdev.to_owned(),
            None => link_name(&device)?,
        };
        let read = |file: &str| read_text(&device.join(file)).filter(|text| !text.is_empty());
        let name = read("product_name").unwrap_or_else(|| {
            let id = fact("PCI_ID=").unwrap_or("GPU");
            format!("{} {id}", driver.as_str())
        });
        let uuid = match read("unique_id") {
            Some(id) => format!("GPU-{}", id.trim_start_matches("0x")),
            None => format!("pci-{pdev}"),
        };
        let unified = match driver {
            Driver::Amdgpu => borrows(&device),
            Driver::Xe | Driver::I915 => {
                pdev.starts_with(INTEL_INTEGRATED) && !has_intel_memory(&device)
            }
        };
        Some(Self {
            kfd: Vec::new(),
            device,
            pdev,
            driver,
            uuid,
            name,
            unified,
        })
    }

    /// Returns whether the compute driver's figures are used. Those for a GPU
    /// that takes the host's memory count that and its own alike.
    fn asks_compute(&self) -> bool {
        self.driver == Driver::Amdgpu && !self.unified
    }

    fn read(&self, index: u32) -> DeviceReading {
        let bytes = |file: &str| read_number(&self.device.join(file)).map(Bytes);
        let (total, used) = match self.driver {
            _ if self.unified => (None, None),
            Driver::Amdgpu => (bytes("mem_info_vram_total"), bytes("mem_info_vram_used")),
            Driver::Xe => (self.tiles(), None),
            Driver::I915 => (None, None),
        };
        DeviceReading {
            index,
            uuid: self.uuid.clone(),
            name: self.name.clone(),
            total,
            used,
            free: total.zip(used).map(|(total, used)| total - used),
            vendor: match self.driver {
                Driver::Amdgpu => GpuVendor::Amd,
                Driver::Xe | Driver::I915 => GpuVendor::Intel,
            },
            unified: self.unified,
            source: self.driver.as_str(),
        }
    }

    /// Adds up the memory of all tiles.
    fn tiles(&self) -> Option<Bytes> {
        let tiles = (0..).map_while(|tile| {
            let file = format!("tile{tile}/physical_vram_size_bytes");
            read_number(&self.device.join(file)).map(Bytes)
        });
        let tiles: Vec<_> = tiles.collect();
        (!tiles.is_empty()).then(|| tiles.into_iter().sum())
    }

    /// Returns whether a region of `fdinfo` is the memory of this device, or
    /// host memory that it uses when it has none.
    fn counts(&self, region: &str) -> bool {
        match (self.driver, self.unified) {
            (Driver::Amdgpu, false) => region == "vram",
            (Driver::Amdgpu, true) => region == "gtt",
            (Driver::Xe, false) => region.starts_with("vram"),
            (Driver::Xe, true) => matches!(region, "gtt" | "system"),
            (Driver::I915, false) => region.starts_with("local"),
            (Driver::I915, true) => region.starts_with("system"),
        }
    }
}

impl Driver {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Amdgpu => "amdgpu",
            Self::Xe => "xe",
            Self::I915 => "i915",
        }
    }
}

/// Returns whether an AMD GPU takes the host's memory.
fn borrows(device: &Path) -> bool {
    let bytes = |file: &str| read_number(&device.join(file)).map(Bytes);
    let (Some(own), Some(borrowed)) = (bytes("mem_info_vram_total"), bytes("mem_info_gtt_total"))
    else {
        return false;
    };
    // The driver has this file for GPUs with memory of their own only. It goes
    // first because reading the metrics can wake a GPU, and looking does not.
    let discrete = device.join("mem_busy_percent").exists();
    borrowed > own && !discrete && (own <= SET_ASIDE || has_apu_metrics(device))
}

/// Returns whether the driver tells the metrics of an integrated AMD GPU: after
/// two bytes of size comes the format, which is 2 or 3 for those and 1 for others.
fn has_apu_metrics(device: &Path) -> bool {
    let metrics = fs::read(device.join("gpu_metrics"));
    metrics.is_ok_and(|bytes| matches!(bytes.get(2), Some(2 | 3)))
}

/// Returns whether an Intel driver shows what it has for GPUs with memory only.
fn has_intel_memory(device: &Path) -> bool {
    let shown = ["hwmon", "tile0/physical_vram_size_bytes"];
    shown.iter().any(|file| device.join(file).exists())
}

fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn read_text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn read_number(path: &Path) -> Option<u64> {
    read_text(path)?.parse().ok()
}

#[cfg(test)]
mod tests;
