//! Connections to the worker that are kept for the next request.

use super::rig::Played;
use crate::support::wire::Wire;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[test]
fn a_connection_to_the_worker_serves_one_request_after_the_other() {
    let chunked = |body: &str| {
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{body}0\r\n\r\n")
    };
    let played = Played::start();
    let (mut client, mut worker) = kept(&played);
    // After each kind of end the same connection is used again.
    for (line, answer) in [
        ("POST /v1/x", OK),
        ("POST /v1/x", &chunked("2\r\nok\r\n")),
        ("POST /v1/x", &chunked("")),
        ("POST /v1/x", "HTTP/1.1 204 No Content\r\n\r\n"),
        ("POST /v1/x", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("HEAD /v1/x", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"),
        ("GET /v1/x", "HTTP/1.1 304 Not Modified\r\netag: 1\r\n\r\n"),
        ("POST /v1/x", OK),
    ] {
        let body = if line.starts_with("POST") {
            "{\"model\":\"m\"}"
        } else {
            ""
        };
        client.ask(line, "", body);
        // A panic here is a second connection: nothing comes on the first.
        let head = worker.head();
        assert_eq!(worker.body(&head), body.as_bytes());
        worker.put(answer);
        let head = client.head();
        if !line.starts_with("HEAD") {
            client.body(&head);
        }
        played.wait_for_leases(0);
    }
    assert!(played.try_worker().is_none());
}

/// A worker that does not look for a body there would take it for the next request.
#[test]
fn a37_a_body_behind_get_is_passed_on_and_its_connection_serves_no_other_request() {
    let played = Played::start();
    let (mut client, worker) = kept(&played);
    let ask = |client: &mut Wire, framing: &str| {
        client.put(format!(
            "GET /v1/x?model=m HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\n{framing}"
        ));
    };
    let answer = |mut worker: Wire, client: &mut Wire| {
        let head = worker.head();
        assert_eq!(worker.body(&head), b"abc");
        worker.put(OK);
        assert_eq!(client.answer().1, "ok");
        assert_eq!(worker.rest().0, b"", "it is closed");
    };
    ask(&mut client, "content-length: 3\r\n\r\nabc");
    answer(worker, &mut client);
    // What comes in chunks has a fresh connection.
    let chunks = "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    ask(&mut client, chunks);
    answer(played.worker(), &mut client);
    client.ask("GET /v1/x?model=m", "", "");
    let mut worker = played.worker();
    worker.head();
    worker.put(OK);
    assert_eq!(client.answer().1, "ok");
}

#[test]
fn a_tunnel_is_refused_before_any_worker_hears_of_it() {
    let played = Played::start();
    let mut client = played.client();
    client.put("CONNECT /upstream/m/x HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!(client.head().status(), 400);
    assert!(played.try_worker().is_none());
}

/// A client, and the worker's side of a connection that is kept.
fn kept(played: &Played) -> (Wire, Wire) {
    let mut client = played.client();
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    worker.put(OK);
    assert_eq!(client.answer().1, "ok");
    (client, worker)
}

/// Answers the next connection's request.
fn serve(played: &Played) -> Vec<u8> {
    let mut worker = played.worker();
    let head = worker.head();
    let body = worker.body(&head);
    worker.put(OK);
    body
}

#[test]
fn a_kept_connection_that_the_worker_closed_is_no_error() {
    let played = Played::start();
    for _ in 0..20 {
        let (mut client, worker) = kept(&played);
        drop(worker);
        client.ask("POST /v1/x", "", "{\"model\":\"m\",\"n\":1}");
        assert_eq!(serve(&played), b"{\"model\":\"m\",\"n\":1}");
        assert_eq!(client.answer().1, "ok");
    }
}

#[test]
fn a_kept_connection_that_closes_under_the_request_is_no_error() {
    let played = Played::start();
    for reset in [false, true] {
        let (mut client, mut worker) = kept(&played);
        let body = format!("{{\"model\":\"m\",\"x\":\"{}\"}}", "x".repeat(50_000));
        client.ask("POST /v1/x", "", &body);
        worker.head();
        if reset {
            worker.reset();
        } else {
            drop(worker);
        }
        assert_eq!(serve(&played), body.as_bytes());
        assert_eq!(client.answer().1, "ok");
    }
    assert_eq!(played.residentd.model("m")["restarts"], 0);
}

#[test]
fn a_request_that_broke_on_a_kept_connection_is_sent_once_more_and_not_again() {
    // Chaos found requests that a worker got four times.
    let played = Played::start();
    let (mut client, mut worker) = kept(&played);
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    let head = worker.head();
    worker.body(&head);
    drop(worker);
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    drop(worker);
    let (head, text) = client.answer();
    assert_eq!(head.status(), 502, "{text}");
    assert!(played.try_worker().is_none());
}

#[test]
fn a_body_too_large_to_be_sent_again_goes_on_a_fresh_connection() {
    let played = Played::start();
    let (mut client, kept) = kept(&played);
    let body = format!("{{\"model\":\"m\",\"x\":\"{}\"}}", "x".repeat(500_000));
    client.ask("POST /v1/x", "", &body);
    assert_eq!(serve(&played), body.as_bytes());
    assert_eq!(client.answer().1, "ok");
    drop(kept);
}

#[test]
fn a_worker_that_breaks_again_and_again_is_a_502_after_few_tries() {
    let played = Played::start();
    let mut client = played.client();
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    for _ in 0..2 {
        let mut worker = played.worker();
        let head = worker.head();
        worker.body(&head);
    }
    let (head, text) = client.answer();
    assert_eq!(head.status(), 502, "{text}");
    assert!(text.contains("worker_failed"), "{text}");
    assert!(head.get("retry-after").is_some());
    assert!(played.try_worker().is_none());
}

#[test]
fn an_answer_that_comes_before_the_body_has_ended_is_passed_on() {
    let played = Played::start();
    let mut client = played.client();
    client.put("POST /upstream/m/x HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000\r\n\r\n");
    client.put(vec![b'x'; 100_000]);
    let mut worker = played.worker();
    worker.head();
    worker.put("HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\nno");
    let (head, text) = client.answer();
    assert_eq!((head.status(), &*text), (403, "no"));
    drop(client);
    played.wait_for_leases(0);
    // The connection on which half a body hangs serves nobody else.
    let mut client = played.client();
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    assert_eq!(serve(&played), b"{\"model\":\"m\"}");
    assert_eq!(client.answer().1, "ok");
}

#[test]
fn a_worker_that_refuses_a_body_and_closes_is_heard() {
    let played = Played::start();
    let body = vec![b'x'; 8 << 20];
    for round in 0..20 {
        let mut client = played.client();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut worker = played.worker();
                worker.head();
                worker.put(
                    "HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno",
                );
                // Closed with bytes unread, it is a reset.
            });
            let head = format!(
                "POST /upstream/m/x HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            client.put(head);
            // The rest may find nobody any more.
            let _ = client.try_put(&body);
            let (head, text) = client.answer();
            assert_eq!((head.status(), &*text), (413, "no"), "round {round}");
        });
    }
    played.wait_for_leases(0);
}

#[test]
fn a_refusal_of_our_own_reaches_a_client_that_still_sends() {
    let played = Played::start();
    let body = vec![b'x'; 8 << 20];
    for round in 0..20 {
        let mut client = played.client();
        let length = body.len();
        client.put(format!(
            "POST /upstream/nobody/x HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
        ));
        let _ = client.try_put(&body);
        assert_eq!(client.answer().0.status(), 404, "round {round}");
    }
}
