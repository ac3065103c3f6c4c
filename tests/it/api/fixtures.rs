//! A03: the six memory endpoints answer byte for byte as recorded in
//! `tests/fixtures/memory-api`. A fixture is the answer with white space for
//! the reader; without it, it is compared with the answer's bytes.

use std::fs;
use std::path::Path;
use std::time::Duration;

use residentd::control::*;
use residentd::memory::Reading;
use residentd::model::{Bytes, Domain};

use super::world::{Answer, World, call, name, nobody_asks, snapshot};

/// Asserts that the answer is the fixture's, byte for byte.
fn same_as_recorded(answer: &Answer, status: u16, fixture: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/memory-api")
        .join(format!("{fixture}.json"));
    let recorded = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        without_space(&recorded),
        answer.body,
        "{} is not what was answered",
        path.display()
    );
    assert_eq!(answer.status.as_u16(), status, "{fixture}");
    assert_eq!(answer.header("content-type"), "application/json");
}

/// Returns JSON without the white space between its tokens.
fn without_space(json: &str) -> String {
    let mut out = String::new();
    let (mut quoted, mut escaped) = (false, false);
    for c in json.chars() {
        if quoted || !c.is_ascii_whitespace() {
            out.push(c);
        }
        quoted ^= c == '"' && !escaped;
        escaped = quoted && c == '\\' && !escaped;
    }
    out
}

fn limits(command: Command) {
    let Command::Limit { request, reply } = command else {
        panic!("not a limit: {command:?}");
    };
    let answer = match (request.domain, request.limit) {
        (Domain::Host, Some(limit)) => {
            assert_eq!(limit, Bytes::gib(64));
            Ok((limit, Bytes::mib(7680)))
        }
        (Domain::Host, None) => Ok((Bytes::mib(1920), Bytes::mib(1920))),
        (Domain::Gpu(0), Some(limit)) => {
            assert!(request.persist);
            Ok((limit, limit))
        }
        (domain, _) => Err(Refusal::UnknownDomain(domain)),
    };
    let _ = reply.send(answer.map(|(limit, effective)| LimitReport {
        limit,
        effective,
        usage: Bytes::gib(2),
    }));
}

fn cleanups(command: Command) {
    let Command::Cleanup { request, reply, .. } = command else {
        panic!("not a cleanup: {command:?}");
    };
    let report = if request.dry_run {
        CleanupReport {
            unloaded: vec![name("org/nano:e5")],
            freed: Bytes::mib(512),
            ..CleanupReport::default()
        }
    } else if request.all {
        assert_eq!(request.timeout, Some(Duration::from_secs(5)));
        CleanupReport {
            unloaded: vec![name("org/nano:e5")],
            freed: Bytes::mib(500),
            freed_vram: Bytes::gib(6),
            skipped: vec![
                Skipped {
                    model: name("gemma"),
                    why: Skip::Protected(Protection::Busy),
                },
                Skipped {
                    model: name("voice"),
                    why: Skip::NotLoaded,
                },
            ],
            shortfall: Bytes::mib(12),
            timed_out: true,
        }
    } else {
        CleanupReport::default()
    };
    let _ = reply.send(Ok(report));
}

#[tokio::test(start_paused = true)]
async fn a03_the_views_answer_byte_for_byte_as_recorded() {
    let world = World::new(nobody_asks);
    tokio::time::advance(Duration::from_millis(60_250)).await;
    for endpoint in ["stats", "pressure", "models", "system"] {
        let answer = world.get(&format!("/api/v1/memory/{endpoint}")).await;
        same_as_recorded(&answer, 200, endpoint);
    }
}

#[tokio::test(start_paused = true)]
async fn a03_without_pressure_cgroup_and_devices_the_views_are_as_recorded() {
    let mut calm = snapshot();
    calm.models.clear();
    calm.counters = Counters::default();
    calm.memory.level = PressureLevel::None;
    calm.memory.usage = Bytes::ZERO;
    calm.memory.domains.truncate(1);
    calm.memory.domains[0].level = PressureLevel::None;
    calm.memory.domains[0].usage = Bytes::ZERO;
    calm.memory.candidates.clear();
    calm.memory.protected.clear();
    let mut reading = Reading::clone(&calm.memory.reading);
    reading.host.cgroup = None;
    reading.host.psi = None;
    reading.devices.clear();
    reading.workers.clear();
    calm.memory.reading = reading.into();
    let world = World::of(calm, nobody_asks);
    for endpoint in ["stats", "pressure", "models", "system"] {
        let answer = world.get(&format!("/api/v1/memory/{endpoint}")).await;
        same_as_recorded(&answer, 200, &format!("{endpoint}_calm"));
    }
}

