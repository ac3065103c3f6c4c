//! Is a ready worker still of use? Watches it until it is not.
//!
//! Three things tell. A probe, its `ready` check, is asked when nothing was
//! heard from the worker for a while, or a request could not connect. Requests
//! that wait for it while its processes do nothing say that it hangs, whatever
//! its probe answers. And a row of errors says that it serves nobody.
//!
//! A worker that is busy may be slow to answer a probe, and one that serves a
//! request at a time cannot answer at all: a probe that nobody answers does not
//! count while requests are inside and the worker computes, or is held up by a
//! slow client.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::listener::{self, Owner};
use super::probe::{self, Answer};
use crate::clock::{Clock, Timestamp};
use crate::gate::{Pulse, PulseReading};
use crate::model::{Ailment, Live, ModelSpec, Upstream, WorkerId};
use crate::procfs::{Effort, ProcessKey, ProcessTree};

/// A worker whose probe failed is asked again after this.
const AGAIN: Duration = Duration::from_secs(1);
/// Looks in the time after which a worker that stands still counts as hung.
const LOOKS: u32 = 4;
/// Processes stand still that compute for less than this share of the time:
/// the loops of idle servers and the answers to probes stay under it.
const STILL_SHARE: u32 = 100;
/// And this much on top, since the kernel counts in ticks of 10 ms.
const STILL_TICK: Duration = Duration::from_millis(15);
/// Or wait for the disk this often: weights that are read as they are used.
const STILL_FAULTS: u64 = 32;

/// The worker that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) worker: WorkerId,
    pub(super) spec: Arc<ModelSpec>,
    pub(super) upstream: Upstream,
    pub(super) tree: Arc<ProcessTree>,
    pub(super) pulse: Arc<Pulse>,
}

impl Watched {
    /// Watches it and returns what is wrong with it, if something ever is.
    pub(super) async fn ails(self, clock: Clock) -> Ailment {
        let mut judge = Judge::new(self.spec.live, clock.now());
        let mut pause = judge.first_pause(&self.worker);
        loop {
            tokio::select! {
                () = self.pulse.alarmed() => {}
                () = tokio::time::sleep(pause) => {}
            }
            let seen = self.see(clock);
            if seen.pulse.waiting > 0 && judge.is_local.is_none() {
                let owner = listener::owner(&self.upstream, &self.tree);
                judge.is_local = Some(owner == Owner::Ours);
            }
            let wants_probe = judge.wants_probe(&seen);
            if let Some(ailment) = judge.look(&seen) {
                return ailment;
            }
            if wants_probe {
                let asked = probe::ask(&self.spec.ready, &self.upstream, self.spec.live.timeout);
                let answer = asked.await;
                if answer != Answer::Passes {
                    debug!(worker = %self.worker, ?answer, "a probe of a ready worker failed");
                }
                if let Some(ailment) = judge.probed(answer, &seen, &self.see(clock)) {
                    return ailment;
                }
            }
            pause = judge.pause();
        }
    }

    fn see(&self, clock: Clock) -> Seen {
        let known = self.tree.known().into_iter();
        Seen {
            at: clock.now(),
            pulse: self.pulse.read(),
            efforts: known
                .filter_map(|process| Some((process, Effort::read(process)?)))
                .collect(),
            leader: self.tree.leader(),
        }
    }
}

/// One look at the worker.
#[derive(Clone, Debug)]
struct Seen {
    at: Timestamp,
    pulse: PulseReading,
    efforts: BTreeMap<ProcessKey, Effort>,
    leader: ProcessKey,
}

impl Seen {
    /// What the processes did since an earlier look. Of those that are gone
    /// nothing is known.
    fn since(&self, earlier: &Self) -> Effort {
        let mut all = Effort {
            cpu: Duration::ZERO,
            major_faults: 0,
            state: self.state(),
        };
        for (process, effort) in &self.efforts {
            let before = earlier.efforts.get(process);
            let (cpu, faults) = before.map_or((Duration::ZERO, 0), |b| (b.cpu, b.major_faults));
            all.cpu += effort.cpu.saturating_sub(cpu);
            all.major_faults += effort.major_faults.saturating_sub(faults);
        }
        all
    }

    fn state(&self) -> char {
        self.efforts.get(&self.leader).map_or('?', |e| e.state)
    }

    /// Whether the processes did something since an earlier look, or would if
    /// the machine let them.
    fn moved(&self, earlier: &Self) -> bool {
        if self.efforts.values().any(|effort| effort.state == 'R') {
            return true;
        }
        let effort = self.since(earlier);
        let still = self.at.since(earlier.at) / STILL_SHARE + STILL_TICK;
        effort.cpu > still || effort.major_faults >= STILL_FAULTS
    }
}

/// Requests wait and hear nothing.
#[derive(Debug)]
struct Silence {
    /// Since then.
    since: Timestamp,
    /// And since this look the processes did nothing.
    still: Seen,
    /// The last look.
    last: Seen,
}

/// Probes that failed in a row.
#[derive(Debug)]
struct Failing {
    since: Timestamp,
    times: u32,
}

/// Judges what is seen and answered; asks nobody itself.
#[derive(Debug)]
struct Judge {
    live: Live,
    /// Whether the worker's own processes answer requests, as far as that was
    /// looked at: those of a container do not, and say nothing by standing
    /// still.
    is_local: Option<bool>,
    silence: Option<Silence>,
    failing: Option<Failing>,
    /// As of the last look.
    pulse: PulseReading,
    /// When the worker was last heard of, by a request or by a probe.
    told_at: Timestamp,
}

