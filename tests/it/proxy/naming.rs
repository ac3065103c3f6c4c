//! How a request names its model.

use serde_json::json;

use crate::support::Residentd;
use crate::support::residentd::STUB;
use crate::support::wire::{Head, Wire};

/// `red`, and `org/blue` which is also `sky`; four kilobytes of a body may be
/// read, and a body has at most a million.
fn two() -> Residentd {
    let model = |name: &str, worker: &str, more: &str| {
        format!(
            "[models.\"{name}\"]\ncommand = '{STUB} --port ${{PORT}} --name {worker}'\nmemory = \"32MiB\"\n{more}"
        )
    };
    Residentd::start(&format!(
        "max_body = \"1MB\"\nmodel_prefix = \"4KiB\"\n[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n{}{}",
        model("red", "red", ""),
        model("org/blue", "blue", "aliases = [\"sky\"]\n"),
    ))
}

fn ask(residentd: &Residentd, line: &str, headers: &str, body: impl AsRef<[u8]>) -> (Head, String) {
    let mut wire = Wire::to(residentd.address());
    wire.ask(line, headers, body);
    wire.answer()
}

fn worker_of((head, body): &(Head, String)) -> String {
    let name = head.get("x-stub-name");
    name.unwrap_or_else(|| panic!("no worker answered: {} {body}", head.line))
        .to_owned()
}

#[test]
fn a_model_is_found_in_the_path_with_its_slash_as_it_is_or_encoded() {
    let residentd = two();
    for (path, worker, seen) in [
        ("/upstream/red/echo?a=%2F&b", "red", "/echo"),
        ("/upstream/org/blue/echo?a=%2F&b", "blue", "/echo"),
        ("/upstream/org%2Fblue/echo?a=%2F&b", "blue", "/echo"),
        ("/upstream/org%2fblue//echo?a=%2F&b", "blue", "//echo"),
        ("/upstream/sky/echo?a=%2F&b", "blue", "/echo"),
    ] {
        let answer = ask(&residentd, &format!("GET {path}"), "", "");
        assert_eq!(worker_of(&answer), worker, "{path}");
        if seen == "/echo" {
            let echo: serde_json::Value = serde_json::from_str(&answer.1).expect("JSON");
            assert_eq!(
                (&echo["path"], &echo["query"]),
                (&json!(seen), &json!("a=%2F&b"))
            );
        }
    }
    for (path, worker) in [
        ("/v2/models/red/infer", "red"),
        ("/v2/models/org/blue/infer", "blue"),
        ("/v2/models/org%2Fblue/versions/1/infer", "blue"),
        ("/upstream/red", "red"),
        ("/upstream/sky/", "blue"),
    ] {
        let answer = ask(&residentd, &format!("POST {path}"), "", "no JSON at all");
        assert_eq!(worker_of(&answer), worker, "{path}");
        let expected = if path.starts_with("/v2") { 400 } else { 404 };
        assert_eq!(answer.0.status(), expected, "the worker's own error");
    }
    let (head, body) = ask(&residentd, "GET /upstream/green/echo", "", "");
    assert_eq!(head.status(), 404, "{body}");
    assert!(body.contains("green"), "{body}");
}

