//! The series of each model.

use super::{series, wait_for};
use crate::support::Residentd;
use crate::support::calls::{ask, named, with};
use crate::support::residentd::STUB;
use crate::support::wire::Wire;

fn config(names: &[&str]) -> String {
    let model = |name: &&str| {
        format!(
            "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} --ready-after 100ms'\nmemory = \"32MiB\"\n"
        )
    };
    names.iter().map(model).collect()
}

fn id(name: &str, model: &str, more: &str) -> String {
    format!("residentd_model_{name}{{model=\"{model}\"{more}}}")
}

#[test]
fn requests_are_counted_by_code_with_their_bytes_and_waits() {
    let residentd = Residentd::start(&config(&["red", "blue"]));
    let body = "{\"model\":\"red\",\"prompt\":\"x\"}";
    let mut client = Wire::to(residentd.address());
    let mut answered = 0;
    for _ in 0..3 {
        client.ask("POST /v1/completions", "", body);
        answered += client.answer().1.len();
    }
    client.ask("POST /upstream/red/nowhere", "", "");
    answered += client.answer().1.len();
    wait_for(
        &residentd,
        &id("answers_total", "red", ",code=\"200\""),
        3.0,
    );
    wait_for(
        &residentd,
        &id("answers_total", "red", ",code=\"404\""),
        1.0,
    );
    let read = |name: &str, more: &str| series(&residentd, &id(name, "red", more));
    let bucket = |name: &str, le: &str| {
        let id = format!("residentd_model_{name}_seconds_bucket{{le=\"{le}\",model=\"red\"}}");
        series(&residentd, &id)
    };
    let count = |count: usize| Some(f64::from(u32::try_from(count).expect("few")));
    assert_eq!(read("endings_total", ",end=\"whole\""), Some(4.0));
    assert_eq!(read("request_bytes_total", ""), count(3 * body.len()));
    assert_eq!(read("answer_bytes_total", ""), count(answered));
    for (name, number) in [("queue", 4.0), ("first_byte", 4.0), ("cold_start", 1.0)] {
        assert_eq!(read(&format!("{name}_seconds_count"), ""), Some(number));
        let all = bucket(name, "+Inf");
        assert_eq!(all, Some(number), "{name}");
    }
    let loaded = read("cold_start_seconds_sum", "").expect("a sum");
    assert!(
        (0.08..10.0).contains(&loaded),
        "it loads for 100 ms: {loaded}"
    );
    // The first waited for the load, the others for nothing.
    assert_eq!(bucket("queue", "0.05"), Some(3.0));
    let other = |name: &str| series(&residentd, &id(name, "blue", ""));
    assert_eq!(other("first_byte_seconds_count"), Some(0.0));
    assert_eq!(other("request_bytes_total"), Some(0.0));
}

#[test]
fn whatever_a_client_names_there_is_one_series_for_what_is_not_configured() {
    let residentd = Residentd::start(&config(&["red", "blue"]));
    for name in ["a", "b", "c\\\"} 1\\nx{"] {
        assert_eq!(
            residentd
                .ask("POST", "/v1/x", Some(&format!("{{\"model\":\"{name}\"}}")))
                .status,
            404
        );
    }
    assert_eq!(residentd.ask("POST", "/v1/x", Some("{}")).status, 400);
    with(residentd.address(), |client| async move {
        ask(&client, "ModelInfer", &[], named("other").frame()).await;
    });
    let read = |name, more| series(&residentd, &id(name, "(unknown)", more));
    assert_eq!(read("answers_total", ",code=\"404\""), Some(4.0));
    assert_eq!(read("answers_total", ",code=\"400\""), Some(1.0));
    assert_eq!(
        read("grpc_answers_total", ",status=\"NOT_FOUND\""),
        Some(1.0)
    );
    let page = residentd.ask("GET", "/metrics", None).text();
    let models: std::collections::BTreeSet<_> = page
        .lines()
        .filter_map(|line| line.split("model=\"").nth(1)?.split('"').next())
        .collect();
    assert_eq!(models, ["(unknown)", "blue", "red"].into());
}

#[test]
fn series_of_a_model_that_a_reload_removes_go_and_others_keep_their_counts() {
    let residentd = Residentd::start(&config(&["red", "blue"]));
    for name in ["red", "blue"] {
        assert_eq!(residentd.complete(name).status, 200);
        wait_for(&residentd, &id("answers_total", name, ",code=\"200\""), 1.0);
    }
    residentd.configure(&format!("{}idle_timeout = \"1h\"\n", config(&["red"])));
    assert_eq!(residentd.ask("POST", "/api/v1/reload", None).status, 200);
    let page = residentd.ask("GET", "/metrics", None).text();
    assert!(
        !page.contains("residentd_model_answers_total{model=\"blue\""),
        "{page}"
    );
    assert!(
        !page.contains("_seconds_bucket{le=\"+Inf\",model=\"blue\""),
        "{page}"
    );
    assert_eq!(residentd.complete("red").status, 200);
    wait_for(
        &residentd,
        &id("answers_total", "red", ",code=\"200\""),
        2.0,
    );
}

#[test]
fn who_leaves_is_counted_as_such() {
    let residentd = Residentd::start(&format!(
        "[models.red]\ncommand = '{STUB} --port ${{PORT}} --name red --never-ready'\nmemory = \"32MiB\"\n"
    ));
    let mut client = Wire::to(residentd.address());
    client.ask("POST /v1/x", "", "{\"model\":\"red\"}");
    residentd.wait_for_phase("red", "starting");
    drop(client);
    wait_for(
        &residentd,
        &id("answers_total", "red", ",code=\"499\""),
        1.0,
    );
    let read = |name: &str| series(&residentd, &id(name, "red", ""));
    assert_eq!(
        read("queue_seconds_count"),
        Some(1.0),
        "it waited all the same"
    );
    assert_eq!(read("first_byte_seconds_count"), Some(0.0));
    assert_eq!(
        series(&residentd, &id("endings_total", "red", ",end=\"left\"")),
        Some(1.0)
    );
}
