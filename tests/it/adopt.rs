//! Workers survive residentd: whatever ends it, the next one takes them back or
//! ends them, and nothing runs twice.

mod changed;
mod order;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::http::{request, send};
use crate::support::residentd::STUB;
use crate::support::{Residentd, kill, now, pause, processes_with, repeats, runs, wait_until};

const ROOM: &str = "\n[memory]\nlimit = \"1GiB\"\nreserve = \"16MiB\"\n";

fn model(name: &str, flags: &str, more: &str) -> String {
    format!(
        "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} {flags}'\nmemory = \"64MiB\"\n{more}\n"
    )
}

fn events(residentd: &Residentd, kind: &str) -> Vec<Value> {
    let answer = residentd.ask("GET", &format!("/api/v1/events?kind={kind}"), None);
    let all = answer.json()["data"]["events"].clone();
    all.as_array().cloned().unwrap_or_default()
}

/// This claim wants two and a half times as many rounds as others.
fn rounds() -> u64 {
    repeats().map_or(3, |runs| u64::from(runs) * 5 / 2)
}

/// Asks the model again and again until told to stop; counts what came whole.
fn load(address: &str, model: &str, stop: &AtomicBool, served: &AtomicU64) {
    let body =
        json!({"model": model, "prompt": "x", "stream": true, "x_chunks": 5, "x_pace_ms": 2});
    let body = body.to_string();
    while !stop.load(Ordering::Relaxed) {
        // Whatever is cut by the end of residentd is not counted.
        let answer = request(address, "POST", "/v1/completions", Some(&body));
        if answer.is_ok_and(|answer| answer.status == 200 && answer.complete) {
            served.fetch_add(1, Ordering::Relaxed);
        } else {
            pause(Duration::from_millis(1));
        }
    }
}

const NAMES: [&str; 3] = ["a", "b", "s"];
/// Tells the processes of one test's worker from those of all others.
const OWN_SIZE: &str = "24577KiB";

#[test]
fn a42_workers_are_taken_back_after_kill_9_under_load_again_and_again() {
    let flags = format!("--anon {OWN_SIZE} --daemon-child --child-anon 8MiB");
    let on_socket = model("s", "", "upstream = \"unix:${SOCKET}\"");
    let config = [
        ROOM.to_owned(),
        model("a", &flags, ""),
        model("b", "--anon 16MiB", ""),
        on_socket.replace("--port ${PORT}", "--socket ${SOCKET}"),
    ];
    let mut residentd = Residentd::start(&config.concat());
    let pids = NAMES.map(|name| residentd.complete(name).worker_pid());
    let stats = residentd.ask("GET", "/upstream/a/stats", None).json();
    let daemon = stats["children"][0].as_i64().expect("it has a daemon");
    let memory = wait_until("all to be measured", || {
        let held = NAMES.map(|name| residentd.model(name)["memory_usage"].as_u64().unwrap_or(0));
        (held[0] > 32 << 20 && held[1] > 16 << 20 && held[2] > 0).then_some(held)
    });
    residentd.wait_until_kept("all");
    for round in 1..=rounds() {
        kill_under_load(&mut residentd);
        look_at_survivors(&residentd, round, pids, memory);
    }
    let answer = residentd.ask("POST", "/api/v1/models/a/unload", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(!runs(pids[0]) && !runs(daemon));
    assert!(processes_with(OWN_SIZE).is_empty());
    let again = residentd.complete("a");
    assert_eq!(again.status, 200, "{}", again.text());
    let view = residentd.model("a");
    let (generation, adopted) = (&view["generation"], &view["adopted"]);
    assert_eq!((generation, adopted), (&json!(2), &json!(false)));
    assert!(residentd.stop().success());
    assert!(pids.iter().all(|pid| !runs(*pid)), "a normal end ends them");
}

/// Kills residentd while all models are asked, and starts the next.
fn kill_under_load(residentd: &mut Residentd) {
    let (stop, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let address = residentd.address().to_owned();
    std::thread::scope(|scope| {
        for name in NAMES {
            let (address, stop, served) = (&address, &stop, &served);
            scope.spawn(move || load(address, name, stop, served));
        }
        wait_until("the load to run", || {
            (served.load(Ordering::Relaxed) > 20).then_some(())
        });
        residentd.restart_after(Signal::SIGKILL);
        stop.store(true, Ordering::Relaxed);
    });
}

/// Everything is as it was, from the first look on.
fn look_at_survivors(residentd: &Residentd, round: u64, pids: [i64; 3], memory: [u64; 3]) {
    for ((name, pid), before) in NAMES.iter().zip(pids).zip(memory) {
        let view = residentd.model(name);
        assert_eq!(view["phase"], "ready", "round {round}: {view}");
        let identity = (&view["pid"], &view["generation"], &view["adopted"]);
        let expected = (&json!(pid), &json!(1), &json!(true));
        assert_eq!(identity, expected, "round {round}");
        let now = view["memory_usage"].as_u64().expect("it is measured");
        assert!(
            now.abs_diff(before) < 8 << 20,
            "round {round}: {now}, was {before}: {view}"
        );
        let answer = residentd.complete(name);
        assert_eq!(
            (answer.status, answer.worker_pid()),
            (200, pid),
            "round {round}"
        );
        assert_eq!(residentd.model(name)["loads"], 0, "round {round}");
    }
    let copies = processes_with(OWN_SIZE);
    assert_eq!(copies, [pids[0]], "round {round}: no second copy");
    let told = events(residentd, "spawn,adopt");
    let newest = &told[told.len() - NAMES.len()..];
    let measured = |event: &Value| {
        event["kind"] == "adopt"
            && event["ready"] == true
            && event["held"]["host"].as_u64() > Some(0)
    };
    assert!(newest.iter().all(measured), "round {round}: {told:?}");
}

/// Returns the pid of residentd's guard, once it blocks signals.
fn guard(residentd: &Residentd) -> i64 {
    let own = residentd.pid().to_string();
    let is_own = |pid: &i64| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut words = line.split('\0');
        words.nth(1) == Some("guard") && words.any(|word| word == own)
    };
    let blocks = |pid: &i64| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let mut lines = status.lines();
        let blocked = lines.find_map(|line| line.strip_prefix("SigBlk:"));
        let blocked = blocked.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
        blocked.is_some_and(|set| set & (1 << (Signal::SIGTERM as u32 - 1)) != 0)
    };
    wait_until("a guard", || {
        let guards = processes_with("guard");
        guards.into_iter().find(|pid| is_own(pid) && blocks(pid))
    })
}

