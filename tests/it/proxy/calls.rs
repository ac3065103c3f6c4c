//! gRPC calls over h2c: routed by the model's name in their first message,
//! answered by residentd itself where they are about itself, and refused in
//! gRPC's own words.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::Request;
use hyper::body::Frame;
use hyper::header::{HeaderMap, HeaderValue};
use residentd::grpc::{self, Message, Value};

use crate::support::Residentd;
use crate::support::calls::{
    Client, INFERENCE, ask, call, field, finish, named, open, whole, with,
};
use crate::support::residentd::STUB;
use crate::support::wire::Wire;

/// `red` and `org/blue`; `broken` ends when it starts, and `slow` is never ready.
fn start() -> Residentd {
    let model = |name: &str, worker: &str, more: &str| {
        format!("[models.\"{name}\"]\ncommand = '{STUB} --port ${{PORT}} --name {worker} {more}'\n")
    };
    Residentd::start(&format!(
        "model_prefix = \"4KiB\"\n[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n{}memory = \"32MiB\"\n{}memory = \"32MiB\"\naliases = [\"sky\"]\n{}memory = \"32MiB\"\n{}memory = \"32MiB\"\n",
        model("red", "red", ""),
        model("org/blue", "blue", ""),
        model("broken", "broken", "--crash-on-start"),
        model("slow", "slow", "--never-ready"),
    ))
}

#[test]
fn a36_a_call_is_routed_by_the_name_in_its_first_message_and_passes_whole() {
    let residentd = start();
    with(residentd.address(), |client| async move {
        let raw = "x".repeat(100_000);
        for (name, metadata, worker) in [
            ("red", &[][..], "red"),
            ("org/blue", &[], "blue"),
            ("sky", &[("grpc-timeout", "10S")], "blue"),
            // Metadata goes before the message.
            ("nobody", &[("x-model", "red")], "red"),
        ] {
            let message = named(name).text(3, "id").text(7, &raw);
            let done = ask(&client, "ModelInfer", metadata, message.frame()).await;
            assert_eq!(done.status(), "0", "{name}: {done:?}");
            assert_eq!(done.end["x-stub-given"], "1");
            assert_eq!(done.headers["x-stub-te"], "trailers");
            assert_eq!(field(&done.data, 1), Some(Value::Bytes(name.as_bytes())));
            assert_eq!(field(&done.data, 6), Some(Value::Bytes(raw.as_bytes())));
            assert_eq!(done.headers["x-stub-name"], worker);
        }
        let message = named("red").frame();
        let done = ask(&client, "ModelInfer", &[("x-stub-status", "7")], message).await;
        assert_eq!(done.status(), "7", "the worker's own status passes");
        // Of another service nothing is read.
        let done = ask(&client, "/a.B/C", &[("x-model", "sky")], Bytes::new()).await;
        assert_eq!(
            (done.status(), &done.headers["x-stub-name"] == "blue"),
            ("0", true)
        );
    });
    for name in ["red", "org/blue"] {
        assert_eq!(residentd.model(name)["loads"], 1);
        assert_eq!(residentd.model(name)["in_flight"], 0);
    }
}

#[test]
fn a36_a_call_that_is_answered_elsewhere_is_told_what_time_is_left() {
    let residentd = start();
    residentd.complete("red");
    with(residentd.address(), |client| async move {
        let metadata = [("grpc-timeout", "10S")];
        let done = ask(&client, "ModelInfer", &metadata, named("red").frame()).await;
        let left = grpc::timeout(&HeaderMap::from_iter([(
            grpc::TIMEOUT,
            done.headers["x-stub-timeout"].clone(),
        )]));
        let left = left.expect("a time");
        assert!(
            left <= Duration::from_secs(10) && left > Duration::from_secs(5),
            "{left:?}"
        );
        let done = ask(&client, "ModelInfer", &[], named("red").frame()).await;
        assert!(!done.headers.contains_key("x-stub-timeout"));
    });
}

