//! Parks on the virtual machine: a parked worker holds nothing of a GPU, and in
//! host RAM what it held of GPUs besides its own.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use super::{Happening, Machine, Worker};
use crate::model::{Bytes, Domain, WorkerId};
use crate::policy::{Event, EvictReason};

/// A park, and an unpark, take this part of a load: measured on engines that
/// can, a load takes 20 to 200 times as long.
const SHARE_OF_LOAD: u32 = 20;

impl Machine {
    pub(super) fn park(&mut self, id: WorkerId, reason: &EvictReason) -> Option<Event> {
        let inside = self.inside(&id);
        if inside > 0 {
            self.tell(&id, || format!("is busy and stays, {inside} inside"));
            return Some(Event::EvictRefused { worker: id, inside });
        }
        self.tell(&id, || format!("is told to park: {reason}"));
        self.close(&id);
        let time = self.moving(&id);
        self.after(time, Happening::Parked(id));
        None
    }

    pub(super) fn unpark(&mut self, id: WorkerId) {
        self.tell(&id, || "is told to leave its park".to_owned());
        let time = self.moving(&id);
        self.after(time, Happening::Unparked(id));
    }

    fn moving(&self, id: &WorkerId) -> Duration {
        self.programs[&id.model].load / SHARE_OF_LOAD
    }

    pub(super) fn parked(&mut self, id: &WorkerId) {
        let Some(worker) = self.worker(id).filter(|worker| !worker.ending) else {
            return;
        };
        worker.parked = true;
        self.tell(id, || "is parked".to_owned());
        self.feed(Event::Parked { worker: id.clone() });
        self.measure();
    }

    pub(super) fn unparked(&mut self, id: &WorkerId) {
        let Some(worker) = self.worker(id).filter(|worker| !worker.ending) else {
            return;
        };
        worker.parked = false;
        worker.open = true;
        self.tell(id, || "is ready again".to_owned());
        self.feed(Event::Unparked { worker: id.clone() });
        self.measure();
    }

    /// Returns what a worker holds that was ready once.
    pub(super) fn held(&self, worker: &Worker) -> Cow<'_, BTreeMap<Domain, Bytes>> {
        let holds = &self.programs[&worker.id.model].holds;
        if !worker.parked {
            return Cow::Borrowed(holds);
        }
        let vram = holds.iter().filter(|(domain, _)| match domain {
            Domain::Host => false,
            Domain::Gpu(index) => worker.gpus.contains(index),
        });
        let moved: Bytes = vram.map(|(_, bytes)| *bytes).sum();
        let host = holds.get(&Domain::Host).copied().unwrap_or_default();
        Cow::Owned(BTreeMap::from([(Domain::Host, host + moved)]))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::super::study::{Rules, settings};
    use super::super::{Fault, Outcome, Program};
    use super::*;
    use crate::model::{EvictionPolicy, GpuRequest, ModelSpec};
    use crate::policy::Phase;
    use crate::policy::testing::{name, park, spec};

    /// A machine with one GPU of 10 GiB and two models that take 6 of it each.
    fn machine(host: Bytes) -> Machine {
        let rules = Rules {
            eviction: EvictionPolicy::Lru,
            patience: Some(Duration::from_secs(5)),
        };
        let memory = [(Domain::Host, host), (Domain::Gpu(0), Bytes::gib(10))];
        let programs = ["a", "b"].map(|model| Program {
            spec: Arc::new(ModelSpec {
                gpus: GpuRequest::Count(1),
                vram: Some(Bytes::gib(6)),
                park: Some(park()),
                ..spec(model, Some(1024))
            }),
            holds: [
                (Domain::Host, Bytes::gib(1)),
                (Domain::Gpu(0), Bytes::gib(6)),
            ]
            .into(),
            load: Duration::from_secs(40),
            stop: Duration::from_secs(1),
            fault: Fault::None,
        });
        Machine::new(settings(rules, host), memory.into(), programs)
    }

    fn turns(machine: &mut Machine) -> Vec<Duration> {
        let patience = Duration::from_secs(300);
        let mut waits = Vec::new();
        for model in ["a", "b", "a", "b"] {
            let wish = machine.request(&name(model), Duration::from_secs(1), patience);
            machine.run_out();
            match machine.outcome(wish) {
                Outcome::Served { waited, .. } => waits.push(*waited),
                other => panic!("{model}: {other:?}"),
            }
        }
        waits
    }

    #[test]
    fn models_that_park_take_turns_for_a_twentieth_of_a_load() {
        let mut roomy = machine(Bytes::gib(16));
        let waits = turns(&mut roomy).into_iter().map(|wait| wait.as_secs());
        // A load; a park and a load; from then on a park and an unpark of 2 s.
        assert_eq!(waits.collect::<Vec<_>>(), [40, 42, 4, 4]);
        assert_eq!(roomy.spawned()[&name("a")], 1);
        assert_eq!(roomy.policy().models()["a"].phase, Phase::Parked);
    }

    #[test]
    fn without_host_ram_for_a_parked_one_each_turn_is_a_load() {
        let mut tight = machine(Bytes::gib(7));
        let waits = turns(&mut tight).into_iter().map(|wait| wait.as_secs());
        assert_eq!(waits.collect::<Vec<_>>(), [40, 41, 41, 41]);
        assert_eq!(tight.spawned()[&name("a")], 2);
    }
}
