//! Workers, wrappers and daemons that die in any order, and what a worker does
//! to its log: nothing is left, nothing is lost that can be told, and residentd
//! and the other workers go on.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use residentd::clock::Clock;
use serde_json::{Value, json};

use crate::support::http::send;
use crate::support::residentd::{RESIDENTD, STUB};
use crate::support::{Residentd, kill, now, processes_with, runs, settle, wait_until};

const ROOM: &str = "[memory]\nlimit = \"1GiB\"\nreserve = \"16MiB\"\n";

/// A model whose worker is what a shell makes of `script`, in which STUB is a
/// stub worker of this name.
fn shell(name: &str, script: &str, more: &str) -> String {
    let stub = format!("{STUB} --port ${{PORT}} --name {name}");
    let command = json!(["sh", "-c", script.replace("STUB", &stub)]);
    format!("[models.{name}]\ncommand = {command}\nmemory = \"32MiB\"\n{more}\n")
}

fn start(models: &str) -> Residentd {
    Residentd::start(&format!("{ROOM}{models}"))
}

/// Waits until residentd has no child but these workers, dead or alive.
fn only_these_are_left(residentd: &Residentd, workers: &[i64]) {
    let me = i64::from(residentd.pid());
    wait_until("residentd to have no other child in any state", || {
        let entries = std::fs::read_dir("/proc").expect("/proc can be listed");
        let stats = entries.filter_map(|entry| {
            let pid: i64 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let fields = stat.rsplit(") ").next()?;
            let parent: i64 = fields.split(' ').nth(1)?.parse().ok()?;
            Some((pid, parent))
        });
        let mut strangers = stats.filter(|(pid, parent)| *parent == me && !workers.contains(pid));
        strangers.next().is_none().then_some(())
    });
}

#[test]
fn a_wrapper_that_ends_without_a_word_to_its_server_costs_no_wait() {
    let residentd = start(&shell("m", "STUB --slow-exit 50ms & wait", ""));
    let server = residentd.complete("m").worker_pid();
    let start = now();
    let answer = residentd.ask("POST", "/api/v1/models/m/unload", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(!runs(server));
    // The server ended by itself, before the time of stragglers was over.
    assert!(start.elapsed() < Duration::from_millis(1500));
    let log = residentd.ask("GET", "/api/v1/models/m/logs", None).text();
    assert!(log.contains("m: terminating"), "{log}");
    only_these_are_left(&residentd, &[]);
}

/// Waits until a worker is told to be gone, and returns that event.
fn gone(residentd: &Residentd, model: &str) -> Value {
    wait_until("the end of a worker to be told", || {
        let path = format!("/api/v1/events?kind=exit&model={model}");
        let events = residentd.ask("GET", &path, None).json();
        events["data"]["events"].as_array()?.last().cloned()
    })
}

#[test]
fn a_wrapper_that_dies_takes_its_server_along_and_the_next_one_has_the_port() {
    // The server in the wrapper's group, in a session of its own, and as a
    // grandchild whose parent has gone.
    for (shape, script) in [
        ("group", "STUB & wait"),
        ("session", "setsid STUB & wait"),
        ("orphan", "(setsid STUB &); sleep 600"),
    ] {
        let residentd = start(&shell("m", script, ""));
        let server = residentd.complete("m").worker_pid();
        let wrapper = residentd.worker_pid("m").expect("it is loaded");
        assert_ne!(server, wrapper, "{shape}");
        kill(wrapper, Signal::SIGKILL);
        wait_until("the server to end", || (!runs(server)).then_some(()));
        let told = gone(&residentd, "m");
        assert_eq!(told["reason"], "crash", "{shape}: {told}");
        let next = residentd.complete("m");
        assert_eq!(next.status, 200, "{shape}: {}", next.text());
        assert_ne!(next.worker_pid(), server);
        let left = processes_with("--name m");
        let left = left.into_iter().filter(|pid| *pid == server).count();
        assert_eq!(left, 0, "{shape}");
        let wrapper = residentd.worker_pid("m").expect("it is loaded");
        let mut known = vec![wrapper];
        if shape == "orphan" {
            known.push(next.worker_pid());
        }
        only_these_are_left(&residentd, &known);
    }
}

#[test]
fn the_server_that_dies_under_a_wrapper_that_lives_is_found_and_replaced() {
    let live = "live = { probe = \"10m\" }\nstop_timeout = \"300ms\"\n";
    let residentd = start(&shell("m", "trap '' TERM; STUB & wait; sleep 600", live));
    let server = residentd.complete("m").worker_pid();
    let wrapper = residentd.worker_pid("m").expect("it is loaded");
    kill(server, Signal::SIGKILL);
    // Nothing listens any more: a request finds that out.
    let refused = residentd.complete("m");
    assert_eq!(refused.status, 502, "{}", refused.text());
    let told = gone(&residentd, "m");
    assert_eq!(told["reason"], "unhealthy", "{told}");
    assert!(!runs(wrapper), "it was killed after its grace");
    assert_eq!(residentd.complete("m").status, 200);
}

#[test]
fn a_server_that_makes_itself_a_daemon_is_told_as_ended_and_its_daemon_is_ended() {
    let script = "setsid STUB >/dev/null 2>&1 & echo gone to the background";
    let residentd = start(&shell("m", script, ""));
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 502, "{}", answer.text());
    let text = answer.text();
    assert!(text.contains("exit code 0 before it was ready"), "{text}");
    assert!(text.contains("gone to the background"), "{text}");
    only_these_are_left(&residentd, &[]);
    let port = format!("--name m --port {}", residentd.pid());
    assert!(processes_with(&port).is_empty());
}

