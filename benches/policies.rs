//! `cost` against `lru` on traffic of several kinds, under a virtual clock: the
//! figures are the same on every machine.

use residentd::model::{Bytes, EvictionPolicy};
use residentd::simulate::{self, Memory, Mode, Rules, Workload};

use crate::print;
use crate::traffic::{self, KINDS};

/// Parts of all models' memory that there is room for, in hundredths.
const ROOM_PERCENT: [u64; 4] = [35, 50, 65, 80];
const HOURS: u32 = 8;

fn mean_wait(workload: &Workload, eviction: EvictionPolicy, limit: Bytes) -> f64 {
    let rules = Rules {
        eviction,
        patience: Some(std::time::Duration::from_secs(5)),
    };
    simulate::run(workload, Memory::Gpu, Mode::Timed, rules, limit)
        .waits
        .mean
}

/// Mean waits with `cost` over those with `lru`.
pub(crate) fn waits() {
    for kind in KINDS {
        let workload = traffic::of(kind, HOURS);
        for percent in ROOM_PERCENT {
            let limit = workload.total().percent(percent).max(workload.largest());
            let cost = mean_wait(&workload, EvictionPolicy::Cost, limit);
            let lru = mean_wait(&workload, EvictionPolicy::Lru, limit);
            print(&format!("cost-wait-{kind}-{percent}"), cost, lru, "s");
        }
    }
}
