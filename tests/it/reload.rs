//! Reload with real workers: by diff, while requests run (A44).

mod sources;

use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::http::send;
use crate::support::residentd::{STUB, command};
use crate::support::{Answer, Residentd, pause, runs, wait_until};

/// A residentd whose configuration a test changes.
struct Changing {
    residentd: Residentd,
    head: String,
    file: PathBuf,
}

impl Changing {
    /// Starts with these lines after the head; files are watched only when the
    /// test is about that.
    fn start(config: &str, watch: bool) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let file = folder.path().join("residentd.toml");
        let state = folder.path().join("state");
        let head = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\nlog_level = \"debug\"\nwatch_config = {watch}\n"
        );
        std::fs::write(&file, format!("{head}{config}")).expect("written");
        let mut serve = command(&file, &[]);
        serve.current_dir(folder.path());
        Self {
            residentd: Residentd::launch(folder, serve),
            head,
            file,
        }
    }

    fn write(&self, config: &str) {
        std::fs::write(&self.file, format!("{}{config}", self.head)).expect("written");
    }

    fn reload(&self) -> Answer {
        self.residentd.ask("POST", "/api/v1/reload", None)
    }

    /// Writes and reloads, which has to succeed. Returns what was changed.
    fn change(&self, config: &str) -> Value {
        self.write(config);
        let answer = self.reload();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["data"].clone()
    }

    fn metric(&self, line: &str) -> bool {
        let page = self.residentd.ask("GET", "/metrics", None).text();
        page.lines().any(|have| have == line)
    }
}

/// A model of its own worker, with more flags for that and more keys.
fn model(name: &str, flags: &str, keys: &str) -> String {
    format!(
        "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} {flags}'\nmemory = \"24MiB\"\n{keys}\n"
    )
}

/// Room for all, and these models.
fn roomy(models: &[String]) -> String {
    let memory = "[memory]\nlimit = \"600MiB\"\nreserve = \"16MiB\"\n";
    format!("{memory}{}", models.concat())
}

/// A stream of so many events, all 10 ms apart.
fn stream_body(model: &str, chunks: u32) -> String {
    json!({"model": model, "prompt": "x", "stream": true, "x_chunks": chunks, "x_pace_ms": 10})
        .to_string()
}

/// Reads a whole stream, and tells when it has begun.
fn stream(address: &str, model: &str, chunks: u32, begun: &AtomicU64) -> Answer {
    let body = stream_body(model, chunks);
    let mut stream = send(address, "POST", "/v1/completions", Some(&body)).expect("a connection");
    let mut raw = vec![0_u8; 64];
    let read = stream.read(&mut raw).expect("it begins");
    raw.truncate(read);
    begun.fetch_add(1, Ordering::SeqCst);
    stream.read_to_end(&mut raw).expect("it ends");
    Answer::parse(&raw).expect("an answer")
}

fn assert_whole(answer: &Answer, chunks: u32, what: &str) {
    let events = answer.text().matches("data: ").count();
    let expected = usize::try_from(chunks).expect("small") + 1;
    assert_eq!(
        (answer.status, answer.complete, events),
        (200, true, expected),
        "{what}"
    );
}

