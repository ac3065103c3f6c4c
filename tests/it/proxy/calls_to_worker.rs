//! How calls of gRPC get to a worker: to which port, on which connection, and by
//! which name of the model.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Frame;
use residentd::grpc::Value;

use super::calls::read;
use crate::support::Residentd;
use crate::support::calls::{Client, INFERENCE, ask, call, field, named, open, whole, with};
use crate::support::residentd::STUB;

/// One model.
fn model(flags: &str, keys: &str) -> String {
    format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m {flags}'\nmemory = \"32MiB\"\n{keys}\n"
    )
}

#[test]
fn a36_calls_go_to_the_port_that_a_worker_has_for_them_also_after_a_crash_of_residentd() {
    let mut residentd = Residentd::start(&model(
        "--grpc-port ${GRPC_PORT}",
        "grpc_upstream = \"http://127.0.0.1:${GRPC_PORT}\"",
    ));
    let pid = residentd.complete("m").worker_pid();
    let called = |residentd: &Residentd| {
        with(residentd.address(), |client| async move {
            let done = ask(&client, "ModelInfer", &[], named("m").frame()).await;
            assert_eq!(done.status(), "0", "{done:?}");
            assert_eq!(done.headers["x-stub-name"], "m");
        });
    };
    called(&residentd);
    residentd.wait_until_kept("m");
    residentd.signal(nix::sys::signal::Signal::SIGKILL);
    residentd.wait();
    residentd.start_again(&[]);
    called(&residentd);
    assert_eq!(residentd.complete("m").worker_pid(), pid);
}

#[test]
fn calls_of_one_message_share_a_connection_whatever_their_service() {
    let residentd = Residentd::start(&model("", ""));
    residentd.complete("m");
    with(residentd.address(), |client| async move {
        let metadata = [("x-model", "m")];
        for method in ["ModelInfer", "/a.B/C"] {
            let before = worker_connections(&client).await;
            for _ in 0..10 {
                let done = ask(&client, method, &metadata, named("m").frame()).await;
                assert_eq!(done.status(), "0", "{done:?}");
            }
            let opened = worker_connections(&client).await - before;
            assert!(opened <= 2, "{method}: {opened} connections for ten calls");
        }
    });
}

#[test]
fn calls_at_once_share_a_connection_and_a_client_that_reads_slowly_holds_up_nobody() {
    let residentd = Residentd::start(&model("", ""));
    let address = residentd.address();
    let small = || named("m").text(7, &"x".repeat(1000)).frame();
    // One connection of a client, as lines are of the thread that serves it.
    with(address, |others| async move {
        let slow = others.clone();
        ask(&others, "ModelInfer", &[], small()).await;
        let before = worker_connections(&others).await;
        // Far more than is held for it anywhere.
        let metadata = [("x-stub-times", "20000")];
        let path = format!("{INFERENCE}/ModelInfer");
        let request = call(&path, &metadata, whole(small()));
        let unread = slow.clone().send_request(request).await;
        let unread = unread.expect("an answer begins");
        for _ in 0..3 {
            let metadata = [("x-stub-delay-ms", "100")];
            let seven = (0..7).map(|_| ask(&others, "ModelInfer", &metadata, small()));
            for done in futures_util::future::join_all(seven).await {
                assert_eq!(done.status(), "0", "{done:?}");
            }
        }
        // `stats` is asked over HTTP/1.
        let opened = worker_connections(&others).await - before;
        assert_eq!(opened, 0, "eight calls at once have room on one");

        let metadata = [("x-stub-delay-ms", "300")];
        let waiting = ask(&others, "ModelInfer", &metadata, small());
        let leaves = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(unread);
            // Its reset is on the way to the worker.
            tokio::time::sleep(Duration::from_millis(100)).await;
            ask(&others, "ModelInfer", &[], small()).await
        };
        let (waited, next) = tokio::join!(waiting, leaves);
        assert_eq!((waited.status(), next.status()), ("0", "0"));
        let opened = worker_connections(&others).await - before;
        assert_eq!(opened, 1, "after a call was left the next goes elsewhere");
    });
}

/// Returns how many connections the worker has taken.
async fn worker_connections(client: &Client) -> u64 {
    let books = read(client, "http://models.test/upstream/m/stats").await;
    books["connections"].as_u64().expect("a number")
}

#[test]
fn a_worker_reads_its_own_name_of_the_model_in_every_message() {
    let residentd = Residentd::start(&model("", "use_model_name = \"densenet_onnx\""));
    with(residentd.address(), |client| async move {
        for raw in ["x".repeat(10), "x".repeat(200_000)] {
            let message = named("m").text(3, "id").text(7, &raw);
            let done = ask(&client, "ModelInfer", &[], message.frame()).await;
            assert_eq!(done.status(), "0", "{done:?}");
            let own = Value::Bytes(b"densenet_onnx");
            assert_eq!(field(&done.data, 1), Some(own));
            assert_eq!(field(&done.data, 6), Some(Value::Bytes(raw.as_bytes())));
        }
        let (say, body) = open();
        let request = call(&format!("{INFERENCE}/ModelStreamInfer"), &[], body);
        let next = |turn: u32| named("m").text(3, &turn.to_string());
        say.try_send(Frame::data(next(0).frame())).expect("open");
        let response = client.clone().send_request(request).await;
        let mut response = response.expect("the head comes before the client is done");
        for turn in 0..3 {
            let frame = response.body_mut().frame().await.expect("an answer");
            let data = frame.expect("no error").into_data().expect("data");
            let Some(Value::Bytes(answer)) = field(&data, 2) else {
                panic!("no answer in {data:?}")
            };
            let framed = [&[0; 5], answer].concat();
            let own = Value::Bytes(b"densenet_onnx");
            assert_eq!(field(&framed, 1), Some(own), "message {turn}");
            say.try_send(Frame::data(next(turn + 1).frame()))
                .expect("open");
        }
    });
}
