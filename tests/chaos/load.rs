//! The clients: so many requests a second, so many at once, for as long as the
//! run goes; each is judged when it has ended.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Scope;
use std::time::Duration;

use crate::client::{Outcome, perform};
use crate::deeds::FOUND;
use crate::judge::judge;
use crate::plan::{Ask, RATE, Whim, ask};
use crate::site::{Blow, Site};
use crate::support::pause;

/// Most requests at once; when all wait, fewer are sent.
const CLIENTS: u64 = 40;

/// Starts the clients, who end when the run is over.
pub(crate) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    site: &'scope Site,
    next: &'scope AtomicU64,
) {
    for _ in 0..CLIENTS {
        scope.spawn(move || {
            while let Some(ask) = due(site, next) {
                one(site, &ask);
            }
        });
    }
}

/// Takes the next request and waits until it is due; `None` when all is over.
fn due(site: &Site, next: &AtomicU64) -> Option<Ask> {
    let number = next.fetch_add(1, Ordering::Relaxed);
    let at = Duration::from_millis(number * 1000 / RATE);
    while site.time() < at && !site.is_over() {
        pause(Duration::from_millis(5));
    }
    (!site.is_over()).then(|| ask(site.seed, number))
}

fn one(site: &Site, ask: &Ask) {
    if matches!(ask.whim, Whim::Dies(_)) {
        // When it gets to its worker is not known.
        site.strike(Some(ask.model), Blow::Worker, FOUND);
    }
    let from = site.time();
    let outcome = perform(site, ask);
    let to = site.time();
    site.count("requests");
    match judge(site, ask, &outcome, (from, to)) {
        Ok(kind) => site.count(kind),
        Err(why) => {
            let took = to.saturating_sub(from).as_secs_f64();
            site.fault(format!("request {ask:?} after {took:.3} s: {why}"));
        }
    }
    if let Outcome::Answered(answer) = &outcome
        && answer.header("x-stub-pid").is_some()
    {
        site.answered(ask.number, answer.worker_pid());
    }
}

/// Reads how often each request got to a worker: its pids by its number.
fn journal(site: &Site) -> BTreeMap<u64, Vec<i64>> {
    let text = fs::read_to_string(site.folder.join("journal")).unwrap_or_default();
    let mut all: BTreeMap<u64, Vec<i64>> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let number = words.next().and_then(|word| word.parse().ok());
        let pid = words.next().and_then(|word| word.parse().ok());
        if let (Some(number), Some(pid)) = (number, pid) {
            all.entry(number).or_default().push(pid);
        }
    }
    all
}

/// Checks that no request got to workers more often than twice, and that
/// whoever answered one had got it.
pub(crate) fn check_journal(site: &Site) {
    let journal = journal(site);
    for (number, pids) in &journal {
        if pids.len() > 2 {
            let ask = ask(site.seed, *number);
            site.fault(format!("request {ask:?} got to workers {pids:?}"));
        }
    }
    for (number, pid) in site.all_answered() {
        let got = journal.get(&number);
        if !got.is_some_and(|pids| pids.contains(&pid)) {
            let ask = ask(site.seed, number);
            site.fault(format!("{pid} answered {ask:?}, which {got:?} got"));
        }
    }
    let twice = journal.values().filter(|pids| pids.len() == 2).count();
    site.note(format!(
        "{} requests got to a worker, {twice} of them to two",
        journal.len()
    ));
}
