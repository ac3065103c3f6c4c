//! Workers that run and are of no use: found, told why, replaced (A46); and
//! those that only look like it: left alone.

use std::io::{Read, Write};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Frame;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::calls::{INFERENCE, call, finish, named, open, with};
use crate::support::http::send;
use crate::support::residentd::STUB;
use crate::support::{Answer, Residentd, kill, now, pause, runs, wait_until};

fn one(flags: &str, live: &str, more: &str) -> Residentd {
    Residentd::start(&format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m {flags}'\nmemory = \"32MiB\"\nlive = {{ {live} }}\n{more}\n"
    ))
}

/// Asks for a completion with these knobs.
fn ask(residentd: &Residentd, knobs: &Value) -> Answer {
    let mut body = json!({"model": "m", "prompt": "x"});
    let members = body.as_object_mut().expect("an object");
    members.extend(knobs.as_object().expect("an object").clone());
    residentd.ask("POST", "/v1/completions", Some(&body.to_string()))
}

/// Waits until a worker is ended as unhealthy, and returns that event.
fn found(residentd: &Residentd) -> Value {
    wait_until("a worker to be ended as unhealthy", || {
        let path = "/api/v1/events?kind=terminate&model=m";
        let events = residentd.ask("GET", path, None).json();
        let list = events["data"]["events"].as_array()?.clone();
        list.into_iter()
            .find(|event| event["reason"] == "unhealthy")
    })
}

fn count(residentd: &Residentd, ailment: &str) -> u64 {
    let page = residentd.ask("GET", "/metrics", None).text();
    let series = format!("residentd_unhealthy_total{{reason=\"{ailment}\"}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&series));
    line.map_or(0, |count| count.parse().expect("a count"))
}

/// What the events and the metrics say of a worker that is ended, and the API
/// for as long as no other is ready.
fn told(residentd: &Residentd, ailment: &str, words: &str) -> Value {
    let event = found(residentd);
    assert_eq!(event["ailment"], ailment, "{event}");
    assert!(event["message"].to_string().contains(words), "{event}");
    // An event is told a moment before the state that it leads to.
    wait_until("the model to say why, or to be loaded again", || {
        let model = residentd.model("m");
        let error = model["last_error"].to_string();
        (error.contains(words) || model["generation"] == 2).then_some(())
    });
    assert_eq!(count(residentd, ailment), 1);
    event
}

#[test]
fn a46_a_worker_that_answers_its_probe_and_hangs_requests_is_found_and_replaced() {
    let live = "probe = \"200ms\", still = \"1s\"";
    let residentd = one("--hang-after-requests 1", live, "");
    let first = residentd.complete("m").worker_pid();
    let start = now();
    // Who hung in it is answered by the next life.
    let answer = residentd.complete("m");
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_ne!(answer.worker_pid(), first);
    assert!(!runs(first), "it was ended");
    let event = told(&residentd, "still", "it hangs: no byte for");
    assert!(event["still_seconds"].as_f64() >= Some(1.0), "{event}");
    assert!(event["cpu_seconds"].as_f64() < Some(0.1), "{event}");
    assert_eq!(event["waiting"], 1);
    assert_eq!(residentd.model("m")["evictions"], 0, "it was no eviction");
}

#[test]
fn a46_a_worker_that_is_stopped_by_a_signal_is_found_and_killed_without_grace() {
    let live = "probe = \"100ms\", timeout = \"200ms\", failures = 2";
    let residentd = one("", live, "stop_timeout = \"60s\"");
    let first = residentd.complete("m").worker_pid();
    kill(first, Signal::SIGSTOP);
    told(&residentd, "stopped", "stopped by a signal");
    wait_until("it to be gone", || (!runs(first)).then_some(()));
    let next = residentd.complete("m");
    assert_eq!(next.status, 200, "{}", next.text());
    assert_ne!(next.worker_pid(), first);
}

#[test]
fn a46_a_worker_that_closed_its_port_and_lives_is_found_by_the_first_request() {
    // No probe is due for a long time: the refused request asks for one.
    let residentd = one("--close-after-requests 1", "probe = \"10m\"", "");
    let first = residentd.complete("m").worker_pid();
    let refused = wait_until("the port to be closed", || {
        let answer = residentd.complete("m");
        (answer.status != 200).then_some(answer)
    });
    assert_eq!(refused.status, 502, "{}", refused.text());
    told(
        &residentd,
        "refuses",
        "refuses connections, 3 times in a row",
    );
    assert_eq!(residentd.complete("m").status, 200);
    assert!(!runs(first));
}

#[test]
fn a46_a_worker_that_listens_and_says_nothing_is_found_though_nobody_asks() {
    let live = "probe = \"100ms\", timeout = \"200ms\", failures = 3";
    let residentd = one("--mute-after-requests 1", live, "");
    let first = residentd.complete("m").worker_pid();
    told(&residentd, "no_answer", "did not answer 3 probes");
    wait_until("it to be gone", || (!runs(first)).then_some(()));
    // Nobody wants it: it stays away, and is ready for who asks.
    assert_eq!(residentd.model("m")["loaded"], false);
    assert_eq!(residentd.complete("m").status, 200);
}

#[test]
fn a46_a_worker_that_only_answers_errors_is_replaced_and_one_success_clears_it() {
    let residentd = one("", "errors = 4", "");
    let first = residentd.complete("m").worker_pid();
    let fail = || ask(&residentd, &json!({"x_status": 500})).status;
    for _ in 0..3 {
        assert_eq!(fail(), 500);
    }
    assert_eq!(residentd.complete("m").worker_pid(), first);
    for status in [500, 503, 500, 400, 500, 500, 500] {
        assert_eq!(ask(&residentd, &json!({"x_status": status})).status, status);
    }
    assert_eq!(residentd.worker_pid("m"), Some(first), "three in a row");
    assert_eq!(fail(), 500);
    told(&residentd, "errors", "4 requests in a row with an error");
    assert_ne!(residentd.complete("m").worker_pid(), first);
}

#[test]
fn a46_with_silent_also_a_worker_that_computes_for_ever_is_found() {
    let live = "probe = \"0s\", still = \"0s\", silent = \"600ms\"";
    let residentd = one("", live, "stop_timeout = \"200ms\"");
    let first = residentd.complete("m").worker_pid();
    // It hangs the second life too, and then the client hears of it.
    let answer = ask(&residentd, &json!({"x_busy_ms": 60_000}));
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert!(!runs(first));
    assert_eq!(count(&residentd, "silent"), 2);
    assert_eq!(found(&residentd)["waiting"], 1);
}

#[test]
fn a_worker_that_is_busy_with_one_request_and_answers_no_probe_is_left_alone() {
    let live = "probe = \"50ms\", timeout = \"50ms\", failures = 2, still = \"500ms\"";
    let residentd = one("", live, "");
    let first = residentd.complete("m").worker_pid();
    let answer = ask(&residentd, &json!({"x_busy_ms": 2500}));
    assert_eq!((answer.status, answer.worker_pid()), (200, first));
    assert_eq!(residentd.complete("m").worker_pid(), first);
}

#[test]
fn a_worker_that_waits_for_its_client_is_left_alone() {
    let live = "probe = \"100ms\", still = \"400ms\", silent = \"400ms\"";
    let residentd = one("", live, "");
    let first = residentd.complete("m").worker_pid();
    let address = residentd.address();

    // One that does not read what it is sent, far more than any buffer holds.
    let body = json!({"model": "m", "prompt": "x", "stream": true, "x_chunks": 300, "x_chunk_bytes": 65536});
    let body = body.to_string();
    let mut stream = send(address, "POST", "/v1/completions", Some(&body)).expect("a connection");
    let mut first_bytes = [0_u8; 64];
    assert!(stream.read(&mut first_bytes).expect("it begins") > 0);
    pause(Duration::from_millis(1500));
    let mut raw = Vec::from(first_bytes);
    stream.read_to_end(&mut raw).expect("the rest");
    let answer = Answer::parse(&raw).expect("an answer");
    assert!(answer.complete, "{} bytes", raw.len());

    // One that takes its time to send its body.
    let body = format!(
        "{{\"model\": \"m\", \"prompt\": \"{}\"}}",
        "x".repeat(2 << 20)
    );
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = std::net::TcpStream::connect(address).expect("a connection");
    stream.write_all(head.as_bytes()).expect("sent");
    let (begin, end) = body.as_bytes().split_at(3 << 19);
    stream.write_all(begin).expect("sent");
    pause(Duration::from_millis(1500));
    stream.write_all(end).expect("sent");
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).expect("an answer");
    let answer = Answer::parse(&raw).expect("an answer");
    assert_eq!((answer.status, answer.worker_pid()), (200, first));
    assert_eq!(residentd.model("m")["restarts"], 0);
}

