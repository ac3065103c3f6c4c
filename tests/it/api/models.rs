//! Models by name, and what an operator wishes of them.

use residentd::control::{Command, LogTail, Refusal};
use residentd::model::{Bytes, Domain};

use super::world::{Answer, World, call, explains, name, nobody_asks};

/// Grants every wish, but only in the order that makes sense.
fn grant(command: Command) {
    let (model, reply) = match command {
        Command::Load { model, reply, .. } => (model, reply),
        Command::Unload { model, reply, .. } => (model, reply),
        Command::Pin {
            model,
            pinned,
            reply,
        } => {
            assert_eq!(pinned, model.as_str() == "gemma");
            (model, reply)
        }
        other => panic!("not a wish: {other:?}"),
    };
    assert!(
        ["gemma", "org/nano:e5"].contains(&model.as_str()),
        "{model}"
    );
    let _ = reply.send(Ok(()));
}

#[tokio::test]
async fn a_model_is_found_by_name_alias_and_with_its_slash_in_either_form() {
    let world = World::new(explains);
    for (path, model) in [
        ("gemma", "gemma"),
        ("gpt-4o-mini", "gemma"),
        ("org/nano:e5", "org/nano:e5"),
        ("org%2Fnano%3Ae5", "org/nano:e5"),
    ] {
        let answer = world.get(&format!("/api/v1/models/{path}")).await;
        assert_eq!(answer.status, 200, "{path}");
        assert_eq!(answer.json()["data"]["name"], model, "{path}");
    }
    let answer = world.get("/api/v1/models/nobody").await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.json()["error"]["code"], "model_not_found");
    let answer = world.get("/api/v1/models").await;
    assert_eq!(answer.json()["data"]["total_count"], 4);
    assert_eq!(answer.json()["data"]["loaded_count"], 2);
}

#[tokio::test]
async fn why_a_model_is_not_ready_is_told_with_the_numbers() {
    let world = World::new(explains);
    let answer = world.get("/api/v1/models/voice").await.json();
    assert_eq!(
        answer["data"]["explanation"],
        serde_json::json!({
            "reason": "evicted",
            "since": 1_700_000_050.0,
            "message": "voice was evicted 10.0 s ago: make room for gemma: it needs 2.00 GiB on host, there was room for 1.00 GiB; a request waits for gemma (busy, host 2.00 GiB): it needs 3.00 GiB on host, there is room for 1.00 GiB; busy workers are drained for it in 4.0 s",
            "details": {
                "evicted_for": "make_room",
                "for_model": "gemma",
                "domain": "host",
                "need": 2_147_483_648_u64,
                "room": 1_073_741_824,
            },
            "outlook": {
                "result": "waits",
                "domain": "host",
                "need": 3_221_225_472_u64,
                "room": 1_073_741_824,
                "waits_for": [{
                    "name": "gemma",
                    "why": "busy",
                    "in_flight": 1,
                    "holds": {"host": 2_147_483_648_u64},
                }],
                "behind": [],
                "drains_in_seconds": 4.0,
            },
            "last_load_seconds": 2.5,
            "ready_in_seconds": null,
        })
    );
    // Without a controller the model is still shown.
    let mute = World::new(drop);
    let answer = mute.get("/api/v1/models/voice").await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.json()["data"]["explanation"],
        serde_json::Value::Null
    );
}

#[tokio::test]
async fn an_operators_wish_is_answered_when_it_is_done() {
    let world = World::new(grant);
    for (path, message) in [
        ("gemma/load", "gemma is ready"),
        ("org/nano:e5/unload", "org/nano:e5 is unloaded"),
        ("org%2Fnano:e5/restart", "org/nano:e5 is restarted"),
        ("gpt-4o-mini/pin", "gemma is pinned"),
        ("org/nano:e5/unpin", "org/nano:e5 is unpinned"),
    ] {
        let answer = world.post(&format!("/api/v1/models/{path}"), "").await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        assert_eq!(answer.json()["data"]["message"], message, "{path}");
    }
}

#[tokio::test]
async fn what_is_no_wish_or_no_model_is_not_found() {
    let world = World::new(nobody_asks);
    for (path, status) in [
        ("gemma/frobnicate", 404),
        ("nobody/load", 404),
        ("gemma", 405),
        ("gemma/load?wait=maybe", 400),
        ("gemma/load?frobnicate=1", 400),
    ] {
        let answer = world.post(&format!("/api/v1/models/{path}"), "").await;
        assert_eq!(answer.status, status, "{path}: {}", answer.body);
        assert_eq!(answer.json()["status"], "error");
    }
}

