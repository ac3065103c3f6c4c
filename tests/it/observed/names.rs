//! `x-request-id` and `traceparent` on their way.

use bytes::Bytes;
use serde_json::Value;

use super::{LOG, lines};
use crate::proxy::rig::{Played, one};
use crate::support::Residentd;
use crate::support::calls::{ask, named, with};
use crate::support::residentd::STUB;
use crate::support::wire::{Head, Wire};

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Sends a request with these headers, which a worker answers. Returns what the
/// worker got and what the client got.
fn passed(played: &Played, headers: &str) -> (Head, Head) {
    let mut client = played.client();
    client.ask("POST /v1/x", headers, "{\"model\":\"m\"}");
    let mut worker = played.worker();
    let got = worker.head();
    worker.body(&got);
    // A worker's own name for it does not count.
    worker.put("HTTP/1.1 200 OK\r\nx-request-id: other\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok");
    (got, client.answer().0)
}

fn name(head: &Head) -> &str {
    let all = head.all("x-request-id");
    assert_eq!(all.len(), 1, "{head:?}");
    all[0]
}

#[test]
fn a_clients_name_for_its_request_goes_to_the_worker_and_back() {
    let played = Played::start();
    let (worker, client) = passed(&played, "x-request-id: chat-1_a.b:2/3\r\n");
    assert_eq!(
        (name(&worker), name(&client)),
        ("chat-1_a.b:2/3", "chat-1_a.b:2/3")
    );
}

#[test]
fn a_request_without_a_good_name_gets_one_that_no_other_has() {
    let played = Played::start();
    let long = format!("x-request-id: {}\r\n", "x".repeat(129));
    let mut seen = std::collections::BTreeSet::new();
    for headers in [
        "",
        "x-request-id: a b\r\n",
        "x-request-id: a\r\nx-request-id: b\r\n",
        &long,
    ] {
        let (worker, client) = passed(&played, headers);
        assert_eq!(name(&worker), name(&client));
        assert_eq!(name(&client).len(), 32, "{headers}");
        assert!(seen.insert(name(&client).to_owned()), "{headers}");
    }
}

#[test]
fn every_answer_has_the_name_of_its_request() {
    let residentd = one("[auth]\ninference_tokens = [\"sk\"]");
    let mut client = Wire::to(residentd.address());
    let right = "authorization: Bearer sk\r\nx-request-id: q\r\n";
    for (line, headers, body, status) in [
        (
            "POST /v1/x",
            "x-request-id: q\r\n",
            "{\"model\":\"m\"}",
            401,
        ),
        ("POST /v1/x", right, "{\"model\":\"other\"}", 404),
        ("POST /v1/x", right, "no JSON", 400),
        ("GET /v1/models", right, "", 200),
        ("GET /metrics", right, "", 200),
        ("GET /nowhere", right, "", 404),
        ("POST /v1/completions", right, "{\"model\":\"m\"}", 200),
    ] {
        client.ask(line, headers, body);
        let (head, text) = client.answer();
        assert_eq!(
            (head.status(), name(&head)),
            (status, "q"),
            "{line}: {text}"
        );
    }
}

#[test]
fn a_connection_that_leaves_http_has_a_name_too() {
    let played = Played::start();
    let mut client = played.client();
    client.put("GET /upstream/m/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nx-request-id: ws-1\r\n\r\n");
    let mut worker = played.worker();
    assert_eq!(name(&worker.head()), "ws-1");
    worker.put(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    );
    let head = client.head();
    assert_eq!((head.status(), name(&head)), (101, "ws-1"));
}

#[test]
fn a_call_has_a_name_also_when_it_is_refused() {
    let residentd = one("");
    with(residentd.address(), |client| async move {
        let metadata = [("x-request-id", "call-7")];
        let done = ask(&client, "ModelInfer", &metadata, named("m").frame()).await;
        assert_eq!(
            (done.status(), &done.headers["x-request-id"] == "call-7"),
            ("0", true)
        );
        let done = ask(&client, "ModelInfer", &metadata, named("other").frame()).await;
        assert_eq!(
            (done.status(), &done.headers["x-request-id"] == "call-7"),
            ("5", true)
        );
        let done = ask(&client, "/a.B/C", &[("x-model", "m")], Bytes::new()).await;
        assert_eq!(done.headers["x-request-id"].len(), 32);
    });
}

#[test]
fn a_place_in_a_trace_passes_as_it_is_and_is_logged_only_when_it_is_one() {
    let config =
        format!("[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m'\nmemory = \"32MiB\"\n");
    let residentd = Residentd::start_with(&config, &LOG);
    let mut client = Wire::to(residentd.address());
    let twice = format!("{TRACE}\r\ntraceparent: {TRACE}");
    for sent in [TRACE, "00-evil\"}-x-01", &twice] {
        let headers = format!("traceparent: {sent}\r\ntracestate: a=1,b=2\r\nx-request-id: t\r\n");
        client.ask("POST /upstream/m/echo", &headers, "{}");
        let (head, text) = client.answer();
        assert_eq!(head.status(), 200, "{text}");
        let echo: Value = serde_json::from_str(&text).expect("JSON");
        let got = echo["headers"].to_string();
        assert!(got.contains("a=1,b=2"), "{got}");
        let first = sent.split('\r').next().expect("a part");
        let first = serde_json::to_string(first).expect("JSON");
        assert!(got.contains(&first[1..first.len() - 1]), "{got}");
    }
    let lines = lines(&residentd, 3);
    assert_eq!(lines[0]["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(lines[0]["request_id"], "t");
    assert!(
        lines[1]["trace_id"].is_null() && lines[2]["trace_id"].is_null(),
        "{lines:?}"
    );
}
