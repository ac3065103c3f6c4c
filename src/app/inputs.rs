//! What the configuration means for the policy, with what it leaves open
//! filled in from the machine.

use std::collections::BTreeMap;

use crate::config::{self, Config, LimitOrigin};
use crate::control::LimitSource;
use crate::memory::HostReading;
use crate::model::{Bytes, DeviceRef, Domain};
use crate::policy::{Settings, Threshold};
use crate::store::Store;

/// Share of what is available at start that workers get when no limit is set.
const DEFAULT_LIMIT_PERCENT: u64 = 80;
/// The default reserve is this share of the host, and at least
/// [`LEAST_RESERVE`].
const RESERVE_PERCENT: u64 = 5;
/// See [`RESERVE_PERCENT`].
const LEAST_RESERVE: Bytes = Bytes::mib(512);

/// What holds where nothing is configured: found once, at the start, since
/// what is available later is less what workers took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    limit: (Bytes, LimitSource),
    reserve: Bytes,
}

impl Defaults {
    /// Takes them from the machine as it is now, where workers that are taken back
    /// hold `held`: what is available without them is the same at every start.
    pub(super) fn of(host: &HostReading, held: Bytes) -> Self {
        let headroom = (host.headroom + held).min(host.domain_total());
        let by_cgroup = host.headroom < host.available;
        let source = if by_cgroup {
            LimitSource::Cgroup
        } else {
            LimitSource::Default
        };
        let reserve = host.domain_total().percent(RESERVE_PERCENT);
        Self {
            limit: (headroom.percent(DEFAULT_LIMIT_PERCENT), source),
            reserve: reserve.max(LEAST_RESERVE),
        }
    }

    /// Returns what the policy is set to, and who set the limit on host RAM.
    pub(super) fn settings(&self, config: &Config, store: &Store) -> (Settings, LimitSource) {
        let (limit, source) = self.limit(config, store);
        let settings = Settings {
            limit,
            reserve: config.memory.reserve.unwrap_or(self.reserve),
            gpu_limits: gpu_limits(config, store),
            soft: threshold(config.pressure.soft),
            hard: threshold(config.pressure.hard),
            auto_cleanup: config.memory.auto_cleanup,
            eviction: config.memory.policy,
            patience: config.memory.patience,
            emergency: config.pressure.emergency,
            drain_timeout: config.server.shutdown_grace,
        };
        (settings, source)
    }

    /// The limit on host RAM and who set it: kept by an operator, else
    /// configured, else a share of what was available.
    fn limit(&self, config: &Config, store: &Store) -> (Bytes, LimitSource) {
        if let Some(kept) = store.limit(Domain::Host) {
            return (kept, LimitSource::Api);
        }
        match config.memory.limit {
            Some((limit, LimitOrigin::Config)) => (limit, LimitSource::Config),
            Some((limit, LimitOrigin::Env)) => (limit, LimitSource::Env),
            None => self.limit,
        }
    }
}

/// Limits on GPUs: kept by an operator, else configured.
fn gpu_limits(config: &Config, store: &Store) -> BTreeMap<DeviceRef, Bytes> {
    let mut limits = config.gpu_limits.clone();
    limits.extend(
        store
            .gpu_limits()
            .map(|(index, limit)| (DeviceRef::Index(index), limit)),
    );
    limits
}

fn threshold(threshold: config::Threshold) -> Threshold {
    match threshold {
        config::Threshold::Percent(percent) => Threshold::Percent(u64::from(percent)),
        config::Threshold::Size(bytes) => Threshold::Size(bytes),
    }
}
