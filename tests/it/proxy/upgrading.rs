//! Connections that leave HTTP, and HTTP/2.

use std::io::{Read, Write};

use super::{Residentd, Wire, one};
use crate::support::wait_until;

#[test]
fn an_upgraded_connection_passes_bytes_both_ways_and_holds_a_lease_until_it_ends() {
    let residentd = Residentd::start(&one());
    residentd.complete("red");
    let mut wire = Wire::to(&residentd);
    wire.send("GET /upstream/red/upgrade HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\n");
    let head = wire.read_until("\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(
        head.to_ascii_lowercase().contains("upgrade: echo"),
        "{head}"
    );
    for piece in [vec![b'a'; 3], vec![0, 255, 10, 13], vec![b'z'; 100_000]] {
        let mut back = vec![0_u8; piece.len()];
        std::thread::scope(|scope| {
            let mut half = wire.0.try_clone().expect("a second handle");
            let piece = &piece;
            scope.spawn(move || half.write_all(piece).expect("it is written"));
            wire.0.read_exact(&mut back).expect("it comes back");
        });
        assert_eq!(back, piece);
    }
    assert_eq!(residentd.model("red")["in_flight"], 1);
    drop(wire);
    wait_until("the lease to come back", || {
        (residentd.model("red")["in_flight"] == 0).then_some(())
    });
}

#[test]
fn an_upgrade_that_the_worker_refuses_is_an_ordinary_answer() {
    let residentd = Residentd::start(&one());
    let mut wire = Wire::to(&residentd);
    wire.send("GET /upstream/red/echo HTTP/1.1\r\nhost: x\r\nconnection: close, upgrade\r\nupgrade: websocket\r\n\r\n");
    let answer = wire.answer();
    assert_eq!(answer.status, 200);
    assert_eq!(super::arrived(&answer.json(), "upgrade"), Some("websocket"));
}

#[tokio::test]
async fn http2_without_tls_is_served_on_the_same_port() {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let residentd = Residentd::start(&one());
    let stream = tokio::net::TcpStream::connect(residentd.address())
        .await
        .expect("residentd listens");
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("a handshake");
    #[expect(clippy::disallowed_methods, reason = "a test's own task")]
    let task = tokio::spawn(connection);
    let body = r#"{"model": "red", "prompt": "x", "stream": true, "x_chunks": 5, "x_pace_ms": 5}"#;
    let asked = (0..3).map(|_| {
        let request = hyper::Request::post("http://here/v1/completions")
            .body(Full::new(bytes::Bytes::from(body)))
            .expect("a request");
        sender.send_request(request)
    });
    let asked: Vec<_> = asked.collect();
    for answer in asked {
        let answer = answer.await.expect("an answer");
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-stub-name"], "red");
        let whole = answer.into_body().collect().await.expect("a whole body");
        let text = String::from_utf8(whole.to_bytes().to_vec()).expect("text");
        assert_eq!(text.matches("data: ").count(), 6, "{text}");
        assert!(text.ends_with("data: [DONE]\n\n"));
    }
    drop(sender);
    task.await.expect("no panic").expect("a clean end");
}
