//! Bodies that are changed on their way: `use_model_name`, `set_params`,
//! `strip_params`.

use serde_json::{Value, json};

use super::rig::Played;
use crate::support::pause;
use crate::support::wire::{Head, Wire};

const KEYS: &str = "use_model_name = \"org/real\"\nset_params = { temperature = 0.2, stop = [\"\\n\"] }\nstrip_params = [\"top_k\", \"seed\"]";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// What the worker gets of this request, which it answers.
fn got(played: &Played, line: &str, headers: &str, body: &[u8]) -> (Head, Vec<u8>) {
    let mut client = played.client();
    client.ask(line, headers, body);
    serve(played, client)
}

fn serve(played: &Played, mut client: Wire) -> (Head, Vec<u8>) {
    let mut worker = played.worker();
    let head = worker.head();
    let body = worker.body(&head);
    worker.put(OK.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n"));
    let (answer, text) = client.answer();
    assert_eq!((answer.status(), &*text), (200, "ok"));
    (head, body)
}

fn refused(played: &Played, headers: &str, body: &[u8]) -> (u16, Value) {
    let mut client = played.client();
    client.ask("POST /v1/x", headers, body);
    let (head, text) = client.answer();
    assert!(played.try_worker().is_none(), "the worker was asked");
    let said = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}"));
    (head.status(), said)
}

#[test]
fn the_top_level_is_changed_and_the_rest_is_as_it_was_sent() {
    let played = Played::with(KEYS);
    let body = br#"{"top_k":40, "n":1.50e1,"model":"m","seed":1,"messages":[{"role":"user", "top_k":1}],"temperature":1,"seed":2}"#;
    let expected = r#"{"n":1.50e1,"model":"org/real","messages":[{"role":"user", "top_k":1}],"temperature":0.2,"stop":["\n"]}"#;
    for headers in ["", "content-type: application/json; charset=utf-8\r\n"] {
        let (head, got) = got(&played, "POST /v1/x?a=1", headers, body);
        assert_eq!(String::from_utf8_lossy(&got), expected);
        assert_eq!(head.line, "POST /v1/x?a=1 HTTP/1.1");
        let length = expected.len().to_string();
        assert_eq!(head.all("content-length"), [&*length]);
        assert_eq!(head.get("transfer-encoding"), None);
    }
    // However it comes, and however its model is named.
    let mut client = played.client();
    client.put("POST /upstream/m/v1/x HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n");
    body.chunks(7).for_each(|part| client.put_chunk(part));
    client.put_chunk("");
    let (head, got) = serve(&played, client);
    assert_eq!(head.line, "POST /v1/x HTTP/1.1");
    assert_eq!(String::from_utf8_lossy(&got), expected);
}

#[test]
fn a_large_body_is_changed_up_to_the_bound_and_refused_over_it() {
    let played = Played::with(KEYS);
    let body = |length: usize| {
        format!(
            r#"{{"model":"m","prompt":"{}","top_k":1}}"#,
            "x".repeat(length)
        )
    };
    let just = (1 << 20) - body(0).len();
    let (_, sent) = got(&played, "POST /v1/x", "", body(just).as_bytes());
    let sent: Value = serde_json::from_slice(&sent).expect("JSON");
    assert_eq!(sent["model"], "org/real");
    assert_eq!(sent["prompt"].as_str().map(str::len), Some(just));
    assert_eq!(sent.get("top_k"), None);

    let (status, said) = refused(&played, "", body(just + 1).as_bytes());
    assert_eq!(
        (status, &said["error"]["code"]),
        (413, &json!("body_too_large"))
    );
    let message = said["error"]["message"].as_str().expect("a text");
    assert!(message.contains("server.model_prefix"), "{message}");
    assert_eq!(said["error"]["model"], "m");

    let mut client = played.client();
    client.put("POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    for part in body(just + 1).as_bytes().chunks(100_000) {
        client.put_chunk(part);
    }
    assert_eq!(client.head().status(), 413);
    assert!(played.try_worker().is_none());
}

