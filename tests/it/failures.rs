//! What goes wrong, and what a client sees of it.

use std::io::Read;
use std::time::Duration;

use serde_json::json;

use crate::support::http::send;
use crate::support::residentd::STUB;
use crate::support::{Residentd, now, wait_until};

fn one(flags: &str, more: &str) -> String {
    format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m {flags}'\nmemory = \"32MiB\"\n{more}\n"
    )
}

#[test]
fn a34_a_client_that_leaves_while_its_model_loads_leaves_no_lease_and_unloads_nothing() {
    let residentd = Residentd::start(&one("--ready-after 500ms", ""));
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let stream =
        send(residentd.address(), "POST", "/v1/completions", Some(&body)).expect("a connection");
    residentd.wait_for_phase("m", "starting");
    drop(stream);
    let model = residentd.wait_for_phase("m", "ready");
    assert_eq!(
        (&model["in_flight"], &model["queued"]),
        (&json!(0), &json!(0))
    );
    let pid = residentd.worker_pid("m").expect("it is loaded");
    assert_eq!(
        residentd.complete("m").worker_pid(),
        pid,
        "the load was not wasted"
    );
    assert_eq!(residentd.model("m")["loads"], 1);
    assert_eq!(residentd.model("m")["access_count"], 1);
}

#[test]
fn a34_a_client_that_leaves_a_stream_gives_its_lease_back_and_the_worker_hears_of_it() {
    let residentd = Residentd::start(&one("", ""));
    residentd.complete("m");
    let body =
        json!({"model": "m", "prompt": "x", "stream": true, "x_chunks": 1000, "x_pace_ms": 20})
            .to_string();
    let mut stream =
        send(residentd.address(), "POST", "/v1/completions", Some(&body)).expect("a connection");
    let mut first = [0_u8; 64];
    assert!(stream.read(&mut first).expect("the stream begins") > 0);
    assert_eq!(residentd.model("m")["in_flight"], 1);
    drop(stream);
    wait_until("the lease to come back", || {
        (residentd.model("m")["in_flight"] == 0).then_some(())
    });
    wait_until("the worker to hear of it", || {
        let stats = residentd.ask("GET", "/upstream/m/stats", None).json();
        (stats["cancelled"] == 1).then_some(())
    });
}

#[test]
fn a35_two_hundred_requests_to_one_cold_model_are_all_answered_by_one_load() {
    let residentd = Residentd::start(&one("--ready-after 300ms", ""));
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..200)
            .map(|_| scope.spawn(|| residentd.complete("m")))
            .collect();
        for answer in asked {
            let answer = answer.join().expect("no panic");
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
    });
    let model = residentd.model("m");
    assert_eq!(
        (&model["loads"], &model["access_count"]),
        (&json!(1), &json!(200))
    );
}

#[test]
fn a35_over_the_queue_bound_a_request_is_turned_away_with_retry_after() {
    let residentd = Residentd::start(&one("--ready-after 1s", "max_queue = 2\n"));
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| residentd.complete("m")))
            .collect();
        let answers: Vec<_> = asked
            .into_iter()
            .map(|a| a.join().expect("no panic"))
            .collect();
        let full: Vec<_> = answers.iter().filter(|a| a.status == 429).collect();
        assert_eq!(answers.iter().filter(|a| a.status == 200).count(), 2);
        assert_eq!(full.len(), 4);
        for answer in full {
            assert_eq!(answer.json()["error"]["code"], "queue_full");
            assert!(answer.header("retry-after").is_some());
        }
    });
}

#[test]
fn a41_a_worker_that_dies_at_start_tells_its_reason_and_its_last_lines() {
    let residentd = Residentd::start(&one("--crash-on-start", ""));
    let start = now();
    let answer = residentd.complete("m");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "the exit is seen at once, not at a time-out"
    );
    assert_eq!(answer.status, 502, "{}", answer.text());
    let error = &answer.json()["error"];
    assert_eq!(error["code"], "worker_failed");
    assert!(answer.text().contains("out of cheese"), "{}", answer.text());
    let backing = residentd.complete("m");
    assert_eq!(backing.status, 503, "{}", backing.text());
    assert_eq!(backing.json()["error"]["code"], "backing_off");
    assert!(backing.header("retry-after").is_some());
}

#[test]
fn a41_a_killed_worker_is_noticed_at_once_and_the_next_request_starts_another() {
    let residentd = Residentd::start(&one("", ""));
    let first = residentd.complete("m").worker_pid();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(first).expect("a pid fits"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it lives");
    wait_until("the crash to be seen", || {
        (residentd.model("m")["loaded"] == false).then_some(())
    });
    assert_eq!(residentd.model("m")["restarts"], 1);
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_ne!(answer.worker_pid(), first);
}

#[test]
fn a_worker_that_is_never_ready_is_a_504_and_is_gone() {
    let residentd = Residentd::start(&one("--never-ready", "start_timeout = \"300ms\"\n"));
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 504, "{}", answer.text());
    assert_eq!(answer.json()["error"]["code"], "start_timeout");
    wait_until("its process to be gone", || {
        residentd.worker_pid("m").is_none().then_some(())
    });
}

#[test]
fn a_program_that_does_not_exist_is_named_in_the_answer() {
    let config = "[memory]\nlimit = \"400MiB\"\n[models.m]\ncommand = [\"no-such-engine\", \"--port\", \"${PORT}\"]\n";
    let residentd = Residentd::start(config);
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert!(
        answer.text().contains("no-such-engine"),
        "{}",
        answer.text()
    );
}

