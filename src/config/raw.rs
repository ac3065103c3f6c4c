//! The shape of a configuration file, each value checked by itself, and how a
//! stronger source covers a weaker one. What values mean together is
//! [`super::check`]'s to say.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeTable;

use super::access::{self, RawAdmin, RawAuth, RawTls};
use super::live::RawLive;
use super::problem::{Complaint, Origin, Place, Problems};
use super::requests::RawRequests;
use super::section::{Section, Setting, Text};
use super::telemetry::RawTelemetry;
use super::value::{NAME_FIX, Value};
use super::{Listen, LogFormat, Threshold, gpus, park, ready};
use crate::model::{Bytes, DeviceRef, EvictionPolicy, GpuRequest, ModelName, Prefetch, ReadyCheck};

/// Keys of the documentation that this version has no feature for.
const LATER_MODEL: [&str; 1] = ["stop_command"];

/// One source, or several merged.
#[derive(Clone, Debug, Default)]
pub(super) struct RawConfig {
    pub(super) server: RawServer,
    pub(super) admin: RawAdmin,
    pub(super) auth: RawAuth,
    pub(super) tls: RawTls,
    pub(super) telemetry: RawTelemetry,
    pub(super) memory: RawMemory,
    pub(super) pressure: RawPressure,
    /// Limits of GPUs.
    pub(super) gpus: BTreeMap<DeviceRef, Setting<Bytes>>,
    pub(super) variables: BTreeMap<String, Setting<String>>,
    pub(super) defaults: RawModel,
    pub(super) models: BTreeMap<ModelName, Setting<RawModel>>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct RawServer {
    pub(super) listen: Option<Setting<Vec<Listen>>>,
    pub(super) state_dir: Option<Setting<PathBuf>>,
    pub(super) shutdown_grace: Option<Setting<Duration>>,
    pub(super) adopt: Option<Setting<bool>>,
    pub(super) log_format: Option<Setting<LogFormat>>,
    pub(super) log_level: Option<Setting<String>>,
    pub(super) max_body: Option<Setting<Bytes>>,
    pub(super) model_prefix: Option<Setting<Bytes>>,
    pub(super) access_log: Option<Setting<bool>>,
    pub(super) watch_config: Option<Setting<bool>>,
    pub(super) cors_origins: Option<Setting<Vec<String>>>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct RawMemory {
    pub(super) limit: Option<Setting<Bytes>>,
    pub(super) reserve: Option<Setting<Bytes>>,
    pub(super) check_interval: Option<Setting<Duration>>,
    pub(super) auto_cleanup: Option<Setting<bool>>,
    pub(super) policy: Option<Setting<EvictionPolicy>>,
    pub(super) patience: Option<Setting<Duration>>,
    pub(super) prefetch: Option<Setting<Prefetch>>,
    pub(super) nvml_library: Option<Setting<PathBuf>>,
    pub(super) host_proc: Option<Setting<PathBuf>>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct RawPressure {
    pub(super) soft: Option<Setting<Threshold>>,
    pub(super) hard: Option<Setting<Threshold>>,
    pub(super) emergency: Option<Setting<bool>>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct RawModel {
    pub(super) command: Option<Setting<Vec<String>>>,
    pub(super) cwd: Option<Setting<String>>,
    pub(super) env: BTreeMap<String, Setting<String>>,
    pub(super) kind: Option<Setting<String>>,
    pub(super) aliases: Option<Setting<Vec<ModelName>>>,
    pub(super) upstream: Option<Setting<String>>,
    pub(super) ready: Option<Setting<ReadyCheck>>,
    pub(super) live: RawLive,
    pub(super) start_timeout: Option<Setting<Duration>>,
    pub(super) stop_timeout: Option<Setting<Duration>>,
    pub(super) stop_signal: Option<Setting<i32>>,
    pub(super) idle_timeout: Option<Setting<Duration>>,
    pub(super) pinned: Option<Setting<bool>>,
    pub(super) preload: Option<Setting<bool>>,
    pub(super) memory: Option<Setting<Bytes>>,
    pub(super) gpus: Option<Setting<GpuRequest>>,
    pub(super) vram: Option<Setting<Bytes>>,
    pub(super) max_memory: Option<Setting<Bytes>>,
    pub(super) park: Option<Setting<park::RawPark>>,
    pub(super) weights: Option<Setting<Vec<String>>>,
    pub(super) prefetch: Option<Setting<Prefetch>>,
    pub(super) concurrency: Option<Setting<Option<NonZeroU32>>>,
    pub(super) max_queue: Option<Setting<usize>>,
    pub(super) queue_timeout: Option<Setting<Duration>>,
    pub(super) requests: RawRequests,
}

impl RawConfig {
    /// Reads a whole file.
    pub(super) fn read(table: &DeTable<'_>, text: &Text, problems: &mut Problems) -> Self {
        let root = Place {
            key: String::new(),
            origin: Origin::BuiltIn,
        };
        let mut top = Section::open(root, table, text);
        let mut raw = Self::default();
        if let Some(section) = top.table("server", problems) {
            raw.server = RawServer::read(section, problems);
        }
        if let Some(section) = top.table("admin", problems) {
            raw.admin = RawAdmin::read(section, problems);
        }
        if let Some(section) = top.table("auth", problems) {
            raw.auth = RawAuth::read(section, problems);
        }
        if let Some(section) = top.table("tls", problems) {
            raw.tls = RawTls::read(section, problems);
        }
        if let Some(section) = top.table("telemetry", problems) {
            raw.telemetry = RawTelemetry::read(section, problems);
        }
        if let Some(section) = top.table("memory", problems) {
            raw.memory = RawMemory::read(section, problems);
        }
        if let Some(section) = top.table("pressure", problems) {
            raw.pressure = RawPressure::read(section, problems);
        }
        if let Some(section) = top.table("gpus", problems) {
            raw.gpus = gpus::read_limits(section, problems);
        }
        if let Some(section) = top.table("variables", problems) {
            raw.variables = section.texts(problems);
        }
        if let Some(mut section) = top.table("defaults", problems) {
            section.refuse(
                &["command", "aliases", "weights"],
                "is a model's own and cannot be shared",
                "move it to [models.NAME]",
                problems,
            );
            raw.defaults = RawModel::read(section, problems);
        }
        if let Some(section) = top.table("models", problems) {
            for (name, section) in section.tables(problems) {
                raw.take_model(&name, section, problems);
            }
        }
        top.finish(&[], problems);
        raw
    }

    fn take_model(&mut self, name: &str, section: Section<'_>, problems: &mut Problems) {
        let place = section.place.clone();
        let model = RawModel::read(section, problems);
        match ModelName::new(name) {
            Ok(name) => {
                let value = model;
                self.models.insert(name, Setting { value, place });
            }
            Err(_) => problems.error(&place, format!("{name:?} is not a model's name"), NAME_FIX),
        }
    }

    /// Lays this source over a weaker one.
    pub(super) fn over(self, weaker: Self, problems: &mut Problems) -> Self {
        let mut models = weaker.models;
        for (name, model) in self.models {
            if let Some(first) = models.get(&name) {
                problems.error(
                    &model.place,
                    format!("is defined twice, first in {}", first.place.origin),
                    "rename or remove one",
                );
                continue;
            }
            models.insert(name, model);
        }
        Self {
            server: self.server.over(weaker.server),
            admin: self.admin.over(weaker.admin),
            auth: self.auth.over(weaker.auth),
            tls: self.tls.over(weaker.tls),
            telemetry: self.telemetry.over(weaker.telemetry),
            memory: self.memory.over(weaker.memory),
            pressure: self.pressure.over(weaker.pressure),
            gpus: over(self.gpus, weaker.gpus),
            variables: over(self.variables, weaker.variables),
            defaults: self.defaults.over(weaker.defaults),
            models,
        }
    }
}

/// Lays one map over another, key by key.
fn over<K: Ord, T>(stronger: BTreeMap<K, T>, weaker: BTreeMap<K, T>) -> BTreeMap<K, T> {
    let mut merged = weaker;
    merged.extend(stronger);
    merged
}

impl RawServer {
    pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let s = &mut section;
        let raw = Self {
            listen: s.list("listen", Value::listen, problems),
            state_dir: s.get("state_dir", Value::path, problems),
            shutdown_grace: s.get("shutdown_grace", Value::duration, problems),
            adopt: s.get("adopt", Value::flag, problems),
            log_format: s.get("log_format", Value::log_format, problems),
            log_level: s.get("log_level", Value::log_level, problems),
            max_body: s.get("max_body", Value::size_over_zero, problems),
            model_prefix: s.get("model_prefix", Value::size_over_zero, problems),
            access_log: s.get("access_log", Value::flag, problems),
            watch_config: s.get("watch_config", Value::flag, problems),
            cors_origins: s.list("cors_origins", access::origin, problems),
        };
        section.finish(&[], problems);
        raw
    }

    fn over(self, weaker: Self) -> Self {
        Self {
            listen: self.listen.or(weaker.listen),
            state_dir: self.state_dir.or(weaker.state_dir),
            shutdown_grace: self.shutdown_grace.or(weaker.shutdown_grace),
            adopt: self.adopt.or(weaker.adopt),
            log_format: self.log_format.or(weaker.log_format),
            log_level: self.log_level.or(weaker.log_level),
            max_body: self.max_body.or(weaker.max_body),
            model_prefix: self.model_prefix.or(weaker.model_prefix),
            access_log: self.access_log.or(weaker.access_log),
            watch_config: self.watch_config.or(weaker.watch_config),
            cors_origins: self.cors_origins.or(weaker.cors_origins),
        }
    }
}

impl RawMemory {
    pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let s = &mut section;
        let raw = Self {
            limit: s.get("limit", Value::size_over_zero, problems),
            reserve: s.get("reserve", Value::size, problems),
            check_interval: s.get("check_interval", Value::duration_over_zero, problems),
            auto_cleanup: s.get("auto_cleanup", Value::flag, problems),
            policy: s.get("policy", Value::eviction_policy, problems),
            patience: s.get("patience", Value::duration, problems),
            prefetch: s.get("prefetch", Value::prefetch, problems),
            nvml_library: s.get("nvml_library", Value::path, problems),
            host_proc: s.get("host_proc", Value::path, problems),
        };
        section.finish(&[], problems);
        raw
    }

    fn over(self, weaker: Self) -> Self {
        Self {
            limit: self.limit.or(weaker.limit),
            reserve: self.reserve.or(weaker.reserve),
            check_interval: self.check_interval.or(weaker.check_interval),
            auto_cleanup: self.auto_cleanup.or(weaker.auto_cleanup),
            policy: self.policy.or(weaker.policy),
            patience: self.patience.or(weaker.patience),
            prefetch: self.prefetch.or(weaker.prefetch),
            nvml_library: self.nvml_library.or(weaker.nvml_library),
            host_proc: self.host_proc.or(weaker.host_proc),
        }
    }
}

impl RawPressure {
    fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let s = &mut section;
        let raw = Self {
            soft: s.get("soft", Value::threshold, problems),
            hard: s.get("hard", Value::threshold, problems),
            emergency: s.get("emergency", Value::flag, problems),
        };
        section.finish(&[], problems);
        raw
    }

    fn over(self, weaker: Self) -> Self {
        Self {
            soft: self.soft.or(weaker.soft),
            hard: self.hard.or(weaker.hard),
            emergency: self.emergency.or(weaker.emergency),
        }
    }
}

impl RawModel {
    fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let s = &mut section;
        let raw = Self {
            command: s.get("command", Value::command, problems),
            cwd: s.get("cwd", Value::filled_text, problems),
            env: s
                .table("env", problems)
                .map(|table| read_env(table, problems))
                .unwrap_or_default(),
            kind: s.get("kind", Value::filled_text, problems),
            aliases: s.list("aliases", Value::model_name, problems),
            upstream: s.get("upstream", Value::filled_text, problems),
            ready: s
                .table("ready", problems)
                .and_then(|table| ready::read(table, problems)),
            live: s
                .table("live", problems)
                .map(|table| RawLive::read(table, problems))
                .unwrap_or_default(),
            start_timeout: s.get("start_timeout", Value::duration_over_zero, problems),
            stop_timeout: s.get("stop_timeout", Value::duration, problems),
            stop_signal: s.get("stop_signal", Value::signal, problems),
            idle_timeout: s.get("idle_timeout", Value::duration, problems),
            pinned: s.get("pinned", Value::flag, problems),
            preload: s.get("preload", Value::flag, problems),
            memory: s.get("memory", Value::size_over_zero, problems),
            gpus: s.get("gpus", gpus::read, problems),
            vram: s.get("vram", Value::size_over_zero, problems),
            max_memory: s.get("max_memory", Value::size_over_zero, problems),
            park: s
                .table("park", problems)
                .and_then(|table| park::read(table, problems)),
            weights: s.list("weights", Value::filled_text, problems),
            prefetch: s.get("prefetch", Value::prefetch, problems),
            concurrency: s.get("concurrency", Value::bound, problems),
            max_queue: s.get("max_queue", Value::count, problems),
            queue_timeout: s.get("queue_timeout", Value::duration_over_zero, problems),
            requests: RawRequests::read(s, problems),
        };
        section.finish(&LATER_MODEL, problems);
        raw
    }

