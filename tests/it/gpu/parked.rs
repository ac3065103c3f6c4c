//! Parks with real processes: memory comes back as measured, the worker stays
//! the same, and a park that does not do what it should ends the worker.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::gpu::{FakeDriver, GIB};
use crate::support::http::send;
use crate::support::residentd::STUB;
use crate::support::{Residentd, runs, wait_until};

/// A model whose worker holds 64 MiB of host RAM and 10 GiB of the one GPU, and
/// can be parked: then it holds 160 MiB and nothing, unless flags say otherwise.
pub(crate) fn model(driver: &FakeDriver, name: &str, flags: &str, park: &str) -> String {
    let folder = driver.folder();
    format!(
        "[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--name\", \"{name}\", \
         \"--anon\", \"64MiB\", \"--vram\", \"10GiB\", \"--vram-dir\", {folder:?}, \
         \"--sleep-mode\", \"--sleep-anon\", \"144MiB\"{flags}]\n\
         memory = \"96MiB\"\nvram = \"10GiB\"\ngpus = 1\n{park}\n"
    )
}

/// As vLLM parks, where it is known what goes to host RAM.
pub(crate) const PARK: &str =
    "park = { park = \"POST /sleep?level=1\", unpark = \"POST /wake_up\", memory = \"192MiB\" }";

fn start(driver: &FakeDriver, limit: &str, models: &[String]) -> Residentd {
    let library = driver.library();
    let head =
        format!("[memory]\nlimit = \"{limit}\"\nreserve = \"16MiB\"\nnvml_library = {library:?}\n");
    Residentd::start(&(head + &models.concat()))
}

fn vram(residentd: &Residentd, model: &str) -> u64 {
    residentd.model(model)["vram"][0]["bytes"]
        .as_u64()
        .unwrap_or(0)
}

fn host(residentd: &Residentd, model: &str) -> u64 {
    let held = residentd.model(model)["memory_usage"].as_u64();
    held.expect("a number") >> 20
}

/// What the worker of a model says of its sleep.
fn slept(residentd: &Residentd, model: &str) -> Value {
    let answer = residentd.ask("GET", &format!("/upstream/{model}/stats"), None);
    answer.json()["sleep"].clone()
}

/// The reasons and numbers of the decisions of one kind about a model.
fn told(residentd: &Residentd, model: &str, kind: &str) -> Vec<Value> {
    let path = format!("/api/v1/events?model={model}&kind={kind}");
    let answer = residentd.ask("GET", &path, None);
    let events = answer.json()["data"]["events"].clone();
    events.as_array().expect("a list of events").clone()
}

fn explained(residentd: &Residentd, model: &str) -> Value {
    let answer = residentd.ask("GET", &format!("/api/v1/models/{model}"), None);
    answer.json()["data"]["explanation"].clone()
}

fn two(driver: &FakeDriver, flags: &str) -> [String; 2] {
    ["red", "green"].map(|name| model(driver, name, flags, PARK))
}

#[test]
fn two_that_take_turns_on_a_gpu_never_hold_it_both() {
    let driver = FakeDriver::new(1);
    let residentd = start(&driver, "600MiB", &two(&driver, ""));
    let names = ["red", "green"];
    let pids = names.map(|name| residentd.complete(name).worker_pid());
    for _ in 0..12 {
        for (name, pid) in names.into_iter().zip(pids) {
            assert_eq!(residentd.complete(name).worker_pid(), pid);
        }
    }
    for name in names {
        for park in told(&residentd, name, "park") {
            assert_eq!(park["reason"], "make_room", "{park}");
        }
    }
}