#[test]
fn what_is_no_json_passes_byte_by_byte() {
    let played = Played::with(KEYS);
    let json = r#"{ "model" : "m", "top_k" : 1 }"#;
    for (headers, body) in [
        ("content-type: application/octet-stream\r\n", json),
        ("content-type: text/plain\r\n", json),
        ("content-type: application/json\r\n", r#"[ {"top_k": 1} ]"#),
        (
            "content-type: application/x-www-form-urlencoded\r\n",
            "top_k=1&model=m",
        ),
        ("content-type: application/json\r\n", ""),
    ] {
        let (_, got) = got(&played, "POST /upstream/m/x", headers, body.as_bytes());
        assert_eq!(String::from_utf8_lossy(&got), body, "{headers}");
    }
    let (_, body) = got(&played, "GET /v1/x?model=m", "", b"");
    assert_eq!(body, b"");
    // It need not fit the bound either.
    let large = vec![b'{'; 3 << 20];
    let kind = "content-type: application/octet-stream\r\n";
    let (_, body) = got(&played, "POST /upstream/m/x", kind, &large);
    assert!(body == large);
}

#[test]
fn what_cannot_be_changed_is_refused_before_anybody_is_asked() {
    let played = Played::with(KEYS);
    for (headers, body, word) in [
        (
            "x-model: m\r\ncontent-encoding: gzip\r\n",
            "\u{1f}packed",
            "compressed",
        ),
        (
            "content-type: application/json\r\n",
            r#"{"model":"m","temperature":NaN}"#,
            "not JSON",
        ),
        ("", r#"{"model":"m","x":1"#, "not JSON"),
    ] {
        let (status, said) = refused(&played, headers, body.as_bytes());
        assert_eq!(
            (status, &said["error"]["code"]),
            (400, &json!("bad_request"))
        );
        assert!(said.to_string().contains(word), "{said}");
    }
}

#[test]
fn the_model_in_a_form_is_renamed_and_the_file_streams_on() {
    let played = Played::with(KEYS);
    let kind = "content-type: multipart/form-data; boundary=b\r\n";
    let part = |name: &str, text: &str| {
        format!("--b\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n")
    };
    let file = "x".repeat(3 << 20);
    for (parts, renamed) in [
        (vec![("model", "m"), ("top_k", "1"), ("file", &*file)], true),
        (vec![("file", "model"), ("model", "m")], true),
        (vec![("file", "model")], false),
    ] {
        let form = |model: &str| {
            let text = |(name, text): &(&str, &str)| match *name {
                "model" => part(name, model),
                name => part(name, text),
            };
            let parts: Vec<_> = parts.iter().map(text).collect();
            parts.concat() + "--b--\r\n"
        };
        let headers = format!("{kind}x-model: m\r\n");
        for headers in [kind, &headers].into_iter().skip(usize::from(!renamed)) {
            let (head, got) = got(&played, "POST /v1/x", headers, form("m").as_bytes());
            let expected = form("org/real");
            assert!(got == expected.as_bytes(), "{headers}");
            let length = expected.len().to_string();
            assert_eq!(head.get("content-length"), Some(&*length));
        }
    }
    // One that comes in pieces, the last of them after the name was found.
    let body = part("model", "m") + &part("file", "tail") + "--b--\r\n";
    let mut client = played.client();
    client.put(format!(
        "POST /v1/x HTTP/1.1\r\nhost: x\r\n{kind}content-length: {}\r\n\r\n",
        body.len()
    ));
    for piece in body.as_bytes().chunks(20) {
        client.put(piece);
        pause(std::time::Duration::from_millis(2));
    }
    let (_, got) = serve(&played, client);
    let expected = part("model", "org/real") + &part("file", "tail") + "--b--\r\n";
    assert_eq!(String::from_utf8_lossy(&got), expected);
    // A file before the name that does not fit what may be read.
    let body = part("file", &file) + &part("model", "m");
    let (status, said) = refused(&played, &format!("{kind}x-model: m\r\n"), body.as_bytes());
    assert_eq!(
        (status, &said["error"]["code"]),
        (413, &json!("body_too_large"))
    );
}

#[test]
fn the_name_in_a_path_of_the_inference_protocol_is_the_workers() {
    let played = Played::with("use_model_name = \"org/real one\"");
    for (line, expected) in [
        (
            "POST /v2/models/m/infer?x=1",
            "POST /v2/models/org%2Freal%20one/infer?x=1 HTTP/1.1",
        ),
        (
            "GET /v2/models/m",
            "GET /v2/models/org%2Freal%20one HTTP/1.1",
        ),
        ("GET /upstream/m/v2/models/m", "GET /v2/models/m HTTP/1.1"),
    ] {
        let body: &[u8] = if line.starts_with("GET") {
            b""
        } else {
            b"{\"inputs\": []}"
        };
        let (head, _) = got(&played, line, "", body);
        assert_eq!(head.line, expected);
    }
}

#[test]
fn a_second_try_gets_the_same_changed_body() {
    let played = Played::with(KEYS);
    let prompt = "x".repeat(300_000);
    let mut client = played.client();
    client.ask(
        "POST /v1/x",
        "",
        format!(r#"{{"model":"m","top_k":1,"prompt":"{prompt}"}}"#),
    );
    let mut first = played.worker();
    let head = first.head();
    let body = first.body(&head);
    drop(first);
    let (again, same) = serve(&played, client);
    assert!(body == same);
    assert_eq!(head.get("content-length"), again.get("content-length"));
    let sent: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(
        (&sent["model"], sent.get("top_k")),
        (&json!("org/real"), None)
    );
}

#[test]
fn a44_other_keys_hold_at_once_and_the_worker_stays() {
    let played = Played::with("");
    let body = br#"{ "model":"m", "top_k":1 }"#;
    let (_, sent) = got(&played, "POST /v1/x", "", body);
    assert_eq!(sent, body, "without filters it passes byte by byte");
    let pid = played.residentd.worker_pid("m");
    for (keys, expected) in [
        ("strip_params = [\"top_k\"]", r#"{"model":"m"}"#),
        ("use_model_name = \"x\"", r#"{"model":"x","top_k":1}"#),
        ("set_params = { top_k = [] }", r#"{"model":"m","top_k":[]}"#),
        ("", r#"{ "model":"m", "top_k":1 }"#),
    ] {
        played.reload(keys);
        let (_, sent) = got(&played, "POST /v1/x", "", body);
        assert_eq!(String::from_utf8_lossy(&sent), expected);
    }
    played.reload("request_timeout = \"100ms\"");
    let mut client = played.client();
    client.ask("POST /v1/x", "", body);
    assert_eq!(client.head().status(), 504);
    assert_eq!(played.residentd.worker_pid("m"), pid);
}
