//! When two states of the world count as one.
//!
//! A key holds everything that decides what may come next, and leaves out what
//! only tells: numbers of tickets and generations, counters, texts. Times are
//! kept as what follows from them. That is exact, with three exceptions:
//!
//! - a **deadline** is kept in whole seconds from now. [`space`](super::space)
//!   lets time pass in such steps that none lies between two moves of the same
//!   second;
//! - of **recency** the order is kept, and the age in whole seconds where an
//!   idle timeout or `cost` looks at it. By `cost`, two states whose workers
//!   differ in worth by less than a second of idleness or of loading count as
//!   one;
//! - the **jitter** of a delay that begins later is drawn from a generation, so
//!   it may differ by a fifth.
//!
//! Every struct is taken apart by name: a field that is added has to be placed.

use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use super::super::failures::Failures;
use super::super::ledger::{Ledger, Reclaim};
use super::super::lifecycle::{ModelState, Waiter};
use super::super::patience::ALONE_PATIENCES;
use super::super::reuse::Reuse;
use super::super::*;
use super::court::Court;

/// Hashes twice, so that 128 bits tell states apart.
struct Digest {
    now: Timestamp,
    halves: [DefaultHasher; 2],
}

/// Returns the key of a state of the world, and of whatever else belongs to it.
pub(super) fn key(court: &Court, beside: impl Hash) -> u128 {
    let mut halves = [DefaultHasher::new(), DefaultHasher::new()];
    0_u8.hash(&mut halves[0]);
    1_u8.hash(&mut halves[1]);
    let mut digest = Digest {
        now: court.world.now,
        halves,
    };
    digest.add(beside);
    digest.court(court);
    let [high, low] = digest.halves.map(|half| u128::from(half.finish()));
    high << 64 | low
}

impl Write for Digest {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.add(text);
        Ok(())
    }
}

impl Digest {
    fn add(&mut self, part: impl Hash) {
        for half in &mut self.halves {
            part.hash(half);
        }
    }

    /// What has no hash is hashed as it is shown.
    fn shown(&mut self, part: impl fmt::Debug) {
        write!(self, "{part:?}").expect("hashing does not fail");
    }

    /// Seconds to a deadline, the one that has begun too; zero when it is over.
    fn deadline(&mut self, at: Timestamp) {
        let left = at.since(self.now);
        self.add(left.as_secs() + u64::from(left.subsec_nanos() > 0));
    }

    /// Seconds that have begun since.
    fn age(&mut self, since: Timestamp) {
        let second = |at: Timestamp| at.since_start().as_secs();
        self.add(second(self.now) - second(since));
    }

    fn court(&mut self, court: &Court) {
        let world = &court.world;
        let Policy {
            settings,
            models,
            ledger,
            levels,
            cleanups,
            shutdown,
            finished,
            blocked,
            patience_at,
            now: _,
            common,
            past_lives,
        } = &world.policy;
        assert!(cleanups.is_empty(), "cleanups are not explored");
        assert!(past_lives.is_empty(), "reloads are not explored");
        let by_cost = settings.eviction == EvictionPolicy::Cost;
        self.add((shutdown.is_some(), finished, blocked, court.race));
        for at in [*shutdown, *patience_at].into_iter().flatten() {
            self.deadline(at);
        }
        self.shown(levels);
        if by_cost {
            self.shown(common);
        }
        self.ledger(ledger, models);
        let mut line: Vec<_> = models.values().flat_map(|m| &m.queue).collect();
        line.sort_by_key(|w| (w.since, w.ticket));
        for state in models.values() {
            self.model(state, by_cost);
            if state.drains_for().is_some() {
                self.deadline(state.since + settings.patience * ALONE_PATIENCES);
            }
            for waiter in &state.queue {
                self.add(line.iter().position(|other| other == &waiter));
                self.waiter(waiter, settings.patience);
            }
            let worker = state.worker();
            self.add((
                court.live.get(state.name()) == Some(&state.generation),
                world.holding.contains(&worker),
                world.inside.get(&worker).map(|activity| activity.inside),
                court.draining.contains(&worker),
                world.placed.get(&worker).filter(|_| state.is_live()),
            ));
        }
        self.recency(court, by_cost);
        self.add(&world.late);
    }