#[test]
fn a_parked_worker_gives_its_memory_back_and_comes_back_as_the_same_process() {
    let driver = FakeDriver::new(1);
    let residentd = start(&driver, "600MiB", &two(&driver, ""));
    let red = residentd.complete("red").worker_pid();
    wait_until("its memory to be seen", || {
        (vram(&residentd, "red") == 10 * GIB).then_some(())
    });

    let green = residentd.complete("green").worker_pid();
    assert!(runs(red), "it was parked and not ended");
    let parked = residentd.model("red");
    assert_eq!(parked["phase"], "parked");
    assert_eq!(parked["loaded"], false);
    assert_eq!(parked["pid"], red);
    assert_eq!(parked["vram"][0]["bytes"], 0);
    wait_until("its weights to be seen in host RAM", || {
        (144..180).contains(&host(&residentd, "red")).then_some(())
    });
    let device = residentd.memory("system")["devices"][0].clone();
    assert_eq!(device["charged"], 10 * GIB, "green's alone: {device}");
    let told_why = wait_until("green to be measured", || {
        let explained = explained(&residentd, "red");
        (explained["outlook"]["result"] == "evicts").then_some(explained)
    });
    assert_eq!(told_why["reason"], "parked");
    let victim = &told_why["outlook"]["would_evict"][0];
    assert_eq!(
        (&victim["name"], &victim["parks"]),
        (&json!("green"), &json!(true))
    );

    let again = residentd.complete("red");
    assert_eq!(again.status, 200);
    assert_eq!(again.worker_pid(), red, "no new process");
    assert!(runs(green));
    assert_eq!(residentd.model("green")["phase"], "parked");
    wait_until("its memory to be seen again", || {
        (vram(&residentd, "red") == 10 * GIB).then_some(())
    });
    assert_eq!(
        slept(&residentd, "red"),
        json!({"asleep": false, "sleeps": 1, "wakes": 1})
    );

    let park = &told(&residentd, "red", "park")[0];
    assert_eq!(park["reason"], "make_room");
    assert_eq!(park["for_model"], "green");
    assert_eq!(park["charge"]["gpu:0"], 10 * GIB);
    assert_eq!(park["holds"], json!({"gpu:0": 0, "host": 192_u64 << 20}));
    let back = &told(&residentd, "red", "parked")[0];
    assert_eq!(back["freed"]["gpu:0"], 10 * GIB);
    assert_eq!(told(&residentd, "red", "unpark").len(), 1);
    assert_eq!(told(&residentd, "red", "unparked").len(), 1);
    let stats = residentd.memory("stats");
    assert_eq!(stats["evictions_total"], 0);
    let metrics = residentd.ask("GET", "/metrics", None).text();
    for line in [
        "residentd_parks_total{reason=\"make_room\"} 2",
        "residentd_unparks_total 1",
        "residentd_model_loads_total{model=\"red\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    assert!(residentd.stop().success());
    assert!(!runs(red) && !runs(green));
}

#[test]
fn models_take_turns_on_a_gpu_without_a_new_process_or_a_lost_request() {
    let driver = FakeDriver::new(1);
    let residentd = start(
        &driver,
        "600MiB",
        &two(&driver, ", \"--sleep-time\", \"20ms\""),
    );
    let pids = ["red", "green"].map(|name| residentd.complete(name).worker_pid());
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (residentd, pids) = (&residentd, &pids);
            scope.spawn(move || {
                for turn in 0..4 {
                    let which = (client + turn) % 2;
                    let answer = residentd.complete(["red", "green"][which]);
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    assert_eq!(answer.worker_pid(), pids[which]);
                }
            });
        }
    });
    assert_eq!(residentd.memory("stats")["evictions_total"], 0);
}

#[test]
fn a_park_that_frees_nothing_ends_the_worker_and_says_so() {
    let driver = FakeDriver::new(1);
    let flags = ", \"--sleep-fault\", \"nothing\"";
    let residentd = start(&driver, "600MiB", &two(&driver, flags));
    let red = residentd.complete("red").worker_pid();
    let answer = residentd.complete("green");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(!runs(red));
    assert_eq!(residentd.eviction("red"), "park_freed_too_little");
    let ended = &told(&residentd, "red", "terminate")[0];
    assert_eq!(ended["freed"], 0);
    assert_eq!(ended["expected"], 10 * GIB);
    let message = ended["message"].as_str().expect("a sentence");
    assert!(
        message.contains("its park gave back 0.00 B of 10.00 GiB on gpu:0, too little in time"),
        "{message}"
    );
    // It is not tried again with red.
    assert_eq!(residentd.complete("red").status, 200);
    assert_eq!(residentd.complete("green").status, 200);
    assert_eq!(residentd.eviction("red"), "make_room");
    assert_eq!(told(&residentd, "red", "park").len(), 1);
}

