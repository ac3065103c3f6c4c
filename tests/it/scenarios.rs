//! Stories on a virtual machine: see `tests/scenarios/README.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use residentd::clock::Timestamp;
use residentd::config::units;
use residentd::model::{
    Bytes, DeviceRef, Domain, EvictionPolicy, GpuRequest, ModelName, ModelSpec,
};
use residentd::policy::{Phase, Settings, Threshold};
use residentd::simulate::{Fault, Machine, Outcome, Program, Wish};
use serde::{Deserialize, Deserializer};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Story {
    title: String,
    #[serde(deserialize_with = "size")]
    limit: Bytes,
    #[serde(default = "lru")]
    policy: String,
    #[serde(default)]
    gpu: bool,
    #[serde(default, deserialize_with = "some_time")]
    gives_up: Option<Duration>,
    models: BTreeMap<String, Model>,
    steps: Vec<Step>,
    expect: Expect,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    #[serde(deserialize_with = "size")]
    memory: Bytes,
    #[serde(deserialize_with = "time")]
    load: Duration,
    #[serde(default, deserialize_with = "time")]
    stop: Duration,
    #[serde(default)]
    pinned: bool,
    #[serde(default)]
    preload: bool,
    #[serde(default, deserialize_with = "some_time")]
    idle_timeout: Option<Duration>,
    #[serde(default, deserialize_with = "some_time")]
    start_timeout: Option<Duration>,
    fault: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    #[serde(deserialize_with = "time")]
    at: Duration,
    request: Option<String>,
    load: Option<String>,
    unload: Option<String>,
    kill: Option<String>,
    pin: Option<String>,
    unpin: Option<String>,
    heal: Option<String>,
    leave: Option<String>,
    limit: Option<String>,
    #[serde(default, deserialize_with = "time")]
    lasts: Duration,
    #[serde(rename = "as")]
    name: Option<String>,
    #[serde(default, deserialize_with = "some_time")]
    every: Option<Duration>,
    #[serde(default, deserialize_with = "time")]
    until: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    answers: BTreeMap<String, String>,
    #[serde(default)]
    waits: BTreeMap<String, String>,
    loads: BTreeMap<String, u64>,
    ready: BTreeSet<String>,
}

fn lru() -> String {
    "lru".into()
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    units::duration(&text).map_err(serde::de::Error::custom)
}

fn some_time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    time(from).map(Some)
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
    let text = String::deserialize(from)?;
    units::size(&text).map_err(serde::de::Error::custom)
}

fn name(text: &str) -> ModelName {
    ModelName::new(text).expect("a good name")
}

impl Story {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).expect("the story is readable");
        let mut story: Self =
            toml::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let steps = std::mem::take(&mut story.steps);
        story.steps = steps.into_iter().flat_map(Step::repeated).collect();
        story.steps.sort_by_key(|step| step.at);
        story
    }

    fn domain(&self) -> Domain {
        match self.gpu {
            true => Domain::Gpu(0),
            false => Domain::Host,
        }
    }

    fn machine(&self) -> Machine {
        let settings = Settings {
            limit: self.limit,
            reserve: Bytes::ZERO,
            gpu_limits: BTreeMap::new(),
            soft: Threshold::Size(Bytes::ZERO),
            hard: Threshold::Size(Bytes::ZERO),
            auto_cleanup: true,
            emergency: true,
            eviction: EvictionPolicy::from_name(&self.policy).expect("a policy"),
            patience: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(30),
        };
        let memory = BTreeMap::from([(Domain::Host, Bytes::MAX), (self.domain(), self.limit)]);
        let programs = self
            .models
            .iter()
            .map(|(text, model)| self.program(text, model));
        let mut machine = Machine::new(settings, memory, programs);
        machine.keep_journal();
        machine
    }

    fn program(&self, text: &str, model: &Model) -> Program {
        let mut spec = ModelSpec::plain(name(text), Vec::new());
        spec.pinned = model.pinned;
        spec.preload = model.preload;
        spec.idle_timeout = model.idle_timeout;
        spec.start_timeout = model.start_timeout.unwrap_or(spec.start_timeout);
        spec.memory = Some(model.memory);
        if self.gpu {
            spec.memory = Some(Bytes::ZERO);
            spec.vram = Some(model.memory);
            spec.gpus = GpuRequest::These(vec![DeviceRef::Index(0)]);
        }
        Program {
            spec: Arc::new(spec),
            holds: BTreeMap::from([(self.domain(), model.memory)]),
            load: model.load,
            stop: model.stop,
            fault: match model.fault.as_deref() {
                None => Fault::None,
                Some("exits") => Fault::Exits,
                Some("hangs") => Fault::Hangs,
                Some(other) => panic!("{text}: no such fault: {other}"),
            },
        }
    }
}

