//! A18: GPU figures by the ladder, through the real bindings, against a driver
//! library of the tests' own and real processes.

use std::sync::Arc;
use std::time::Duration;

use residentd::clock::Clock;
use residentd::memory::{
    MemorySource, Pace, Reading, Sampler, SamplerSettings, Subject, VramSource, VramUsage,
};
use residentd::model::{Bytes, ModelName, WorkerId};
use residentd::procfs::{ProcessStat, ProcessTree};
use serde_json::{Value, json};

use crate::support::gpu::{FakeDriver, GIB, Holder, uuid};
use crate::support::{now, wait_until};

/// A sampler over a driver, and the workers it follows.
pub(super) struct Bench {
    pub(super) driver: FakeDriver,
    pub(super) sampler: Arc<Sampler>,
    settings: SamplerSettings,
}

impl Bench {
    pub(super) fn new(driver: FakeDriver) -> Self {
        let settings = SamplerSettings {
            nvml_library: Some(driver.library()),
            ..SamplerSettings::default()
        };
        let sampler = Sampler::start(Clock::start(), settings.clone());
        sampler.pace(Pace::Busy);
        Self {
            driver,
            sampler,
            settings,
        }
    }

    /// Follows a process as a worker that is placed on these GPUs and loads.
    pub(super) fn follow(&self, name: &str, holder: &Holder, gpus: &[u32]) -> WorkerId {
        let worker = WorkerId {
            model: ModelName::new(name).expect("a good name"),
            generation: 1,
        };
        let leader = ProcessStat::read(holder.pid()).expect("it runs").key;
        let subject = Subject {
            gpus: gpus.to_vec(),
            loading: true,
            ..Subject::of(Arc::new(ProcessTree::new(leader)))
        };
        self.sampler.follow(worker.clone(), subject);
        worker
    }

    /// Starts a worker that takes this much of the first GPU once it is
    /// followed.
    fn load(&self, bytes: u64) -> (WorkerId, Holder) {
        let holder = self.driver.holder("none", 0);
        let worker = self.follow("a", &holder, &[0]);
        self.reading("the load has begun", |r| r.workers.contains_key(&worker));
        let processes = self.driver.folder().join("processes");
        let file = processes.join(holder.pid().to_string());
        std::fs::write(file, format!("{} {bytes}\n", uuid(0))).expect("written");
        (worker, holder)
    }

    /// Waits for a reading that is good, taken from now on.
    pub(super) fn reading(&self, what: &str, good: impl Fn(&Reading) -> bool) -> Arc<Reading> {
        let before = self.sampler.readings().borrow().seq;
        wait_until(what, || {
            let reading = self.sampler.readings().borrow().clone();
            (reading.seq > before + 1 && good(&reading)).then_some(reading)
        })
    }

    /// Returns what the worker is said to hold in a reading taken from now on.
    pub(super) fn vram(&self, worker: &WorkerId) -> Vec<VramUsage> {
        let reading = self.reading("a reading", |r| r.workers.contains_key(worker));
        reading.workers[worker].vram.clone()
    }
}

pub(super) fn told(device: u32, bytes: u64, source: VramSource) -> VramUsage {
    VramUsage {
        device,
        bytes: Some(Bytes(bytes)),
        source,
        tainted: false,
    }
}

pub(super) const BY_PID: VramSource = VramSource::NvmlProcess;
pub(super) const BY_DELTA: VramSource = VramSource::DeviceDelta;

#[test]
fn a18_each_workers_memory_is_told_by_pid_on_every_gpu() {
    let bench = Bench::new(FakeDriver::new(2));
    let both = format!("{},{}", uuid(0), uuid(1));
    let (first, second) = (
        bench.driver.holder(&uuid(0), GIB),
        bench.driver.holder(&both, 2 * GIB),
    );
    let a = bench.follow("a", &first, &[0]);
    let b = bench.follow("b", &second, &[0, 1]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
    assert_eq!(
        bench.vram(&b),
        [told(0, 2 * GIB, BY_PID), told(1, 2 * GIB, BY_PID)]
    );
    let reading = bench.reading("totals", |_| true);
    let used: Vec<_> = reading.devices.iter().map(|d| d.used).collect();
    assert_eq!(used, [Some(Bytes(3 * GIB)), Some(Bytes(2 * GIB))]);
    assert_eq!(reading.device_error, None);
}

#[test]
fn a18_a_tree_is_added_up_and_a_stranger_is_nobodys() {
    let driver = FakeDriver::new(1);
    let flags = ["--child", "--child-vram", "2GiB"];
    let holder = driver.holder_with(&uuid(0), GIB, &flags);
    let _stranger = driver.holder(&uuid(0), 4 * GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    // The child may be listed a moment later.
    let reading = bench.reading("all processes", |r| {
        r.devices[0].used == Some(Bytes(7 * GIB))
            && r.workers.get(&a).is_some_and(|usage| usage.processes == 2)
    });
    assert_eq!(reading.workers[&a].vram, [told(0, 3 * GIB, BY_PID)]);
}

#[test]
fn a18_a_process_that_computes_and_draws_counts_once() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| state["graphics"] = json!(true));
    let holder = driver.holder(&uuid(0), GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
}

#[test]
fn a18_a_thread_that_is_listed_counts_for_its_process() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| state["rows"] = json!("threads"));
    let holder = driver.holder(&uuid(0), GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
}