#[tokio::test(start_paused = true)]
async fn a03_limit_answers_byte_for_byte_as_recorded() {
    let world = World::new(limits);
    let base = "/api/v1/memory/limit";
    for (query, fixture) in [
        ("", "limit_report"),
        ("?limit_gb=64.0", "limit_set"),
        ("?limit_gb=8&device=GPU-5b2e&persist=true", "limit_gpu"),
    ] {
        let answer = world.post(&format!("{base}{query}"), "").await;
        same_as_recorded(&answer, 200, fixture);
    }
}

#[tokio::test(start_paused = true)]
async fn a03_a_bad_limit_is_refused_and_nothing_is_asked_of_the_controller() {
    let world = World::new(nobody_asks);
    for bad in ["0", "-1", "nan", "inf", "four", ""] {
        let answer = world
            .post(&format!("/api/v1/memory/limit?limit_gb={bad}"), "")
            .await;
        assert_eq!(answer.status, 400, "{bad}: {}", answer.body);
    }
    let answer = world.post("/api/v1/memory/limit?limit_gb=0", "").await;
    same_as_recorded(&answer, 400, "limit_zero");
    let answer = world.post("/api/v1/memory/limit?device=gpu:7", "").await;
    same_as_recorded(&answer, 404, "limit_unknown_device");
    let answer = world.post("/api/v1/memory/limit?limit=4", "").await;
    same_as_recorded(&answer, 400, "limit_unknown_parameter");
}

#[tokio::test(start_paused = true)]
async fn a03_cleanup_answers_byte_for_byte_as_recorded() {
    let world = World::new(cleanups);
    let path = "/api/v1/memory/cleanup";
    let all = r#"{"all": true, "timeout_seconds": 5}"#;
    for (query, body, fixture) in [
        ("", "", "cleanup_nothing"),
        ("", all, "cleanup_all"),
        ("?dry_run=true", "", "cleanup_dry_run"),
    ] {
        let answer = world.post(&format!("{path}{query}"), body).await;
        same_as_recorded(&answer, 200, fixture);
    }
}

#[tokio::test(start_paused = true)]
async fn a03_a_malformed_cleanup_is_refused_and_names_its_field() {
    let world = World::new(nobody_asks);
    let path = "/api/v1/memory/cleanup";
    for (body, status, fixture) in [
        (r#"{"frobnicate": 1}"#, 400, "cleanup_unknown_field"),
        (r#"{"target_bytes": "1GB"}"#, 400, "cleanup_bad_field"),
        (r#"{"models": ["nobody"]}"#, 404, "cleanup_unknown_model"),
    ] {
        let answer = world.post(path, body).await;
        same_as_recorded(&answer, status, fixture);
    }
    let huge = " ".repeat((1 << 20) + 1);
    assert_eq!(world.post(path, &huge).await.status, 413);
}

#[tokio::test(start_paused = true)]
async fn a_controllers_refusal_has_its_status_code_and_time_to_retry() {
    let world = World::new(|command| {
        let Command::Cleanup { reply, .. } = command else {
            panic!("not a cleanup: {command:?}");
        };
        let _ = reply.send(Err(Refusal::ShuttingDown));
    });
    let answer = world.post("/api/v1/memory/cleanup", "").await;
    same_as_recorded(&answer, 503, "draining");
    assert_eq!(answer.header("retry-after"), "5");
}

#[tokio::test(start_paused = true)]
async fn the_wrong_method_and_an_unknown_path_are_errors_in_the_same_envelope() {
    let world = World::new(nobody_asks);
    let answer = world.get("/api/v1/memory/cleanup").await;
    same_as_recorded(&answer, 405, "wrong_method");
    assert_eq!(answer.header("allow"), "POST");
    let answer = world.post("/api/v1/memory/stats", "").await;
    assert_eq!(answer.status, 405);
    assert_eq!(answer.header("allow"), "GET,HEAD");
    let answer = world.get("/api/v1/memory/statistics").await;
    same_as_recorded(&answer, 404, "unknown_path");
    let head = world.send(call("HEAD", "/api/v1/memory/stats", ""), None);
    assert_eq!(head.await.status, 200);
}
