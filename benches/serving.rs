//! The release binary with real stub workers, beside the same workers without it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use residentd::clock::Clock;
use serde_json::json;

use crate::support::residentd::STUB;
use crate::support::{Residentd, kill, now, pause, request, wait_until};
use crate::{median, micros, millis, print};

const ROUNDS: usize = 7;
const REQUESTS: usize = 1500;
const SWAPS: usize = 51;
/// Swaps of small workers: enough for a 99th percentile.
const MANY_SWAPS: usize = 400;
/// Swaps are tried for so long at most.
const SWAPPING: Duration = Duration::from_secs(20);
/// So many ms later than the first ones others are ready: over the 10 ms that are
/// between two probes at first.
const LATE: [u32; 5] = [0, 2, 4, 6, 8];
/// A silent worker that loads is watched for so long.
const WATCHED: Duration = Duration::from_secs(8);
pub(crate) const BODY: &str = r#"{"model": "a", "prompt": "hello", "max_tokens": 1}"#;
/// Tests log everything; what is measured here logs what it does by default.
pub(crate) const LOG: [(&str, &str); 1] = [("RESIDENTD_LOG_LEVEL", "info")];

fn model(name: &str, flags: &str) -> String {
    format!(
        "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} {flags}'\nmemory = \"80MiB\"\n"
    )
}

fn residentd(limit: &str, models: &str) -> Residentd {
    let config = format!("[memory]\nlimit = \"{limit}\"\nreserve = \"16MiB\"\n{models}");
    Residentd::start_with(&config, &LOG)
}

/// A stub worker without residentd.
pub(crate) struct Bare {
    child: std::process::Child,
    pub(crate) address: String,
}

impl Bare {
    pub(crate) fn start(flags: &[&str]) -> Self {
        let mut child = Command::new(STUB)
            .args(["--name", "bare"])
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the stub can be spawned");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let line = lines.find_map(|line| line.ok().filter(|line| line.contains("ready on")));
        let line = line.expect("the stub says when it is ready");
        let address = line.rsplit(' ').next().expect("an address").to_owned();
        Self { child, address }
    }

    pub(crate) fn end(mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid fits"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
        self.child.wait().expect("it is our child");
    }
}

/// Median time of one small completion on one kept connection, in µs.
fn round(address: &str) -> f64 {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_nodelay(true).expect("it can be set");
    let message = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let mut buffer = [0_u8; 4096];
    let mut took = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let start = now();
        stream.write_all(message.as_bytes()).expect("it is written");
        let mut read = 0;
        // Head and body of such an answer come in one or two pieces.
        while !whole(&buffer[..read]) {
            let more = stream.read(&mut buffer[read..]).expect("an answer");
            assert!(more > 0, "the connection was closed");
            read += more;
        }
        took.push(micros(start.elapsed()));
    }
    median(took)
}

fn whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .and_then(|length| length.parse::<usize>().ok());
    length.is_some_and(|length| body.len() >= length)
}

/// A small request through residentd beside the same one to the worker itself,
/// one connection.
pub(crate) fn proxied_request() {
    let residentd = residentd("400MiB", &model("a", ""));
    assert_eq!(residentd.complete("a").status, 200);
    let bare = Bare::start(&[]);
    let (mut ours, mut base) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(round(residentd.address()));
        base.push(round(&bare.address));
    }
    bare.end();
    print("request-p50-direct", median(ours), median(base), "us");
}

/// S10: a swap of two models with room for one, beside the exit and the start
/// of the same worker alone, in turns: of workers that hold 64 MiB, and, for what
/// is residentd's own part in it, of workers that hold next to nothing, since
/// taking and giving back memory varies by more than that part.
///
/// The own part of one swap is all that it took longer than the worker alone does
/// at the median. So whatever keeps a worker or the machine up at times counts as
/// ours; how much that is, the worker alone shows.
pub(crate) fn swap() {
    let (ours, base) = swaps("--anon 64MiB", SWAPS);
    print("S10-swap-whole", median(ours), median(base), "ms");
    let (ours, base) = swaps("--anon 1MiB", MANY_SWAPS);
    let alone = median(base.clone());
    print("S10-swap-small-whole", median(ours.clone()), alone, "ms");
    print("S10-swap-own-part", median(ours.clone()) - alone, 3.0, "ms");
    print("S10-swap-own-part-p99", worst(ours) - alone, 15.0, "ms");
    print("S10-bare-p99", worst(base), alone, "ms");
}

/// Returns the 99th percentile.
fn worst(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() - 1 - values.len() / 100]
}