impl Step {
    fn repeated(self) -> Vec<Self> {
        let Some(every) = self.every else {
            return vec![self];
        };
        let mut all = Vec::new();
        let mut at = self.at;
        while at <= self.until {
            all.push(Self {
                at,
                request: self.request.clone(),
                name: self.name.clone(),
                every: None,
                ..self.only_request()
            });
            at += every;
        }
        all
    }

    /// Only requests are repeated.
    fn only_request(&self) -> Self {
        Self {
            at: self.at,
            request: None,
            load: None,
            unload: None,
            kill: None,
            pin: None,
            unpin: None,
            heal: None,
            leave: None,
            limit: None,
            lasts: self.lasts,
            name: None,
            every: None,
            until: Duration::ZERO,
        }
    }

    /// Does it, and returns whoever is to be answered.
    fn act(
        &self,
        story: &Story,
        machine: &mut Machine,
        known: &BTreeMap<String, Vec<Wish>>,
    ) -> Option<Wish> {
        let gives_up = story.gives_up.unwrap_or(Duration::from_secs(60));
        if let Some(model) = &self.request {
            return Some(machine.request(&name(model), self.lasts, gives_up));
        }
        if let Some(model) = &self.load {
            return Some(machine.load(&name(model), gives_up));
        }
        if let Some(model) = &self.unload {
            return Some(machine.unload(&name(model)));
        }
        if let Some(model) = &self.kill {
            machine.kill(&name(model));
        } else if let Some(model) = &self.pin {
            machine.pin(&name(model), true);
        } else if let Some(model) = &self.unpin {
            machine.pin(&name(model), false);
        } else if let Some(model) = &self.heal {
            machine.set_fault(&name(model), Fault::None);
        } else if let Some(who) = &self.leave {
            for wish in &known[who] {
                machine.leave(*wish);
            }
        } else if let Some(limit) = &self.limit {
            let limit = units::size(limit).expect("a size");
            machine.limit(story.domain(), limit);
        } else {
            panic!("a step at {:?} does nothing", self.at);
        }
        None
    }
}

fn answer(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Waiting => "waiting".into(),
        Outcome::Served { .. } => "served".into(),
        Outcome::Cut => "cut".into(),
        Outcome::Done => "done".into(),
        Outcome::Left => "left".into(),
        Outcome::Refused(refusal) => format!("refused {}", refusal.code()),
    }
}

/// Plays a story, holds what it expects, and returns all that happened.
fn play(story: &Story) -> String {
    let mut machine = story.machine();
    let mut known = BTreeMap::<String, Vec<Wish>>::new();
    for step in &story.steps {
        machine.run_until(Timestamp::from_start(step.at));
        let wish = step.act(story, &mut machine, &known);
        if let (Some(name), Some(wish)) = (&step.name, wish) {
            known.entry(name.clone()).or_default().push(wish);
        }
    }
    machine.run_out();
    let journal: Vec<_> = machine.journal().iter().map(ToString::to_string).collect();
    let journal = journal.join("\n");
    for (who, wanted) in &story.expect.answers {
        for wish in &known[who] {
            let got = answer(machine.outcome(*wish));
            assert_eq!(got, *wanted, "{who}, {wish}:\n{journal}");
        }
    }
    for (who, most) in &story.expect.waits {
        let most = units::duration(most).expect("a duration");
        for wish in &known[who] {
            if let Outcome::Served { waited, .. } = machine.outcome(*wish) {
                assert!(
                    *waited <= most,
                    "{who}, {wish} waited {waited:?}:\n{journal}"
                );
            }
        }
    }
    for (model, wanted) in &story.expect.loads {
        let loads = machine.spawned().get(model.as_str()).copied().unwrap_or(0);
        assert_eq!(loads, *wanted, "loads of {model}:\n{journal}");
    }
    let ready = machine.policy().models().values();
    let ready: BTreeSet<_> = ready
        .filter(|model| model.phase == Phase::Ready)
        .map(|model| model.name().to_string())
        .collect();
    assert_eq!(ready, story.expect.ready, "ready at the end:\n{journal}");
    format!("{}\n\n{journal}\n", story.title)
}

#[test]
fn every_story_ends_as_it_must() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut paths: Vec<_> = std::fs::read_dir(&folder)
        .expect("the folder is there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 17, "only {} stories", paths.len());
    for path in paths {
        let name = path.file_stem().expect("a name").to_string_lossy();
        insta::assert_snapshot!(name.as_ref(), play(&Story::read(&path)));
    }
}
