//! Figures out of paired rounds, and how they are told: a line each, and the same
//! as JSON lines.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};

use serde_json::{Value, json};

use crate::load::float_of;

/// More spread between rounds than this says nothing about a goal.
const NOISY: f64 = 0.25;

/// What one visit to one target gave, by name.
pub(crate) type Visit = BTreeMap<&'static str, f64>;

/// Rounds of one row: each has visits to every target.
#[derive(Debug, Default)]
pub(crate) struct Rounds(Vec<BTreeMap<String, Visit>>);

impl Rounds {
    /// Visits all targets in each of so many rounds, in an order that turns. Of the
    /// passes of a round every other one goes the other way, and a round's figures are
    /// their means: so a host that grows slower meanwhile does so for all.
    pub(crate) fn run<T>(
        (rounds, passes): (usize, usize),
        targets: &[T],
        name: impl Fn(&T) -> &str,
        mut visit: impl FnMut(&T) -> io::Result<Visit>,
    ) -> io::Result<Self> {
        let mut all = Self::default();
        for round in 0..rounds {
            let mut found: BTreeMap<String, Visit> = BTreeMap::new();
            for pass in 0..passes {
                for place in 0..targets.len() {
                    let place = match pass % 2 {
                        0 => place,
                        _ => targets.len() - 1 - place,
                    };
                    let target = &targets[(round + place) % targets.len()];
                    let visited = visit(target)
                        .map_err(|error| io::Error::other(format!("{}: {error}", name(target))))?;
                    let sums = found.entry(name(target).to_owned()).or_default();
                    for (figure, value) in visited {
                        *sums.entry(figure).or_default() += value / float_of(passes);
                    }
                }
            }
            all.0.push(found);
        }
        Ok(all)
    }

    /// Returns a figure of a target, by round; none of a target that is not there.
    pub(crate) fn of(&self, target: &str, figure: &str) -> Vec<f64> {
        let values = self.0.iter();
        values
            .filter_map(|round| round.get(target)?.get(figure).copied())
            .collect()
    }

    /// Returns how much more a figure is than that of `direct`, by round.
    pub(crate) fn added(&self, target: &str, figure: &str) -> Vec<f64> {
        let (values, direct) = (self.of(target, figure), self.of("direct", figure));
        values.iter().zip(direct).map(|(v, d)| v - d).collect()
    }

    fn targets(&self) -> Vec<&String> {
        let first = self.0.first();
        first
            .map(|round| round.keys().collect())
            .unwrap_or_default()
    }

    fn figures(&self, target: &str) -> Vec<&'static str> {
        let visit = self.0.first().and_then(|round| round.get(target));
        visit
            .map(|visit| visit.keys().copied().collect())
            .unwrap_or_default()
    }
}

/// Median, least and most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self {
            median: sorted[sorted.len() / 2],
            least: sorted[0],
            most: sorted[sorted.len() - 1],
        }
    }

    fn is_noisy(self) -> bool {
        !(self.median > 0.0 && (self.most - self.least) / self.median <= NOISY)
    }
}

/// Returns this percentile, of at least one value.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

/// What a figure is held against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal {
    /// The most that is good; the least for what is better the larger it is.
    pub(crate) bound: f64,
    pub(crate) at_least: bool,
}

impl Goal {
    pub(crate) fn at_most(bound: f64) -> Self {
        Self {
            bound,
            at_least: false,
        }
    }

    pub(crate) fn at_least(bound: f64) -> Self {
        Self {
            bound,
            at_least: true,
        }
    }

    /// Returns the same goal with so much leniency.
    fn eased(self, by: f64) -> Self {
        let bound = match self.at_least {
            true => self.bound / by,
            false => self.bound * by,
        };
        Self { bound, ..self }
    }

    fn is_met(self, value: f64) -> bool {
        match self.at_least {
            true => value >= self.bound,
            false => value <= self.bound,
        }
    }
}

/// Where figures go.
#[derive(Debug)]
pub(crate) struct Report {
    file: Option<File>,
    /// What goals are multiplied with.
    ease: f64,
    missed: usize,
    /// Why rates of this row say nothing, if so.
    bound: Option<String>,
}

impl Report {
    pub(crate) fn new(file: Option<File>, ease: f64) -> Self {
        Self {
            file,
            ease,
            missed: 0,
            bound: None,
        }
    }

    pub(crate) fn missed(&self) -> usize {
        self.missed
    }

