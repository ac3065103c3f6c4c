//! `simulate`: recorded requests under a virtual clock, for each policy and
//! limit that is asked for.

mod configured;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use configured::ConfiguredError;

use super::args::{Device, SimulateArgs};
use super::{output, serve};
use crate::model::{Bytes, EvictionPolicy};
use crate::simulate::{self, Figures, Memory, Mode, Rules, Workload};

/// The first columns of the table are words.
const WORDS: usize = 2;

/// What the configuration's default is.
const PATIENCE: Duration = Duration::from_secs(5);

/// Plays and prints.
///
/// # Errors
/// When a file cannot be read or written.
pub(super) fn run(args: &SimulateArgs) -> anyhow::Result<ExitCode> {
    let game = match Game::read(args) {
        Ok(game) => game,
        Err(error) => {
            if error.downcast_ref::<ConfiguredError>().is_none() {
                return Err(error);
            }
            output::complain(&error);
            return Ok(ExitCode::from(serve::WRONG_CONFIG));
        }
    };
    for note in &game.notes {
        writeln!(std::io::stderr().lock(), "residentd: {note}")?;
    }
    let limits = game.limits(args);
    let runs = limits
        .iter()
        .flat_map(|limit| game.policies.iter().map(move |policy| (*policy, *limit)));
    let all: Vec<_> = runs
        .map(|(policy, limit)| game.play(policy, limit))
        .collect();
    if let Some(path) = &args.plot {
        std::fs::write(path, simulate::svg(&all))
            .with_context(|| format!("write {}", path.display()))?;
    }
    if args.json {
        output::write_text(&serde_json::to_string_pretty(&simulate::json(&all))?)?;
    } else {
        output::write_text(&game.page(&all, args.more))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What stays the same from run to run.
struct Game {
    workload: Workload,
    memory: Memory,
    mode: Mode,
    policies: Vec<EvictionPolicy>,
    patience: Duration,
    limit: Option<Bytes>,
    notes: Vec<String>,
}

impl Game {
    fn read(args: &SimulateArgs) -> anyhow::Result<Self> {
        let memory = args.device.map(|device| match device {
            Device::Host => Memory::Host,
            Device::Gpu => Memory::Gpu,
        });
        let mode = match args.serial {
            true => Mode::Serial,
            false => Mode::Timed,
        };
        if let (Some(trace), Some(models)) = (&args.trace, &args.models) {
            let models = simulate::read_models(models)?;
            return Ok(Self {
                workload: Workload::new(models, simulate::read_trace(trace)?)?,
                memory: memory.unwrap_or(Memory::Gpu),
                mode,
                policies: policies(args, EvictionPolicy::Lru),
                patience: args.patience.unwrap_or(PATIENCE),
                limit: None,
                notes: Vec::new(),
            });
        }
        let found = configured::read(&args.log, &args.config, memory)?;
        Ok(Self {
            workload: found.workload,
            memory: found.memory,
            mode,
            policies: policies(args, found.rules.eviction),
            patience: args.patience.or(found.rules.patience).unwrap_or(PATIENCE),
            limit: found.limit,
            notes: found.notes,
        })
    }

    /// Returns the limits to play with: those that are asked for, else the
    /// configured one, else from the largest model to all of them together.
    fn limits(&self, args: &SimulateArgs) -> Vec<Bytes> {
        let mut limits = args.limit.clone();
        if let Some(sweep) = args.sweep {
            limits.extend(simulate::steps(sweep.from, sweep.to, sweep.step));
        }
        if limits.is_empty() {
            limits.extend(self.limit);
        }
        if limits.is_empty() {
            let (from, to) = (self.workload.largest(), self.workload.total());
            limits = simulate::steps(from, to, None);
        }
        limits
    }

    fn play(&self, eviction: EvictionPolicy, limit: Bytes) -> Figures {
        let rules = Rules {
            eviction,
            patience: Some(self.patience),
        };
        simulate::run(&self.workload, self.memory, self.mode, rules, limit)
    }

    /// Returns the table, the chart when there is something to compare, and the
    /// answer for the first run.
    fn page(&self, all: &[Figures], more: Bytes) -> String {
        let mut parts = vec![output::table(&simulate::rows(all), WORDS)];
        parts.extend(simulate::remark(all).map(|remark| format!("{remark}\n")));
        if all.len() > 1 {
            parts.push(simulate::chart(all) + "\n");
        }
        if let Some(first) = all.first() {
            let larger = first.limit + more;
            let same =
                |figures: &&Figures| figures.limit == larger && figures.policy == first.policy;
            let known = all.iter().find(same).cloned();
            let more = known.unwrap_or_else(|| self.play(first.policy, larger));
            let answer = simulate::answer(&self.workload, self.memory, first, Some(&more));
            let enough = (all.len() > 1).then(|| simulate::enough(all)).flatten();
            parts.push(
                [Some(answer), enough]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join(" "),
            );
        }
        parts.join("\n")
    }
}

/// The policies that are asked for, else this one.
fn policies(args: &SimulateArgs, usual: EvictionPolicy) -> Vec<EvictionPolicy> {
    match args.policy.is_empty() {
        true => vec![usual],
        false => args.policy.clone(),
    }
}
