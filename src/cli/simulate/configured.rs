//! The models of a configuration, with what their past lives taught, as the
//! models of a simulation.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::app::{self, Learned};
use crate::cli::CheckArgs;
use crate::cli::serve::sources;
use crate::config::{self, Config, Problems};
use crate::model::{Bytes, Domain, ModelSpec};
use crate::policy;
use crate::simulate::{self, Memory, ModelFacts, Rules, Workload};

/// An engine's own start, where no load of the model was seen.
const ENGINE_START: Duration = Duration::from_millis(1500);
/// Bytes of weights that are read in a second, where no load of the model was
/// seen: a plain SSD.
const READ_PER_SECOND: f64 = 2e9;

/// Why a configuration and its access log are no workload.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfiguredError {
    /// The configuration has errors.
    #[error("{0}")]
    Config(Problems),
    /// Nobody knows how much memory some models need.
    #[error(
        "nobody knows how much memory {} needs; declare models.NAME.{key}, or serve a request of it once",
        names.join(" or ")
    )]
    UnknownSize {
        /// Which models.
        names: Vec<String>,
        /// The key that would say it.
        key: &'static str,
    },
}

/// What is played, and what a reader has to know of it.
pub(super) struct Configured {
    pub(super) workload: Workload,
    pub(super) memory: Memory,
    /// The policy and patience in the configuration.
    pub(super) rules: Rules,
    /// The limit in the configuration.
    pub(super) limit: Option<Bytes>,
    /// What is estimated or left out.
    pub(super) notes: Vec<String>,
}

/// Reads configuration, state and access logs.
///
/// # Errors
/// What is wrong with them.
pub(super) fn read(
    logs: &[PathBuf],
    config: &[PathBuf],
    memory: Option<Memory>,
) -> anyhow::Result<Configured> {
    let given = CheckArgs {
        config: config.to_owned(),
    };
    let config = config::load(&sources(&given, Vec::new())?).map_err(ConfiguredError::Config)?;
    let mut notes = Vec::new();
    let learned = app::learned(&config).unwrap_or_else(|error| {
        notes.push(format!(
            "what past loads taught is not used: {}",
            crate::telemetry::chain(&error)
        ));
        std::collections::BTreeMap::new()
    });
    let memory = memory.unwrap_or_else(|| short(&config));
    let mut models = Vec::new();
    let (mut unknown, mut estimated) = (Vec::new(), Vec::new());
    let of_interest = |spec: &&Arc<ModelSpec>| memory == Memory::Host || spec.gpus.count() > 0;
    for spec in config.models.iter().filter(of_interest) {
        let past = learned.get(&spec.name).cloned().unwrap_or_default();
        let Some(size) = size(spec, memory, &past) else {
            unknown.push(spec.name.to_string());
            continue;
        };
        let load = past.load.unwrap_or_else(|| {
            estimated.push(spec.name.to_string());
            ENGINE_START + Duration::from_secs_f64(size.as_f64() / READ_PER_SECOND)
        });
        models.push(ModelFacts {
            spec: Arc::clone(spec),
            size,
            load,
        });
    }
    if !unknown.is_empty() {
        let key = match memory {
            Memory::Host => "memory",
            Memory::Gpu => "vram",
        };
        return Err(ConfiguredError::UnknownSize {
            names: unknown,
            key,
        }
        .into());
    }
    if !estimated.is_empty() {
        notes.push(format!(
            "load times are estimated, no load was seen yet: {}",
            estimated.join(", ")
        ));
    }
    let demands = simulate::read_log(logs.iter().map(PathBuf::as_path))?;
    let demands = leave_out(demands, &config, memory);
    Ok(Configured {
        workload: Workload::new(models, demands)?,
        memory,
        rules: Rules {
            eviction: config.memory.policy,
            patience: Some(config.memory.patience),
        },
        limit: match memory {
            Memory::Host => config.memory.limit.map(|(limit, _)| limit),
            Memory::Gpu => config.gpu_limits.values().copied().reduce(|a, b| a + b),
        },
        notes,
    })
}

/// GPU memory is short where any model uses it.
fn short(config: &Config) -> Memory {
    match config.models.iter().any(|spec| spec.gpus.count() > 0) {
        true => Memory::Gpu,
        false => Memory::Host,
    }
}

/// Requests for models that use none of the memory in question are no demand
/// for it.
fn leave_out(
    mut demands: Vec<simulate::Demand>,
    config: &Config,
    memory: Memory,
) -> Vec<simulate::Demand> {
    if memory == Memory::Gpu {
        let without: Vec<_> = config
            .models
            .iter()
            .filter(|spec| spec.gpus.count() == 0)
            .flat_map(|spec| spec.aliases.iter().chain([&spec.name]))
            .collect();
        demands.retain(|demand| !without.contains(&&demand.model));
    }
    demands
}

/// What a model is charged while it is resident: the larger of what its lives
/// used and what is declared, else an estimate by its weight files.
fn size(spec: &ModelSpec, memory: Memory, past: &Learned) -> Option<Bytes> {
    let of = |domain: &Domain| (*domain == Domain::Host) == (memory == Memory::Host);
    let learned = past.footprint.iter().filter(|(domain, _)| of(domain));
    let learned: Bytes = learned.map(|(_, footprint)| footprint.peak).sum();
    let weights = config::weights::total(&spec.weights);
    let count = spec.gpus.count();
    let copies = |each: Bytes| std::iter::repeat_n(each, count).sum::<Bytes>();
    let (declared, estimate) = match memory {
        Memory::Host => (spec.memory, policy::from_weights(weights)),
        Memory::Gpu => (
            spec.vram.map(copies),
            copies(policy::from_weights_on_gpus(weights, count)),
        ),
    };
    let known = (learned > Bytes::ZERO).then_some(learned);
    let estimate = (weights > Bytes::ZERO).then_some(estimate);
    // A worker is charged the larger of what was promised to it and what it holds.
    known.max(declared).or(estimate)
}