const TEN: [&str; 10] = ["m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "m9"];

#[test]
fn a44_of_ten_models_under_load_the_one_that_changed_drains_and_nine_keep_pid_and_streams() {
    const CHUNKS: u32 = 150;
    let ten = |flags: &str| {
        let of = |name: &&str| model(name, if **name == *"m4" { flags } else { "" }, "");
        roomy(&TEN.iter().map(of).collect::<Vec<_>>())
    };
    let changing = Changing::start(&ten(""), false);
    let residentd = &changing.residentd;
    let before = TEN.map(|name| residentd.complete(name).worker_pid());
    let (begun, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let begun = &begun;
        let streams = TEN.map(|name| {
            let address = residentd.address();
            scope.spawn(move || stream(address, name, CHUNKS, begun))
        });
        // Short requests all the while, on every model.
        let load = TEN.map(|name| {
            let over = &over;
            scope.spawn(move || {
                let mut pids = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let answer = residentd.complete(name);
                    assert_eq!(answer.status, 200, "{name}: {}", answer.text());
                    assert!(answer.complete);
                    pids.push(answer.worker_pid());
                    pause(Duration::from_millis(10));
                }
                pids
            })
        });
        wait_until("all streams have begun", || {
            (begun.load(Ordering::SeqCst) == 10).then_some(())
        });
        let told = changing.change(&ten("--comm changed"));
        assert_eq!(
            told["changed"],
            json!([{"name": "m4", "keys": ["command"], "takes": "new_worker"}])
        );
        assert_eq!((&told["added"], &told["removed"]), (&json!([]), &json!([])));
        for (answer, (name, pid)) in streams.into_iter().zip(TEN.iter().zip(before)) {
            let answer = answer.join().expect("no panic");
            assert_whole(&answer, CHUNKS, name);
            assert_eq!(answer.worker_pid(), pid, "{name}");
        }
        let after = wait_until("the changed model is back", || {
            let model = residentd.model("m4");
            let is_new = model["phase"] == "ready" && model["pid"].as_i64() != Some(before[4]);
            model["pid"].as_i64().filter(|_| is_new)
        });
        let line = std::fs::read_to_string(format!("/proc/{after}/comm")).expect("it runs");
        assert_eq!(line.trim(), "changed");
        assert!(!runs(before[4]));
        over.store(true, Ordering::Relaxed);
        for (pids, (name, pid)) in load.into_iter().zip(TEN.iter().zip(before)) {
            let pids = pids.join().expect("no panic");
            let may_be = |seen: &i64| *seen == pid || (*name == "m4" && *seen == after);
            assert!(pids.iter().all(may_be), "{name}: {pid} {after} in {pids:?}");
        }
    });
    for (name, pid) in TEN.iter().zip(before).filter(|(name, _)| **name != "m4") {
        let model = residentd.model(name);
        assert_eq!(model["pid"].as_i64(), Some(pid), "{name}");
        assert_eq!(
            (&model["loads"], &model["evictions"]),
            (&json!(1), &json!(0))
        );
    }
    assert!(changing.metric("residentd_config_reloads_total{result=\"success\"} 1"));
}

#[test]
fn a44_an_invalid_file_changes_nothing_and_everything_is_told_by_api_signal_and_command() {
    let good = roomy(&[model("a", "", "")]);
    let changing = Changing::start(&good, false);
    let residentd = &changing.residentd;
    let pid = residentd.complete("a").worker_pid();
    changing.write(
        "[memory]\nlimit = \"much\"\n[models.a]\ncommand = ['x', '${PORT}']\nidle_timeot = \"1m\"\n[models.b]\n",
    );
    let keys = ["memory.limit", "models.a.idle_timeot", "models.b"];
    let answer = changing.reload();
    assert_eq!(answer.status, 422, "{}", answer.text());
    let error = answer.json()["error"].clone();
    assert_eq!(error["code"], "invalid_config");
    let problems = error["problems"].as_array().expect("a list").clone();
    for key in keys {
        let of_key = |p: &&Value| p["key"] == key && p["severity"] == "error";
        let problem = problems.iter().find(of_key);
        let problem = problem.unwrap_or_else(|| panic!("{key} in {error}"));
        let text = problem["message"].as_str().expect("a text");
        assert!(text.contains("residentd.toml:"), "{text}");
    }
    assert!(error.to_string().contains("did you mean"), "{error}");

    residentd.signal(Signal::SIGHUP);
    wait_until("the signal's reload to be counted", || {
        let line = "residentd_config_reloads_total{result=\"failure\"} 2";
        changing.metric(line).then_some(())
    });
    assert!(changing.metric("residentd_config_last_reload_successful 0"));
    let events = residentd
        .ask("GET", "/api/v1/events?kind=reload", None)
        .json();
    let told = &events["data"]["events"][1];
    assert_eq!(
        (&told["reason"], &told["origin"]),
        (&json!("invalid"), &json!("signal"))
    );
    assert_eq!(
        told["problems"].as_array().map(Vec::len),
        Some(problems.len())
    );
    for key in keys {
        assert!(residentd.log().contains(key), "{key}");
    }

    let (code, _, said) = residentd_reload(residentd, &[]);
    assert_eq!(code, Some(2), "{said}");
    for key in keys {
        assert!(said.contains(key), "{said}");
    }
    assert_eq!(residentd.complete("a").worker_pid(), pid);
    assert_eq!(residentd.complete("b").status, 404);

    let told = changing.change(&good);
    assert_eq!(told["message"], "nothing is different");
    assert!(changing.metric("residentd_config_last_reload_successful 1"));
    assert_eq!(residentd.complete("a").worker_pid(), pid);
}

