//! `cost` against `lru` on traffic of several kinds, under a virtual clock. A
//! longer day and more limits are in the benches.

use std::time::Duration;

use residentd::model::EvictionPolicy;
use residentd::simulate::{self, Figures, Memory, Mode, Rules, Workload};

use crate::traffic::{self, KINDS};

fn play(workload: &Workload, eviction: EvictionPolicy) -> Figures {
    let rules = Rules {
        eviction,
        patience: Some(Duration::from_secs(5)),
    };
    let limit = workload.total().percent(50).max(workload.largest());
    simulate::run(workload, Memory::Gpu, Mode::Timed, rules, limit)
}

#[test]
fn a21_cost_waits_no_longer_than_lru_whatever_the_kind_of_traffic() {
    let mut ratios = Vec::new();
    for kind in KINDS {
        let workload = traffic::of(kind, 3);
        let lru = play(&workload, EvictionPolicy::Lru);
        let cost = play(&workload, EvictionPolicy::Cost);
        assert_eq!((lru.refused, cost.refused), (0, 0), "{kind}");
        assert!(lru.loads > 24, "{kind} needs choices: {lru:?}");
        ratios.push((kind, cost.waits.mean / lru.waits.mean));
    }
    // What is known of each kind in three hours is little, and so is the sample.
    for (kind, ratio) in &ratios {
        assert!(*ratio < 1.1, "{kind}: {ratios:?}");
    }
    let log_mean = ratios.iter().map(|(_, ratio)| ratio.ln()).sum::<f64>();
    let typical = (log_mean / f64::from(u32::try_from(ratios.len()).expect("a few"))).exp();
    assert!(typical < 0.95, "{typical}: {ratios:?}");
}