/// Whole swaps through residentd and beside it, in ms.
fn swaps(flags: &str, most: usize) -> (Vec<f64>, Vec<f64>) {
    let residentd = residentd("120MiB", &(model("a", flags) + &model("b", flags)));
    let flags: Vec<&str> = flags.split(' ').collect();
    let (mut ours, mut base) = (Vec::new(), Vec::new());
    assert_eq!(residentd.complete("b").status, 200);
    let mut held = Bare::start(&flags);
    let began = now();
    for index in 0..most {
        if began.elapsed() > SWAPPING {
            break;
        }
        let name = ["a", "b"][index % 2];
        let start = now();
        assert_eq!(residentd.complete(name).status, 200);
        ours.push(millis(start.elapsed()));
        let start = now();
        held.end();
        held = Bare::start(&flags);
        let answer = request(&held.address, "POST", "/v1/completions", Some(BODY));
        assert_eq!(answer.expect("an answer").status, 200);
        base.push(millis(start.elapsed()));
    }
    held.end();
    assert!(ours.len() >= SWAPS, "only {} swaps in time", ours.len());
    (ours, base)
}

/// S11, A40: from the worker's first possible answer to the request that waited
/// for it, and to the first byte of its answer at the client; the goals as base.
/// And the share of a core that waiting for a silent worker takes.
///
/// Workers start in 200 ms and a little more, in steps that cover the time between
/// two probes: with one fixed start the probe that sees a silent worker comes always
/// about as long after it, 1 ms or 11, by how long the probes before it took.
pub(crate) fn readiness() {
    let folder = tempfile::tempdir().expect("a folder");
    let stamp = folder.path().join("stamp");
    let mut models = model("slow", "--silent --ready-after 10s");
    for (kind, more) in [("talks", "--listen late"), ("silent", "--silent")] {
        for late in LATE {
            let (start, stamp) = (200 + late, stamp.display());
            let flags = format!("--ready-after {start}ms --ready-stamp {stamp} {more}");
            models += &model(&format!("{kind}-{late}"), &flags);
        }
    }
    let residentd = residentd("400MiB", &models);
    for (kind, goal) in [("talks", 2.0), ("silent", 15.0)] {
        let (mut seen, mut told) = (Vec::new(), Vec::new());
        for late in LATE.into_iter().cycle().take(SWAPS) {
            let name = format!("{kind}-{late}");
            let body = json!({"model": name, "prompt": "x"}).to_string();
            let answer = residentd.ask("POST", "/v1/completions", Some(&body));
            let answered = monotonic_ns();
            let received = answer.header("x-stub-received-ns");
            let received: f64 = received.and_then(|ns| ns.parse().ok()).expect("a time");
            // The worker does not wait for its disk to answer.
            let text = wait_until("the worker's stamp", || {
                std::fs::read_to_string(&stamp).ok()
            });
            let ready: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            let ready = ready["monotonic_ns"].as_f64().expect("a time");
            residentd.ask("POST", &format!("/api/v1/models/{name}/unload"), None);
            std::fs::remove_file(&stamp).expect("it was there");
            seen.push((received - ready) / 1e6);
            told.push((answered - ready) / 1e6);
        }
        print(&format!("S11-ready-{kind}"), median(seen), goal, "ms");
        print(&format!("A40-first-byte-{kind}"), median(told), 20.0, "ms");
    }
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| residentd.complete("slow").status);
        wait_until("it to load", || {
            let phase = &residentd.model("slow")["phase"];
            (phase == "loading" || phase == "starting").then_some(())
        });
        let began = run_time(residentd.pid());
        pause(WATCHED);
        let share = (run_time(residentd.pid()) - began) / millis(WATCHED) * 100.0;
        print("S11-core-silent", share, 1.0, "percent");
        assert_eq!(asked.join().expect("it does not panic"), 200);
    });
}

/// The clock of the workers' stamps.
fn monotonic_ns() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    #[expect(clippy::cast_precision_loss, reason = "a machine runs for less")]
    let time = now.tv_sec as f64 * 1e9 + now.tv_nsec as f64;
    time
}

/// Returns for how long the threads of a process have run, in ms.
fn run_time(pid: u32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let run = |thread: std::fs::DirEntry| {
        let schedule = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        schedule.split(' ').next()?.parse::<f64>().ok()
    };
    threads.flatten().filter_map(run).sum::<f64>() / 1e6
}

/// A41: from SIGKILL to a worker that serves, to the moment at which its end is
/// told, by one clock; the goal as base.
pub(crate) fn noticed_exit() {
    let residentd = residentd("400MiB", &model("a", ""));
    let clock = Clock::start();
    let took = (0..SWAPS).map(|_| {
        // By hand, since it has to rest when it has crashed again.
        residentd.ask("POST", "/api/v1/models/a/load", None);
        let pid = residentd.complete("a").worker_pid();
        let killed = clock.unix(clock.now());
        kill(pid, nix::sys::signal::Signal::SIGKILL);
        let told = wait_until("the end to be told", || {
            let path = "/api/v1/events?kind=exit&model=a";
            let events = residentd.ask("GET", path, None).json();
            let last = events["data"]["events"].as_array()?.last()?["at"].as_f64()?;
            (last > killed).then_some(last)
        });
        (told - killed) * 1e3
    });
    print("A41-exit-noticed", median(took.collect()), 10.0, "ms");
}