/// Loads a worker of one GiB under a driver that lists it as `rows` says, and
/// returns what it is said to hold when it has loaded.
fn weighed(rows: &str) -> Vec<VramUsage> {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| {
        state["rows"] = json!(rows);
        state["devices"][0]["baseline"] = json!(GIB / 2);
    });
    let bench = Bench::new(driver);
    bench.reading("the device before the load", |r| {
        r.devices[0].used == Some(Bytes(GIB / 2))
    });
    let (a, _holder) = bench.load(GIB);
    bench.reading("the load shows", |r| {
        r.devices[0].used == Some(Bytes(GIB + GIB / 2))
    });
    bench.sampler.loaded(&a);
    bench.vram(&a)
}

#[test]
fn a18_what_the_driver_does_not_tell_is_what_the_device_used_more() {
    // Host pids seen from a container, pids with memory 0, rows without a
    // number, nobody listed, and lists that are not supported at all.
    for rows in ["foreign", "zero", "unavailable", "none", "not_supported"] {
        assert_eq!(weighed(rows), [told(0, GIB, BY_DELTA)], "{rows}");
    }
}

#[test]
fn a18_a_driver_without_functions_for_processes_still_tells_totals() {
    let bench = Bench::new(FakeDriver::old(1));
    let before = bench.reading("totals", |r| r.devices.len() == 1);
    assert_eq!(before.devices[0].free, Some(Bytes(16 * GIB)));
    assert_eq!(before.device_error, None);
    let (a, _holder) = bench.load(GIB);
    bench.reading("the load shows", |r| r.devices[0].used == Some(Bytes(GIB)));
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_DELTA)]);
}

#[test]
fn a18_a_hosts_pid_is_resolved_by_the_hosts_proc() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| state["rows"] = json!("foreign"));
    let holder = driver.holder(&uuid(0), GIB);
    // As the fake driver numbers its foreigners.
    let number = holder.pid() + 5_000_000;
    let host = tempfile::tempdir().expect("a folder");
    let folder = host.path().join(number.to_string());
    std::fs::create_dir(&folder).expect("a folder");
    let status = format!("Tgid:\t{number}\nNSpid:\t{number}\t{}\n", holder.pid());
    std::fs::write(folder.join("status"), status).expect("a file");
    let own = format!("/proc/{}/stat", holder.pid());
    std::fs::copy(own, folder.join("stat")).expect("a copy");
    let settings = SamplerSettings {
        nvml_library: Some(driver.library()),
        host_proc: Some(host.path().to_owned()),
        ..SamplerSettings::default()
    };
    let bench = Bench {
        sampler: Sampler::start(Clock::start(), settings.clone()),
        driver,
        settings,
    };
    bench.sampler.pace(Pace::Busy);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
}

#[test]
fn a18_a_gpu_that_tells_no_memory_is_unknown_and_a_worker_there_never_zero() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| {
        state["devices"][0]["memory"] = json!(3);
        state["rows"] = json!("zero");
    });
    let holder = driver.holder(&uuid(0), GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    let vram = bench.vram(&a);
    assert_eq!((vram[0].bytes, vram[0].source), (None, VramSource::Unknown));
    let reading = bench.reading("the device", |_| true);
    assert_eq!(
        (reading.devices[0].used, reading.devices[0].unified),
        (None, false)
    );
    assert_eq!(reading.device_error, None);
}

#[test]
fn a18_a_gpu_without_memory_of_its_own_counts_against_the_host() {
    // Some say that they cannot tell, others that they have none.
    let says: [fn(&mut Value); 2] = [
        |state| {
            state["devices"][0]["memory"] = json!(3);
            state["devices"][0]["name"] = json!("NVIDIA GB10");
        },
        |state| state["devices"][0]["total"] = json!(0),
    ];
    for say in says {
        counts_against_the_host(say);
    }
}

