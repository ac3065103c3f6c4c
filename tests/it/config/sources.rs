//! Where values come from, and what becomes of them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use insta::assert_snapshot;
use residentd::config::{LimitOrigin, Listen, Sources, weights};
use residentd::model::{Bytes, Live, ModelSpec, ReadyCheck};

use super::{MODEL, Setup, model, one};

fn spec(setup: &Setup) -> ModelSpec {
    let config = setup.config();
    let [model] = config.models.as_slice() else {
        panic!("one model, not {:?}", config.models);
    };
    ModelSpec::clone(model)
}

#[test]
fn files_cover_those_before_them_but_a_model_is_defined_once() {
    let setup = Setup::new()
        .beside(
            "conf/10-base.toml",
            "[memory]\nlimit = '1GiB'\n[defaults]\nkind = 'x'\n",
        )
        .beside("conf/20-models.toml", MODEL)
        .beside("conf/README", "no TOML")
        .beside("conf/.#20-models.toml", "no TOML");
    let mut setup = setup.file("last.toml", "[memory]\nlimit = '2GiB'\n");
    setup.sources.paths.insert(0, PathBuf::from("conf"));
    let config = setup.config();
    assert_eq!(
        config.memory.limit,
        Some((Bytes::gib(2), LimitOrigin::Config))
    );
    assert_eq!(config.models[0].kind, "x");

    let setup = setup.file("again.toml", MODEL);
    assert_snapshot!(setup.problems(), @"models.a: is defined twice, first in conf/20-models.toml:1; rename or remove one (again.toml:1)");
}

