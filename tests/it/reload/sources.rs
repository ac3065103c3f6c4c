//! Files that change under a residentd that watches them.

use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use super::{Changing, model, roomy};
use crate::support::residentd::command;
use crate::support::{Residentd, wait_until};

fn wait_for_kind(residentd: &Residentd, kind: &str) {
    wait_until(&format!("the model to be of kind {kind}"), || {
        (residentd.model("a")["type"] == kind).then_some(())
    });
}

fn of_kind(kind: &str) -> String {
    roomy(&[model("a", "", &format!("kind = \"{kind}\""))])
}

#[test]
fn a44_a_file_that_is_written_or_renamed_over_is_read_and_one_with_an_error_changes_nothing() {
    let changing = Changing::start(&of_kind("one"), true);
    let residentd = &changing.residentd;
    let pid = residentd.complete("a").worker_pid();
    changing.write(&of_kind("two"));
    wait_for_kind(residentd, "two");

    // As editors do: another file takes its place.
    let text = format!("{}{}", changing.head, of_kind("three"));
    let beside = changing.file.with_extension("new");
    std::fs::write(&beside, text).expect("written");
    std::fs::rename(&beside, &changing.file).expect("renamed");
    wait_for_kind(residentd, "three");

    changing.write("[models.a]\ncommand = 7\nkind = \"four\"\n");
    wait_until("what is wrong to be told", || {
        let events = residentd.ask("GET", "/api/v1/events?kind=reload", None);
        let events = events.json()["data"]["events"].clone();
        let last = events.as_array()?.last()?.clone();
        let told = last["reason"] == "invalid" && last["origin"] == "watch";
        (told && last["problems"][0].as_str()?.contains("models.a.command")).then_some(())
    });
    // Gone for a moment, then there again, mended.
    std::fs::remove_file(&changing.file).expect("removed");
    assert_eq!(residentd.model("a")["type"], "three");
    changing.write(&of_kind("five"));
    wait_for_kind(residentd, "five");
    assert_eq!(residentd.complete("a").worker_pid(), pid);
    let log = residentd.log();
    assert!(!log.contains("does not tell of changed files"), "{log}");
}

/// Makes the folder of a new version, as Kubernetes mounts a ConfigMap.
fn version(mount: &Path, name: &str, text: &str) {
    let folder = mount.join(name);
    std::fs::create_dir(&folder).expect("made");
    std::fs::write(folder.join("residentd.toml"), text).expect("written");
    symlink(name, mount.join("..data_tmp")).expect("linked");
    std::fs::rename(mount.join("..data_tmp"), mount.join("..data")).expect("swapped");
}

#[test]
fn a44_the_symlink_of_a_mounted_config_map_is_swapped_and_an_env_file_counts() {
    let folder = tempfile::tempdir().expect("a folder");
    let mount = folder.path().join("mount");
    let cwd = folder.path().join("cwd");
    std::fs::create_dir(&mount).expect("made");
    std::fs::create_dir(&cwd).expect("made");
    let state = folder.path().join("state");
    let head = format!("[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\n");
    let limitless = |kind: &str| {
        let text = of_kind(kind).replace("limit = \"600MiB\"\n", "");
        format!("{head}{text}")
    };
    version(&mount, "..one", &limitless("one"));
    symlink("..data/residentd.toml", mount.join("residentd.toml")).expect("linked");
    let mut serve = command(&mount.join("residentd.toml"), &[]);
    serve.current_dir(&cwd);
    let residentd = Residentd::launch(folder, serve);
    let pid = residentd.complete("a").worker_pid();
    version(&mount, "..two", &limitless("two"));
    std::fs::remove_dir_all(mount.join("..one")).expect("removed");
    wait_for_kind(&residentd, "two");
    version(&mount, "..three", &limitless("three"));
    wait_for_kind(&residentd, "three");

    std::fs::write(cwd.join(".env"), "MAX_MEMORY_USAGE=400000000\n").expect("written");
    wait_until("the limit of .env to hold", || {
        let stats = residentd.memory("stats");
        (stats["memory_limit"] == 400_000_000).then_some(())
    });
    assert_eq!(residentd.memory("stats")["limit_source"], json!("env"));
    assert_eq!(residentd.complete("a").worker_pid(), pid);
    let log = residentd.log();
    assert!(!log.contains("does not tell of changed files"), "{log}");
}
