//! Looks at residentd all the time, as an operator would: it answers quickly,
//! runs nothing twice, promises no more than there is, and its record of
//! decisions has no gap.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;

use crate::plan::SHARES;
use crate::processes::{Process, marked};
use crate::site::{Blow, Site};
use crate::support::{pause, request};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// Looks between two at models that rest.
const ROUND: u64 = 10;
/// The longest that a look at the API may take on a machine that is busy.
const PROMPT: Duration = Duration::from_secs(4);
/// Decisions of residentd's last moments may be lost with it.
const UNWRITTEN: Duration = Duration::from_millis(1500);

/// What workers share counts once, and is taken off what they are charged; when
/// one of them goes, the others' charges are more by what it shared with them.
const SHARED: f64 = 16.0 * 1024.0 * 1024.0;

/// What was seen so far.
#[derive(Debug, Default)]
struct Seen {
    life: u64,
    /// The newest decision, and when it was seen.
    decisions: Vec<(Duration, u64)>,
    ports: BTreeMap<u16, String>,
}

/// Looks until the run is over. Returns the ports that workers had.
pub(crate) fn watch(site: &Site, done: impl Fn() -> bool) -> Vec<u16> {
    let mut seen = Seen::default();
    let mut looks = 0;
    while !done() {
        looks += 1;
        look_at_api(site);
        look_at_processes(site, &mut seen);
        look_at_decisions(site, &mut seen);
        if looks % ROUND == 0 {
            wake(site);
        }
        pause(LOOK);
    }
    site.note(format!("looked {looks} times"));
    seen.ports.into_keys().collect()
}

/// Whether residentd ran, undisturbed, since then.
fn ran(site: &Site, from: Duration) -> bool {
    let time = (from, site.time());
    !site.struck(None, &[Blow::Down, Blow::Paused], time)
}

/// Asks the API; `None` when it could not be there.
fn ask(site: &Site, path: &str) -> Option<String> {
    let from = site.time();
    let answer = request(&site.address(), "GET", path, None);
    let took = site.time().saturating_sub(from);
    if !ran(site, from) {
        return None;
    }
    match answer {
        Ok(answer) if answer.status == 200 && answer.complete && took < PROMPT => {
            Some(answer.text())
        }
        Ok(answer) => {
            site.fault(format!(
                "{path} after {took:?}: {} {}",
                answer.status,
                answer.text()
            ));
            None
        }
        Err(error) => {
            site.fault(format!("{path} after {took:?}: {error}"));
            None
        }
    }
}

/// Holds the books against the limit: residentd itself never promises more.
fn look_at_api(site: &Site) {
    let Some(page) = ask(site, "/metrics") else {
        return;
    };
    let from = site.time();
    let number = |series: &str| {
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        line.and_then(|line| line.trim().parse::<f64>().ok())
    };
    let used = number("residentd_memory_usage_bytes{domain=\"host\"}");
    let charged = number("residentd_memory_charged_bytes{domain=\"host\"}");
    let limit = number("residentd_memory_limit_bytes{domain=\"host\"}");
    let (Some(used), Some(charged), Some(limit)) = (used, charged, limit) else {
        site.fault(format!(
            "no charge or no limit on the page of metrics: {page}"
        ));
        return;
    };
    let time = (from.saturating_sub(LOOK), from);
    let over = used > limit || charged > limit + SHARED;
    if over && !site.struck(None, &[Blow::Limit, Blow::Memory], time) {
        site.fault(format!(
            "workers hold {used} bytes, are charged {charged}, and may have {limit}"
        ));
    }
}

/// A fork is followed by an exec within this time.
const EXECS: Duration = Duration::from_millis(300);

/// Looks for models that are served by two processes at once.
fn look_at_processes(site: &Site, seen: &mut Seen) {
    let all = marked(&site.folder.display().to_string());
    for process in &all {
        if let Some(port) = process.port() {
            let name = process.after("--name").unwrap_or_default();
            seen.ports.insert(port, name.to_owned());
        }
    }
    for (model, _) in SHARES {
        let mut two: Vec<&Process> = all.iter().filter(|p| p.serves(model)).collect();
        if two.len() > 1 {
            // Between its fork and its exec a child looks as its parent does.
            pause(EXECS);
            let later = marked(&site.folder.display().to_string());
            let same = |one: &&Process| later.iter().any(|p| p.pid == one.pid && p.serves(model));
            two.retain(same);
        }
        // The first may have ended before the second was there.
        if two.len() > 1 && two.iter().filter(|process| process.runs()).count() > 1 {
            site.fault(format!("{model} is served twice: {two:?}"));
        }
    }
}

/// Reads the decisions since the last look.
fn look_at_decisions(site: &Site, seen: &mut Seen) {
    let from = site.time();
    let life = site.lives.load(Ordering::Relaxed);
    let newest = seen.decisions.last().map_or(0, |(_, id)| *id);
    let is_new = seen.life != life;
    let path = match is_new {
        true => "/api/v1/events?limit=1000".to_owned(),
        false => format!("/api/v1/events?since={newest}&limit=1000"),
    };
    let Some(text) = ask(site, &path) else {
        return;
    };
    if site.lives.load(Ordering::Relaxed) != life {
        return;
    }
    let page: Value = serde_json::from_str(&text).unwrap_or_default();
    let events = page["data"]["events"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let ids: Vec<u64> = events.iter().filter_map(|e| e["id"].as_u64()).collect();
    if ids.windows(2).any(|two| two[1] != two[0] + 1) {
        site.fault(format!("the numbers of decisions have gaps: {ids:?}"));
    }
    if is_new {
        seen.life = life;
        let lost = site.struck(None, &[Blow::Disk], (Duration::ZERO, from));
        let kept = seen.decisions.iter().rev();
        let mut kept = kept.filter(|(at, _)| *at + UNWRITTEN < from);
        // Those seen well before the next residentd was there.
        if let Some((at, id)) =
            kept.find(|(at, _)| !site.struck(None, &[Blow::Down], (*at, *at + UNWRITTEN)))
            && ids.last().is_none_or(|last| last < id)
            && !lost
        {
            site.fault(format!(
                "decision {id} of {at:?} is forgotten: {:?}",
                ids.last()
            ));
        }
    } else if ids.first().is_some_and(|first| *first != newest + 1) {
        site.fault(format!("after decision {newest} comes {:?}", ids.first()));
    }
    record(site, &events);
    if let Some(last) = ids.last() {
        seen.decisions.push((from, *last));
    }
}

/// Keeps the decisions for whoever has to find out what happened.
fn record(site: &Site, events: &[Value]) {
    let file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(site.folder.join("decisions.jsonl"));
    let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
    let written = file.and_then(|mut file| file.write_all(lines.as_bytes()));
    written.expect("the record can be written");
}

/// Loads models that failed too often to be tried again by themselves, as an
/// operator would.
fn wake(site: &Site) {
    for model in site.models().unwrap_or_default() {
        let name = model["name"].as_str().unwrap_or_default();
        if model["phase"] == "failed" {
            site.note(format!("{name} rests; loading it"));
            // Whether it can be loaded is seen at the end.
            let _ = site.ask(
                "POST",
                &format!("/api/v1/models/{name}/load?wait=false"),
                None,
            );
        }
    }
}
