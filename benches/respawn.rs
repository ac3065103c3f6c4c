//! How soon a worker is there again: what a spawn costs from a large residentd,
//! and a load whose file is cached, read ahead, or on the disk only.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use residentd::clock::Clock;
use residentd::model::{ModelName, ModelSpec, ReadyCheck, UpstreamSpec, WorkerId};
use residentd::procfs::mark::Owner;
use residentd::worker::{ProcessSpawner, SpawnOrder, Spawner, Stop, WorkerEvent, WorkerSettings};
use rustix::fs::{Advice, fadvise};
use serde_json::json;

use crate::serving::{BODY, Bare, LOG};
use crate::support::residentd::STUB;
use crate::support::{Residentd, now, pause, request, wait_until};
use crate::{median, millis, print, skip};

const SPAWNS: usize = 21;
const ROUNDS: usize = 6;
/// Size of the file that workers map.
const FILE: usize = 1 << 30;
/// The victim takes so long to end, and files are read ahead meanwhile.
const SLOW_EXIT: Duration = Duration::from_secs(5);
/// Held by this process while it spawns.
const BALLAST: usize = 1 << 30;

/// S12: from the order to spawn until the worker is told to run, log, mark and
/// all, by a process that has grown to 1 GiB; the goal as base. Beside it, in
/// turns: the bare call that spawns the same program, and the whole again from a
/// small process, since a fork would copy page tables.
pub(crate) fn spawn() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let (mut small, mut large, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        small.extend(runtime.block_on(spawns(folder.path())));
        let mut ballast = vec![0_u8; BALLAST];
        for page in ballast.chunks_mut(4096) {
            page[0] = 1;
        }
        large.extend(runtime.block_on(spawns(folder.path())));
        bare.extend((0..SPAWNS).map(|_| bare_spawn()));
        std::hint::black_box(&ballast);
    }
    let large = median(large);
    print("S12-spawn-1GiB", large, 1.0, "ms");
    print("S12-spawn-1GiB-beside-bare", large, median(bare), "ms");
    print("S12-spawn-1GiB-beside-small", large, median(small), "ms");
}

/// Time of the call alone, in ms.
fn bare_spawn() -> f64 {
    let mut command = Command::new("sleep");
    command.arg("60").stdin(Stdio::null()).process_group(0);
    let began = now();
    let mut child = command.spawn().expect("sleep can be spawned");
    let took = millis(began.elapsed());
    child.kill().expect("it runs");
    child.wait().expect("it is our child");
    took
}

/// Times of spawns, in ms.
async fn spawns(folder: &Path) -> Vec<f64> {
    let clock = Clock::start();
    let owner = Owner::this_process("bench".into());
    let spawner = ProcessSpawner::new(WorkerSettings::new(clock, folder.to_owned(), owner));
    let command = ["sleep", "60"].map(str::to_owned).into();
    let spec = Arc::new(ModelSpec {
        ready: ReadyCheck::Notify,
        upstream: UpstreamSpec::Tcp("127.0.0.1:9".into()),
        ..ModelSpec::plain(ModelName::new("m").expect("a good name"), command)
    });
    let mut took = Vec::new();
    for generation in 0..u64::try_from(SPAWNS).expect("a count") {
        #[expect(clippy::disallowed_methods, reason = "one worker tells a few events")]
        let (events, mut told) = tokio::sync::mpsc::unbounded_channel();
        let worker = WorkerId {
            model: spec.name.clone(),
            generation,
        };
        let began = now();
        let handle = spawner.spawn(SpawnOrder {
            worker,
            spec: Arc::clone(&spec),
            gpus: Vec::new(),
            origin: String::new(),
            events,
        });
        let first = told.recv().await;
        took.push(millis(began.elapsed()));
        assert!(
            matches!(first, Some(WorkerEvent::Spawned { .. })),
            "{first:?}"
        );
        handle.stop(Stop::Kill);
        while told.recv().await.is_some() {}
    }
    took
}

