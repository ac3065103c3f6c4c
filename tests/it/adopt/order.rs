//! Who was least recently used is known over the end of residentd.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use super::model;
use crate::support::{Residentd, pause, runs, wait_until};

#[test]
fn who_was_least_recently_used_before_kill_9_goes_first_after_it() {
    // Two of the three fit.
    let room = "\n[memory]\nlimit = \"150MiB\"\nreserve = \"16MiB\"\n";
    let models = ["a", "b", "d"].map(|name| model(name, "", ""));
    let mut residentd = Residentd::start(&(room.to_owned() + &models.concat()));
    let a = residentd.complete("a").worker_pid();
    let b = residentd.complete("b").worker_pid();
    // So that it is not the one that was loaded or used first, nor first by name.
    pause(Duration::from_millis(1200));
    residentd.complete("a");
    residentd.wait_until_kept("both");
    let used = |residentd: &Residentd| {
        ["a", "b"].map(|name| residentd.model(name)["last_used"].as_f64().unwrap_or(0.0))
    };
    let before = used(&residentd);
    assert!(before[0] > before[1] + 1.0, "{before:?}");
    // It is written down a second later, so that not each request is.
    pause(Duration::from_millis(2500));
    residentd.restart_after(Signal::SIGKILL);
    let after = used(&residentd);
    for (before, after) in before.iter().zip(after) {
        assert!((before - after).abs() < 0.5, "{before} {after}");
    }
    let third = residentd.complete("d");
    assert_eq!(third.status, 200, "{}", third.text());
    wait_until("the end of the other", || (!runs(b)).then_some(()));
    assert!(runs(a), "it was used last");
    assert_eq!(residentd.model("a")["adopted"], json!(true));
    assert!(residentd.stop().success());
}
