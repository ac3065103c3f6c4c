//! A18: a driver that has lost a GPU, hangs, may not tell, or is not there.

use std::time::Duration;

use residentd::clock::Clock;
use residentd::memory::{MemorySource, Sampler, SamplerSettings, VramSource};
use residentd::model::Bytes;
use serde_json::json;

use super::ladder::{BY_DELTA, BY_PID, Bench, told};
use crate::support::gpu::{FakeDriver, GIB, uuid};
use crate::support::now;

/// The driver's code for a GPU that fell off the bus.
const LOST: i32 = 15;

#[test]
fn a18_a_gpu_that_was_lost_before_the_start_takes_no_number_from_the_others() {
    let mut driver = FakeDriver::new(2);
    driver.set(|state| state["devices"][0]["error"] = json!(LOST));
    let holder = driver.holder(&uuid(1), GIB);
    let mut bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[1]);
    assert_eq!(bench.vram(&a), [told(1, GIB, BY_PID)]);
    let reading = bench.reading("the loss", |r| r.device_error.is_some());
    let error = reading.device_error.clone().expect("just seen");
    assert!(error.contains("gpu:0"), "{error}");
    let used: Vec<_> = reading.devices.iter().map(|d| d.used).collect();
    assert_eq!(used, [None, Some(Bytes(GIB))]);

    bench
        .driver
        .set(|state| state["devices"][0]["error"] = json!(0));
    let back = bench.reading("the return", |r| r.device_error.is_none());
    assert_eq!(back.devices[0].uuid, uuid(0));
    assert_eq!(back.devices[0].free, Some(Bytes(16 * GIB)));
}

#[test]
fn a18_instances_of_a_lost_gpu_keep_their_numbers() {
    let mut driver = FakeDriver::new(2);
    driver.set(|state| {
        state["devices"][0]["mig"] = json!([
            {"uuid": "MIG-fake-a", "name": "", "total": 5 * GIB},
            {"uuid": "MIG-fake-b", "name": "", "total": 10 * GIB},
        ]);
    });
    let holder = driver.holder(&uuid(1), GIB);
    let mut bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[2]);
    bench.reading("three places", |r| r.devices.len() == 3);
    bench
        .driver
        .set(|state| state["devices"][0]["error"] = json!(LOST));
    bench.reading("the loss", |r| r.device_error.is_some());
    // Handles are asked for again after each error.
    let reading = bench.reading("a reading after that", |_| true);
    let places: Vec<_> = reading
        .devices
        .iter()
        .map(|d| (d.uuid.as_str(), d.used))
        .collect();
    assert_eq!(
        places,
        [
            ("MIG-fake-a", None),
            ("MIG-fake-b", None),
            (uuid(1).as_str(), Some(Bytes(GIB))),
        ]
    );
    assert_eq!(reading.workers[&a].vram, [told(2, GIB, BY_PID)]);
}

#[test]
fn a18_what_a_worker_holds_of_a_lost_gpu_is_unknown_and_not_nothing() {
    let driver = FakeDriver::new(1);
    let holder = driver.holder(&uuid(0), GIB);
    let mut bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
    bench.sampler.loaded(&a);
    bench
        .driver
        .set(|state| state["devices"][0]["error"] = json!(LOST));
    bench.reading("the loss", |r| r.device_error.is_some());
    // It is no less unknown after many errors.
    for _ in 0..5 {
        let vram = bench.vram(&a);
        assert_eq!(vram.len(), 1, "{vram:?}");
        assert_eq!((vram[0].bytes, vram[0].source), (None, VramSource::Unknown));
    }
    bench
        .driver
        .set(|state| state["devices"][0]["error"] = json!(0));
    bench.reading("the return", |r| {
        r.workers[&a].vram == [told(0, GIB, BY_PID)]
    });
}

#[test]
fn a18_a_list_that_never_stops_growing_is_told_and_nobody_on_it_holds_nothing() {
    let driver = FakeDriver::new(1);
    let holder = driver.holder(&uuid(0), GIB);
    let mut bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
    bench.sampler.loaded(&a);
    bench.driver.set(|state| state["grow"] = json!(u32::MAX));
    let reading = bench.reading("the list that fails", |r| r.device_error.is_some());
    let error = reading.device_error.clone().expect("just seen");
    assert!(error.contains("gpu:0"), "{error}");
    assert_eq!(reading.devices[0].used, Some(Bytes(GIB)));
    // The next rung: what the device uses more than before.
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_DELTA)]);
    bench.driver.set(|state| state["grow"] = json!(0));
    bench.reading("the return", |r| {
        r.device_error.is_none() && r.workers[&a].vram == [told(0, GIB, BY_PID)]
    });
}

#[test]
fn a18_instances_are_found_although_their_gpu_tells_us_nothing_at_all() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| {
        let gpu = &mut state["devices"][0];
        (gpu["memory"], gpu["mig_mode"]) = (json!(4), json!(4));
        gpu["mig"] = json!([{"uuid": "MIG-fake-a", "name": "", "total": 5 * GIB}]);
    });
    let holder = driver.holder("MIG-fake-a", GIB);
    let bench = Bench::new(driver);
    let a = bench.follow("a", &holder, &[0]);
    assert_eq!(bench.vram(&a), [told(0, GIB, BY_PID)]);
    let reading = bench.reading("the instance", |_| true);
    let places: Vec<_> = reading
        .devices
        .iter()
        .map(|d| (d.uuid.as_str(), d.free))
        .collect();
    assert_eq!(places, [("MIG-fake-a", Some(Bytes(4 * GIB)))]);
    assert_eq!(reading.device_error, None);
}

#[test]
fn a18_a_driver_that_hangs_while_it_opens_is_found_when_it_has() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| state["init_hang_ms"] = json!(60_000));
    let mut bench = Bench::new(driver);
    let reading = bench.reading("a reading without a driver", |_| true);
    assert!(reading.devices.is_empty() && reading.host.total > Bytes::ZERO);
    let error = reading.device_error.clone().expect("it is told");
    assert!(error.contains("has not answered for"), "{error}");
    bench.driver.set(|state| state["init_hang_ms"] = json!(0));
    bench.reading("the driver", |r| {
        r.device_error.is_none() && r.devices.len() == 1
    });
}

#[test]
fn a18_a_driver_that_hangs_does_not_keep_the_sampler() {
    let mut bench = Bench::new(FakeDriver::new(1));
    bench.driver.set(|state| state["hang_ms"] = json!(60_000));
    bench.reading("the hang", |r| r.device_error.is_some());
    let since = now();
    drop(bench);
    assert!(since.elapsed() < Duration::from_secs(5), "it waited");
}

#[test]
fn a18_without_a_driver_there_are_no_gpus_and_nothing_is_wrong() {
    let settings = SamplerSettings {
        nvml_library: Some("/nonexistent/libnvidia-ml.so.1".into()),
        ..SamplerSettings::default()
    };
    let sampler = Sampler::start(Clock::start(), settings);
    let reading = sampler.readings().borrow().clone();
    assert!(reading.devices.is_empty());
    assert_eq!(reading.device_error, None);
}