#[test]
fn a_worker_that_stops_itself_while_it_loads_is_ended_at_its_deadlines() {
    let more = "start_timeout = \"400ms\"\nstop_timeout = \"200ms\"\n";
    let residentd = start(&shell("m", "kill -STOP $$; exec STUB", more));
    let start = now();
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 504, "{}", answer.text());
    gone(&residentd, "m");
    assert!(start.elapsed() < Duration::from_secs(8));
    only_these_are_left(&residentd, &[]);
}

#[test]
fn a41_two_hundred_requests_that_wait_for_a_load_that_crashes_hear_why() {
    let residentd = start(&shell("m", "exec STUB --ready-after 60s", ""));
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..200)
            .map(|_| scope.spawn(|| residentd.complete("m")))
            .collect();
        wait_until("all to wait", || {
            (residentd.model("m")["queued"] == 200).then_some(())
        });
        wait_until("the worker to print", || {
            let log = residentd.ask("GET", "/api/v1/models/m/logs", None);
            log.text().contains("listening on").then_some(())
        });
        let pid = residentd.worker_pid("m").expect("it loads");
        kill(pid, Signal::SIGABRT);
        for answer in asked {
            let answer = answer.join().expect("no panic");
            let text = answer.text();
            assert_eq!(answer.status, 502, "{text}");
            assert_eq!(answer.json()["error"]["code"], "worker_failed");
            assert!(text.contains("SIGABRT before it was ready"), "{text}");
            assert!(text.contains("listening on"), "{text}");
        }
    });
    only_these_are_left(&residentd, &[]);
}

#[test]
fn a41_a_worker_that_dies_of_its_first_request_is_tried_once_more_and_then_told() {
    let residentd = start(&shell("m", "exec STUB", ""));
    let body = json!({"model": "m", "prompt": "x", "x_exit_after": 0}).to_string();
    let answer = residentd.ask("POST", "/v1/completions", Some(&body));
    assert_eq!(answer.status, 502, "{}", answer.text());
    wait_until("both deaths to be booked", || {
        (residentd.model("m")["restarts"] == 2).then_some(())
    });
    // It rests now, and comes back for whoever asks later.
    let next = wait_until("it to serve again", || {
        let answer = residentd.complete("m");
        (answer.status == 200).then_some(answer)
    });
    only_these_are_left(&residentd, &[next.worker_pid()]);
}

