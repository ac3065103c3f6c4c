//! Nothing that is secret is shown anywhere (A55).

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http2::SendRequest;
use hyper::{Request, StatusCode};
use serde_json::json;

use super::{BOSS, USER, bearer, call, with};
use crate::proxy::http2;
use crate::support::residentd::{RESIDENTD, STUB};
use crate::support::{Answer, Residentd, processes_with, wait_until};

/// Secrets that are planted, beside the tokens.
const WRONG: &str = "sk-wrong-5d1e7720";
const OF_FILE: &str = "sk-file-0a61f2cc";
const OF_MODEL: &str = "hf-model-77ad0911";
const OF_ENVIRONMENT: &str = "hf-environment-41c2ee";
const NEXT: &str = "hf-next-8f21b6";

const ALL: [&str; 7] = [USER, BOSS, WRONG, OF_FILE, OF_MODEL, OF_ENVIRONMENT, NEXT];

fn config(folder: &Path, secret: &str) -> String {
    let file = folder.join("tokens");
    let env = format!("env = {{ HF_TOKEN = \"{secret}\", OTHER = \"${{env:PLANTED}}\" }}\n");
    let failing = format!(
        "[models.bad]\ncommand = ['sh', '-c', 'exit 3', '${{PORT}}']\nmemory = \"1MiB\"\n{env}"
    );
    let big = format!(
        "[models.big]\ncommand = '{STUB} --port ${{PORT}} --name big'\nmemory = \"100MiB\"\n{env}"
    );
    let auth = format!(
        "access_log = true\n[auth]\ninference_tokens = [\"{USER}\"]\ninference_tokens_file = {file:?}\nadmin_tokens = [\"{BOSS}\"]"
    );
    format!("{}{env}{failing}{big}", with(&auth))
}

/// Calls everything there is, with good tokens and bad ones, and returns all
/// that was answered.
fn call_all(residentd: &Residentd) -> Vec<(String, Answer)> {
    let mut answers = Vec::new();
    let tokens = [USER, BOSS, WRONG, OF_FILE];
    for token in tokens {
        for header in [
            ("authorization", bearer(token)),
            ("x-api-key", token.to_owned()),
        ] {
            for line in [
                "GET /",
                "GET /metrics",
                "GET /health",
                "GET /v1/models",
                "GET /api/v1/models",
                "GET /api/v1/models/m",
                "GET /api/v1/models/bad",
                "GET /api/v1/models/m/logs",
                "GET /api/v1/events",
                "GET /api/v1/config",
                "GET /api/v1/memory/stats",
                "GET /api/v1/memory/models",
                "GET /api/v1/memory/system",
                "GET /api/v1/nothing",
                "POST /api/v1/models/m/pin",
                "POST /api/v1/models/bad/load",
                "POST /upstream/m/echo",
                "POST /upstream/none/echo",
                "TRACE /api/v1/models",
            ] {
                let sent = [(header.0, &*header.1)];
                answers.push((line.to_owned(), call(residentd.address(), line, &sent, "")));
            }
            for model in ["m", "bad", "big", "none"] {
                let body = json!({"model": model, "prompt": "x"}).to_string();
                let line = "POST /v1/completions";
                let sent = [(header.0, &*header.1)];
                answers.push((
                    line.to_owned(),
                    call(residentd.address(), line, &sent, &body),
                ));
            }
        }
    }
    answers
}

/// Calls by HTTP/2, whose library logs frames, and returns how many were refused.
fn call_by_http2(residentd: &Residentd) -> usize {
    let ask = |mut sender: SendRequest<Full<Bytes>>| async move {
        let mut refused = 0;
        for token in ALL {
            let request = Request::post("http://models.test/v1/completions")
                .header("authorization", bearer(token))
                .header("x-api-key", token)
                .body(Full::new(Bytes::from_static(
                    b"{\"model\": \"m\", \"prompt\": \"x\"}",
                )))
                .expect("a good request");
            let answer = sender.send_request(request).await.expect("an answer");
            refused += usize::from(answer.status() == StatusCode::UNAUTHORIZED);
        }
        refused
    };
    http2::with(residentd.address(), ask)
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => found.push(path),
        }
    }
    found
}

#[test]
fn a55_planted_tokens_and_secrets_of_models_appear_nowhere() {
    let tokens = tempfile::tempdir().expect("a folder");
    std::fs::write(tokens.path().join("tokens"), format!("{OF_FILE}\n")).expect("written");
    let environment = [
        ("RESIDENTD_LOG_LEVEL", "trace"),
        ("PLANTED", OF_ENVIRONMENT),
    ];
    let residentd = Residentd::start_with(&config(tokens.path(), OF_MODEL), &environment);
    let mut answers = call_all(&residentd);
    assert_eq!(call_by_http2(&residentd), ALL.len() - 3);

    // A reload that changes a secret, and one with an error where secrets are.
    residentd.configure(&config(tokens.path(), NEXT));
    let admin = [("authorization", &*bearer(BOSS))];
    let reload = |line| call(residentd.address(), line, &admin, "");
    let reloaded = reload("POST /api/v1/reload");
    assert_eq!(reloaded.status, 200, "{}", reloaded.text());
    let wrong = config(tokens.path(), NEXT)
        .replace(&format!("\"{USER}\""), &format!("\"{USER} x\", 7"))
        .replace(&format!("\"{NEXT}\""), &format!("[\"{NEXT}\"]"));
    residentd.configure(&wrong);
    let refused = reload("POST /api/v1/reload?dry_run=true");
    assert_eq!(refused.status, 422, "{}", refused.text());
    assert!(refused.text().contains("auth.inference_tokens"));
    let again = reload("POST /api/v1/reload");
    answers.extend([reloaded, refused, again].map(|answer| ("reload".to_owned(), answer)));
    let mut check = std::process::Command::new(RESIDENTD);
    check.arg("check").arg("--config");
    check.arg(residentd.folder().join("residentd.toml"));
    let checked = check.output().expect("it runs");
    assert_eq!(checked.status.code(), Some(2));
    answers.extend(call_all(&residentd));

    let shows = |text: &str| ALL.into_iter().find(|secret| text.contains(secret));
    for (line, answer) in &answers {
        let text = format!("{:?}\n{}", answer.headers, answer.text());
        assert_eq!(shows(&text), None, "{line}: {text}");
    }
    let refused = answers.iter().filter(|(_, answer)| answer.status == 401);
    assert!(refused.count() > 20 && answers.iter().any(|(_, answer)| answer.status == 200));
    let told = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert_eq!(shows(&told), None, "{told}");
    for pid in processes_with(&residentd.folder().display().to_string()) {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert_eq!(shows(&String::from_utf8_lossy(&line)), None, "{pid}");
    }
    wait_until("something at trace", || {
        residentd.log().contains("TRACE").then_some(())
    });
    let state = residentd.folder();
    let files = files_below(&state);
    let of_ours = |path: &&PathBuf| !path.ends_with("residentd.toml");
    let mut seen = 0;
    for path in files.iter().filter(of_ours) {
        let bytes = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let secret = shows(&text);
        let line = text.lines().find(|line| shows(line).is_some());
        assert_eq!(secret, None, "{}: {line:?}", path.display());
        seen += 1;
    }
    // Its log, its access log, its database and the workers' logs.
    assert!(seen >= 4, "{files:?}");
}