#[tokio::test(start_paused = true)]
async fn a_wish_that_is_not_waited_for_is_accepted_unless_refused_at_once() {
    let slow = World::new(|command| {
        // Keeps the answer back for ever, as a load that takes long does.
        std::mem::forget(command);
    });
    let answer = slow.post("/api/v1/models/gemma/load?wait=false", "").await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    let refusing = World::new(refuse);
    let answer = refusing
        .post("/api/v1/models/gemma/load?wait=false", "")
        .await;
    assert_eq!(answer.status, 503);
    let error = &answer.json()["error"];
    assert_eq!(error["code"], "model_too_large");
    assert!(answer.header("retry-after").is_empty(), "it never fits");
}

fn refuse(command: Command) {
    let Command::Load { model, reply, .. } = command else {
        panic!("not a load: {command:?}");
    };
    let _ = reply.send(Err(Refusal::TooLarge {
        model,
        domain: Domain::Host,
        need: Bytes::gib(9),
        budget: Bytes::gib(8),
    }));
}

#[tokio::test]
async fn a41_a_failed_load_tells_the_reason_and_the_last_lines() {
    let world = World::new(|command| {
        let Command::Load { model, reply, .. } = command else {
            panic!("not a load: {command:?}");
        };
        let _ = reply.send(Err(Refusal::WorkerFailed {
            model,
            cause: "exit code 1".to_owned(),
            last_lines: vec!["cannot open weights".to_owned()],
        }));
    });
    let answer = world.post("/api/v1/models/gemma/load", "").await;
    assert_eq!(answer.status, 502);
    let body = answer.json();
    assert_eq!(body["detail"], "the worker of gemma failed: exit code 1");
    assert_eq!(body["error"]["last_lines"][0], "cannot open weights");
}

fn log(command: Command) {
    let Command::Tail {
        model,
        lines,
        reply,
    } = command
    else {
        panic!("not a tail: {command:?}");
    };
    assert_eq!(model, name("org/nano:e5"));
    let all = ["one", "two", "three"];
    let kept = &all[all.len().saturating_sub(lines)..];
    let _ = reply.send(Ok(LogTail {
        generation: 2,
        end: 30,
        lines: kept.iter().map(|&line| line.to_owned()).collect(),
    }));
}

#[tokio::test]
async fn the_log_is_text_or_json_and_as_long_as_asked() {
    let world = World::new(log);
    let path = "/api/v1/models/org/nano:e5/logs";
    let answer = world.get(path).await;
    assert_eq!(answer.body, "one\ntwo\nthree\n");
    assert_eq!(answer.header("x-residentd-log-position"), "2:30");
    let answer = world.get(&format!("{path}?lines=1")).await;
    assert_eq!(answer.body, "three\n");
    let mut request = call("GET", &format!("{path}?lines=2"), "");
    let json = "application/json".parse().expect("a header");
    request.headers_mut().insert("accept", json);
    let answer: Answer = world.send(request, None).await;
    assert_eq!(
        answer.body,
        r#"{"status":"success","data":{"name":"org/nano:e5","generation":2,"end":30,"lines":["two","three"]}}"#
    );
    for bad in ["lines=-1", "lines=many", "lines=10001", "follow=perhaps"] {
        assert_eq!(
            world.get(&format!("{path}?{bad}")).await.status,
            400,
            "{bad}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_followed_log_goes_on_until_the_end_of_residentd() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let world = World::new(|command| {
        let Command::Tail { reply, .. } = command else {
            panic!("not a tail: {command:?}");
        };
        let asked = ASKED.fetch_add(1, Ordering::Relaxed);
        let _ = reply.send(match asked {
            0..4 => Ok(LogTail {
                generation: 1,
                end: asked + 1,
                lines: (0..=asked).map(|n| format!("line {}", n / 2)).collect(),
            }),
            4 => Err(Refusal::Overloaded),
            5 => Ok(LogTail {
                generation: 2,
                end: 1,
                lines: vec!["again".to_owned()],
            }),
            _ => Err(Refusal::ShuttingDown),
        });
    });
    let answer = world
        .get("/api/v1/models/gemma/logs?follow=true&lines=10")
        .await;
    assert_eq!(answer.body, "line 0\nline 0\nline 1\nline 1\nagain\n");
}
