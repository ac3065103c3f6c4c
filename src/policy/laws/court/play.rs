//! What workers, clients, operators, neighbours and time do to the world.

use std::time::Duration;

use super::super::super::testing::name;
use super::super::super::*;
use super::super::{MODELS, Move};
use super::Court;
use crate::model::Ailment;

impl Court {
    pub(in super::super) fn measure(&mut self) {
        self.world.pass(Duration::from_millis(1));
        let held: u64 = self
            .world
            .holding
            .iter()
            .map(|w| self.world.on_host(w))
            .sum();
        let headroom = Bytes::gib(16) - Bytes::mib(held + self.neighbour);
        let measured = self.world.measured(headroom);
        self.step(Event::Measured(measured));
    }

    pub(in super::super) fn play(&mut self, made: &Move) {
        match *made {
            Move::Acquire(m) => {
                let ticket = self.ask(Some(MODELS[m]));
                let deadline = self.world.now + self.gives_up;
                self.step(Event::Acquire {
                    ticket,
                    model: name(MODELS[m]),
                    deadline,
                });
            }
            Move::Load(m) => {
                let ticket = self.ask(Some(MODELS[m]));
                let deadline = self.world.now + self.gives_up;
                self.step(Event::Load {
                    ticket,
                    model: name(MODELS[m]),
                    deadline,
                });
            }
            Move::Cancel(nth) => {
                let ticket = self.open().nth(nth);
                if let Some(ticket) = ticket {
                    self.left.insert(ticket);
                    self.step(Event::Cancel { ticket });
                }
            }
            Move::Unload(m) => {
                let ticket = self.ask(None);
                self.step(Event::Unload {
                    ticket,
                    model: name(MODELS[m]),
                });
            }
            Move::Pin(m, pinned) => self.step(Event::Pin {
                model: name(MODELS[m]),
                pinned,
            }),
            Move::Limit(mib) => self.step(Event::Limit {
                domain: Domain::Host,
                limit: Bytes::mib(mib + self.higher),
            }),
            Move::Configure(m, how) => self.reconfigure(m, how),
            Move::Cleanup(all, force) => {
                let ticket = self.ask(None);
                let order = CleanupOrder {
                    all,
                    force,
                    ..CleanupOrder::default()
                };
                let deadline = self.world.now + Duration::from_secs(30);
                self.step(Event::Cleanup {
                    ticket,
                    order,
                    deadline,
                });
            }
            Move::Unhealthy(m) => self.ail(m),
            _ => self.play_machine(made),
        }
    }

    fn ail(&mut self, m: usize) {
        let worker = self.world.worker(MODELS[m]);
        let why = Ailment::Errors {
            times: 20,
            status: 500,
        };
        self.step(Event::Unhealthy { worker, why });
    }

    /// What workers, neighbours and time do.
    fn play_machine(&mut self, made: &Move) {
        let phase = |court: &Self, m: usize| {
            let state = court.world.policy.models().get(MODELS[m]);
            state.map_or(Phase::Stopped, |state| state.phase)
        };
        match *made {
            Move::Ready(m) if phase(self, m) == Phase::Starting => {
                let worker = self.world.worker(MODELS[m]);
                self.world.holding.insert(worker.clone());
                self.moving.remove(&worker);
                let activity = Activity::opened(self.world.now);
                self.world.inside.insert(worker.clone(), activity);
                self.step(Event::Ready { worker });
            }
            Move::Moved(_) | Move::Pretends(_) | Move::ParkFails(_) => self.play_park(made),
            Move::NeverReady(m) if phase(self, m) == Phase::Starting => {
                let worker = self.world.worker(MODELS[m]);
                let after = Duration::from_secs(120);
                self.step(Event::NeverReady {
                    worker,
                    after,
                    last_lines: Vec::new(),
                });
            }
            Move::Exit(m) if self.live.contains_key(MODELS[m]) => {
                let worker = self.world.worker(MODELS[m]);
                self.live.remove(MODELS[m]);
                self.moving.remove(&worker);
                self.world.holding.remove(&worker);
                self.world.parked.remove(&worker);
                self.world.inside.remove(&worker);
                let status = "exit code 1".into();
                self.step(Event::Exited {
                    worker,
                    status,
                    out_of_memory: Vec::new(),
                    last_lines: Vec::new(),
                });
            }
            Move::Leave(m) => self.one_leaves(m),
            Move::Enter(m) if phase(self, m) == Phase::Ready => {
                let worker = self.world.worker(MODELS[m]);
                let model = &self.world.policy.models()[MODELS[m]];
                let inside = self.world.inside.get_mut(&worker);
                let inside = inside.expect("a ready worker has a gate");
                // Its gate is held while somebody waits for a place.
                let most = model
                    .spec
                    .concurrency
                    .filter(|most| inside.inside >= most.get());
                if most.is_none() && model.queue.is_empty() {
                    inside.inside += 1;
                    inside.last_entered = self.world.now;
                }
            }
            Move::Grow(m, mib) => {
                self.world.size.insert(name(MODELS[m]), mib);
            }
            Move::Neighbour(mib) => self.neighbour = mib.saturating_sub(3 * self.higher),
            Move::Late(gpu, mib) => {
                self.world.late.insert(gpu, mib);
            }
            Move::Pass(millis) => {
                self.world.pass(Duration::from_millis(millis));
                self.step(Event::Tick);
            }
            Move::Measure => self.measure(),
            Move::Race => self.race = true,
            _ => {}
        }
    }

    /// One request leaves a worker. The controller hears of it only where the
    /// policy wants to know, or where others wait for a place.
    fn one_leaves(&mut self, m: usize) {
        let worker = self.world.worker(MODELS[m]);
        let now = self.world.now;
        let gate = self.world.inside.get_mut(&worker);
        let Some(activity) = gate.filter(|activity| activity.inside > 0) else {
            return;
        };
        activity.inside -= 1;
        activity.last_left = now;
        let is_empty = activity.inside == 0;
        let policy = &self.world.policy;
        let model = policy.models().get(MODELS[m]);
        let is_held = model.is_some_and(|m| m.spec.concurrency.is_some() && !m.queue.is_empty());
        if is_held || is_empty && policy.awaits_idle() {
            self.step(Event::Tick);
        }
    }

    /// Lets everything run out, then every wish must have been answered.
    pub(in super::super) fn close(&mut self) {
        self.race = false;
        self.neighbour = 0;
        self.higher = 0;
        self.world.late.clear();
        let until = self.world.now;
        self.step(Event::Shutdown { until });
        for _ in 0..8 {
            for m in 0..MODELS.len() {
                self.play(&Move::Exit(m));
            }
            self.world.pass(Duration::from_secs(100));
            self.measure();
        }
        let open: Vec<_> = self.open().collect();
        assert!(open.is_empty(), "no answer for tickets {open:?}");
    }
}