#[test]
fn a36_a_conversation_goes_both_ways_at_once_and_trailers_pass_both_ways() {
    let residentd = start();
    with(residentd.address(), |client| async move {
        let (say, body) = open();
        let request = call(&format!("{INFERENCE}/ModelStreamInfer"), &[], body);
        say.try_send(Frame::data(named("red").text(3, "0").frame()))
            .expect("it is open");
        let response = client.clone().send_request(request).await;
        let mut response = response.expect("the head comes before the client is done");
        for turn in 0..5 {
            let frame = response.body_mut().frame().await.expect("an answer");
            let data = frame.expect("no error").into_data().expect("data");
            let Some(Value::Bytes(answer)) = field(&data, 2) else {
                panic!("no answer in {data:?}")
            };
            let framed = [&[0; 5], answer].concat();
            let id = turn.to_string();
            assert_eq!(field(&framed, 3), Some(Value::Bytes(id.as_bytes())));
            let next = named("red").text(3, &(turn + 1).to_string());
            say.try_send(Frame::data(next.frame())).expect("open");
        }
        let trailers = HeaderMap::from_iter([(
            "x-from-client".parse().expect("a name"),
            HeaderValue::from_static("yes"),
        )]);
        say.try_send(Frame::trailers(trailers)).expect("open");
        drop(say);
        let done = finish(response).await;
        assert_eq!(
            (done.status(), &done.end["x-stub-given"] == "6"),
            ("0", true)
        );
        assert_eq!(done.end["x-from-client"], "yes");

        // Also when all was read before it is sent.
        let trailers = HeaderMap::from_iter([(
            "x-from-client".parse().expect("a name"),
            HeaderValue::from_static("again"),
        )]);
        let frames = [Frame::data(named("red").frame()), Frame::trailers(trailers)];
        let body = StreamBody::new(futures_util::stream::iter(frames.map(Ok))).boxed_unsync();
        let request = call(&format!("{INFERENCE}/ModelInfer"), &[], body);
        let response = client.clone().send_request(request).await;
        let done = finish(response.expect("an answer")).await;
        assert_eq!(done.end["x-from-client"], "again");
    });
}

#[test]
fn a34_a_conversation_that_is_dropped_leaves_no_lease() {
    let residentd = start();
    with(residentd.address(), |client| async move {
        let (say, body) = open();
        let request = call(&format!("{INFERENCE}/ModelStreamInfer"), &[], body);
        say.try_send(Frame::data(named("red").frame()))
            .expect("open");
        let response = client.clone().send_request(request).await;
        let mut response = response.expect("an answer");
        response.body_mut().frame().await.expect("one").expect("it");
        assert_eq!(residentd_in_flight(&client).await, 1);
        drop((response, say));
    });
    crate::support::wait_until("the lease to come back", || {
        (residentd.model("red")["in_flight"] == 0).then_some(())
    });
}

/// Returns the requests inside `red`, as the API tells them on the same
/// connection.
async fn residentd_in_flight(client: &Client) -> u64 {
    let model = read(client, "http://models.test/api/v1/models/red").await;
    model["data"]["in_flight"].as_u64().expect("a number")
}

/// Reads JSON on the same connection.
pub(super) async fn read(client: &Client, url: &str) -> serde_json::Value {
    let request = Request::get(url)
        .body(Full::new(Bytes::new()).boxed_unsync())
        .expect("a good request");
    let answer = client.clone().send_request(request).await;
    let body = answer.expect("an answer").collect().await.expect("whole");
    serde_json::from_slice(&body.to_bytes()).expect("JSON")
}

#[test]
fn a31_a_worker_that_dies_in_a_conversation_ends_it_with_a_status() {
    let residentd = start();
    with(residentd.address(), |client| async move {
        let (say, body) = open();
        let path = format!("{INFERENCE}/ModelStreamInfer");
        let request = call(&path, &[("x-stub-exit-after", "2")], body);
        for _ in 0..3 {
            say.try_send(Frame::data(named("red").frame()))
                .expect("open");
        }
        let response = client.clone().send_request(request).await;
        let done = finish(response.expect("an answer")).await;
        assert_eq!(
            (done.status(), done.message()),
            ("14", "the worker broke off")
        );
    });
}

