//! Traffic of several kinds, always the same, to compare policies on: what one
//! trace favours another may not.

use std::time::Duration;

use residentd::clock::Timestamp;
use residentd::model::{Bytes, ModelName};
use residentd::simulate::{Demand, ModelFacts, Workload};

/// Kinds of traffic, by name.
pub(crate) const KINDS: [&str; 9] = [
    "zipf", "uniform", "cycle", "shift", "scan", "chains", "sessions", "jobs", "slow",
];

/// Numbers that look random (splitmix64, Steele et al., OOPSLA 2014).
struct Draw(u64);

impl Draw {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let high = u32::try_from((mixed ^ (mixed >> 31)) >> 32).expect("half of it");
        f64::from(high) / (f64::from(u32::MAX) + 1.0)
    }

    /// An exponential time with this mean.
    fn gap(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }
}

/// What is being put together: times in seconds.
struct Traffic {
    sizes_gib: Vec<u64>,
    loads: Vec<f64>,
    asked: Vec<(f64, usize, f64)>,
    span: f64,
    draw: Draw,
}

impl Traffic {
    /// So many models of these sizes in turn; a load takes 1.5 s and a second
    /// for each 2 GiB.
    fn new(span: f64, models: usize, sizes_gib: &[u64]) -> Self {
        let sizes: Vec<u64> = sizes_gib.iter().copied().cycle().take(models).collect();
        let gib = |size: &u64| f64::from(u32::try_from(*size).expect("a small number"));
        Self {
            loads: sizes.iter().map(|size| 1.5 + gib(size) / 2.0).collect(),
            sizes_gib: sizes,
            asked: Vec::new(),
            span,
            draw: Draw(7),
        }
    }

    /// Requests for one model that come by chance, so many seconds apart.
    fn by_chance(&mut self, model: usize, apart: f64, (from, to): (f64, f64), takes: f64) {
        let mut at = from + self.draw.gap(apart);
        while at < to {
            let takes = self.draw.gap(takes);
            self.asked.push((at, model, takes));
            at += self.draw.gap(apart);
        }
    }

    /// The first model the most popular, the next half as much, then a third.
    fn popular(&mut self, order: impl Iterator<Item = usize>, times: (f64, f64)) {
        for (rank, model) in (1_u32..).zip(order) {
            self.by_chance(model, 20.0 * f64::from(rank), times, 4.0);
        }
    }

    fn workload(self) -> Workload {
        let name = |model: usize| ModelName::new(&format!("m{model:02}")).expect("a good name");
        let models = self.sizes_gib.iter().zip(&self.loads).enumerate();
        let models = models.map(|(model, (size, load))| {
            let load = Duration::from_secs_f64(*load);
            ModelFacts::new(name(model), Bytes::gib(*size), load)
        });
        let demands = self.asked.iter().map(|(at, model, takes)| Demand {
            at: Timestamp::from_start(Duration::from_secs_f64(*at)),
            model: name(*model),
            duration: Duration::from_secs_f64(*takes),
        });
        Workload::new(models.collect(), demands.collect()).expect("every model is there")
    }
}

/// Traffic of one kind over so many hours.
pub(crate) fn of(kind: &str, hours: u32) -> Workload {
    let span = f64::from(hours) * 3600.0;
    let all = (0.0, span);
    let mut traffic;
    match kind {
        // Popularity by rank, sizes mixed.
        "zipf" => {
            traffic = Traffic::new(span, 20, &[4, 8, 16, 2, 24]);
            traffic.popular(0..20, all);
        }
        // All alike.
        "uniform" => {
            traffic = Traffic::new(span, 12, &[8]);
            for model in 0..12 {
                traffic.by_chance(model, 250.0, all, 5.0);
            }
        }
        // One after the other, again and again: the worst there is for recency.
        "cycle" => {
            traffic = Traffic::new(span, 10, &[8]);
            let mut at = 0.0;
            for model in (0..10).cycle() {
                if at >= span {
                    break;
                }
                traffic.asked.push((at, model, 3.0));
                at += 20.0;
            }
        }
        // At half time the least popular become the most popular.
        "shift" => {
            traffic = Traffic::new(span, 16, &[4, 8, 16]);
            traffic.popular(0..16, (0.0, span / 2.0));
            traffic.popular((0..16).rev(), (span / 2.0, span));
        }
        // A few that are always used; all others once in half an hour.
        "scan" => {
            traffic = Traffic::new(span, 24, &[6]);
            for model in 0..5 {
                traffic.by_chance(model, 33.0, all, 3.0);
            }
            traffic.every(1800.0, |traffic, at| {
                let mut at = at;
                for model in 5..24 {
                    traffic.asked.push((at, model, 2.0));
                    at += 8.0;
                }
            });
        }
        // Pipelines: whoever asks for the first asks for two more after it.
        "chains" => {
            traffic = Traffic::new(span, 12, &[8, 4, 6]);
            traffic.chains();
        }
        // People who come, ask some dozen times, and go.
        "sessions" => {
            traffic = Traffic::new(span, 16, &[4, 8, 12, 20]);
            for (model, rest) in (0..16).zip((0_u32..).map(|n| 1200.0 + 200.0 * f64::from(n))) {
                traffic.sessions(model, rest);
            }
        }
        // Timers: each minute, each five, up to each hour.
        "jobs" => {
            traffic = Traffic::new(span, 12, &[8, 4, 12]);
            let periods = [60.0, 300.0, 600.0, 900.0, 1800.0, 3600.0];
            for (model, period) in (0..12).zip(periods.into_iter().cycle()) {
                let first = traffic.draw.between(0.0, period);
                traffic.every(period, |traffic, at| {
                    let late = traffic.draw.between(0.0, 5.0);
                    let takes = traffic.draw.between(2.0, 10.0);
                    traffic.asked.push((at + first + late, model, takes));
                });
            }
        }
        // Small ones that load slowly beside large ones that load fast.
        "slow" => {
            traffic = Traffic::new(span, 14, &[2, 24]);
            traffic.loads = [40.0, 4.0].into_iter().cycle().take(14).collect();
            for model in 0..14 {
                traffic.by_chance(model, 100.0, all, 4.0);
            }
        }
        other => panic!("no such traffic: {other}"),
    }
    traffic.workload()
}

impl Traffic {
    fn chains(&mut self) {
        let mut at = self.draw.gap(30.0);
        while at < self.span {
            let skewed = self.draw.gap(1.2);
            let thresholds = [3.0, 2.0, 1.0].iter();
            let chain = thresholds.filter(|least| skewed >= **least).count();
            for (part, later) in [0.0, 4.0, 8.0].into_iter().enumerate() {
                self.asked.push((at + later, chain * 3 + part, 3.0));
            }
            at += self.draw.gap(30.0);
        }
    }

    /// Some dozen requests for a model, and so many seconds until the next come.
    fn sessions(&mut self, model: usize, rest: f64) {
        let mut at = self.draw.gap(rest);
        while at < self.span {
            let end = at + self.draw.gap(90.0);
            while at < end.min(self.span) {
                let takes = self.draw.between(1.0, 8.0);
                self.asked.push((at, model, takes));
                at += self.draw.gap(6.0);
            }
            at += self.draw.gap(rest);
        }
    }

    fn every(&mut self, period: f64, mut ask: impl FnMut(&mut Self, f64)) {
        let mut at = 0.0;
        while at + period <= self.span {
            ask(self, at);
            at += period;
        }
    }
}