    /// Who was used and asked for before whom, as the gates tell.
    fn recency(&mut self, court: &Court, by_cost: bool) {
        let seen = |m: &ModelState| {
            let gate = court.world.inside.get(&m.worker());
            *gate.unwrap_or(&m.activity)
        };
        let idle_since = |m: &ModelState| seen(m).last_left;
        let asked_since = |m: &ModelState| seen(m).last_entered;
        let models = court.world.policy.models().values();
        let mut live: Vec<_> = models.filter(|m| m.is_live()).collect();
        live.sort_by_key(|m| (idle_since(m), m.worker()));
        for model in live {
            self.add(model.name().as_str());
            if by_cost || model.spec.idle_timeout.is_some() {
                self.age(idle_since(model));
            }
        }
        let busy = court.world.policy.models().values();
        let mut busy: Vec<_> = busy.filter(|m| seen(m).inside > 0).collect();
        busy.sort_by_key(|m| (asked_since(m), m.worker()));
        for model in busy {
            self.add(model.name().as_str());
            if by_cost {
                self.age(asked_since(model));
            }
        }
    }

    fn model(&mut self, model: &ModelState, by_cost: bool) {
        let ModelState {
            spec,
            weights: _,
            pinned,
            generation: _,
            phase,
            since,
            queue,
            wanted,
            leaving,
            killed,
            drain_until,
            prefetches,
            reservation,
            usage,
            activity,
            unloading,
            footprint,
            life,
            served,
            weighed,
            failures,
            history,
            asked_at,
            reuse,
            outdated,
            removed,
            parking: _,
            adopted: _,
            loaded_at: _,
        } = model;
        assert!(!outdated && !removed, "reloads are not explored");
        assert!(spec.park.is_none(), "parks are not explored");
        assert!(!prefetches, "reading ahead is not explored");
        self.add((phase, pinned, queue.len(), wanted, killed, activity.inside));
        self.reason(leaving.as_ref());
        if let Some(at) = drain_until.filter(|_| *phase == Phase::Draining) {
            self.deadline(at);
        }
        if model.is_live() {
            self.shown((reservation, usage));
        }
        self.add((unloading.len(), asked_at.is_some()));
        if spec.memory.is_none() || (spec.gpus.count() > 0 && spec.vram.is_none()) {
            self.shown((footprint, life, served, weighed));
        }
        let Failures {
            recent,
            retry_at,
            last: _,
        } = failures;
        self.add(recent.len());
        if let Some(at) = retry_at.filter(|_| matches!(phase, Phase::Backoff | Phase::Failed)) {
            self.deadline(at);
        }
        let evicted = history.last_eviction.as_ref();
        self.reason(evicted.filter(|_| history.evicted).map(|(why, _)| why));
        if by_cost {
            let Reuse { own, load } = reuse;
            self.shown(own);
            self.add(load.as_secs());
            self.age(*since);
            self.age(asked_at.unwrap_or_default());
        }
    }

    fn reason(&mut self, reason: Option<&EvictReason>) {
        let Some(reason) = reason else {
            return self.add("");
        };
        self.add(reason.as_str());
        match reason {
            EvictReason::MakeRoom { for_model, .. } => self.add(for_model.as_str()),
            EvictReason::Idle { .. }
            | EvictReason::Unhealthy { .. }
            | EvictReason::Pressure { .. }
            | EvictReason::Ceiling { .. }
            | EvictReason::Cleanup
            | EvictReason::Unload
            | EvictReason::Changed
            | EvictReason::Removed
            | EvictReason::ParkFailed(_)
            | EvictReason::Shutdown => {}
        }
    }

    fn waiter(&mut self, waiter: &Waiter, patience: Duration) {
        let Waiter {
            ticket: _,
            since,
            deadline,
            wants_lease,
        } = waiter;
        self.add(wants_lease);
        self.deadline(*deadline);
        self.deadline(*since + patience);
    }

    fn ledger(&mut self, ledger: &Ledger, models: &BTreeMap<ModelName, ModelState>) {
        let Ledger {
            domains,
            gpus: _,
            gpu_limits: _,
            set_by_operator: _,
            counted_twice,
            measured_at,
            gpus_at: _,
            baselines,
            reclaims,
        } = ledger;
        for model in models.values() {
            self.add(measured_at >= &model.loaded_at);
        }
        let is_current = |worker: &WorkerId| models[&worker.model].generation == worker.generation;
        self.add(counted_twice.get());
        for (domain, books) in domains {
            self.shown((domain, books));
        }
        for ((worker, domain), before) in baselines {
            self.add((worker.model.as_str(), is_current(worker)));
            self.shown((domain, before));
        }
        for reclaim in reclaims {
            let Reclaim {
                worker,
                domain,
                held,
                charge,
                expected,
                before,
                reaped_at,
            } = reclaim;
            self.add((worker.model.as_str(), is_current(worker), held));
            self.add(measured_at >= reaped_at);
            self.shown((domain, charge, expected, before));
            self.deadline(reclaim.deadline());
        }
    }
}
