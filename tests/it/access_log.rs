//! The access log, and `simulate` over what was really served.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::Residentd;
use crate::support::residentd::{RESIDENTD, STUB};

/// A world with room for one of two models, each request of which is logged.
fn start() -> Residentd {
    let model = |name: &str| {
        format!(
            "[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--name\", \"{name}\", \"--anon\", \"64MiB\", \"--ready-after\", \"50ms\"]\nmemory = \"80MiB\"\n"
        )
    };
    let config = format!(
        "[memory]\nlimit = \"120MiB\"\nreserve = \"16MiB\"\n{}{}",
        model("red"),
        model("green")
    );
    Residentd::start_with(&config, &[("RESIDENTD_ACCESS_LOG", "true")])
}

fn lines(folder: &Path) -> Vec<Value> {
    let path = folder.join("state/access.jsonl");
    let text = std::fs::read_to_string(path).expect("the log is there");
    let line = |line: &str| serde_json::from_str(line).expect("a line of JSON");
    text.lines().map(line).collect()
}

fn simulate(folder: &Path, line: &str) -> (i32, String, String) {
    let output = Command::new(RESIDENTD)
        .arg("simulate")
        .args(line.split_whitespace())
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .expect("residentd runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let code = output.status.code().expect("an exit code");
    (code, text(output.stdout), text(output.stderr))
}

#[test]
fn what_was_served_is_logged_and_can_be_played_again() {
    let mut residentd = start();
    for model in ["red", "green", "red", "red"] {
        assert_eq!(residentd.complete(model).status, 200, "{model}");
    }
    let body = r#"{"model":"red","prompt":"hi","stream":true}"#;
    let streamed = residentd.ask("POST", "/v1/completions", Some(body));
    assert_eq!(streamed.status, 200);
    assert_eq!(residentd.complete("blue").status, 404, "it names no model");
    residentd.signal(Signal::SIGTERM);
    assert!(residentd.wait().success());

    let lines = lines(&residentd.folder());
    let models: Vec<_> = lines.iter().map(|line| line["model"].as_str()).collect();
    let asked = ["red", "green", "red", "red", "red"].map(Some);
    assert_eq!(models, asked);
    for line in &lines {
        assert_eq!(line["status"], 200, "{line}");
        assert_eq!(line["end"], "whole", "{line}");
        assert!(line["bytes"].as_u64() > Some(0), "{line}");
        assert!(line["duration_s"].as_f64() < Some(5.0), "{line}");
    }
    let wait = |nth: usize| lines[nth]["wait_s"].as_f64().expect("a number");
    assert!(wait(0) > 0.04, "it loads for 50 ms");
    assert!(wait(3) < 0.04, "it was ready");
    let streams: Vec<_> = lines.iter().map(|line| line["stream"] == true).collect();
    assert_eq!(streams, [false, false, false, false, true]);

    let line = "--log state/access.jsonl --config residentd.toml --serial --json";
    let (code, page, errors) = simulate(&residentd.folder(), line);
    assert_eq!((code, errors.as_str()), (0, ""), "loads were seen");
    let page: Value = serde_json::from_str(&page).expect("JSON");
    let run = &page["results"][0];
    assert_eq!(run["limit_bytes"], 120 << 20, "the configured one: {run}");
    assert_eq!(run["loads"], 3, "as it was: {run}");
    assert_eq!(run["requests"], 5, "{run}");
    let seconds = run["load_seconds"].as_f64().expect("a number");
    assert!(
        (0.15..5.0).contains(&seconds),
        "loads as long as seen: {run}"
    );
    let line = "--log state/access.jsonl --config residentd.toml --limit 200MiB --json";
    let (_, page, _) = simulate(&residentd.folder(), line);
    assert!(page.contains("\"loads\": 2"), "both fit: {page}");
}

#[test]
fn what_a_residentd_learned_that_was_killed_is_known_all_the_same() {
    let mut residentd = start();
    assert_eq!(residentd.complete("red").status, 200);
    let left_behind = residentd.complete("green").worker_pid();
    // What the first life taught is written a moment after its end.
    residentd.eviction("red");
    crate::support::pause(std::time::Duration::from_millis(200));
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    crate::support::kill(left_behind, Signal::SIGKILL);
    let line = "--log state/access.jsonl --config residentd.toml --json";
    let (code, _, errors) = simulate(&residentd.folder(), line);
    assert_eq!((code, errors.as_str()), (0, ""), "both loads were seen");
}

#[test]
fn while_residentd_runs_its_state_is_not_touched_and_that_is_told() {
    let residentd = start();
    assert_eq!(residentd.complete("red").status, 200);
    crate::support::wait_until("a line in the log", || {
        (!lines(&residentd.folder()).is_empty()).then_some(())
    });
    let line = "--log state/access.jsonl --config residentd.toml --json";
    let (code, page, errors) = simulate(&residentd.folder(), line);
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("another residentd uses it"), "{errors}");
    assert!(errors.contains("load times are estimated"), "{errors}");
    assert!(page.contains("\"loads\": 1"), "{page}");
}

#[test]
fn a_model_of_unknown_size_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).expect("it can be written");
    };
    write("c.toml", "[models.mystery]\ncommand = \"true ${PORT}\"\n");
    write(
        "a.jsonl",
        "{\"time\":1,\"model\":\"mystery\",\"duration_s\":1}\n",
    );
    let (code, _, errors) = simulate(folder.path(), "--log a.jsonl --config c.toml");
    assert_eq!(code, 2, "{errors}");
    let wanted = "how much memory mystery needs; declare models.NAME.memory";
    assert!(errors.contains(wanted), "{errors}");
}

#[test]
fn who_leaves_or_is_refused_while_the_model_loads_has_asked_for_it_all_the_same() {
    let residentd = Residentd::start_with(
        &format!(
            "[models.slow]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--ready-after\", \"60s\"]\nmemory = \"32MiB\"\nqueue_timeout = \"300ms\"\n"
        ),
        &[("RESIDENTD_ACCESS_LOG", "true")],
    );
    let body = r#"{"model":"slow"}"#;
    let mut client = std::net::TcpStream::connect(residentd.address()).expect("it listens");
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n";
    let length = body.len();
    write!(client, "{head}content-length: {length}\r\n\r\n{body}").expect("it is sent");
    residentd.wait_for_phase("slow", "starting");
    drop(client);
    assert_eq!(residentd.complete("slow").status, 503);
    let both = crate::support::wait_until("two lines in the log", || {
        let lines = lines(&residentd.folder());
        (lines.len() == 2).then_some(lines)
    });
    let told: Vec<_> = both
        .iter()
        .map(|line| {
            (
                line["end"].as_str(),
                line["status"].as_u64(),
                line["code"].as_str(),
            )
        })
        .collect();
    let refused = (Some("refused"), Some(503), Some("queue_timeout"));
    assert_eq!(told, [(Some("left"), Some(499), None), refused]);
}

#[test]
fn without_the_key_nothing_is_logged() {
    let residentd = Residentd::start(&format!(
        "[models.red]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\"]\nmemory = \"32MiB\"\n"
    ));
    assert_eq!(residentd.complete("red").status, 200);
    assert!(!residentd.folder().join("state/access.jsonl").exists());
}
