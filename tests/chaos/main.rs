//! A45: everything that can go wrong with workers, machine and residentd goes
//! wrong at random, under load; every request has one answer, and in the end
//! the books are true and nothing is left. Run by `make chaos`, which says how
//! long and with which seed, and for a minute by `scripts/accept`.

mod client;
mod deeds;
mod finale;
mod judge;
mod load;
mod plan;
mod processes;
mod restart;
mod site;
#[path = "../it/support/mod.rs"]
#[expect(dead_code, reason = "shared with the other integration tests")]
mod support;
mod thief;
mod town;
mod watch;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deeds::Doer;
use site::Site;
use town::Town;

/// Lines of the diary that a failure shows.
const SHOWN: usize = 60;
/// How much of all requests that a residentd was there for must have been answered by
/// a worker, in percent: in a run in which less is, little is shown. Clients do not
/// wait long before they ask again while none is there.
const LEAST_ANSWERED: u64 = 40;
/// How much may have waited in vain, in percent.
const MOST_IN_VAIN: u64 = 10;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var_os(name)?;
    let number = value.to_str().and_then(|text| text.parse().ok());
    Some(number.unwrap_or_else(|| panic!("{name} is a number")))
}

/// Returns a number that nobody has chosen.
#[expect(
    clippy::disallowed_methods,
    reason = "the seed is printed, and can be given again"
)]
fn random_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::from(since.subsec_nanos()))
}

#[test]
fn a45_under_chaos_every_request_has_one_answer_and_nothing_is_left() {
    let seconds = variable("CHAOS_SECONDS").unwrap_or(60);
    let seed = variable("CHAOS_SEED").unwrap_or_else(random_seed);
    println!("chaos: SEED={seed} SECONDS={seconds}");
    let length = Duration::from_secs(seconds);
    let mut town = Town::start();
    for missing in &town.missing {
        println!("chaos: {missing}");
    }
    let site = Site::new(seed, town.residentd.folder(), town.residentd.address());
    let files = finale::idle_files(&site, &town.residentd);
    let site = Site::new(seed, town.residentd.folder(), town.residentd.address());
    run(&site, &mut town, length, files);
    report(&site, seconds);
}

/// Ends whoever looks at this when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Lets everything happen, and checks what must be true afterwards.
fn run(site: &Site, town: &mut Town, length: Duration, files_before: usize) {
    let steps = plan::deeds(site.seed, length);
    let (next, quiet) = (AtomicU64::new(0), AtomicBool::new(false));
    let ports = std::thread::scope(|scope| {
        let _end = Ends(&quiet);
        let watching = scope.spawn(|| watch::watch(site, || quiet.load(Ordering::Relaxed)));
        std::thread::scope(|clients| {
            // A panic must not leave everybody waiting.
            let _end = Ends(&site.over);
            load::start(clients, site, &next);
            Doer::new(site, town).work(&steps, length);
            site.over.store(true, Ordering::Relaxed);
        });
        site.note("the last client is gone");
        finale::recover(site);
        quiet.store(true, Ordering::Relaxed);
        watching.join().expect("the watch ends")
    });
    finale::check_idle(site, &town.residentd, files_before);
    finale::end(site, town, &ports);
    load::check_journal(site);
    let all = site.counted("requests");
    let heard = all.saturating_sub(site.counted(judge::DOWN));
    if site.counted("answered") * 100 / heard.max(1) < LEAST_ANSWERED {
        site.fault("too little was answered to show anything");
    }
    let in_vain = site.counted("queue_full") + site.counted("queue_timeout");
    if in_vain * 100 / all.max(1) > MOST_IN_VAIN {
        site.fault("too many waited in vain");
    }
}

/// Says what happened, and fails when anything was broken.
#[expect(clippy::print_stdout, reason = "whoever runs it reads it")]
fn report(site: &Site, seconds: u64) {
    let seed = site.seed;
    for (what, count) in site.tallies() {
        println!("chaos: {count:6} {what}");
    }
    let faults = site.faults();
    if faults.is_empty() {
        println!(
            "FIGURE A45 {} requests in {seconds} s with seed {seed}, {} answered; each has one outcome, nothing is left",
            site.counted("requests"),
            site.counted("answered"),
        );
        return;
    }
    std::fs::write(site.folder.join("diary"), site.diary(usize::MAX)).expect("a file");
    let kept = format!("{}/chaos-{seed}", env!("CARGO_TARGET_TMPDIR"));
    let copied = std::process::Command::new("cp")
        .args(["-r", "--no-target-directory"])
        .args([&site.folder.display().to_string(), &kept])
        .status();
    panic!(
        "chaos: SEED={seed} SECONDS={seconds}: broken:\n{}\n--- the last deeds\n{}--- all of it is in {kept} ({copied:?})",
        faults.join("\n"),
        site.diary(SHOWN),
    );
}
