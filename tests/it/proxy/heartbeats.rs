//! What a client of a stream hears while it waits: `heartbeat`.

use serde_json::{Value, json};

use super::rig::Played;
use crate::support::residentd::STUB;
use crate::support::wire::{Head, Wire};
use crate::support::{Residentd, wait_until};

const KEYS: &str = "heartbeat = \"100ms\"";
const ASK: &str = "{\"model\":\"m\",\"stream\":true}";
const EVENTS: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// Reads the head that came before its answer, and this many comments.
fn hears(client: &mut Wire, comments: usize) {
    let head = client.head();
    assert_eq!(head.status(), 200);
    assert_eq!(head.get("content-type"), Some("text/event-stream"));
    for _ in 0..comments {
        assert_eq!(client.chunk().expect("a comment"), b": waiting\n\n");
    }
}

/// Reads up to the end of the next event that is no comment; empty at the end.
fn event(client: &mut Wire) -> String {
    loop {
        let chunk = client.chunk().unwrap_or_default();
        if chunk != b": waiting\n\n" {
            return String::from_utf8_lossy(&chunk).into_owned();
        }
    }
}

/// Returns what an error event says.
fn error(event: &str) -> Value {
    let json = event
        .strip_prefix("event: error\ndata: ")
        .and_then(|rest| rest.strip_suffix("\n\n"));
    let json = json.unwrap_or_else(|| panic!("no error event: {event:?}"));
    serde_json::from_str::<Value>(json).expect("JSON")["error"].clone()
}

/// A client that hears heartbeats, the worker's side of its request, and the
/// head that the worker got.
fn waiting(played: &Played) -> (Wire, Wire, Head) {
    let mut client = played.client();
    client.ask("POST /v1/x", "accept-encoding: gzip\r\n", ASK);
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    hears(&mut client, 2);
    (client, worker, head)
}

fn slow(keys: &str) -> Residentd {
    Residentd::start(&format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m {keys}\nmemory = \"32MiB\"\n{KEYS}\n"
    ))
}

