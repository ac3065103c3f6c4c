//! One workload under one policy and limit, and the figures of it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::machine::{Machine, Outcome, Wish};
use super::offline;
use super::workload::{FOR_EVER, Memory, ModelFacts, Workload};
use crate::model::{Bytes, Domain, EvictionPolicy};
use crate::policy::{Settings, Threshold};

/// How the policy is set, beside the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Who goes to make room.
    pub eviction: EvictionPolicy,
    /// How long a request waits before busy workers are drained for it; `None`:
    /// they never are.
    pub patience: Option<Duration>,
}

/// How time passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Requests and loads take their time; busy models are no victims.
    #[default]
    Timed,
    /// One request after another, each over before the next: every resident
    /// model may be a victim, and only the sum of load times counts.
    Serial,
}

impl Mode {
    /// Returns the word used in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Timed => "timed",
            Self::Serial => "serial",
        }
    }
}

/// How long requests waited for their model, in seconds; those that did not
/// wait count with zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Waits {
    /// On average.
    pub mean: f64,
    /// 99 of 100 waited no longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Waits {
    fn of(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        let Some(max) = all.last() else {
            return Self::default();
        };
        let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
        let sum: f64 = all.iter().map(Duration::as_secs_f64).sum();
        let rank = (all.len() * 99).div_ceil(100).max(1);
        Self {
            mean: sum / f64::from(count),
            p99: all[rank - 1].as_secs_f64(),
            max: max.as_secs_f64(),
        }
    }
}

/// What one run came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Who chose the victims.
    pub policy: EvictionPolicy,
    /// The limit on memory.
    pub limit: Bytes,
    /// How time passed.
    pub mode: Mode,
    /// How many requests came.
    pub requests: usize,
    /// How many of them were turned away: too large a model, or too long a wait.
    pub refused: usize,
    /// How many found their model ready.
    pub hits: usize,
    /// How often a model was loaded.
    pub loads: u64,
    /// How long all loads took together, in seconds.
    pub load_seconds: f64,
    /// How long requests waited that were answered.
    pub waits: Waits,
    /// What a plan that knows the future would need.
    pub offline: offline::Plan,
}

impl Figures {
    /// Returns the share of requests that found their model ready.
    #[must_use]
    pub fn hit_ratio(&self) -> f64 {
        share(self.hits, self.requests)
    }

    /// Returns load seconds as a multiple of the offline plan's; one when
    /// neither loads anything.
    #[must_use]
    pub fn gap(&self) -> f64 {
        if self.offline.load_seconds > 0.0 {
            return self.load_seconds / self.offline.load_seconds;
        }
        1.0
    }
}

/// Returns `part` of `whole` as a fraction; zero of nothing.
#[must_use]
pub(super) fn share(part: usize, whole: usize) -> f64 {
    let float = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    match whole {
        0 => 0.0,
        _ => float(part) / float(whole),
    }
}

/// Plays a workload under a policy and a limit.
#[must_use]
pub fn run(workload: &Workload, memory: Memory, mode: Mode, rules: Rules, limit: Bytes) -> Figures {
    let domain = memory.domain();
    // Only the memory that is asked about is short.
    let there = BTreeMap::from([(Domain::Host, Bytes::MAX), (domain, limit)]);
    let programs = workload.models().iter().map(|facts| facts.program(memory));
    let mut machine = Machine::new(settings(rules, limit), there, programs);
    let mut wishes = Vec::with_capacity(workload.requests().len());
    // In serial runs, how much later it is than the requests say.
    let mut behind = Duration::ZERO;
    for request in workload.requests() {
        let at = request.at + behind;
        machine.run_until(at);
        let spec = &workload.models()[request.model].spec;
        let duration = match mode {
            Mode::Timed => request.duration,
            Mode::Serial => Duration::ZERO,
        };
        let wish = machine.request(&spec.name, duration, spec.queue_timeout);
        if mode == Mode::Serial {
            machine.run_until_answered(wish);
            behind += machine.now().since(at);
        }
        wishes.push(wish);
    }
    machine.run_out();
    let mut figures = tally(workload, mode, &machine, &wishes);
    figures.policy = rules.eviction;
    figures.limit = limit;
    figures.offline = offline::plan(workload, limit);
    figures
}

/// What the policy is told: the limit, and nothing else that would make anyone
/// go. The one place that knows how a policy is chosen.
pub(super) fn settings(rules: Rules, limit: Bytes) -> Settings {
    Settings {
        eviction: rules.eviction,
        patience: rules.patience.unwrap_or(FOR_EVER),
        limit,
        reserve: Bytes::ZERO,
        gpu_limits: BTreeMap::new(),
        soft: Threshold::Size(Bytes::ZERO),
        hard: Threshold::Size(Bytes::ZERO),
        auto_cleanup: true,
        emergency: true,
        drain_timeout: FOR_EVER,
    }
}

