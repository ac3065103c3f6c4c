//! Worker processes: how they become ready, what they leave behind, and that
//! nothing of them outlives residentd.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::http::send;
use crate::support::residentd::STUB;
use crate::support::{Residentd, kill, now, processes_with, runs, settle, wait_until};

const ROOM: &str = "[memory]\nlimit = \"1GiB\"\nreserve = \"16MiB\"\n";

fn model(name: &str, flags: &str, more: &str) -> String {
    format!(
        "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} {flags}'\nmemory = \"32MiB\"\n{more}\n"
    )
}

/// Returns the pids of the stub's children, as it tells them itself.
fn children(residentd: &Residentd, name: &str) -> Vec<i64> {
    let path = format!("/upstream/{name}/stats");
    let stats = residentd.ask("GET", &path, None).json();
    let list = stats["children"].as_array().cloned().unwrap_or_default();
    list.iter().filter_map(serde_json::Value::as_i64).collect()
}

#[test]
fn a11_a_daemon_that_forked_twice_is_measured_and_ended_with_its_worker() {
    let flags = "--child --daemon-child --child-anon 48MiB --child-ignore-term";
    let residentd = Residentd::start(&format!("{ROOM}{}", model("m", flags, "")));
    residentd.complete("m");
    let children = children(&residentd, "m");
    assert_eq!(children.len(), 2);
    assert!(children.iter().all(|pid| runs(*pid)));
    wait_until("both children to be measured", || {
        let usage = residentd.model("m")["memory_usage"].as_u64()?;
        (usage > 96 << 20).then_some(())
    });
    let answer = residentd.ask("POST", "/api/v1/models/m/unload", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    for pid in children {
        assert!(!runs(pid), "{pid} outlived its worker");
    }
}

/// A server whose daemon forked twice into a session of its own, closed what it
/// inherited, and wiped its arguments and environment, as `setproctitle` does.
const RENAMED: &str = r#"
import http.server, mmap, os, sys, time
def daemon():
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir('/')
    null = os.open('/dev/null', os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    with open('/proc/self/stat') as stat:
        fields = stat.read().rsplit(')', 1)[1].split()
    # arg_start to env_end: fields 48 to 51.
    start, end = int(fields[45]), int(fields[48])
    with open('/proc/self/mem', 'r+b', 0) as memory:
        memory.seek(start)
        memory.write(bytes(end - start))
    with open('/proc/self/comm', 'w') as comm:
        comm.write('renamed')
    held = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for i in range(0, len(held), 4096):
        held[i] = 1
    with open(sys.argv[2] + '.tmp', 'w') as file:
        file.write(str(os.getpid()))
    os.rename(sys.argv[2] + '.tmp', sys.argv[2])
    time.sleep(600)
if os.fork() == 0:
    daemon()
os.wait()
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header('content-length', '0')
        self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Answer).serve_forever()
"#;

#[test]
fn a11_a_daemon_that_renamed_itself_and_kept_nothing_is_measured_and_ended_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let (script, told) = (folder.path().join("renamed.py"), folder.path().join("pid"));
    std::fs::write(&script, RENAMED).expect("the script can be written");
    let config = format!(
        "{ROOM}[models.m]\ncommand = [\"python3\", {script:?}, \"${{PORT}}\", {told:?}]\n{}",
        model("other", "", "")
    );
    let residentd = Residentd::start(&config);
    // A second worker, so that an orphan could be either's.
    residentd.complete("other");
    let load = residentd.ask("POST", "/api/v1/models/m/load", None);
    assert_eq!(load.status, 200, "{}", load.text());
    let daemon = wait_until("the daemon to tell its pid", || {
        std::fs::read_to_string(&told).ok()?.parse::<i64>().ok()
    });
    wait_until("the daemon to be measured", || {
        let usage = residentd.model("m")["memory_usage"].as_u64()?;
        (usage > 56 << 20).then_some(())
    });
    let other = residentd.model("other")["memory_usage"].as_u64();
    assert!(other < Some(40 << 20), "{other:?}");
    let answer = residentd.ask("POST", "/api/v1/models/m/unload", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(!runs(daemon), "it outlived its worker");
}

#[test]
fn nothing_of_a_tree_outlives_residentd_after_sigterm() {
    let residentd = Residentd::start(&format!(
        "{ROOM}{}",
        model("m", "--child --daemon-child", "")
    ));
    let mut pids = vec![residentd.complete("m").worker_pid()];
    pids.extend(children(&residentd, "m"));
    assert_eq!(pids.len(), 3);
    assert_eq!(residentd.stop().code(), Some(0));
    for pid in pids {
        assert!(!runs(pid), "{pid} outlived residentd");
    }
}

#[test]
fn no_zombie_is_left_of_a_tree_that_ended_in_any_order() {
    let flags = "--child --daemon-child --child-anon 1MiB";
    let residentd = Residentd::start(&format!("{ROOM}{}", model("m", flags, "")));
    residentd.complete("m");
    let family = children(&residentd, "m");
    // A daemon that ends by itself, then the leader by surprise.
    kill(family[1], Signal::SIGKILL);
    kill(
        residentd.worker_pid("m").expect("it is loaded"),
        Signal::SIGKILL,
    );
    wait_until("residentd to have no child in any state", || {
        let table = std::fs::read_dir("/proc").expect("/proc can be listed");
        let stats =
            table.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("stat")).ok());
        let mine = format!(" {} ", residentd.pid());
        let mut children = stats.filter(|stat| {
            let rest = stat.rsplit(") ").next().unwrap_or_default();
            rest.get(1..).is_some_and(|rest| rest.starts_with(&mine))
        });
        children.next().is_none().then_some(())
    });
    assert!(family.iter().all(|pid| !runs(*pid)));
    assert_eq!(residentd.complete("m").status, 200);
}

