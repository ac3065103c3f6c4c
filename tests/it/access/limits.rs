//! What a client may send, and how slowly: framing that two could read in two
//! ways, heads without an end, connections on which nothing is asked.

use std::time::Duration;

use super::with;
use crate::proxy::rig::Played;
use crate::support::wire::Wire;
use crate::support::{Residentd, now};

/// What is sent, and what becomes of it.
enum Fate {
    /// It is refused, and the connection closed.
    Refused,
    /// The worker gets this path and this body, in a framing of our own.
    Passed(&'static str, &'static str),
}

#[test]
fn a37_what_could_be_read_in_two_ways_is_refused_or_passed_on_in_one() {
    use Fate::{Passed, Refused};
    let post = "POST /upstream/m/x HTTP/1.1\r\nhost: x\r\n";
    let chunked = "transfer-encoding: chunked\r\n";
    let played = Played::start();
    for (sent, fate) in [
        (format!("{post}content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"), Refused),
        (format!("{post}content-length: 3\r\ncontent-length: 3\r\n\r\nabc"), Passed("/x", "abc")),
        (format!("{post}content-length: 3\r\nx-a: b\r\n c\r\n\r\nabc"), Refused),
        (format!("{post}content-length: 0x3\r\n\r\nabc"), Refused),
        (format!("{post}content-length : 3\r\n\r\nabc"), Refused),
        (format!("{post} content-length: 3\r\n\r\nabc"), Refused),
        (format!("{post}content_length: 30\r\ncontent-length: 3\r\n\r\nabc"), Passed("/x", "abc")),
        (format!("{post}transfer-encoding: chunked, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"), Refused),
        (format!("{post}transfer-encoding: xchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"), Refused),
        (format!("{post}transfer-encoding: \x0bchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"), Refused),
        // An extension of a chunk means nothing to anybody and is left out.
        (format!("{post}{chunked}\r\n3;a=\"b\"\r\nabc\r\n0;x\r\n\r\n"), Passed("/x", "abc")),
        // A bare LF ends a line (RFC 9112, 2.2), for us alone: the worker sees none.
        ("POST /upstream/m/x HTTP/1.1\nhost: x\ncontent-length: 3\n\nabc".into(), Passed("/x", "abc")),
        (format!("{post}x-a: b\rcontent-length: 9\r\ncontent-length: 3\r\n\r\nabc"), Refused),
        (
            "POST http://elsewhere.example/upstream/m/x HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc".into(),
            Passed("/x", "abc"),
        ),
        ("POST /upstream/m/x HTTP/1.1 \r\nhost: x\r\n\r\n".into(), Refused),
    ] {
        let mut client = played.client();
        client.put(&sent);
        match fate {
            Refused => {
                let (answer, _) = client.rest();
                let text = String::from_utf8_lossy(&answer).into_owned();
                assert!(text.starts_with("HTTP/1.1 400"), "{sent:?}: {text:?}");
                assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{sent:?}: {text:?}");
                assert!(played.try_worker().is_none(), "{sent:?}");
            }
            Passed(path, body) => {
                let mut worker = played.worker();
                let head = worker.head();
                assert_eq!(head.line, format!("POST {path} HTTP/1.1"), "{sent:?}");
                let framings = head.all("content-length").len() + head.all("transfer-encoding").len();
                assert_eq!(framings, 1, "{sent:?}: {head:?}");
                assert_eq!(head.all("host").len(), 1, "{sent:?}: {head:?}");
                assert_ne!(head.get("host"), Some("elsewhere.example"), "{sent:?}");
                assert_eq!(worker.body(&head), body.as_bytes(), "{sent:?}");
                worker.put("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok");
                assert_eq!(client.answer().1, "ok", "{sent:?}");
            }
        }
        played.wait_for_leases(0);
    }
}

#[test]
fn a37_heads_have_a_most_of_lines_and_of_bytes() {
    let residentd = Residentd::start(&with(""));
    let status = |head: String| {
        let mut wire = Wire::to(residentd.address());
        // It may be refused before all of it was sent.
        let _ = wire.try_put(format!("GET /livez HTTP/1.1\r\nhost: x\r\n{head}\r\n"));
        wire.head().status()
    };
    let many = |count: usize| {
        (0..count)
            .map(|n| format!("x-{n}: 1\r\n"))
            .collect::<String>()
    };
    assert_eq!(status(many(90)), 200);
    assert_eq!(status(many(150)), 431);
    assert_eq!(status(format!("x-a: {}\r\n", "a".repeat(16 << 10))), 200);
    assert_eq!(status(format!("x-a: {}\r\n", "a".repeat(2 << 20))), 431);
}

#[test]
fn a37_a_client_that_says_nothing_or_little_is_left_after_half_a_minute() {
    let residentd = Residentd::start(&with(""));
    let patience = Duration::from_secs(45);
    let start = now();
    let wires = [
        "",
        "PRI * HT",
        "GET /liv",
        "GET /livez HTTP/1.1\r\nhost: x\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        // One that has asked and asks no more.
        "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n",
    ]
    .map(|text| {
        let mut wire = Wire::to(residentd.address());
        wire.put(text);
        wire.stream()
            .set_read_timeout(Some(patience))
            .expect("a time-out");
        (text, wire)
    });
    for (text, wire) in wires {
        let (_, error) = wire.rest();
        assert!(start.elapsed() < patience, "{text:?} is still there");
        assert!(
            start.elapsed() > Duration::from_secs(5),
            "{text:?} was cut at once"
        );
        let timed_out = matches!(
            error,
            Some(std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
        );
        assert!(!timed_out, "{text:?}: {error:?}");
    }
    assert_eq!(residentd.ask("GET", "/livez", None).status, 200);
}
