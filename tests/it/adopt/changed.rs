//! Who is taken back when the configuration is not what it was, at a start or by
//! a reload.

use nix::sys::signal::Signal;
use serde_json::json;

use super::{ROOM, model};
use crate::support::http::send;
use crate::support::{Residentd, runs, wait_until};

#[test]
fn a_worker_whose_model_was_changed_or_removed_is_ended_and_others_are_kept() {
    let config =
        |a: &str, more: &str| format!("{ROOM}{}{}{more}", model("a", a, ""), model("b", "", ""));
    let mut residentd = Residentd::start(&config("", &model("c", "", "")));
    let pids = ["a", "b", "c"].map(|name| residentd.complete(name).worker_pid());
    residentd.wait_until_kept("c");
    residentd.configure(&config("--anon 1MiB", ""));
    residentd.restart_after(Signal::SIGKILL);
    assert_eq!(pids.map(runs), [false, true, false]);
    let log = residentd.log();
    assert!(
        log.contains("command, environment, address or weight files were changed"),
        "{log}"
    );
    assert!(log.contains("not configured any more"), "{log}");
    assert_eq!(residentd.complete("b").worker_pid(), pids[1]);
    let fresh = residentd.complete("a");
    assert_eq!(fresh.status, 200, "{}", fresh.text());
    assert_ne!(fresh.worker_pid(), pids[0]);
}

/// Has residentd read what was configured.
fn reload(residentd: &Residentd) {
    let answer = residentd.ask("POST", "/api/v1/reload", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn a_crash_after_a_reload_takes_back_whom_the_new_configuration_would_start() {
    let first = [ROOM.to_owned(), model("a", "", ""), model("b", "", "")];
    let mut residentd = Residentd::start(&(first.concat() + &model("gone", "", "")));
    let old = ["a", "b", "gone"].map(|name| residentd.complete(name).worker_pid());
    let changed = model("a", "--anon 1MiB", "");
    let second = [
        ROOM.to_owned(),
        changed,
        model("b", "", "idle_timeout = \"1h\""),
        model("new", "", ""),
    ];
    residentd.configure(&second.concat());
    reload(&residentd);
    let pids = ["a", "b", "new"].map(|name| residentd.complete(name).worker_pid());
    assert!(pids[0] != old[0] && pids[1] == old[1]);
    wait_until("the removed one to end", || (!runs(old[2])).then_some(()));
    residentd.wait_until_kept("all");
    residentd.restart_after(Signal::SIGKILL);
    for (name, pid) in ["a", "b", "new"].iter().zip(pids) {
        let view = residentd.model(name);
        let expected = (&json!(pid), &json!(true));
        assert_eq!((&view["pid"], &view["adopted"]), expected, "{view}");
    }
    assert!(!residentd.log().contains("is not taken back"));
}

#[test]
fn a_worker_that_drains_for_a_reload_when_residentd_dies_is_ended() {
    let config = |flags: &str| ROOM.to_owned() + &model("m", flags, "");
    let mut residentd = Residentd::start(&config(""));
    let pid = residentd.complete("m").worker_pid();
    let body =
        json!({"model": "m", "prompt": "x", "stream": true, "x_chunks": 3000, "x_pace_ms": 10});
    let body = body.to_string();
    let inside = send(residentd.address(), "POST", "/v1/completions", Some(&body));
    wait_until("the request to be inside", || {
        (residentd.model("m")["in_flight"] == 1).then_some(())
    });
    residentd.configure(&config("--anon 1MiB"));
    reload(&residentd);
    residentd.wait_for_phase("m", "draining");
    residentd.restart_after(Signal::SIGKILL);
    drop(inside);
    assert!(!runs(pid));
    assert!(residentd.log().contains("weight files were changed"));
    let next = residentd.complete("m");
    assert_eq!(next.status, 200, "{}", next.text());
}

#[test]
fn settings_that_need_no_other_process_are_changed_under_the_worker() {
    let config = |more: &str| format!("{ROOM}{}", model("m", "", more));
    let mut residentd = Residentd::start(&config(""));
    let pid = residentd.complete("m").worker_pid();
    residentd.wait_until_kept("m");
    residentd.configure(&config("pinned = true\nidle_timeout = \"1h\""));
    residentd.restart_after(Signal::SIGKILL);
    let view = residentd.model("m");
    assert_eq!((&view["pid"], &view["pinned"]), (&json!(pid), &json!(true)));
}