#[test]
fn workers_of_a_residentd_that_was_killed_are_ended_when_the_next_one_is_to_adopt_none() {
    let config = format!(
        "{ROOM}{}{}",
        model("m", "--child --daemon-child", ""),
        model("n", "", "")
    );
    let mut residentd = Residentd::start(&config);
    let mut pids = vec![residentd.complete("m").worker_pid()];
    pids.push(residentd.complete("n").worker_pid());
    pids.extend(children(&residentd, "m"));
    // A residentd beside it, with a state of its own, keeps its worker.
    let other = Residentd::start(&config);
    let stranger = other.complete("m").worker_pid();
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    assert!(pids.iter().all(|pid| runs(*pid)), "they outlive residentd");
    residentd.start_again(&["--no-adopt"]);
    for pid in pids {
        assert!(!runs(pid), "{pid} was left behind");
    }
    assert!(runs(stranger));
    assert_eq!(residentd.complete("m").status, 200);
    assert!(runs(other.complete("m").worker_pid()));
}

#[test]
fn a_worker_is_ready_by_http_tcp_log_line_or_unix_socket() {
    let ready = |name: &str, flags: &str, check: &str| {
        model(name, &format!("--ready-after 150ms {flags}"), check)
    };
    let socket = format!(
        "[models.unix]\ncommand = '{STUB} --socket ${{SOCKET}} --name unix --ready-after 150ms'\nupstream = \"unix:${{SOCKET}}\"\nmemory = \"32MiB\"\n"
    );
    let config = format!(
        "{ROOM}{}{}{}{}{socket}",
        ready("http", "", "ready = { http = \"/health\" }\n"),
        ready("silent", "--silent", ""),
        ready("tcp", "--listen late --silent", "ready = { tcp = true }\n"),
        ready("log", "", "ready = { log = \"^log: ready on \" }\n"),
    );
    let residentd = Residentd::start(&config);
    for name in ["http", "silent", "tcp", "log", "unix"] {
        let start = now();
        let answer = residentd.complete(name);
        assert_eq!(answer.status, 200, "{name}: {}", answer.text());
        assert_eq!(answer.header("x-stub-name"), Some(name));
        assert!(start.elapsed() >= Duration::from_millis(150), "{name}");
    }
}

