//! An address of their own for operators.

use std::io::BufRead;

use serde_json::json;

use super::{BOSS, USER, bearer, call, with};
use crate::support::residentd::{command, write_config};
use crate::support::wire::Wire;
use crate::support::{PATIENCE, Residentd, wait_until};

/// Starts with an address for operators, and returns that too.
fn start(config: &str) -> (Residentd, String) {
    // A port that was free a moment ago; nobody else is given it meanwhile as a rule.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let admin = free.local_addr().expect("bound").to_string();
    drop(free);
    let config = format!("{config}\n[admin]\nlisten = \"{admin}\"\n");
    (Residentd::start(&with(&config)), admin)
}

#[test]
fn operators_have_an_address_of_their_own_and_the_other_has_models_and_probes_only() {
    let (residentd, admin) = start("");
    let main = residentd.address();
    for probe in ["/livez", "/readyz", "/startupz", "/health"] {
        for address in [main, &admin] {
            let answer = call(address, &format!("GET {probe}"), &[], "");
            assert_eq!(answer.status, 200, "{address} {probe}");
        }
    }
    for line in [
        "GET /api/v1/memory/stats",
        "GET /api/v1/models",
        "GET /metrics",
        "GET /",
        "POST /api/v1/models/m/unload",
    ] {
        assert_eq!(call(main, line, &[], "").status, 404, "{line}");
        assert_eq!(call(&admin, line, &[], "").status, 200, "{line}");
    }
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let complete = |address| call(address, "POST /v1/completions", &[], &body).status;
    assert_eq!(complete(main), 200);
    assert_eq!(complete(&admin), 404);
}

#[test]
fn both_addresses_survive_an_upgrade_with_tokens_asked_for_at_each() {
    let tokens = format!("[auth]\nadmin_tokens = [\"{BOSS}\"]");
    let (residentd, admin) = start(&tokens);
    let token = bearer(BOSS);
    let with_token = [("authorization", &*token)];
    let before = call(&admin, "GET /api/v1/models", &with_token, "");
    assert_eq!(before.status, 200);
    let upgraded = call(&admin, "POST /api/v1/upgrade", &with_token, "");
    assert_eq!(upgraded.status, 200, "{}", upgraded.text());
    for _ in 0..20 {
        let stats = "GET /api/v1/memory/stats";
        assert_eq!(call(&admin, stats, &with_token, "").status, 200);
        assert_eq!(call(&admin, stats, &[], "").status, 401);
        assert_eq!(
            call(residentd.address(), stats, &with_token, "").status,
            404
        );
        let probe = call(residentd.address(), "GET /livez", &[], "");
        assert_eq!(probe.status, 200);
    }
}

#[test]
fn it_says_where_operators_are_to_call() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = write_config(folder.path(), &with("[admin]\nlisten = \"127.0.0.1:0\""));
    let mut serve = command(&file, &[]);
    serve.current_dir(folder.path());
    let mut child = serve
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("it starts");
    let said = std::io::BufReader::new(child.stdout.take().expect("piped"));
    let lines: Vec<String> = said.lines().take(2).map_while(Result::ok).collect();
    let pid = i64::from(child.id());
    crate::support::kill(pid, nix::sys::signal::Signal::SIGTERM);
    let start = crate::support::now();
    wait_until("its end", || child.try_wait().expect("our child"));
    assert!(start.elapsed() < PATIENCE);
    let is_address =
        |line: &String| line.starts_with("residentd is listening on http://127.0.0.1:");
    assert!(
        lines.iter().all(is_address) && lines.len() == 2,
        "{lines:?}"
    );
    assert!(lines[1].ends_with(" for operators"), "{lines:?}");
}

#[test]
fn a55_a_connection_from_before_an_upgrade_is_asked_for_its_token_as_ever() {
    let tokens = format!("[auth]\ninference_tokens = [\"{USER}\"]\nadmin_tokens = [\"{BOSS}\"]");
    let residentd = Residentd::start(&with(&tokens));
    // Some for requests that are let in, some for those that are not: an answer
    // after the upgrade ends its connection.
    let mut wires: Vec<Wire> = (0..4).map(|_| Wire::to(residentd.address())).collect();
    let ask = |wire: &mut Wire, line: &str, token: &str| {
        wire.ask(line, &format!("x-api-key: {token}\r\n"), "x");
        wire.answer().0.status()
    };
    for wire in &mut wires {
        assert_eq!(ask(wire, "POST /upstream/m/echo", USER), 200);
    }
    let token = bearer(BOSS);
    let with_token = [("authorization", &*token)];
    let upgraded = call(residentd.address(), "POST /api/v1/upgrade", &with_token, "");
    assert_eq!(upgraded.status, 200, "{}", upgraded.text());
    let asked = [
        ("POST /upstream/m/echo", USER, 200),
        ("POST /upstream/m/echo", "sk-else", 401),
        ("GET /api/v1/models", BOSS, 200),
        ("GET /api/v1/models", USER, 403),
    ];
    for (wire, (line, token, status)) in wires.iter_mut().zip(asked) {
        assert_eq!(ask(wire, line, token), status, "{line}");
    }
}