impl Judge {
    fn new(live: Live, now: Timestamp) -> Self {
        Self {
            live,
            is_local: None,
            silence: None,
            failing: None,
            pulse: PulseReading::default(),
            told_at: now,
        }
    }

    /// Spreads the looks at workers that became ready together, by their
    /// names.
    fn first_pause(&self, worker: &WorkerId) -> Duration {
        let bytes = worker.model.as_str().bytes();
        let seed = bytes.fold(worker.generation, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let percent = u32::try_from(seed % 100).unwrap_or(0);
        let pause = self.pause();
        pause / 2 + pause.saturating_mul(percent) / 100
    }

    fn pause(&self) -> Duration {
        let Live {
            probe,
            still,
            silent,
            ..
        } = self.live;
        let pauses = [probe, still / LOOKS, silent / LOOKS];
        let pause = pauses.into_iter().filter(|pause| !pause.is_zero()).min();
        // With every check off only an alarm is waited for.
        let pause = pause.unwrap_or(Duration::MAX / 4);
        match self.failing {
            Some(_) => pause.min(AGAIN),
            None => pause,
        }
    }

    /// Returns whether a probe has to tell. Asked before [`Judge::look`].
    fn wants_probe(&self, seen: &Seen) -> bool {
        let quiet = seen.pulse.heard == self.pulse.heard;
        // A look comes a little early when the last probe took its time.
        let due = seen.at.since(self.told_at) >= self.live.probe * 3 / 4;
        let regular = !self.live.probe.is_zero() && quiet && due;
        let refused = seen.pulse.refused != self.pulse.refused;
        self.failing.is_some() || refused || regular
    }

    /// Judges what requests and processes show.
    fn look(&mut self, seen: &Seen) -> Option<Ailment> {
        let pulse = &seen.pulse;
        let heard = pulse.heard != self.pulse.heard;
        self.pulse = *pulse;
        if self.live.errors > 0 && pulse.errors >= self.live.errors {
            return Some(Ailment::Errors {
                times: pulse.errors,
                status: pulse.error_status,
            });
        }
        if heard {
            self.told_at = seen.at;
        }
        if heard || pulse.waiting == 0 {
            self.silence = None;
        }
        if pulse.waiting == 0 {
            return None;
        }
        let silence = self.silence.get_or_insert_with(|| Silence {
            since: seen.at,
            still: seen.clone(),
            last: seen.clone(),
        });
        // Who stands still because a client does not read is not to blame, and
        // nothing is known of processes that are elsewhere.
        let held_up = pulse.inside > pulse.waiting || self.is_local != Some(true);
        let traced = seen.state() == 't';
        if held_up || traced || seen.moved(&silence.last) {
            silence.still = seen.clone();
        }
        silence.last = seen.clone();
        let silent = seen.at.since(silence.since);
        let still = seen.at.since(silence.still.at);
        if !self.live.still.is_zero() && still >= self.live.still {
            return Some(Ailment::Still {
                waiting: pulse.waiting,
                silent,
                still,
                cpu: seen.since(&silence.still).cpu,
            });
        }
        let too_long = !self.live.silent.is_zero() && silent >= self.live.silent;
        too_long.then_some(Ailment::Silent {
            waiting: pulse.waiting,
            silent,
        })
    }

    /// Judges what a probe was answered, with a look before and one after it.
    fn probed(&mut self, answer: Answer, before: &Seen, after: &Seen) -> Option<Ailment> {
        self.told_at = after.at;
        if !self.counts(answer, before, after) {
            if answer == Answer::Passes || after.pulse.heard != before.pulse.heard {
                self.failing = None;
            }
            return None;
        }
        let failing = self.failing.get_or_insert(Failing {
            since: before.at,
            times: 0,
        });
        failing.times += 1;
        if failing.times < self.live.failures {
            return None;
        }
        let (times, over) = (failing.times, after.at.since(failing.since));
        Some(match answer {
            Answer::Refused => Ailment::Refuses { times, over },
            Answer::Status(status) => Ailment::WrongStatus {
                times,
                over,
                status,
            },
            Answer::Passes | Answer::Nothing if after.state() == 'T' => {
                Ailment::Stopped { times, over }
            }
            Answer::Passes | Answer::Nothing => Ailment::NoAnswer { times, over },
        })
    }

    /// Returns whether the answer speaks against the worker.
    fn counts(&self, answer: Answer, before: &Seen, after: &Seen) -> bool {
        let (pulse, state) = (&after.pulse, after.state());
        match answer {
            Answer::Passes => false,
            Answer::Refused => true,
            // Engines say so when no place is free.
            Answer::Status(429 | 503) => pulse.inside == 0,
            Answer::Status(_) => true,
            // Stopped by a signal it is never busy; by a debugger it is looked at.
            Answer::Nothing if state == 'T' => true,
            Answer::Nothing if state == 't' => false,
            Answer::Nothing => {
                let heard = pulse.heard != before.pulse.heard;
                let held_up = pulse.inside > pulse.waiting;
                let busy = pulse.waiting > 0 && after.moved(before);
                !(heard || held_up || busy)
            }
        }
    }
}

#[cfg(test)]
mod tests;