#[test]
fn a42_without_adoption_no_worker_is_alive_a_second_after_kill_9() {
    let flags = "--child --daemon-child --child-ignore-term --ignore-term";
    let config = format!(
        "adopt = false\n{ROOM}{}{}",
        model("a", flags, ""),
        model("b", "", "")
    );
    let mut residentd = Residentd::start(&config);
    let mut all: Vec<_> = ["a", "b"]
        .map(|name| residentd.complete(name).worker_pid())
        .into();
    let stats = residentd.ask("GET", "/upstream/a/stats", None).json();
    let children = stats["children"]
        .as_array()
        .expect("it has children")
        .clone();
    all.extend(children.iter().filter_map(Value::as_i64));
    assert_eq!(all.len(), 4);
    all.push(guard(&residentd));
    residentd.signal(Signal::SIGKILL);
    let start = now();
    residentd.wait();
    wait_until("all to be gone", || {
        all.iter().all(|pid| !runs(*pid)).then_some(())
    });
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    residentd.start_again(&[]);
    assert_eq!(residentd.complete("b").status, 200);
}

#[test]
fn a_guard_outlives_signals_to_the_group_is_replaced_when_it_dies_and_leaves_in_silence() {
    let config = format!("adopt = false\n{ROOM}{}", model("m", "", ""));
    let mut residentd = Residentd::start(&config);
    let worker = residentd.complete("m").worker_pid();
    let first = guard(&residentd);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(first, signal);
    }
    assert_eq!(residentd.complete("m").status, 200);
    assert!(runs(first), "only SIGKILL ends it");
    kill(first, Signal::SIGKILL);
    wait_until("the first to be gone", || (!runs(first)).then_some(()));
    let second = guard(&residentd);
    assert!(residentd.log().contains("starting another"));
    assert!(runs(worker), "the end of a guard ends no worker");
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    wait_until("the second to end the worker", || {
        (!runs(worker) && !runs(second)).then_some(())
    });
    assert!(
        residentd
            .log()
            .contains("residentd is gone: ending its workers")
    );
    residentd.start_again(&[]);
    residentd.complete("m");
    let third = guard(&residentd);
    let before = residentd.log().matches("residentd is gone").count();
    residentd.signal(Signal::SIGTERM);
    assert!(residentd.wait().success());
    assert!(!runs(third), "it leaves before residentd");
    assert_eq!(residentd.log().matches("residentd is gone").count(), before);
}

/// A residentd that has taken back the ready worker of `m`, and its pid.
fn taken_back(flags: &str) -> (Residentd, i64) {
    let mut residentd = Residentd::start(&(ROOM.to_owned() + &model("m", flags, "")));
    let pid = residentd.complete("m").worker_pid();
    residentd.wait_until_kept("m");
    residentd.restart_after(Signal::SIGKILL);
    (residentd, pid)
}

