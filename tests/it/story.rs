//! The main job with real worker processes: load on request, evict the least
//! recently used, respawn, measure, explain.

use std::time::Duration;

use serde_json::Value;

use crate::support::residentd::STUB;
use crate::support::{Residentd, pause, processes_with, runs, wait_until};

/// A model whose worker holds `mib` of anonymous memory and declares as much.
fn model(name: &str, mib: u64, more: &str) -> String {
    format!(
        "[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--name\", \"{name}\", \"--anon\", \"{mib}MiB\"]\nmemory = \"{}MiB\"\n{more}\n",
        mib + 16
    )
}

#[test]
fn a02_the_least_recently_used_worker_goes_and_comes_back_when_it_is_asked_again() {
    let config = format!(
        "[memory]\nlimit = \"200MiB\"\nreserve = \"16MiB\"\n{}{}{}",
        model("red", 64, ""),
        model("green", 64, ""),
        model("blue", 64, "")
    );
    let residentd = Residentd::start(&config);
    let red = residentd.complete("red").worker_pid();
    let green = residentd.complete("green").worker_pid();
    assert!(runs(red) && runs(green));
    assert_eq!(
        residentd.complete("red").worker_pid(),
        red,
        "red is used again, so green is the oldest"
    );

    let blue = residentd.complete("blue").worker_pid();
    assert!(runs(red) && runs(blue));
    assert!(!runs(green), "green was the least recently used");
    let gone = residentd.model("green");
    assert_eq!(gone["loaded"], false);
    assert_eq!(gone["pid"], Value::Null);
    assert_eq!(gone["memory_usage"], 0);
    assert_eq!(gone["evictions"], 1);
    assert_eq!(gone["last_eviction"]["reason"], "make_room");
    assert!(
        residentd.memory("stats")["total_memory_usage"]
            .as_u64()
            .expect("a number")
            <= 200 << 20
    );

    let again = residentd.complete("green").worker_pid();
    assert_ne!(again, green);
    assert!(!runs(red), "now red was the oldest");
    let stats = residentd.memory("stats");
    assert_eq!(stats["evictions_total"], 2);
    assert_eq!(stats["loaded_models"], 2);
    assert_eq!(residentd.model("green")["loads"], 2);
    assert!(residentd.stop().success());
}

#[test]
fn a10_reported_usage_is_what_the_workers_hold_and_a_file_mapped_by_two_counts_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = folder.path().join("weights.bin");
    std::fs::write(&weights, vec![7_u8; 96 << 20]).expect("the file can be written");
    let map = format!("\"--map\", {weights:?}");
    let mapped = |name: &str| {
        format!(
            "[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--name\", \"{name}\", {map}, \"--anon\", \"32MiB\"]\nmemory = \"160MiB\"\n"
        )
    };
    let config = format!(
        "[memory]\nlimit = \"1GiB\"\nreserve = \"16MiB\"\n{}{}{}",
        model("anon", 128, ""),
        mapped("one"),
        mapped("two")
    );
    let residentd = Residentd::start(&config);
    for name in ["anon", "one", "two"] {
        assert_eq!(residentd.complete(name).status, 200);
    }
    // What a stub without anything holds: program, libraries, stacks.
    let own = |name: &str| {
        let model = residentd.model(name);
        let pid = model["pid"].as_i64().expect("it is loaded");
        let status =
            std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker lives");
        let field = |key: &str| -> u64 {
            let line = status
                .lines()
                .find(|line| line.starts_with(key))
                .expect("a known field");
            line.split_whitespace()
                .nth(1)
                .and_then(|n| n.parse().ok())
                .expect("kB")
        };
        field("VmRSS:") * 1024
    };
    let slack = |bytes: u64| (bytes / 50).max(16 << 20);
    let check = |what: &str, reported: u64, truth: u64| {
        let off = reported.abs_diff(truth);
        assert!(
            off <= slack(truth),
            "{what}: reported {reported}, truth {truth}, off by {off}"
        );
    };
    wait_until("readings that hold all three", || {
        let held = |name| residentd.model(name)["memory_usage"].as_u64();
        let all = ["anon", "one", "two"].map(|name| held(name) > Some(120 << 20));
        (all == [true; 3]).then_some(())
    });
    for (name, held) in [
        ("anon", 128_u64 << 20),
        ("one", 128 << 20),
        ("two", 128 << 20),
    ] {
        let reported = residentd.model(name)["memory_usage"]
            .as_u64()
            .expect("a number");
        check(name, reported, held);
        check(name, reported, own(name));
    }
    // Summed, the file counts once: 128 anonymous, twice 32, and 96 mapped.
    let total = wait_until("the shared file to be counted once", || {
        let total = residentd.memory("stats")["total_memory_usage"].as_u64()?;
        (total < 340 << 20).then_some(total)
    });
    check("the sum", total, (128 + 32 + 32 + 96) << 20);
}