#[test]
fn a31_a_stream_whose_worker_dies_never_looks_complete() {
    let residentd = Residentd::start(&one("", ""));
    let body =
        json!({"model": "m", "prompt": "x", "stream": true, "x_chunks": 50, "x_pace_ms": 5, "x_exit_after": 5})
            .to_string();
    let answer = residentd.ask("POST", "/v1/completions", Some(&body));
    assert_eq!(answer.status, 200);
    assert!(!answer.complete, "{}", answer.text());
    assert!(!answer.text().contains("[DONE]"));
}

#[test]
fn unknown_models_bad_bodies_and_other_peoples_paths_are_clear_errors() {
    let config = one("", "[models.n]\ncommand = [\"true\", \"${PORT}\"]\n");
    let residentd = Residentd::start(&config);
    let answer = residentd.complete("nobody");
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (404, Some("model_not_found"))
    );
    let answer = residentd.ask("POST", "/v1/completions", Some("{\"model\": "));
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("bad_request"))
    );
    let answer = residentd.ask("POST", "/v1/completions", Some("{\"prompt\": \"x\"}"));
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("bad_request"))
    );
    assert_eq!(
        residentd.ask("GET", "/v1/models", None).json()["data"][0]["id"],
        "m"
    );
    assert_eq!(residentd.ask("GET", "/health", None).status, 200);
    assert_eq!(residentd.ask("GET", "/nowhere", None).status, 404);
}

#[test]
fn a_second_residentd_on_the_same_address_or_state_is_told_what_to_do() {
    let residentd = Residentd::start(&one("", ""));
    let pid = residentd.complete("m").worker_pid();
    let folder = residentd.folder();
    let state = folder.join("state").display().to_string();
    let serve = |listen: &str, state: &str| {
        let output = std::process::Command::new(crate::support::residentd::RESIDENTD)
            .args(["serve", "--config"])
            .arg(folder.join("residentd.toml"))
            .args(["--listen", listen, "--state-dir", state])
            .output()
            .expect("residentd can be spawned");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), text)
    };
    let (code, text) = serve(residentd.address(), &format!("{state}-other"));
    assert_eq!(code, Some(1));
    assert!(
        text.contains(residentd.address()) && text.contains("--listen"),
        "{text}"
    );
    let (code, text) = serve("127.0.0.1:0", &state);
    assert_eq!(code, Some(1));
    assert!(
        text.contains(&state) && text.contains("server.state_dir"),
        "{text}"
    );
    assert_eq!(
        residentd.complete("m").worker_pid(),
        pid,
        "the first goes on"
    );
}

#[test]
fn a_second_sigterm_ends_a_long_grace() {
    let residentd = Residentd::start(&one("", ""));
    residentd.complete("m");
    let body =
        json!({"model": "m", "prompt": "x", "stream": true, "x_chunks": 5000, "x_pace_ms": 20})
            .to_string();
    let _stream =
        send(residentd.address(), "POST", "/v1/completions", Some(&body)).expect("a connection");
    wait_until("the stream to begin", || {
        (residentd.model("m")["in_flight"] == 1).then_some(())
    });
    let mut residentd = residentd;
    residentd.signal(nix::sys::signal::Signal::SIGTERM);
    wait_until("the drain to begin", || {
        (residentd.ask("GET", "/readyz", None).status == 503).then_some(())
    });
    let start = now();
    residentd.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(residentd.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a04_the_environment_wins_over_the_file_and_a_bad_value_names_itself() {
    let residentd = Residentd::start_with(&one("", ""), &[("MAX_MEMORY_USAGE", "123456789")]);
    let stats = residentd.memory("stats");
    assert_eq!(
        (&stats["memory_limit"], &stats["limit_source"]),
        (&json!(123_456_789), &json!("env"))
    );
    drop(residentd);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("c.toml");
    std::fs::write(&file, one("", "")).expect("the config can be written");
    let output = std::process::Command::new(crate::support::residentd::RESIDENTD)
        .args(["serve", "--config"])
        .arg(&file)
        .env("MAX_MEMORY_USAGE", "lots")
        .current_dir(folder.path())
        .output()
        .expect("residentd can be spawned");
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("MAX_MEMORY_USAGE") && text.contains("lots"),
        "{text}"
    );
}

#[test]
fn a_model_with_a_bound_on_concurrency_gets_no_more_at_once_and_serves_all() {
    let residentd = Residentd::start(&one("", "concurrency = 2\n"));
    residentd.complete("m");
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..40)
            .map(|_| {
                scope.spawn(|| {
                    let body = json!({"model": "m", "prompt": "x", "x_delay_ms": 30}).to_string();
                    residentd.ask("POST", "/v1/completions", Some(&body))
                })
            })
            .collect();
        let watched = scope.spawn(|| {
            let mut most = (0, 0);
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let model = residentd.model("m");
                let count = |key: &str| model[key].as_u64().expect("a count");
                most = (most.0.max(count("in_flight")), most.1.max(count("queued")));
            }
            most
        });
        for answer in asked {
            assert_eq!(answer.join().expect("no panic").status, 200);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        let (inside, queued) = watched.join().expect("no panic");
        assert_eq!(inside, 2, "both places are used, and no third");
        assert!(queued > 0, "others waited");
    });
    // Who waited for a place had found a worker all the same.
    let stats = residentd.memory("stats");
    assert_eq!(residentd.model("m")["access_count"], 41);
    assert!(
        stats["hit_ratio"]
            .as_f64()
            .is_some_and(|ratio| ratio > 0.97),
        "{stats}"
    );
}