/// Runs `residentd reload`. Returns its code and what it printed.
fn residentd_reload(residentd: &Residentd, more: &[&str]) -> (Option<i32>, String, String) {
    let done = std::process::Command::new(crate::support::residentd::RESIDENTD)
        .args(["reload", "--server"])
        .arg(format!("http://{}", residentd.address()))
        .args(more)
        .output()
        .expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (done.status.code(), text(done.stdout), text(done.stderr))
}

#[test]
fn a44_models_are_added_and_removed_aliases_move_and_a_dry_run_changes_nothing() {
    let changing = Changing::start(
        &roomy(&[
            model("a", "", "aliases = [\"fast\"]"),
            model("b", "", ""),
            model("gone", "", ""),
        ]),
        false,
    );
    let residentd = &changing.residentd;
    let [a, b, gone] = ["a", "b", "gone"].map(|name| residentd.complete(name).worker_pid());
    assert_eq!(residentd.complete("fast").worker_pid(), a);
    changing.write(&roomy(&[
        model("a", "", ""),
        model("b", "", "aliases = [\"fast\"]"),
        model("new", "", "preload = true"),
    ]));
    let (code, said, _) = residentd_reload(residentd, &["--dry-run"]);
    assert_eq!(code, Some(0));
    let expected = "the configuration would be reloaded\nadded new\nremoved gone\nchanged a: aliases; at once\nchanged b: aliases; at once\n";
    assert_eq!(said, expected);
    assert_eq!(residentd.complete("fast").worker_pid(), a);
    assert_eq!(residentd.complete("gone").worker_pid(), gone);

    assert_eq!(residentd_reload(residentd, &[]).0, Some(0));
    assert_eq!(residentd.complete("fast").worker_pid(), b);
    let refused = residentd.complete("gone");
    assert_eq!(refused.json()["error"]["code"], "model_not_found");
    let listed = residentd.ask("GET", "/v1/models", None).text();
    assert!(listed.contains("\"new\"") && !listed.contains("\"gone\""));
    residentd.wait_for_phase("new", "ready");
    wait_until("the removed model's worker to be gone", || {
        (!runs(gone)).then_some(())
    });
    wait_until("the removed model to be forgotten", || {
        let models = residentd.memory("models");
        (models["total_count"] == 3).then_some(())
    });
    let loads = "residentd_loads_total 4";
    assert!(changing.metric(loads), "counters do not fall");
    assert_eq!(residentd.model("a")["pid"].as_i64(), Some(a));
    assert_eq!(residentd.model("b")["pid"].as_i64(), Some(b));
}

#[test]
fn a44_who_waits_for_a_removed_model_is_told_and_a_changed_load_begins_anew() {
    let slow = "--ready-after 60s";
    let changing = Changing::start(
        &roomy(&[model("gone", slow, ""), model("slow", slow, "")]),
        false,
    );
    let residentd = &changing.residentd;
    std::thread::scope(|scope| {
        let gone = scope.spawn(|| residentd.complete("gone"));
        let waits = scope.spawn(|| residentd.complete("slow"));
        let first = ["gone", "slow"].map(|name| {
            wait_until("both to load, and to be waited for", || {
                let model = residentd.model(name);
                let waits = model["phase"] == "starting" && model["queued"] == 1;
                model["pid"].as_i64().filter(|_| waits)
            })
        });
        let told = changing.change(&roomy(&[model("slow", "", "")]));
        assert_eq!(told["removed"], json!(["gone"]));
        let gone = gone.join().expect("no panic");
        assert_eq!(gone.json()["error"]["code"], "model_not_found");
        let answer = waits.join().expect("no panic");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_ne!(answer.worker_pid(), first[1]);
        wait_until("the old processes to be gone", || {
            (!runs(first[0]) && !runs(first[1])).then_some(())
        });
    });
}

