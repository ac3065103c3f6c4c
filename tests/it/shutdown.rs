//! The end of residentd: requests finish, whole trees go, a second signal is
//! at once; and as the first process of a container (A43).

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::http::{self, Begun, finish};
use crate::support::residentd::{RESIDENTD, STUB};
use crate::support::{Residentd, kill, now, processes_with, runs, wait_until};

fn config(mark: &str, grace: &str, flags: &str) -> String {
    format!(
        "shutdown_grace = \"{grace}\"\n[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name {mark} --child --daemon-child {flags}'\nmemory = \"48MiB\"\nstop_timeout = \"5s\"\n"
    )
}

/// A residentd whose `[server]` begins with the grace.
fn start(config: &str) -> Residentd {
    let folder = tempfile::tempdir().expect("a folder");
    let file = write(&folder, config);
    let mut serve = Command::new(RESIDENTD);
    serve.args(["serve", "--config"]).arg(file);
    serve.current_dir(folder.path());
    Residentd::launch(folder, serve)
}

fn write(folder: &tempfile::TempDir, config: &str) -> PathBuf {
    let file = folder.path().join("residentd.toml");
    let state = folder.path().join("state");
    let head = format!("[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\n");
    std::fs::write(&file, head + config).expect("written");
    file
}

/// A name that only this test's workers have.
fn mark(test: &str) -> String {
    format!("{test}-{}", std::process::id())
}

/// Begins a stream of so many events, 10 ms apart.
fn begin(residentd: &Residentd, chunks: u32) -> Begun {
    http::begin(residentd.address(), "m", chunks)
}

#[test]
fn a43_streams_finish_within_the_grace_then_whole_trees_end_with_exit_code_0() {
    let mark = mark("a43-grace");
    let mut residentd = start(&config(&mark, "20s", ""));
    let pid = residentd.complete("m").worker_pid();
    assert!(processes_with(&mark).len() >= 2, "a worker and its daemon");
    let streams: Vec<_> = (0..4).map(|_| begin(&residentd, 120)).collect();
    residentd.signal(Signal::SIGTERM);
    wait_until("readiness to be false", || {
        let ready = residentd.ask("GET", "/readyz", None);
        (ready.status == 503).then_some(())
    });
    assert_eq!(residentd.ask("GET", "/livez", None).status, 200);
    let refused = residentd.complete("m");
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (503, &json!("draining"))
    );
    let reload = residentd.ask("POST", "/api/v1/reload", None);
    assert_eq!(reload.status, 503, "{}", reload.text());
    assert!(runs(pid), "it still streams");
    for stream in streams {
        let answer = finish(stream);
        let events = answer.text().matches("data: ").count();
        assert_eq!((answer.complete, events), (true, 121), "{}", answer.text());
    }
    assert_eq!(residentd.wait().code(), Some(0));
    assert_eq!(processes_with(&mark), [] as [i64; 0]);
}

#[test]
fn a43_streams_over_the_grace_are_cut_and_never_end_cleanly() {
    let mark = mark("a43-over");
    let mut residentd = start(&config(&mark, "200ms", ""));
    residentd.complete("m");
    let stream = begin(&residentd, 100_000);
    residentd.signal(Signal::SIGTERM);
    assert!(!finish(stream).complete);
    assert_eq!(residentd.wait().code(), Some(0));
    assert_eq!(processes_with(&mark), [] as [i64; 0]);
}

#[test]
fn a43_a_second_signal_ends_everything_at_once_also_a_worker_that_ignores_sigterm() {
    for second in [Signal::SIGTERM, Signal::SIGINT] {
        let mark = mark("a43-second");
        let mut residentd = start(&config(&mark, "10m", "--ignore-term --child-ignore-term"));
        residentd.complete("m");
        let stream = begin(&residentd, 100_000);
        residentd.signal(Signal::SIGTERM);
        wait_until("readiness to be false", || {
            (residentd.ask("GET", "/readyz", None).status == 503).then_some(())
        });
        let start = now();
        residentd.signal(second);
        assert_eq!(residentd.wait().code(), Some(0));
        // Its stop_timeout alone would be five seconds.
        let took = start.elapsed();
        assert!(took < Duration::from_secs(4), "{took:?}");
        assert!(!finish(stream).complete);
        assert_eq!(processes_with(&mark), [] as [i64; 0]);
    }
}

/// Says that this machine cannot show it.
#[expect(clippy::print_stdout, reason = "the harness reads it")]
fn skip(why: &str) {
    println!("SKIPPED A43: no PID namespace can be made: {why}");
}

/// The processes of a PID namespace, with the state of each.
fn namespace(of: i64) -> Vec<(i64, char)> {
    let space = |pid: i64| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(ours) = space(of) else {
        return Vec::new();
    };
    let entries = std::fs::read_dir("/proc").expect("it is mounted");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i64>().ok());
    let state = |pid: i64| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    };
    // A zombie has no namespace to look at any more, but still a parent.
    let parent = |pid: i64| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let rest = stat.rsplit(") ").next()?.to_owned();
        rest.split(' ').nth(1)?.parse::<i64>().ok()
    };
    let inside = pids.filter(|pid| space(*pid).as_ref() == Some(&ours) || parent(*pid) == Some(of));
    inside
        .filter_map(|pid| Some((pid, state(pid)?)))
        .filter(|(pid, _)| *pid != of)
        .collect()
}

