//! Bodies and headers in both directions.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::json;

use super::{Residentd, Wire, arrived, echoed, exchange, one, served_by, two};
use crate::support::{kill, now, pause, wait_until};

/// Bytes that residentd itself has resident.
fn resident(residentd: &Residentd) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", residentd.pid()))
        .expect("residentd runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.expect("a process has VmRSS") * 1024
}

#[test]
fn a_body_arrives_as_it_was_sent_with_a_length_or_in_chunks() {
    let residentd = Residentd::start(&one());
    let body: Vec<u8> = (0..300_000_u32)
        .map(|n| n.to_le_bytes()[1] ^ n.to_le_bytes()[0])
        .collect();
    let straight = echoed(&residentd, "POST /upstream/red/echo", "", &body);
    assert_eq!(straight["body_length"], 300_000);
    let mut chunked = Vec::new();
    for piece in body.chunks(7_001) {
        write!(chunked, "{:x}\r\n", piece.len()).expect("written");
        chunked.extend_from_slice(piece);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    let pieces = echoed(
        &residentd,
        "POST /upstream/red/echo",
        "transfer-encoding: chunked\r\n",
        &chunked,
    );
    assert_eq!(pieces["body_length"], 300_000);
    assert_eq!(pieces["body_checksum"], straight["body_checksum"]);
}

#[test]
fn every_method_passes_and_a_head_has_no_body() {
    let residentd = Residentd::start(&one());
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        let echo = echoed(&residentd, &format!("{method} /upstream/red/echo"), "", "");
        assert_eq!(echo["method"], method);
    }
    let mut wire = Wire::to(&residentd);
    wire.send("HEAD /upstream/red/echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let raw = String::from_utf8(wire.rest()).expect("a head is text");
    assert!(
        raw.starts_with("HTTP/1.1 200") && raw.ends_with("\r\n\r\n"),
        "{raw}"
    );
}

#[test]
fn headers_of_one_connection_stay_on_it_and_all_others_pass() {
    let residentd = Residentd::start(&one());
    let headers = "connection: keep-alive, x-mine\r\nkeep-alive: timeout=5\r\nx-mine: 1\r\nproxy-connection: x\r\nte: gzip\r\nauthorization: Bearer abc\r\nx-many: 1\r\nx-many: 2\r\naccept: text/event-stream\r\n";
    let echo = echoed(&residentd, "POST /upstream/red/echo", headers, "hello");
    for gone in [
        "connection",
        "keep-alive",
        "x-mine",
        "proxy-connection",
        "te",
        "transfer-encoding",
    ] {
        assert_eq!(arrived(&echo, gone), None, "{gone}");
    }
    assert_eq!(arrived(&echo, "authorization"), Some("Bearer abc"));
    assert_eq!(arrived(&echo, "accept"), Some("text/event-stream"));
    let host = arrived(&echo, "host").expect("a host");
    assert!(host.starts_with("127.0.0.1:"), "the worker's own: {host}");
    let many = echo["headers"]
        .as_array()
        .expect("pairs")
        .iter()
        .filter(|p| p[0] == "x-many")
        .count();
    assert_eq!(many, 2);
}

#[test]
fn a_client_that_waits_for_100_continue_gets_it() {
    let residentd = Residentd::start(&one());
    residentd.complete("red");
    let mut wire = Wire::to(&residentd);
    wire.send("POST /upstream/red/echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    assert_eq!(wire.read_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
    wire.send("hello");
    let answer = wire.answer();
    assert_eq!(
        (answer.status, answer.json()["body_start"].as_str()),
        (200, Some("hello"))
    );
}

#[test]
fn events_pass_one_by_one_as_they_come() {
    let residentd = Residentd::start(&one());
    residentd.complete("red");
    let mut wire = Wire::to(&residentd);
    let body =
        json!({"model": "red", "prompt": "x", "stream": true, "x_chunks": 4, "x_pace_ms": 300})
            .to_string();
    wire.send(format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ));
    wire.read_until("\r\n\r\n");
    let mut came = Vec::new();
    for _ in 0..4 {
        wire.read_until("\n\n");
        came.push(now());
    }
    // The worker pauses 300 ms after each: none waited for the next.
    for pair in came.windows(2) {
        let gap = pair[1] - pair[0];
        assert!(
            gap > Duration::from_millis(150),
            "{gap:?}: they came together"
        );
    }
    let rest = wire.read_until("data: [DONE]\n\n\r\n0\r\n\r\n");
    assert!(rest.contains("[DONE]"));
}

#[test]
fn a31_a_stream_of_events_that_breaks_says_so_and_does_not_end() {
    let residentd = Residentd::start(&one());
    residentd.complete("red");
    for broken in ["x_break_after", "x_reset"] {
        let mut asked = json!({"model": "red", "prompt": "x", "stream": true, "x_chunks": 50, "x_pace_ms": 5, "x_break_after": 3});
        if broken == "x_reset" {
            asked[broken] = json!(true);
        }
        let answer = residentd.ask("POST", "/v1/completions", Some(&asked.to_string()));
        let text = answer.text();
        assert!(
            !answer.complete && !text.contains("[DONE]"),
            "{broken}: {text}"
        );
        assert!(
            text.ends_with("\"code\":\"worker_failed\"}}\n\n"),
            "{broken}: {text}"
        );
    }
}

#[test]
fn a31_an_answer_with_a_length_that_breaks_is_short() {
    let residentd = Residentd::start(&one());
    let asked = json!({"model": "red", "prompt": "x", "x_chunks": 50, "x_chunk_bytes": 200, "x_pace_ms": 2, "x_exit_after": 10});
    let answer = residentd.ask("POST", "/v1/completions", Some(&asked.to_string()));
    assert_eq!(answer.status, 200);
    assert!(
        !answer.complete && !answer.text().contains("worker_failed"),
        "{}",
        answer.text()
    );
}

#[test]
fn a_large_upload_and_a_slow_reader_cost_little_memory() {
    let residentd = Residentd::start(&one());
    residentd.complete("red");
    let before = resident(&residentd);
    let body = vec![b'x'; 64 << 20];
    let answer = exchange(&residentd, "POST /upstream/red/sink", "", &body);
    assert_eq!(
        (answer.status, answer.json()["length"].as_u64()),
        (200, Some(64 << 20))
    );
    let after = resident(&residentd);
    assert!(
        after < before + (20 << 20),
        "{before} before the upload, {after} after"
    );

    // The worker would send 64 MB at once; the client takes a little.
    let mut wire = Wire::to(&residentd);
    let asked = json!({"model": "red", "prompt": "x", "stream": true, "x_chunks": 1000, "x_chunk_bytes": 65536}).to_string();
    wire.send(format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{asked}",
        asked.len()
    ));
    let mut some = [0_u8; 4096];
    for _ in 0..20 {
        wire.0.read_exact(&mut some).expect("the stream flows");
        pause(Duration::from_millis(10));
    }
    let held = resident(&residentd);
    assert!(
        held < after + (4 << 20),
        "{after} before, {held} with a slow reader"
    );
}

