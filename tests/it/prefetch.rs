//! Files that are read ahead of a worker, and what is told of them; workers
//! that say themselves when they are ready; the first request on the probe's
//! connection.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use rustix::fs::{Advice, fadvise};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use serde_json::{Value, json};

use crate::support::residentd::STUB;
use crate::support::{Residentd, now, pause, wait_until};

const SIZE: u64 = 96 << 20;
/// Room for one of two.
const ROOM: &str = "[memory]\nlimit = \"200MiB\"\nreserve = \"16MiB\"\n";

/// A file of [`SIZE`] on a disk: the usual folder for such may be in memory.
struct Weights(tempfile::TempDir);

impl Weights {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let made = Self(folder);
        let mut file = File::create(made.path()).expect("a file");
        for number in 0..SIZE >> 20 {
            let byte = u8::try_from(number % 251).expect("a byte");
            file.write_all(&vec![byte; 1 << 20]).expect("written");
        }
        file.sync_all().expect("it is on the disk");
        made.drop_cache();
        made
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("weights.bin")
    }

    /// Has the kernel forget what nobody maps.
    fn drop_cache(&self) {
        let file = File::open(self.path()).expect("it is there");
        fadvise(&file, 0, None, Advice::DontNeed).expect("a file on a disk");
        let left = resident(&self.path());
        assert!(left < SIZE / 10, "{left} bytes stay in the page cache");
    }
}

/// Returns how much of a file is in the page cache.
#[expect(unsafe_code, reason = "there is no safe way to map memory")]
fn resident(path: &Path) -> u64 {
    let file = File::open(path).expect("it is there");
    let length = usize::try_from(SIZE).expect("a 64-bit machine");
    let mut pages = vec![0_u8; length.div_ceil(rustix::param::page_size())];
    let (anywhere, read, shared) = (std::ptr::null_mut(), ProtFlags::READ, MapFlags::SHARED);
    // SAFETY: the kernel chooses the address; nothing of the mapping is
    // touched, there is a byte for each page of it, and it is removed at once.
    unsafe {
        let start = mmap(anywhere, length, read, shared, &file, 0).expect("it can be mapped");
        assert_eq!(libc::mincore(start, length, pages.as_mut_ptr()), 0);
        munmap(start, length).expect("it is mapped");
    }
    let there = pages.iter().filter(|page| **page & 1 == 1).count();
    u64::try_from(there * rustix::param::page_size()).expect("a size")
}

fn all_resident(path: &Path) -> Option<()> {
    (resident(path) == SIZE).then_some(())
}

/// A model that makes way slowly, and has had a request.
fn victim() -> String {
    format!(
        "[models.victim]\ncommand = '{STUB} --port ${{PORT}} --name victim --slow-exit 4s'\nmemory = \"128MiB\"\n"
    )
}

fn model(command: &str, more: &str) -> String {
    format!("[models.m]\ncommand = {command}\nmemory = \"128MiB\"\n{more}\n")
}

fn mapping(file: &Path) -> String {
    let file = file.display();
    format!("'{STUB} --port ${{PORT}} --name m --map {file}'")
}

fn ask_in_background(residentd: &Residentd) -> std::thread::JoinHandle<u16> {
    let address = residentd.address().to_owned();
    std::thread::spawn(move || {
        let body = json!({"model": "m", "prompt": "x"}).to_string();
        let path = "/v1/completions";
        let answer = crate::support::request(&address, "POST", path, Some(&body));
        answer.expect("an answer").status
    })
}

fn told(residentd: &Residentd) -> Vec<Value> {
    let answer = residentd.ask("GET", "/api/v1/events?kind=prefetch&model=m", None);
    let events = answer.json()["data"]["events"].clone();
    events.as_array().expect("a list").clone()
}