    /// Fills in from the weaker what this does not say; `env` variable by
    /// variable, `live` key by key.
    pub(super) fn over(self, weaker: Self) -> Self {
        Self {
            command: self.command.or(weaker.command),
            cwd: self.cwd.or(weaker.cwd),
            env: over(self.env, weaker.env),
            kind: self.kind.or(weaker.kind),
            aliases: self.aliases.or(weaker.aliases),
            upstream: self.upstream.or(weaker.upstream),
            ready: self.ready.or(weaker.ready),
            live: self.live.over(weaker.live),
            start_timeout: self.start_timeout.or(weaker.start_timeout),
            stop_timeout: self.stop_timeout.or(weaker.stop_timeout),
            stop_signal: self.stop_signal.or(weaker.stop_signal),
            idle_timeout: self.idle_timeout.or(weaker.idle_timeout),
            pinned: self.pinned.or(weaker.pinned),
            preload: self.preload.or(weaker.preload),
            memory: self.memory.or(weaker.memory),
            gpus: self.gpus.or(weaker.gpus),
            vram: self.vram.or(weaker.vram),
            max_memory: self.max_memory.or(weaker.max_memory),
            park: self.park.or(weaker.park),
            weights: self.weights.or(weaker.weights),
            prefetch: self.prefetch.or(weaker.prefetch),
            concurrency: self.concurrency.or(weaker.concurrency),
            max_queue: self.max_queue.or(weaker.max_queue),
            queue_timeout: self.queue_timeout.or(weaker.queue_timeout),
            requests: self.requests.over(weaker.requests),
        }
    }
}

/// Reads a worker's environment; a name no process could have is told.
fn read_env(section: Section<'_>, problems: &mut Problems) -> BTreeMap<String, Setting<String>> {
    let mut env = section.texts(problems);
    env.retain(|name, setting| {
        let good = !name.is_empty() && !name.contains(['=', '\0']);
        if !good {
            problems.complain(
                &setting.place,
                Complaint::new(
                    format!("{name:?} is not a variable's name"),
                    "write a name without = and NUL",
                ),
            );
        }
        good
    });
    env
}
