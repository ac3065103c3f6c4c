//! Requests that take longer than `request_timeout`.

use std::time::Duration;

use super::rig::Played;
use crate::support::residentd::STUB;
use crate::support::wire::Wire;
use crate::support::{Residentd, now, pause};

const KEYS: &str = "request_timeout = \"300ms\"";
const LIMIT: Duration = Duration::from_millis(300);

/// A request that the worker has in full.
fn asked(played: &Played) -> (Wire, Wire) {
    let mut client = played.client();
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    (client, worker)
}

#[test]
fn an_answer_that_does_not_begin_in_time_is_a_504_and_the_worker_hears_of_it() {
    let played = Played::with(KEYS);
    let start = now();
    let (mut client, worker) = asked(&played);
    let (head, text) = client.answer();
    assert!(start.elapsed() >= LIMIT);
    assert_eq!(head.status(), 504, "{text}");
    let said: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(said["error"]["code"], "request_timeout");
    assert_eq!(said["error"]["model"], "m");
    assert_eq!(worker.rest(), (Vec::new(), None));
    played.wait_for_leases(0);
    assert!(played.try_worker().is_none(), "it is not tried again");
}

#[test]
fn a_stream_between_two_events_says_that_its_time_is_over_and_is_cut() {
    let played = Played::with(KEYS);
    let (mut client, mut worker) = asked(&played);
    worker.put(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    );
    worker.put_chunk("data: 1\n\n");
    assert_eq!(client.head().status(), 200);
    assert_eq!(client.chunk().expect("an event"), b"data: 1\n\n");
    client.error_event("\"request_timeout\"");
    assert_eq!(worker.rest().0, b"", "the worker hears of it");
    played.wait_for_leases(0);
}

#[test]
fn an_answer_that_is_not_between_events_is_cut_where_it_is() {
    let played = Played::with(KEYS);
    for (head, sent, seen) in [
        (
            "content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n",
            "8\r\ndata: {x\r\n",
            "8\r\ndata: {x\r\n",
        ),
        (
            "transfer-encoding: chunked\r\n",
            "4\r\nhalf\r\n",
            "4\r\nhalf\r\n",
        ),
        ("content-length: 100\r\n", "half", "half"),
    ] {
        let (mut client, mut worker) = asked(&played);
        worker.put(format!("HTTP/1.1 200 OK\r\n{head}\r\n{sent}"));
        assert_eq!(client.head().status(), 200);
        let (rest, _) = client.rest();
        assert_eq!(String::from_utf8_lossy(&rest), seen, "{head}");
        assert_eq!(worker.rest().0, b"");
        played.wait_for_leases(0);
    }
}

#[test]
fn a_client_that_does_not_read_keeps_neither_worker_nor_lease_longer() {
    let played = Played::with(KEYS);
    let (client, mut worker) = asked(&played);
    worker.put("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x1_0000));
    // Until nothing more fits on the way, and the connection is closed.
    let start = now();
    while worker.try_put(&chunk).is_ok() {
        assert!(
            start.elapsed() < crate::support::PATIENCE,
            "it is not closed"
        );
    }
    played.wait_for_leases(0);
    let (rest, _) = client.rest();
    assert!(!rest.ends_with(b"0\r\n\r\n"), "it looks whole");
}

#[test]
fn an_answer_in_time_is_not_touched_and_its_connection_is_kept() {
    let played = Played::with(KEYS);
    let mut client = played.client();
    let mut worker = None;
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ] {
        client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
        let worker = worker.get_or_insert_with(|| played.worker());
        let head = worker.head();
        worker.body(&head);
        worker.put(answer);
        assert_eq!(client.answer().1, "ok");
        played.wait_for_leases(0);
        // The time of an answer that has ended is nobody's.
        pause(LIMIT + Duration::from_millis(50));
    }
    assert!(played.try_worker().is_none());
}

#[test]
fn the_wait_for_a_load_does_not_count() {
    let residentd = Residentd::start(&format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m --ready-after 1s'\nmemory = \"32MiB\"\nrequest_timeout = \"900ms\"\n"
    ));
    assert_eq!(residentd.complete("m").status, 200);
}

#[test]
fn a_connection_that_left_http_has_no_answer_that_could_be_late() {
    let played = Played::with(KEYS);
    let (mut client, mut worker) = played.out_of_http();
    pause(LIMIT * 2);
    worker.put("hello");
    assert_eq!(client.exactly(5), b"hello");
}