#[test]
fn a_model_is_found_in_the_body_wherever_it_stands() {
    let residentd = two();
    let late = format!(r#"{{"prompt":"{}","model":"sky"}}"#, "x".repeat(4000));
    let early = format!(r#"{{"model":"red","prompt":"{}"}}"#, "x".repeat(200_000));
    for (body, worker) in [
        (r#"{"model":"red","prompt":"x"}"#, "red"),
        (r#"{"prompt":"x","model":"org/blue"}"#, "blue"),
        (r#" { "model" : "org\/blue" } "#, "blue"),
        (r#"{"mo\u0064el":"s\u006by"}"#, "blue"),
        (
            r#"{"m":[{"model":"no"},"\"model\":\"no\"}\\"],"n":-1.5e3,"o":{"model":{}},"model":"sky"}"#,
            "blue",
        ),
        // Of a doubled key the first counts.
        (r#"{"model":"red","model":"sky"}"#, "red"),
        (&late, "blue"),
        (&early, "red"),
    ] {
        for headers in ["content-type: application/json\r\n", ""] {
            let answer = ask(&residentd, "POST /v1/completions", headers, body);
            let shown = &body[..body.len().min(80)];
            assert_eq!(worker_of(&answer), worker, "{shown}");
            assert_eq!(answer.0.status(), 200, "{shown}: {}", answer.1);
        }
    }
}

#[test]
fn a36_every_path_of_openai_and_anthropic_is_routed_by_its_model() {
    let residentd = two();
    let json = "content-type: application/json\r\n";
    for path in [
        "chat/completions",
        "completions",
        "responses",
        "embeddings",
        "moderations",
        "images/generations",
        "audio/speech",
        "rerank",
        "score",
        "messages",
        "messages/count_tokens",
    ] {
        let body = r#"{"input": "x", "stream": true, "model": "sky"}"#;
        let more = format!("{json}x-api-key: k\r\nanthropic-version: 2023-06-01\r\n");
        let answer = ask(&residentd, &format!("POST /v1/{path}"), &more, body);
        assert_eq!(worker_of(&answer), "blue", "{path}");
    }
    let form = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nsky\r\n--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png\r\n\r\n\0\x01\r\n--b--\r\n";
    for path in [
        "audio/transcriptions",
        "audio/translations",
        "images/edits",
        "images/variations",
    ] {
        let kind = "content-type: multipart/form-data; boundary=b\r\n";
        let answer = ask(&residentd, &format!("POST /v1/{path}"), kind, form);
        assert_eq!(worker_of(&answer), "blue", "{path}");
    }
    // What has no body is told apart by the header or the query.
    for (line, headers) in [
        ("GET /v1/responses/r1", "x-model: sky\r\n"),
        ("DELETE /v1/responses/r1?model=sky", ""),
        ("GET /v1/realtime?model=sky", ""),
    ] {
        let answer = ask(&residentd, line, headers, "");
        assert_eq!(worker_of(&answer), "blue", "{line}");
    }
}

#[test]
fn a_model_is_found_in_a_body_that_comes_byte_by_byte() {
    let residentd = two();
    let body = br#"{"prompt":"a \"model\": \\","x":[{}],"model":"sky","tail":[1,2,3]}"#;
    let mut wire = Wire::to(residentd.address());
    wire.put("POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    for byte in body {
        wire.put_chunk([*byte]);
    }
    wire.put_chunk("");
    let (head, text) = wire.answer();
    assert_eq!(head.get("x-stub-name"), Some("blue"), "{text}");
    assert!(text.contains(&format!("bytes={}", body.len())), "{text}");
}

#[test]
fn a_model_is_found_in_a_form_also_behind_a_file() {
    let residentd = two();
    let file = "x".repeat(3000);
    let form = format!(
        "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"model\"\r\n\r\n{file}\r\n--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nsky\r\n--b--\r\n"
    );
    let kind = "content-type: multipart/form-data; boundary=b\r\n";
    let answer = ask(&residentd, "POST /v1/audio/transcriptions", kind, &form);
    assert_eq!(worker_of(&answer), "blue");
    let without = form.replace("name=\"model\"", "name=\"other\"");
    let (head, body) = ask(&residentd, "POST /v1/audio/transcriptions", kind, &without);
    assert_eq!(head.status(), 400, "{body}");
    let long = form.replace(&file, &"x".repeat(30_000));
    let (head, body) = ask(&residentd, "POST /v1/audio/transcriptions", kind, &long);
    assert_eq!(head.status(), 413, "{body}");
}

#[test]
fn the_header_goes_before_the_body_and_the_body_before_the_query() {
    let residentd = two();
    let red = r#"{"model":"red"}"#;
    for (line, headers, body, worker) in [
        (
            "POST /v1/completions?model=red",
            "x-model: sky\r\n",
            red,
            "blue",
        ),
        ("POST /v1/completions?model=sky", "", red, "red"),
        (
            "POST /v1/completions?x=1&model=org%2Fblue",
            "",
            "{}",
            "blue",
        ),
        ("GET /v1/whatever?model=sky", "", "", "blue"),
        // What cannot be read for a model is the worker's to understand.
        ("POST /v1/whatever?model=sky", "", "{\"model\": ", "blue"),
        (
            "POST /v1/whatever?model=sky",
            "content-type: audio/wav\r\n",
            "RIFF",
            "blue",
        ),
        (
            "POST /v1/whatever?model=sky",
            "content-encoding: gzip\r\n",
            "\x1f\x01",
            "blue",
        ),
    ] {
        let answer = ask(&residentd, line, headers, body);
        assert_eq!(worker_of(&answer), worker, "{line} {headers:?} {body}");
    }
}

#[test]
fn a_request_that_names_none_is_for_the_only_model_there_is() {
    let residentd = super::rig::one("");
    for (line, headers, body) in [
        ("GET /v1/whatever", "", ""),
        ("POST /v1/completions", "", "{\"prompt\":\"x\"}"),
        ("POST /v1/audio", "content-type: audio/wav\r\n", "RIFF"),
    ] {
        let answer = ask(&residentd, line, headers, body);
        assert_eq!(worker_of(&answer), "m", "{line}");
    }
    let answer = ask(
        &residentd,
        "POST /v1/completions",
        "",
        "{\"model\":\"other\"}",
    );
    assert_eq!(answer.0.status(), 404);
}

#[test]
fn what_names_no_model_is_refused_with_its_reason() {
    let residentd = two();
    let json = "content-type: application/json\r\n";
    let far = format!(r#"{{"prompt":"{}","model":"sky"}}"#, "x".repeat(200_000));
    for (headers, body, status, code) in [
        (json, "hello", 400, "bad_request"),
        (json, "[\"model\"]", 400, "bad_request"),
        (json, "{\"model\": \"re", 400, "bad_request"),
        (json, "{\"model\": 7}", 400, "bad_request"),
        (json, "{\"prompt\": \"x\"}", 400, "bad_request"),
        (json, "", 400, "bad_request"),
        ("", "{\"prompt\": \"x\"}", 400, "bad_request"),
        ("content-type: audio/wav\r\n", "RIFF", 400, "bad_request"),
        ("content-encoding: gzip\r\n", "\x1f\x01", 400, "bad_request"),
        (json, "{\"model\": \"green\"}", 404, "model_not_found"),
        (
            "x-model: green\r\n",
            "{\"model\": \"red\"}",
            404,
            "model_not_found",
        ),
        (json, &far, 413, "body_too_large"),
    ] {
        let (head, text) = ask(&residentd, "POST /v1/completions", headers, body);
        let shown = &body[..body.len().min(40)];
        assert_eq!(head.status(), status, "{headers:?} {shown}: {text}");
        let error: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(error["error"]["code"], code, "{shown}");
        assert_eq!(head.get("x-stub-name"), None);
    }
    let loads = residentd.memory("models");
    for model in loads["models"].as_array().expect("a list") {
        assert_eq!(model["loads"], 0, "a refused request loads nothing");
    }
}

#[test]
fn a_body_over_the_cap_is_a_413_whether_it_says_its_length_or_not() {
    let residentd = two();
    let mut wire = Wire::to(residentd.address());
    wire.put("POST /upstream/red/sink HTTP/1.1\r\nhost: x\r\ncontent-length: 1000001\r\n\r\n");
    let (head, body) = wire.answer();
    assert_eq!(head.status(), 413, "{body}");
    assert_eq!(residentd.model("red")["loads"], 0);

    let (head, _) = ask(
        &residentd,
        "POST /upstream/red/sink",
        "",
        vec![b'x'; 1_000_000],
    );
    assert_eq!(head.status(), 200);

    let mut wire = Wire::to(residentd.address());
    wire.put("POST /upstream/red/sink HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    let chunk = [b'x'; 10_000];
    for _ in 0..100 {
        wire.put_chunk(chunk);
    }
    // The answer may come before all was taken.
    let _ = wire.try_put("1\r\nx\r\n");
    let (head, body) = wire.answer();
    assert_eq!(head.status(), 413, "{body}");
    assert!(body.contains("body_too_large"), "{body}");
    crate::support::wait_until("the lease to come back", || {
        (residentd.model("red")["in_flight"] == 0).then_some(())
    });
    assert_eq!(residentd.model("red")["restarts"], 0);
}
