//! Why something happened, asked of a real residentd: the list of events, the
//! stream, the explanation of one model, and the command.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::http::send;
use crate::support::residentd::{RESIDENTD, STUB};
use crate::support::{PATIENCE, Residentd, now, wait_until};

/// A model whose worker holds `mib` of anonymous memory and declares a little
/// more.
fn model(name: &str, mib: u64, flags: &str, more: &str) -> String {
    format!(
        "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} --anon {mib}MiB {flags}'\nmemory = \"{}MiB\"\n{more}\n",
        mib + 16
    )
}

/// Room for one of these two at a time.
fn two(flags: &str) -> String {
    format!(
        "[memory]\nlimit = \"120MiB\"\nreserve = \"16MiB\"\n{}{}",
        model("red", 64, flags, ""),
        model("blue", 64, "", "")
    )
}

fn events(residentd: &Residentd, query: &str) -> Vec<Value> {
    let answer = residentd.ask("GET", &format!("/api/v1/events?limit=1000{query}"), None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let events = answer.json()["data"]["events"].clone();
    events.as_array().expect("a list").clone()
}

fn kinds(events: &[Value]) -> Vec<(String, String)> {
    let word = |event: &Value, key: &str| event[key].as_str().unwrap_or("-").to_owned();
    let each = events.iter();
    each.map(|event| (word(event, "kind"), word(event, "model")))
        .collect()
}

fn explanation(residentd: &Residentd, model: &str) -> Value {
    let answer = residentd.ask("GET", &format!("/api/v1/models/{model}"), None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["data"]["explanation"].clone()
}

#[test]
fn each_step_of_a_swap_is_an_event_in_order_with_its_numbers() {
    let residentd = Residentd::start(&two(""));
    assert_eq!(residentd.complete("red").status, 200);
    wait_until("what red holds to be measured", || {
        let held = residentd.model("red")["memory_usage"].as_u64();
        (held >= Some(64 << 20)).then_some(())
    });
    assert_eq!(residentd.complete("blue").status, 200);
    let all = wait_until("the swap to be told", || {
        let all = events(&residentd, "");
        (all.last()?["model"] == "blue" && all.last()?["kind"] == "ready").then_some(all)
    });
    let expected = [
        ("spawn", "red"),
        ("ready", "red"),
        ("evict", "red"),
        ("exit", "red"),
        ("reclaim", "red"),
        ("spawn", "blue"),
        ("ready", "blue"),
    ];
    let swap: Vec<_> = all
        .iter()
        .filter(|e| e["kind"] != "pressure")
        .cloned()
        .collect();
    let expected = expected.map(|(kind, model)| (kind.to_owned(), model.to_owned()));
    assert_eq!(kinds(&swap), expected);
    let [spawn, ready, evict, exit, reclaim, ..] = swap.as_slice() else {
        panic!("{swap:?}");
    };
    assert_eq!(spawn["expected"]["host"], 80 << 20);
    assert_eq!(
        (&spawn["reason"], &spawn["waiting"]),
        (&json!("request"), &json!(1))
    );
    assert!(ready["load_ms"].as_u64() < Some(20_000), "{ready}");
    assert_eq!(
        (&evict["reason"], &evict["for_model"], &evict["domain"]),
        (&json!("make_room"), &json!("blue"), &json!("host"))
    );
    assert_eq!(
        (&evict["need"], &evict["room"]),
        (&json!(80 << 20), &json!(40 << 20))
    );
    assert_eq!(exit["reason"], "make_room");
    assert!(exit["status"].is_string(), "{exit}");
    let freed = reclaim["freed"].as_u64().expect("a number");
    assert!((64 << 20..90 << 20).contains(&freed), "{reclaim}");
    let ids: Vec<_> = all.iter().map(|event| event["id"].as_u64()).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    let now = all.last().expect("some")["at"].as_f64().expect("a time");
    assert!(now > 1.7e9, "Unix seconds");
    assert_eq!(
        kinds(&events(&residentd, "&model=red&kind=evict,exit")).len(),
        2
    );
    // The same is in the log, under the same number.
    let log = residentd.log();
    let line = log.lines().find(|line| line.contains("evicting worker"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains(&format!("id={}", evict["id"])), "{line}");
    assert!(
        line.contains("make_room") && line.contains("80.00 MiB"),
        "{line}"
    );
}

#[test]
fn an_evicted_model_tells_for_whom_it_went_who_would_go_now_and_when_it_would_be_ready() {
    let residentd = Residentd::start(&two("--ready-after 200ms"));
    residentd.complete("red");
    residentd.complete("blue");
    residentd.wait_for_phase("blue", "ready");
    let told = wait_until("red to be gone and blue to be idle", || {
        let told = explanation(&residentd, "red");
        (told["outlook"]["result"] == "evicts").then_some(told)
    });
    assert_eq!(told["reason"], "evicted", "{told}");
    assert_eq!(told["details"]["for_model"], "blue");
    let victims = &told["outlook"]["would_evict"];
    assert_eq!(
        (&victims[0]["name"], &victims[1]),
        (&json!("blue"), &Value::Null)
    );
    assert!(
        victims[0]["holds"]["host"].as_u64() >= Some(64 << 20),
        "{told}"
    );
    assert_eq!(told["outlook"]["need"], 80 << 20);
    let ready = told["ready_in_seconds"]
        .as_f64()
        .expect("it was loaded once");
    assert!((0.2..10.0).contains(&ready), "{told}");
    let message = told["message"].as_str().expect("a sentence");
    assert!(message.contains("make room for blue"), "{message}");
    let ready = explanation(&residentd, "blue");
    assert_eq!(
        (&ready["reason"], &ready["ready_in_seconds"]),
        (&json!("ready"), &json!(0.0))
    );
}

#[test]
fn a_model_that_waits_names_the_busy_one_and_the_wait_is_an_event() {
    let residentd = Residentd::start(&two(""));
    residentd.complete("red");
    let slow =
        json!({"model": "red", "prompt": "x", "stream": true, "x_chunks": 1000, "x_pace_ms": 20});
    let slow = send(
        residentd.address(),
        "POST",
        "/v1/completions",
        Some(&slow.to_string()),
    );
    let slow = slow.expect("a connection");
    wait_until("red to be busy", || {
        (residentd.model("red")["in_flight"] == 1).then_some(())
    });
    assert_eq!(explanation(&residentd, "blue")["reason"], "never_loaded");
    let body = json!({"model": "blue", "prompt": "x"}).to_string();
    let waiting = send(residentd.address(), "POST", "/v1/completions", Some(&body));
    let waiting = waiting.expect("a connection");
    let told = wait_until("blue to wait", || {
        let told = explanation(&residentd, "blue");
        (told["reason"] == "waiting").then_some(told)
    });
    let outlook = &told["outlook"];
    assert_eq!(outlook["result"], "waits", "{told}");
    let busy = &outlook["waits_for"][0];
    assert_eq!(
        (&busy["name"], &busy["why"], &busy["in_flight"]),
        (&json!("red"), &json!("busy"), &json!(1))
    );
    assert_eq!(
        (&outlook["need"], &outlook["room"]),
        (&json!(80 << 20), &json!(40 << 20))
    );
    let wait = wait_until("the wait to be an event", || {
        events(&residentd, "&kind=wait").first().cloned()
    });
    assert_eq!(
        (&wait["model"], &wait["need"]),
        (&json!("blue"), &json!(80 << 20))
    );
    assert_eq!(wait["waits_for"][0]["name"], "red");
    drop(slow);
    residentd.wait_for_phase("blue", "ready");
    assert_eq!(events(&residentd, "&kind=wait").len(), 1, "told once");
    drop(waiting);
}

#[test]
fn a_model_that_backs_off_tells_its_cause_and_many_refusals_are_few_events() {
    let broken = format!(
        "[memory]\nlimit = \"200MiB\"\nreserve = \"16MiB\"\n{}",
        model("bad", 16, "--crash-on-start --exit-code 3", "")
    );
    let residentd = Residentd::start(&broken);
    assert_eq!(residentd.complete("bad").status, 502);
    let told = explanation(&residentd, "bad");
    assert_eq!(told["reason"], "backing_off", "{told}");
    assert_eq!(told["details"]["cause"], "exit code 3 before it was ready");
    assert!(
        told["details"]["retry_at"].as_f64() > told["since"].as_f64(),
        "{told}"
    );
    let answers: Vec<_> = (0..150).map(|_| residentd.complete("bad").status).collect();
    let answers = u64::try_from(answers.len()).expect("fits");
    let refused = |events: &[Value]| -> u64 {
        let requests = events.iter().map(|event| event["requests"].as_u64());
        requests.map(|count| count.expect("a number")).sum()
    };
    let refusals = wait_until("all refusals to be told", || {
        let refusals = events(&residentd, "&kind=refuse");
        (refused(&refusals) == answers + 1).then_some(refusals)
    });
    assert!(refusals.len() < 40, "{}", refusals.len());
    let exits = events(&residentd, "&kind=exit");
    assert_eq!(
        (&exits[0]["reason"], &exits[0]["status"]),
        (&json!("exit_code"), &json!("exit code 3"))
    );
    assert_eq!(events(&residentd, "&kind=backoff")[0]["failures"], 1);
    let metrics = residentd.ask("GET", "/metrics", None).text();
    let line = format!(
        "residentd_load_failures_total{{reason=\"exit_code\"}} {}",
        exits.len()
    );
    assert!(metrics.lines().any(|l| l == line), "no {line} in {metrics}");
}

#[test]
fn the_ratios_count_what_their_definitions_say() {
    let config = format!(
        "{}{}",
        two(""),
        model("huge", 1, "", "weights = [\"WEIGHTS\"]")
    );
    let folder = tempfile::tempdir().expect("a folder");
    let weights = folder.path().join("huge.gguf");
    let file = std::fs::File::create(&weights).expect("the file can be made");
    file.set_len(400 << 20).expect("the file can be extended");
    let config = config
        .replace("WEIGHTS", &weights.display().to_string())
        .replace("memory = \"17MiB\"\n", "");
    let residentd = Residentd::start(&config);
    for (model, status) in [
        ("red", 200),
        ("blue", 200),
        ("red", 200),
        ("red", 200),
        ("huge", 503),
    ] {
        assert_eq!(residentd.complete(model).status, status, "{model}");
    }
    let ratio = |name: &str| residentd.memory("stats")[name].as_f64();
    // One of five found its model ready. One of the four that had a worker
    // loaded what had been evicted.
    assert_eq!(
        (ratio("hit_ratio"), ratio("reload_ratio")),
        (Some(0.2), Some(0.25))
    );
}

/// Server-sent events as they come over a connection.
struct Stream(BufReader<TcpStream>);

impl Stream {
    fn open(residentd: &Residentd, query: &str, last: Option<&str>) -> Self {
        let mut stream = TcpStream::connect(residentd.address()).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let last = last.map_or(String::new(), |id| format!("last-event-id: {id}\r\n"));
        write!(
            stream,
            "GET /api/v1/events?follow=true{query} HTTP/1.1\r\nhost: localhost\r\n{last}\r\n"
        )
        .expect("it is sent");
        Self(BufReader::new(stream))
    }

    /// Returns the id and the data of the next event; `None` at the end.
    fn next(&mut self) -> Option<(String, Value)> {
        let mut id = String::new();
        let start = now();
        loop {
            // Signs of life alone would keep it reading for ever.
            assert!(start.elapsed() < PATIENCE, "waited for an event");
            let mut line = String::new();
            if self.0.read_line(&mut line).expect("in time") == 0 {
                return None;
            }
            if let Some(text) = line.strip_prefix("id: ") {
                text.trim_end().clone_into(&mut id);
            } else if let Some(data) = line.strip_prefix("data: ") {
                return Some((id, serde_json::from_str(data).expect("JSON")));
            }
        }
    }
}

#[test]
fn a_stream_goes_on_after_a_break_and_after_a_restart() {
    let mut residentd = Residentd::start(&two(""));
    let mut stream = Stream::open(&residentd, "&kind=spawn,ready,pin", None);
    residentd.complete("red");
    let (_, spawn) = stream.next().expect("it goes on");
    let (last, ready) = stream.next().expect("it goes on");
    assert_eq!(
        (&spawn["kind"], &ready["kind"]),
        (&json!("spawn"), &json!("ready"))
    );
    drop(stream);
    residentd.ask("POST", "/api/v1/models/red/pin", None);
    let mut back = Stream::open(&residentd, "&kind=spawn,ready,pin", Some(&last));
    let (_, pin) = back.next().expect("it goes on");
    assert_eq!(
        (&pin["kind"], &pin["reason"]),
        (&json!("pin"), &json!("pin"))
    );

    residentd.restart_after(Signal::SIGTERM);
    assert_eq!(back.next(), None, "the stream ends with residentd");
    residentd.complete("blue");
    // The new run goes on where the other ended, and its own number is another.
    let mut anew = Stream::open(&residentd, "&kind=spawn", Some(&last));
    let (id, spawn) = anew.next().expect("it goes on");
    assert_eq!(spawn["model"], "blue");
    let (run, number) = id.split_once(':').expect("a run and a number");
    let (last_run, last_number) = last.split_once(':').expect("a run and a number");
    assert_ne!(run, last_run);
    assert!(number.parse::<u64>().ok() > last_number.parse::<u64>().ok());
}

#[test]
fn only_the_last_thousand_are_kept_and_a_reader_that_sleeps_holds_nobody_up() {
    let residentd = Residentd::start(&two(""));
    let mut sleeper = Stream::open(&residentd, "", None);
    for number in 0..1100 {
        let action = if number % 2 == 0 { "pin" } else { "unpin" };
        let path = format!("/api/v1/models/red/{action}");
        assert_eq!(residentd.ask("POST", &path, None).status, 200);
    }
    let answer = residentd.ask("GET", "/api/v1/events?since=0&limit=1000", None);
    let page = answer.json()["data"].clone();
    assert_eq!(page["events"].as_array().map(Vec::len), Some(1000));
    assert!(page["missed"].as_u64() >= Some(100), "{}", page["missed"]);
    assert_eq!(
        residentd.ask("GET", "/api/v1/events?since=1", None).status,
        200
    );
    // Whatever lay in the sockets comes first; each is seen once or counted.
    let (mut seen, mut missed) = (0, 0);
    while seen + missed < 1100 {
        let (id, data) = sleeper.next().expect("it goes on");
        match data["missed"].as_u64() {
            Some(count) => missed += count,
            None => {
                seen += 1;
                assert!(id.ends_with(&format!(":{}", seen + missed)), "{id}");
            }
        }
    }
}

fn run(residentd: &Residentd, line: &str) -> String {
    let output = Command::new(RESIDENTD)
        .args(line.split_whitespace())
        .env(
            "RESIDENTD_SERVER",
            format!("http://{}", residentd.address()),
        )
        .stdin(Stdio::null())
        .output()
        .expect("residentd runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn a51_events_are_printed_picked_and_followed() {
    let residentd = Residentd::start(&two(""));
    residentd.complete("red");
    residentd.ask("POST", "/api/v1/models/blue/pin", None);
    let all = run(&residentd, "events");
    assert!(
        all.lines()
            .any(|line| line.ends_with("blue is pinned by an operator")),
        "{all}"
    );
    let spawns = run(&residentd, "events --kind spawn --kind exit --model red");
    assert_eq!(spawns.lines().count(), 1, "{spawns}");
    assert!(
        spawns.contains("spawn") && spawns.contains("80.00 MiB"),
        "{spawns}"
    );
    assert_eq!(run(&residentd, "events --kind limit"), "no such event\n");
    let page: Value = serde_json::from_str(&run(&residentd, "events -n 1 --json")).expect("JSON");
    assert_eq!(page["data"]["events"][0]["kind"], "pin");

    let mut following = Command::new(RESIDENTD)
        .args(["events", "-f", "-n", "0", "--json", "--kind", "pin"])
        .env(
            "RESIDENTD_SERVER",
            format!("http://{}", residentd.address()),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("residentd runs");
    let lines = following.stdout.take().expect("it is piped");
    let mut lines = BufReader::new(lines).lines();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                if tell.send(line).is_err() {
                    break;
                }
            }
        });
        let event = wait_until("an event to be followed", || {
            // It may not listen yet: what is pinned before is not told.
            residentd.ask("POST", "/api/v1/models/blue/unpin", None);
            told.recv_timeout(Duration::from_millis(50)).ok()
        });
        let event: Value = serde_json::from_str(&event).expect("an object a line");
        assert_eq!(
            (&event["kind"], &event["reason"]),
            (&json!("pin"), &json!("unpin"))
        );
        drop(residentd);
        let status = wait_until("the command to end with the server", || {
            following.try_wait().expect("it is our child")
        });
        assert!(status.success());
    });
}
