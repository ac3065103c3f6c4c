//! Models on GPUs through the whole program: placed, measured, evicted, and the
//! next one started when the memory is measured to be back.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::gpu::{FakeDriver, GIB, uuid};
use crate::support::residentd::STUB;
use crate::support::{Residentd, now, runs, wait_until};

/// A model whose worker holds so many GiB of each GPU it is shown.
fn model(driver: &FakeDriver, name: &str, gib: u64, gpus: &str, more: &str) -> String {
    let folder = driver.folder();
    format!(
        "[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--name\", \"{name}\", \
         \"--vram\", \"{gib}GiB\", \"--vram-dir\", {folder:?}]\n\
         memory = \"32MiB\"\ngpus = {gpus}\n{more}\n"
    )
}

/// The same, of which nothing is known before it is loaded.
fn unknown(driver: &FakeDriver, name: &str, gib: u64, gpus: &str) -> String {
    model(driver, name, gib, gpus, "")
}

fn start(driver: &FakeDriver, models: &[String]) -> Residentd {
    let library = driver.library();
    let head =
        format!("[memory]\nlimit = \"1GiB\"\nreserve = \"16MiB\"\nnvml_library = {library:?}\n");
    Residentd::start(&(head + &models.concat()))
}

fn declared(gib: u64) -> String {
    format!("vram = \"{gib}GiB\"")
}

/// Returns what the worker was shown of GPUs.
fn shown(residentd: &Residentd, model: &str) -> String {
    let answer = residentd.ask("GET", &format!("/upstream/{model}/env"), None);
    let shown = &answer.json()["env"]["CUDA_VISIBLE_DEVICES"];
    shown.as_str().unwrap_or_default().to_owned()
}

fn device(residentd: &Residentd, index: usize) -> Value {
    residentd.memory("system")["devices"][index].clone()
}

#[test]
fn a_model_goes_to_the_gpu_that_fits_and_the_least_recently_used_makes_room() {
    let driver = FakeDriver::new(2);
    let models = [
        model(&driver, "red", 10, "1", &declared(10)),
        model(&driver, "green", 10, "\"any\"", &declared(10)),
        model(&driver, "blue", 10, "1", &declared(10)),
        model(&driver, "wide", 8, "2", &declared(8)),
    ];
    let residentd = start(&driver, &models);
    let red = residentd.complete("red").worker_pid();
    let green = residentd.complete("green").worker_pid();
    assert_eq!(shown(&residentd, "red"), uuid(0));
    assert_eq!(shown(&residentd, "green"), uuid(1));
    let vram = &residentd.model("red")["vram"];
    assert_eq!(
        vram,
        &json!([{"device": "gpu:0", "bytes": 10 * GIB, "source": "nvml_pid", "tainted": false}])
    );
    assert_eq!(device(&residentd, 0)["charged"], 10 * GIB);
    assert_eq!(device(&residentd, 0)["unattributed"], 0);

    residentd.complete("red");
    residentd.complete("blue");
    assert!(!runs(green), "green was the least recently used");
    assert!(runs(red));
    assert_eq!(shown(&residentd, "blue"), uuid(1));
    assert_eq!(residentd.eviction("green"), "make_room");

    // Both at once for the model that needs both.
    assert_eq!(residentd.complete("wide").status, 200);
    assert_eq!(
        shown(&residentd, "wide"),
        format!("{},{}", uuid(0), uuid(1))
    );
    assert!(!runs(red));
    assert!(residentd.stop().success());
}

#[test]
fn a16_vram_that_comes_back_late_holds_up_its_own_gpu_and_nothing_else() {
    let mut driver = FakeDriver::new(2);
    // Long beside all that a busy machine may take for the others.
    driver.set(|state| state["late_free_ms"] = json!(3000));
    let models = [
        model(&driver, "old", 12, "[0]", &declared(12)),
        model(&driver, "new", 12, "[0]", &declared(12)),
        model(&driver, "other", 12, "[1]", &declared(12)),
        model(&driver, "host", 0, "\"none\"", ""),
    ];
    let residentd = start(&driver, &models);
    let old = residentd.complete("old").worker_pid();
    std::thread::scope(|scope| {
        let new = scope.spawn(|| {
            let answer = residentd.complete("new");
            (answer, now())
        });
        wait_until("old to be gone", || (!runs(old)).then_some(()));
        let gone = now();
        for model in ["other", "host"] {
            assert_eq!(residentd.complete(model).status, 200);
        }
        assert!(!new.is_finished(), "its GPU was given back too early");
        let (answer, answered) = new.join().expect("the request ends");
        assert_eq!(answer.status, 200);
        let waited = answered - gone;
        assert!(waited >= Duration::from_millis(1500), "{waited:?}");
    });
    let missing = residentd.ask("GET", "/metrics", None).text();
    assert!(missing.contains("residentd_reclaim_shortfall_bytes_total 0"));
}

