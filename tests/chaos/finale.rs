//! When all is undone and nobody asks any more: the books are what `/proc`
//! says, every model can be had, and after the end nothing is left.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::plan::{LATE, SHARES};
use crate::processes::{self, Process, marked};
use crate::site::{Blow, Site};
use crate::support::{Residentd, now, pause};
use crate::town::{LIMIT, Town};

const MIB: u64 = 1 << 20;
/// Files that one residentd may have open more than another that idles: a
/// connection that is just closing, a timer.
const FILES_MORE: usize = 4;
/// The longest that anything takes to come to rest.
const REST: Duration = Duration::from_secs(40);

/// Waits for this; a fault when it does not come.
fn await_or_fault<T>(
    site: &Site,
    what: &str,
    mut done: impl FnMut() -> Result<T, String>,
) -> Option<T> {
    let start = now();
    loop {
        match done() {
            Ok(value) => return Some(value),
            Err(why) if start.elapsed() > REST => {
                site.fault(format!("waited {REST:?} for {what}: {why}"));
                return None;
            }
            Err(_) => pause(Duration::from_millis(50)),
        }
    }
}

/// Checks that residentd is well: every model can be had, and the books are
/// true.
pub(crate) fn recover(site: &Site) {
    let limit = LIMIT;
    let limit = f64::from(u32::try_from(limit).expect("a small number")) / 1024.0;
    site.strike(None, Blow::Limit, REST);
    site.ask(
        "POST",
        &format!("/api/v1/memory/limit?limit_gb={limit}"),
        None,
    );
    for (model, _) in SHARES {
        await_or_fault(site, &format!("{model} to answer"), || {
            // What failed before is forgiven so.
            let _ = site.ask(
                "POST",
                &format!("/api/v1/models/{model}/load?wait=false"),
                None,
            );
            let body = json!({"model": model, "prompt": "x"}).to_string();
            match site.ask("POST", "/v1/completions", Some(&body)) {
                Some((200, answer)) if answer["choices"].is_array() => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }
    await_or_fault(site, "the books to be true", || compare(site));
    await_or_fault(site, "nobody to be inside or to wait", || {
        let models = site.models().ok_or("no answer")?;
        let idle = |model: &Value| model["in_flight"] == 0 && model["queued"] == 0;
        models
            .iter()
            .all(idle)
            .then_some(())
            .ok_or(format!("{models:?}"))
    });
}

/// Holds the API's figures against `/proc`, as A10 does: within 2 % or 16 MiB,
/// each and summed. A page that two processes share counts once for residentd
/// and twice here, which those MiB allow for: the programs' own text.
fn compare(site: &Site) -> Result<(), String> {
    let models = site.models().ok_or("no answer")?;
    let (_, stats) = site
        .ask("GET", "/api/v1/memory/stats", None)
        .ok_or("no answer")?;
    let all = marked(&site.folder.display().to_string());
    let mut trees = trees(&all);
    let mut sum = 0;
    for model in &models {
        let name = model["name"].as_str().unwrap_or_default();
        let mine = trees.remove(name).unwrap_or_default();
        let told = model["memory_usage"].as_u64().unwrap_or(0);
        let found: u64 = mine.iter().map(|process| process.resident()).sum();
        let lives = model["pid"].as_i64();
        if lives.is_some() == mine.is_empty() {
            return Err(format!("{name}: {mine:?} run, and {model}"));
        }
        if lives.is_some_and(|pid| !mine.iter().any(|process| process.pid == pid)) {
            return Err(format!("{name}: {model} is not among {mine:?}"));
        }
        let processes = u64::try_from(mine.len()).expect("a small number");
        if lives.is_some() && model["memory"]["processes"].as_u64() != Some(processes) {
            return Err(format!("{name}: {mine:?} run, and {model}"));
        }
        if told.abs_diff(found) > (found / 50).max(16 * MIB) {
            return Err(format!("{name}: {told} bytes are told, {found} found"));
        }
        sum += told;
    }
    if let Some(strangers) = trees.into_values().next() {
        return Err(format!("nobody's processes: {strangers:?}"));
    }
    let told = stats["data"]["total_memory_usage"].as_u64().unwrap_or(0);
    // Pages of the file that two models map are in both, and once in the sum;
    // so are those of the program, which all have.
    let shared = (32 + 4 * 9) * MIB;
    if told > sum || told + shared < sum {
        return Err(format!("{told} bytes in all, {sum} of all models"));
    }
    Ok(())
}

/// Returns the processes of each model's worker; of nobody by an empty name.
fn trees(all: &[Process]) -> BTreeMap<String, Vec<&Process>> {
    let mut trees: BTreeMap<String, Vec<&Process>> = BTreeMap::new();
    for process in all {
        let is_residentd = process.arguments[0].ends_with("/residentd");
        if !is_residentd {
            let name = process.after("--name").unwrap_or_default();
            let name = name.trim_end_matches("-child").to_owned();
            trees.entry(name).or_default().push(process);
        }
    }
    trees
}

/// Unloads everything, so that what residentd has open is its own. Returns how
/// many files that are.
pub(crate) fn idle_files(site: &Site, residentd: &Residentd) -> usize {
    let pid = i64::from(residentd.pid());
    await_or_fault(site, "all models to be unloaded", || {
        for (model, _) in SHARES {
            let _ = site.ask(
                "POST",
                &format!("/api/v1/models/{model}/unload?wait=false"),
                None,
            );
        }
        let models = site.models().ok_or("no answer")?;
        let gone = models.iter().all(|model| model["pid"].is_null());
        gone.then_some(()).ok_or(format!("{models:?}"))
    });
    // Connections that are closed go with the next look at them.
    let mut least = usize::MAX;
    for _ in 0..20 {
        least = least.min(processes::open_files(pid));
        pause(Duration::from_millis(50));
    }
    least
}

/// Checks what residentd has left lying about while it runs and idles.
pub(crate) fn check_idle(site: &Site, residentd: &Residentd, files_before: usize) {
    let files = idle_files(site, residentd);
    site.note(format!(
        "residentd has {files} files open, at first it had {files_before}"
    ));
    if files > files_before + FILES_MORE {
        let listed = std::process::Command::new("ls")
            .args(["-l", &format!("/proc/{}/fd", residentd.pid())])
            .output()
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        site.fault(format!(
            "residentd has {files} files open, at first it had {files_before}: {listed:?}"
        ));
    }
    let pid = i64::from(residentd.pid());
    await_or_fault(site, "zombies to be reaped", || {
        let zombies = processes::zombies(pid);
        zombies
            .is_empty()
            .then_some(())
            .ok_or(format!("{zombies:?}"))
    });
}

/// Ends residentd and looks for what is left.
pub(crate) fn end(site: &Site, town: &mut Town, ports: &[u16]) {
    town.residentd.signal(Signal::SIGTERM);
    let status = town.residentd.wait();
    if status.code() != Some(0) {
        site.fault(format!("residentd ended with {status:?}"));
    }
    let left = marked(&site.folder.display().to_string());
    if !left.is_empty() {
        site.fault(format!("processes are left: {left:?}"));
    }
    for (port, inode) in processes::listening() {
        let holders = processes::holders(inode);
        // No process of the run is left, so whoever is known to listen there is a
        // stranger who came later.
        if ports.contains(&port) && holders.is_empty() {
            site.fault(format!("nobody that is known listens on {port}"));
        } else if ports.contains(&port) {
            site.note(format!("{holders:?} listens on {port}, where a worker did"));
        }
    }
    check_folder(site);
}

/// Checks that the state folder has what is documented and nothing else.
fn check_folder(site: &Site) {
    let state = site.folder.join("state");
    let list = |folder: &str| -> Vec<String> {
        let entries = std::fs::read_dir(state.join(folder)).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.collect()
    };
    let known = [
        "residentd.redb",
        "residentd.lock",
        "residentd.name",
        "logs",
        "sockets",
        "reports",
    ];
    let strange: Vec<_> = list("")
        .into_iter()
        .filter(|name| !known.contains(&name.as_str()))
        .collect();
    let is_log = |name: &String| {
        let model = name.trim_end_matches(".1").trim_end_matches(".log");
        SHARES.iter().any(|(known, _)| *known == model)
    };
    let logs: Vec<_> = list("logs")
        .into_iter()
        .filter(|name| !is_log(name))
        .collect();
    let rest: Vec<_> = ["sockets", "reports"].into_iter().flat_map(list).collect();
    for left in [strange, logs, rest]
        .into_iter()
        .filter(|left| !left.is_empty())
    {
        site.fault(format!("files are left in the state folder: {left:?}"));
    }
    if !list("logs").contains(&format!("{LATE}.log")) {
        site.fault("there is no log of a model that ran");
    }
}