#[test]
fn a42_a_stream_and_the_log_go_on_with_a_worker_that_was_taken_back() {
    let (residentd, pid) = taken_back("");
    let body = json!({"model": "m", "prompt": "x", "stream": true, "x_chunks": 20, "x_pace_ms": 1});
    let answer = residentd.ask("POST", "/v1/completions", Some(&body.to_string()));
    assert!(
        answer.complete && answer.text().contains("[DONE]"),
        "{}",
        answer.text()
    );
    assert_eq!(answer.worker_pid(), pid);
    let lines = residentd.ask("GET", "/api/v1/models/m/logs", None).text();
    assert!(lines.contains("ready"), "what it printed before: {lines}");
}

#[test]
fn a_crash_of_a_worker_that_was_taken_back_is_seen_at_once_with_its_exit_code() {
    let flags = "--die-after-requests 2 --exit-code 7";
    let (residentd, pid) = taken_back(flags);
    assert_eq!(residentd.complete("m").worker_pid(), pid);
    let told = wait_until("its end to be told", || events(&residentd, "exit").pop());
    assert_eq!(told["reason"], "crash");
    // A kernel before 6.15 does not tell when its parent is quick to reap it.
    let status = told["status"].as_str().expect("a text").to_owned();
    assert!(
        ["exit code 7", "unknown exit status"].contains(&&*status),
        "{status}"
    );
    let next = residentd.complete("m");
    assert_eq!(next.status, 200, "{}", next.text());
    assert_eq!(residentd.model("m")["generation"], 2);
}

#[test]
fn a_worker_that_died_meanwhile_is_simply_stopped_and_the_next_request_loads() {
    let mut residentd = Residentd::start(&(ROOM.to_owned() + &model("m", "", "")));
    let pid = residentd.complete("m").worker_pid();
    residentd.wait_until_kept("m");
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    kill(pid, Signal::SIGKILL);
    wait_until("the worker to be gone", || (!runs(pid)).then_some(()));
    residentd.start_again(&[]);
    let view = residentd.model("m");
    assert_eq!(
        (&view["phase"], &view["last_error"]),
        (&json!("stopped"), &Value::Null)
    );
    assert_eq!(residentd.complete("m").status, 200);
}

#[test]
fn a_worker_that_still_loads_is_waited_for_and_not_loaded_twice() {
    let flags = "--ready-after 1500ms --listen late";
    let mut residentd = Residentd::start(&(ROOM.to_owned() + &model("m", flags, "")));
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let waiting = send(residentd.address(), "POST", "/v1/completions", Some(&body));
    let pid = residentd.wait_for_phase("m", "starting")["pid"].clone();
    let pid = pid
        .as_i64()
        .unwrap_or_else(|| wait_until("its pid", || residentd.worker_pid("m")));
    residentd.wait_until_kept("m");
    residentd.restart_after(Signal::SIGKILL);
    drop(waiting);
    let answer = residentd.complete("m");
    assert_eq!(
        (answer.status, answer.worker_pid()),
        (200, pid),
        "{}",
        answer.text()
    );
    let told = events(&residentd, "spawn,adopt").pop().expect("it is told");
    assert_eq!(
        (&told["kind"], &told["ready"]),
        (&json!("adopt"), &json!(false))
    );
}

/// A model whose worker says itself that it is ready, `after` its start.
fn notifying(after: &str, flags: &str) -> String {
    let flags = format!("--notify --listen late --ready-after {after} {flags}");
    // The stamp comes while it loads: it is no weight file.
    let more = "ready = { notify = true }\nstart_timeout = \"5s\"\nweights = []";
    ROOM.to_owned() + &model("m", &flags, more)
}

/// Asks for the model without waiting; returns the pid of its worker once that is
/// written down.
fn start_to_load(residentd: &Residentd) -> i64 {
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let asked = send(residentd.address(), "POST", "/v1/completions", Some(&body));
    let pid = wait_until("its pid", || residentd.worker_pid("m"));
    residentd.wait_until_kept("m");
    drop(asked);
    pid
}

#[test]
fn a_worker_that_is_to_say_that_it_is_ready_is_heard_by_the_next_residentd() {
    let mut residentd = Residentd::start(&notifying("2s", ""));
    let pid = start_to_load(&residentd);
    residentd.restart_after(Signal::SIGKILL);
    assert_eq!(residentd.model("m")["phase"], "starting");
    let start = now();
    let answer = residentd.complete("m");
    assert_eq!((answer.status, answer.worker_pid()), (200, pid));
    assert!(start.elapsed() < Duration::from_secs(4), "it was heard");
    // It says nothing a second time.
    residentd.wait_until_kept("m");
    residentd.restart_after(Signal::SIGKILL);
    let start = now();
    let answer = residentd.complete("m");
    assert_eq!((answer.status, answer.worker_pid()), (200, pid));
    assert!(start.elapsed() < Duration::from_secs(2));
    let told = events(&residentd, "adopt").pop().expect("it is told");
    assert_eq!(told["ready"], true);
}