#[test]
fn a16_a_victim_that_is_slow_to_die_holds_up_its_own_gpu_and_nothing_else() {
    let driver = FakeDriver::new(2);
    let slow = format!("{}\nstop_timeout = \"2s\"", declared(12));
    let models = [
        model(&driver, "slow", 12, "[0]", &slow)
            .replace("\"--vram\"", "\"--ignore-term\", \"--vram\""),
        model(&driver, "new", 12, "[0]", &declared(12)),
        model(&driver, "other", 12, "[1]", &declared(12)),
        model(&driver, "host", 0, "\"none\"", ""),
    ];
    let residentd = start(&driver, &models);
    let slow = residentd.complete("slow").worker_pid();
    std::thread::scope(|scope| {
        let new = scope.spawn(|| residentd.complete("new"));
        residentd.wait_for_phase("slow", "stopping");
        for model in ["other", "host"] {
            assert_eq!(residentd.complete(model).status, 200);
        }
        assert!(runs(slow), "it is still dying");
        assert_eq!(residentd.model("new")["phase"], "stopped");
        assert_eq!(new.join().expect("the request ends").status, 200);
    });
    assert!(!runs(slow));
}

#[test]
fn a12_the_second_load_expects_what_the_first_used_of_a_gpu_also_after_a_restart() {
    let driver = FakeDriver::new(1);
    let models = [
        unknown(&driver, "a", 3, "1"),
        unknown(&driver, "big", 20, "1").replace("--vram\", \"20GiB", "--vram\", \"15GiB"),
    ];
    let mut residentd = start(&driver, &models);
    let expected = |residentd: &Residentd, model: &str| residentd.model(model)["expected"].clone();
    assert_eq!(expected(&residentd, "a")["sources"]["gpu:0"], "unknown");
    residentd.complete("a");
    // Loading, it had the whole GPU; from then on what it was measured to use.
    wait_until("the charge to be what is measured", || {
        (device(&residentd, 0)["charged"] == 3 * GIB).then_some(())
    });
    residentd.complete("big");
    residentd.restart_after(nix::sys::signal::Signal::SIGTERM);
    let expected = expected(&residentd, "a");
    assert_eq!(expected["bytes"]["gpu:0"], 3 * GIB);
    assert_eq!(expected["sources"]["gpu:0"], "learned");
}

#[test]
fn a_worker_reports_its_own_memory_where_nobody_else_tells() {
    let mut driver = FakeDriver::new(1);
    driver.set(|state| {
        state["devices"][0]["memory"] = json!(3);
        state["rows"] = json!("none");
    });
    let reporting = model(&driver, "a", 1, "1", &declared(1))
        .replace("\"--vram\"", "\"--report\", \"gpu:0 12345678\", \"--vram\"");
    let residentd = start(&driver, &[reporting]);
    assert_eq!(residentd.complete("a").status, 200);
    let vram = wait_until("a reading after the load", || {
        let vram = residentd.model("a")["vram"][0].clone();
        (vram["source"] == "worker_report").then_some(vram)
    });
    assert_eq!(vram["bytes"], 12_345_678);
    let reports = residentd.folder().join("state/reports");
    assert!(residentd.stop().success());
    let left = std::fs::read_dir(reports).map_or(0, Iterator::count);
    assert_eq!(left, 0, "a report outlives its worker");
}

#[test]
fn a_gpu_that_is_not_there_and_one_that_is_too_small_are_told_and_cost_nobody() {
    let driver = FakeDriver::new(1);
    let models = [
        model(&driver, "idle", 4, "1", &declared(4)),
        model(&driver, "huge", 20, "1", &declared(20)),
        model(&driver, "wide", 1, "2", &declared(1)),
    ];
    let residentd = start(&driver, &models);
    let idle = residentd.complete("idle").worker_pid();
    let refused = |model: &str| {
        let answer = residentd.complete(model);
        assert_eq!(answer.status, 503);
        let error = answer.json()["error"].clone();
        (error["code"].clone(), error["message"].to_string())
    };
    let (code, message) = refused("huge");
    assert_eq!(code, "model_too_large");
    assert!(message.contains("20.00 GiB on gpu:0"), "{message}");
    let (code, message) = refused("wide");
    assert_eq!(code, "no_device");
    assert!(message.contains("wants 2 GPU(s)"), "{message}");
    assert!(runs(idle));
}

#[test]
fn a_limit_on_a_gpu_evicts_there_and_holds() {
    let driver = FakeDriver::new(1);
    let models = [model(&driver, "a", 10, "1", &declared(10))];
    let residentd = start(&driver, &models);
    let worker = residentd.complete("a").worker_pid();
    let path = "/api/v1/memory/limit?limit_gb=8&device=gpu:0";
    let answer = residentd.ask("POST", path, None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    wait_until("the worker to go", || (!runs(worker)).then_some(()));
    assert_eq!(residentd.eviction("a"), "pressure");
    let answer = residentd.complete("a");
    assert_eq!(answer.json()["error"]["code"], "model_too_large");
}
