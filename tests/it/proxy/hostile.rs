//! Requests that are meant to hurt (A37).

use super::rig::{Played, one};
use crate::support::Residentd;
use crate::support::wire::Wire;

/// Somebody else is served as ever.
fn others_are_unharmed(residentd: &Residentd) {
    let answer = residentd.complete("m");
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn a37_a_length_beside_chunks_never_smuggles_a_second_request() {
    let played = Played::start();
    let lines = ["content-length: 4\r\n", "transfer-encoding: chunked\r\n"];
    for framing in [lines.concat(), [lines[1], lines[0]].concat()] {
        let mut client = played.client();
        let smuggled = "GET /upstream/m/smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
        client.put(format!(
            "POST /upstream/m/x HTTP/1.1\r\nhost: x\r\n{framing}\r\n3\r\nabc\r\n0\r\n\r\n{smuggled}"
        ));
        let mut worker = played.worker();
        let head = worker.head();
        // One framing reaches the worker, that of the body as it was read.
        let (length, coding) = (head.get("content-length"), head.get("transfer-encoding"));
        assert!(
            length.is_none() != coding.is_none(),
            "{length:?} {coding:?}"
        );
        assert_eq!(worker.body(&head), b"abc");
        worker.put("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
        assert_eq!(client.answer().1, "ok");
        // Whoever thinks of the other framing finds the connection closed.
        assert_eq!(client.rest().0, b"");
        assert!(played.try_worker().is_none());
    }
}

#[test]
fn a37_a_request_without_sense_is_refused_and_its_connection_closed() {
    let residentd = one("");
    others_are_unharmed(&residentd);
    let post = "POST /upstream/m/echo HTTP/1.1\r\nhost: x\r\n";
    for request in [
        format!("{post}content-length: 1\r\ncontent-length: 2\r\n\r\nab"),
        format!("{post}content-length: -1\r\n\r\n"),
        format!("{post}content-length: +1\r\n\r\na"),
        format!("{post}content-length: 1, 2\r\n\r\nab"),
        format!("{post}content-length: 99999999999999999999999\r\n\r\n"),
        format!("{post}transfer-encoding: gzip\r\n\r\n"),
        format!("{post}transfer-encoding: chunked, gzip\r\n\r\n"),
        format!("{post}transfer-encoding : chunked\r\n\r\n0\r\n\r\n"),
        format!("{post}x-a: 1\r\n folded: 2\r\n\r\n"),
        format!("{post}x-a: \0\r\n\r\n"),
        format!("{post}x a: 1\r\n\r\n"),
        "POST /upstream/m/echo HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "POST /upstream/m/ec ho HTTP/1.1\r\nhost: x\r\n\r\n".to_owned(),
        "GET /upstream/m/echo HTTP/9.9\r\nhost: x\r\n\r\n".to_owned(),
        "\0\x01\x02\x03 nonsense\r\n\r\n".to_owned(),
    ] {
        let mut wire = Wire::to(residentd.address());
        wire.put(&request);
        let (answer, _) = wire.rest();
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(text.starts_with("HTTP/1.1 4"), "{request:?}: {text:?}");
        assert_eq!(
            text.matches("HTTP/1.1 ").count(),
            1,
            "{request:?}: {text:?}"
        );
        others_are_unharmed(&residentd);
    }
}

#[test]
fn a37_bad_chunks_are_a_400_and_the_worker_never_takes_the_body_for_whole() {
    let played = Played::start();
    for bad in [
        "xyz\r\nab\r\n",
        "3\r\nabcd\r\n",
        "-1\r\n",
        "fffffffffffffffff\r\n",
        "3 \n\n\n",
    ] {
        let mut client = played.client();
        client.put("POST /upstream/m/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n");
        let mut worker = played.worker();
        worker.head();
        assert_eq!(worker.chunk().expect("the good chunk"), b"ab");
        client.put(bad);
        let (head, text) = client.answer();
        assert_eq!(head.status(), 400, "{bad:?}: {text}");
        assert!(text.contains("bad_request"), "{text}");
        let (rest, _) = worker.rest();
        assert!(!rest.ends_with(b"0\r\n\r\n"), "{bad:?}: it looks whole");
        played.wait_for_leases(0);
        // Nor is it read on after the bad chunk.
        assert_eq!(client.rest().0, b"");
    }
    // While the model is looked for, likewise.
    let mut client = played.client();
    client.put("POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n");
    assert_eq!(client.answer().0.status(), 400);
}

#[test]
fn a37_a_huge_address_or_head_is_refused_and_others_are_unharmed() {
    let residentd = one("");
    others_are_unharmed(&residentd);
    let before = residentd.status_bytes("VmRSS");
    let line = "GET /upstream/m/echo HTTP/1.1\r\nhost: x\r\n";
    for (request, statuses) in [
        (
            format!(
                "GET /upstream/m/{} HTTP/1.1\r\nhost: x\r\n\r\n",
                "a".repeat(100_000)
            ),
            [414, 431],
        ),
        (
            format!("{line}{}\r\n", "x-bomb: 1\r\n".repeat(100_000)),
            [431, 400],
        ),
        (
            format!("{line}x-bomb: {}\r\n\r\n", "a".repeat(20_000_000)),
            [431, 400],
        ),
        (
            format!("{line}{}\r\n", "connection: x\r\n".repeat(5_000)),
            [431, 400],
        ),
    ] {
        let mut wire = Wire::to(residentd.address());
        // It may be refused before all of it was sent.
        let _ = wire.try_put(&request);
        let (answer, _) = wire.rest();
        let status: u16 = String::from_utf8_lossy(&answer)
            .split(' ')
            .nth(1)
            .and_then(|s| s.parse().ok())
            .unwrap_or_else(|| panic!("no answer to {:?}…", &request[..60]));
        assert!(
            statuses.contains(&status),
            "{status} to {:?}…",
            &request[..60]
        );
        others_are_unharmed(&residentd);
    }
    let grown = residentd.status_bytes("VmHWM").saturating_sub(before);
    assert!(grown < 8 << 20, "grew by {grown} bytes");
}

#[test]
fn a37_a_path_made_of_slashes_costs_no_time() {
    let residentd = one("");
    others_are_unharmed(&residentd);
    let start = crate::support::now();
    for _ in 0..50 {
        let path = format!("/upstream/{}", "a/".repeat(30_000));
        assert_eq!(residentd.ask("GET", &path, None).status, 404);
    }
    assert!(start.elapsed() < std::time::Duration::from_secs(10));
}

#[test]
fn a37_a_prefix_in_single_bytes_costs_little_memory() {
    let residentd = one("");
    others_are_unharmed(&residentd);
    let before = residentd.status_bytes("VmRSS");
    let mut wire = Wire::to(residentd.address());
    wire.put(
        "POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n6\r\n{\"x\":\"\r\n",
    );
    let bytes = "1\r\na\r\n".repeat(600_000);
    wire.put(bytes);
    wire.put_chunk("\",\"model\":\"m\"}");
    wire.put_chunk("");
    // The stub has no such route; what counts is that it was asked.
    let (head, text) = wire.answer();
    assert_eq!(head.get("x-stub-name"), Some("m"), "{text}");
    let grown = residentd.status_bytes("VmHWM").saturating_sub(before);
    assert!(grown < 12 << 20, "grew by {grown} bytes");
}

#[test]
fn a37_clients_that_stop_in_the_middle_are_no_hindrance() {
    let residentd = one("");
    others_are_unharmed(&residentd);
    let stopped = [
        "",
        "GET /upst",
        "GET /upstream/m/echo HTTP/1.1\r\nhost: x\r\nx-a: ",
        "POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"mo",
        "POST /upstream/m/sink HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"mo",
    ];
    let wires: Vec<Wire> = (0..40)
        .flat_map(|_| stopped)
        .map(|text| {
            let mut wire = Wire::to(residentd.address());
            wire.put(text);
            wire
        })
        .collect();
    others_are_unharmed(&residentd);
    let mut wire = Wire::to(residentd.address());
    wire.ask("POST /upstream/m/echo", "connection: close\r\n", "abc");
    let (head, text) = wire.answer();
    assert_eq!(head.status(), 200, "{text}");
    drop(wires);
    crate::support::wait_until("all leases to come back", || {
        (residentd.model("m")["in_flight"] == 0).then_some(())
    });
}
