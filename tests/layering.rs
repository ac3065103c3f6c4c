//! Holds the layer map: which module may import which.
//!
//! A row names a module under `src/` and what it may import from the crate.
//! A file that imports something else fails here, with its name and line.

use std::fs;
use std::path::{Path, PathBuf};

/// Module, and the modules it may import, itself aside.
const MAP: &[(&str, &[&str])] = &[
    // Layer 0: vocabulary.
    ("model", &[]),
    ("clock", &[]),
    ("template", &[]),
    ("telemetry", &[]),
    ("grpc", &["clock"]),
    // Layer 1: pure core, configuration, process table.
    ("config", &["model", "template", "telemetry"]),
    ("policy", &["model", "clock"]),
    ("procfs", &["model", "clock"]),
    // Layer 2: instruments and hands, and the pure core under a virtual clock.
    ("simulate", &["policy", "model", "clock"]),
    ("gate", &["model", "clock"]),
    (
        "worker",
        &["model", "clock", "template", "telemetry", "gate", "procfs"],
    ),
    ("memory", &["model", "clock", "telemetry", "procfs"]),
    ("store", &["model", "clock", "telemetry"]),
    // Layer 3: the controller.
    (
        "control",
        &[
            "model",
            "clock",
            "telemetry",
            "policy",
            "gate",
            "worker",
            "memory",
            "store",
            "procfs",
        ],
    ),
    // Layer 4: what is answered when something is wrong.
    ("reply", &["control", "model", "telemetry", "grpc"]),
    // Layer 5: listeners.
    (
        "proxy",
        &[
            "reply",
            "control",
            "model",
            "clock",
            "telemetry",
            "gate",
            "grpc",
        ],
    ),
    (
        "api",
        &[
            "reply",
            "control",
            "model",
            "clock",
            "telemetry",
            "memory",
            "grpc",
        ],
    ),
    // Layer 6: assembly.
    (
        "app",
        &[
            "model",
            "clock",
            "template",
            "telemetry",
            "config",
            "policy",
            "procfs",
            "gate",
            "worker",
            "memory",
            "store",
            "control",
            "reply",
            "proxy",
            "api",
            "grpc",
        ],
    ),
    // Layer 7: the command line.
    (
        "cli",
        &[
            "app",
            "api",
            "config",
            "policy",
            "simulate",
            "model",
            "clock",
            "telemetry",
        ],
    ),
    ("main", &["cli"]),
    ("lib", &[]),
];

#[test]
fn no_module_imports_from_a_layer_above_or_beside_its_row() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    let mut seen = 0;
    for file in rust_files(&src) {
        let module = module_of(&src, &file);
        let Some((_, allowed)) = MAP.iter().find(|(name, _)| *name == module) else {
            faults.push(format!(
                "{}: module {module} has no row in the map",
                file.display()
            ));
            continue;
        };
        let text = fs::read_to_string(&file).expect("source files are readable");
        for (number, line) in text.lines().enumerate() {
            // Documentation may name anything.
            if line.trim_start().starts_with("//") {
                continue;
            }
            for import in imports(&module, line) {
                seen += 1;
                if import != module && !allowed.contains(&import) {
                    faults.push(format!(
                        "{}:{}: {module} imports {import}",
                        file.display(),
                        number + 1
                    ));
                }
            }
        }
    }
    assert!(
        seen > 50,
        "only {seen} imports found: the reader of imports is broken"
    );
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_policy_has_no_clock_task_lock_or_log() {
    let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/policy");
    let forbidden = [
        "tokio",
        "tracing",
        "std::fs",
        "std::thread",
        "std::sync::Mutex",
        "HashMap",
        "Instant",
        "SystemTime",
    ];
    for file in rust_files(&policy) {
        let text = fs::read_to_string(&file).expect("source files are readable");
        for word in forbidden {
            let used = text
                .lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(word));
            assert!(!used, "{} uses {word}", file.display());
        }
    }
}

#[test]
fn no_source_file_is_longer_than_500_lines() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["src", "workers", "tests"].map(|folder| root.join(folder));
    for file in folders.iter().flat_map(|folder| rust_files(folder)) {
        let lines = fs::read_to_string(&file)
            .expect("source files are readable")
            .lines()
            .count();
        assert!(
            lines <= 500,
            "{} has {lines} lines: split it by responsibility",
            file.display()
        );
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("the folder exists") {
        let path = entry.expect("the folder is readable").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn module_of(src: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(src).expect("the file lies under src");
    let first = inside
        .iter()
        .next()
        .expect("a file has a name")
        .to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// The first segments after `crate::`, or in the binary after `residentd::`.
fn imports<'a>(module: &str, line: &'a str) -> Vec<&'a str> {
    let mut found = Vec::new();
    let prefixes: &[&str] = if module == "main" {
        &["residentd::"]
    } else {
        &["crate::"]
    };
    for prefix in prefixes {
        for (at, _) in line.match_indices(prefix) {
            let rest = &line[at + prefix.len()..];
            let end = rest
                .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            if !rest[..end].is_empty() {
                found.push(&rest[..end]);
            }
        }
    }
    found
}
