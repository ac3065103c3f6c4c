//! A court in which models are parked and come back.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test names the moves it plays"
)]

use std::sync::Arc;

use super::super::testing::park;
use super::super::*;
use super::court::Court;
use super::{MODELS, Move};

impl Court {
    /// Gives host RAM room for parks, and lets every model park that runs on GPUs.
    pub(super) fn where_models_park(mut self) -> Self {
        self.higher = 3000;
        self.play(&Move::Limit(1000));
        for model in &MODELS[1..] {
            let state = self.world.policy.models.get_mut(*model);
            let state = state.expect("it is configured");
            let park = Some(park());
            state.spec = Arc::new(ModelSpec {
                park,
                ..(*state.spec).clone()
            });
        }
        self
    }

    /// Has a move meet a model that it concerns, where models park: else most
    /// moves would be of none, and few models would get as far as a park.
    pub(super) fn aim(&self, made: &Move) -> Move {
        let phases: &[Phase] = match made {
            Move::Ready(_) => &[Phase::Starting],
            Move::Moved(_) | Move::Pretends(_) | Move::ParkFails(_) => {
                &[Phase::Parking, Phase::Unparking]
            }
            Move::Exit(_) => &[Phase::Stopping],
            Move::Leave(_) => &[Phase::Ready, Phase::Draining],
            _ => &[],
        };
        let is_met = |m: &usize| {
            let model = &self.world.policy.models()[MODELS[*m]];
            let leaves = matches!(made, Move::Leave(_));
            phases.contains(&model.phase) && (!leaves || model.activity.inside > 0)
        };
        let from = match made {
            Move::Ready(m)
            | Move::Moved(m)
            | Move::Pretends(m)
            | Move::ParkFails(m)
            | Move::Exit(m)
            | Move::Leave(m) => *m,
            _ => return made.clone(),
        };
        let mut all = (0..MODELS.len()).map(|n| (from + n) % MODELS.len());
        let Some(m) = all.find(is_met) else {
            return Move::Measure;
        };
        match *made {
            Move::Ready(_) => Move::Ready(m),
            Move::Moved(_) => Move::Moved(m),
            Move::Pretends(_) => Move::Pretends(m),
            Move::ParkFails(_) => Move::ParkFails(m),
            Move::Exit(_) => Move::Exit(m),
            _ => Move::Leave(m),
        }
    }

    pub(super) fn judge_park(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Park { worker, .. } => {
                self.judge_generation(&worker);
                let model = &self.world.policy.models()[&worker.model];
                let may = model.spec.park.is_some() && !model.pinned;
                assert!(may, "{worker} parks");
                if std::mem::take(&mut self.race) {
                    let inside = self.world.inside.get_mut(&worker);
                    inside.expect("it was ready").inside += 1;
                }
                let inside = self.world.inside[&worker].inside;
                if inside > 0 {
                    return Some(Event::EvictRefused { worker, inside });
                }
                self.moving.insert(worker);
            }
            Effect::Parked { worker, .. } => {
                self.judge_generation(&worker);
                assert!(self.world.parked.contains(&worker), "{worker} pretends");
                self.moving.remove(&worker);
            }
            Effect::Unpark { worker, .. } => {
                self.judge_generation(&worker);
                self.judge_gpus(&worker, &self.world.placed[&worker]);
                self.moving.insert(worker);
                self.unparks += 1;
            }
            _ => unreachable!("it is about no park: {effect:?}"),
        }
        None
    }

    pub(super) fn play_park(&mut self, made: &Move) {
        let (Move::Moved(m) | Move::Pretends(m) | Move::ParkFails(m)) = *made else {
            return;
        };
        let worker = self.world.worker(MODELS[m]);
        let state = self.world.policy.models().get(MODELS[m]);
        let event = match (made, state.map_or(Phase::Stopped, |state| state.phase)) {
            (Move::Moved(_), Phase::Parking) => {
                self.world.parked.insert(worker.clone());
                Event::Parked { worker }
            }
            (Move::Moved(_), Phase::Unparking) => {
                self.world.parked.remove(&worker);
                self.moving.remove(&worker);
                Event::Unparked { worker }
            }
            (Move::Pretends(_), Phase::Parking) => Event::Parked { worker },
            (Move::ParkFails(_), Phase::Parking | Phase::Unparking) => Event::ParkFailed {
                worker,
                said: "POST /sleep answered 500".to_owned(),
            },
            _ => return,
        };
        self.step(event);
    }
}
