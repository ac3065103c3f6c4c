//! The Open Inference Protocol over REST: what residentd answers itself, and
//! what it passes on.

use serde_json::{Value, json};

use crate::support::Residentd;
use crate::support::residentd::STUB;
use crate::support::wire::Wire;

/// `red` and `org/blue`, of which one fits; `broken` ends when it
/// starts.
fn start() -> Residentd {
    let model = |name: &str, worker: &str, memory: &str| {
        format!(
            "[models.\"{name}\"]\ncommand = '{STUB} --port ${{PORT}} --name {worker}'\nmemory = \"{memory}\"\n"
        )
    };
    Residentd::start(&format!(
        "[memory]\nlimit = \"100MiB\"\nreserve = \"16MiB\"\n{}{}{}",
        model("red", "red", "64MiB"),
        model("org/blue", "blue", "64MiB"),
        model("broken", "broken --crash-on-start", "32MiB"),
    ))
}

fn states(residentd: &Residentd, body: Option<&str>) -> Vec<(String, String)> {
    let answer = residentd.ask("POST", "/v2/repository/index", body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let index = answer.json();
    let entries = index.as_array().expect("a list");
    let text = |entry: &Value, key: &str| entry[key].as_str().expect("text").to_owned();
    entries
        .iter()
        .map(|entry| (text(entry, "name"), text(entry, "state")))
        .collect()
}

#[test]
fn a36_the_server_says_what_it_is_and_that_it_lives() {
    let residentd = start();
    let about = residentd.ask("GET", "/v2", None).json();
    assert_eq!(about["name"], "residentd");
    assert_eq!(about["extensions"], json!(["model_repository"]));
    let live = residentd.ask("GET", "/v2/health/live", None);
    assert_eq!((live.status, live.json()), (200, json!({"live": true})));
    crate::support::wait_until("memory to be measured", || {
        let ready = residentd.ask("GET", "/v2/health/ready", None);
        (ready.status == 200 && ready.json() == json!({"ready": true})).then_some(())
    });
}

#[test]
fn a36_asking_whether_a_model_is_ready_loads_nothing_and_is_true_while_it_is_resident() {
    let residentd = start();
    let ready = |path: &str| {
        let answer = residentd.ask("GET", path, None);
        (answer.status, answer.json())
    };
    let paths = [
        "/v2/models/org/blue/ready",
        "/v2/models/org%2Fblue/versions/3/ready",
    ];
    for path in paths {
        let (status, body) = ready(path);
        assert_eq!((status, &body["ready"]), (400, &json!(false)), "{path}");
        let why = "model org/blue is not ready: it is stopped";
        assert_eq!(body["error"], why, "{path}");
    }
    assert_eq!(residentd.model("org/blue")["loads"], 0);
    let (status, body) = ready("/v2/models/green/ready");
    assert_eq!(status, 404);
    assert!(body["error"].as_str().expect("text").contains("green"));

    let about = residentd.ask("GET", "/v2/models/org/blue", None);
    assert_eq!(about.json()["name"], "blue", "metadata is the worker's");
    for path in paths {
        let expected = json!({"name": "org/blue", "ready": true});
        assert_eq!(ready(path), (200, expected), "{path}");
    }
    assert_eq!(residentd.model("org/blue")["loads"], 1);
    let infer = json!({"inputs": [{"name": "x", "data": [1]}]}).to_string();
    for path in ["/v2/models/red/infer", "/v2/models/red/versions/1/infer"] {
        let answer = residentd.ask("POST", path, Some(&infer));
        assert_eq!(answer.header("x-stub-name"), Some("red"));
        assert_eq!(answer.json()["outputs"][0]["data"], json!([1]));
    }
    assert_eq!(ready(paths[0]).0, 400, "evicted for the other one");
}

#[test]
fn a36_models_are_loaded_and_unloaded_through_the_repository() {
    let residentd = start();
    let all = |red: &str, blue: &str| {
        [("broken", "UNAVAILABLE"), ("org/blue", blue), ("red", red)]
            .map(|(name, state)| (name.to_owned(), state.to_owned()))
            .to_vec()
    };
    assert_eq!(states(&residentd, None), all("UNAVAILABLE", "UNAVAILABLE"));
    let load = residentd.ask("POST", "/v2/repository/models/org/blue/load", None);
    assert_eq!((load.status, load.json()), (200, json!({})));
    // The answer means that it is ready.
    let now = states(&residentd, Some("{}"));
    assert_eq!(now, all("UNAVAILABLE", "READY"));
    let only = states(&residentd, Some(r#"{"ready": true}"#));
    assert_eq!(only, vec![("org/blue".to_owned(), "READY".to_owned())]);

    let body = r#"{"parameters": {"unload_dependents": true}}"#;
    let path = "/v2/repository/models/org%2Fblue/unload";
    let unload = residentd.ask("POST", path, Some(body));
    assert_eq!((unload.status, unload.json()), (200, json!({})));
    assert_eq!(residentd.worker_pid("org/blue"), None);

    for (path, body, status, says) in [
        ("models/green/load", None, 404, "green"),
        ("models/broken/load", None, 502, "broken"),
        ("models/red/load", Some("[]"), 400, "JSON object"),
        (
            "models/red/load",
            Some(r#"{"parameters": {"config": "{}"}}"#),
            400,
            "config",
        ),
        ("models/red/restart", None, 404, "restart"),
        ("index", Some(r#"{"ready": 1}"#), 400, "ready"),
    ] {
        let answer = residentd.ask("POST", &format!("/v2/repository/{path}"), body);
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
        let error = answer.json();
        let keys: Vec<_> = error.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["error"], "{path}");
        let text = error["error"].as_str().expect("text");
        assert!(text.contains(says), "{path}: {text}");
    }
    let wrong = residentd.ask("GET", "/v2/repository/models/red/load", None);
    assert_eq!(wrong.status, 405, "{}", wrong.text());
    assert!(wrong.json()["error"].is_string());
    assert_eq!(residentd.model("red")["loads"], 0);
}

#[test]
fn a36_inference_that_is_refused_says_so_in_the_words_of_its_protocol() {
    let residentd = start();
    for (path, status, says) in [
        ("/v2/models/green/infer", 404, "green"),
        ("/v2/models/broken/infer", 502, "broken"),
    ] {
        let answer = residentd.ask("POST", path, Some("{}"));
        assert_eq!(answer.status, status, "{}", answer.text());
        let text = answer.json()["error"].as_str().map(str::to_owned);
        assert!(text.expect("a text").contains(says));
    }
}

#[test]
fn a55_a_page_of_another_site_changes_nothing_through_the_repository() {
    let residentd = start();
    let from_elsewhere = "origin: http://evil.example\r\n";
    for (path, status) in [
        ("/v2/repository/models/red/load", 403),
        ("/v2/repository/models/red/unload", 403),
        ("/v2/repository/index", 200),
    ] {
        let mut wire = Wire::to(residentd.address());
        wire.ask(&format!("POST {path}"), from_elsewhere, "");
        let (head, body) = wire.answer();
        assert_eq!(head.status(), status, "{path}: {body}");
        if status == 403 {
            let error: Value = serde_json::from_str(&body).expect("JSON");
            assert!(error["error"].is_string(), "{body}");
        }
    }
    assert_eq!(residentd.model("red")["loads"], 0);
}