#[test]
fn a_park_or_unpark_that_fails_or_hangs_ends_the_worker_and_nobody_is_refused() {
    let park = PARK.replace(" }", ", timeout = \"4s\" }");
    for (flags, reason, said) in [
        (
            "--sleep-fault fails",
            "park_failed",
            "POST /sleep?level=1 answered 500",
        ),
        (
            "--sleep-fault hangs",
            "park_failed",
            "POST /sleep?level=1 was not answered",
        ),
        (
            "--wake-fault fails",
            "unpark_failed",
            "POST /wake_up answered 500",
        ),
        (
            "--wake-fault hangs",
            "unpark_failed",
            "POST /wake_up was not answered",
        ),
    ] {
        let driver = FakeDriver::new(1);
        let words = flags.split(' ').map(|word| format!(", {word:?}"));
        let flags = words.collect::<String>();
        let models = [
            model(&driver, "red", &flags, &park),
            model(&driver, "green", "", ""),
        ];
        let residentd = start(&driver, "600MiB", &models);
        let red = residentd.complete("red").worker_pid();
        assert_eq!(residentd.complete("green").status, 200, "{reason}");
        let again = residentd.complete("red");
        assert_eq!(again.status, 200, "{reason}: {}", again.text());
        assert_ne!(again.worker_pid(), red, "{reason}");
        assert!(!runs(red));
        let ended = &told(&residentd, "red", "terminate")[0];
        assert_eq!(ended["reason"], reason, "{ended}");
        let cause = ended["cause"].as_str().expect("a cause");
        assert!(cause.starts_with(said), "{cause}");
    }
}

#[test]
fn without_room_in_host_ram_a_model_is_evicted_and_not_parked() {
    let driver = FakeDriver::new(1);
    // 192 MiB for the parked one and 96 for the other are over the limit.
    let residentd = start(&driver, "260MiB", &two(&driver, ""));
    let red = residentd.complete("red").worker_pid();
    residentd.complete("green");
    assert!(!runs(red));
    assert_eq!(residentd.eviction("red"), "make_room");
    assert!(told(&residentd, "red", "park").is_empty());
}

#[test]
fn a_parked_worker_is_the_first_to_go_for_host_ram() {
    let driver = FakeDriver::new(1);
    let mut models = two(&driver, "").to_vec();
    models.push(format!(
        "[models.host]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--anon\", \"150MiB\"]\nmemory = \"170MiB\"\n"
    ));
    let residentd = start(&driver, "400MiB", &models);
    let red = residentd.complete("red").worker_pid();
    let green = residentd.complete("green").worker_pid();
    residentd.wait_for_phase("red", "parked");
    residentd.complete("green");
    assert_eq!(residentd.complete("host").status, 200);
    assert!(!runs(red), "it served nobody");
    assert!(runs(green));
    assert_eq!(residentd.eviction("red"), "make_room");
    let again = residentd.complete("red");
    assert_eq!(again.status, 200);
    assert_ne!(again.worker_pid(), red);
}

#[test]
fn a_parked_worker_ends_when_it_is_unloaded_or_killed_and_loads_anew() {
    let driver = FakeDriver::new(1);
    let residentd = start(&driver, "600MiB", &two(&driver, ""));
    let red = residentd.complete("red").worker_pid();
    residentd.complete("green");
    residentd.wait_for_phase("red", "parked");
    let unloaded = residentd.ask("POST", "/api/v1/models/red/unload", None);
    assert_eq!(unloaded.status, 200, "{}", unloaded.text());
    assert!(!runs(red));
    assert_eq!(residentd.model("red")["phase"], "stopped");

    let second = residentd.complete("red").worker_pid();
    residentd.complete("green");
    residentd.wait_for_phase("red", "parked");
    crate::support::kill(second, Signal::SIGKILL);
    wait_until("its death to be noticed", || {
        (residentd.model("red")["restarts"] == 1).then_some(())
    });
    let third = residentd.complete("red");
    assert_eq!(third.status, 200, "{}", third.text());
    assert_ne!(third.worker_pid(), second);
}

