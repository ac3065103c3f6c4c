//! What AMD's compute driver tells: its names for the devices, and what each
//! process asked it for.
//!
//! It numbers processes as the host does, whoever reads. In a pid namespace of
//! our own those numbers are other processes', so nothing is read there.

use std::fs;
use std::path::Path;

use super::{read_number, read_text};
use crate::model::Bytes;

/// The link `/proc/self/ns/pid` of the namespace that all others are in; its
/// number is fixed in the kernel (`PROC_PID_INIT_INO`).
const HOST_NAMESPACE: &str = "pid:[4026531836]";

/// A device, or one part of a device that is split.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// How the driver calls it.
    pub(super) name: String,
    /// Address of the device on its bus. The node's own number may be in the
    /// last digit, see [`Node::device_address`].
    address: String,
}

impl Node {
    /// Returns which of the addresses is this node's device.
    ///
    /// Parts of a split device have had their number in the highest four bits
    /// of the location and, in some kernels, in the lowest three, where the
    /// function is. So an address that no device has is that of function 0.
    pub(super) fn device_address<'a>(&self, addresses: &[&'a str]) -> Option<&'a str> {
        let find = |wanted: &str| addresses.iter().copied().find(|have| *have == wanted);
        find(&self.address).or_else(|| {
            let (slot, _) = self.address.rsplit_once('.')?;
            find(&format!("{slot}.0"))
        })
    }
}

/// Returns the driver's devices; none where its process numbers are not ours.
pub(super) fn nodes(root: &Path) -> Vec<Node> {
    let namespace = fs::read_link(root.join("proc/self/ns/pid"));
    if !namespace.is_ok_and(|namespace| namespace == Path::new(HOST_NAMESPACE)) {
        return Vec::new();
    }
    let nodes = fs::read_dir(root.join("sys/class/kfd/kfd/topology/nodes"));
    let nodes = nodes.into_iter().flatten().flatten();
    nodes.filter_map(|node| parse(&node.path())).collect()
}

/// Reads one node; `None` for a processor's.
fn parse(node: &Path) -> Option<Node> {
    let name = read_text(&node.join("gpu_id")).filter(|name| name != "0")?;
    let properties = fs::read_to_string(node.join("properties")).ok()?;
    let property = |key: &str| -> Option<u64> {
        let mut lines = properties.lines();
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
        value.trim().parse().ok()
    };
    let (domain, location) = (property("domain").unwrap_or(0), property("location_id")?);
    let (bus, slot, function) = (
        (location >> 8) & 0xff,
        (location >> 3) & 0x1f,
        location & 0x7,
    );
    Some(Node {
        name,
        address: format!("{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"),
    })
}

/// Returns what a process asked of a device with these names, all of its parts
/// together; `None` when it does not compute there.
pub(super) fn held(root: &Path, names: &[String], pid: i32) -> Option<Bytes> {
    let folder = root.join(format!("sys/class/kfd/kfd/proc/{pid}"));
    let parts = names
        .iter()
        .filter_map(|name| read_number(&folder.join(format!("vram_{name}"))));
    parts.map(Bytes).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(address: &str) -> Node {
        Node {
            name: "1".into(),
            address: address.into(),
        }
    }

    #[test]
    fn a_virtual_function_is_a_device_of_its_own_and_a_parts_number_is_not() {
        let devices = ["0000:03:00.0", "0000:03:00.2"];
        let of = |address| node(address).device_address(&devices);
        assert_eq!(of("0000:03:00.2"), Some("0000:03:00.2"));
        assert_eq!(of("0000:03:00.1"), Some("0000:03:00.0"));
        assert_eq!(of("0000:04:00.0"), None);
    }
}
