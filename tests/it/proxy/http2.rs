//! Clients that speak HTTP/2 without TLS, knowing that residentd does.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use serde_json::{Value, json};

use super::checksum::Checksum;
use super::rig::{Played, one};
pub(crate) use crate::support::calls::with;

fn request(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(format!("http://models.test{path}"))
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(Full::new(body.into()))
        .expect("a good request")
}

#[test]
fn a36_many_requests_share_one_http2_connection_and_bodies_pass_unchanged() {
    let residentd = one("");
    let bodies: Vec<Vec<u8>> = [0_usize, 10, 100_000, 2_000_000]
        .iter()
        .map(|length| {
            (0..*length)
                .map(|n| n.to_be_bytes()[7] ^ n.to_be_bytes()[6])
                .collect()
        })
        .collect();
    with(residentd.address(), |sender| async move {
        let asked = (0..40).map(|n| {
            let (mut sender, body) = (sender.clone(), bodies[n % 4].clone());
            async move {
                let sum = Checksum::of(&body);
                let answer = sender.send_request(request("/upstream/m/echo", body)).await;
                let answer = answer.expect("an answer");
                assert_eq!(answer.status(), StatusCode::OK);
                let text = answer.collect().await.expect("a whole answer").to_bytes();
                let echo: Value = serde_json::from_slice(&text).expect("JSON");
                assert_eq!(echo["body_checksum"], json!(sum));
                assert_eq!(echo["version"], "HTTP/1.1");
                let headers = echo["headers"].to_string();
                assert!(
                    headers.contains("[\"x-forwarded-host\",\"models.test\"]"),
                    "{headers}"
                );
                assert!(headers.contains("[\"cookie\",\"a=1; b=2\"]"), "{headers}");
            }
        });
        futures_util::future::join_all(asked).await;
    });
}

#[test]
fn a36_an_answer_to_head_has_the_length_and_no_content_over_http2() {
    let residentd = one("");
    with(residentd.address(), |mut sender| async move {
        for (path, status) in [
            ("/v1/models", 200),
            ("/v1/models/nobody", 404),
            ("/upstream/nobody/x", 404),
            ("/upstream/m/echo", 200),
            ("/api/v1/memory/stats", 200),
            ("/api/v1/nothing", 404),
            ("/livez", 200),
        ] {
            let request = Request::head(format!("http://models.test{path}"));
            let request = request
                .body(Full::<Bytes>::default())
                .expect("a good request");
            let answer = sender.send_request(request).await.expect("an answer");
            assert_eq!(answer.status(), status, "{path}");
            let length = answer.headers().get("content-length");
            assert!(length.is_some_and(|length| length != "0"), "{path}");
            // Content would be an error of the protocol.
            let text = answer.collect().await.expect("a clean end").to_bytes();
            assert!(text.is_empty(), "{path}: {text:?}");
        }
    });
}

#[test]
fn a36_events_come_one_by_one_over_http2_and_a_broken_stream_is_an_error() {
    let played = Played::start();
    let worker_side = &played;
    with(played.residentd.address(), |mut sender| async move {
        let body = "{\"model\":\"m\"}";
        for breaks in [false, true] {
            let answer = sender.send_request(request("/v1/x", body));
            let serve = async {
                // The test's worker is a thread's matter; this runtime waits.
                let mut worker = loop {
                    if let Some(worker) = worker_side.try_worker() {
                        break worker;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                };
                let head = worker.head();
                assert_eq!(head.get("content-length"), Some("13"));
                worker.put("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n");
                worker
            };
            let (answer, mut worker) = tokio::join!(answer, serve);
            let answer = answer.expect("an answer");
            assert!(answer.headers().get("connection").is_none());
            let mut body = answer.into_body();
            for number in 0..5 {
                let text = format!("part {number}");
                worker.put_chunk(&text);
                let frame = body.frame().await.expect("a part").expect("no error");
                assert_eq!(frame.into_data().expect("data"), text);
            }
            if breaks {
                drop(worker);
                let ended = body.frame().await.expect("not a clean end");
                assert!(ended.is_err());
            } else {
                worker.put_chunk("");
                let rest = body.collect().await.expect("a clean end").to_bytes();
                assert!(rest.is_empty());
            }
        }
    });
    played.wait_for_leases(0);
}

/// A reset throws away what the connection has not written: the last event was now
/// and then lost, while others wrote at the same time.
#[test]
fn a31_a_broken_stream_of_events_says_so_over_http2_before_it_is_reset() {
    let residentd = one("");
    with(residentd.address(), |sender| async move {
        let asked = (0..50).map(|_| {
            let mut sender = sender.clone();
            async move {
                let body = "{\"stream\":true,\"x_chunks\":9,\"x_break_after\":3}";
                let answer = sender.send_request(request("/v1/completions", body)).await;
                let mut body = answer.expect("an answer").into_body();
                let mut heard = Vec::new();
                while let Ok(frame) = body.frame().await.expect("no clean end") {
                    heard.extend_from_slice(&frame.into_data().expect("data"));
                }
                String::from_utf8(heard).expect("text")
            }
        });
        for heard in futures_util::future::join_all(asked).await {
            let (said, why) = heard.split_once("event: error\n").expect("an error event");
            assert_eq!(said.matches("data: {").count(), 3, "{heard}");
            assert!(why.contains("worker_failed"), "{heard}");
        }
    });
}

#[test]
fn a34_a_stream_of_http2_that_is_dropped_is_heard_of_by_the_worker() {
    let played = Played::start();
    let worker_side = &played;
    let (worker, status) = with(played.residentd.address(), |mut sender| async move {
        let asked = sender.send_request(request("/v1/x", "{\"model\":\"m\"}"));
        let accept = async {
            loop {
                if let Some(mut worker) = worker_side.try_worker() {
                    worker.head();
                    return worker;
                }
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        // The request is dropped; the connection stays.
        let worker = tokio::select! {
            worker = accept => worker,
            _ = asked => panic!("nobody answered"),
        };
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        let cancelled = request("/upstream/nobody/x", "");
        let answer = sender.send_request(cancelled).await.expect("an answer");
        (worker, answer.status())
    });
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(worker.rest().0.starts_with(b"{\"model\""));
    played.wait_for_leases(0);
}

#[test]
fn a34_a_stream_of_http2_that_leaves_between_two_heartbeats_is_heard_of_by_the_worker() {
    let played = Played::with("heartbeat = \"100ms\"");
    with(played.residentd.address(), |mut sender| async move {
        let asked = sender.send_request(request("/v1/x", "{\"model\":\"m\",\"stream\":true}"));
        let answer = asked.await.expect("a head before the worker's");
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        let mut body = answer.into_body();
        for _ in 0..2 {
            let frame = body.frame().await.expect("a comment").expect("no error");
            assert_eq!(frame.into_data().expect("data"), ": waiting\n\n");
        }
        drop(body);
        // The connection stays, and carries the word that the stream is dropped.
        let other = request("/upstream/nobody/x", "");
        let answer = sender.send_request(other).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    });
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    assert_eq!(worker.rest().0, b"");
    played.wait_for_leases(0);
}