/// A41: from SIGKILL to a worker that serves, to the moment residentd tells of
/// its end by the clock of both.
#[test]
fn a41_the_end_of_a_ready_worker_is_noticed_within_10_ms() {
    let names: Vec<String> = (0..15).map(|n| format!("m{n}")).collect();
    let models: String = names.iter().map(|m| shell(m, "exec STUB", "")).collect();
    let residentd = start(&models);
    let clock = Clock::start();
    let mut took = Vec::new();
    for name in &names {
        let pid = residentd.complete(name).worker_pid();
        let killed = clock.unix(clock.now());
        kill(pid, Signal::SIGKILL);
        let told = gone(&residentd, name);
        took.push((told["at"].as_f64().expect("a time") - killed) * 1e3);
    }
    settle("A41", "crash of a ready worker to its event", 10.0, took);
}

#[test]
fn a_line_without_end_takes_no_memory_and_what_comes_after_it_is_seen() {
    // 48 MiB of one line; the sign that it is ready is the end of another one
    // that never ends.
    let script = "head -c 50331648 /dev/zero | tr '\\0' x; echo; STUB --silent & sleep 0.3; printf 'all is ready'; wait";
    let more = "ready = { log = \"is ready$\" }\n";
    let residentd = start(&shell("m", script, more));
    let before = residentd.status_bytes("VmRSS");
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let grown = residentd.status_bytes("VmHWM").saturating_sub(before);
    assert!(grown < 40 << 20, "residentd grew by {grown} bytes");
    let logs = residentd.folder().join("state/logs");
    let size = |name: &str| std::fs::metadata(logs.join(name)).map_or(0, |m| m.len());
    wait_until("the log to be cut back", || {
        (size("m.log") + size("m.log.1") <= 34 << 20).then_some(())
    });
    let tail = residentd.ask("GET", "/api/v1/models/m/logs", None);
    assert!(tail.body.len() < 8 << 20, "{} bytes", tail.body.len());
}

#[test]
fn a_worker_that_prints_garbage_is_served_and_its_output_is_text() {
    let garbage = "head -c 3000000 /dev/urandom; printf '\\000\\377\\033[2J\\n'";
    let residentd = start(&shell("m", &format!("{garbage}; exec STUB"), ""));
    assert_eq!(residentd.complete("m").status, 200);
    let tail = wait_until("the last line to be read", || {
        let tail = residentd.ask("GET", "/api/v1/models/m/logs", None);
        let text = String::from_utf8(tail.body).expect("it is UTF-8");
        text.contains("ready on").then_some(text)
    });
    assert!(tail.len() < 8 << 20, "{} bytes", tail.len());
}

#[test]
fn a_worker_that_may_write_no_more_is_told_by_the_signal_that_ended_it() {
    let script = "ulimit -f 64; exec STUB --spam-lines 100000 --ready-after 30s";
    let residentd = start(&(shell("m", script, "") + &shell("n", "exec STUB", "")));
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert!(answer.text().contains("SIGXFSZ"), "{}", answer.text());
    assert_eq!(residentd.complete("n").status, 200);
}

/// Says that this machine cannot show it.
#[expect(clippy::print_stdout, reason = "the harness reads it")]
fn skip(why: &str) {
    println!("SKIPPED A45: no small disk can be mounted: {why}");
}

