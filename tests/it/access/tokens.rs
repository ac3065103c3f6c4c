//! Tokens of users and of operators.

use serde_json::json;

use super::{BOSS, USER, bearer, call, status, with};
use crate::support::{Residentd, wait_until};

const COMPLETE: &str = "POST /v1/completions";
const STATS: &str = "GET /api/v1/memory/stats";
const UNLOAD: &str = "POST /api/v1/models/m/unload";
/// What no token is ever needed for.
const OPEN: [&str; 6] = [
    "GET /livez",
    "GET /readyz",
    "GET /startupz",
    "GET /health",
    "GET /metrics",
    "GET /",
];

#[test]
fn a55_models_are_for_those_with_a_token_when_there_are_any() {
    let residentd = Residentd::start(&with(&format!("[auth]\ninference_tokens = [\"{USER}\"]")));
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let complete = |headers: &[(&str, &str)]| call(residentd.address(), COMPLETE, headers, &body);
    for headers in [
        &[][..],
        &[("authorization", "Bearer sk-user-5f0c1d7ab2e94f35")],
        &[("authorization", "Bearer ")],
        &[("authorization", USER)],
        &[("x-api-key", "x")],
    ] {
        let refused = complete(headers);
        assert_eq!(refused.status, 401, "{headers:?}");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
        let error = &refused.json()["error"];
        assert_eq!(error["code"], "unauthorized", "{error}");
        assert_eq!(error["type"], "invalid_request_error", "{error}");
        assert!(error["message"].is_string(), "{error}");
    }
    assert_eq!(status(&residentd, "GET /v1/models", None), 401);
    let answer = complete(&[("authorization", &bearer(USER))]);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(complete(&[("x-api-key", USER)]).status, 200);
    // No operators' tokens: reads stay open, and this machine may change.
    assert_eq!(status(&residentd, STATS, None), 200);
    assert_eq!(status(&residentd, UNLOAD, None), 200);
}

#[test]
fn a55_with_operators_tokens_nobody_reads_or_changes_without_one_but_probes_go_on() {
    let config = format!(
        "[auth]\ninference_tokens = [\"{USER}\"]\nadmin_tokens = [\"{BOSS}\", \"another\"]"
    );
    let residentd = Residentd::start(&with(&config));
    for line in [STATS, UNLOAD, "GET /api/v1/events", "POST /api/v1/reload"] {
        let refused = call(residentd.address(), line, &[], "");
        assert_eq!(refused.status, 401, "{line}");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
        assert_eq!(refused.json()["error"]["code"], "unauthorized");
        assert_eq!(status(&residentd, line, Some("sk-else")), 401, "{line}");
        // Whoever may use models may not do more.
        let answer = status(&residentd, line, Some(USER));
        assert_eq!(answer, 403, "{line}");
        assert_eq!(status(&residentd, line, Some(BOSS)), 200, "{line}");
    }
    for line in OPEN {
        assert_eq!(status(&residentd, line, None), 200, "{line}");
    }
    // Nothing is changed by asking for what is open in another way.
    assert_eq!(status(&residentd, "POST /metrics", None), 401);
    // An operator may use models too.
    assert_eq!(status(&residentd, "GET /v1/models", Some(BOSS)), 200);
    assert_eq!(status(&residentd, "GET /v1/models", Some("another")), 200);
}

#[test]
fn a55_a_token_for_residentd_goes_no_further_and_a_workers_own_key_does() {
    let residentd = Residentd::start(&with(&format!(
        "[auth]\ninference_tokens = [\"{USER}\"]\nadmin_tokens = [\"{BOSS}\"]"
    )));
    let seen = |headers: &[(&str, &str)]| {
        let answer = call(residentd.address(), "POST /upstream/m/echo", headers, "x");
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text()
    };
    for headers in [
        [("authorization", bearer(USER)), ("x-api-key", "own".into())],
        [
            ("authorization", "Bearer own".into()),
            ("x-api-key", USER.into()),
        ],
        [
            ("authorization", "Bearer own".into()),
            ("x-api-key", BOSS.into()),
        ],
    ] {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (*n, &**v)).collect();
        let text = seen(&headers);
        assert!(text.contains("own"), "{text}");
        assert!(!text.contains("sk-"), "{text}");
    }
}

