//! Machines with GPUs, as folders in the kernel's documented formats.

use std::os::unix::fs::symlink;

use super::*;

/// A machine made of files.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, text).expect("a file");
        self
    }

    fn link(&self, path: &str, to: &str) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        symlink(to, path).expect("a link");
        self
    }

    /// A card with this driver at this address.
    fn card(&self, number: u32, driver: &str, pdev: &str) -> &Self {
        let device = format!("sys/class/drm/card{number}/device");
        self.file(
            &format!("{device}/uevent"),
            &format!("DRIVER={driver}\nPCI_ID=1002:744C\nPCI_SLOT_NAME={pdev}\n"),
        );
        self.file(
            &format!("sys/class/drm/card{number}-DP-1/status"),
            "connected\n",
        );
        self.link(
            &format!("{device}/driver"),
            &format!("../../../bus/pci/drivers/{driver}"),
        )
    }

    fn of_card(&self, number: u32, file: &str, text: &str) -> &Self {
        self.file(&format!("sys/class/drm/card{number}/device/{file}"), text)
    }

    /// What the compute driver says of its devices: name and location.
    fn compute(&self, nodes: &[(u32, u64)]) -> &Self {
        self.link("proc/self/ns/pid", "pid:[4026531836]");
        for (number, (name, location)) in (0..).zip(nodes) {
            let node = format!("sys/class/kfd/kfd/topology/nodes/{number}");
            let properties = format!("simd_count 192\nlocation_id {location}\ndomain 0\n");
            self.file(&format!("{node}/gpu_id"), &format!("{name}\n"))
                .file(&format!("{node}/properties"), &properties);
        }
        self
    }

    /// An open device file of a process.
    fn open(&self, pid: i32, fd: u32, fdinfo: &str) -> &Self {
        self.link(&format!("proc/{pid}/fd/{fd}"), "/dev/dri/renderD128");
        self.file(&format!("proc/{pid}/fdinfo/{fd}"), fdinfo)
    }

    fn drm(&self) -> Drm {
        Drm::new(self.0.path().to_owned())
    }
}

fn client(pdev: &str, id: u32, lines: &str) -> String {
    format!("pos:\t0\nflags:\t02\ndrm-pdev:\t{pdev}\ndrm-client-id:\t{id}\n{lines}\n")
}

/// The rows as (device, pid, MiB, source).
fn rows(drm: &Drm, pids: &[i32]) -> Vec<(u32, i32, Option<u64>, VramSource)> {
    let pids = pids.iter().copied().collect();
    drm.rows(0, &pids)
        .into_iter()
        .map(|row| {
            let mib = row.bytes.map(|bytes| bytes.get() >> 20);
            (row.device, row.pid, mib, row.source)
        })
        .collect()
}

const FDINFO: VramSource = VramSource::DrmFdinfo;
const CARD: &str = "0000:03:00.0";
const INTEGRATED: &str = "0000:00:02.0";

#[test]
fn a_radeon_tells_its_memory_and_its_processes() {
    let machine = Machine::new();
    machine
        .card(0, "amdgpu", CARD)
        .of_card(0, "mem_info_vram_total", "25753026560\n")
        .of_card(0, "mem_info_vram_used", "1073741824\n")
        .of_card(0, "mem_info_gtt_total", "33554432000\n")
        .of_card(0, "unique_id", "1f2e3d4c5b6a7988\n")
        .of_card(0, "product_name", "AMD Radeon PRO W7900\n")
        .open(
            10,
            5,
            &client(
                CARD,
                1,
                "drm-resident-vram:\t512 MiB\ndrm-resident-gtt:\t64 MiB",
            ),
        )
        .open(10, 6, &client(CARD, 2, "drm-resident-vram:\t256 MiB"));
    let drm = machine.drm();
    let device = &drm.devices(3)[0];
    assert_eq!(
        (device.index, device.uuid.as_str()),
        (3, "GPU-1f2e3d4c5b6a7988")
    );
    assert_eq!(device.name, "AMD Radeon PRO W7900");
    assert_eq!(device.total, Some(Bytes(25_753_026_560)));
    assert_eq!(device.free, Some(Bytes(25_753_026_560 - 1_073_741_824)));
    assert_eq!((device.vendor, device.unified), (GpuVendor::Amd, false));
    assert_eq!(rows(&drm, &[10]), [(0, 10, Some(768), FDINFO)]);
}

