//! A18: a driver that has lost a GPU, hangs, or is not there.

use residentd::model::Bytes;
use serde_json::json;

use super::ladder::{BY_PID, Bench, told};
use crate::support::gpu::{FakeDriver, GIB, uuid};

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
