//! The sampler against real processes that hold known amounts of memory.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use residentd::clock::Clock;
use residentd::memory::{MemorySource, Pace, Reading, Sampler, SamplerSettings, Subject, Usage};
use residentd::model::{Bytes, ModelName, WorkerId};
use residentd::procfs::{ProcessStat, ProcessTree};
use tempfile::NamedTempFile;

/// What a held amount needs: `touch` writes one byte to every page.
const PRELUDE: &str = "
import mmap, os, signal, sys
MIB = 1 << 20
def touch(m):
    for i in range(0, len(m), 4096):
        m[i] = 1
def read(m):
    for i in range(0, len(m), 4096):
        m[i]
def anonymous(n):
    m = mmap.mmap(-1, n * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    touch(m)
    return m
def shared(n):
    m = mmap.mmap(-1, n * MIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    touch(m)
    return m
def file(path, flags=mmap.MAP_SHARED):
    f = open(path, 'rb')
    m = mmap.mmap(f.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
    read(m)
    return m
def ready():
    print('ready', flush=True)
def wait():
    ready()
    return sys.stdin.readline()
";

/// A process in a group of its own; the group is killed and the process reaped
/// when this is dropped.
struct Holder {
    child: Child,
    input: ChildStdin,
    output: BufReader<std::process::ChildStdout>,
    id: WorkerId,
}

impl Holder {
    /// Runs a script and waits until it says that it is ready.
    fn run(name: &str, script: &str) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", &format!("{PRELUDE}\n{script}")])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let id = WorkerId {
            model: ModelName::new(name).expect("a valid name"),
            generation: 1,
        };
        let mut holder = Self {
            child,
            input,
            output,
            id,
        };
        holder.await_ready();
        holder
    }

    fn await_ready(&mut self) {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "the script failed");
    }

    /// Lets the script go on to its next `ready`.
    fn go_on(&mut self) {
        self.input.write_all(b"\n").expect("the script listens");
        self.await_ready();
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid fits")
    }

    fn followed_by(&self, sampler: &Sampler) {
        let leader = ProcessStat::read(self.pid()).expect("it runs").key;
        sampler.follow(
            self.id.clone(),
            Subject::of(Arc::new(ProcessTree::new(leader))),
        );
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Returns what a Python process has for itself, by what `ps` shows too.
fn python() -> Bytes {
    let bare = Holder::run("bare", "wait()");
    let status = std::fs::read_to_string(format!("/proc/{}/status", bare.pid()));
    let status = status.expect("it runs");
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"))
        .expect("a living process has a size");
    Bytes::kib(kib.trim().parse().expect("a number"))
}

fn sampler() -> Arc<Sampler> {
    let sampler = Sampler::start(Clock::start(), SamplerSettings::default());
    sampler.pace(Pace::Busy);
    sampler
}

/// Waits for a reading that satisfies `good`; fails with the last one.
async fn reading(
    sampler: &Sampler,
    what: &str,
    mut good: impl FnMut(&Reading) -> bool,
) -> Arc<Reading> {
    let mut readings = sampler.readings();
    let wait = readings.wait_for(|reading| good(reading));
    let found = tokio::time::timeout(Duration::from_secs(30), wait).await;
    match found {
        Ok(reading) => reading.expect("the sampler runs").clone(),
        Err(_) => panic!("{what}: {:#?}", sampler.readings().borrow()),
    }
}

/// Returns whether a figure is within 2 % or 16 MiB of the truth.
fn is_close(measured: Bytes, truth: Bytes) -> bool {
    let off = measured.max(truth) - measured.min(truth);
    off <= truth.percent(2).max(Bytes::mib(16))
}

fn usage(reading: &Reading, holder: &Holder) -> Usage {
    reading.workers.get(&holder.id).cloned().unwrap_or_default()
}

#[tokio::test]
async fn a10_anonymous_memory_of_each_worker_and_their_sum_is_what_they_hold() {
    let python = python();
    let sampler = sampler();
    let holders = [100, 250, 400].map(|mib| {
        let script = format!("m = anonymous({mib}); wait()");
        (
            Holder::run(&format!("anon-{mib}"), &script),
            Bytes::mib(mib),
        )
    });
    for (holder, _) in &holders {
        holder.followed_by(&sampler);
    }
    let reading = reading(&sampler, "three workers", |r| {
        r.workers.len() == 3 && r.workers.values().all(|usage| usage.processes == 1)
    })
    .await;
    for (holder, held) in &holders {
        let usage = usage(&reading, holder);
        assert!(is_close(usage.rss, *held + python), "{usage:?}");
        assert!(is_close(usage.anon, *held) && is_close(usage.unreclaimable(), *held));
        assert_eq!(usage.rss, usage.anon + usage.file + usage.shmem);
    }
    let all = Bytes::mib(750) + python + python + python;
    assert!(is_close(reading.total_rss(), all), "{reading:?}");
}

#[tokio::test]
async fn a10_a_file_mapped_by_two_workers_counts_once_in_the_total() {
    let python = python();
    let weights = weights(300);
    let script = format!(
        "m = file({:?}, mmap.MAP_PRIVATE); wait()",
        weights.path().display().to_string()
    );
    let sampler = sampler();
    let [a, b] = ["a", "b"].map(|name| Holder::run(name, &script));
    a.followed_by(&sampler);
    b.followed_by(&sampler);
    let held = Bytes::mib(300);
    let reading = reading(&sampler, "a file counted once", |r| {
        r.workers.len() == 2 && is_close(r.total_rss(), held + python + python)
    })
    .await;
    for holder in [&a, &b] {
        let usage = usage(&reading, holder);
        assert!(is_close(usage.rss, held + python), "{usage:?}");
        assert!(is_close(usage.file, held), "{usage:?}");
        assert!(usage.unreclaimable() < Bytes::mib(30), "{usage:?}");
    }

    // When one ends, the other holds the file alone and nothing is taken off.
    sampler.forget(&a.id);
    drop(a);
    sampler.sample_now();
    let rest = self::reading(&sampler, "the file of the other", |r| r.workers.len() == 1).await;
    assert!(is_close(rest.total_rss(), held + python), "{rest:?}");
    assert_eq!(rest.counted_twice, Bytes::ZERO);
}

#[tokio::test]
async fn a10_halves_of_one_file_touched_by_two_workers_are_both_counted() {
    let python = python();
    let weights = weights(300);
    let half = |name: &str, from: u64| {
        let script = format!(
            "f = open({:?}, 'rb')
m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
m.madvise(mmap.MADV_RANDOM)
for i in range({from} * MIB, ({from} + 150) * MIB, 4096): m[i]
wait()",
            weights.path().display().to_string()
        );
        Holder::run(name, &script)
    };
    let sampler = sampler();
    let (a, b) = (half("a", 0), half("b", 150));
    a.followed_by(&sampler);
    b.followed_by(&sampler);
    // The common libraries show that both were looked at.
    let reading = reading(&sampler, "two halves", |r| r.counted_twice > Bytes::ZERO).await;
    for holder in [&a, &b] {
        let usage = usage(&reading, holder);
        assert!(is_close(usage.rss, Bytes::mib(150) + python), "{usage:?}");
    }
    let all = Bytes::mib(300) + python + python;
    assert!(is_close(reading.total_rss(), all), "{reading:?}");
}

#[tokio::test]
async fn a10_shared_memory_of_a_forked_child_counts_once_in_its_worker() {
    let python = python();
    let sampler = sampler();
    let holder = Holder::run(
        "ring",
        "m = shared(200)
if os.fork() == 0:
    touch(m)
    ready()
    sys.stdin.readline()
else:
    os.wait()",
    );
    holder.followed_by(&sampler);
    let held = Bytes::mib(200);
    let reading = reading(&sampler, "shared memory counted once", |r| {
        let usage = usage(r, &holder);
        usage.processes == 2 && is_close(usage.rss, held + python)
    })
    .await;
    let usage = usage(&reading, &holder);
    assert!(is_close(usage.shmem, held), "{usage:?}");
    assert!(is_close(usage.unreclaimable(), held), "{usage:?}");
    assert_eq!(reading.total_rss(), usage.rss);
}

#[tokio::test]
async fn a10_shared_memory_of_two_workers_counts_once_in_the_total() {
    let python = python();
    let sampler = sampler();
    let memory = NamedTempFile::new_in("/dev/shm").expect("shared memory");
    memory.as_file().set_len(200 << 20).expect("room");
    let script = format!(
        "f = open({:?}, 'r+b')
m = mmap.mmap(f.fileno(), 0)
touch(m)
wait()",
        memory.path().display().to_string()
    );
    let [a, b] = ["a", "b"].map(|name| Holder::run(name, &script));
    a.followed_by(&sampler);
    b.followed_by(&sampler);
    let held = Bytes::mib(200);
    let reading = reading(&sampler, "shared memory counted once", |r| {
        r.workers.len() == 2 && is_close(r.total_rss(), held + python + python)
    })
    .await;
    for holder in [&a, &b] {
        let usage = usage(&reading, holder);
        assert!(is_close(usage.shmem, held), "{usage:?}");
    }
}

#[tokio::test]
async fn a10_pages_forked_children_inherited_count_once_until_one_writes_them() {
    let python = python();
    let sampler = sampler();
    let mut holder = Holder::run(
        "fork",
        "m = anonymous(300)
for last in (False, False, True):
    if os.fork() > 0:
        continue
    if last:
        wait()
        n = anonymous(100)
        wait()
        touch(m)
        ready()
    sys.stdin.readline() if last else signal.pause()
os.wait()",
    );
    holder.followed_by(&sampler);
    let held = Bytes::mib(300);
    let reading = reading(&sampler, "inherited pages counted once", |r| {
        let usage = usage(r, &holder);
        usage.processes == 4 && is_close(usage.rss, held + python)
    })
    .await;
    let before = usage(&reading, &holder);
    assert!(is_close(before.anon, held), "{before:?}");
    assert!(is_close(before.unreclaimable(), held), "{before:?}");

    // What a child takes for itself counts at once, without another walk.
    holder.go_on();
    sampler.sample_now();
    self::reading(&sampler, "the child's own pages", |r| {
        is_close(usage(r, &holder).rss, held + Bytes::mib(100) + python)
    })
    .await;

    // Writing to what it inherited changes no figure but the faults.
    holder.go_on();
    self::reading(&sampler, "the pages that are its own now", |r| {
        is_close(
            usage(r, &holder).rss,
            held + held + Bytes::mib(100) + python,
        )
    })
    .await;
}

#[tokio::test]
async fn growth_between_two_calm_passes_is_seen_with_all_its_parts() {
    let python = python();
    let sampler = Sampler::start(Clock::start(), SamplerSettings::default());
    let mut holder = Holder::run("grow", "wait(); m = anonymous(200); n = shared(50); wait()");
    holder.followed_by(&sampler);
    reading(&sampler, "the worker", |r| {
        usage(r, &holder).rss > Bytes::ZERO
    })
    .await;
    holder.go_on();
    let reading = reading(&sampler, "its growth", |r| {
        is_close(usage(r, &holder).rss, Bytes::mib(250) + python)
    })
    .await;
    let usage = usage(&reading, &holder);
    assert!(is_close(usage.anon, Bytes::mib(200)), "{usage:?}");
    assert!(usage.shmem >= Bytes::mib(50), "{usage:?}");
}

#[tokio::test]
async fn a_settled_worker_gets_its_proportional_share_once() {
    let sampler = sampler();
    let holder = Holder::run("pss", "m = anonymous(100); wait()");
    holder.followed_by(&sampler);
    let reading = reading(&sampler, "a proportional share", |r| {
        usage(r, &holder).pss.is_some()
    })
    .await;
    let usage = usage(&reading, &holder);
    let pss = usage.pss.expect("just waited for");
    assert!(
        pss <= usage.rss && is_close(pss, Bytes::mib(100)),
        "{usage:?}"
    );
    assert!(usage.pss_at.expect("with its time") <= reading.at);
}

#[tokio::test]
async fn a_worker_that_ended_holds_nothing_in_the_next_reading() {
    let sampler = Sampler::start(Clock::start(), SamplerSettings::default());
    let mut holder = Holder::run("end", "m = anonymous(50); wait()");
    holder.followed_by(&sampler);
    reading(&sampler, "the worker", |r| usage(r, &holder).processes == 1).await;
    let _ = killpg(Pid::from_raw(holder.pid()), Signal::SIGKILL);
    let _ = holder.child.wait();
    let reading = reading(&sampler, "an empty tree", |r| {
        r.workers.get(&holder.id) == Some(&Usage::default())
    })
    .await;
    assert_eq!(reading.total_rss(), Bytes::ZERO);
}

#[tokio::test]
async fn a_reading_asked_for_is_taken_after_the_question() {
    let clock = Clock::start();
    let sampler = Sampler::start(clock, SamplerSettings::default());
    let first = sampler.readings().borrow().clone();
    assert_eq!(first.seq, 1);
    assert!(first.host.total > Bytes::ZERO && first.workers.is_empty());
    for _ in 0..20 {
        let asked = clock.now();
        let seq = sampler.readings().borrow().seq;
        sampler.sample_now();
        let reading = reading(&sampler, "a newer reading", |r| r.seq > seq).await;
        assert!(reading.at >= asked);
    }
    // Twenty answers came long before the calm second was over twenty times.
    assert!(clock.now().since_start() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_dropped_sampler_stops_and_says_so() {
    let sampler = Sampler::start(Clock::start(), SamplerSettings::default());
    let mut readings = sampler.readings();
    readings.borrow_and_update();
    drop(sampler);
    let mut newer = 0;
    while readings.changed().await.is_ok() {
        newer += 1;
    }
    assert!(newer <= 1, "{newer} readings after the drop");
}

#[tokio::test]
async fn a_machine_without_a_driver_has_no_devices_and_no_error() {
    let settings = SamplerSettings {
        nvml_library: Some("/nonexistent/libnvidia-ml.so.1".into()),
        ..SamplerSettings::default()
    };
    let sampler = Sampler::start(Clock::start(), settings);
    let first = sampler.readings().borrow().clone();
    assert!(first.devices.is_empty());
    assert_eq!(first.device_error, None);
}

#[tokio::test]
async fn a_cgroup_limit_that_shrinks_is_the_headroom_of_the_next_reading() {
    let root = tempfile::tempdir().expect("a folder");
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    };
    write(
        "proc/meminfo",
        "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
    );
    write("proc/self/cgroup", "0::/\n");
    write(
        "proc/self/mountinfo",
        "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    );
    write("sys/fs/cgroup/memory.max", "4294967296\n");
    write("sys/fs/cgroup/memory.current", "1073741824\n");
    let settings = SamplerSettings {
        root: root.path().to_path_buf(),
        ..SamplerSettings::default()
    };
    let sampler = Sampler::start(Clock::start(), settings);
    let first = sampler.readings().borrow().clone();
    assert_eq!(first.host.headroom, Bytes::gib(3));
    assert_eq!(first.host.domain_total(), Bytes::gib(4));
    write("sys/fs/cgroup/memory.max", "2147483648\n");
    reading(&sampler, "the new limit", |r| {
        r.host.headroom == Bytes::gib(1)
    })
    .await;
}

/// A file of random-looking, really written bytes in the page cache.
fn weights(mib: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    let block = vec![0x5a_u8; 1 << 20];
    for _ in 0..mib {
        file.write_all(&block).expect("room on the disk");
    }
    file.flush().expect("room on the disk");
    file
}