#[test]
fn a_client_that_is_duplicated_or_inherited_counts_once() {
    let machine = Machine::new();
    let same = client(CARD, 7, "drm-resident-vram:\t100 MiB");
    machine
        .card(0, "amdgpu", CARD)
        .of_card(0, "mem_info_vram_total", "25753026560\n")
        .open(10, 5, &same)
        .open(10, 6, &same)
        .open(11, 5, &same);
    assert_eq!(
        rows(&machine.drm(), &[11, 10]),
        [(0, 10, Some(100), FDINFO)]
    );
}

#[test]
fn compute_memory_is_what_the_compute_driver_says() {
    let machine = Machine::new();
    machine
        .card(0, "amdgpu", CARD)
        .of_card(0, "mem_info_vram_total", "25753026560\n")
        // A processor, and bus 3, device 0, function 0.
        .compute(&[(0, 0), (51234, 0x300)])
        .file("sys/class/kfd/kfd/proc/10/vram_51234", "2147483648\n")
        .open(10, 5, &client(CARD, 1, "drm-resident-vram:\t12 MiB"));
    let found = rows(&machine.drm(), &[10]);
    assert_eq!(
        found,
        [
            (0, 10, Some(12), FDINFO),
            (0, 10, Some(2048), VramSource::Kfd)
        ]
    );
    // The two are views of the same memory: the larger one counts.
    let all = machine.drm().rows(0, &[10].into());
    let joined = super::super::vram::Vram::new(&all, Some);
    let usage = joined.of_tree([10]);
    assert_eq!(usage[0].bytes, Some(Bytes::gib(2)));
    assert_eq!(usage[0].source, VramSource::Kfd);
}

#[test]
fn the_parts_of_a_split_device_add_up_wherever_the_kernel_puts_their_numbers() {
    for parts in [
        [0x300, 0x300 | (1 << 28), 0x300 | (7 << 28)],
        [0x300, 0x301, 0x307],
    ] {
        let machine = Machine::new();
        machine
            .card(0, "amdgpu", CARD)
            .of_card(0, "mem_info_vram_total", "206158430208\n")
            .compute(&[(1, parts[0]), (2, parts[1]), (3, parts[2])])
            .file("sys/class/kfd/kfd/proc/10/vram_1", "1048576\n")
            .file("sys/class/kfd/kfd/proc/10/vram_2", "2097152\n")
            .file("sys/class/kfd/kfd/proc/10/vram_3", "4194304\n");
        let found = rows(&machine.drm(), &[10]);
        assert_eq!(found, [(0, 10, Some(7), VramSource::Kfd)], "{parts:x?}");
    }
}

#[test]
fn in_a_pid_namespace_the_compute_drivers_numbers_are_strangers() {
    let machine = Machine::new();
    machine
        .card(0, "amdgpu", CARD)
        .of_card(0, "mem_info_vram_total", "25753026560\n")
        .compute(&[(51234, 0x300)])
        .file("sys/class/kfd/kfd/proc/10/vram_51234", "2147483648\n");
    let link = machine.0.path().join("proc/self/ns/pid");
    fs::remove_file(link).expect("a link");
    machine.link("proc/self/ns/pid", "pid:[4026532001]");
    assert_eq!(rows(&machine.drm(), &[10]), []);
}

#[test]
fn an_apu_borrows_the_hosts_memory_and_a_large_carve_out_is_a_gpu_of_its_own() {
    let machine = Machine::new();
    machine
        .card(0, "amdgpu", "0000:c5:00.0")
        .of_card(0, "mem_info_vram_total", "536870912\n")
        .of_card(0, "mem_info_gtt_total", "33554432000\n")
        .card(1, "amdgpu", "0000:c6:00.0")
        .of_card(1, "mem_info_vram_total", "68719476736\n")
        .of_card(1, "mem_info_vram_used", "0\n")
        .of_card(1, "mem_info_gtt_total", "33554432000\n")
        .open(
            10,
            5,
            &client(
                "0000:c5:00.0",
                1,
                "drm-resident-vram:\t300 MiB\ndrm-resident-gtt:\t4096 MiB",
            ),
        );
    let drm = machine.drm();
    let devices = drm.devices(0);
    assert!(devices[0].unified && devices[0].total.is_none());
    assert!(!devices[1].unified && devices[1].free == Some(Bytes::gib(64)));
    assert_eq!(rows(&drm, &[10]), [(0, 10, Some(4096), FDINFO)]);
}

