//! What the access log says of a request.

use serde_json::{Value, json};

use super::{LOG, lines};
use crate::support::Residentd;
use crate::support::calls::{ask, named, with};
use crate::support::residentd::STUB;
use crate::support::wire::Wire;

fn start() -> Residentd {
    Residentd::start_with(
        &format!(
            "[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m --ready-after 100ms'\nmemory = \"32MiB\"\n"
        ),
        &LOG,
    )
}

fn number(line: &Value, key: &str) -> f64 {
    line[key]
        .as_f64()
        .unwrap_or_else(|| panic!("no {key} in {line}"))
}

#[test]
fn a_line_tells_bytes_both_ways_and_what_the_request_waited_for() {
    let residentd = start();
    let mut client = Wire::to(residentd.address());
    let body = "{\"model\":\"m\",\"prompt\":\"x\"}";
    for _ in 0..2 {
        client.ask("POST /v1/completions", "", body);
        assert_eq!(client.answer().0.status(), 200);
    }
    // Larger than what is read ahead, and of unknown length.
    client.put("POST /upstream/m/echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    for _ in 0..10 {
        client.put_chunk("y".repeat(50_000));
    }
    client.put_chunk("");
    let (head, text) = client.answer();
    assert_eq!(head.status(), 200, "{text}");

    let lines = lines(&residentd, 3);
    let (cold, warm, large) = (&lines[0], &lines[1], &lines[2]);
    assert_eq!(cold["request_bytes"], body.len());
    assert!(number(cold, "cold_s") > 0.08, "it loads for 100 ms: {cold}");
    assert!(number(cold, "queue_s") >= number(cold, "cold_s"), "{cold}");
    assert!(number(cold, "wait_s") >= number(cold, "queue_s"), "{cold}");
    assert!(
        number(cold, "first_byte_s") >= number(cold, "wait_s"),
        "{cold}"
    );
    assert!(
        warm["cold_s"].is_null() && number(warm, "queue_s") < 0.05,
        "{warm}"
    );
    assert!(number(warm, "first_byte_s") <= number(warm, "wait_s") + number(warm, "duration_s"));
    assert_eq!(large["request_bytes"], 500_000);
    assert_eq!(large["bytes"], text.len());
    for line in &lines {
        assert_eq!(
            (&line["grpc_status"], &line["end"]),
            (&json!(null), &json!("whole"))
        );
        assert_eq!(line["request_id"].as_str().map(str::len), Some(32));
    }
}

#[test]
fn a_line_of_a_call_has_its_status_from_wherever_it_stands() {
    let residentd = start();
    with(residentd.address(), |client| async move {
        let frame = || named("m").frame();
        ask(&client, "ModelInfer", &[], frame()).await;
        ask(&client, "ModelInfer", &[("x-stub-status", "13")], frame()).await;
    });
    let lines = lines(&residentd, 2);
    let told = |line: &Value| (line["status"].as_u64(), line["grpc_status"].as_u64());
    assert_eq!(told(&lines[0]), (Some(200), Some(0)), "{lines:?}");
    assert_eq!(told(&lines[1]), (Some(200), Some(13)), "{lines:?}");
    assert!(lines[0]["request_bytes"].as_u64() > Some(5), "{lines:?}");
}

#[test]
fn a_connection_that_left_http_is_logged_with_what_went_each_way() {
    let played = crate::proxy::rig::Played::logged(&LOG);
    let (mut client, mut worker) = played.out_of_http();
    client.put("from the client");
    worker.exactly(15);
    worker.put("back");
    client.exactly(4);
    drop(worker);
    client.rest();
    let lines = lines(&played.residentd, 1);
    let told = ["status", "request_bytes", "bytes"].map(|key| lines[0][key].as_u64());
    assert_eq!(told, [Some(101), Some(15), Some(4)], "{lines:?}");
}