#[test]
fn a_worker_that_said_that_it_is_ready_while_nobody_listened_is_asked_when_its_time_is_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let stamp = folder.path().join("ready");
    let flags = format!("--ready-stamp {}", stamp.display());
    let mut residentd = Residentd::start(&notifying("1s", &flags));
    let pid = start_to_load(&residentd);
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    wait_until("it to be ready", || stamp.exists().then_some(()));
    residentd.start_again(&[]);
    let answer = residentd.complete("m");
    assert_eq!(
        (answer.status, answer.worker_pid()),
        (200, pid),
        "{}",
        answer.text()
    );
}

#[test]
fn no_adopt_ends_what_is_found() {
    let config = ROOM.to_owned() + &model("m", "--daemon-child", "");
    let mut residentd = Residentd::start(&config);
    let pid = residentd.complete("m").worker_pid();
    let stats = residentd.ask("GET", "/upstream/m/stats", None).json();
    let child = stats["children"][0].as_i64().expect("it has a daemon");
    residentd.wait_until_kept("m");
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    assert!(runs(pid) && runs(child), "they outlive residentd");
    residentd.start_again(&["--no-adopt"]);
    assert!(!runs(pid) && !runs(child));
    assert_eq!(residentd.model("m")["phase"], "stopped");
}

#[test]
fn a_stranger_on_a_workers_port_is_not_taken_for_the_worker_and_left_alone() {
    // The worker still loads when residentd dies, so its port is free to take.
    let config =
        ROOM.to_owned() + &model("m", "--never-ready --listen late", "start_timeout = \"3s\"");
    let mut residentd = Residentd::start(&config);
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let asked = send(residentd.address(), "POST", "/v1/completions", Some(&body));
    let worker = wait_until("it to run", || residentd.worker_pid("m"));
    residentd.wait_until_kept("m");
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    drop(asked);
    let line = std::fs::read(format!("/proc/{worker}/cmdline")).expect("it runs");
    let line = String::from_utf8_lossy(&line).into_owned();
    let mut words = line.split('\0').skip_while(|word| *word != "--port");
    let port = words.nth(1).expect("it has a port").to_owned();
    let mut stranger = std::process::Command::new(STUB)
        .args(["--port", &port, "--name", "stranger"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("the stub can be spawned");
    wait_until("the stranger to listen", || {
        request(&format!("127.0.0.1:{port}"), "GET", "/health", None).ok()
    });
    residentd.start_again(&[]);
    let answer = residentd.complete("m");
    let lives = matches!(stranger.try_wait(), Ok(None));
    stranger.kill().expect("it is our child");
    stranger.wait().expect("it is our child");
    assert_eq!(answer.status, 504, "{}", answer.text());
    assert!(
        answer.text().contains("another program answers"),
        "{}",
        answer.text()
    );
    assert!(lives, "nobody ends a stranger");
    wait_until("the worker to be ended", || (!runs(worker)).then_some(()));
}

#[test]
fn what_was_used_most_in_a_life_is_remembered_over_the_crash() {
    let flags = "--grow 96MiB --grow-max 96MiB";
    let config = ROOM.to_owned() + &model("m", flags, "").replace("memory = \"64MiB\"\n", "");
    let mut residentd = Residentd::start(&config);
    residentd.complete("m");
    let peak = wait_until("the growth to be measured", || {
        let peak = residentd.model("m")["peak"].as_u64()?;
        (peak > 96 << 20).then_some(peak)
    });
    residentd.wait_until_kept("m");
    residentd.restart_after(Signal::SIGKILL);
    let after = residentd.model("m")["peak"].as_u64().expect("a number");
    assert!(after.abs_diff(peak) < 8 << 20, "{after} after {peak}");
}

#[test]
fn a_client_in_the_middle_of_an_upload_sees_a_broken_connection_and_the_worker_stays() {
    let mut residentd = Residentd::start(&(ROOM.to_owned() + &model("m", "", "")));
    let pid = residentd.complete("m").worker_pid();
    residentd.wait_until_kept("m");
    let mut stream = std::net::TcpStream::connect(residentd.address()).expect("a connection");
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n{{\"model\": \"m\", \"prompt\": \""
    )
    .expect("written");
    wait_until("the request to be inside", || {
        (residentd.model("m")["in_flight"] == 1).then_some(())
    });
    residentd.restart_after(Signal::SIGKILL);
    let mut rest = Vec::new();
    // An error and an end are both what a cut looks like.
    let _ = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).starts_with("HTTP/1.1 200"));
    let start = now();
    assert_eq!(residentd.complete("m").worker_pid(), pid);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(residentd.model("m")["in_flight"], 0);
}
