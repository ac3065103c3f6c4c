//! `configs/quickstart.toml` as it is served by `make run`: a language model,
//! embeddings and speech in room for two of the three.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::residentd::command;
use crate::support::{Answer, Residentd, runs, wait_until};

/// Serves the file from the root of the checkout, as the README says; the
/// listener and the state folder are the test's own.
fn serve_quickstart() -> Residentd {
    let folder = tempfile::tempdir().expect("a folder for the test");
    let state = folder.path().join("state").display().to_string();
    let environment = [
        ("RESIDENTD_LISTEN", "127.0.0.1:0"),
        ("RESIDENTD_STATE_DIR", &state),
    ];
    let mut command = command(Path::new("configs/quickstart.toml"), &environment);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    Residentd::launch(folder, command)
}

fn post(residentd: &Residentd, path: &str, body: &Value) -> Answer {
    let answer = residentd.ask("POST", path, Some(&body.to_string()));
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    answer
}

fn complete(residentd: &Residentd) -> String {
    let body = json!({"model": "gemma", "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0});
    let answer = post(residentd, "/v1/completions", &body).json();
    let text = answer["choices"][0]["text"].as_str().expect("a text");
    text.to_owned()
}

fn embed(residentd: &Residentd, texts: &[&str]) -> Vec<Vec<f64>> {
    let body = json!({"model": "e5", "input": texts});
    let answer = post(residentd, "/v1/embeddings", &body).json();
    let list = answer["data"].as_array().expect("a list");
    let numbers = |entry: &Value| -> Vec<f64> {
        let vector = entry["embedding"].as_array().expect("a vector");
        vector.iter().filter_map(Value::as_f64).collect()
    };
    list.iter().map(numbers).collect()
}

fn speak(residentd: &Residentd, text: &str) -> Vec<u8> {
    post(
        residentd,
        "/upstream/voice/synthesize",
        &json!({"text": text}),
    )
    .body
}

fn likeness(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Bytes that the kernel says this process has resident.
fn resident(pid: i64) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.expect("a process has VmRSS") * 1024
}

#[test]
fn a01_a02_three_real_models_take_turns_in_room_for_two() {
    let residentd = serve_quickstart();
    let limit = residentd.memory("stats")["memory_limit"]
        .as_u64()
        .expect("a number");

    let text = complete(&residentd);
    assert!(
        ["city", "capital", "France"]
            .iter()
            .any(|word| text.contains(word)),
        "real English: {text}"
    );
    let gemma = residentd.worker_pid("gemma").expect("it is loaded");
    // Measured, not estimated: what the kernel says of the same process.
    wait_until("gemma's memory to be measured", || {
        let reported = residentd.model("gemma")["memory_usage"].as_u64()?;
        (reported.abs_diff(resident(gemma)) <= (reported / 50).max(16 << 20)).then_some(())
    });

    let vectors = embed(
        &residentd,
        &["a cat on the sofa", "the kitten sleeps", "income tax law"],
    );
    assert_eq!(vectors[0].len(), 384);
    assert!(likeness(&vectors[0], &vectors[1]) > likeness(&vectors[0], &vectors[2]));
    assert!(runs(gemma), "two of the three fit");

    let wav = speak(&residentd, "This model was not in memory a second ago.");
    assert!(
        wav.starts_with(b"RIFF") && wav.len() > 40_000,
        "{} bytes",
        wav.len()
    );
    assert!(!runs(gemma), "gemma was the least recently used");
    let gone = residentd.model("gemma");
    assert_eq!(
        (&gone["loaded"], &gone["memory_usage"]),
        (&json!(false), &json!(0))
    );
    assert_eq!(gone["last_eviction"]["reason"], "make_room");
    let usage = residentd.memory("stats")["total_memory_usage"]
        .as_u64()
        .expect("a number");
    assert!(usage < limit, "{usage} of {limit}");

    assert_eq!(complete(&residentd), text, "it answers again, and the same");
    assert_ne!(residentd.worker_pid("gemma"), Some(gemma));
    assert_eq!(residentd.model("gemma")["loads"], 2);
    let pids: Vec<i64> = ["gemma", "e5", "voice"]
        .iter()
        .filter_map(|name| residentd.worker_pid(name))
        .collect();
    assert_eq!(residentd.stop().code(), Some(0));
    assert!(pids.iter().all(|pid| !runs(*pid)));
}

#[test]
fn a_real_stream_arrives_in_pieces_and_ends_as_it_should() {
    let residentd = serve_quickstart();
    let body =
        json!({"model": "gemma", "prompt": "Once upon a time", "max_tokens": 32, "stream": true});
    let answer = post(&residentd, "/v1/completions", &body);
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert!(answer.complete);
    let text = answer.text();
    let events: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    assert!(events.len() > 16, "{text}");
    assert_eq!(events.last(), Some(&"[DONE]"));
    let words = events[..events.len() - 1].iter().map(|event| {
        let event: Value = serde_json::from_str(event).expect("JSON");
        event["choices"][0]["text"].as_str().map_or(0, str::len)
    });
    assert!(words.sum::<usize>() > 40, "{text}");
}