#[test]
fn a_stranger_on_the_port_does_not_pass_for_the_worker() {
    let config = format!(
        "{ROOM}{}",
        model("m", "--ready-after 600ms --listen late", "")
    );
    let residentd = Residentd::start(&config);
    let address = residentd.address().to_owned();
    let asked = std::thread::spawn(move || {
        let body = json!({"model": "m", "prompt": "x"}).to_string();
        crate::support::request(&address, "POST", "/v1/completions", Some(&body))
    });
    let pid = residentd.wait_for_phase("m", "starting")["pid"].as_i64();
    let pid = wait_until("the worker's pid", || pid.or(residentd.worker_pid("m")));
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("the worker lives");
    let words: Vec<_> = line.split('\0').collect();
    let at = words.iter().position(|word| *word == "--port");
    let port = words[at.expect("its port is an argument") + 1];
    // A second stub takes the number beside the holder socket and answers.
    let mut stranger = std::process::Command::new(STUB)
        .args(["--name", "stranger", "--port", port, "--silent"])
        .spawn()
        .expect("the stub can be spawned");
    let answered = wait_until("the stranger to answer", || {
        crate::support::request(&format!("127.0.0.1:{port}"), "GET", "/health", None).ok()
    });
    assert_eq!(answered.status, 200);
    // The worker finds its port taken and ends; another life has another port.
    let answer = asked.join().expect("no panic").expect("an answer");
    let log = residentd.log();
    stranger.kill().expect("it runs");
    stranger.wait().expect("it is our child");
    assert_ne!(answer.header("x-stub-name"), Some("stranger"));
    assert_eq!(
        (answer.status, answer.header("x-stub-name")),
        (200, Some("m")),
        "{}",
        answer.text()
    );
    assert!(log.contains("another program answers on the worker's address"));
}

#[test]
fn a_worker_that_ignores_sigterm_is_killed_with_its_tree_after_its_grace() {
    let flags = "--ignore-term --child --child-ignore-term";
    let more = "stop_timeout = \"400ms\"\n";
    let config = format!("{ROOM}{}{}", model("m", flags, more), model("n", "", ""));
    let residentd = Residentd::start(&config);
    let mut pids = vec![residentd.complete("m").worker_pid()];
    pids.extend(children(&residentd, "m"));
    residentd.complete("n");
    let start = now();
    std::thread::scope(|scope| {
        let unload = scope.spawn(|| residentd.ask("POST", "/api/v1/models/m/unload", None));
        // Meanwhile nobody else waits for it.
        let mut slowest = Duration::ZERO;
        while !unload.is_finished() {
            let asked = now();
            assert_eq!(residentd.complete("n").status, 200);
            slowest = slowest.max(asked.elapsed());
        }
        assert!(slowest < Duration::from_millis(300), "{slowest:?}");
        let answer = unload.join().expect("no panic");
        assert_eq!(answer.status, 200, "{}", answer.text());
    });
    assert!(start.elapsed() >= Duration::from_millis(400));
    for pid in pids {
        assert!(!runs(pid));
    }
}

#[test]
fn a_worker_that_floods_its_log_fills_no_disk_and_delays_nobody() {
    let flood = "--spam-lines 800000 --spam-width 200";
    let config = format!("{ROOM}{}{}", model("m", flood, ""), model("n", "", ""));
    let residentd = Residentd::start(&config);
    residentd.complete("n");
    let logs = residentd.folder().join("state/logs");
    let size = |name: &str| std::fs::metadata(logs.join(name)).map_or(0, |m| m.len());
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| residentd.complete("m"));
        let mut largest = 0;
        while !asked.is_finished() {
            assert_eq!(residentd.complete("n").status, 200);
            largest = largest.max(size("m.log") + size("m.log.1"));
        }
        assert_eq!(asked.join().expect("no panic").status, 200);
        assert!(largest < 96 << 20, "{largest} bytes of log");
    });
    wait_until("the log to be cut back", || {
        (size("m.log") <= 17 << 20 && size("m.log.1") > 0).then_some(())
    });
    // What is written in the moment of the cut is lost, so not any one line.
    wait_until("the last lines to be kept", || {
        let log = residentd.ask("GET", "/api/v1/models/m/logs", None).text();
        (log.contains("m: line 7999") || log.contains("m: ready on")).then_some(())
    });
}

