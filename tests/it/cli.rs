//! The client commands as a user runs them, against the API of a fixed world.

use std::process::{Command, Output, Stdio};

use residentd::control::{Command as Asked, LimitReport, LogTail, Refusal};
use residentd::model::{Bytes, Domain};
use tokio::net::{TcpListener, UnixListener};

use crate::api::world::{Script, World, nobody_asks};

/// Serves a world until the test ends. Returns its address.
async fn serve(script: Script) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let router = World::new(script).local_router();
    residentd::telemetry::spawn("server", async move {
        axum::serve(listener, router).await.expect("serves");
    });
    format!("http://{address}")
}

fn command(server: &str, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_residentd"));
    command
        .args(line.split_whitespace())
        .env("RESIDENTD_SERVER", server)
        .stdin(Stdio::null());
    command
}

/// Runs residentd's client to its end.
async fn run(server: &str, line: &str) -> (i32, String, String) {
    let mut command = command(server, line);
    let ended = tokio::task::spawn_blocking(move || command.output());
    let Output {
        status,
        stdout,
        stderr,
    } = ended.await.expect("no panic").expect("residentd runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let code = status.code().expect("an exit code");
    (code, text(stdout), text(stderr))
}

fn grant(command: Asked) {
    match command {
        Asked::Load { model, reply, .. } if model.as_str() == "voice" => {
            let _ = reply.send(Err(Refusal::WorkerFailed {
                model,
                cause: "exit code 1".to_owned(),
                last_lines: vec!["no such voice".to_owned()],
            }));
        }
        Asked::Load { reply, .. } | Asked::Unload { reply, .. } | Asked::Pin { reply, .. } => {
            let _ = reply.send(Ok(()));
        }
        Asked::Limit { request, reply } => {
            assert_eq!(request.domain, Domain::Host);
            let limit = request.limit.unwrap_or(Bytes::gib(2));
            let _ = reply.send(Ok(LimitReport {
                limit,
                effective: limit,
                usage: Bytes::gib(1),
            }));
        }
        Asked::Cleanup { request, reply, .. } => {
            assert_eq!(request.target, Some(Bytes::gib(1)));
            assert!(request.dry_run && !request.force && !request.all);
            let _ = reply.send(Ok(residentd::control::CleanupReport {
                unloaded: request.models.unwrap_or_default(),
                freed: Bytes::mib(512),
                shortfall: Bytes::mib(512),
                ..Default::default()
            }));
        }
        other => panic!("not asked for here: {other:?}"),
    }
}

#[tokio::test]
async fn a51_ps_shows_every_model_and_the_totals() {
    let server = serve(nobody_asks).await;
    let (code, out, err) = run(&server, "ps").await;
    assert_eq!((code, err.as_str()), (0, ""));
    let lines: Vec<_> = out.lines().collect();
    assert!(lines[0].starts_with("MODEL"), "{out}");
    let gemma = lines.iter().find(|line| line.starts_with("gemma"));
    let words: Vec<_> = gemma.expect("gemma").split_whitespace().collect();
    assert_eq!(words[..4], ["gemma", "ready", "4242", "1.50"], "{out}");
    assert_eq!(words.last(), Some(&"now"), "{out}");
    assert!(out.contains("usage 2.00 GiB of 1.88 GiB (107 %), headroom 5.00 GiB, pressure soft"));
    assert!(out.contains("broken failed: exit code 1"), "{out}");
    let (code, out, _) = run(&server, "ps --json").await;
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, &json["data"]["total_count"]), (0, &4.into()));
}

#[tokio::test]
async fn a51_wishes_are_carried_out_and_answered_in_words() {
    let server = serve(grant).await;
    for (line, said) in [
        ("load gemma", "gemma is ready\n"),
        ("unload org/nano:e5", "org/nano:e5 is unloaded\n"),
        ("pin gpt-4o-mini", "gemma is pinned\n"),
        ("unpin gemma", "gemma is unpinned\n"),
        ("limit", "limit 2.00 GiB; usage 1.00 GiB\n"),
        ("limit 1.5GiB", "limit 1.50 GiB; usage 1.00 GiB\n"),
        (
            "cleanup --model gemma --target 1GiB --dry-run",
            "would unload gemma: 512.00 MB expected back\n512.00 MiB are missing\n",
        ),
    ] {
        let (code, out, err) = run(&server, line).await;
        assert_eq!((code, out.as_str(), err.as_str()), (0, said, ""), "{line}");
    }
}