#[test]
fn a_call_whose_worker_dies_before_its_head_is_tried_once_more_and_then_told() {
    let residentd = start();
    with(residentd.address(), |client| async move {
        let metadata = [("x-stub-exit-after", "0")];
        let done = ask(&client, "ModelInfer", &metadata, named("red").frame()).await;
        assert_eq!(done.status(), "14", "{done:?}");
        assert!(done.message().contains("worker of red broke"), "{done:?}");
        assert_eq!(done.headers["retry-after"], "1");
    });
    crate::support::wait_until("both ends to be told", || {
        (residentd.model("red")["restarts"] == 2).then_some(())
    });
    assert_eq!(residentd.model("red")["loads"], 2);
}

#[test]
fn what_is_refused_says_so_in_a_status_with_the_words_of_the_other_protocols() {
    let residentd = start();
    let words = |model: &str| {
        let answer = residentd.complete(model).json();
        let message = answer["error"]["message"].as_str().expect("text");
        message.to_owned()
    };
    let green = words("green");
    with(residentd.address(), |client| async move {
        let compressed = Bytes::from_static(b"\x01\0\0\0\x02\x0a\0");
        let late = Message::default().text(7, &"x".repeat(5000)).text(1, "red");
        for (metadata, frame, status, says) in [
            (&[][..], named("green").frame(), "5", &*green),
            (&[], named("broken").frame(), "14", "broken"),
            (&[], Message::default().frame(), "3", "no model is named"),
            (&[], compressed.clone(), "3", "x-model"),
            (&[], Bytes::from_static(b"\0\0\0\0\x01\x0b"), "3", "x-model"),
            (&[], Bytes::from_static(b"\0\0"), "3", "first message"),
            (&[], late.frame(), "8", "4.00 KiB"),
            (
                &[("grpc-timeout", "300m")],
                named("slow").frame(),
                "4",
                "slow",
            ),
            (&[("x-model", "red")], compressed, "0", ""),
        ] {
            let done = ask(&client, "ModelInfer", metadata, frame).await;
            let message = done.message().replace("%25", "%");
            assert_eq!(done.status(), status, "{says}: {done:?}");
            assert!(message.contains(says), "{says:?} is not in {message:?}");
        }
        let done = ask(&client, "/a.B/C", &[], Bytes::new()).await;
        assert_eq!(done.status(), "3", "{done:?}");
    });
}

#[test]
fn a36_calls_about_the_server_and_its_models_are_answered_by_residentd() {
    let residentd = start();
    let yes = Some(Value::Number(1));
    with(residentd.address(), |client| async move {
        let empty = Message::default().frame();
        let done = ask(&client, "ServerLive", &[], empty.clone()).await;
        assert_eq!((done.status(), field(&done.data, 1)), ("0", yes));
        let done = ask(&client, "ServerMetadata", &[], empty.clone()).await;
        assert_eq!(field(&done.data, 1), Some(Value::Bytes(b"residentd")));
        loop {
            let done = ask(&client, "ServerReady", &[], empty.clone()).await;
            if field(&done.data, 1) == yes {
                break;
            }
        }
        let ready = |name: &'static str| ask(&client, "ModelReady", &[], named(name).frame());
        assert_eq!(
            field(&ready("sky").await.data, 1),
            None,
            "false is left out"
        );
        assert_eq!(ready("green").await.status(), "5");

        let wish = |name: &str| Message::default().text(2, name).frame();
        let done = ask(&client, "RepositoryModelLoad", &[], wish("sky")).await;
        assert_eq!((done.status(), &done.data[..]), ("0", &[0; 5][..]));
        assert_eq!(field(&ready("sky").await.data, 1), yes);
        let only_ready = Message::default().number(2, 1).frame();
        let done = ask(&client, "RepositoryIndex", &[], only_ready).await;
        let Some(Value::Bytes(model)) = field(&done.data, 1) else {
            panic!("no model in {done:?}")
        };
        let model = [&[0; 5], model].concat();
        assert_eq!(field(&model, 1), Some(Value::Bytes(b"org/blue")));
        assert_eq!(field(&model, 3), Some(Value::Bytes(b"READY")));
        let done = ask(&client, "RepositoryModelUnload", &[], wish("sky")).await;
        assert_eq!(done.status(), "0");
        assert_eq!(field(&ready("org/blue").await.data, 1), None);

        let config = Message::default()
            .text(2, "red")
            .message(3, &Message::default().text(1, "config"));
        let done = ask(&client, "RepositoryModelLoad", &[], config.frame()).await;
        assert_eq!(done.status(), "3", "{done:?}");
        let elsewhere = [("origin", "http://evil.example")];
        let done = ask(&client, "RepositoryModelLoad", &elsewhere, wish("red")).await;
        assert_eq!(done.status(), "7", "{done:?}");
        let done = ask(&client, "RepositoryModelLoad", &[], Bytes::new()).await;
        assert_eq!(done.status(), "3", "{done:?}");
    });
    assert_eq!(residentd.model("red")["loads"], 0);
}