fn unload(residentd: &Residentd, name: &str) {
    let answer = residentd.ask("POST", &format!("/api/v1/models/{name}/unload"), None);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn weights_are_read_while_the_victim_ends_and_told_with_bytes_and_reason() {
    let weights = Weights::new();
    let model = model(&mapping(&weights.path()), "");
    let residentd = Residentd::start(&format!("{ROOM}{}{model}", victim()));
    assert_eq!(residentd.model("m")["file_size"], SIZE);
    assert_eq!(residentd.complete("victim").status, 200);
    let waits = ask_in_background(&residentd);
    wait_until("the weights to be there", || all_resident(&weights.path()));
    assert_eq!(
        residentd.model("m")["phase"],
        "stopped",
        "its room is being made"
    );
    let event = wait_until("an event", || told(&residentd).pop());
    assert_eq!(event["reason"], "waiting");
    assert_eq!(event["end"], "done");
    assert_eq!(event["size"], SIZE);
    let bytes = |key: &str| event[key].as_u64().expect("a number");
    assert_eq!(bytes("read") + bytes("found"), SIZE, "{event}");
    assert!(bytes("read") > SIZE * 9 / 10, "{event}");
    wait_until("the cached bytes to be known", || {
        (residentd.model("m")["cached_bytes"] == SIZE).then_some(())
    });
    assert_eq!(waits.join().expect("it ends"), 200);
    assert_eq!(residentd.model("victim")["cached_bytes"], Value::Null);
}

#[test]
fn nothing_is_read_where_it_is_off() {
    let weights = Weights::new();
    let off = model(&mapping(&weights.path()), "prefetch = \"off\"");
    let residentd = Residentd::start(&format!("{ROOM}{}{off}", victim()));
    assert_eq!(residentd.complete("victim").status, 200);
    let waits = ask_in_background(&residentd);
    residentd.wait_for_phase("victim", "stopping");
    let began = now();
    while began.elapsed() < Duration::from_millis(1500) {
        assert!(resident(&weights.path()) < SIZE / 10);
        pause(Duration::from_millis(50));
    }
    assert_eq!(residentd.model("m")["phase"], "stopped");
    assert_eq!(waits.join().expect("it ends"), 200);
    assert!(told(&residentd).is_empty());
}

#[test]
fn files_that_a_life_opened_are_read_for_the_next_one_also_after_a_restart() {
    let weights = Weights::new();
    // No argument names the file, so only a life tells of it.
    let command = format!("[\"sh\", \"-c\", \"exec {STUB} --port $AT --name m --map $MAPPED\"]");
    let env = format!(
        "env = {{ AT = \"${{PORT}}\", MAPPED = {:?} }}",
        weights.path()
    );
    let model = model(&command, &env);
    let mut residentd = Residentd::start(&format!("{ROOM}{}{model}", victim()));
    assert_eq!(residentd.model("m")["file_size"], 0);
    assert_eq!(residentd.complete("m").status, 200);
    wait_until("the files of the worker to be known", || {
        let log = residentd.log();
        log.contains("files of a worker are known").then_some(())
    });
    residentd.restart_after(Signal::SIGTERM);
    assert_eq!(residentd.complete("victim").status, 200);
    weights.drop_cache();
    let waits = ask_in_background(&residentd);
    wait_until("the file to be there", || all_resident(&weights.path()));
    assert_eq!(residentd.model("m")["phase"], "stopped");
    let event = wait_until("an event", || told(&residentd).pop());
    assert!(event["read"].as_u64() > Some(SIZE * 9 / 10), "{event}");
    assert_eq!(waits.join().expect("it ends"), 200);
}

#[test]
fn in_idle_time_the_files_of_a_model_that_was_used_are_read_again() {
    let weights = Weights::new();
    let other = format!(
        "[models.other]\ncommand = '{STUB} --port ${{PORT}} --name other'\nmemory = \"16MiB\"\n"
    );
    let model = model(&mapping(&weights.path()), "prefetch = \"idle\"");
    let residentd = Residentd::start(&format!("{ROOM}{other}{model}"));
    assert_eq!(residentd.complete("m").status, 200);
    unload(&residentd, "m");
    weights.drop_cache();
    assert_eq!(residentd.complete("other").status, 200);
    wait_until("the weights to be there again", || {
        all_resident(&weights.path())
    });
    wait_until("an event", || {
        let last = told(&residentd).pop()?;
        (last["reason"] == "idle").then_some(())
    });
    assert_eq!(residentd.model("m")["phase"], "stopped");
}

#[test]
fn a_worker_that_says_so_itself_is_ready_and_a_stranger_is_not_heard() {
    let models = format!(
        "{ROOM}[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m --notify --listen late --ready-after 500ms'\nready = {{ notify = true }}\nmemory = \"32MiB\"\n"
    );
    let residentd = Residentd::start(&models);
    let waits = ask_in_background(&residentd);
    let pid = wait_until("a worker", || residentd.worker_pid("m"));
    let environment = std::fs::read(format!("/proc/{pid}/environ")).expect("it runs");
    let environment = String::from_utf8_lossy(&environment).into_owned();
    let socket = environment
        .split('\0')
        .find_map(|pair| pair.strip_prefix("NOTIFY_SOCKET="));
    let socket = socket.expect("it is told where to say so");
    let stranger = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
    stranger.send_to(b"READY=1", socket).expect("it is there");
    assert_eq!(waits.join().expect("it ends"), 200);
    let took = residentd.model("m")["last_load_seconds"].as_f64();
    assert!(took > Some(0.45), "{took:?}");
    unload(&residentd, "m");
    assert!(!Path::new(socket).exists());
}

#[test]
fn the_request_that_waited_goes_out_on_the_connection_of_the_probe() {
    let residentd = Residentd::start(&format!(
        "{ROOM}[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m --listen late --ready-after 200ms'\nmemory = \"32MiB\"\n"
    ));
    let connections = || {
        let stats = residentd.ask("GET", "/upstream/m/stats", None).json();
        stats["connections"].as_u64().expect("a count")
    };
    assert_eq!(residentd.complete("m").status, 200);
    assert_eq!(connections(), 1, "the probe's, and no other");
    unload(&residentd, "m");
    // Nobody waits for a lease: its connection is closed, another is opened.
    let answer = residentd.ask("POST", "/api/v1/models/m/load", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(connections(), 2);
}