    /// Writes a line of JSON.
    pub(crate) fn keep(&mut self, value: &Value) {
        if let Some(file) = &mut self.file {
            writeln!(file, "{value}").expect("results can be written");
        }
    }

    /// Says that a row counts for nothing, since something in it went wrong.
    pub(crate) fn void(&mut self, row: &str, why: &str) {
        say(&format!("VOID {row}: {why}"));
        self.missed += 1;
        self.keep(&json!({"void": row, "why": why}));
    }

    /// Says that something was not measured, and why.
    pub(crate) fn skip(&mut self, what: &str, why: &str) {
        say(&format!("SKIP {what}: {why}"));
        self.keep(&json!({"skip": what, "why": why}));
    }

    /// Tells the medians of every target of a row.
    pub(crate) fn table(&mut self, row: &str, rounds: &Rounds) {
        for target in rounds.targets() {
            let mut line = vec![format!("ROW {row} {target}")];
            let mut kept = BTreeMap::new();
            for figure in rounds.figures(target) {
                let values = rounds.of(target, figure);
                line.push(format!("{figure}={:.1}", Spread::of(&values).median));
                kept.insert(figure, values);
            }
            say(&line.join(" "));
            self.keep(&json!({"row": row, "target": target, "rounds": kept}));
        }
    }

    /// The driver proves itself: what it does to the worker itself must be well
    /// over what it does to any target, or it is the driver that is measured.
    pub(crate) fn prove_driver(&mut self, row: &str, rounds: &Rounds) {
        let rate = |target: &str| Spread::of(&rounds.of(target, "per_s")).median;
        let best = rounds.targets().into_iter().filter(|t| *t != "direct");
        let best = best.map(|target| rate(target)).fold(0.0, f64::max);
        let margin = rate("direct") / best;
        self.bound = (margin < 1.2).then(|| "driver-bound".to_owned());
        let verdict = self.bound.as_deref().unwrap_or("ok");
        say(&format!("DRIVER {row} direct/best={margin:.2} {verdict}"));
        self.keep(&json!({"driver": row, "direct_over_best": margin, "verdict": verdict}));
    }

    /// Compares ours with a base by the median of the ratios of each round.
    pub(crate) fn ratio(
        &mut self,
        name: &str,
        (unit, against): (&str, &str),
        (ours, base): (Vec<f64>, Vec<f64>),
        goal: Goal,
    ) {
        if base.is_empty() {
            return self.skip(name, &format!("{against} is not here"));
        }
        let ratios: Vec<f64> = ours.iter().zip(&base).map(|(o, b)| o / b).collect();
        let (ours, base) = (Spread::of(&ours).median, Spread::of(&base).median);
        self.tell(name, (unit, against), (ours, base), &ratios, goal);
    }

    /// Compares ours with a goal in its own unit.
    pub(crate) fn absolute(&mut self, name: &str, unit: &str, ours: &[f64], goal: Goal) {
        let ratios: Vec<f64> = ours.iter().map(|value| value / goal.bound).collect();
        let median = Spread::of(ours).median;
        let whole = Goal { bound: 1.0, ..goal };
        self.tell(name, (unit, "goal"), (median, goal.bound), &ratios, whole);
    }

    fn tell(
        &mut self,
        name: &str,
        (unit, against): (&str, &str),
        (ours, base): (f64, f64),
        ratios: &[f64],
        goal: Goal,
    ) {
        let (spread, goal) = (Spread::of(ratios), goal.eased(self.ease));
        let verdict = match (spread.is_noisy(), goal.is_met(spread.median)) {
            (true, _) => "noisy",
            (false, true) => "ok",
            (false, false) => "MISS",
        };
        self.missed += usize::from(verdict == "MISS");
        let Spread {
            median,
            least,
            most,
        } = spread;
        let sign = if goal.at_least { ">=" } else { "<=" };
        let rounds = ratios.len();
        say(&format!(
            "BENCH {name} ours={ours:.3} base={base:.3} ratio={median:.3} unit={unit} [{least:.3}..{most:.3}] rounds={rounds} against={against} goal{sign}{:.3} {verdict}",
            goal.bound
        ));
        let met = goal.is_met(median);
        self.keep(&json!({
            "name": name, "unit": unit, "ours": ours, "base": base, "against": against,
            "ratio": median, "least": least, "most": most, "rounds": rounds,
            "goal": goal.bound, "goal_is": sign, "median_meets_goal": met, "verdict": verdict,
        }));
    }
}

/// Prints a line.
#[expect(clippy::print_stdout, reason = "that is what a bench is for")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}
