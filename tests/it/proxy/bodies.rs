//! Bodies pass unchanged, as they come, and without being gathered.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::{Value, json};

use super::checksum::Checksum;
use super::rig::{Played, one};
use crate::support::wire::Wire;
use crate::support::{now, pause, repeats, wait_until};

const MIB: u64 = 1 << 20;

/// Bytes without a pattern that a lost or doubled piece would leave whole.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_u32;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(step).collect()
}

#[test]
fn the_bytes_of_a_body_arrive_unchanged_whatever_their_number_and_framing() {
    let residentd = one("");
    for length in [0, 1, 7, 1023, 65_536, 65_537, 3_000_001] {
        let body = noise(length);
        let sum = Checksum::of(&body);
        let mut wire = Wire::to(residentd.address());
        for piece in [None, Some(1 + length / 5), Some(1 + length / 99)] {
            match piece {
                None => wire.ask("POST /upstream/m/echo", "", &body),
                Some(piece) => {
                    wire.put("POST /upstream/m/echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
                    for part in body.chunks(piece) {
                        wire.put_chunk(part);
                    }
                    wire.put_chunk("");
                }
            }
            let (head, text) = wire.answer();
            assert_eq!(head.status(), 200, "{text}");
            let echo: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(
                (&echo["body_length"], &echo["body_checksum"]),
                (&json!(length), &json!(sum)),
                "{length} bytes in pieces of {piece:?}"
            );
        }
    }
}

#[test]
fn an_answer_arrives_unchanged_whatever_its_number_and_framing() {
    let played = Played::start();
    let mut client = played.client();
    for length in [0, 1, 1023, 65_536, 3_000_001] {
        let body = noise(length);
        for chunked in [false, true] {
            client.ask("POST /upstream/m/x", "", "");
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut worker = played.worker();
                    worker.head();
                    if chunked {
                        worker.put("HTTP/1.1 201 Made\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n");
                        body.chunks(1 + length / 7).for_each(|part| worker.put_chunk(part));
                        worker.put_chunk("");
                    } else {
                        worker.put(format!("HTTP/1.1 201 Made\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"));
                        worker.put(&body);
                    }
                });
                let head = client.head();
                assert_eq!(head.status(), 201);
                assert!(client.body(&head) == body, "{length} bytes, {chunked}");
            });
        }
    }
}

#[test]
fn a_client_that_expects_a_100_gets_it_and_the_worker_is_not_asked_for_it() {
    let residentd = one("");
    for length in [10_usize, 300_000] {
        let mut wire = Wire::to(residentd.address());
        wire.put(format!(
            "POST /upstream/m/echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        ));
        assert_eq!(wire.head().status(), 100);
        wire.put(vec![b'x'; length]);
        let (head, text) = wire.answer();
        assert_eq!(head.status(), 200, "{text}");
        let echo: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(echo["body_length"], length);
        assert!(!echo["headers"].to_string().contains("expect"), "{text}");
    }
}

#[test]
fn each_event_of_a_stream_is_with_the_client_before_the_next_is_sent() {
    let played = Played::start();
    let mut client = played.client();
    client.ask("POST /v1/completions", "", "{\"model\":\"m\"}");
    let mut worker = played.worker();
    worker.head();
    worker.put(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    );
    let head = client.head();
    assert_eq!(head.get("content-type"), Some("text/event-stream"));
    for number in 0..20 {
        let event = format!("data: {number}\n\n");
        worker.put_chunk(&event);
        // Nothing else is sent until this is read: a proxy that waits for more
        // would wait for ever.
        assert_eq!(client.chunk().expect("an event"), event.as_bytes());
    }
    worker.put_chunk("");
    assert_eq!(client.chunk(), None);
}

#[test]
fn each_piece_of_an_upload_is_with_the_worker_before_the_next_is_sent() {
    let played = Played::start();
    let mut client = played.client();
    client.put("POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    client.put_chunk("{\"model\":\"m\",");
    let mut worker = played.worker();
    worker.head();
    assert_eq!(worker.chunk().expect("the beginning"), b"{\"model\":\"m\",");
    for number in 0..20 {
        let piece = format!("\"k{number}\":1,");
        client.put_chunk(&piece);
        assert_eq!(worker.chunk().expect("a piece"), piece.as_bytes());
    }
    client.put_chunk("");
    assert_eq!(worker.chunk(), None);
    // An answer may begin before the body has ended, and did not need to.
    worker.put("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.head().status(), 204);
}

/// Sends `length` bytes as a body of which the beginning is `start`.
fn upload(client: &mut Wire, path: &str, headers: &str, start: &str, length: usize) {
    client.put(format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n{start}"
    ));
    let block = vec![b' '; 1 << 20];
    let mut left = length - start.len();
    while left > 0 {
        let now = left.min(block.len());
        client.put(&block[..now]);
        left -= now;
    }
}

#[test]
fn a32_a_large_upload_is_not_gathered_in_memory() {
    let played = Played::start();
    let before = played.residentd.status_bytes("VmRSS");
    let length = match repeats() {
        Some(20..) => 1 << 30,
        _ => 100 << 20,
    };
    let late = format!(
        "{{\"x\":\"{}\",\"model\":\"m\",\"y\":\"",
        "x".repeat(1 << 19)
    );
    let form = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b\r\n\r\n";
    for (path, headers, start) in [
        ("/v1/x", "", "{\"model\":\"m\",\"x\":\""),
        ("/v1/x", "", late.as_str()),
        (
            "/v1/x",
            "content-type: multipart/form-data; boundary=b\r\n",
            form,
        ),
        ("/upstream/m/x", "", ""),
    ] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut worker = played.worker();
                let head = worker.head();
                assert_eq!(head.get("content-length"), Some(&*length.to_string()));
                let mut left = length;
                while left > 0 {
                    let now = left.min(1 << 20);
                    worker.exactly(now);
                    left -= now;
                }
                worker.put("HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n");
            });
            let mut client = played.client();
            upload(&mut client, path, headers, start, length);
            assert_eq!(client.head().status(), 204, "{path}");
        });
    }
    let grown = played
        .residentd
        .status_bytes("VmHWM")
        .saturating_sub(before);
    assert!(grown < 20 * MIB, "grew by {grown} bytes");
    println!(
        "FIGURE A32 residentd grew by {} KiB in uploads of {} MiB",
        grown >> 10,
        length >> 20
    );
}

