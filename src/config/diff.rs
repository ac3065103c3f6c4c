//! What a reload changes: two valid configurations, compared key by key, and
//! when each change takes effect.
//!
//! Whoever adds a key has to say here when a change of it takes effect: every
//! structure is taken apart by all its fields.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use super::{Config, Memory, Pressure, Server, Telemetry};
use crate::model::{
    ChangedModel, Difference, Filter, Fingerprint, ModelName, ModelSpec, RequestSpec, Takes,
    UpstreamSpec,
};
use crate::template::Template;

/// The variable that names our own state folder.
const STATE_DIR: &str = "STATE_DIR";

/// Returns a text that changes when the configuration does, tokens apart; the
/// same for the same configuration in one build.
#[must_use]
pub fn hash(config: &Config) -> String {
    let Config {
        server,
        admin_listen,
        // Tokens are not shown, so another one is no other text.
        auth,
        tls,
        telemetry,
        memory,
        pressure,
        gpu_limits,
        models,
        warnings: _,
    } = config;
    let text = format!(
        "{server:?}{admin_listen:?}{auth:?}{tls:?}{telemetry:?}{memory:?}{pressure:?}{gpu_limits:?}{models:?}"
    );
    let mut print = Fingerprint::default();
    print.feed(text.as_bytes());
    print.to_string()
}

/// Returns the configuration that holds after a reload, and what it changes of
/// `old`: what only takes effect at a start stays as it is, and of a model that
/// is not different the very same specification is kept.
#[must_use]
pub fn apply(old: &Config, new: Config) -> (Config, Difference) {
    let mut difference = Difference::default();
    let server = server(&old.server, new.server, &mut difference);
    let memory = memory(&old.memory, new.memory, &mut difference);
    let telemetry = telemetry(&old.telemetry, &new.telemetry, &mut difference);
    let mut keys = Keys::default();
    pressure(&old.pressure, &new.pressure, &mut keys);
    keys.compare("gpus", &old.gpu_limits, &new.gpu_limits);
    keys.compare("auth", &old.auth, &new.auth);
    keys.compare("tls", &old.tls, &new.tls);
    if old.admin_listen != new.admin_listen {
        difference.needs_restart.push("admin.listen");
    }
    difference.settings.extend(keys.0);

    let before: BTreeMap<&ModelName, &Arc<ModelSpec>> =
        old.models.iter().map(|spec| (&spec.name, spec)).collect();
    let mut models = Vec::with_capacity(new.models.len());
    for spec in new.models {
        let spec = with_state_dir(spec, &old.server);
        let Some(was) = before.get(&spec.name) else {
            difference.added.push(spec.name.clone());
            models.push(spec);
            continue;
        };
        match changed(was, &spec) {
            Some(changed) => {
                difference.changed.push(changed);
                models.push(spec);
            }
            None => models.push(Arc::clone(was)),
        }
    }
    let stays = |name: &ModelName| models.iter().any(|spec| spec.name == *name);
    let gone = old.models.iter().map(|spec| &spec.name);
    difference.removed = gone.filter(|name| !stays(name)).cloned().collect();
    let config = Config {
        server,
        admin_listen: old.admin_listen.clone(),
        auth: new.auth,
        tls: new.tls,
        telemetry,
        memory,
        pressure: new.pressure,
        gpu_limits: new.gpu_limits,
        models,
        warnings: new.warnings,
    };
    (config, difference)
}

