//! Calls of gRPC whose status says more than that of HTTP.

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Frame;

use super::{series, wait_for};
use crate::support::calls::{INFERENCE, ask, call, finish, named, open, with};
use crate::support::residentd::STUB;
use crate::support::{Residentd, wait_until};

fn one(keys: &str) -> Residentd {
    Residentd::start(&format!(
        "[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m'\nmemory = \"32MiB\"\n{keys}\n"
    ))
}

#[test]
fn a_call_that_fails_is_counted_as_the_error_it_is() {
    let residentd = one("");
    with(residentd.address(), |client| async move {
        for status in ["0", "14", "8"] {
            ask(
                &client,
                "ModelInfer",
                &[("x-stub-status", status)],
                named("m").frame(),
            )
            .await;
        }
    });
    for (code, status) in [
        ("200", "OK"),
        ("503", "UNAVAILABLE"),
        ("429", "RESOURCE_EXHAUSTED"),
    ] {
        let id = format!("residentd_model_answers_total{{model=\"m\",code=\"{code}\"}}");
        wait_for(&residentd, &id, 1.0);
        let id = format!("residentd_model_grpc_answers_total{{model=\"m\",status=\"{status}\"}}");
        assert_eq!(series(&residentd, &id), Some(1.0), "{status}");
    }
}

/// A worker that answered 200 to each call and then a status that says it failed
/// was taken for a healthy one.
#[test]
fn a_worker_whose_calls_all_fail_is_ended_as_one_that_answers_errors() {
    let residentd = one("live = { errors = 3 }");
    let fails = |status: &'static str, times: usize| {
        with(residentd.address(), |client| async move {
            for _ in 0..times {
                let metadata = [("x-model", "m"), ("x-stub-status", status)];
                let done = ask(&client, "/a.B/C", &metadata, Bytes::new()).await;
                assert_eq!(done.status(), status);
            }
        });
    };
    // That it is full, does not know how, or that the client's time was over says nothing.
    for status in ["14", "12", "4"] {
        fails(status, 4);
    }
    fails("13", 2);
    fails("0", 1);
    fails("13", 2);
    let page = residentd.ask("GET", "/metrics", None).text();
    assert!(!page.contains("residentd_unhealthy_total{"), "{page}");
    assert_eq!(residentd.model("m")["generation"], 1);
    fails("13", 1);
    wait_until("the worker to be ended", || {
        let id = "residentd_unhealthy_total{reason=\"errors\"}";
        (series(&residentd, id) == Some(1.0)).then_some(())
    });
}

#[test]
fn a_call_over_request_timeout_ends_by_a_status_and_not_by_a_cut() {
    let residentd = one("request_timeout = \"400ms\"");
    assert_eq!(residentd.complete("m").status, 200);
    with(residentd.address(), |client| async move {
        let (say, body) = open();
        let request = call(&format!("{INFERENCE}/ModelStreamInfer"), &[], body);
        say.try_send(Frame::data(named("m").text(3, "0").frame()))
            .expect("it is open");
        let response = client.clone().send_request(request).await;
        let mut response = response.expect("a head");
        let frame = response.body_mut().frame().await.expect("an answer");
        assert!(frame.expect("no error").is_data());
        let done = finish(response).await;
        assert_eq!(done.status(), "4", "{done:?}");
        assert!(done.message().contains("request_timeout"), "{done:?}");
        drop(say);
    });
    let id = "residentd_model_grpc_answers_total{model=\"m\",status=\"DEADLINE_EXCEEDED\"}";
    wait_for(&residentd, id, 1.0);
    let id = "residentd_model_endings_total{model=\"m\",end=\"late\"}";
    assert_eq!(series(&residentd, id), Some(1.0));
    wait_until("the lease to come back", || {
        (residentd.model("m")["in_flight"] == 0).then_some(())
    });
}