/// S14: a worker that maps a file of 1 GiB and touches all of it, evicted and
/// asked for again: with the file still cached, beside the same worker alone;
/// with it on the disk only, but read ahead while the victim ends, beside the
/// same worker alone after the file was read and as much time has passed; and,
/// beside the same worker alone on a cold file, with no time to read ahead.
///
/// That time counts: in a virtual machine the first to map 1 GiB took 7 ms right
/// after a plain read and some 50 ms when 3 s had passed, whoever had read it.
///
/// Whoever is the first to map a file that came in page by page takes up to ten
/// times as long as whoever comes after, residentd or not. So nobody who is timed
/// with a cached file comes first after a cold start, and who goes first turns.
pub(crate) fn warm() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let file = weights(folder.path());
    let shown = file.display().to_string();
    let flags = ["--map", shown.as_str()];
    let config = format!(
        "[memory]\nlimit = \"1200MiB\"\nreserve = \"16MiB\"\n\
         [models.m]\ncommand = '{STUB} --port ${{PORT}} --name m --map {shown}'\nmemory = \"1100MiB\"\n\
         [models.victim]\ncommand = '{STUB} --port ${{PORT}} --name victim --slow-exit {}s'\nmemory = \"1100MiB\"\n",
        SLOW_EXIT.as_secs()
    );
    let residentd = Residentd::start_with(&config, &LOG);
    let unload = |name: &str| {
        let path = format!("/api/v1/models/{name}/unload");
        assert_eq!(residentd.ask("POST", &path, None).status, 200);
    };
    let ask = || {
        let began = now();
        assert_eq!(residentd.complete("m").status, 200);
        millis(began.elapsed())
    };
    let bare = || {
        let began = now();
        let worker = Bare::start(&flags);
        let started = millis(began.elapsed());
        let answer = request(&worker.address, "POST", "/v1/completions", Some(BODY));
        assert_eq!(answer.expect("an answer").status, 200);
        let answered = millis(began.elapsed());
        worker.end();
        (started, answered)
    };
    let loaded = || {
        let took = residentd.model("m")["last_load_seconds"].as_f64();
        took.expect("it was loaded") * 1e3
    };
    let mut rows: [(Vec<f64>, Vec<f64>); 3] = Default::default();
    for round in 0..ROUNDS {
        bare();
        if round % 2 == 0 {
            rows[0].1.push(bare().1);
        }
        rows[0].0.push(ask());
        unload("m");
        if round % 2 == 1 {
            rows[0].1.push(bare().1);
        }

        assert_eq!(residentd.complete("victim").status, 200);
        drop_cache(&file);
        ask();
        rows[1].0.push(loaded());
        unload("m");
        drop_cache(&file);
        let began = now();
        read(&file);
        pause(SLOW_EXIT.saturating_sub(began.elapsed()));
        rows[1].1.push(bare().0);

        drop_cache(&file);
        rows[2].0.push(ask());
        unload("m");
        drop_cache(&file);
        rows[2].1.push(bare().1);
    }
    let names = ["S14-cached", "S14-prefetched", "S14-cold"];
    for (name, (ours, base)) in names.into_iter().zip(rows) {
        print(name, median(ours), median(base), "ms");
    }
}

/// S14 with llama.cpp and Gemma 3 270M, where `scripts/setup-engines` has put them:
/// evicted and asked for again with its file cached, from the request to the whole
/// answer of one token, beside the same command started by hand, in turns.
pub(crate) fn engine() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join(".cache/engines/bin/python");
    let weights = root.join(".cache/models/gemma-3-270m-q4_k_m.gguf");
    if !python.exists() || !weights.exists() {
        skip("S14-llamacpp", "scripts/setup-engines was not run");
        return;
    }
    let adapter = root.join("workers/llamacpp/llama_server.py");
    let command = format!(
        "{} {} -m {} --host 127.0.0.1 --port ${{PORT}} -c 512 -np 1 -t 1 --cache-ram 0",
        python.display(),
        adapter.display(),
        weights.display()
    );
    let residentd = Residentd::start_with(&format!("[models.m]\ncommand = '{command}'\n"), &LOG);
    let body = json!({"model": "m", "prompt": "One", "max_tokens": 1, "temperature": 0});
    let body = body.to_string();
    let (mut ours, mut base) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let began = now();
        let answer = residentd.ask("POST", "/v1/completions", Some(&body));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let took = millis(began.elapsed());
        let unloaded = residentd.ask("POST", "/api/v1/models/m/unload", None);
        assert_eq!(unloaded.status, 200);
        let alone = engine_alone(&command, &body);
        // The first round brings the files in.
        if round > 0 {
            ours.push(took);
            base.push(alone);
        }
    }
    print("S14-llamacpp", median(ours), median(base), "ms");
}

/// Time from the start of the command to the whole answer, in ms.
fn engine_alone(command: &str, body: &str) -> f64 {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port");
    let command = command.replace("${PORT}", &free.port().to_string());
    let mut words = command.split(' ');
    let began = now();
    let mut child = Command::new(words.next().expect("a program"))
        .args(words)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the engine can be spawned");
    let address = free.to_string();
    wait_until("the engine to be ready", || {
        let health = request(&address, "GET", "/health", None);
        health.ok().filter(|answer| answer.status == 200)
    });
    let answer = request(&address, "POST", "/v1/completions", Some(body));
    assert_eq!(answer.expect("an answer").status, 200);
    let took = millis(began.elapsed());
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid fits"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
    child.wait().expect("it is our child");
    took
}

fn weights(folder: &Path) -> PathBuf {
    let path = folder.join("weights.bin");
    let mut file = File::create(&path).expect("a file");
    let piece: Vec<u8> = (0..1_u32 << 20).map(|i| i.to_le_bytes()[1]).collect();
    for _ in 0..FILE >> 20 {
        file.write_all(&piece).expect("written");
    }
    file.sync_all().expect("it is on the disk");
    path
}

/// Reads a file piece by piece, as `cat` does.
fn read(path: &Path) {
    let mut file = File::open(path).expect("it is there");
    let mut piece = vec![0_u8; 1 << 20];
    while file.read(&mut piece).expect("it reads") > 0 {}
}

fn drop_cache(path: &Path) {
    let file = File::open(path).expect("it is there");
    fadvise(&file, 0, None, Advice::DontNeed).expect("a file on a disk");
}
