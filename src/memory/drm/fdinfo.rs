//! What one process holds of a GPU, by the kernel's `fdinfo` of its open device
//! files. Keys and units are those of the kernel's "DRM client usage stats".

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::model::Bytes;

/// More open files of one process than this are not looked at.
const MOST_FILES: usize = 4096;

/// One client of a device: an opened device file, under however many numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Client {
    /// Address of the device on its bus.
    pub(super) pdev: String,
    /// Told apart from the device's other clients.
    pub(super) id: u64,
    /// Bytes resident, by region of memory; empty when the driver does not
    /// tell, and unknown where it tells what we cannot read.
    pub(super) regions: Vec<(String, Option<Bytes>)>,
}

impl Client {
    /// Parses one file; `None` when it is no client of a device.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut pdev = None;
        let mut id = None;
        let mut resident = Vec::new();
        let mut legacy = Vec::new();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            if key == "drm-pdev" {
                pdev = Some(value.to_owned());
            } else if key == "drm-client-id" {
                id = value.parse().ok();
            } else if let Some(region) = key.strip_prefix("drm-resident-") {
                resident.push((region.to_owned(), size(value)));
            } else if let Some(region) = key.strip_prefix("drm-memory-") {
                // What resident was called before it had a standard name.
                legacy.push((region.to_owned(), size(value)));
            }
        }
        Some(Self {
            pdev: pdev?,
            id: id?,
            regions: if resident.is_empty() {
                legacy
            } else {
                resident
            },
        })
    }

    /// Adds up the regions that `counts`; `None` when none of them is told, or
    /// one of them is unknown.
    pub(super) fn held(&self, counts: impl Fn(&str) -> bool) -> Option<Bytes> {
        let counted = self.regions.iter().filter(|(region, _)| counts(region));
        let sizes = counted.map(|(_, bytes)| *bytes);
        sizes.reduce(|a, b| a.zip(b).map(|(a, b)| a + b)).flatten()
    }
}

/// Reads `123 KiB`, `4 MiB`, or a plain number of bytes.
fn size(text: &str) -> Option<Bytes> {
    let (number, unit) = match text.split_once(char::is_whitespace) {
        Some((number, unit)) => (number, unit.trim()),
        None => (text, ""),
    };
    let number: u64 = number.parse().ok()?;
    match unit {
        "" => Some(Bytes(number)),
        "KiB" => Some(Bytes::kib(number)),
        "MiB" => Some(Bytes::mib(number)),
        _ => None,
    }
}

/// Returns the clients behind the open device files of a process, each once.
/// Nothing of a process that does not let us look.
pub(super) fn clients(proc: &Path, pid: i32) -> Vec<Client> {
    let folder = proc.join(pid.to_string());
    let Ok(files) = fs::read_dir(folder.join("fd")) else {
        return Vec::new();
    };
    let mut seen = BTreeSet::new();
    let mut clients = Vec::new();
    for file in files.flatten().take(MOST_FILES) {
        let is_device = fs::read_link(file.path()).is_ok_and(|to| to.starts_with("/dev/dri"));
        if !is_device {
            continue;
        }
        let text = fs::read_to_string(folder.join("fdinfo").join(file.file_name()));
        let Some(client) = text.ok().and_then(|text| Client::parse(&text)) else {
            continue;
        };
        if seen.insert((client.pdev.clone(), client.id)) {
            clients.push(client);
        }
    }
    clients
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn resident_regions_are_read_with_their_units_and_totals_are_not() {
        let text = "pos:\t0\ndrm-driver:\tamdgpu\ndrm-client-id:\t42\ndrm-pdev:\t0000:03:00.0\n\
            drm-total-vram:\t9999 KiB\ndrm-resident-vram:\t2048 KiB\ndrm-resident-gtt:\t1 MiB\n\
            drm-memory-vram:\t5 KiB\ndrm-engine-gfx:\t1 ns\n";
        let client = Client::parse(text).expect("a client");
        assert_eq!((client.pdev.as_str(), client.id), ("0000:03:00.0", 42));
        assert_eq!(client.held(|region| region == "vram"), Some(Bytes::mib(2)));
        assert_eq!(client.held(|_| true), Some(Bytes::mib(3)));
        assert_eq!(client.held(|region| region == "local0"), None);
    }

    #[test]
    fn an_older_driver_says_memory_and_another_file_is_no_client() {
        let text = "drm-pdev: 0000:03:00.0\ndrm-client-id: 1\ndrm-memory-vram: 7 KiB\n";
        let client = Client::parse(text).expect("a client");
        assert_eq!(client.held(|_| true), Some(Bytes::kib(7)));
        assert_eq!(Client::parse("pos: 0\nflags: 02\n"), None);
    }

    #[test]
    fn a_region_that_cannot_be_read_makes_the_sum_unknown() {
        let text = "drm-pdev: 0000:03:00.0\ndrm-client-id: 1\n\
            drm-resident-vram0: 1 GiB\ndrm-resident-vram1: 5 MiB\n";
        let client = Client::parse(text).expect("a client");
        assert_eq!(client.held(|_| true), None);
        assert_eq!(client.held(|region| region == "vram1"), Some(Bytes::mib(5)));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in r"(drm-[a-z-]{0,12}:?\PC{0,20}\n){0,8}") {
            let _ = Client::parse(&text).map(|client| client.held(|_| true));
        }
    }
}