#[test]
fn a55_files_of_tokens_are_read_anew_and_one_with_nothing_in_it_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    std::fs::write(&file, format!("# ours\n{USER}\n")).expect("written");
    let config = format!("[auth]\ninference_tokens_file = {file:?}\n");
    let residentd = Residentd::start(&with(&config));
    let models = |token| status(&residentd, "GET /v1/models", Some(token));
    assert_eq!((models(USER), models("fresh")), (200, 401));
    // As a secret that Kubernetes mounts: by a name that is given to another file.
    std::fs::write(folder.path().join("new"), "fresh\n").expect("written");
    std::fs::rename(folder.path().join("new"), &file).expect("renamed");
    wait_until("the new token to hold", || {
        (models("fresh") == 200).then_some(())
    });
    assert_eq!(models(USER), 401);

    std::fs::write(&file, "\n").expect("written");
    wait_until("it to be refused", || {
        residentd.log().contains("holds no token").then_some(())
    });
    let answer = call(residentd.address(), "POST /api/v1/reload", &[], "");
    assert_eq!(answer.status, 422, "{}", answer.text());
    assert_eq!((models("fresh"), models("")), (200, 401));
}

#[test]
fn a55_tokens_come_from_the_environment_and_workers_do_not_get_them() {
    let environment = [
        ("RESIDENTD_INFERENCE_TOKENS", "one,two"),
        ("RESIDENTD_ADMIN_TOKENS", BOSS),
    ];
    let residentd = Residentd::start_with(&with(""), &environment);
    assert_eq!(status(&residentd, "GET /v1/models", Some("one")), 200);
    assert_eq!(status(&residentd, "GET /v1/models", Some("two")), 200);
    assert_eq!(status(&residentd, STATS, Some(BOSS)), 200);
    assert_eq!(status(&residentd, STATS, Some("one")), 403);
    let header = ("authorization", &*bearer("one"));
    let seen = call(residentd.address(), "GET /upstream/m/env", &[header], "").text();
    assert!(seen.contains("PATH"), "{seen}");
    assert!(!seen.contains("_TOKENS") && !seen.contains(BOSS), "{seen}");
}

#[test]
fn the_command_sends_a_token_and_says_when_it_is_not_the_right_one() {
    let residentd = Residentd::start(&with(&format!("[auth]\nadmin_tokens = [\"{BOSS}\"]")));
    let file = residentd.folder().join("token");
    std::fs::write(&file, format!("{BOSS}\n")).expect("written");
    let run = |arguments: &[&str], environment: &[(&str, &str)]| {
        let server = format!("http://{}", residentd.address());
        let mut command = std::process::Command::new(crate::support::residentd::RESIDENTD);
        command.args(["ps", "--server", &server]).args(arguments);
        command.envs(environment.iter().copied());
        let ended = command.output().expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            ended.status.code(),
            text(&ended.stdout),
            text(&ended.stderr),
        )
    };
    let path = file.display().to_string();
    assert_eq!(run(&["--token-file", &path], &[]).0, Some(0));
    assert_eq!(run(&["--token", BOSS], &[]).0, Some(0));
    assert_eq!(run(&[], &[("RESIDENTD_TOKEN", BOSS)]).0, Some(0));
    let (code, _, told) = run(&[], &[]);
    assert_eq!(code, Some(1));
    assert!(told.contains("a token is needed"), "{told}");
    let (code, out, told) = run(&["--token", "with a space"], &[]);
    assert_eq!(code, Some(1));
    assert!(!told.contains("with a space") && out.is_empty(), "{told}");
    let help = run(&["--help"], &[("RESIDENTD_TOKEN", BOSS)]);
    assert!(!help.1.contains(BOSS), "{}", help.1);
}