#[test]
fn a13_a_model_that_can_never_fit_is_refused_with_both_numbers_and_evicts_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = folder.path().join("huge.gguf");
    // Sparse: only its size matters, which is what a first load is judged by.
    let file = std::fs::File::create(&weights).expect("the file can be made");
    file.set_len(400 << 20).expect("the file can be extended");
    let config = format!(
        "[memory]\nlimit = \"128MiB\"\nreserve = \"16MiB\"\n{}[models.huge]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\"]\nweights = [{weights:?}]\n",
        model("small", 32, ""),
    );
    let residentd = Residentd::start(&config);
    let small = residentd.complete("small").worker_pid();
    let answer = residentd.complete("huge");
    assert_eq!(answer.status, 503, "{}", answer.text());
    let error = &answer.json()["error"];
    assert_eq!(error["code"], "model_too_large");
    let message = error["message"].as_str().expect("a message");
    assert!(
        message.contains("482.00 MiB") && message.contains("128.00 MiB"),
        "{message}"
    );
    assert!(runs(small));
    assert_eq!(residentd.memory("stats")["evictions_total"], 0);
}

#[test]
fn a14_the_smallest_coldest_set_that_covers_the_shortfall_goes() {
    let config = format!(
        "[memory]\nlimit = \"320MiB\"\nreserve = \"16MiB\"\n{}{}{}{}",
        model("tiny", 16, ""),
        model("large", 128, ""),
        model("warm", 48, ""),
        model("wanted", 128, "")
    );
    let residentd = Residentd::start(&config);
    let tiny = residentd.complete("tiny").worker_pid();
    let large = residentd.complete("large").worker_pid();
    let warm = residentd.complete("warm").worker_pid();
    residentd.complete("wanted");
    assert!(!runs(large), "large alone covers the shortfall");
    assert!(runs(tiny), "tiny is older, but nobody needs its bytes");
    assert!(runs(warm));
}

#[test]
fn a17_two_cold_models_racing_for_the_last_room_never_overcommit() {
    let config = format!(
        "[memory]\nlimit = \"150MiB\"\nreserve = \"16MiB\"\n{}{}",
        model("left", 96, ""),
        model("right", 96, "")
    );
    let residentd = Residentd::start(&config);
    std::thread::scope(|scope| {
        let ask = |name: &'static str| {
            let residentd = &residentd;
            scope.spawn(move || residentd.complete(name))
        };
        let asked = [ask("left"), ask("right"), ask("left"), ask("right")];
        let highest = scope.spawn(|| {
            let mut highest = 0;
            for _ in 0..100 {
                let live = processes_with("stub-worker").len();
                let usage = residentd.memory("stats")["total_memory_usage"]
                    .as_u64()
                    .expect("a number");
                highest = highest.max(usage);
                pause(Duration::from_millis(5));
                assert!(live < 50);
            }
            highest
        });
        for answer in asked {
            let answer = answer.join().expect("no panic");
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        assert!(highest.join().expect("no panic") <= 150 << 20);
    });
}