#[test]
fn an_apu_with_more_set_aside_than_usual_is_known_by_its_metrics() {
    const GIB: u64 = 1 << 30;
    // Set aside, to borrow, another file and its text, and what that makes.
    let cases = [
        (8, 28, ("gpu_metrics", "\u{78}\0\u{2}\u{4}"), true),
        (8, 28, ("gpu_metrics", "\u{8}\u{1}\u{3}\0"), true),
        // A virtual function of a large GPU, in a guest with more memory yet.
        (64, 512, ("gpu_metrics", "\u{78}\0\u{1}\u{4}"), false),
        (8, 28, ("gpu_metrics", ""), false),
        (64, 28, ("gpu_metrics", "\u{78}\0\u{2}\u{4}"), false),
        // A small GPU of its own.
        (2, 16, ("mem_busy_percent", "0\n"), false),
        (2, 16, ("other", ""), true),
    ];
    for (own, borrowed, (file, text), unified) in cases {
        let machine = Machine::new();
        machine
            .card(0, "amdgpu", CARD)
            .of_card(0, "mem_info_vram_total", &format!("{}\n", own * GIB))
            .of_card(0, "mem_info_gtt_total", &format!("{}\n", borrowed * GIB))
            .of_card(0, file, text);
        let device = &machine.drm().devices(0)[0];
        assert_eq!(
            device.unified, unified,
            "{own} of {borrowed}, {file} {text:?}"
        );
    }
}

#[test]
fn an_intel_gpu_where_integrated_ones_are_can_have_memory() {
    let cases = [
        ("i915", INTEGRATED, None, true),
        ("i915", INTEGRATED, Some("hwmon/hwmon3/name"), false),
        (
            "xe",
            INTEGRATED,
            Some("tile0/physical_vram_size_bytes"),
            false,
        ),
        ("xe", "0000:00:02.3", None, true),
        ("xe", "0000:00:03.0", None, false),
    ];
    for (driver, pdev, file, unified) in cases {
        let machine = Machine::new();
        machine.card(0, driver, pdev);
        if let Some(file) = file {
            machine.of_card(0, file, "17179869184\n");
        }
        let device = &machine.drm().devices(0)[0];
        assert_eq!(device.unified, unified, "{driver} {pdev} {file:?}");
    }
}

#[test]
fn an_arc_tells_its_size_and_an_integrated_one_shares_the_hosts_memory() {
    let machine = Machine::new();
    machine
        .card(0, "i915", INTEGRATED)
        .card(1, "xe", CARD)
        .of_card(1, "tile0/physical_vram_size_bytes", "17179869184\n")
        .of_card(1, "tile1/physical_vram_size_bytes", "17179869184\n")
        .open(10, 5, &client(INTEGRATED, 1, "drm-resident-system0:\t20 MiB"))
        .open(
            10,
            6,
            &client(CARD, 1, "drm-resident-vram0:\t1 MiB\ndrm-resident-vram1:\t2 MiB\ndrm-resident-system:\t9 MiB"),
        );
    let drm = machine.drm();
    let devices = drm.devices(0);
    assert!(devices[0].unified);
    assert_eq!(devices[1].total, Some(Bytes::gib(32)));
    // Nobody tells its use: it is unknown, not zero.
    assert_eq!((devices[1].used, devices[1].free), (None, None));
    assert_eq!(
        rows(&drm, &[10]),
        [(0, 10, Some(20), FDINFO), (1, 10, Some(3), FDINFO)]
    );
}

#[test]
fn a_client_without_numbers_is_unknown_and_one_of_another_card_is_nobodys() {
    let machine = Machine::new();
    machine
        .card(0, "amdgpu", CARD)
        .of_card(0, "mem_info_vram_total", "25753026560\n")
        .open(10, 5, &client(CARD, 1, "drm-engine-gfx:\t5 ns"))
        .open(
            11,
            5,
            &client("0000:99:00.0", 1, "drm-resident-vram:\t5 MiB"),
        );
    assert_eq!(rows(&machine.drm(), &[10, 11, 12]), [(0, 10, None, FDINFO)]);
}

#[test]
fn a_process_that_does_not_let_us_look_has_no_row() {
    let machine = Machine::new();
    machine
        .card(0, "amdgpu", CARD)
        .of_card(0, "mem_info_vram_total", "25753026560\n")
        // A folder that cannot be listed, and a file that cannot be read.
        .file("proc/10/fd", "")
        .link("proc/11/fd/5", "/dev/dri/renderD128")
        // Another kind of file with the same keys.
        .link("proc/12/fd/5", "/dev/drifting")
        .file(
            "proc/12/fdinfo/5",
            &client(CARD, 1, "drm-resident-vram:\t5 MiB"),
        );
    assert_eq!(rows(&machine.drm(), &[10, 11, 12]), []);
}

#[test]
fn nvidias_cards_and_machines_without_any_are_left_to_others() {
    let machine = Machine::new();
    machine.card(0, "nvidia", CARD);
    assert!(machine.drm().is_empty());
    assert!(Machine::new().drm().is_empty());
}
