//! The state folder: read-only, full, damaged, and what it remembers over a
//! crash. None of it may lose a worker or tell a lie.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::gpu::parked;
use crate::support::gpu::FakeDriver;
use crate::support::residentd::{RESIDENTD, STUB};
use crate::support::{Residentd, kill, pause, runs, wait_until};

fn one(head: &str) -> String {
    format!(
        "{head}\n[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m'\nmemory = \"32MiB\"\n"
    )
}

/// A small disk of its own, or a folder that only looks read-only: root may write
/// to any folder, and only root may mount.
struct Disk {
    folder: tempfile::TempDir,
    mounted: bool,
}

impl Disk {
    fn mount(options: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(folder.path())
            .status();
        Self {
            mounted: done.is_ok_and(|status| status.success()),
            folder,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            // What is busy goes when it is no longer.
            let _ = Command::new("umount").arg("-l").arg(self.path()).status();
        }
    }
}

/// Makes a file as large as its disk allows.
fn fill(path: &Path) {
    let mut options = std::fs::File::options();
    let mut file = options
        .append(true)
        .create(true)
        .open(path)
        .expect("a file");
    while file.write_all(&[0; 4096]).is_ok() {}
}

/// Runs residentd with this state folder, which it cannot use.
fn refused(state: &Path) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("c.toml");
    std::fs::write(&file, one("[server]\nlisten = \"127.0.0.1:0\"")).expect("written");
    let output = Command::new(RESIDENTD)
        .args(["serve", "--config"])
        .arg(&file)
        .arg("--state-dir")
        .arg(state)
        .output()
        .expect("residentd can be spawned");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&state.display().to_string()), "{text}");
    text
}

#[test]
fn a_read_only_state_folder_is_named_with_the_way_out() {
    let disk = Disk::mount("ro,size=64k");
    if !disk.mounted {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o555);
        std::fs::set_permissions(disk.path(), mode).expect("it is ours");
    }
    let text = refused(&disk.path());
    assert!(text.contains("make it writable"), "{text}");
    assert!(text.contains("--state-dir"), "{text}");
    let text = refused(&disk.path().join("new"));
    assert!(text.contains("make it writable"), "{text}");
}

#[test]
fn a_full_disk_at_the_start_is_told_as_one() {
    let disk = Disk::mount("size=64k");
    // Without a disk of its own, a unit test of the store has the same story.
    if disk.mounted {
        fill(&disk.path().join("filler"));
        let text = refused(&disk.path());
        assert!(text.contains("disk is full"), "{text}");
    }
}

#[test]
fn a_disk_that_runs_full_costs_no_worker_is_told_and_recovers() {
    let disk = Disk::mount("size=8m");
    if !disk.mounted {
        // A unit test of the store has the same story without a disk.
        return;
    }
    let state = disk.path().join("state");
    let mut residentd = Residentd::start(&one(""));
    residentd.signal(Signal::SIGTERM);
    residentd.wait();
    let state = state.display().to_string();
    let on_disk = ["--state-dir", &state];
    residentd.start_again(&on_disk);
    let pid = residentd.complete("m").worker_pid();
    let filler = disk.path().join("filler");
    wait_until("the disk to be full", || {
        fill(&filler);
        let pin = residentd.ask("POST", "/api/v1/models/m/pin", None);
        assert_eq!(pin.status, 200, "{}", pin.text());
        let error = residentd.memory("stats")["state_error"].clone();
        error.as_str().map(str::to_owned)
    });
    let metrics = residentd.ask("GET", "/metrics", None).text();
    assert!(metrics.contains("residentd_state_writable 0"), "{metrics}");
    assert_eq!(residentd.complete("m").worker_pid(), pid, "it serves on");
    let told = "writing the state database failed";
    assert_eq!(residentd.log().matches(told).count(), 1);
    std::fs::remove_file(&filler).expect("it is ours");
    wait_until("writing to work again", || {
        residentd.memory("stats")["state_error"]
            .is_null()
            .then_some(())
    });
    residentd.signal(Signal::SIGKILL);
    residentd.wait();
    residentd.start_again(&on_disk);
    assert_eq!(
        residentd.worker_pid("m"),
        Some(pid),
        "its record was not lost"
    );
}

