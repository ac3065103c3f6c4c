//! What is wrong is told in these words.

use insta::assert_snapshot;
use proptest::prelude::*;

use super::{model, one};

#[test]
fn every_problem_is_told_at_once_with_its_key_and_the_fix() {
    let setup = one(r#"
listen = ":80"

[server]
listen = ["127.0.0.1:8080", "localhost:80", "127.0.0.1:8080"]
lisen = "127.0.0.1:80"
state_dir = ""
log_level = "inof"
log_format = "yaml"
max_body = 0
adopt = "perhaps"

[memory]
limit = "8GiB"
reserve = -1
check_interval = 60
auto_cleanup = "true"
policy = "fifo"

[pressure]
soft = "5%"
hard = "7%"

[auth]
admin_tokens = ["x"]

[defaults]
command = ["x"]
stop_timeout = "10"

[models."a b"]
command = "sh ${PORT}"

[models.llama3.1]
command = "sh ${PORT}"

[models.nothing]

[models.llama]
command = ["sh", "${POTR}", "${PORT}", "${GPU}", "${env:HF_HOME}", "${"]
memory = "12 parsecs"
start_timeout = "0s"
stop_signal = "SIGFOO"
aliases = ["ok", "not ok"]
max_queue = 0
ready = { http = "/health", tcp = true }
env = { OMP_NUM_THREADS = 2, "A=B" = "x" }
vram = "6GiB"
gpus = "all"
concurrency = -2
request_timeout = 1
heartbeat = "often"
use_model_name = 7
set_params = { temperature = 0.2, until = 1979-05-27, deep = { x = [nan] } }
strip_params = ["temperature", 4]
memmory = "1GiB"

[models.big]
command = "sh ${PORT}"
memory = "12GiB"
ready = { log = "(" }
"#);
    assert_snapshot!(setup.problems());
}

#[test]
fn a_table_or_list_of_the_wrong_shape_is_told() {
    let setup = one("pressure = 5\nserver.listen = []\n[[models]]\ncommand = 'sh'\n");
    assert_snapshot!(setup.problems());
    let setup = model(
        "ready = '/health'\nenv = []\nweights = 1\naliases = [1]\n[models.b]\ncommand = 'sh \"x'\ncwd = ''\n[models]\nc = 1\n[server]\nlisten = ['127.0.0.1:80', '127.0.0.1:80', '127.0.0.1:0', '127.0.0.1:0']",
    );
    assert_snapshot!(setup.problems());
    let setup = model(
        "ready = { status = 200, tcp = false, log = ' ' }\n[models.b]\ncommand = 'sh ${PORT}'\nready = { status = 200, tcp = true }\n[models.c]\ncommand = 'sh ${PORT}'\nready = { http = 'health', status = 99, path = '/' }\n[models.d]\ncommand = \"sh \\u0000 ${PORT}\"\nready = {}",
    );
    assert_snapshot!(setup.problems());
}

#[test]
fn a_syntax_error_is_told_with_its_line_and_column() {
    let setup = one("[server]\nlisten = \"127.0.0.1:80\n\n[memory\nlimit = 1\n").file(
        "b.toml",
        "[server]\nlisten = 5\n[models.a]\ncommand = 'sh'\ncommand = 'sh'",
    );
    assert_snapshot!(setup.problems());
}

#[test]
fn variables_that_cannot_be_filled_in_are_told_where_they_are_used() {
    let setup = one(r#"
[variables]
PORT = "1"
"A-B" = "x"
NESTED = "${OTHER}/x"
HOME2 = "${env:NOWHERE}"
OPEN = "${"
[models.a]
command = ["sh", "${MODLE}", "${PORT}", "${NESTED}", "${HOME:-x}"]
cwd = "${PID}"
env = { X = "${env:UNSET}" }
upstream = "http://127.0.0.1:${PRT}"
"#);
    assert_snapshot!(setup.problems());
}

#[test]
fn upstream_and_command_agree_on_where_the_worker_listens() {
    let told = |keys: &str| one(&format!("[models.a]\n{keys}")).problems();
    assert_snapshot!(told("command = 'sh'"));
    assert_snapshot!(told("command = 'sh ${SOCKET}'"));
    assert_snapshot!(told(
        "command = 'sh ${PORT}'\nupstream = 'http://127.0.0.1:99'"
    ));
    assert_snapshot!(told("command = 'sh ${PORT}'\nupstream = 'unix:${SOCKET}'"));
    let grpc = "command = 'sh ${PORT} ${GRPC_PORT}'";
    assert_snapshot!(told(grpc));
    let asked = "grpc_upstream = 'http://127.0.0.1:${GRPC_PORT}'";
    assert_snapshot!(told(&format!("command = 'sh ${{PORT}}'\n{asked}")));
    assert_eq!(told(&format!("{grpc}\n{asked}")), "");
    let bad = told(&format!("{grpc}\ngrpc_upstream = '127.0.0.1:1'"));
    assert!(
        bad.starts_with("models.a.grpc_upstream: \"127.0.0.1:1\" is"),
        "{bad}"
    );
    for bad in [
        "127.0.0.1:${PORT}",
        "https://127.0.0.1:${PORT}",
        "http://localhost:${PORT}",
        "http://127.0.0.1:${PORT}/base",
        "http://0.0.0.0:${PORT}",
        "unix:a.sock",
        "unix:",
    ] {
        let text = told(&format!("command = 'sh ${{PORT}}'\nupstream = '{bad}'"));
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.starts_with(&format!("models.a.upstream: \"{bad}\" is")),
            "{text}"
        );
    }
    for good in [
        "command = 'sh ${SOCKET}'\nupstream = 'unix:${SOCKET}'",
        "command = 'sh'\nupstream = 'http://[::1]:99/'",
        "command = 'sh'\nenv = { PORT = '${PORT}' }",
        "command = 'sh'\nupstream = 'unix:/run/${MODEL}.sock'",
    ] {
        assert_eq!(told(good), "", "{good}");
    }
}

#[test]
fn two_things_said_of_one_member_of_a_request_are_told() {
    let told =
        |keys: &str| one(&format!("[models.a]\ncommand = 'sh ${{PORT}}'\n{keys}")).problems();
    assert_snapshot!(told(
        "use_model_name = 'x'\nset_params = { model = 'y', t = 1 }\nstrip_params = ['t', 'model']"
    ));
    // A model's own takes the place of what all have.
    let defaults = "strip_params = []\n[defaults]\nset_params = { t = 1 }\nstrip_params = ['t']";
    assert_eq!(told(defaults), "");
}

#[test]
fn two_models_cannot_share_a_name_or_an_address() {
    let setup = one("
[server]
listen = ['127.0.0.1:98', '0.0.0.0:97', 'unix:/run/r.sock']
[models.a]
command = 'sh'
upstream = 'http://127.0.0.1:99'
aliases = ['x', 'b', 'a']
[models.b]
command = 'sh'
upstream = 'http://127.0.0.1:99/'
aliases = ['x', 'y', 'y']
[models.c]
command = 'sh'
upstream = 'http://127.0.0.1:98'
[models.d]
command = 'sh'
upstream = 'http://127.0.0.1:97'
[models.e]
command = 'sh'
upstream = 'unix:/run/r.sock'
");
    assert_snapshot!(setup.problems());
}

#[test]
fn what_may_yet_come_right_is_a_warning_and_residentd_starts() {
    let setup = model(
        "weights = ['gone.gguf']
cwd = 'gone'
[models.b]
command = ['llama-server', '${PORT}']
[models.c]
command = ['./tool', '${PORT}']
[models.d]
command = ['/bin', '${PORT}']
[models.e]
command = ['sh', 'big.gguf', '${PORT}']
[memory]
limit = 4
",
    )
    .beside("tool", "")
    .beside("big.gguf", "12345");
    assert_eq!(setup.config().models.len(), 5);
    assert_snapshot!(setup.problems());
}

/// Files that are TOML, with keys and values where they do not belong.
fn junk() -> impl Strategy<Value = String> {
    let tables = [
        "server",
        "memory",
        "pressure",
        "variables",
        "defaults",
        "models",
        "models.a",
        "models.'b/c'",
        "models.a.env",
        "x",
    ];
    let keys = [
        "listen",
        "limit",
        "soft",
        "command",
        "ready",
        "upstream",
        "weights",
        "aliases",
        "cwd",
        "memory",
        "stop_signal",
        "idle_timeout",
        "http",
        "A",
        "x",
    ];
    let value = prop_oneof![
        Just("true".to_owned()),
        Just("1979-05-27".to_owned()),
        Just("nan".to_owned()),
        Just("[1, 'x', []]".to_owned()),
        Just("{ http = '/', tcp = true, A = 'b' }".to_owned()),
        Just("'sh ${PORT} ${env:PATH} $${ ${A}'".to_owned()),
        Just("'unix:${SOCKET}'".to_owned()),
        any::<i64>().prop_map(|n| n.to_string()),
        r"'[a-z0-9${}:/.%-]{0,12}'",
        r"'[^'\n\r\x00-\x1f\x7f]{0,8}'",
    ];
    let table = prop::collection::btree_map(prop::sample::select(keys.to_vec()), value, 0..6);
    let file = prop::collection::btree_map(prop::sample::select(tables.to_vec()), table, 0..6);
    file.prop_map(|tables| {
        let lines = tables.into_iter().map(|(table, keys)| {
            let keys = keys
                .into_iter()
                .map(|(key, value)| format!("{key} = {value}\n"));
            format!("[{table}]\n{}", keys.collect::<String>())
        });
        lines.collect()
    })
}

proptest! {
    #[test]
    fn junk_is_refused_in_words_and_never_with_a_panic(
        text in junk(),
        dotenv in r"([A-Z_]{1,4}=[a-z0-9 '$]{0,6}\n){0,4}",
        variable in r"\PC{0,20}",
    ) {
        let setup = one(&text).beside(".env", &dotenv);
        let setup = setup.variable("RESIDENTD_LISTEN", &variable);
        if let Err(problems) = setup.load() {
            prop_assert!(problems.has_errors() && !problems.to_string().is_empty());
        }
    }

    #[test]
    fn text_that_is_no_toml_never_panics(text in r"[\[\]{}='.#a-z0-9 \n\\u{e4}]{0,60}") {
        let _ = one(&text).load();
    }
}

#[test]
fn what_does_not_fit_together_about_gpus_and_ceilings_is_told() {
    let told = |keys: &str| model(keys).problems();
    assert_snapshot!(
        [
            told("vram = '6GiB'"),
            told("env = { DEVICES = '${GPU}' }"),
            told("gpus = [0, 0]"),
            told("max_memory = '1GiB'\nmemory = '2GiB'"),
            told("[gpus.first]\nlimit = '1GiB'"),
            told("[gpus.0]\nlimt = '1GiB'"),
        ]
        .join("\n--\n")
    );
}

#[test]
fn what_is_wrong_with_a_park_is_told_with_the_fix() {
    let setup = one(r#"
[models.both]
command = ["sh", "${PORT}"]
gpus = 1
park = { engine = "vllm", park = "POST /sleep", unpark = "POST /wake_up" }

[models.half]
command = ["sh", "${PORT}"]
gpus = 1
park = { park = ["POST /sleep"] }

[models.nothing]
command = ["sh", "${PORT}"]
park = { timeout = "5s" }

[models.empty]
command = ["sh", "${PORT}"]
park = { park = [], unpark = ["POST /wake_up"] }

[models.words]
command = ["sh", "${PORT}"]
gpus = 1
vram = "6GiB"
park = { engine = "tgi", park = ["sleep", "POST sleep", "POST /a {b}"], unpark = "POST /b {}", timeout = "0s", memory = "lots", keep = "1GiB" }

[models.keeps]
command = ["sh", "${PORT}"]
gpus = 1
vram = "6GiB"
park = { park = "POST /a", unpark = "POST /b", vram = "6GiB" }
"#);
    assert_snapshot!(setup.problems());
}

#[test]
fn an_engine_that_is_not_started_for_its_park_is_warned_of() {
    let setup = one(r#"
[defaults]
park = { engine = "vllm" }

[models.vllm]
command = ["sh", "-c", "vllm serve --port ${PORT}"]
gpus = 1

[models.started-well]
command = ["sh", "-c", "vllm serve --port ${PORT} --enable-sleep-mode"]
env = { VLLM_SERVER_DEV_MODE = "1" }
gpus = 1

[models.sglang]
command = ["sh", "${PORT}", "--enable-memory-saver"]
gpus = 1
park = { engine = "sglang" }

[models.on-the-host]
command = ["sh", "${PORT}"]
park = { park = "POST /a", unpark = "POST /b" }

[models.never]
command = ["sh", "${PORT}"]
park = { engine = "none" }
"#);
    assert_snapshot!(setup.problems());
    let parks = setup.config().models;
    let park = |name: &str| {
        let model = parks.iter().find(|m| m.name.as_str() == name);
        model.expect("it is configured").park.clone()
    };
    assert_eq!(park("never"), None);
    let vllm = park("vllm").expect("it has one");
    assert_eq!(vllm.park[0].to_string(), "POST /sleep?level=1");
    assert_eq!(vllm.unpark[0].to_string(), "POST /wake_up");
    assert_eq!(vllm.timeout.as_secs(), 30);
    let sglang = park("sglang").expect("it has one");
    assert_eq!(sglang.park[0].path, "/release_memory_occupation");
    assert_eq!(sglang.unpark[0].path, "/resume_memory_occupation");
    assert_eq!(sglang.unpark[0].body.as_deref(), Some("{}"));
}

#[test]
fn each_key_of_live_is_checked_and_told_by_its_path() {
    let text = "[models.a]\ncommand = 'sh ${PORT}'\nlive = { probe = 5, timeout = '0s', failures = 0, errors = -1, stil = '1m' }\n";
    let told = one(text).problems();
    for problem in [
        "models.a.live.probe: 5 is not a duration",
        "models.a.live.timeout: is zero",
        "models.a.live.failures: 0 is not a count",
        "models.a.live.errors: -1 is not a count",
        "models.a.live.stil: unknown key; did you mean \"still\"?",
    ] {
        assert!(told.contains(problem), "{told}");
    }
}