fn counts_against_the_host(say: fn(&mut Value)) {
    let mut driver = FakeDriver::new(1);
    driver.set(say);
    let holder = driver.holder(&uuid(0), GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    let reading = bench.reading("the worker", |r| r.workers.contains_key(&a));
    let device = &reading.devices[0];
    assert!(device.unified);
    assert_eq!((device.total, device.used), (None, None));
    let usage = &reading.workers[&a];
    assert_eq!(usage.vram, [told(0, GIB, BY_PID)]);
    assert_eq!(usage.unified, Bytes(GIB));
    assert_eq!(usage.resident(), usage.rss + Bytes(GIB));
}

#[test]
fn a18_mig_instances_are_places_of_their_own_even_when_the_parent_tells_nothing() {
    let mut driver = FakeDriver::new(2);
    driver.set(|state| {
        state["devices"][0]["memory"] = json!(4);
        state["devices"][0]["mig"] = json!([
            {"uuid": "MIG-fake-a", "name": "", "total": 5 * GIB},
            {"uuid": "MIG-fake-b", "name": "", "total": 10 * GIB, "baseline": GIB},
        ]);
    });
    let holder = driver.holder("MIG-fake-b", 2 * GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[1]);
    assert_eq!(bench.vram(&a), [told(1, 2 * GIB, BY_PID)]);
    let reading = bench.reading("three places", |r| r.devices.len() == 3);
    let places: Vec<_> = reading
        .devices
        .iter()
        .map(|d| (d.uuid.as_str(), d.used))
        .collect();
    assert_eq!(
        places,
        [
            ("MIG-fake-a", Some(Bytes(0))),
            ("MIG-fake-b", Some(Bytes(3 * GIB))),
            (uuid(1).as_str(), Some(Bytes(0))),
        ]
    );
    assert_eq!(reading.device_error, None);
}

#[test]
fn a18_a_lost_gpu_is_told_and_the_others_are_still_right() {
    let bench_driver = FakeDriver::new(2);
    let holder = bench_driver.holder(&uuid(1), GIB);
    let mut bench = Bench::new(bench_driver);
    let a = bench.follow("a", &holder, &[1]);
    bench
        .driver
        .set(|state| state["devices"][0]["error"] = json!(15));
    let reading = bench.reading("the loss", |r| r.device_error.is_some());
    let error = reading.device_error.clone().expect("just seen");
    assert!(error.contains("gpu:0"), "{error}");
    assert_eq!(reading.devices[0].used, None);
    assert_eq!(reading.devices[0].uuid, uuid(0), "it is still known");
    assert_eq!(reading.devices[1].used, Some(Bytes(GIB)));
    assert_eq!(reading.workers[&a].vram, [told(1, GIB, BY_PID)]);
    bench
        .driver
        .set(|state| state["devices"][0]["error"] = json!(0));
    bench.reading("the return", |r| {
        r.device_error.is_none() && r.devices[0].used.is_some()
    });
}

#[test]
fn a18_a_call_that_hangs_stalls_nothing_and_is_told() {
    let driver = FakeDriver::new(1);
    let holder = driver.holder(&uuid(0), GIB);
    let mut bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
    bench.driver.set(|state| state["hang_ms"] = json!(60_000));
    let since = now();
    let reading = bench.reading("the hang", |r| r.device_error.is_some());
    let error = reading.device_error.clone().expect("just seen");
    assert!(error.contains("has not answered for"), "{error}");
    // The last figures stay, and host memory is measured all the while.
    assert_eq!(reading.devices[0].used, Some(Bytes(GIB)));
    assert_eq!(reading.workers[&a].vram, [told(0, GIB, BY_PID)]);
    let seq = reading.seq;
    let later = bench.reading("more readings", |r| r.seq > seq + 5);
    assert!(later.device_error.is_some(), "it still hangs");
    assert!(since.elapsed() < Duration::from_secs(30), "it waited");
    bench.driver.set(|state| state["hang_ms"] = json!(0));
    bench.reading("the return", |r| r.device_error.is_none());
}

#[test]
fn a18_a_list_that_grows_while_it_is_asked_for_is_asked_for_again() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| state["grow"] = json!(1));
    let holder = driver.holder(&uuid(0), GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
    let reading = bench.reading("a good list", |_| true);
    assert_eq!(reading.device_error, None);
}

#[test]
fn a18_memory_that_comes_back_late_stays_in_use_until_it_does() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| state["late_free_ms"] = json!(1500));
    let mut holder = driver.holder(&uuid(0), GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
    holder.end();
    let since = now();
    let gone = bench.reading("the process is gone", |r| r.workers[&a].processes == 0);
    assert_eq!(gone.devices[0].used, Some(Bytes(GIB)));
    bench.reading("the memory is back", |r| {
        r.devices[0].used == Some(Bytes(0))
    });
    assert!(since.elapsed() >= Duration::from_millis(1400));
}

#[test]
fn a18_a_library_without_a_driver_is_a_machine_without_gpus() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| state["init"] = json!(9));
    let bench = Bench::new(driver);
    let reading = bench.reading("a reading", |_| true);
    assert!(reading.devices.is_empty(), "{:?}", bench.settings);
    assert_eq!(reading.device_error, None);
}
