//! gRPC calls over h2c: routed by the model's name in their first message,
//! answered by residentd itself where they are about itself, and refused in
//! gRPC's own words.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use residentd::grpc::{self, Message, Value, first_field};
use tokio::sync::mpsc;

use crate::support::residentd::STUB;
use crate::support::{PATIENCE, Residentd};

type Body = UnsyncBoxBody<Bytes, std::convert::Infallible>;
type Client = SendRequest<Body>;

const INFERENCE: &str = "/inference.GRPCInferenceService";

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

/// Runs `talk` with one connection to residentd.
fn with<F, T>(residentd: &Residentd, talk: impl FnOnce(Client) -> F) -> T
where
    F: Future<Output = T>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(residentd.address())
            .await
            .expect("a connection");
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("it speaks HTTP/2");
        tokio::select! {
            biased;
            done = tokio::time::timeout(PATIENCE, talk(sender)) => done.expect("in time"),
            ended = connection => panic!("the connection ended: {ended:?}"),
        }
    })
}

fn call(path: &str, metadata: &[(&'static str, &'static str)], body: Body) -> Request<Body> {
    let mut request = Request::post(format!("http://models.test{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .expect("a good request");
    for (name, value) in metadata {
        let value = HeaderValue::from_static(value);
        request.headers_mut().insert(*name, value);
    }
    request
}

fn whole(frame: Bytes) -> Body {
    // Without a length, as real clients send it.
    StreamBody::new(stream::iter([Ok(Frame::data(frame))])).boxed_unsync()
}

/// A body whose messages come one by one.
fn open() -> (mpsc::Sender<Frame<Bytes>>, Body) {
    let (sender, frames) = mpsc::channel(16);
    let frames = stream::unfold(frames, |mut frames| async move {
        Some((Ok(frames.recv().await?), frames))
    });
    (sender, StreamBody::new(frames).boxed_unsync())
}

/// How a call ended.
#[derive(Debug)]
struct Done {
    headers: HeaderMap,
    data: Bytes,
    /// Of the trailers, or of the headers when there are no others.
    end: HeaderMap,
}

impl Done {
    fn status(&self) -> &str {
        self.end["grpc-status"].to_str().expect("text")
    }

    fn message(&self) -> &str {
        let message = self.end.get("grpc-message");
        message.map_or("", |message| message.to_str().expect("text"))
    }
}

async fn finish(response: Response<Incoming>) -> Done {
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/grpc");
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("a call ends with a status");
    let end = body.trailers().unwrap_or(&head.headers).clone();
    Done {
        data: body.to_bytes(),
        headers: head.headers,
        end,
    }
}

async fn ask(
    client: &Client,
    method: &str,
    metadata: &[(&'static str, &'static str)],
    frame: Bytes,
) -> Done {
    let path = match method.starts_with('/') {
        true => method.to_owned(),
        false => format!("{INFERENCE}/{method}"),
    };
    let request = call(&path, metadata, whole(frame));
    let response = client.clone().send_request(request).await;
    finish(response.expect("an answer")).await
}

fn named(name: &str) -> Message {
    Message::default().text(1, name)
}

/// Returns the field of the message in a frame.
fn field(frame: &[u8], wanted: u64) -> Option<Value<'_>> {
    let mut rest = frame.get(5..)?;
    while let Ok(Some((number, value, used))) = first_field(rest) {
        if number == wanted {
            return Some(value);
        }
        rest = &rest[used..];
    }
    None
}

#[test]
fn a36_a_call_is_routed_by_the_name_in_its_first_message_and_passes_whole() {
    let residentd = start();
    with(&residentd, |client| async move {
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
    with(&residentd, |client| async move {
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
    with(&residentd, |client| async move {
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
        let body = StreamBody::new(stream::iter(frames.map(Ok))).boxed_unsync();
        let request = call(&format!("{INFERENCE}/ModelInfer"), &[], body);
        let response = client.clone().send_request(request).await;
        let done = finish(response.expect("an answer")).await;
        assert_eq!(done.end["x-from-client"], "again");
    });
}

#[test]
fn a34_a_conversation_that_is_dropped_leaves_no_lease() {
    let residentd = start();
    with(&residentd, |client| async move {
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
    let request = Request::get("http://models.test/api/v1/models/red")
        .body(Full::new(Bytes::new()).boxed_unsync())
        .expect("a good request");
    let answer = client.clone().send_request(request).await;
    let body = answer.expect("an answer").collect().await.expect("whole");
    let model: serde_json::Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
    model["data"]["in_flight"].as_u64().expect("a number")
}

#[test]
fn a31_a_worker_that_dies_in_a_conversation_ends_it_with_a_status() {
    let residentd = start();
    with(&residentd, |client| async move {
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
        // A call of one message whose worker dies before its head is tried
        // again, in the next worker, and then told.
        let metadata = [("x-stub-exit-after", "0")];
        let done = ask(&client, "ModelInfer", &metadata, named("red").frame()).await;
        assert_eq!(done.status(), "14", "{done:?}");
    });
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
    with(&residentd, |client| async move {
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
    with(&residentd, |client| async move {
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
    with(&residentd, |client| async move {
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
    with(&residentd, |client| async move {
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
