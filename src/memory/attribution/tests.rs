//! Each rung of the ladder, and when it is used.

use std::io::Write;

use super::*;
use crate::model::{GpuVendor, ModelName};

fn worker(name: &str) -> WorkerId {
    WorkerId {
        model: ModelName::new(name).expect("a good name"),
        generation: 1,
    }
}

fn device(index: u32, used: u64) -> DeviceReading {
    DeviceReading {
        index,
        uuid: format!("GPU-{index}"),
        name: "a".into(),
        total: Some(Bytes::gib(80)),
        used: Some(Bytes::mib(used)),
        free: Some(Bytes::gib(80) - Bytes::mib(used)),
        vendor: GpuVendor::Nvidia,
        unified: false,
        source: "nvml",
    }
}

/// A ladder, the workers on it, and the time.
#[derive(Default)]
struct Bench {
    ladder: Attribution,
    now: u64,
    workers: Vec<(WorkerId, bool, Vec<VramUsage>, Option<std::path::PathBuf>)>,
    held: BTreeMap<WorkerId, BTreeMap<u32, Bytes>>,
}

impl Bench {
    /// A worker placed on gpu:0 that the driver tells nothing of.
    fn load(&mut self, name: &str) {
        self.workers.push((worker(name), true, Vec::new(), None));
    }

    /// A worker of an earlier residentd that was known to hold this much then.
    fn taken_back(&mut self, name: &str, mib: u64) {
        self.workers.push((worker(name), false, Vec::new(), None));
        let held = [(0, Bytes::mib(mib))].into();
        self.held.insert(worker(name), held);
    }

    fn loaded(&mut self, name: &str) {
        for entry in self.workers.iter_mut().filter(|w| w.0 == worker(name)) {
            entry.1 = false;
        }
    }

    fn moves(&mut self, name: &str) {
        for entry in self.workers.iter_mut().filter(|w| w.0 == worker(name)) {
            entry.1 = true;
        }
    }

    fn told(&mut self, name: &str, mib: Option<u64>) {
        let told = VramUsage {
            device: 0,
            bytes: mib.map(Bytes::mib),
            source: VramSource::NvmlProcess,
            tainted: false,
        };
        for entry in self.workers.iter_mut().filter(|w| w.0 == worker(name)) {
            entry.2 = vec![told.clone()];
        }
    }

    fn gone(&mut self, name: &str) {
        self.workers.retain(|w| w.0 != worker(name));
    }

    fn pass_over(&mut self, devices: &[DeviceReading]) -> BTreeMap<WorkerId, Vec<VramUsage>> {
        self.now += 1;
        let claims = self
            .workers
            .iter()
            .map(|(worker, loading, told, report)| Claim {
                held: self.held.get(worker),
                worker,
                gpus: &[0],
                loading: *loading,
                told: told.clone(),
                report: report.as_deref(),
            });
        let claims = claims.collect();
        self.ladder
            .attribute(Timestamp::from_millis(self.now * 1000), devices, claims)
    }

    /// One pass with this much of gpu:0 in use; what `name` is said to hold.
    fn pass(&mut self, used: u64, name: &str) -> (Option<u64>, VramSource, bool) {
        let all = self.pass_over(&[device(0, used)]);
        let vram = &all[&worker(name)];
        assert_eq!(vram.len(), 1, "{vram:?}");
        let mib = vram[0].bytes.map(|bytes| bytes.get() >> 20);
        (mib, vram[0].source, vram[0].tainted)
    }
}

const DELTA: VramSource = VramSource::DeviceDelta;

#[test]
fn what_a_device_uses_more_since_a_load_began_is_the_loaders() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 500)]);
    bench.load("a");
    assert_eq!(bench.pass(500, "a"), (Some(0), DELTA, false));
    assert_eq!(bench.pass(2500, "a"), (Some(2000), DELTA, false));
    bench.loaded("a");
    assert_eq!(bench.pass(3500, "a"), (Some(3000), DELTA, false));
    // From then on it is settled, whatever the device does.
    assert_eq!(bench.pass(3510, "a"), (Some(3000), DELTA, false));
    bench.load("b");
    assert_eq!(bench.pass(4510, "b"), (Some(1000), DELTA, false));
    assert_eq!(bench.pass(4510, "a"), (Some(3000), DELTA, false));
}

#[test]
fn a_stranger_who_comes_while_nothing_loads_is_noticed_and_told() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 0)]);
    bench.load("a");
    bench.pass(1000, "a");
    bench.loaded("a");
    assert_eq!(bench.pass(1000, "a"), (Some(1000), DELTA, false));
    assert_eq!(bench.pass(1500, "a"), (Some(1000), DELTA, true));
}