#[test]
fn a_kept_connection_that_the_worker_closed_is_no_fault_the_client_sees() {
    let residentd = Residentd::start(&one());
    for _ in 0..20 {
        assert_eq!(residentd.complete("red").status, 200);
        // The worker closes the connection without an answer; it lives on.
        let asked = json!({"model": "red", "prompt": "x", "x_drop": true}).to_string();
        let answer = residentd.ask("POST", "/v1/completions", Some(&asked));
        assert_eq!(answer.status, 502, "{}", answer.text());
    }
    assert_eq!(residentd.complete("red").status, 200);
}

#[test]
fn a_worker_that_dies_before_it_answers_is_replaced_and_the_request_sent_again() {
    let residentd = Residentd::start(&one());
    let pid = residentd.complete("red").worker_pid();
    let asked = json!({"model": "red", "prompt": "x", "x_delay_ms": 2000}).to_string();
    let answer = std::thread::scope(|scope| {
        let waits = scope.spawn(|| residentd.ask("POST", "/v1/completions", Some(&asked)));
        wait_until("the request to be inside", || {
            (residentd.model("red")["in_flight"] == 1).then_some(())
        });
        kill(pid, nix::sys::signal::Signal::SIGKILL);
        waits.join().expect("no panic")
    });
    assert_eq!(served_by(&answer), (200, Some("red")), "{}", answer.text());
    assert_ne!(answer.worker_pid(), pid);
}

