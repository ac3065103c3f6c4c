//! Calls of gRPC across an upgrade.

use http_body_util::BodyExt;
use hyper::body::Frame;
use residentd::grpc::{Message, Value};

use super::{config, start, upgrade};
use crate::support::calls::{INFERENCE, ask, call, field, finish, named, open, with};
use crate::support::wait_until;

#[test]
fn a_conversation_goes_on_and_calls_on_its_connection_are_answered_by_the_new_one() {
    let (residentd, _) = start(&config(), &[]);
    residentd.complete("b");
    let upgraded = &residentd;
    with(residentd.address(), |client| async move {
        let (say, body) = open();
        let request = call(&format!("{INFERENCE}/ModelStreamInfer"), &[], body);
        say.try_send(Frame::data(named("a").frame())).expect("open");
        let response = client.clone().send_request(request).await;
        let mut response = response.expect("an answer");
        response.body_mut().frame().await.expect("one").expect("it");

        upgrade(upgraded);
        // Of what is the API's and of what is a worker's.
        let done = ask(&client, "ModelReady", &[], named("b").frame()).await;
        assert_eq!(done.status(), "0", "{done:?}");
        assert_eq!(field(&done.data, 1), Some(Value::Number(1)));
        let done = ask(&client, "RepositoryIndex", &[], Message::default().frame()).await;
        assert_eq!(done.status(), "0", "{done:?}");
        let done = ask(&client, "ModelInfer", &[], named("b").text(3, "id").frame()).await;
        assert_eq!(done.status(), "0", "{done:?}");
        assert_eq!(field(&done.data, 3), Some(Value::Bytes(b"id")));
        assert_eq!(done.headers["x-stub-name"], "b");

        say.try_send(Frame::data(named("a").frame())).expect("open");
        drop(say);
        let done = finish(response).await;
        assert_eq!(done.status(), "0", "{done:?}");
        assert_eq!(done.end["x-stub-given"], "2");
    });
    wait_until("no request in flight", || {
        (residentd.model("a")["in_flight"] == 0).then_some(())
    });
    assert_eq!(residentd.model("b")["loads"], 0, "the old one loaded it");
}