#[test]
fn on_a_full_disk_whoever_would_be_parked_is_ended() {
    let disk = Disk::mount("size=8m");
    if !disk.mounted {
        // A unit test of the store has its half of the story without a disk.
        return;
    }
    let driver = FakeDriver::new(1);
    let models = ["red", "green"].map(|name| parked::model(&driver, name, "", parked::PARK));
    let library = driver.library();
    let head =
        format!("[memory]\nlimit = \"600MiB\"\nreserve = \"16MiB\"\nnvml_library = {library:?}\n");
    let mut residentd = Residentd::start(&(head + &models.concat()));
    residentd.signal(Signal::SIGTERM);
    residentd.wait();
    let state = disk.path().join("state").display().to_string();
    residentd.start_again(&["--state-dir", &state]);
    let mut pids = ["red", "green"].map(|name| residentd.complete(name).worker_pid());
    residentd.wait_for_phase("red", "parked");
    let filler = disk.path().join("filler");
    let mut turns = ["red", "green"].into_iter().cycle();
    // The database may find room within itself once more, and then parking is right.
    let gone = wait_until("a park to fail", || {
        let asked = turns.next().expect("it is endless");
        wait_until("the disk to be full", || {
            fill(&filler);
            residentd.ask("POST", "/api/v1/models/red/unpin", None);
            let error = residentd.memory("stats")["state_error"].clone();
            (!error.is_null()).then_some(())
        });
        let answer = residentd.complete(asked);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.worker_pid(), pids[0], "a parked one comes back");
        pids.reverse();
        (!runs(pids[0])).then_some(if asked == "red" { "green" } else { "red" })
    });
    assert_eq!(residentd.eviction(gone), "park_failed");
    let told = format!("/api/v1/events?kind=terminate&model={gone}");
    let told = residentd.ask("GET", &told, None);
    let cause = told.json()["data"]["events"][0]["cause"].clone();
    let cause = cause.as_str().expect("a cause");
    assert!(
        cause.starts_with("that it is parked cannot be written down"),
        "{cause}"
    );
}

#[test]
fn workers_of_a_damaged_database_are_ended_when_they_are_known_to_be_ours() {
    let mut residentd = Residentd::start(&one(""));
    let state = residentd.folder().join("state");
    let pid = residentd.complete("m").worker_pid();
    let damage = |residentd: &mut Residentd| {
        residentd.signal(Signal::SIGKILL);
        residentd.wait();
        std::fs::write(state.join("residentd.redb"), b"no database").expect("written");
    };
    damage(&mut residentd);
    assert!(runs(pid));
    residentd.start_again(&[]);
    assert!(!runs(pid), "what cannot be verified is ended");
    assert!(residentd.log().contains("damaged and was set aside"));
    let pid = residentd.complete("m").worker_pid();
    damage(&mut residentd);
    std::fs::remove_file(state.join("residentd.name")).expect("it is there");
    residentd.start_again(&[]);
    assert!(runs(pid), "nobody knows whose it is");
    assert!(residentd.log().contains("are not known any more"));
    let next = residentd.complete("m").worker_pid();
    assert_ne!(next, pid);
    kill(pid, Signal::SIGKILL);
}

#[test]
fn events_of_before_a_crash_are_told_after_it_with_numbers_that_go_on() {
    let mut residentd = Residentd::start(&one(""));
    let page = |residentd: &Residentd, query: &str| {
        let answer = residentd.ask("GET", &format!("/api/v1/events?{query}"), None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["data"].clone()
    };
    let ids = |page: &Value| -> Vec<u64> {
        let events = page["events"].as_array().expect("a list");
        events
            .iter()
            .filter_map(|event| event["id"].as_u64())
            .collect()
    };
    residentd.complete("m");
    let before = wait_until("its load to be told", || {
        let page = page(&residentd, "limit=1000");
        (page["events"].as_array()?.last()?["kind"] == "ready").then_some(page)
    });
    // A quarter of a second, and what a commit takes.
    pause(Duration::from_millis(800));
    residentd.restart_after(Signal::SIGKILL);
    let after = page(&residentd, "limit=1000");
    let (old, all) = (ids(&before), ids(&after));
    assert_eq!(all[..old.len()], old);
    let events = after["events"].as_array().expect("a list");
    assert_eq!(
        events[..old.len()],
        before["events"].as_array().expect("a list")[..]
    );
    assert_eq!(events[old.len()]["kind"], "adopt");
    assert!(all.windows(2).all(|two| two[1] == two[0] + 1), "{all:?}");
    let place = before["next"].as_str().expect("a place");
    let since = page(&residentd, &format!("since={place}"));
    assert_eq!(since["events"][0]["kind"], "adopt", "{since}");
    assert_eq!(
        (&since["missed"], ids(&since).first()),
        (&json!(0), all.get(old.len()))
    );
    let spawns = page(&residentd, "kind=spawn&model=m");
    assert_eq!(ids(&spawns).len(), 1, "that of the run before: {spawns}");
    residentd.restart_after(Signal::SIGTERM);
    let last = page(&residentd, "limit=1000");
    assert!(ids(&last).len() > all.len());
    let kinds = page(&residentd, "kind=shutdown");
    assert_eq!(
        ids(&kinds).len(),
        1,
        "a normal end is written whole: {kinds}"
    );
}