#[test]
fn a_stream_that_waits_for_a_load_hears_comments_and_then_the_whole_stream() {
    let residentd = slow("--ready-after 700ms'");
    let body = json!({"model": "m", "prompt": "x", "stream": true}).to_string();
    let answer = residentd.ask("POST", "/v1/completions", Some(&body));
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert!(answer.complete);
    let text = answer.text();
    assert!(text.starts_with(": waiting\n\n: waiting\n\n"), "{text}");
    assert!(
        text.contains("\n\ndata: {") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
}

#[test]
fn an_answer_that_begins_in_time_is_the_workers_own() {
    let played = Played::with("heartbeat = true");
    let mut client = played.client();
    client.ask("POST /v1/x", "", ASK);
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    worker.put(EVENTS.replace("\r\n\r\n", "\r\nx-own: 1\r\n\r\n"));
    assert_eq!(client.head().get("x-own"), Some("1"));
    worker.put_chunk("data: 1\n\n");
    assert_eq!(client.chunk().expect("an event"), b"data: 1\n\n");
}

#[test]
fn who_asks_for_no_stream_of_events_waits_for_its_answer_as_ever() {
    let residentd = slow("--ready-after 500ms'");
    std::thread::scope(|scope| {
        for (path, body) in [
            ("/v1/completions", r#"{"model":"m","prompt":"x"}"#),
            (
                "/v1/completions",
                r#"{"model":"m","prompt":"x","stream":false}"#,
            ),
            // What streams here is no events, as far as is known.
            ("/upstream/m/echo", r#"{"stream":true}"#),
        ] {
            let residentd = &residentd;
            scope.spawn(move || {
                let answer = residentd.ask("POST", path, Some(body));
                assert_eq!(answer.status, 200);
                assert_eq!(answer.header("content-type"), Some("application/json"));
                assert!(answer.json().is_object());
            });
        }
    });
}

#[test]
fn a_get_that_accepts_events_hears_comments_too() {
    let played = Played::with(KEYS);
    let mut client = played.client();
    client.ask("GET /upstream/m/feed", "accept: text/event-stream\r\n", "");
    let mut worker = played.worker();
    worker.head();
    hears(&mut client, 1);
    worker.put(EVENTS);
    worker.put_chunk("data: 1\n\n");
    assert_eq!(event(&mut client), "data: 1\n\n");
    worker.put_chunk("");
    assert_eq!(event(&mut client), "");
}

#[test]
fn a_load_that_fails_is_told_in_the_stream_which_is_cut() {
    let residentd = slow("--never-ready'\nstart_timeout = \"600ms\"");
    let mut client = Wire::to(residentd.address());
    client.ask("POST /v1/completions", "", ASK);
    hears(&mut client, 1);
    let said = error(&event(&mut client));
    assert_eq!(
        (&said["code"], &said["model"]),
        (&json!("start_timeout"), &json!("m"))
    );
    assert_eq!(client.rest().0, b"", "no last chunk");
}

#[test]
fn a34_a_stream_that_leaves_while_it_waits_gives_up_its_place() {
    let played = Played::with(&format!("{KEYS}\nconcurrency = 1"));
    let waits = |count: u32| {
        let line = format!("residentd_requests_waiting {count}");
        wait_until(&line, || {
            let page = played.residentd.ask("GET", "/metrics", None).text();
            page.lines().any(|seen| seen == line).then_some(())
        });
    };
    let (mut first, mut worker, _) = waiting(&played);
    let mut second = played.client();
    second.ask("POST /v1/x", "", ASK);
    hears(&mut second, 1);
    waits(1);
    drop(second);
    waits(0);
    played.wait_for_leases(1);
    // Who has the place is served, and the next one after it.
    worker.put(EVENTS);
    worker.put_chunk("data: 1\n\n");
    assert_eq!(event(&mut first), "data: 1\n\n");
    drop(first);
    played.wait_for_leases(0);
    assert!(played.try_worker().is_none(), "the one who left was sent");
}

#[test]
fn a34_a_stream_that_leaves_before_its_head_is_heard_of_by_the_worker() {
    let played = Played::with(KEYS);
    let (client, worker, _) = waiting(&played);
    drop(client);
    assert_eq!(worker.rest().0, b"");
    played.wait_for_leases(0);
}

#[test]
fn a_place_that_does_not_come_in_time_is_told_in_the_stream() {
    let played = Played::with(&format!(
        "{KEYS}\nconcurrency = 1\nqueue_timeout = \"500ms\""
    ));
    let (_first, _worker, _) = waiting(&played);
    let mut second = played.client();
    second.ask("POST /v1/x", "", ASK);
    hears(&mut second, 1);
    assert_eq!(error(&event(&mut second))["code"], "queue_timeout");
    assert_eq!(second.rest().0, b"");
}

#[test]
fn a_workers_error_after_the_first_comment_is_an_event_and_the_end_is_no_clean_one() {
    let played = Played::with(KEYS);
    let own = r#"{"error":{"message":"too long","code":"context"}}"#;
    for (body, code, message) in [
        (own, "context", "too long"),
        ("out of\ncheese", "worker_error", "out of\ncheese"),
        ("", "worker_error", "the worker answered 400"),
    ] {
        let (mut client, mut worker, head) = waiting(&played);
        // What it sends could not be unpacked: our head has gone out.
        assert_eq!(head.get("accept-encoding"), None);
        let length = body.len();
        worker.put(format!(
            "HTTP/1.1 400 Bad\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        ));
        let said = error(&event(&mut client));
        assert_eq!(
            (&said["code"], &said["message"]),
            (&json!(code), &json!(message))
        );
        assert_eq!(client.rest().0, b"", "no last chunk");
        played.wait_for_leases(0);
    }
}

#[test]
fn an_answer_that_is_no_stream_becomes_one_event() {
    let played = Played::with(KEYS);
    let (mut client, mut worker, _) = waiting(&played);
    worker.put("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{\"a\":\n 1}");
    let mut all = event(&mut client);
    while !all.ends_with("\n\n") {
        all += &event(&mut client);
    }
    assert_eq!(all, "data: {\"a\":\ndata:  1}\n\n");
    assert_eq!(client.chunk(), None, "it is whole");
    played.wait_for_leases(0);
}

#[test]
fn a_worker_that_breaks_while_its_client_hears_comments_is_asked_once_more() {
    let played = Played::with(KEYS);
    let (mut client, worker, _) = waiting(&played);
    drop(worker);
    let mut worker = played.worker();
    let head = worker.head();
    assert_eq!(worker.body(&head), ASK.as_bytes());
    worker.put(EVENTS);
    worker.put_chunk("data: 1\n\n");
    assert_eq!(event(&mut client), "data: 1\n\n");
    // And as without heartbeats, when it breaks after its head.
    drop(worker);
    assert_eq!(error(&event(&mut client))["code"], "worker_failed");
    assert_eq!(client.rest().0, b"", "no last chunk");
    assert!(
        played.try_worker().is_none(),
        "it is not asked a third time"
    );
}

#[test]
fn a_worker_that_breaks_twice_is_told_in_the_stream() {
    let played = Played::with(KEYS);
    let (mut client, worker, _) = waiting(&played);
    drop(worker);
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    drop(worker);
    assert_eq!(error(&event(&mut client))["code"], "worker_failed");
    assert_eq!(client.rest().0, b"");
    assert!(played.try_worker().is_none());
}

#[test]
fn an_answer_that_is_late_is_told_in_the_stream() {
    let played = Played::with(&format!("{KEYS}\nrequest_timeout = \"500ms\""));
    let (mut client, worker, _) = waiting(&played);
    assert_eq!(error(&event(&mut client))["code"], "request_timeout");
    assert_eq!(client.rest().0, b"");
    assert_eq!(worker.rest().0, b"");
    // Also when its head came in time.
    let (mut client, mut worker, _) = waiting(&played);
    worker.put(EVENTS);
    worker.put_chunk("data: 1\n\n");
    assert_eq!(event(&mut client), "data: 1\n\n");
    assert_eq!(error(&event(&mut client))["code"], "request_timeout");
    assert_eq!(client.rest().0, b"");
    assert_eq!(worker.rest().0, b"");
}