/// Starts residentd as the first process of a PID namespace, with one model
/// whose worker a shell starts, and returns it with its own pid as seen from
/// here; `None` where no namespace can be made.
fn first_process(worker: &str) -> Option<(Residentd, i64)> {
    let unshare = ["--pid", "--fork", "--mount-proc", "--kill-child"];
    let can = Command::new("unshare").args(unshare).arg("true").output();
    if let Err(why) = can.map_err(|error| error.to_string()).and_then(|done| {
        let why = String::from_utf8_lossy(&done.stderr).into_owned();
        done.status.success().then_some(()).ok_or(why)
    }) {
        skip(&why);
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let text = format!(
        "shutdown_grace = \"20s\"\n[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = [\"sh\", \"-c\", \"{worker}\"]\nmemory = \"48MiB\"\n"
    );
    let file = write(&folder, &text);
    let mut serve = Command::new("unshare");
    serve.args(unshare).arg(RESIDENTD);
    serve.args(["serve", "--config"]).arg(file);
    serve.current_dir(folder.path());
    let residentd = Residentd::launch(folder, serve);
    let children = format!("/proc/{0}/task/{0}/children", residentd.pid());
    let first = std::fs::read_to_string(children).expect("unshare runs");
    let first = first.trim().parse().expect("one child");
    Some((residentd, first))
}

#[test]
fn a43_as_the_first_process_it_reaps_strangers_and_what_daemons_leave_in_any_order() {
    let mark = mark("a43-orphans");
    // Daemons that end by themselves, one after the other, whose parents are
    // long gone: the last of them after the worker.
    let daemons = "for t in 0.1 0.3 30; do (setsid sh -c 'sleep '$t' & sleep '$t'' &); done";
    let worker =
        format!("{daemons}; exec {STUB} --port ${{PORT}} --name {mark} --child --daemon-child");
    let Some((mut residentd, first)) = first_process(&worker) else {
        return;
    };
    let zombies = || {
        let all = namespace(first).into_iter();
        all.filter(|(_, state)| *state == 'Z').count()
    };
    for _ in 0..3 {
        // Loaded by hand, since it has to rest after two crashes.
        residentd.ask("POST", "/api/v1/models/m/load", None);
        let pid = residentd.complete("m").worker_pid();
        // A stranger comes as an orphan and ends: nobody else would reap it.
        let enter = ["--pid", "--mount", "--target", &first.to_string()].map(str::to_owned);
        let stranger = Command::new("nsenter")
            .args(enter)
            .args(["sh", "-c", "(sleep 0.1 &)"])
            .status();
        assert!(stranger.expect("nsenter is there").success());
        wait_until("what ended to be reaped", || (zombies() == 0).then_some(()));
        // The worker dies in the midst of its family.
        let inside = namespace(first);
        let seen = |outer: &i64| {
            let status = std::fs::read_to_string(format!("/proc/{outer}/status"));
            let status = status.unwrap_or_default();
            let line = status.lines().find(|line| line.starts_with("NSpid:"));
            line.is_some_and(|line| line.ends_with(&format!("\t{pid}")))
        };
        let worker = inside.iter().map(|(outer, _)| *outer).find(seen);
        kill(worker.expect("it runs"), Signal::SIGKILL);
        wait_until("everything but the first process to be reaped", || {
            namespace(first).is_empty().then_some(())
        });
    }
    kill(first, Signal::SIGTERM);
    assert_eq!(residentd.wait().code(), Some(0));
    assert_eq!(processes_with(&mark), [] as [i64; 0]);
}

#[test]
fn a43_as_the_first_process_of_a_pid_namespace_it_leaves_no_zombie_and_ends_with_0() {
    let mark = mark("a43-first");
    // Beside its family it leaves an orphan that ends by itself.
    let worker = format!(
        "(sleep 0.2 &) ; exec {STUB} --port ${{PORT}} --name {mark} --child --daemon-child"
    );
    let Some((mut residentd, first)) = first_process(&worker) else {
        return;
    };

    assert_eq!(residentd.complete("m").status, 200);
    assert!(namespace(first).len() >= 3, "{:?}", namespace(first));
    residentd.ask("POST", "/api/v1/models/m/unload", None);
    wait_until("everything but the first process to be reaped", || {
        namespace(first).is_empty().then_some(())
    });
    residentd.complete("m");
    let stream = begin(&residentd, 60);
    kill(first, Signal::SIGTERM);
    let answer = finish(stream);
    assert!(answer.complete, "{}", answer.text());
    assert_eq!(residentd.wait().code(), Some(0));
    assert_eq!(processes_with(&mark), [] as [i64; 0]);
}

#[test]
fn a43_as_the_first_process_it_stays_after_an_upgrade_and_goes_on_reaping() {
    let mark = mark("a43-upgrade");
    let worker = format!("(sleep 0.2 &) ; exec {STUB} --port ${{PORT}} --name {mark} --child");
    let Some((mut residentd, first)) = first_process(&worker) else {
        return;
    };
    let pid = residentd.complete("m").worker_pid();
    for _ in 0..2 {
        let upgraded = residentd.ask("POST", "/api/v1/upgrade", None);
        assert_eq!(upgraded.status, 200, "{}", upgraded.text());
        assert_eq!(residentd.complete("m").worker_pid(), pid);
    }
    // The worker is a child of the first, and known to the last alone.
    let unloaded = residentd.ask("POST", "/api/v1/models/m/unload", None);
    assert_eq!(unloaded.status, 200, "{}", unloaded.text());
    wait_until("two residentds and no zombie", || {
        let inside = namespace(first);
        let zombies = inside.iter().any(|(_, state)| *state == 'Z');
        (inside.len() == 1 && !zombies).then_some(())
    });
    assert_eq!(residentd.complete("m").status, 200);
    kill(first, Signal::SIGTERM);
    assert_eq!(residentd.wait().code(), Some(0));
    assert_eq!(processes_with(&mark), [] as [i64; 0]);
}
