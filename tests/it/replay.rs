//! A slice of a recorded trace, fifty times as fast, against real workers; and
//! what was served then, simulated.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use residentd::clock::Timestamp;
use residentd::model::{Bytes, EvictionPolicy};
use residentd::simulate::{self, Demand, Memory, Mode, ModelFacts, Rules, Workload};
use serde_json::json;

use crate::simulate::traces;
use crate::support::residentd::STUB;
use crate::support::{Residentd, now, pause, request};

/// How much faster than recorded.
const SPEED: u32 = 50;
/// A part of the record in which models change often.
const FROM: Timestamp = Timestamp::from_millis(11 * 3600 * 1000);
const SPAN: Duration = Duration::from_secs(15 * 60);
/// Bytes here for one recorded: a GiB becomes 4 MiB.
const SHRINK: u64 = 256;
/// What a worker that holds nothing has, at most.
const BASE: Bytes = Bytes::mib(12);
/// In the midst of a range (340 to 353 MiB) in which some MiB more or less, as of
/// the pages that workers share, change no count.
const LIMIT: Bytes = Bytes::mib(346);

/// The slice, small and fast.
fn slice() -> (Vec<ModelFacts>, Vec<Demand>) {
    let models = simulate::read_models(&traces().join("servegen-24m-48h-models.csv"));
    let demands = simulate::read_trace(&traces().join("servegen-24m-48h.csv"));
    let within = |demand: &Demand| demand.at >= FROM && demand.at.since(FROM) < SPAN;
    let models = models.expect("a good table").into_iter().map(|facts| {
        let size = Bytes(facts.size.get() / SHRINK) + BASE;
        ModelFacts::new(facts.name().clone(), size, facts.load / SPEED)
    });
    let demands = demands.expect("a good trace").into_iter();
    let demands = demands.filter(within).map(|demand| Demand {
        at: Timestamp::from_start(demand.at.since(FROM) / SPEED),
        duration: demand.duration / SPEED,
        ..demand
    });
    (models.collect(), demands.collect())
}

fn config(models: &[ModelFacts]) -> String {
    let mut config = format!(
        "[memory]\nlimit = \"{}B\"\nreserve = \"16MiB\"\npatience = \"100ms\"\n",
        LIMIT.get()
    );
    for facts in models {
        let (name, size) = (facts.name(), facts.size);
        let load = facts.load.as_millis();
        let anon = (size - BASE).get();
        config.push_str(&[
            format!("[models.{name}]\ncommand = [{STUB:?}, \"--port\", \"${{PORT}}\", \"--name\", \"{name}\","),
            format!(" \"--anon\", \"{anon}B\", \"--ready-after\", \"{load}ms\"]\n"),
            format!("memory = \"{}B\"\nqueue_timeout = \"120s\"\n", size.get()),
        ].concat());
    }
    config
}

#[test]
fn a21_a_replay_with_real_workers_loads_as_often_as_the_simulation() {
    let (models, demands) = slice();
    let log = [("RESIDENTD_ACCESS_LOG", "true")];
    let mut residentd = Residentd::start_with(&config(&models), &log);
    let address: Arc<str> = residentd.address().into();
    let start = now();
    let mut clients = Vec::new();
    for demand in demands {
        pause((start + demand.at.since_start()).saturating_duration_since(now()));
        let address = Arc::clone(&address);
        clients.push(std::thread::spawn(move || ask(&address, &demand)));
    }
    let asked = clients.len();
    for client in clients {
        client.join().expect("every request is answered");
    }
    let views: Vec<_> = models
        .iter()
        .map(|facts| residentd.model(facts.name().as_str()))
        .collect();
    let loads = views.iter().filter_map(|view| view["loads"].as_u64());
    let loads: Vec<u64> = loads.collect();
    let real: u64 = loads.iter().sum();
    // All workers run one program, whose pages count once for all of them.
    let shared = views
        .iter()
        .filter_map(|view| view["memory"]["file"].as_u64());
    let shared = Bytes(shared.min().expect("a worker is resident"));
    // A busy machine puts requests and loads off and draws them out: what is simulated
    // is when each really came and how long it and the loads really took.
    residentd.signal(Signal::SIGTERM);
    assert!(residentd.wait().success());
    let served = simulate::read_log([&*residentd.folder().join("state/access.jsonl")]);
    let served = served.expect("a good log");
    assert_eq!(served.len(), asked, "every request is in the log");
    let models = models.into_iter().zip(&views).map(|(facts, view)| {
        let took = view["last_load_seconds"].as_f64();
        let load = took.map_or(facts.load, Duration::from_secs_f64);
        ModelFacts { load, ..facts }
    });
    let simulated = simulate(models.collect(), served, shared);
    println!("FIGURE A21 {real} loads with real workers, {simulated} simulated");
    assert_eq!(real, simulated, "by model: {loads:?}, shared: {shared}");
}

/// Plays the slice. `shared` is in every worker's size, and counts once in the
/// limit: it is taken off every size, and off the limit twice, since whoever is
/// about to load is expected to need all of its own.
fn simulate(mut models: Vec<ModelFacts>, demands: Vec<Demand>, shared: Bytes) -> u64 {
    for facts in &mut models {
        facts.size -= shared;
    }
    let workload = Workload::new(models, demands).expect("every model is there");
    let limit = LIMIT - shared - shared;
    let rules = Rules {
        eviction: EvictionPolicy::Lru,
        patience: Some(Duration::from_millis(100)),
    };
    simulate::run(&workload, Memory::Host, Mode::Timed, rules, limit).loads
}

fn ask(address: &str, demand: &Demand) {
    let body = json!({
        "model": demand.model.as_str(),
        "prompt": "hello",
        "x_delay_ms": u64::try_from(demand.duration.as_millis()).expect("it fits"),
    });
    let answer = request(address, "POST", "/v1/completions", Some(&body.to_string()));
    let answer = answer.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
}
