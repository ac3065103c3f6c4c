//! llama.cpp with models of the project's own making, whose every word names
//! the model: whoever answers cannot be mistaken.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::support::{Residentd, runs};

const NAMES: [&str; 3] = ["red", "green", "blue"];

/// Writes a GGUF of 64 MB for each name and returns a configuration with room
/// for two of the three.
fn three_in_room_for_two(folder: &Path) -> String {
    let checkout = env!("CARGO_MANIFEST_DIR");
    let mut config = "[memory]\nlimit = \"250MiB\"\nreserve = \"16MiB\"\n".to_owned();
    for name in NAMES {
        let gguf = folder.join(format!("{name}.gguf"));
        let status = Command::new(env!("CARGO_BIN_EXE_tiny-gguf"))
            .arg(&gguf)
            .args(["--size", "64M", "--signature", name])
            .status()
            .expect("tiny-gguf can be spawned");
        assert!(status.success());
        config += &format!(
            "[models.{name}]\ncommand = [\"{checkout}/.cache/engines/bin/python\", \"{checkout}/workers/llamacpp/llama_server.py\", \"-m\", {gguf:?}, \"--host\", \"127.0.0.1\", \"--port\", \"${{PORT}}\", \"-c\", \"512\", \"-np\", \"1\", \"-t\", \"1\", \"--cache-ram\", \"0\"]\n"
        );
    }
    config
}

#[test]
fn a02_whoever_is_asked_answers_with_its_own_words_while_two_of_three_are_resident() {
    let folder = tempfile::tempdir().expect("a folder");
    let residentd = Residentd::start(&three_in_room_for_two(folder.path()));
    let mut last: Vec<i64> = Vec::new();
    for round in 0..3 {
        for name in NAMES {
            let body = json!({"model": name, "prompt": "Hello", "max_tokens": 4}).to_string();
            let answer = residentd.ask("POST", "/v1/completions", Some(&body));
            assert_eq!(answer.status, 200, "{name}: {}", answer.text());
            let json = answer.json();
            let text = json["choices"][0]["text"].as_str().expect("a text");
            let words: Vec<&str> = text.split_whitespace().collect();
            assert_eq!(words.len(), 4, "{text}");
            assert!(
                words.iter().all(|word| word.starts_with(name)),
                "{name} said {text}"
            );
            let pid = residentd.worker_pid(name).expect("it is loaded");
            assert!(!last.contains(&pid), "a new life is a new process");
            last.push(pid);
            let alive = last.iter().filter(|pid| runs(**pid)).count();
            assert!(alive <= 2, "round {round}: {alive} workers live");
            let stats = residentd.memory("stats");
            let (usage, limit) = (&stats["total_memory_usage"], &stats["memory_limit"]);
            assert!(usage.as_u64() <= limit.as_u64(), "{usage} of {limit}");
        }
    }
    // The first load is judged by the file's size, later ones by what was measured.
    let expected = residentd.model("red")["expected"].clone();
    assert_eq!(expected["source"], "learned", "{expected}");
    assert_eq!(residentd.memory("stats")["evictions_total"], 7);
}
