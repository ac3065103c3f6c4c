//! What a reload changes, and when that takes effect.

use std::fs;
use std::sync::Arc;

use residentd::config::{Config, diff};
use residentd::model::{Difference, ModelName, Takes};

use super::{Setup, one};

/// Two versions of one file, the second applied over the first.
fn between(old: &str, new: &str) -> (Config, Config, Difference) {
    let setup = one(old);
    let before = setup.config();
    let (after, difference) = rewritten(&setup, &before, new);
    (before, after, difference)
}

fn rewritten(setup: &Setup, before: &Config, text: &str) -> (Config, Difference) {
    fs::write(setup.folder.path().join("a.toml"), text).expect("written");
    diff::apply(before, setup.config())
}

const TWO: &str =
    "[models.a]\ncommand = ['sh', '${PORT}']\n[models.b]\ncommand = ['sh', '${PORT}']\n";

fn keys_of(new: &str) -> (Vec<&'static str>, Takes) {
    let (_, _, difference) = between("[models.a]\ncommand = ['sh', '${PORT}']\n", new);
    let [changed] = &difference.changed[..] else {
        panic!("{difference:?}");
    };
    (changed.keys.clone(), changed.takes)
}

#[test]
fn a44_what_is_the_same_is_no_difference_and_keeps_its_specification() {
    let (before, after, difference) = between(TWO, &format!("# a remark\n{TWO}"));
    assert!(difference.is_empty(), "{difference:?}");
    assert!(Arc::ptr_eq(&before.models[0], &after.models[0]));
    assert_eq!(diff::hash(&before), diff::hash(&after));
}

#[test]
fn a44_each_key_of_a_model_says_when_it_takes_effect() {
    let with = |more: &str| {
        keys_of(&format!(
            "[models.a]\ncommand = ['sh', '${{PORT}}']\n{more}"
        ))
    };
    let command = keys_of("[models.a]\ncommand = ['sh', '-x', '${PORT}']\n");
    assert_eq!(command, (vec!["command"], Takes::NewWorker));
    for (more, key) in [
        ("cwd = '/'", "cwd"),
        ("env = { A = '1' }", "env"),
        ("upstream = 'http://127.0.0.2:${PORT}'", "upstream"),
        ("ready = { tcp = true }", "ready"),
        ("gpus = 1", "gpus"),
    ] {
        assert_eq!(with(more), (vec![key], Takes::NewWorker), "{more}");
    }
    for (more, key) in [
        ("live = { failures = 9 }", "live"),
        ("start_timeout = '9s'", "start_timeout"),
        ("stop_timeout = '9s'", "stop_timeout"),
        ("stop_signal = 'SIGINT'", "stop_signal"),
    ] {
        assert_eq!(with(more), (vec![key], Takes::NextWorker), "{more}");
    }
    for (more, key) in [
        ("aliases = ['x']", "aliases"),
        ("kind = 'x'", "kind"),
        ("idle_timeout = '9s'", "idle_timeout"),
        ("pinned = true", "pinned"),
        ("preload = true", "preload"),
        ("memory = '1GiB'", "memory"),
        ("max_memory = '1GiB'", "max_memory"),
        ("concurrency = 3", "concurrency"),
        ("max_queue = 3", "max_queue"),
        ("queue_timeout = '9s'", "queue_timeout"),
        ("request_timeout = '9s'", "request_timeout"),
        ("use_model_name = 'x'", "use_model_name"),
        ("set_params = { x = 1 }", "set_params"),
        ("strip_params = ['x']", "strip_params"),
        ("heartbeat = true", "heartbeat"),
    ] {
        assert_eq!(with(more), (vec![key], Takes::AtOnce), "{more}");
    }
    let both = with("pinned = true\nstop_timeout = '9s'");
    assert_eq!(both, (vec!["stop_timeout", "pinned"], Takes::NextWorker));
}

#[test]
fn a44_a_variable_changes_only_the_models_that_use_it() {
    let with = |value: &str| {
        format!(
            "[variables]\nX = '{value}'\n[models.a]\ncommand = ['sh', '${{X}}', '${{PORT}}']\n[models.b]\ncommand = ['sh', '${{PORT}}']\n"
        )
    };
    let (_, after, difference) = between(&with("1"), &with("2"));
    let [changed] = &difference.changed[..] else {
        panic!("{difference:?}");
    };
    assert_eq!(
        (changed.model.as_str(), &changed.keys[..]),
        ("a", &["command"][..])
    );
    assert_eq!(after.models[0].variables["X"], "2");
}

