//! The end of residentd, and the next one: workers that ran well are taken back.

use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::deeds::Doer;
use crate::processes::Process;
use crate::site::{Blow, Site};
use crate::support::{pause, runs};

/// How long before the end nothing may have happened to a worker that must be
/// taken back.
const CALM: Duration = Duration::from_secs(1);
/// Workers younger than this may not have been written down.
const YOUNG: f64 = 1.0;
/// What was lost with residentd shows so long after the next one is there.
const SHOWS: Duration = Duration::from_millis(500);

/// Kills residentd, and starts the next one after this time.
pub(crate) fn kill(doer: &mut Doer<'_>, down: Duration) {
    let site = doer.site;
    let from = site.time();
    site.strike_until_healed(Blow::Down);
    let before = ready(site);
    doer.town.residentd.signal(Signal::SIGKILL);
    doer.town.residentd.wait();
    pause(down);
    let lived = well(doer, before, from);
    if down < Duration::from_millis(300) {
        // Some may be on their way out still.
        start(doer);
        return;
    }
    start(doer);
    check_taken(site, lived);
}

/// Checks that all of these were taken back.
fn check_taken(site: &Site, lived: Vec<(String, i64)>) {
    let taken = adopted(site);
    for (model, pid) in lived {
        site.count("workers that outlived residentd");
        if !taken
            .iter()
            .any(|(name, taken)| *name == model && *taken == pid)
        {
            site.fault(format!(
                "the worker {pid} of {model} ran well and was not taken back; these were: {taken:?}; it {}",
                if runs(pid) { "runs" } else { "is gone" }
            ));
        }
    }
}

/// Has another residentd take over. Nobody notices: there is no blow that would
/// excuse anything.
pub(crate) fn upgrade(doer: &mut Doer<'_>) {
    let site = doer.site;
    // One that is not valid would be refused, rightly.
    doer.mend_config();
    let from = site.time();
    let before = ready(site);
    let answer = site.ask("POST", "/api/v1/upgrade", None);
    let Some((status, answer)) = answer else {
        site.fault("an upgrade is not answered");
        return;
    };
    let pid = answer["data"]["pid"].as_u64();
    match (status, pid.and_then(|pid| u32::try_from(pid).ok())) {
        (200, Some(pid)) => {
            site.count("upgrades");
            doer.town.residentd.taken_over_by(pid);
            site.lives.fetch_add(1, Ordering::Relaxed);
            check_taken(site, well(doer, before, from));
            site.note(format!("residentd is {pid}"));
        }
        (409, _) if site.struck(None, &[Blow::Disk], (from, site.time())) => {
            site.count("upgrades refused for the disk");
        }
        _ => site.fault(format!("an upgrade is answered {status}: {answer}")),
    }
}

/// So many starts may be ended for want of memory.
const STARTS_WITHOUT_MEMORY: u32 = 20;
/// What is said of a start that SIGKILL ended.
const KILLED: &str = "residentd did not start (Ok(ExitStatus(unix_wait_status(9)))";

/// Has residentd end as it should, and starts the next one.
pub(crate) fn end(doer: &mut Doer<'_>) {
    let site = doer.site;
    site.strike(None, Blow::Draining, Duration::from_secs(15));
    site.strike_until_healed(Blow::Down);
    doer.town.residentd.signal(Signal::SIGTERM);
    let status = doer.town.residentd.wait();
    if status.code() != Some(0) {
        site.fault(format!("after SIGTERM residentd ended with {status:?}"));
    }
    let left = doer.processes();
    if !left.is_empty() {
        site.fault(format!("after SIGTERM there is left {left:?}"));
    }
    start(doer);
}

/// Starts the next residentd; on a disk that is full it may refuse, and says so.
fn start(doer: &mut Doer<'_>) {
    let site = doer.site;
    // One that is not valid would be refused, rightly.
    doer.mend_config();
    let mut started = doer.town.start_again();
    // While a worker takes all memory there is, the kernel may end one that starts:
    // it cannot ask to be spared before it runs. Whoever watches over it tries again.
    for _ in 0..STARTS_WITHOUT_MEMORY {
        let now = (site.time(), site.time());
        let killed = started.as_ref().err();
        let killed = killed.is_some_and(|why| why.starts_with(KILLED));
        if !killed || !site.struck(None, &[Blow::Memory], now) {
            break;
        }
        site.note("residentd was killed while it started");
        site.count("starts without memory");
        pause(Duration::from_millis(100));
        started = doer.town.start_again();
    }
    if let Err(why) = started {
        let tail = &why[why.len().saturating_sub(2000)..];
        let full = site.struck(None, &[Blow::Disk], (site.time(), site.time()));
        if !full || !(tail.contains("disk is full") || tail.contains("make it writable")) {
            site.fault(format!("residentd does not start: {tail}"));
        }
        site.note("residentd says that the disk is full");
        site.count("starts on a full disk");
        doer.free_disk();
        if let Err(why) = doer.town.start_again() {
            site.over.store(true, Ordering::Relaxed);
            site.fault(format!("residentd does not start any more: {why}"));
        }
    }
    site.lives.fetch_add(1, Ordering::Relaxed);
    site.moved_to(doer.town.residentd.address());
    site.heal(Blow::Down, SHOWS);
    site.note(format!("residentd is {}", doer.town.residentd.pid()));
}

/// Returns the models that are ready, with the pids of their workers.
fn ready(site: &Site) -> Vec<(String, i64)> {
    let models = site.models().unwrap_or_default();
    let ready = models.iter().filter(|model| model["phase"] == "ready");
    ready
        .filter_map(|model| Some((model["name"].as_str()?.to_owned(), model["pid"].as_i64()?)))
        .collect()
}

/// Returns those against which nothing speaks, since before this time.
fn well(doer: &Doer<'_>, workers: Vec<(String, i64)>, since: Duration) -> Vec<(String, i64)> {
    let all = doer.processes();
    let is_well = |(model, pid): &(String, i64)| {
        let process = all.iter().find(|process| process.pid == *pid);
        process.is_some_and(|process| is_well(doer.site, model, process, since))
    };
    workers.into_iter().filter(is_well).collect()
}

/// Whether nothing speaks against taking it back.
fn is_well(site: &Site, model: &str, process: &Process, killed: Duration) -> bool {
    let blows = [
        Blow::Worker,
        Blow::Start,
        Blow::Changed,
        Blow::Unloaded,
        Blow::Memory,
        Blow::Disk,
    ];
    let time = (killed.saturating_sub(CALM), site.time());
    process.runs() && process.age() > YOUNG && !site.struck(Some(model), &blows, time)
}

/// Returns the workers that this residentd took back.
fn adopted(site: &Site) -> Vec<(String, i64)> {
    let path = "/api/v1/events?kind=adopt&limit=1000";
    let (_, answer) = site.ask("GET", path, None).unwrap_or_default();
    let events = answer["data"]["events"].as_array().cloned();
    let pair = |event: Value| Some((event["model"].as_str()?.to_owned(), event["pid"].as_i64()?));
    events
        .unwrap_or_default()
        .into_iter()
        .filter_map(pair)
        .collect()
}
