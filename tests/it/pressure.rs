//! Memory pressure in a real cgroup: idle workers go before the kernel's OOM
//! killer comes, and limits that change are followed.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::support::cgroup::MemoryCgroup;
use crate::support::residentd::{STUB, command};
use crate::support::{Residentd, kill, now, repeats, runs, wait_until};

const MIB: u64 = 1 << 20;

/// A process that is ended when this is dropped.
struct Neighbour(Child);

impl Neighbour {
    /// Starts one that takes this much at 100 MiB a second at most.
    fn eats(cgroup: &MemoryCgroup, mib: u64) -> Self {
        let mut stub = Command::new(STUB);
        stub.args(["--listen", "late", "--anon-pause", "20ms"])
            .arg(format!("--anon={mib}MiB"));
        let child = cgroup
            .within(&stub)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the stub runs");
        Self(child)
    }

    /// Waits until it has all or is dead; true when it has.
    fn succeeds(&mut self) -> bool {
        let output = self.0.stdout.as_mut().expect("it is piped");
        // It says where it listens once it has loaded.
        BufReader::new(output).lines().next().is_some()
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// residentd in the cgroup, with four models of 40 MiB.
fn residentd(cgroup: &MemoryCgroup, more: &str) -> Residentd {
    let folder = tempfile::tempdir().expect("a folder for the test");
    let file = folder.path().join("residentd.toml");
    let state = folder.path().join("state");
    let head = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\n[memory]\nreserve = \"16MiB\"\nlimit = \"2GiB\"\n{more}\n"
    );
    let models = MODELS.map(|name| {
        format!(
            "[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--name\", \"{name}\", \"--anon\", \"40MiB\"]\nmemory = \"44MiB\"\n"
        )
    });
    let config = head + &models.concat();
    std::fs::write(&file, config).expect("the config can be written");
    let mut command = command(&file, &[]);
    command.current_dir(folder.path());
    let command = cgroup.within(&command);
    Residentd::launch(folder, command)
}

const MODELS: [&str; 4] = ["a", "b", "c", "d"];

/// Makes a cgroup, or says why this machine has none; then nothing can be
/// shown here.
#[expect(clippy::print_stdout, reason = "a test that cannot be run says so")]
fn cgroup(claim: &str, limit: u64) -> Option<MemoryCgroup> {
    match MemoryCgroup::new(limit) {
        Ok(cgroup) => Some(cgroup),
        Err(why) => {
            println!("SKIPPED {claim}: no memory cgroup can be made: {why}");
            None
        }
    }
}

/// What came of one neighbour that needs the room of three of four workers.
struct Outcome {
    kills: u64,
    has_it_all: bool,
    survivors: usize,
    reasons: Vec<Value>,
}

fn squeeze(cgroup: &MemoryCgroup, config: &str) -> Outcome {
    let residentd = residentd(cgroup, config);
    let workers: Vec<i64> = MODELS
        .map(|name| residentd.complete(name).worker_pid())
        .into();
    let mut neighbour = Neighbour::eats(cgroup, 240);
    let has_it_all = neighbour.succeeds();
    let reasons = MODELS.map(|name| residentd.model(name)["last_eviction"]["reason"].clone());
    Outcome {
        kills: cgroup.oom_kills(),
        has_it_all,
        survivors: workers.iter().filter(|pid| runs(**pid)).count(),
        reasons: reasons.into(),
    }
}

#[test]
fn a20_idle_workers_go_before_the_oom_killer_comes_and_it_comes_when_that_is_off() {
    let limit = 400 * MIB;
    let Some(first) = cgroup("A20", limit) else {
        return;
    };
    drop(first);
    let runs = repeats().unwrap_or(2);
    let mut good = 0;
    for run in 0..runs {
        let cgroup = MemoryCgroup::new(limit).expect("as just before");
        let outcome = squeeze(&cgroup, "");
        assert_eq!(outcome.kills, 0, "run {run}: {:?}", outcome.reasons);
        assert!(outcome.has_it_all, "run {run}: the neighbour was ended");
        let pressed = outcome
            .reasons
            .iter()
            .filter(|reason| **reason == "pressure");
        assert!(pressed.count() >= 1, "{:?}", outcome.reasons);
        good += 1;
    }
    let cgroup = MemoryCgroup::new(limit).expect("as just before");
    let off = "auto_cleanup = false\n[pressure]\nemergency = false";
    let outcome = squeeze(&cgroup, off);
    assert!(
        outcome.kills > 0,
        "without it the kernel has to end somebody"
    );
    println!(
        "FIGURE A20 {good} of {runs} runs without an OOM kill; with pressure handling off {} kills, {} of 4 workers left",
        outcome.kills, outcome.survivors
    );
}

#[test]
fn idle_workers_go_also_when_memory_high_is_the_limit() {
    // It was not looked at: nobody went.
    let Some(cgroup) = cgroup("memory.high", 1024 * MIB) else {
        return;
    };
    if let Err(why) = cgroup.slow_over(400 * MIB) {
        println!("SKIPPED memory.high: {why}");
        return;
    }
    let start = now();
    let outcome = squeeze(&cgroup, "");
    assert!(outcome.has_it_all);
    assert!(
        outcome.reasons.iter().any(|reason| *reason == "pressure"),
        "{:?} after {:?}",
        outcome.reasons,
        start.elapsed()
    );
    println!(
        "FIGURE memory.high {} of 4 workers left, all done in {} ms",
        outcome.survivors,
        start.elapsed().as_millis()
    );
}

#[test]
fn a19_the_limit_follows_the_cgroup_down_within_two_ticks_and_up_again() {
    let Some(cgroup) = cgroup("A19", 500 * MIB) else {
        return;
    };
    let big = format!(
        "[models.big]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\"]\nmemory = \"300MiB\"\n"
    );
    let residentd = residentd(&cgroup, &big);
    let workers: Vec<i64> = MODELS
        .map(|name| residentd.complete(name).worker_pid())
        .into();
    wait_until("a calm moment", || {
        let models = residentd.memory("models");
        let total = residentd.memory("stats")["total_memory_usage"].as_u64()?;
        (models["loaded_count"] == 4 && total > 160 * MIB).then_some(())
    });
    // Workers, residentd and what cannot be dropped fill most of this.
    let system = residentd.memory("system");
    let working = system["cgroup"]["working_set"].as_u64().expect("a number");
    let limit = working + 12 * MIB;
    let shrunk = now();
    cgroup.set_limit(limit);
    wait_until("a worker to go", || {
        workers.iter().any(|pid| !runs(*pid)).then_some(())
    });
    let took = shrunk.elapsed();
    assert!(took.as_secs() < 2, "two ticks are 2 s, it took {took:?}");
    println!(
        "FIGURE A19 the first worker was gone {} ms after the limit",
        took.as_millis()
    );
    assert_eq!(residentd.memory("system")["total"], limit / 4096 * 4096);
    assert_eq!(residentd.eviction("a"), "pressure");
    let refused = residentd.complete("big");
    assert_eq!(refused.status, 503, "{}", refused.text());

    cgroup.set_limit(700 * MIB);
    wait_until("the new limit to be seen", || {
        (residentd.memory("system")["total"] == 700 * MIB).then_some(())
    });
    for name in ["big", "a"] {
        let answer = residentd.complete(name);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(cgroup.oom_kills(), 0);
}

/// Waits for a reading of the cgroup that `wanted` likes.
fn reading(residentd: &Residentd, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    wait_until(what, || {
        let reading = residentd.memory("system")["cgroup"].clone();
        wanted(&reading).then_some(reading)
    })
}

#[test]
fn a_limit_further_up_counts_and_files_that_the_kernel_can_drop_do_not() {
    let Some(outer) = cgroup("cgroup figures", 400 * MIB) else {
        return;
    };
    let inner = outer.inner();
    let residentd = residentd(&inner, "");
    assert_eq!(residentd.complete("a").status, 200);
    let bytes = |reading: &Value, field: &str| reading[field].as_u64().expect("a number");
    let same = |reading: &Value| bytes(reading, "current").abs_diff(outer.usage()) < 4 * MIB;
    let before = reading(&residentd, "the worker to be counted", |reading| {
        same(reading) && bytes(reading, "current") > 40 * MIB
    });
    assert_eq!(before["path"], outer.path());
    assert_eq!(before["limit"], 400 * MIB);

    // Written there, so it is charged there; and it is on a disk.
    let folder = env!("CARGO_TARGET_TMPDIR");
    std::fs::create_dir_all(folder).expect("a folder on a disk");
    let folder = tempfile::tempdir_in(folder).expect("a folder for the test");
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/zero", "bs=1048576", "count=128", "conv=fsync"]);
    dd.arg(format!("of={}", folder.path().join("weights").display()));
    let wrote = inner.within(&dd).stderr(Stdio::null()).status();
    assert!(wrote.expect("dd runs").success());
    let grown = |reading: &Value, field: &str| {
        bytes(reading, field).saturating_sub(bytes(&before, field)) / MIB
    };
    // While it is being written it cannot be dropped.
    let after = reading(&residentd, "only the usage to have grown", |reading| {
        same(reading) && grown(reading, "current") > 120 && grown(reading, "working_set") < 16
    });
    println!(
        "FIGURE cgroup v{} usage {} MiB more by a file, of which {} MiB cannot be dropped",
        after["version"],
        grown(&after, "current"),
        grown(&after, "working_set")
    );
}

#[test]
fn a19_a_lower_limit_of_the_user_evicts_at_once_and_a_higher_one_admits_again() {
    let models = ["a", "b"].map(|name| {
        format!("[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--anon\", \"64MiB\"]\nmemory = \"80MiB\"\n")
    });
    let head = "[memory]\nlimit = \"200MiB\"\nreserve = \"16MiB\"\n";
    let residentd = Residentd::start(&(head.to_owned() + &models.concat()));
    let (a, b) = (
        residentd.complete("a").worker_pid(),
        residentd.complete("b").worker_pid(),
    );
    wait_until("both to be measured", || {
        let usage = residentd.memory("stats")["total_memory_usage"].as_u64()?;
        (usage > 128 * MIB).then_some(())
    });
    let lowered = now();
    residentd.ask("POST", "/api/v1/memory/limit?limit_gb=0.1", None);
    wait_until("the older one to go", || (!runs(a)).then_some(()));
    assert!(lowered.elapsed().as_secs() < 2);
    assert!(runs(b));
    residentd.ask("POST", "/api/v1/memory/limit?limit_gb=0.2", None);
    assert_eq!(residentd.complete("a").status, 200);
    assert!(runs(b));
}

#[test]
fn a_worker_that_the_oom_killer_ended_is_known_as_such_and_expected_to_need_more() {
    let Some(cgroup) = cgroup("OOM attribution", 200 * MIB) else {
        return;
    };
    let greedy = format!(
        "auto_cleanup = false\n[pressure]\nemergency = false\n[models.greedy]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--anon\", \"300MiB\"]\n"
    );
    let greedy = format!(
        "{greedy}[models.bystander]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--anon\", \"20MiB\"]\n"
    );
    let residentd = residentd(&cgroup, &greedy);
    // Bytes of a process that was just killed are not back at once. Whoever needs a
    // page then brings the killer back, which must not find residentd alone.
    assert_eq!(residentd.complete("bystander").status, 200);
    let answer = residentd.complete("greedy");
    assert_eq!(answer.status, 502);
    let message = answer.json()["error"]["message"].to_string();
    assert!(
        message.contains("most likely because its cgroup ran out of memory"),
        "{message}"
    );
    assert!(cgroup.oom_kills() > 0);
    let page = residentd.ask("GET", "/metrics", None).text();
    let kills = "residentd_kills_total{verdict=\"oom_cgroup_likely\"} ";
    let killed = [1, 2].map(|count| format!("{kills}{count}\n"));
    assert!(killed.iter().any(|line| page.contains(line)), "{page}");
    let expected = residentd.model("greedy")["expected"].clone();
    assert_eq!(expected["source"], "learned", "{expected}");
}

#[test]
fn a_worker_that_somebody_killed_is_told_apart_from_one_that_ran_out_of_memory() {
    let model = format!("[models.a]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\"]\n");
    let residentd = Residentd::start(&model);
    let worker = residentd.complete("a").worker_pid();
    kill(worker, nix::sys::signal::Signal::SIGKILL);
    let error = wait_until("the end to be noticed", || {
        residentd.model("a")["last_error"]
            .as_str()
            .map(str::to_owned)
    });
    assert!(
        error.contains("SIGKILL, sent by another program"),
        "{error}"
    );
}

#[test]
fn a_model_over_its_own_ceiling_is_recycled_between_two_requests() {
    let model = format!(
        "[models.leaky]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--grow\", \"40MiB\"]\nmax_memory = \"60MiB\"\n"
    );
    let residentd = Residentd::start(&model);
    let first = residentd.complete("leaky").worker_pid();
    assert_eq!(residentd.complete("leaky").worker_pid(), first);
    wait_until("the worker to go", || (!runs(first)).then_some(()));
    assert_eq!(residentd.eviction("leaky"), "max_memory");
    assert_ne!(residentd.complete("leaky").worker_pid(), first);
}

#[test]
fn the_kernel_does_not_drop_the_program_of_residentd_where_it_may_lock_it() {
    let model = format!("[models.a]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\"]\n");
    let residentd = Residentd::start(&model);
    let status = std::fs::read_to_string(format!("/proc/{}/status", residentd.pid()));
    let status = status.expect("residentd runs");
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let locked = locked.expect("a line on locked pages").trim();
    let may_lock = nix::unistd::geteuid().is_root();
    assert_eq!(locked != "0 kB", may_lock, "{locked}");
}