/// Starts residentd with its state on a disk of its own of so many MiB, and
/// returns it with the path at which that is seen from here; `None` where no
/// disk can be mounted.
fn on_a_small_disk(mib: u32, models: &str) -> Option<(Residentd, PathBuf)> {
    let unshare = ["--user", "--map-root-user", "--mount"];
    let mount = format!("mount -t tmpfs -o size={mib}m none");
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("state");
    std::fs::create_dir(&state).expect("it can be made");
    let can = Command::new("unshare")
        .args(unshare)
        .args(["sh", "-c", &format!("{mount} {}", state.display())])
        .output();
    let done = can.expect("unshare is there");
    if !done.status.success() {
        skip(&String::from_utf8_lossy(&done.stderr));
        return None;
    }
    let file = folder.path().join("residentd.toml");
    let head = format!("[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\n");
    std::fs::write(&file, format!("{head}{ROOM}{models}")).expect("written");
    let serve = format!(
        "{mount} {state} && exec {RESIDENTD} serve --config {file}",
        state = state.display(),
        file = file.display()
    );
    let mut command = Command::new("unshare");
    command.args(unshare).args(["sh", "-c", &serve]);
    command.current_dir(folder.path());
    let residentd = Residentd::launch(folder, command);
    let root = format!("/proc/{}/root{}", residentd.pid(), state.display());
    Some((residentd, PathBuf::from(root)))
}

fn told_full(residentd: &Residentd) -> usize {
    residentd.log().matches("the disk is full").count()
}

#[test]
fn a_worker_that_fills_the_disk_of_its_log_is_served_and_told_once() {
    let flood = "exec STUB --spam-lines 200000 --spam-width 200";
    let models = shell("m", flood, "") + &shell("n", "exec STUB", "");
    let Some((residentd, _)) = on_a_small_disk(8, &models) else {
        return;
    };
    assert_eq!(residentd.complete("m").status, 200);
    // What does not fit is lost, what it says later is not.
    residentd.ask("POST", "/api/v1/models/m/unload", None);
    let log = residentd.ask("GET", "/api/v1/models/m/logs", None).text();
    assert!(log.contains("m: terminating"), "{log}");
    assert_eq!(told_full(&residentd), 1, "{}", residentd.log());
    assert_eq!(residentd.complete("n").status, 200);
    assert!(residentd.stop().success());
}

#[test]
fn a_full_disk_keeps_no_worker_from_starting_and_residentd_from_nothing() {
    let models = shell("m", "exec STUB", "") + &shell("n", "exec STUB", "");
    let Some((residentd, state)) = on_a_small_disk(8, &models) else {
        return;
    };
    fill(&state);
    for name in ["m", "n", "m"] {
        let answer = residentd.complete(name);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    kill(residentd.worker_pid("m").expect("loaded"), Signal::SIGKILL);
    gone(&residentd, "m");
    assert_eq!(residentd.complete("m").status, 200);
    assert!(residentd.log().contains("a log cannot be written"));
    assert!(residentd.stop().success());
}

/// Writes until the disk takes no more.
fn fill(folder: &Path) {
    let mut file = std::fs::File::create(folder.join("ballast")).expect("it can be made");
    let piece = vec![0_u8; 64 << 10];
    for size in [piece.len(), 512, 1] {
        while std::io::Write::write(&mut file, &piece[..size]).is_ok_and(|written| written > 0) {}
    }
}

#[test]
fn a_stream_of_a_worker_that_is_ended_as_unhealthy_looks_broken() {
    let live = "live = { probe = \"0s\", still = \"600ms\" }\n";
    let residentd = start(&shell("m", "exec STUB", live));
    residentd.complete("m");
    let body =
        json!({"model": "m", "prompt": "x", "stream": true, "x_chunks": 9, "x_pace_ms": 60_000})
            .to_string();
    let address = residentd.address();
    let mut stream = send(address, "POST", "/v1/completions", Some(&body)).expect("a connection");
    let mut raw = Vec::new();
    // A stream that is cut may end with an error; what came is looked at.
    let _ = stream.read_to_end(&mut raw);
    let text = String::from_utf8_lossy(&raw).into_owned();
    assert!(text.contains("red0") || text.contains("data: "), "{text}");
    assert!(!text.contains("[DONE]"), "{text}");
    assert!(text.contains("the worker broke off"), "{text}");
    assert_eq!(gone(&residentd, "m")["reason"], "unhealthy");
}
