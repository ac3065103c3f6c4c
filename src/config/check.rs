//! What values mean together. Turns the merged sources into a [`Config`], or
//! tells everything that does not fit.

use super::context::{Context, given};
use super::problem::{Origin, Place, Problems};
use super::raw::{RawConfig, RawMemory, RawPressure, RawServer};
use super::variables::Scope;
use super::{Config, LimitOrigin, Listen, Memory, Pressure, Server, Threshold, models};

/// Checks what was merged. A problem that merely follows from another is not
/// told. `None` when no configuration could be made of it.
pub(super) fn check(
    raw: RawConfig,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Option<Config> {
    let server = server(raw.server, context, problems);
    let state_dir = server.state_dir.to_string_lossy().into_owned();
    let scope = Scope::new(raw.variables, state_dir, context.environment, problems);
    let pressure = pressure(raw.pressure, problems);
    let admin_listen = raw.admin.check(&server.listen, context, problems);
    let auth = raw.auth.check(context, problems);
    let tls = raw.tls.check(context, problems);
    if !context.is_whole {
        return None;
    }
    if raw.models.is_empty() && !problems.mentions("models") {
        no_models(context, problems);
    }
    let facts = models::Facts {
        context,
        scope: &scope,
        limit: raw.memory.limit.as_ref(),
        prefetch: raw.memory.prefetch.as_ref(),
        listen: &server.listen,
    };
    let models = models::check(raw.models, &raw.defaults, &facts, problems);
    Some(Config {
        server,
        admin_listen,
        auth,
        tls,
        telemetry: raw.telemetry.check(),
        memory: memory(raw.memory, context),
        gpu_limits: raw
            .gpus
            .into_iter()
            .map(|(gpu, limit)| (gpu, limit.value))
            .collect(),
        pressure,
        models: models::share_variables(models, scope.into_values()),
        warnings: Problems::default(),
    })
}

fn server(raw: RawServer, context: &Context<'_>, problems: &mut Problems) -> Server {
    let listen = raw.listen.as_ref().map(|listen| &listen.place).cloned();
    let mut server = Server {
        listen: given(raw.listen),
        state_dir: context.working_dir.join(given(raw.state_dir)),
        shutdown_grace: given(raw.shutdown_grace),
        log_format: given(raw.log_format),
        log_level: given(raw.log_level),
        max_body: given(raw.max_body),
        model_prefix: given(raw.model_prefix),
        adopt: given(raw.adopt),
        access_log: given(raw.access_log),
        watch_config: given(raw.watch_config),
        cors_origins: given(raw.cors_origins),
    };
    if let Some(place) = listen {
        check_listen(&server.listen, &place, problems);
    }
    make_absolute(&mut server.listen, context);
    server
}

/// Has paths of sockets begin at the root.
pub(super) fn make_absolute(listen: &mut [Listen], context: &Context<'_>) {
    for listen in listen {
        if let Listen::Unix(path) = listen {
            *path = context.working_dir.join(&path);
        }
    }
}

/// Returns whether the system chooses the port.
pub(super) fn is_any(address: &Listen) -> bool {
    matches!(address, Listen::Tcp(address) if address.port() == 0)
}

/// Tells when there is no address, or one twice.
pub(super) fn check_listen(listen: &[Listen], place: &Place, problems: &mut Problems) {
    if listen.is_empty() {
        let fix = r#"write at least one address, e.g. "127.0.0.1:8080""#;
        problems.error(place, "is empty", fix);
    }
    for (index, address) in listen.iter().enumerate() {
        if !is_any(address) && listen[..index].contains(address) {
            problems.error(place, format!("names {address} twice"), "remove one");
        }
    }
}

fn memory(raw: RawMemory, context: &Context<'_>) -> Memory {
    let limit = raw.limit.map(|limit| {
        let origin = match limit.place.origin {
            Origin::BuiltIn | Origin::File { .. } | Origin::CommandLine => LimitOrigin::Config,
            Origin::DotEnv | Origin::Environment => LimitOrigin::Env,
        };
        (limit.value, origin)
    });
    Memory {
        limit,
        reserve: raw.reserve.map(|reserve| reserve.value),
        check_interval: given(raw.check_interval),
        auto_cleanup: given(raw.auto_cleanup),
        policy: given(raw.policy),
        patience: given(raw.patience),
        prefetch: given(raw.prefetch),
        nvml_library: raw
            .nvml_library
            .map(|path| context.working_dir.join(path.value)),
        host_proc: raw
            .host_proc
            .map(|path| context.working_dir.join(path.value)),
    }
}

fn pressure(raw: RawPressure, problems: &mut Problems) -> Pressure {
    if let (Some(soft), Some(hard)) = (&raw.soft, &raw.hard) {
        let is_above = match (soft.value, hard.value) {
            (Threshold::Percent(soft), Threshold::Percent(hard)) => hard > soft,
            (Threshold::Size(soft), Threshold::Size(hard)) => hard > soft,
            // Only the size of the machine tells.
            (Threshold::Percent(_), Threshold::Size(_))
            | (Threshold::Size(_), Threshold::Percent(_)) => false,
        };
        if is_above {
            let theirs = [hard, soft].into_iter().max_by_key(|s| &s.place.origin);
            let place = theirs.map_or(&hard.place, |setting| &setting.place);
            let what = format!("hard ({}) is above soft ({})", hard.value, soft.value);
            let fix = "hard is the tighter one: write the smaller amount there";
            problems.error(place, what, fix);
        }
    }
    Pressure {
        soft: given(raw.soft),
        hard: given(raw.hard),
        emergency: given(raw.emergency),
    }
}

fn no_models(context: &Context<'_>, problems: &mut Problems) {
    let place = Place {
        key: "models".to_owned(),
        origin: Origin::File {
            index: usize::MAX,
            name: "".into(),
            line: 0,
        },
    };
    let fix = if context.has_files {
        "add [models.NAME] with a command"
    } else {
        "name a file with --config, or write residentd.toml, with [models.NAME] in it"
    };
    problems.error(&place, "no models are configured", fix);
}