#[test]
fn an_operator_loads_pins_limits_cleans_up_and_reads_logs() {
    let config = format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n{}{}",
        model("red", 64, ""),
        model("green", 64, "")
    );
    let residentd = Residentd::start(&config);
    for name in ["red", "green"] {
        let answer = residentd.ask("POST", &format!("/api/v1/models/{name}/load"), None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(residentd.model(name)["phase"], "ready");
    }
    assert_eq!(
        residentd.ask("POST", "/api/v1/models/red/pin", None).status,
        200
    );
    let cleaned = residentd
        .ask("POST", "/api/v1/memory/cleanup?all=true", None)
        .json();
    let data = &cleaned["data"];
    assert_eq!(data["unloaded_models"], serde_json::json!(["green"]));
    let freed = data["freed_bytes"].as_u64().expect("a number");
    assert!((60 << 20..110 << 20).contains(&freed), "{cleaned}");
    assert_eq!(data["skipped"][0]["why"], "pinned");
    assert_eq!(residentd.model("green")["phase"], "stopped");

    residentd.ask("POST", "/api/v1/models/red/unpin", None);
    let limit = residentd.ask("POST", "/api/v1/memory/limit?limit_gb=0.03", None);
    assert_eq!(limit.status, 200, "{}", limit.text());
    residentd.wait_for_phase("red", "stopped");
    let logs = residentd.ask("GET", "/api/v1/models/red/logs", None);
    assert_eq!(logs.status, 200);
    assert!(!logs.body.is_empty());
    let metrics = residentd.ask("GET", "/metrics", None).text();
    assert!(metrics.contains("residentd_evictions_total"), "{metrics}");
}

#[test]
fn a_model_idle_for_its_timeout_is_unloaded() {
    let config = format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n{}",
        model("red", 16, "idle_timeout = \"300ms\"\n")
    );
    let residentd = Residentd::start(&config);
    let pid = residentd.complete("red").worker_pid();
    let model = residentd.wait_for_phase("red", "stopped");
    assert_eq!(model["last_eviction"]["reason"], "idle");
    assert!(!runs(pid));
}

/// Two idle models and one that grows over the limit by what it is asked.
fn one_that_grows() -> String {
    format!(
        "[memory]\nlimit = \"200MiB\"\nreserve = \"16MiB\"\n{}{}[models.grows]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--grow\", \"24MiB\"]\nmemory = \"40MiB\"\n",
        model("old", 40, ""),
        model("young", 40, ""),
    )
}

fn grow_over_the_limit(residentd: &Residentd) {
    for name in ["old", "young"] {
        assert_eq!(residentd.complete(name).status, 200);
    }
    for _ in 0..5 {
        assert_eq!(residentd.complete("grows").status, 200);
    }
}

#[test]
fn a_worker_that_grows_over_the_limit_makes_the_oldest_idle_one_go() {
    let residentd = Residentd::start(&one_that_grows());
    grow_over_the_limit(&residentd);
    let old = residentd.wait_for_phase("old", "stopped");
    assert_eq!(old["last_eviction"]["reason"], "pressure");
    assert_eq!(residentd.model("young")["phase"], "ready", "one was enough");
    wait_until("the pressure to be over", || {
        let pressure = residentd.memory("pressure");
        (pressure["memory_pressure"] == false).then_some(())
    });
}

#[test]
fn without_auto_cleanup_pressure_is_only_told() {
    let environment = [("AUTO_CLEANUP_ENABLED", "false")];
    let residentd = Residentd::start_with(&one_that_grows(), &environment);
    grow_over_the_limit(&residentd);
    let pressure = wait_until("the pressure to be seen", || {
        let pressure = residentd.memory("pressure");
        (pressure["memory_pressure"] == true).then_some(pressure)
    });
    assert_eq!(pressure["recommended_cleanup"][0], "old", "{pressure}");
    assert_eq!(residentd.model("old")["phase"], "ready");
    assert_eq!(residentd.memory("stats")["evictions_total"], 0);
}

#[test]
fn the_proportional_share_of_a_worker_is_read_when_it_is_asked_for() {
    let residentd = Residentd::start(&model("a", 64, ""));
    residentd.complete("a");
    let ask = || {
        let answer = residentd.ask("GET", "/api/v1/models/a?pss=true", None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let memory = answer.json()["data"]["memory"].clone();
        let bytes = memory["pss"].as_u64().expect("it was read");
        (bytes, memory["pss_at"].as_f64().expect("a time"))
    };
    let (bytes, first) = ask();
    assert!((64 << 20..80 << 20).contains(&bytes), "{bytes}");
    let (_, second) = ask();
    assert!(second > first, "it is read anew each time");
}
