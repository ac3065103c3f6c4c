//! The adapter for llama.cpp, as far as it goes without an engine.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

const ADAPTER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/workers/llamacpp/llama_server.py"
);

/// Runs the adapter with a PATH of this folder and what Python needs.
fn adapter(path: &Path, arguments: &[&str]) -> Output {
    let python = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output()
        .expect("python3 is there");
    let python = String::from_utf8(python.stdout).expect("a path");
    Command::new(python.trim())
        // Isolated, so that no wheel of this machine is found.
        .args(["-I", "-S", ADAPTER])
        .args(arguments)
        .env("PATH", path)
        .env_remove("RESIDENTD_LLAMA_SERVER")
        .output()
        .expect("the adapter can be run")
}

#[test]
fn the_adapter_becomes_llama_server_and_passes_every_flag_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("llama-server");
    std::fs::write(&program, "#!/bin/sh\necho \"$$ $@\"\n").expect("it can be written");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&program, mode).expect("it can be made a program");
    let flags = [
        "-m",
        "a model.gguf",
        "--port",
        "9000",
        "--some-newer-flag",
        "7",
    ];
    let done = adapter(folder.path(), &flags);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{done:?}");
    let (_, passed) = said.trim().split_once(' ').expect("a pid and the flags");
    assert_eq!(passed, flags.join(" "));
}

#[test]
fn without_llama_server_what_cannot_be_served_is_told() {
    let empty = tempfile::tempdir().expect("a folder");
    let model = empty.path().join("m.gguf");
    std::fs::write(&model, "").expect("it can be written");
    let model = model.display().to_string();
    for (flags, wanted) in [
        (vec!["--port", "9000"], "-m/--model"),
        (vec!["-m", &model, "--some-newer-flag"], "--some-newer-flag"),
        (vec!["-m", "/no/such.gguf"], "no model file /no/such.gguf"),
        (vec!["-m", &model], "scripts/setup-engines"),
    ] {
        let done = adapter(empty.path(), &flags);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(
            !done.status.success() && said.contains(wanted),
            "{flags:?}: {said}"
        );
    }
}