#[test]
fn probes_are_few_and_wake_nobody() {
    let residentd = one("", "probe = \"200ms\"", "idle_timeout = \"1s\"");
    let start = now();
    residentd.complete("m");
    let probes = || {
        let stats = residentd.ask("GET", "/upstream/m/stats", None).json();
        stats["probes"].as_u64().expect("a count")
    };
    let at_first = probes();
    let later = wait_until("a second probe", || {
        let count = probes();
        (count >= at_first + 2).then_some(count)
    });
    let most = u64::try_from(start.elapsed().as_millis() / 150).expect("little") + 1;
    assert!(later - at_first <= most, "{} probes", later - at_first);
    // Nor do they count as use.
    residentd.wait_for_phase("m", "stopped");
    pause(Duration::from_millis(700));
    assert_eq!(residentd.model("m")["loads"], 1);
}

#[test]
fn a46_a_conversation_that_is_quiet_is_no_reason_to_end_its_worker() {
    // A message was answered, the client has not finished, and nobody speaks.
    let residentd = one("", "probe = \"100ms\", still = \"500ms\"", "");
    let pid = residentd.complete("m").worker_pid();
    with(residentd.address(), |client| async move {
        let (say, body) = open();
        let request = call(&format!("{INFERENCE}/ModelStreamInfer"), &[], body);
        say.try_send(Frame::data(named("m").frame())).expect("open");
        let response = client.clone().send_request(request).await;
        let mut response = response.expect("an answer");
        response.body_mut().frame().await.expect("one").expect("it");
        let quiet = Duration::from_secs(3);
        let word = tokio::time::timeout(quiet, response.body_mut().frame()).await;
        assert!(word.is_err(), "nothing was to be said: {word:?}");
        say.try_send(Frame::data(named("m").frame())).expect("open");
        drop(say);
        assert_eq!(finish(response).await.end["x-stub-given"], "2");
    });
    assert_eq!(residentd.worker_pid("m"), Some(pid));
    assert_eq!(count(&residentd, "still"), 0);
}