#[tokio::test]
async fn a51_a_refusal_is_exit_code_1_with_its_reason_and_as_json_the_answer() {
    let server = serve(grant).await;
    let (code, out, err) = run(&server, "load voice").await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        err,
        "residentd: the worker of voice failed: exit code 1\nits last lines were:\n  no such voice\n"
    );
    let (code, out, err) = run(&server, "load voice --json").await;
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, err.as_str()), (1, ""));
    assert_eq!(json["error"]["code"], "worker_failed");
    let (code, _, err) = run(&server, "load nobody").await;
    assert_eq!(
        (code, err.as_str()),
        (1, "residentd: model nobody is not configured\n")
    );
}

#[tokio::test]
async fn a51_logs_print_what_there_is_and_follow_what_comes() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let server = serve(|command| {
        let Asked::Tail { reply, .. } = command else {
            panic!("not a tail: {command:?}");
        };
        let asked = ASKED.fetch_add(1, Ordering::Relaxed);
        let _ = reply.send(if asked < 3 {
            Ok(LogTail {
                generation: 1,
                end: asked + 1,
                lines: (0..=asked).map(|n| format!("line {n}")).collect(),
            })
        } else {
            Err(Refusal::ShuttingDown)
        });
    })
    .await;
    let (code, out, err) = run(&server, "logs -f gemma").await;
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (0, "line 0\nline 1\nline 2\n", "")
    );
}

#[tokio::test]
async fn with_nobody_there_the_way_out_is_named() {
    let unused = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let server = format!("http://{}", unused.local_addr().expect("bound"));
    drop(unused);
    for server in [server.as_str(), "unix:/nowhere/at/all.sock"] {
        let (code, out, err) = run(server, "ps").await;
        assert_eq!((code, out.as_str()), (1, ""));
        let hint = format!(
            "residentd: no residentd answers at {server}: start it with `residentd serve`, or name it with --server\n  caused by: "
        );
        assert!(err.starts_with(&hint), "{err}");
    }
}

#[tokio::test]
async fn what_is_not_residentd_is_called_a_stranger() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let server = format!("http://{}", listener.local_addr().expect("bound"));
    residentd::telemetry::spawn("stranger", async move {
        let router = axum::Router::new().fallback(|| async { "hello" });
        axum::serve(listener, router).await.expect("serves");
    });
    let (code, _, err) = run(&server, "ps").await;
    assert_eq!(code, 1);
    assert!(err.contains("is not residentd"), "{err}");
}

#[tokio::test]
async fn a_unix_socket_serves_as_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("http.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let router = World::new(grant).local_router();
    residentd::telemetry::spawn("server", async move {
        axum::serve(listener, router).await.expect("serves");
    });
    let (code, out, _) = run(&format!("unix:{}", path.display()), "load gemma").await;
    assert_eq!((code, out.as_str()), (0, "gemma is ready\n"));
}

#[tokio::test]
async fn a_reader_that_has_gone_ends_the_client_quietly() {
    let server = serve(nobody_asks).await;
    let mut client = command(&server, "ps");
    let mut client = client
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("residentd runs");
    drop(client.stdout.take());
    let ended = tokio::task::spawn_blocking(move || client.wait_with_output());
    let ended = ended.await.expect("no panic").expect("it ends");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!((ended.status.code(), said.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn wrong_use_is_exit_code_2_and_help_is_0() {
    let nowhere = "unix:/nowhere";
    for (line, expected) in [
        ("", 2),
        ("frobnicate", 2),
        ("load", 2),
        ("load a,b", 2),
        ("limit much", 2),
        ("--help", 0),
        ("--version", 0),
        ("completions bash", 0),
        ("completions zsh", 0),
    ] {
        let (code, out, err) = run(nowhere, line).await;
        assert_eq!(code, expected, "{line}: {err}");
        assert_eq!(out.is_empty(), expected == 2, "{line}: {out}");
    }
    let (_, out, _) = run(nowhere, "--version").await;
    assert_eq!(out, format!("residentd {}\n", env!("CARGO_PKG_VERSION")));
}
