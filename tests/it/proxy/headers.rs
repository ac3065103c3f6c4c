//! What a worker and a client see of each other's heads.

use super::rig::{Played, one};
use crate::support::wire::Wire;

#[test]
fn headers_of_one_connection_are_dropped_both_ways() {
    let played = Played::start();
    let mut client = played.client();
    let hops = "connection: keep-alive, X-Own\r\nconnection: x-other\r\nx-own: 1\r\nx-other: 2\r\nkeep-alive: timeout=9\r\nproxy-connection: keep-alive\r\nproxy-authorization: Basic eA==\r\nte: gzip\r\n";
    client.ask(
        "POST /v1/x",
        &format!("{hops}x-kept: 3\r\n"),
        "{\"model\":\"m\"}",
    );
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    for name in [
        "connection",
        "x-own",
        "x-other",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "te",
        "upgrade",
        "transfer-encoding",
    ] {
        assert_eq!(head.get(name), None, "{name} reached the worker");
    }
    assert_eq!(head.get("x-kept"), Some("3"));

    let hops = "connection: X-Own\r\nx-own: 1\r\nkeep-alive: timeout=9\r\nproxy-authenticate: Basic\r\nupgrade: h2c\r\n";
    worker.put(format!(
        "HTTP/1.1 200 OK\r\n{hops}x-kept: 3\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-length: 0\r\n\r\n"
    ));
    let head = client.head();
    for name in [
        "connection",
        "x-own",
        "keep-alive",
        "proxy-authenticate",
        "upgrade",
    ] {
        assert_eq!(head.get(name), None, "{name} reached the client");
    }
    assert_eq!(head.get("x-kept"), Some("3"));
    assert_eq!(head.all("set-cookie"), ["a=1", "b=2"]);
}

#[test]
fn a_worker_is_called_by_its_own_name_and_told_who_asked() {
    let played = Played::start();
    let mut client = played.client();
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    let mut worker = played.worker();
    let head = worker.head();
    assert_eq!(head.all("host"), [played.worker_address()]);
    assert_eq!(head.get("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(head.get("x-forwarded-proto"), Some("http"));
    assert_eq!(head.get("x-forwarded-host"), Some("models.test"));
    drop(worker);

    let mut client = played.client();
    let before = "x-forwarded-for: 192.0.2.7\r\nx-forwarded-proto: https\r\nx-forwarded-host: api.example\r\n";
    client.ask("POST /v1/x", before, "{\"model\":\"m\"}");
    // The first request is tried again meanwhile.
    let head = loop {
        let head = played.worker().head();
        if head.get("x-forwarded-proto") == Some("https") {
            break head;
        }
    };
    assert_eq!(head.all("x-forwarded-for"), ["192.0.2.7, 127.0.0.1"]);
    assert_eq!(head.get("x-forwarded-host"), Some("api.example"));
}

#[test]
fn every_method_passes_and_a_head_has_no_body() {
    let residentd = one("");
    let mut wire = Wire::to(residentd.address());
    for method in [
        "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND",
    ] {
        for body in ["", "some bytes"] {
            wire.ask(&format!("{method} /upstream/m/echo"), "", body);
            let (head, text) = wire.answer();
            assert_eq!(head.status(), 200, "{method}: {text}");
            let echo: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(echo["method"], method);
            assert_eq!(echo["body_start"], body);
        }
    }
    wire.ask("HEAD /upstream/m/v1/models", "", "");
    let head = wire.head();
    assert_eq!(head.status(), 200);
    let length: usize = head
        .get("content-length")
        .and_then(|l| l.parse().ok())
        .expect("the length a GET would have");
    wire.ask("GET /upstream/m/v1/models", "", "");
    let (_, text) = wire.answer();
    assert_eq!(
        text.len(),
        length,
        "and the body did not come with the HEAD"
    );
}

#[test]
fn an_empty_body_is_announced_as_one_where_a_body_is_usual() {
    let played = Played::start();
    for (method, expected) in [("POST", Some("0")), ("PUT", Some("0")), ("GET", None)] {
        let mut client = played.client();
        client.put(format!(
            "{method} /upstream/m/x HTTP/1.1\r\nhost: x\r\n\r\n"
        ));
        let mut worker = played.worker();
        let head = worker.head();
        assert_eq!(head.get("content-length"), expected, "{method}");
        assert_eq!(head.get("transfer-encoding"), None);
        worker.put("HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n");
        assert_eq!(client.head().status(), 204);
    }
}