#[test]
fn a44_models_come_and_go_and_settings_hold_at_once_or_from_the_next_start() {
    let (before, after, difference) = between(
        TWO,
        "[server]\nstate_dir = 'elsewhere'\nlog_level = 'debug'\nlisten = '127.0.0.1:1'\n\
         [memory]\npatience = '1s'\ncheck_interval = '9s'\n[pressure]\nhard = '1%'\n\
         [gpus]\n0 = { limit = '1GiB' }\n\
         [models.b]\ncommand = ['sh', '${PORT}']\n[models.c]\ncommand = ['sh', '${PORT}']\n",
    );
    let names = |models: &[ModelName]| models.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(names(&difference.added), ["c"]);
    assert_eq!(names(&difference.removed), ["a"]);
    assert_eq!(difference.changed, [], "b is where it was");
    assert_eq!(
        difference.settings,
        [
            "server.log_level",
            "memory.patience",
            "pressure.hard",
            "gpus"
        ]
    );
    assert_eq!(
        difference.needs_restart,
        ["server.listen", "server.state_dir", "memory.check_interval"]
    );
    // What needs a restart is as it was, for new models too.
    assert_eq!(after.server.state_dir, before.server.state_dir);
    let folder = before.server.state_dir.display().to_string();
    assert!(
        after
            .models
            .iter()
            .all(|m| m.variables["STATE_DIR"] == folder)
    );
    assert_ne!(diff::hash(&before), diff::hash(&after));
}

#[test]
fn a44_what_needs_a_restart_is_told_again_until_it_was() {
    let setup = one(TWO);
    let before = setup.config();
    let moved = format!("[server]\nlisten = '127.0.0.1:1'\n{TWO}");
    let (after, first) = rewritten(&setup, &before, &moved);
    let (_, again) = rewritten(&setup, &after, &moved);
    assert_eq!(first.needs_restart, ["server.listen"]);
    assert_eq!(again, first);
}

#[test]
fn a44_tokens_hold_at_once_and_an_address_for_operators_needs_a_restart() {
    let with = |more: &str| format!("{more}\n{TWO}");
    let (before, after, difference) = between(
        &with("[auth]\nadmin_tokens = ['one']"),
        &with("[auth]\nadmin_tokens = ['two']\n[server]\ncors_origins = ['http://A.example']"),
    );
    assert_eq!(difference.settings, ["server.cors_origins", "auth"]);
    assert_ne!(before.auth, after.auth);
    assert_eq!(after.server.cors_origins, ["http://a.example"]);
    let shown = format!("{before:?}{after:?}");
    assert!(
        !shown.contains("one\"") && !shown.contains("two\""),
        "{shown}"
    );

    let (_, after, difference) = between(TWO, &with("[admin]\nlisten = '127.0.0.1:9911'"));
    assert_eq!(difference.needs_restart, ["admin.listen"]);
    assert!(difference.settings.is_empty() && after.admin_listen.is_empty());
}

#[test]
fn addresses_and_origins_that_make_no_sense_are_told() {
    let told = |text: &str| one(&format!("{text}\n{TWO}")).problems();
    let both = told("[server]\nlisten = '127.0.0.1:80'\n[admin]\nlisten = '127.0.0.1:80'");
    assert!(
        both.contains("admin.listen: names 127.0.0.1:80, as server.listen does"),
        "{both}"
    );
    for origin in [
        "chat.example",
        "https://",
        "https://a.example/path",
        "https://*.example",
        "null",
    ] {
        let told = told(&format!("[server]\ncors_origins = ['{origin}']"));
        assert!(told.contains("server.cors_origins: "), "{origin}: {told}");
    }
    let empty = told("[auth]\nadmin_tokens = []");
    assert!(empty.contains("auth.admin_tokens: is empty"), "{empty}");
    let text = told("[auth]\nadmin_tokens = 'two words'");
    assert!(
        !text.contains("two words") && text.contains("auth.admin_tokens"),
        "{text}"
    );
}