#[test]
fn a44_limit_and_patience_change_at_once_an_operators_limit_stays_and_listen_needs_a_restart() {
    let with = |limit: &str, patience: &str| {
        let models = [model("a", "", ""), model("b", "", "")];
        format!(
            "[memory]\nlimit = \"{limit}\"\nreserve = \"16MiB\"\npatience = \"{patience}\"\n{}",
            models.concat()
        )
    };
    let changing = Changing::start(&with("200MiB", "60s"), false);
    let residentd = &changing.residentd;
    let a = residentd.complete("a").worker_pid();
    let b = residentd.complete("b").worker_pid();
    let told = changing.change(&with("28MiB", "60s"));
    assert_eq!(told["settings"], json!(["memory.limit"]));
    // Two idle stubs hold a few MiB each, so it takes less to be too much.
    assert_eq!(residentd.memory("stats")["memory_limit"], 28 << 20);
    assert!(runs(a) && runs(b));
    changing.change(&with("3MiB", "60s").replace("24MiB", "1MiB"));
    wait_until("both to be evicted", || {
        (!runs(a) && !runs(b)).then_some(())
    });
    assert_eq!(residentd.eviction("a"), "pressure");

    // With room for one, a stream keeps the other out for as long as patience.
    changing.change(&with("40MiB", "60s"));
    let begun = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| stream(residentd.address(), "a", 100, &begun));
        wait_until("the stream has begun", || {
            (begun.load(Ordering::SeqCst) == 1).then_some(())
        });
        let waits = scope.spawn(|| residentd.complete("b"));
        wait_until("the other waits", || {
            (residentd.model("b")["queued"] == 1).then_some(())
        });
        assert_eq!(residentd.model("a")["phase"], "ready");
        changing.change(&with("40MiB", "0s"));
        residentd.wait_for_phase("a", "draining");
        assert_whole(&busy.join().expect("no panic"), 100, "a");
        assert_eq!(waits.join().expect("no panic").status, 200);
    });

    let set = residentd.ask("POST", "/api/v1/memory/limit?limit_gb=0.5", None);
    assert_eq!(set.status, 200);
    let moved = with("80MiB", "0s");
    let head = changing.head.replace("127.0.0.1:0", "127.0.0.1:1");
    std::fs::write(&changing.file, head + &moved).expect("written");
    let told = changing.reload().json()["data"].clone();
    assert_eq!(told["needs_restart"], json!(["server.listen"]));
    let stats = residentd.memory("stats");
    assert_eq!(
        (&stats["memory_limit"], &stats["limit_source"]),
        (&json!(512 << 20), &json!("api"))
    );
    let again = changing.reload().json()["data"].clone();
    assert_eq!(
        again["needs_restart"],
        json!(["server.listen"]),
        "until it is done"
    );
}

#[test]
fn a44_requests_that_race_with_the_removal_of_their_model_get_one_whole_answer_each() {
    let with = roomy(&[model("stays", "", ""), model("comes", "", "")]);
    let without = roomy(&[model("stays", "", "")]);
    let changing = Changing::start(&with, false);
    let residentd = &changing.residentd;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut answered = [0_u32; 2];
                    while !over.load(Ordering::Relaxed) {
                        let answer = residentd.complete("comes");
                        assert!(answer.complete, "{}", answer.text());
                        match answer.status {
                            200 => answered[0] += 1,
                            404 => answered[1] += 1,
                            other => panic!("{other}: {}", answer.text()),
                        }
                    }
                    answered
                })
            })
            .collect();
        let stays = residentd.complete("stays").worker_pid();
        for _ in 0..8 {
            wait_until("a worker serves", || {
                (residentd.complete("comes").status == 200).then_some(())
            });
            changing.change(&without);
            assert_eq!(residentd.complete("comes").status, 404);
            changing.change(&with);
        }
        over.store(true, Ordering::Relaxed);
        for answered in load {
            let answered = answered.join().expect("no panic");
            assert!(answered[0] > 0, "{answered:?}");
        }
        assert_eq!(residentd.complete("stays").worker_pid(), stays);
    });
}