#[test]
fn clients_cannot_put_a_worker_to_sleep() {
    let driver = FakeDriver::new(1);
    let residentd = start(&driver, "600MiB", &two(&driver, ""));
    residentd.complete("red");
    for path in [
        "/sleep",
        "/sleep?level=2",
        "//sleep/",
        "/%73leep",
        "/wake_up",
    ] {
        let answer = residentd.ask("POST", &format!("/upstream/red{path}"), None);
        assert_eq!(answer.status, 403, "{path}: {}", answer.text());
        assert_eq!(answer.json()["error"]["code"], "forbidden");
    }
    assert_eq!(slept(&residentd, "red")["sleeps"], 0);
    // Nor is anything else of the worker's shut off.
    let other = residentd.ask("GET", "/upstream/red/is_sleeping", None);
    assert_eq!(other.status, 200);
}

const ENDED: &str = "it was parked, or on its way there or back";

#[test]
fn one_that_is_parked_when_residentd_dies_is_ended_and_a_ready_one_is_taken_back() {
    let driver = FakeDriver::new(1);
    let mut residentd = start(&driver, "600MiB", &two(&driver, ""));
    let red = residentd.complete("red").worker_pid();
    let green = residentd.complete("green").worker_pid();
    residentd.wait_for_phase("red", "parked");
    residentd.wait_until_kept("green");
    residentd.restart_after(Signal::SIGKILL);
    assert!(!runs(red));
    assert_eq!(residentd.log().matches(ENDED).count(), 1);
    assert_eq!(residentd.model("red")["phase"], "stopped");
    let system = residentd.memory("system");
    assert_eq!(system["devices"][0]["used"], 10 * GIB, "{system}");
    let view = residentd.model("green");
    let kept = (&view["phase"], &view["pid"], &view["adopted"]);
    assert_eq!(kept, (&json!("ready"), &json!(green), &json!(true)));

    // It parks as any other, and comes back as the same process.
    let next = residentd.complete("red");
    assert_eq!(next.status, 200, "{}", next.text());
    assert_eq!(residentd.model("green")["phase"], "parked");
    assert_eq!(residentd.complete("green").worker_pid(), green);
    assert_eq!(residentd.model("red")["phase"], "parked");
    residentd.wait_until_kept("green");
    residentd.restart_after(Signal::SIGKILL);
    assert!(!runs(next.worker_pid()) && runs(green));
    assert_eq!(residentd.complete("green").worker_pid(), green);
    assert_eq!(residentd.log().matches(ENDED).count(), 2);
}

#[test]
fn one_on_its_way_into_its_park_or_out_when_residentd_dies_is_ended() {
    for (flags, phase) in [
        ("--sleep-fault hangs", "parking"),
        ("--wake-fault hangs", "unparking"),
    ] {
        let driver = FakeDriver::new(1);
        let words = flags.split(' ').map(|word| format!(", {word:?}"));
        let models = [
            model(&driver, "red", &words.collect::<String>(), PARK),
            model(&driver, "green", "", ""),
        ];
        let mut residentd = start(&driver, "600MiB", &models);
        let red = residentd.complete("red").worker_pid();
        if phase == "unparking" {
            assert_eq!(residentd.complete("green").status, 200);
            residentd.wait_for_phase("red", "parked");
        }
        let wanted = if phase == "parking" { "green" } else { "red" };
        let body = json!({"model": wanted, "prompt": "x"}).to_string();
        let asked = send(residentd.address(), "POST", "/v1/completions", Some(&body));
        residentd.wait_for_phase("red", phase);
        residentd.wait_until_kept("red");
        residentd.restart_after(Signal::SIGKILL);
        drop(asked);
        assert!(!runs(red), "{phase}");
        assert_eq!(residentd.log().matches(ENDED).count(), 1, "{phase}");
        let again = residentd.complete("red");
        assert_eq!(again.status, 200, "{phase}: {}", again.text());
    }
}
