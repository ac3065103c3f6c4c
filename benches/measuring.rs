//! What measuring costs, and how soon the next worker starts after the last one
//! is gone.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use residentd::clock::Clock;
use residentd::memory::{MemorySource, Sampler, SamplerSettings, Subject};
use residentd::model::{ModelName, WorkerId};
use residentd::procfs::{ProcessStat, ProcessTree};

use crate::support::residentd::STUB;
use crate::support::{Residentd, pause};
use crate::{median, millis, print};

/// How long a calm sampler is watched.
const WATCHED: Duration = Duration::from_secs(12);
const SWAPS: usize = 21;

/// A process that sleeps, ended when this is dropped.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        let child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep can be spawned");
        Self(child)
    }

    fn key(&self) -> residentd::procfs::ProcessKey {
        let pid = i32::try_from(self.0.id()).expect("a pid fits");
        ProcessStat::read(pid).expect("it runs").key
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Threads that measure: who passes, and who looks into single processes.
const THREADS: [&str; 2] = ["memory-sampler", "memory-walker"];

/// Returns the time that these threads of this process have run, in
/// milliseconds.
fn cpu(names: &[&str]) -> f64 {
    let threads = fs::read_dir("/proc/self/task").expect("this process has threads");
    let run = |path: &std::path::Path| {
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let measures = names.contains(&name.trim());
        let schedule = fs::read_to_string(path.join("schedstat")).ok()?;
        let nanos: f64 = schedule.split(' ').next()?.parse().ok()?;
        Some(if measures { nanos / 1e6 } else { 0.0 })
    };
    threads.flatten().filter_map(|t| run(&t.path())).sum()
}

/// Waits until everything that is new has been looked at: the thread that looks
/// into single processes has had nothing to do for a while.
fn settle() {
    let still = Duration::from_secs(6);
    let mut before = f64::NAN;
    for _ in 0..10 {
        pause(still);
        let now = cpu(&THREADS[1..]);
        if now - before < 1.0 {
            return;
        }
        before = now;
    }
}

/// S20: a pass over the sizes of so many workers, and a core's share at one
/// pass a second with all that belongs to it; the goals as base.
pub(crate) fn passes() {
    for (workers, goal) in [(100_u32, 0.5), (1000, 5.0)] {
        let sleepers: Vec<_> = (0..workers).map(|_| Sleeper::start()).collect();
        let sampler = Sampler::start(Clock::start(), SamplerSettings::default());
        for (sleeper, generation) in sleepers.iter().zip(1..) {
            let worker = WorkerId {
                model: ModelName::new("m").expect("a good name"),
                generation,
            };
            let tree = Arc::new(ProcessTree::new(sleeper.key()));
            sampler.follow(worker, Subject::of(tree));
        }
        settle();
        let began = cpu(&THREADS);
        let mut costs = BTreeMap::new();
        let mut last = (sampler.readings().borrow().seq, cpu(&THREADS[..1]));
        let step = Duration::from_millis(20);
        for _ in 0..WATCHED.as_millis() / step.as_millis() {
            pause(step);
            let seq = sampler.readings().borrow().seq;
            if seq != last.0 {
                // The reading may be published before its thread rests.
                pause(step);
                let now = cpu(&THREADS[..1]);
                costs.insert(seq, now - last.1);
                last = (seq, now);
            }
        }
        let share = (cpu(&THREADS) - began) / millis(WATCHED) * 100.0;
        let name = format!("S20-pass-{workers}");
        print(&name, median(costs.into_values().collect()), goal, "ms");
        print(&format!("S20-core-{workers}"), share, 0.5, "percent");
    }
}

/// S13: from the moment the victim's process is gone to the decision to start
/// the next worker; the goal as base.
pub(crate) fn next_start() {
    let model = |name: &str| {
        format!(
            "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} --anon 64MiB'\nmemory = \"80MiB\"\n"
        )
    };
    let config = format!(
        "[memory]\nlimit = \"120MiB\"\nreserve = \"16MiB\"\n{}{}",
        model("a"),
        model("b")
    );
    let residentd = Residentd::start_with(&config, &[("RESIDENTD_LOG_LEVEL", "info")]);
    let mut victim = residentd.complete("b").worker_pid();
    let took = (0..SWAPS).map(|index| {
        let pid = i32::try_from(victim).expect("a pid fits");
        let pid = rustix::process::Pid::from_raw(pid).expect("a pid is positive");
        let flags = rustix::process::PidfdFlags::empty();
        let pidfd = rustix::process::pidfd_open(pid, flags).expect("it runs");
        let gone = std::thread::spawn(move || {
            let mut fds = [rustix::event::PollFd::new(
                &pidfd,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).expect("it can be waited for");
            unix_now()
        });
        let name = ["a", "b"][index % 2];
        victim = residentd.complete(name).worker_pid();
        let gone = gone.join().expect("the victim ends");
        (last_spawn(&residentd.log()) - gone) * 1e3
    });
    print("S13-next-start", median(took.collect()), 1.0, "ms");
}

fn unix_now() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let second = now.tv_sec.rem_euclid(86_400);
    #[expect(clippy::cast_precision_loss, reason = "a day has few seconds")]
    let time = second as f64 + now.tv_nsec as f64 / 1e9;
    time
}

/// Returns the second of the day of the last line that says so.
fn last_spawn(log: &str) -> f64 {
    let line = log.lines().rfind(|line| line.contains("spawning worker"));
    let time = line.and_then(|line| line.split(['T', 'Z']).nth(1));
    let parts: Vec<f64> = time
        .expect("a time before each line")
        .split(':')
        .map(|part| part.parse().expect("a number"))
        .collect();
    parts[0] * 3600.0 + parts[1] * 60.0 + parts[2]
}
