//! Which model a request is for.

use super::{Residentd, echoed, exchange, one, served_by, two};

const JSON: &str = "content-type: application/json\r\n";

#[test]
fn the_path_names_the_model_and_the_rest_of_it_is_the_workers() {
    let residentd = Residentd::start(&two());
    let echo = echoed(&residentd, "GET /upstream/red/echo?a=1&b=%20", "", "");
    assert_eq!(
        (&echo["path"], &echo["query"]),
        (&"/echo".into(), &"a=1&b=%20".into())
    );
    for path in [
        "/upstream/org/blue:7b/echo",
        "/upstream/org%2Fblue:7b/echo",
        "/upstream/azure/echo",
    ] {
        let answer = exchange(&residentd, &format!("GET {path}"), "", "");
        assert_eq!(served_by(&answer), (200, Some("blue")), "{path}");
        assert_eq!(answer.json()["path"], "/echo");
    }
    let answer = exchange(&residentd, "GET /upstream/nobody/echo", "", "");
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (404, Some("model_not_found"))
    );
    // This path is the protocol's own: it reaches the worker as it is.
    let answer = exchange(&residentd, "GET /v2/models/red/ready", "", "");
    assert_eq!(served_by(&answer), (404, Some("red")));
}

#[test]
fn the_body_names_the_model_wherever_it_stands_and_arrives_unchanged() {
    let residentd = Residentd::start(&two());
    let long = "x".repeat(40_000);
    for body in [
        r#"{"model": "org/blue:7b", "input": "x"}"#.to_owned(),
        r#"{"input": ["{\"model\": \"red\"}", {"model": "red"}], "model": "azure"}"#.to_owned(),
        r#"{"mo\u0064el": "az\u0075re", "input": ""}"#.to_owned(),
        // The first one counts: it may have been forwarded before the second came.
        r#"{"model": "azure", "input": "", "model": "red"}"#.to_owned(),
        format!(r#" {{"input": "{long}", "model": "azure"}}"#),
    ] {
        let answer = exchange(&residentd, "POST /v1/embeddings", JSON, &body);
        assert_eq!(
            served_by(&answer),
            (200, Some("blue")),
            "{body:.80}: {}",
            answer.text()
        );
    }
}

#[test]
fn header_form_field_and_query_name_the_model_too() {
    let residentd = Residentd::start(&two());
    let answer = exchange(
        &residentd,
        "POST /v1/embeddings",
        "x-model: azure\r\n",
        r#"{"model": "red", "input": ""}"#,
    );
    assert_eq!(
        served_by(&answer),
        (200, Some("blue")),
        "the header is stronger than the body"
    );
    let answer = exchange(
        &residentd,
        "GET /v1/whatever?x=1&model=org%2Fblue%3A7b",
        "",
        "",
    );
    assert_eq!(served_by(&answer), (404, Some("blue")));
    let form = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n\0\u{1}binary\r\n--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nazure\r\n--b--\r\n";
    let kind = "content-type: multipart/form-data; boundary=b\r\n";
    let answer = exchange(&residentd, "POST /v1/audio/transcriptions", kind, form);
    assert_eq!(served_by(&answer), (404, Some("blue")), "{}", answer.text());
    // A body of another kind is not looked into.
    let kind = "content-type: audio/wav\r\n";
    let answer = exchange(
        &residentd,
        "POST /v1/audio/transcriptions?model=azure",
        kind,
        "RIFF....",
    );
    assert_eq!(served_by(&answer), (404, Some("blue")), "{}", answer.text());
}

#[test]
fn with_one_model_nobody_has_to_name_it() {
    let residentd = Residentd::start(&one());
    let answer = exchange(&residentd, "POST /v1/embeddings", JSON, r#"{"input": ""}"#);
    assert_eq!(served_by(&answer), (200, Some("red")), "{}", answer.text());
    let answer = exchange(
        &residentd,
        "POST /v1/embeddings",
        JSON,
        r#"{"model": "other", "input": ""}"#,
    );
    assert_eq!(
        answer.status, 404,
        "a name that is wrong is not taken for it"
    );
}

#[test]
fn bad_requests_are_told_what_is_wrong_with_them() {
    let bounds = [
        ("RESIDENTD_MAX_BODY", "256KiB"),
        ("RESIDENTD_MODEL_PREFIX", "64KiB"),
    ];
    let residentd = Residentd::start_with(&two(), &bounds);
    let cases: [(&str, &str, String, u16, &str); 7] = [
        (
            "/v1/embeddings",
            JSON,
            r#"{"model": "#.into(),
            400,
            "bad_request",
        ),
        ("/v1/embeddings", JSON, "hello".into(), 400, "bad_request"),
        (
            "/v1/embeddings",
            JSON,
            r#"{"model": 7}"#.into(),
            400,
            "bad_request",
        ),
        (
            "/v1/embeddings",
            JSON,
            r#"{"input": ""}"#.into(),
            400,
            "bad_request",
        ),
        (
            "/v1/embeddings",
            JSON,
            r#"{"model": "nobody"}"#.into(),
            404,
            "model_not_found",
        ),
        (
            "/v1/embeddings",
            JSON,
            format!(r#"{{"input": "{}", "model": "red"}}"#, "x".repeat(100_000)),
            413,
            "body_too_large",
        ),
        (
            "/v1/embeddings",
            JSON,
            format!(r#"{{"model": "red", "input": "{}"}}"#, "x".repeat(300_000)),
            413,
            "body_too_large",
        ),
    ];
    for (path, headers, body, status, code) in cases {
        let answer = exchange(&residentd, &format!("POST {path}"), headers, &body);
        let seen = answer.json()["error"]["code"].clone();
        assert_eq!(
            (answer.status, seen.as_str()),
            (status, Some(code)),
            "{body:.60}: {}",
            answer.text()
        );
    }
    let gzip = "content-type: application/json\r\ncontent-encoding: gzip\r\n";
    let answer = exchange(&residentd, "POST /v1/embeddings", gzip, "\u{1f}...");
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("x-model"), "{}", answer.text());
}