#[test]
fn a_large_download_is_not_gathered_in_memory() {
    let residentd = one("");
    residentd.complete("m");
    let before = residentd.status_bytes("VmRSS");
    let mut wire = Wire::to(residentd.address());
    let path = "POST /upstream/m/v1/completions?stream=true&x_chunks=1600&x_chunk_bytes=65536";
    wire.ask(path, "connection: close\r\n", "{}");
    wire.head();
    let (mut length, mut last) = (0, Vec::new());
    while let Some(chunk) = wire.chunk() {
        length += chunk.len();
        last = chunk;
    }
    assert!(length > 100 << 20, "{length}");
    assert!(last.ends_with(b"data: [DONE]\n\n"));
    let grown = residentd.status_bytes("VmHWM").saturating_sub(before);
    assert!(grown < 20 * MIB, "grew by {grown} bytes");
}

#[test]
fn a32_a_client_that_reads_next_to_nothing_holds_the_worker_back() {
    const STREAMS: u64 = 6;
    const SECONDS: u64 = 3;
    let played = Played::start();
    // Pages of the program itself come and go by more than is measured here.
    let before = played.residentd.status_bytes("RssAnon");
    let length = 256 << 20;
    let mut open = Vec::new();
    for _ in 0..STREAMS {
        let mut client = played.client();
        client.ask("GET /upstream/m/x", "", "");
        let mut worker = played.worker();
        worker.head();
        worker.put(format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n"
        ));
        // As much as anybody takes: the sockets' buffers and residentd's.
        let brief = Some(Duration::from_millis(300));
        worker.stream().set_write_timeout(brief).expect("an option");
        let block = vec![b'x'; 1 << 20];
        let mut sent = 0;
        while let Ok(written @ 1..) = worker.stream().write(&block) {
            sent += written;
            assert!(sent < length / 2, "nobody held the worker back");
        }
        open.push((client, worker, sent));
    }
    // Each reads 1 KiB/s, while its worker sends what anybody takes.
    let mut got = Vec::new();
    let briefer = Some(Duration::from_millis(20));
    for (_, worker, _) in &open {
        let set = worker.stream().set_write_timeout(briefer);
        set.expect("an option");
    }
    for _ in 0..SECONDS {
        pause(Duration::from_secs(1));
        for (index, (client, worker, sent)) in open.iter_mut().enumerate() {
            let mut piece = [0; 1024];
            client.stream().read_exact(&mut piece).expect("it streams");
            if index as u64 == STREAMS - 1 {
                got.extend_from_slice(&piece);
            }
            while let Ok(written @ 1..) = worker.stream().write(&[b'x'; 1 << 16]) {
                *sent += written;
            }
        }
    }
    let held = played.residentd.status_bytes("RssAnon");
    let grown = held.saturating_sub(before);
    assert!(grown < STREAMS * MIB + 4 * MIB, "grew by {grown} bytes");
    // And nothing was lost meanwhile.
    let (client, worker, sent) = open.pop().expect("a stream");
    drop(worker);
    got.extend(client.rest().0);
    let head = got.windows(4).position(|end| end == b"\r\n\r\n");
    let read = got.split_off(head.expect("a head") + 4);
    assert!(read.len() <= sent && read.iter().all(|byte| *byte == b'x'));
    drop(open);
    played.wait_for_leases(0);
}

#[test]
fn a_client_that_reads_slowly_gets_everything() {
    let residentd = one("");
    let mut wire = Wire::to(residentd.address());
    let path = "POST /upstream/m/v1/completions?stream=true&x_chunks=64&x_chunk_bytes=262144";
    wire.ask(path, "connection: close\r\n", "{}");
    wire.head();
    // Slow is: nothing is read until the stub could send no more.
    let start = now();
    wait_until("the buffers to fill", || {
        (start.elapsed() > Duration::from_millis(300)).then_some(())
    });
    let (mut events, mut small) = (0, [0_u8; 1]);
    assert_eq!(wire.stream().peek(&mut small).expect("it is open"), 1);
    while let Some(chunk) = wire.chunk() {
        events += String::from_utf8_lossy(&chunk).matches("data: ").count();
    }
    assert_eq!(events, 65);
    let ended = wire.stream().read(&mut small).expect("a plain end");
    assert_eq!(ended, 0);
}
