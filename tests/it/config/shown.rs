//! What `configs/` shows is what is read.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use residentd::config::{DEFAULTS, Listen, Threshold};
use residentd::model::{Bytes, GpuRequest, Live, ReadyCheck, UpstreamSpec};

use super::{MODEL, Setup, one};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

#[test]
fn every_file_in_configs_loads() {
    let entries = fs::read_dir(configs()).expect("configs/ is there");
    let paths: BTreeSet<_> = entries.map(|e| e.expect("readable").path()).collect();
    let is_toml = |path: &&PathBuf| path.extension().is_some_and(|e| e == "toml");
    for path in paths.iter().filter(is_toml) {
        let mut setup = Setup::new();
        setup.sources.paths.push(path.clone());
        let errors = match setup.load() {
            Ok(_) => String::new(),
            Err(problems) => problems.to_string(),
        };
        let expected = match path.ends_with("default.toml") {
            true => "models: no models are configured; add [models.NAME] with a command",
            false => "",
        };
        assert_eq!(errors, expected, "{}", path.display());
    }
}

#[test]
fn the_defaults_file_changes_nothing_when_it_is_loaded_as_well() {
    let example = configs().join("example.toml");
    let loaded = |paths: &[PathBuf]| {
        let mut setup = Setup::new();
        setup.sources.working_dir = PathBuf::from("/");
        setup.sources.paths = paths.to_vec();
        let config = setup.config();
        format!(
            "{:?}{:?}{:?}{:?}",
            config.server, config.memory, config.pressure, config.models
        )
    };
    let alone = loaded(std::slice::from_ref(&example));
    assert_eq!(alone, loaded(&[configs().join("default.toml"), example]));
}

#[test]
fn the_defaults_are_those_of_the_documentation() {
    let config = one(MODEL).config();
    let server = &config.server;
    let loopback = Listen::Tcp(([127, 0, 0, 1], 8080).into());
    assert_eq!(server.listen, [loopback]);
    assert_eq!(server.shutdown_grace, Duration::from_secs(30));
    assert_eq!(server.log_level, "info");
    assert_eq!(server.max_body, Bytes::gib(1));
    assert_eq!(server.model_prefix, Bytes::mib(1));
    assert_eq!(config.memory.limit, None);
    assert_eq!(config.memory.reserve, None);
    assert_eq!(config.memory.check_interval, Duration::from_secs(60));
    assert!(config.memory.auto_cleanup && config.pressure.emergency);
    assert_eq!(config.pressure.soft, Threshold::Percent(10));
    assert_eq!(config.pressure.hard, Threshold::Percent(5));
    assert!(config.warnings.is_empty(), "{}", config.warnings);

    let spec = &config.models[0];
    assert_eq!(spec.upstream, UpstreamSpec::Tcp("127.0.0.1:${PORT}".into()));
    assert!(matches!(&spec.ready, ReadyCheck::Http { path, status: None } if path == "/health"));
    assert_eq!(spec.start_timeout, Duration::from_secs(120));
    assert_eq!(spec.live, Live::default());
    assert_eq!(spec.stop_timeout, Duration::from_secs(10));
    assert_eq!((spec.stop_signal, spec.max_queue), (15, 256));
    assert_eq!(spec.concurrency, None);
    assert_eq!(spec.queue_timeout, Duration::from_secs(300));
    assert_eq!((spec.idle_timeout, spec.memory), (None, None));
    assert_eq!((&spec.gpus, spec.vram), (&GpuRequest::None, None));
    assert_eq!(spec.max_memory, None);
    assert!(!spec.pinned && !spec.preload && spec.weights.is_empty());
    assert_eq!(spec.kind, "llm");
}

#[test]
fn the_defaults_file_names_every_key_and_each_as_it_is_read() {
    // What is commented out there because it has no default must be right too.
    let uncommented: Vec<_> = DEFAULTS.lines().map(uncomment).collect();
    let model = MODEL.replace("${PORT}", "${PORT} ${GRPC_PORT}");
    let told = one(&format!("{}\n{model}", uncommented.join("\n"))).problems();
    let is_example = |line: &&str| {
        line.contains("\"/srv/models\" is not a folder")
            || line.contains(" cannot be read: no such file or folder")
    };
    let others: Vec<_> = told.lines().filter(|line| !is_example(line)).collect();
    assert!(others.is_empty(), "{others:#?}");

    for table in [
        "server", "admin", "auth", "tls", "memory", "pressure", "defaults",
    ] {
        let unknown = format!("{MODEL}[{table}]\nzzzzzzzzzzzz = 1");
        let problems = one(&unknown).problems();
        let known = problems.split_once("known here: ").expect("a list").1;
        let known = known.split_once(" (").expect("a place").0;
        for key in known.split(", ") {
            let shows = |line: &str| {
                line.trim_start_matches("# ")
                    .starts_with(&format!("{key} = "))
            };
            assert!(DEFAULTS.lines().any(shows), "{table}.{key} is not shown");
        }
    }
}

/// Takes the `# ` off a line that sets a key of `[defaults]` or of the tables
/// before it.
fn uncomment(line: &str) -> String {
    let is_setting = |rest: &&str| {
        let key = rest.split(" = ").next().unwrap_or_default();
        rest.contains(" = ")
            && !key.is_empty()
            && !rest.starts_with(' ')
            && key.chars().all(|c| c.is_ascii_alphabetic() || c == '_')
            && !["command", "aliases", "weights"].contains(&key)
    };
    match line.strip_prefix("# ").filter(is_setting) {
        Some(rest) => rest.to_owned(),
        None => line.to_owned(),
    }
}