#[test]
fn files_that_are_not_there_or_hold_nothing_are_told() {
    let mut setup = one(MODEL).beside("empty/readme", "");
    for path in ["gone.toml", "empty"] {
        setup.sources.paths.push(PathBuf::from(path));
    }
    fs::write(setup.folder.path().join("latin.toml"), b"# \xe4\n").expect("written");
    setup.sources.paths.push(PathBuf::from("latin.toml"));
    assert_snapshot!(setup.problems(), @r"
    gone.toml: cannot be read: no such file or folder; name a file or folder that residentd may read
    empty: holds no *.toml file; name a file, or add one
    latin.toml: is not UTF-8 text; save it as UTF-8
    ");
}

#[test]
fn without_a_file_named_the_one_in_the_working_directory_is_read() {
    let setup = Setup::new();
    assert_snapshot!(setup.problems(), @"models: no models are configured; name a file with --config, or write residentd.toml, with [models.NAME] in it");
    let setup = setup.beside("residentd.toml", MODEL);
    assert_eq!(setup.config().models.len(), 1);
    let setup = setup
        .beside("other.toml", "[server]\n")
        .variable("RESIDENTD_CONFIG", "other.toml");
    assert_snapshot!(setup.problems(), @"models: no models are configured; add [models.NAME] with a command");
}

#[test]
fn a04_file_dotenv_environment_and_flag_cover_each_other_in_this_order() {
    let text = format!(
        "[server]\nlisten = '127.0.0.1:1'\n[memory]\nlimit = '1GiB'\ncheck_interval = '1s'\nauto_cleanup = true\n{MODEL}"
    );
    let setup = one(&text);
    let seen = |setup: &Setup| {
        let config = setup.config();
        let limit = config.memory.limit.expect("set");
        let seconds = config.memory.check_interval.as_secs();
        (limit, seconds, config.memory.auto_cleanup)
    };
    let by_config = |bytes| (Bytes(bytes), LimitOrigin::Config);
    let by_env = |bytes| (Bytes(bytes), LimitOrigin::Env);
    assert_eq!(seen(&setup), (by_config(1 << 30), 1, true));

    let setup = setup.beside(
        ".env",
        "# a comment\nMAX_MEMORY_USAGE=2000\nMEMORY_CHECK_INTERVAL=2\nexport AUTO_CLEANUP_ENABLED=\"false\"\nRESIDENTD_LISTEN=127.0.0.1:2\nOTHER=x\n",
    );
    assert_eq!(seen(&setup), (by_env(2000), 2, false));
    let is_set = |name: &str| std::env::vars_os().any(|(known, _)| known == name);
    assert!(
        !is_set("MAX_MEMORY_USAGE"),
        "the process keeps its environment"
    );

    let mut setup = setup
        .variable("MAX_MEMORY_USAGE", "3000")
        .variable("MEMORY_CHECK_INTERVAL", "3")
        .variable("AUTO_CLEANUP_ENABLED", "True");
    assert_eq!(seen(&setup), (by_env(3000), 3, true));

    let listen = |setup: &Setup| setup.config().server.listen;
    assert_eq!(listen(&setup), [Listen::Tcp(([127, 0, 0, 1], 2).into())]);
    setup.flag("server.listen", "127.0.0.1:4");
    setup.flag("server.listen", "unix:x.sock");
    setup.flag("memory.limit", "4000");
    let socket = setup.folder.path().join("x.sock");
    let flags = [
        Listen::Tcp(([127, 0, 0, 1], 4).into()),
        Listen::Unix(socket),
    ];
    assert_eq!(listen(&setup), flags);
    assert_eq!(seen(&setup).0, by_config(4000));
}

#[test]
fn a04_a_bad_variable_is_told_by_name_with_its_value_and_where_it_is_from() {
    let mut setup = one(MODEL)
        .beside(
            ".env",
            "MAX_MEMORY_USAGE=lots\nAUTO_CLEANUP_ENABLED=1\nSECRET=a b c\nRESIDENTD_MAX_BODY=-1\n",
        )
        .variable("MEMORY_CHECK_INTERVAL", "soon")
        .variable("MAX_MEMORY_USAGE", "0")
        .variable("RESIDENTD_LOG_LEVEL", "")
        .variable("RESIDENTD_LOGLEVEL", "info")
        .variable("RESIDENTD_PORT_8080_TCP", "tcp://10.0.0.1:8080");
    setup.flag("server.listen", "8080");
    setup.flag("memory.check_interval", "60");
    setup.flag("pressure.soft", "5%");
    assert_snapshot!(setup.problems(), @r#"
    .env:3: is not NAME=value; quote the value
    RESIDENTD_MAX_BODY: "-1" is not a size; write a number of bytes or e.g. "8GiB" (from .env)
    MAX_MEMORY_USAGE: "lots" is not a size; write a number of bytes or e.g. "8GiB" (from .env)
    AUTO_CLEANUP_ENABLED: "1" is not true or false; write true or false, without quotes (from .env)
    warning: RESIDENTD_LOGLEVEL: is not a variable of residentd; did you mean RESIDENTD_LOG_LEVEL? (from the environment)
    RESIDENTD_LOG_LEVEL: is empty; write something or remove it (from the environment)
    MAX_MEMORY_USAGE: is zero; write a size over zero, e.g. "8GiB", or remove it (from the environment)
    MEMORY_CHECK_INTERVAL: "soon" is not a number of seconds; write e.g. 60 (from the environment)
    pressure.soft: has no flag; write it to a configuration file (from the command line)
    --listen: "8080" is not an address to listen on; write e.g. "127.0.0.1:8080" or "unix:/run/residentd/http.sock" (from the command line)
    --check-interval: "60" is not a duration; write e.g. "90s" (units: ms s m h) (from the command line)
    "#);
}

#[test]
fn two_variables_of_one_key_are_told() {
    let setup = one(MODEL)
        .variable("RESIDENTD_LIMIT", "1GiB")
        .variable("MAX_MEMORY_USAGE", "1024");
    assert_snapshot!(setup.problems(), @"MAX_MEMORY_USAGE: means the same as RESIDENTD_LIMIT, which is set too; unset one (from the environment)");
    let setup = one(MODEL)
        .variable("RESIDENTD_LIMIT", "1GiB")
        .variable("RESIDENTD_CHECK_INTERVAL", "5s");
    let config = setup.config();
    assert_eq!(config.memory.check_interval, Duration::from_secs(5));
    assert_eq!(config.memory.limit, Some((Bytes::gib(1), LimitOrigin::Env)));
}

#[test]
fn a_model_takes_from_the_defaults_what_it_does_not_say() {
    let text = "
[defaults]
idle_timeout = '10m'
env = { A = 'shared', B = 'shared' }
ready = { tcp = true }
live = { probe = '0s', errors = 0 }
[models.a]
command = 'sh ${PORT}'
env = { B = 'own' }
idle_timeout = '0s'
ready = { http = '/v1/models', status = 204 }
live = { probe = '3s', still = '0s' }
[models.b]
command = 'sh ${PORT}'
";
    let config = one(text).config();
    let [a, b] = config.models.as_slice() else {
        panic!("two models");
    };
    assert_eq!(
        (a.env["A"].as_str(), a.env["B"].as_str()),
        ("shared", "own")
    );
    assert_eq!(b.env["B"], "shared");
    assert_eq!(a.idle_timeout, None);
    assert_eq!(b.idle_timeout, Some(Duration::from_secs(600)));
    assert!(
        matches!(&a.ready, ReadyCheck::Http { path, status: Some(204) } if path == "/v1/models")
    );
    assert!(matches!(b.ready, ReadyCheck::Tcp));
    let shared = Live {
        probe: Duration::ZERO,
        errors: 0,
        ..Live::default()
    };
    assert_eq!(b.live, shared);
    let own = Live {
        probe: Duration::from_secs(3),
        still: Duration::ZERO,
        ..shared
    };
    assert_eq!(a.live, own);
}

#[test]
fn templates_keep_their_text_and_carry_the_values_they_need() {
    let text = r#"
[variables]
MODELS = "${env:HOME}/models"
[models."meta/llama-3.1"]
command = ["sh", "-c", "echo $${PORT} $HOME", "${MODELS}/a.gguf", "${PORT}", "${env:TOKEN}", "${MODEL}"]
"#;
    let setup = one(text)
        .beside(".env", "TOKEN=secret\n")
        .variable("HOME", "/home/x")
        .variable("UNUSED", "x");
    let spec = spec(&setup);
    assert_eq!(spec.name.as_str(), "meta/llama-3.1");
    assert_eq!(spec.command[3], "${MODELS}/a.gguf");
    let state_dir = setup.folder.path().join(".residentd").display().to_string();
    let variables: Vec<_> = spec
        .variables
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(
        variables,
        [
            ("MODELS", "/home/x/models"),
            ("STATE_DIR", state_dir.as_str()),
            ("env:TOKEN", "secret"),
        ]
    );
}

#[test]
fn weights_are_found_from_where_the_worker_runs() {
    let setup = Setup::new()
        .beside("models/m-00001-of-00002.gguf", "123")
        .beside("models/m-00002-of-00002.gguf", "45")
        .beside("other.gguf", "1");
    let found = |setup: &Setup| {
        let spec = spec(setup);
        (spec.weights.len(), weights::total(&spec.weights))
    };
    let argument = "--model=m-00001-of-00002.gguf";
    let text = format!("[models.a]\ncommand = ['sh', '${{PORT}}', '{argument}']\ncwd = './models'");
    let mut setup = setup.file("a.toml", &text);
    assert_eq!(found(&setup), (2, Bytes(5)));

    setup.sources.paths.clear();
    let setup = setup.file("b.toml", &format!("{text}\nweights = 'other.gguf'"));
    assert_eq!(
        found(&setup),
        (1, Bytes(1)),
        "declared ones begin where residentd runs"
    );
}

#[test]
fn relative_programs_and_folders_are_residentds_not_the_workers() {
    let setup = model(
        "cwd = 'sub'\n[models.b]\ncommand = ['${DIR}/tool', '${PORT}']\n[variables]\nDIR = 'bin'",
    )
    .beside("sub/x", "")
    .beside("bin/tool", "");
    let tool = setup.folder.path().join("bin/tool");
    fs::set_permissions(tool, fs::Permissions::from_mode(0o755)).expect("own file");
    let config = setup.config();
    assert!(config.warnings.is_empty(), "{}", config.warnings);
    let folder = setup.folder.path().display();
    assert_eq!(
        config.models[0].command[0], "sh",
        "a bare name is looked up on the PATH"
    );
    assert_eq!(config.models[0].cwd, Some(format!("{folder}/sub")));
    assert_eq!(
        config.models[1].command[0],
        format!("{folder}/${{DIR}}/tool")
    );
    assert_eq!(
        config.server.state_dir,
        setup.folder.path().join(".residentd")
    );
}

#[test]
fn a_process_passes_on_its_own_environment_and_directory() {
    let sources = Sources::of_process(Vec::new(), Vec::new()).expect("a directory");
    let here = std::env::current_dir().expect("a directory");
    assert_eq!(sources.working_dir, here);
    assert!(sources.environment.contains_key("PATH"));
}
