//! A new one that does not get on: the old one goes on, and nothing is lost.

use super::*;

fn refused(residentd: &Residentd) -> String {
    let answer = residentd.ask("POST", "/api/v1/upgrade", None);
    let error = answer.json()["error"].clone();
    assert_eq!(answer.status, 409, "{error}");
    assert_eq!(error["code"], "upgrade_failed");
    error["message"].as_str().expect("a text").to_owned()
}

#[test]
fn one_that_cannot_start_is_told_of_and_the_old_one_goes_on() {
    let (residentd, program) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    let whole = std::fs::read_to_string(residentd.folder().join("residentd.toml"));
    let whole = whole.expect("it was written");

    residentd.configure(&(config() + "[models.bad]\ncommand = 3\nmemmory = 1\n"));
    let why = refused(&residentd);
    assert!(
        why.contains("models.bad.memmory"),
        "everything is told: {why}"
    );
    assert!(
        why.contains("models.bad.command"),
        "everything is told: {why}"
    );

    let elsewhere = whole.replace("/state\"", "/elsewhere\"");
    std::fs::write(residentd.folder().join("residentd.toml"), elsewhere).expect("written");
    let why = refused(&residentd);
    assert!(
        why.contains("server.state_dir") && why.contains("restart"),
        "{why}"
    );

    let alone = whole.replace("[memory]", "adopt = false\n[memory]");
    std::fs::write(residentd.folder().join("residentd.toml"), alone).expect("written");
    let why = refused(&residentd);
    assert!(why.contains("server.adopt = false"), "{why}");

    std::fs::write(residentd.folder().join("residentd.toml"), whole).expect("written");
    replace(&program, "#!/bin/sh\necho oh no >&2; exit 3\n");
    let why = refused(&residentd);
    assert!(why.contains("exit code 3"), "{why}");
    std::fs::remove_file(&program).expect("it is there");
    let why = refused(&residentd);
    assert!(why.contains(&program.display().to_string()), "{why}");

    assert_eq!(residentd.complete("a").worker_pid(), pid);
    assert_eq!(residentd.complete("b").status, 200, "and decides as before");
    assert_eq!(residentd.model("a")["loads"], 1);
}

/// A new one that says that it can, takes everything, and then does this.
fn pretender(end: &str) -> String {
    format!(
        "#!/usr/bin/env python3\n\
         import array, json, os, socket, sys, time\n\
         link = socket.socket(fileno=0)\n\
         state = {{'word': 'prepared', 'version': '9', 'state_dir': os.environ['STATE'], 'adopt': True}}\n\
         link.send(json.dumps(state).encode())\n\
         take, control, _, _ = link.recvmsg(200000, socket.CMSG_SPACE(256))\n\
         assert json.loads(take)['word'] == 'take', take\n\
         assert len(control) == 1, control\n\
         {end}\n"
    )
}

#[test]
fn one_that_dies_with_everything_in_its_hands_leaves_the_old_one_as_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    drop(folder);
    for (end, said) in [
        ("os.kill(os.getpid(), 9)", "it ended before it served"),
        (
            "time.sleep(1.5); link.send(json.dumps({'word': 'failed', 'why': 'no luck'}).encode())",
            "no luck",
        ),
        ("link.send(b'no json')", "it ended before it served"),
    ] {
        let (residentd, program) = start(&config(), &[]);
        let pid = residentd.complete("a").worker_pid();
        let address = residentd.address().to_owned();
        let stream = begin(&residentd, "a", 150);
        let state = residentd.folder().join("state");
        let end = end.replace("STATE", &state.display().to_string());
        let script =
            pretender(&end).replace("os.environ['STATE']", &format!("'{}'", state.display()));
        replace(&program, &script);
        let asked: Vec<_> = ["a", "b", "slow"]
            .map(|name| {
                let address = address.clone();
                std::thread::spawn(move || {
                    // In the midst of it.
                    pause(Duration::from_millis(300));
                    let body = json!({"model": name, "prompt": "x"}).to_string();
                    request(&address, "POST", "/v1/completions", Some(&body)).expect("an answer")
                })
            })
            .into();
        let why = refused(&residentd);
        assert!(why.contains(said), "{why}");
        for asked in asked {
            let answer = asked.join().expect("no panic");
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        let answer = finish(stream);
        assert!(answer.text().contains("[DONE]"), "it is whole");
        assert_eq!(residentd.complete("a").worker_pid(), pid);
        // The state is ours again: what happens is written down.
        residentd.wait_until_kept("slow");
        let trouble = residentd.log();
        assert!(
            !trouble.contains("writing the state database failed"),
            "{trouble}"
        );
        // And a real one can take over after that.
        std::fs::remove_file(&program).expect("it is there");
        std::fs::copy(RESIDENTD, &program).expect("it can be copied");
        upgrade(&residentd);
        for name in ["a", "b", "slow"] {
            assert_eq!(residentd.complete(name).status, 200);
            assert_eq!(residentd.model(name)["loads"], 0, "{name} was taken along");
        }
    }
}