/// Keys that are different.
#[derive(Debug, Default)]
struct Keys(Vec<&'static str>);

impl Keys {
    fn compare<T: PartialEq>(&mut self, key: &'static str, old: &T, new: &T) {
        if old != new {
            self.0.push(key);
        }
    }
}

/// Takes of a structure's fields some that take effect at once and others that
/// keep their value until the next start.
macro_rules! settle {
    ($difference:expr, $table:literal, $old:expr, $new:expr,
     at_once: [$($live:ident),* $(,)?], at_start: [$($fixed:ident),* $(,)?], $name:ident) => {{
        let mut live = Keys::default();
        let mut fixed = Keys::default();
        $(live.compare(concat!($table, ".", stringify!($live)), &$old.$live, &$new.$live);)*
        $(fixed.compare(concat!($table, ".", stringify!($fixed)), &$old.$fixed, &$new.$fixed);)*
        $difference.settings.extend(live.0);
        $difference.needs_restart.extend(fixed.0);
        // All fields are named: one that is added does not build until it is.
        $name { $($live: $new.$live,)* $($fixed: $old.$fixed.clone(),)* }
    }};
}

fn server(old: &Server, new: Server, difference: &mut Difference) -> Server {
    settle!(difference, "server", old, new,
        at_once: [shutdown_grace, log_level, max_body, model_prefix, cors_origins],
        at_start: [listen, state_dir, adopt, log_format, access_log, watch_config],
        Server)
}

fn memory(old: &Memory, new: Memory, difference: &mut Difference) -> Memory {
    settle!(difference, "memory", old, new,
        at_once: [limit, reserve, auto_cleanup, policy, patience, prefetch],
        at_start: [check_interval, nvml_library, host_proc],
        Memory)
}

fn telemetry(old: &Telemetry, new: &Telemetry, difference: &mut Difference) -> Telemetry {
    let Telemetry {
        otlp_endpoint,
        service_name,
        sample_ratio,
    } = new;
    let mut keys = Keys::default();
    keys.compare("telemetry.otlp_endpoint", &old.otlp_endpoint, otlp_endpoint);
    keys.compare("telemetry.service_name", &old.service_name, service_name);
    keys.compare("telemetry.sample_ratio", &old.sample_ratio, sample_ratio);
    difference.needs_restart.extend(keys.0);
    old.clone()
}

fn pressure(old: &Pressure, new: &Pressure, keys: &mut Keys) {
    let Pressure {
        soft,
        hard,
        emergency,
    } = new;
    keys.compare("pressure.soft", &old.soft, soft);
    keys.compare("pressure.hard", &old.hard, hard);
    keys.compare("pressure.emergency", &old.emergency, emergency);
}

/// Our state folder stays where it is until the next start, for workers too.
fn with_state_dir(spec: Arc<ModelSpec>, running: &Server) -> Arc<ModelSpec> {
    let folder = running.state_dir.to_string_lossy();
    if spec.variables.get(STATE_DIR).map(String::as_str) == Some(&folder) {
        return spec;
    }
    let mut variables = (*spec.variables).clone();
    variables.insert(STATE_DIR.to_owned(), folder.into_owned());
    Arc::new(ModelSpec {
        variables: Arc::new(variables),
        ..(*spec).clone()
    })
}

/// Returns what is different of a model; `None` when nothing is.
#[expect(clippy::too_many_lines, reason = "a table: each key by its name")]
fn changed(old: &ModelSpec, new: &ModelSpec) -> Option<ChangedModel> {
    let ModelSpec {
        name,
        aliases,
        kind,
        command,
        cwd,
        env,
        // What is used of them is compared where it is used.
        variables: _,
        upstream,
        grpc_upstream,
        ready,
        live: watched,
        start_timeout,
        stop_timeout,
        stop_signal,
        idle_timeout,
        pinned,
        preload,
        memory,
        gpus,
        vram,
        max_memory,
        weights,
        prefetch,
        concurrency,
        max_queue,
        queue_timeout,
        park,
        requests,
    } = new;
    let filled = |spec: &ModelSpec, text: &str| (text.to_owned(), used(spec, text));
    let words = |spec: &ModelSpec| -> Vec<_> {
        spec.command.iter().map(|word| filled(spec, word)).collect()
    };
    let texts = |spec: &ModelSpec| -> Vec<_> {
        let pairs = spec.env.iter();
        pairs
            .map(|(name, text)| (name.clone(), filled(spec, text)))
            .collect()
    };
    let folder = |spec: &ModelSpec| spec.cwd.as_ref().map(|cwd| filled(spec, cwd));

    let mut replaces = Keys::default();
    replaces.compare(
        "command",
        &(&old.command, words(old)),
        &(command, words(new)),
    );
    replaces.compare("cwd", &(&old.cwd, folder(old)), &(cwd, folder(new)));
    replaces.compare("env", &(&old.env, texts(old)), &(env, texts(new)));
    replaces.compare(
        "upstream",
        &asked(old, &old.upstream),
        &asked(new, upstream),
    );
    let calls = |spec, upstream: &Option<UpstreamSpec>| {
        let upstream = upstream.as_ref();
        upstream.map(|upstream| asked(spec, upstream))
    };
    replaces.compare(
        "grpc_upstream",
        &calls(old, &old.grpc_upstream),
        &calls(new, grpc_upstream),
    );
    replaces.compare("ready", &shown(&old.ready), &shown(ready));
    replaces.compare("gpus", &old.gpus, gpus);
    replaces.compare("weights", &old.weights, weights);
    // A worker is asked as was configured when it was spawned.
    replaces.compare("park", &old.park, park);

    let mut next = Keys::default();
    next.compare("live", &old.live, watched);
    next.compare("start_timeout", &old.start_timeout, start_timeout);
    next.compare("stop_timeout", &old.stop_timeout, stop_timeout);
    next.compare("stop_signal", &old.stop_signal, stop_signal);

    let mut live = Keys::default();
    live.compare("aliases", &old.aliases, aliases);
    live.compare("kind", &old.kind, kind);
    live.compare("idle_timeout", &old.idle_timeout, idle_timeout);
    live.compare("pinned", &old.pinned, pinned);
    live.compare("preload", &old.preload, preload);
    live.compare("memory", &old.memory, memory);
    live.compare("vram", &old.vram, vram);
    live.compare("max_memory", &old.max_memory, max_memory);
    live.compare("prefetch", &old.prefetch, prefetch);
    live.compare("concurrency", &old.concurrency, concurrency);
    live.compare("max_queue", &old.max_queue, max_queue);
    live.compare("queue_timeout", &old.queue_timeout, queue_timeout);
    of_requests(&old.requests, requests, &mut live);

    let takes = match (replaces.0.is_empty(), next.0.is_empty()) {
        (false, _) => Takes::NewWorker,
        (true, false) => Takes::NextWorker,
        (true, true) => Takes::AtOnce,
    };
    let keys = [replaces.0, next.0, live.0].concat();
    (!keys.is_empty()).then(|| ChangedModel {
        model: name.clone(),
        keys,
        takes,
    })
}

fn of_requests(old: &RequestSpec, new: &RequestSpec, keys: &mut Keys) {
    let RequestSpec {
        timeout,
        filter: Filter { model, set, strip },
        heartbeat,
    } = new;
    keys.compare("request_timeout", &old.timeout, timeout);
    keys.compare("use_model_name", &old.filter.model, model);
    keys.compare("set_params", &old.filter.set, set);
    keys.compare("strip_params", &old.filter.strip, strip);
    keys.compare("heartbeat", &old.heartbeat, heartbeat);
}

/// One of a model's upstreams, and the values of the variables in it.
fn asked(spec: &ModelSpec, upstream: &UpstreamSpec) -> (UpstreamSpec, Vec<Option<String>>) {
    (upstream.clone(), used(spec, upstream.text()))
}

/// The values of the variables that a template uses, in order.
fn used(spec: &ModelSpec, text: &str) -> Vec<Option<String>> {
    let Ok(template) = Template::parse(text) else {
        return Vec::new();
    };
    let names = template.variables();
    names
        .map(|name| spec.variables.get(name).cloned())
        .collect()
}

/// A check has no equality of its own; what it shows for debugging is all of it.
fn shown(check: &impl Debug) -> String {
    format!("{check:?}")
}