#[test]
fn one_connection_serves_many_requests_for_several_models() {
    let residentd = Residentd::start(&two());
    let mut wire = Wire::to(&residentd);
    for (model, name) in [("red", "red"), ("azure", "blue"), ("red", "red")] {
        wire.send(format!(
            "GET /upstream/{model}/echo HTTP/1.1\r\nhost: x\r\n\r\n"
        ));
        let head = wire.read_until("\r\n\r\n");
        assert!(head.contains(&format!("x-stub-name: {name}")), "{head}");
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let length = length.and_then(|text| text.parse().ok()).expect("a length");
        let mut body = vec![0_u8; length];
        wire.0.read_exact(&mut body).expect("the whole body");
    }
}

#[test]
fn a37_requests_that_two_servers_could_read_differently_are_refused() {
    let residentd = Residentd::start(&one());
    residentd.complete("red");
    let smuggled = "0\r\n\r\nGET /upstream/red/stats HTTP/1.1\r\nhost: x\r\n\r\n";
    for headers in [
        "content-length: 5\r\ncontent-length: 6\r\n",
        "content-length: +5\r\n",
        "content-length: 5, 6\r\n",
        "transfer-encoding: gzip\r\n",
        "transfer-encoding: chunked, gzip\r\n",
        "bad header: 1\r\n",
        "x: a\0b\r\n",
    ] {
        let mut wire = Wire::to(&residentd);
        wire.send(format!(
            "POST /upstream/red/echo HTTP/1.1\r\nhost: x\r\n{headers}\r\n{smuggled}"
        ));
        let raw = String::from_utf8_lossy(&wire.rest()).into_owned();
        assert!(raw.starts_with("HTTP/1.1 400"), "{headers:?}: {raw}");
        assert_eq!(raw.matches("HTTP/1.1").count(), 1, "{headers:?}: {raw}");
    }
    // With both, the chunks count (RFC 9112, 6.3), and the worker sees one framing.
    let mut wire = Wire::to(&residentd);
    wire.send("POST /upstream/red/echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    let raw = wire.rest();
    if let Some(answer) = crate::support::Answer::parse(&raw).filter(|answer| answer.status == 200)
    {
        let echo = answer.json();
        assert_eq!(echo["body_start"], "hello");
        assert!(
            arrived(&echo, "content-length").is_none_or(|length| length == "5"),
            "{echo}"
        );
    } else {
        assert!(
            raw.starts_with(b"HTTP/1.1 400"),
            "{:?}",
            String::from_utf8_lossy(&raw)
        );
    }
    let broken = exchange(
        &residentd,
        "POST /upstream/red/echo",
        "transfer-encoding: chunked\r\n",
        "zz\r\nhello\r\n0\r\n\r\n",
    );
    assert_eq!(broken.status, 400, "{}", broken.text());
    assert_eq!(broken.json()["error"]["code"], "bad_request");
    assert_eq!(residentd.complete("red").status, 200);
}

#[test]
fn a37_huge_heads_are_refused_and_others_are_served() {
    let residentd = Residentd::start(&one());
    let many = "x: y\r\n".repeat(100_000);
    let long = "a".repeat(1 << 20);
    for head in [
        format!("GET /upstream/red/echo HTTP/1.1\r\nhost: x\r\n{many}\r\n"),
        format!("GET /upstream/red/{long} HTTP/1.1\r\nhost: x\r\n\r\n"),
        format!("GET /upstream/red/echo HTTP/1.1\r\nhost: x\r\nx: {long}\r\n\r\n"),
    ] {
        let mut wire = Wire::to(&residentd);
        wire.send(&head);
        let raw = String::from_utf8_lossy(&wire.rest()).into_owned();
        let refused = ["HTTP/1.1 414", "HTTP/1.1 431", "HTTP/1.1 400"]
            .iter()
            .any(|status| raw.starts_with(status));
        // What is cut off while it still sends may not see the answer.
        assert!(refused || raw.is_empty(), "{raw:.200}");
        assert_eq!(residentd.complete("red").status, 200);
    }
}

#[test]
fn an_upload_in_chunks_over_the_cap_is_refused_as_too_large() {
    let residentd = Residentd::start_with(&one(), &[("RESIDENTD_MAX_BODY", "128KiB")]);
    let mut chunked = Vec::new();
    for _ in 0..300 {
        chunked.extend_from_slice(b"400\r\n");
        chunked.extend_from_slice(&[b'x'; 1024]);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    let headers = "transfer-encoding: chunked\r\n";
    let answer = exchange(&residentd, "POST /upstream/red/sink", headers, &chunked);
    assert_eq!(answer.status, 413, "{}", answer.text());
    assert_eq!(answer.json()["error"]["code"], "body_too_large");
    assert_eq!(residentd.complete("red").status, 200);
}