fn tally(workload: &Workload, mode: Mode, machine: &Machine, wishes: &[Wish]) -> Figures {
    let mut waits = Vec::with_capacity(wishes.len());
    let (mut hits, mut refused) = (0, 0);
    for wish in wishes {
        match machine.outcome(*wish) {
            Outcome::Served { hit: true, .. } => {
                hits += 1;
                waits.push(Duration::ZERO);
            }
            Outcome::Served { hit: false, waited } => waits.push(*waited),
            Outcome::Refused(_)
            | Outcome::Waiting
            | Outcome::Cut
            | Outcome::Done
            | Outcome::Left => refused += 1,
        }
    }
    let loads = |facts: &ModelFacts| machine.spawned().get(facts.name()).copied().unwrap_or(0);
    let seconds = |facts: &ModelFacts| Bytes(loads(facts)).as_f64() * facts.load.as_secs_f64();
    Figures {
        policy: EvictionPolicy::default(),
        limit: Bytes::ZERO,
        mode,
        requests: wishes.len(),
        refused,
        hits,
        loads: workload.models().iter().map(loads).sum(),
        load_seconds: workload.models().iter().map(seconds).sum(),
        waits: Waits::of(waits),
        offline: offline::Plan::default(),
    }
}

/// Returns limits from `from` to `to`: `step` apart, or in steps of a round
/// number of GiB that makes about a dozen. `to` is always one of them.
#[must_use]
pub fn steps(from: Bytes, to: Bytes, step: Option<Bytes>) -> Vec<Bytes> {
    let step = step.unwrap_or_else(|| {
        let whole = (to - from).get() / 12;
        let round = [1, 2, 4, 8, 16, 32, 64, 128, 256].map(Bytes::gib);
        let fits = round.into_iter().find(|step| step.get() >= whole);
        fits.unwrap_or(Bytes(whole))
    });
    let step = step.get().max(1);
    let count = (to - from).get() / step;
    let mut all: Vec<_> = (0..=count)
        .map(|nth| from + Bytes(nth.saturating_mul(step)))
        .collect();
    if all.last() != Some(&to) {
        all.push(to);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::workload::Demand;
    use super::*;
    use crate::clock::Timestamp;
    use crate::model::ModelName;

    const LRU: Rules = Rules {
        eviction: EvictionPolicy::Lru,
        patience: None,
    };

    fn model(name: &str, gib: u64, load: u64) -> ModelFacts {
        let name = ModelName::new(name).expect("a good name");
        ModelFacts::new(name, Bytes::gib(gib), Duration::from_secs(load))
    }

    fn demand(at: u64, name: &str, seconds: u64) -> Demand {
        Demand {
            at: Timestamp::from_millis(at * 1000),
            model: ModelName::new(name).expect("a good name"),
            duration: Duration::from_secs(seconds),
        }
    }

    fn timed(memory: Memory, demands: Vec<Demand>, gib: u64) -> Figures {
        let models = vec![model("a", 4, 10), model("b", 4, 10)];
        let workload = Workload::new(models, demands).expect("every model is there");
        run(&workload, memory, Mode::Timed, LRU, Bytes::gib(gib))
    }

    #[test]
    fn requests_that_wait_for_one_load_share_it() {
        let demands = vec![demand(0, "a", 1), demand(4, "a", 1), demand(20, "a", 1)];
        let figures = timed(Memory::Gpu, demands, 4);
        assert_eq!((figures.loads, figures.hits), (1, 1));
        assert!((figures.waits.max - 10.0).abs() < 1e-9);
        assert!((figures.waits.mean - 16.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn on_a_gpu_one_model_loads_at_a_time_and_in_host_memory_two_may() {
        let demands = || vec![demand(0, "a", 1), demand(0, "b", 1)];
        let (gpu, host) = (
            timed(Memory::Gpu, demands(), 8),
            timed(Memory::Host, demands(), 8),
        );
        assert!((gpu.waits.max - 20.0).abs() < 1e-9, "{gpu:?}");
        assert!((host.waits.max - 10.0).abs() < 1e-9, "{host:?}");
    }

    #[test]
    fn what_can_never_fit_is_refused_and_no_part_of_the_plan() {
        let figures = timed(Memory::Host, vec![demand(0, "a", 1)], 3);
        assert_eq!((figures.refused, figures.loads), (1, 0));
        assert_eq!(figures.offline.loads, 0);
        assert!((figures.gap() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn steps_are_round_and_end_where_they_should() {
        let gib = |list: &[u64]| list.iter().map(|n| Bytes::gib(*n)).collect::<Vec<_>>();
        let (from, to) = (Bytes::gib(4), Bytes::gib(64));
        let wanted = gib(&[4, 12, 20, 28, 36, 44, 52, 60, 64]);
        assert_eq!(steps(from, to, None), wanted);
        let wanted = gib(&[4, 34, 64]);
        assert_eq!(steps(from, to, Some(Bytes::gib(30))), wanted);
        assert_eq!(steps(to, to, None), gib(&[64]));
    }

    #[test]
    fn the_hundredth_wait_is_no_p99_and_the_ninety_ninth_is() {
        let all: Vec<_> = (1..=100).map(Duration::from_secs).collect();
        let waits = Waits::of(all);
        assert!((waits.p99 - 99.0).abs() < 1e-9 && (waits.max - 100.0).abs() < 1e-9);
        assert_eq!(Waits::of(Vec::new()), Waits::default());
    }
}
