//! On a real NVIDIA GPU: run by `make gpu`, on a machine that has one and does
//! nothing else with it. Prints the figures.

#[path = "../it/support/mod.rs"]
#[expect(dead_code, reason = "shared with the integration tests")]
mod support;

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::residentd::command;
use support::{Residentd, kill, now, runs, wait_until};

const GIB: u64 = 1 << 30;
/// CUDA's context is of this class; on big GPUs it is larger.
const CONTEXT: u64 = GIB;

fn model(name: &str, gib: u64) -> String {
    let worker = Path::new(env!("CARGO_MANIFEST_DIR")).join("workers/cuda/cuda_worker.py");
    format!(
        "[models.{name}]\ncommand = [\"python3\", {worker:?}, \"--port\", \"${{PORT}}\", \"--bytes\", \"{}\"]\nmemory = \"1GiB\"\nvram = \"{}GiB\"\ngpus = 1\n",
        gib * GIB,
        gib + 1,
    )
}

fn config(more: &str, models: &[String]) -> String {
    format!("[memory]\nlimit = \"8GiB\"\n{more}\n{}", models.concat())
}

fn load(residentd: &Residentd, name: &str) {
    let answer = residentd.ask("POST", &format!("/api/v1/models/{name}/load"), None);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn device(residentd: &Residentd) -> Value {
    let device = residentd.memory("system")["devices"][0].clone();
    assert!(device.is_object(), "no NVIDIA GPU here: {device}");
    device
}

fn used(residentd: &Residentd) -> u64 {
    device(residentd)["used"]
        .as_u64()
        .expect("the driver tells")
}

/// Waits for a measured figure by process and returns it.
fn measured(residentd: &Residentd, name: &str) -> u64 {
    wait_until("the worker's memory to be told by process", || {
        let vram = residentd.model(name)["vram"][0].clone();
        (vram["source"] == "nvml_pid").then(|| vram["bytes"].as_u64())?
    })
}

#[test]
fn vram_of_a_cuda_worker_is_within_two_percent_and_comes_back_after_a_kill() {
    let residentd = Residentd::start(&config("", &[model("a", 4)]));
    let before = used(&residentd);
    load(&residentd, "a");
    let told = measured(&residentd, "a");
    let grown = wait_until("the device to show it", || {
        let grown = used(&residentd).saturating_sub(before);
        (grown >= 4 * GIB).then_some(grown)
    });
    println!(
        "FIGURE vram told={told} device_grew={grown} held={}",
        4 * GIB
    );
    assert!((4 * GIB..4 * GIB + CONTEXT).contains(&told), "{told}");
    assert!(
        told.abs_diff(grown) <= grown / 50,
        "told {told}, grew {grown}"
    );

    let pid = residentd.worker_pid("a").expect("it is loaded");
    let killed = now();
    kill(pid, Signal::SIGKILL);
    wait_until("the process to be gone", || (!runs(pid)).then_some(()));
    let gone = killed.elapsed();
    wait_until("its memory to be back", || {
        (used(&residentd) <= before + GIB / 4).then_some(())
    });
    println!(
        "FIGURE release process_gone_ms={} memory_back_ms={}",
        gone.as_millis(),
        killed.elapsed().as_millis()
    );
}

#[test]
fn the_next_worker_starts_when_the_memory_of_the_last_one_is_back() {
    let models = [model("a", 6), model("b", 6)];
    let residentd = Residentd::start(&config("[gpus.0]\nlimit = \"10GiB\"", &models));
    load(&residentd, "a");
    let a = residentd.worker_pid("a").expect("it is loaded");
    let asked = now();
    let answer = residentd.ask("GET", "/upstream/b/", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    println!("FIGURE swap ms={}", asked.elapsed().as_millis());
    assert!(!runs(a));
    assert_eq!(residentd.eviction("a"), "make_room");
    let uuid = device(&residentd)["uuid"].clone();
    assert_eq!(answer.json()["devices"], uuid);
    assert!(measured(&residentd, "b") < 6 * GIB + CONTEXT);
}

#[test]
fn in_a_pid_namespace_the_figure_is_right_whoever_tells_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("residentd.toml");
    let state = folder.path().join("state");
    let head = format!("[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\n");
    std::fs::write(&file, head + &config("", &[model("a", 4)])).expect("written");
    let inner = command(&file, &[]);
    let mut outer = Command::new("unshare");
    outer
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(inner.get_program())
        .args(inner.get_args());
    let residentd = Residentd::launch(folder, outer);
    load(&residentd, "a");
    // By pid with a driver that translates, else by the device's difference.
    let vram = wait_until("a figure", || {
        let vram = residentd.model("a")["vram"][0].clone();
        vram["bytes"].is_u64().then_some(vram)
    });
    println!(
        "FIGURE namespace source={} bytes={}",
        vram["source"], vram["bytes"]
    );
    let bytes = vram["bytes"].as_u64().expect("just seen");
    assert!((4 * GIB..4 * GIB + CONTEXT).contains(&bytes), "{vram}");
}