#[test]
fn a36_the_health_service_tells_how_it_is_and_when_that_changes() {
    let residentd = start();
    let (serving, not) = (Some(Value::Number(1)), Some(Value::Number(2)));
    let check = |client: Client, service: &'static str| async move {
        ask(
            &client,
            "/grpc.health.v1.Health/Check",
            &[],
            named(service).frame(),
        )
        .await
    };
    with(residentd.address(), |client| async move {
        while field(&check(client.clone(), "").await.data, 1) != serving {}
        assert_eq!(field(&check(client.clone(), "red").await.data, 1), not);
        assert_eq!(check(client.clone(), "nobody").await.status(), "5");

        let request = call(
            "/grpc.health.v1.Health/Watch",
            &[],
            whole(named("red").frame()),
        );
        let watched = client.clone().send_request(request).await;
        let mut watched = watched.expect("an answer").into_body();
        let mut next = async || {
            let frame = watched.frame().await.expect("more").expect("no error");
            frame.into_data().expect("data")
        };
        assert_eq!(field(&next().await, 1), not);
        ask(&client, "ModelInfer", &[], named("red").frame()).await;
        assert_eq!(field(&next().await, 1), serving);
    });
}

#[test]
fn a43_a_watcher_of_health_does_not_hold_up_the_end() {
    let residentd = start();
    let pid = residentd.pid();
    with(residentd.address(), |client| async move {
        let empty = whole(Message::default().frame());
        let request = call("/grpc.health.v1.Health/Watch", &[], empty);
        let watched = client.clone().send_request(request).await;
        let mut watched = watched.expect("an answer");
        let first = watched.body_mut().frame().await;
        first.expect("a first word").expect("no error");
        crate::support::kill(i64::from(pid), nix::sys::signal::Signal::SIGTERM);
        let done = finish(watched).await;
        assert_eq!(done.status(), "14", "{done:?}");
    });
    assert_eq!(residentd.stop().code(), Some(0));
}

#[test]
fn a36_frames_written_by_hand_are_answered_and_a_refusal_is_one_frame_of_headers() {
    let residentd = start();
    let mut wire = Wire::to(residentd.address());
    wire.put("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    wire.put(frame(SETTINGS, 0, 0, b""));
    for (stream, method, message) in [
        (1, "ServerLive", Message::default()),
        (3, "ModelInfer", named("green")),
    ] {
        let head = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", &*format!("{INFERENCE}/{method}")),
            (":authority", "x"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ];
        wire.put(frame(HEADERS, END_HEADERS, stream, &literals(&head)));
        wire.put(frame(DATA, END_STREAM, stream, &message.frame()));
        let (mut data, mut heads) = (Vec::new(), 0);
        loop {
            let prefix = wire.exactly(9);
            let length = u32::from_be_bytes([0, prefix[0], prefix[1], prefix[2]]);
            let payload = wire.exactly(usize::try_from(length).expect("it fits"));
            let [kind, flags] = [prefix[3], prefix[4]];
            if prefix[5..] != u32::to_be_bytes(stream) {
                continue;
            }
            match kind {
                DATA => data.extend_from_slice(&payload),
                HEADERS => heads += 1,
                _ => {}
            }
            if flags & END_STREAM != 0 && [DATA, HEADERS].contains(&kind) {
                assert_eq!(kind, HEADERS, "a status is the last word");
                break;
            }
        }
        match method {
            "ServerLive" => assert_eq!((heads, &*data), (2, &[0, 0, 0, 0, 2, 8, 1][..])),
            _ => assert_eq!((heads, &*data), (1, &[][..])),
        }
    }
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
    let head = [length[1], length[2], length[3], kind, flags];
    [&head[..], &stream.to_be_bytes(), payload].concat()
}

/// Headers without any compression.
fn literals(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("short"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}
