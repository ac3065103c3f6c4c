//! What integration tests share: a real residentd with a config of its own, a
//! plain HTTP client that hides nothing, and waiting with a deadline.

pub(crate) mod calls;
pub(crate) mod cgroup;
pub(crate) mod collector;
pub(crate) mod gpu;
pub(crate) mod http;
pub(crate) mod residentd;
pub(crate) mod wire;

use std::time::Duration;

pub(crate) use http::{Answer, request};
pub(crate) use residentd::Residentd;

/// The longest a test waits for anything before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Asks `done` again and again until it answers, and fails with `what` when
/// that takes longer than [`PATIENCE`].
pub(crate) fn wait_until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for: {what}"
        );
        pause(Duration::from_millis(5));
    }
}

/// Returns how often a claim that is about many is to be tried, where the harness
/// says so: 20 in full, 2 when it is to be fast.
pub(crate) fn repeats() -> Option<u32> {
    let runs = std::env::var_os("RESIDENTD_RUNS")?;
    Some(runs.to_str()?.parse().expect("RESIDENTD_RUNS is a number"))
}

/// Returns the time, for measuring.
#[expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "tests measure from outside"
)]
pub(crate) fn now() -> std::time::Instant {
    std::time::Instant::now()
}

/// Lets a moment pass between two looks.
#[expect(
    clippy::disallowed_methods,
    reason = "the pause between two looks of a bounded wait"
)]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Returns whether a process with this pid runs; a zombie does not.
pub(crate) fn runs(pid: i64) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

/// Returns the pids whose command line holds `mark`.
pub(crate) fn processes_with(mark: &str) -> Vec<i64> {
    processes_whose("cmdline", mark)
}

/// Returns the pids in whose file of this name in `/proc` there is `mark`.
pub(crate) fn processes_whose(file: &str, mark: &str) -> Vec<i64> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i64>().ok())
        .filter(|pid| {
            let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            String::from_utf8_lossy(&text).contains(mark) && runs(*pid)
        })
        .collect()
}

/// Sends a signal to a process that the test started or whose worker it is.
pub(crate) fn kill(pid: i64, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid fits"));
    nix::sys::signal::kill(pid, signal).expect("the process runs");
}

/// Prints the median of these milliseconds for `scripts/accept`, which judges
/// it in a run of its own. Here the machine is busy with other tests, so only
/// the quickest must meet the goal.
#[expect(clippy::print_stdout, reason = "the harness reads it")]
pub(crate) fn settle(claim: &str, what: &str, goal_ms: f64, mut took: Vec<f64>) {
    took.sort_by(f64::total_cmp);
    let median = took[took.len() / 2];
    println!(
        "FIGURE {claim} median={median:.1} goal={goal_ms} unit=ms n={} {what}",
        took.len()
    );
    assert!(took[0] < goal_ms, "{claim} {what}: {took:.1?} ms");
}