#[test]
fn twenty_models_start_at_once_each_on_a_port_of_its_own() {
    let names: Vec<String> = (0..20).map(|n| format!("m{n}")).collect();
    let models: String = names
        .iter()
        .map(|name| model(name, "--ready-after 50ms", ""))
        .collect();
    let residentd = Residentd::start(&format!("{ROOM}{models}"));
    std::thread::scope(|scope| {
        let asked: Vec<_> = names
            .iter()
            .map(|name| {
                let residentd = &residentd;
                scope.spawn(move || (name, residentd.complete(name)))
            })
            .collect();
        for answer in asked {
            let (name, answer) = answer.join().expect("no panic");
            assert_eq!(answer.status, 200, "{name}: {}", answer.text());
            assert_eq!(answer.header("x-stub-name"), Some(name.as_str()));
        }
    });
    assert_eq!(residentd.memory("stats")["loaded_models"], 20);
    let mark = residentd.folder().display().to_string();
    assert!(residentd.stop().success());
    assert!(processes_with(&mark).is_empty());
}

/// A40: from the moment the worker could answer, which it stamps itself, to
/// the moment it reads the request that waited for it.
#[test]
fn a40_a_request_reaches_its_worker_within_20_ms_of_the_first_possible_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let stamp = folder.path().join("stamp");
    let flags = |more: &str| {
        format!(
            "--ready-after 200ms --ready-stamp {} {more}",
            stamp.display()
        )
    };
    let config = format!(
        "{ROOM}{}{}",
        model("talks", &flags("--listen late"), ""),
        model("silent", &flags("--silent"), ""),
    );
    let residentd = Residentd::start(&config);
    for name in ["talks", "silent"] {
        let mut took: Vec<f64> = Vec::new();
        for _ in 0..15 {
            let answer = residentd.complete(name);
            assert_eq!(answer.status, 200, "{}", answer.text());
            let received = answer.header("x-stub-received-ns");
            let received: f64 = received.and_then(|ns| ns.parse().ok()).expect("a time");
            let text = std::fs::read_to_string(&stamp).expect("the worker stamps");
            let ready: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            took.push((received - ready["monotonic_ns"].as_f64().expect("a time")) / 1e6);
            residentd.ask("POST", &format!("/api/v1/models/{name}/unload"), None);
        }
        settle(
            "A40",
            &format!("{name} worker: first answer to first byte"),
            20.0,
            took,
        );
    }
}

/// A41: from SIGKILL to the answer that a request waiting for the worker gets,
/// with reason and last lines.
#[test]
fn a41_a_request_that_waits_hears_of_a_crash_within_10_ms() {
    let names: Vec<String> = (0..15).map(|n| format!("m{n}")).collect();
    let models: String = names
        .iter()
        .map(|name| model(name, "--ready-after 60s", ""))
        .collect();
    let residentd = Residentd::start(&format!("{ROOM}{models}"));
    let mut took: Vec<f64> = Vec::new();
    for name in &names {
        let body = json!({"model": name, "prompt": "x"}).to_string();
        let mut waits = send(residentd.address(), "POST", "/v1/completions", Some(&body))
            .expect("a connection");
        let pid = wait_until("its worker to start", || residentd.worker_pid(name));
        wait_until("the worker to print", || {
            let log = residentd.ask("GET", &format!("/api/v1/models/{name}/logs"), None);
            log.text().contains("listening").then_some(())
        });
        let start = now();
        kill(pid, Signal::SIGKILL);
        let mut first = [0_u8; 2048];
        let read = std::io::Read::read(&mut waits, &mut first).expect("an answer");
        took.push(start.elapsed().as_secs_f64() * 1e3);
        let text = String::from_utf8_lossy(&first[..read]).into_owned();
        assert!(text.starts_with("HTTP/1.1 502"), "{text}");
        assert!(
            text.contains("SIGKILL") && text.contains("listening on"),
            "{text}"
        );
    }
    settle("A41", "crash to answer", 10.0, took);
}