#[test]
fn memory_that_a_gone_worker_gives_back_late_is_no_stranger() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 0)]);
    for name in ["a", "b"] {
        bench.load(name);
        let used = if name == "a" { 1000 } else { 3000 };
        bench.pass(used, name);
        bench.loaded(name);
        bench.pass(used, name);
    }
    bench.gone("b");
    assert_eq!(bench.pass(3000, "a"), (Some(1000), DELTA, false));
    assert_eq!(bench.pass(1000, "a"), (Some(1000), DELTA, false));
}

#[test]
fn a_figure_by_process_beats_the_difference_and_the_difference_beats_a_report() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 0)]);
    bench.load("a");
    let mut report = tempfile::NamedTempFile::new().expect("a file");
    writeln!(report, "gpu:0 {}\nnonsense\ngpu:9 1", 77 << 20).expect("written");
    bench.workers[0].3 = Some(report.path().to_owned());
    assert_eq!(bench.pass(1000, "a"), (Some(1000), DELTA, false));
    bench.told("a", Some(900));
    assert_eq!(
        bench.pass(1000, "a"),
        (Some(900), VramSource::NvmlProcess, false)
    );
    // A device that tells no totals leaves only the report.
    let mut silent = Bench::default();
    silent.load("a");
    silent.workers[0].3 = Some(report.path().to_owned());
    let mute = DeviceReading {
        total: None,
        used: None,
        free: None,
        ..device(0, 0)
    };
    let vram = &silent.pass_over(std::slice::from_ref(&mute))[&worker("a")];
    assert_eq!(
        (vram[0].bytes, vram[0].source),
        (Some(Bytes::mib(77)), VramSource::WorkerReport)
    );
    silent.workers[0].3 = None;
    let vram = &silent.pass_over(&[mute])[&worker("a")];
    assert_eq!((vram[0].bytes, vram[0].source), (None, VramSource::Unknown));
}

#[test]
fn a_row_without_a_number_is_weighed() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 100)]);
    bench.load("a");
    bench.told("a", None);
    assert_eq!(bench.pass(1100, "a"), (Some(1000), DELTA, false));
}

#[test]
fn where_the_driver_lists_processes_one_it_does_not_list_holds_nothing() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 0)]);
    bench.load("a");
    bench.told("a", Some(500));
    bench.load("b");
    let all = bench.pass_over(&[device(0, 900)]);
    assert_eq!(all[&worker("b")], []);
    assert_eq!(all[&worker("a")][0].bytes, Some(Bytes::mib(500)));
}

#[test]
fn a_worker_that_others_are_weighed_against_counts_by_its_own_figure() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 0)]);
    bench.load("a");
    bench.pass(1000, "a");
    bench.loaded("a");
    bench.pass(1000, "a");
    bench.load("b");
    bench.told("b", None);
    bench.gone("a");
    // What a held is back before anything loads: 1000 less, 400 more.
    assert_eq!(bench.pass(400, "b").0, Some(400));
}

#[test]
fn what_a_worker_gives_back_by_a_park_is_weighed_as_a_load_is() {
    let mut bench = Bench::default();
    bench.pass_over(&[device(0, 500)]);
    bench.load("a");
    bench.pass(2500, "a");
    bench.loaded("a");
    assert_eq!(bench.pass(2500, "a"), (Some(2000), DELTA, false));
    // Its memory moves: out, and after a while in again.
    bench.moves("a");
    assert_eq!(bench.pass(700, "a"), (Some(200), DELTA, false));
    bench.loaded("a");
    assert_eq!(bench.pass(700, "a"), (Some(200), DELTA, false));
    assert_eq!(bench.pass(900, "a"), (Some(200), DELTA, true));
    bench.moves("a");
    assert_eq!(bench.pass(2700, "a"), (Some(2200), DELTA, true));
}

#[test]
fn workers_that_were_taken_back_hold_what_they_held_and_their_parks_are_weighed() {
    let mut bench = Bench::default();
    bench.taken_back("a", 2000);
    bench.taken_back("b", 1000);
    assert_eq!(bench.pass(3500, "a"), (Some(2000), DELTA, false));
    assert_eq!(bench.pass(3500, "b"), (Some(1000), DELTA, false));
    bench.moves("a");
    assert_eq!(bench.pass(1700, "a"), (Some(200), DELTA, false));
    bench.loaded("a");
    assert_eq!(bench.pass(1700, "a"), (Some(200), DELTA, false));
    assert_eq!(bench.pass(1700, "b"), (Some(1000), DELTA, false));
}
