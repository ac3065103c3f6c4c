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
fn pretender(residentd: &Residentd, end: &str) -> String {
    let state = residentd.folder().join("state");
    format!(
        "#!/usr/bin/env python3\n\
         import array, json, os, socket, sys, time\n\
         link = socket.socket(fileno=0)\n\
         state = {{'word': 'prepared', 'version': '9', 'state_dir': {state:?}, 'adopt': True}}\n\
         link.send(json.dumps(state).encode())\n\
         take, control, _, _ = link.recvmsg(200000, socket.CMSG_SPACE(256))\n\
         assert json.loads(take)['word'] == 'take', take\n\
         assert len(control) == 1, control\n\
         {end}\n"
    )
}

#[test]
fn one_that_dies_with_everything_in_its_hands_leaves_the_old_one_as_it_was() {
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
        replace(&program, &pretender(&residentd, end));
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

#[test]
fn an_end_that_is_asked_for_in_the_midst_of_an_upgrade_comes_when_that_has_failed() {
    for signals in [1, 2] {
        let (mut residentd, program) = start(&config(), &[]);
        let pid = residentd.complete("a").worker_pid();
        let fails =
            "time.sleep(1); link.send(json.dumps({'word': 'failed', 'why': 'no luck'}).encode())";
        replace(&program, &pretender(&residentd, fails));
        residentd.signal(Signal::SIGUSR2);
        wait_until("the upgrade to be underway", || {
            residentd.log().contains("handing over").then_some(())
        });
        for _ in 0..signals {
            residentd.signal(Signal::SIGTERM);
            pause(Duration::from_millis(100));
        }
        assert_eq!(residentd.wait().code(), Some(0));
        assert!(!runs(pid));
    }
}

/// Returns the pid of the child that takes over.
fn heir(of: u32) -> Option<u32> {
    children(of).into_iter().find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("--take-over")
    })
}

/// Kills one of the two so long after an upgrade has begun; whatever that comes to,
/// the worker is the same in the end.
fn kill_in_the_midst(whom: &str, after: Duration) {
    let (mut residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    residentd.wait_until_kept("a");
    let (old, address) = (residentd.pid(), residentd.address().to_owned());
    let asked = std::thread::spawn(move || {
        let answer = request(&address, "POST", "/api/v1/upgrade", None);
        answer.is_ok_and(|answer| answer.status == 200)
    });
    let new = wait_until("a child to take over", || heir(old));
    pause(after);
    let victim = if whom == "old" { old } else { new };
    let has_ended = !runs(i64::from(victim));
    if !has_ended {
        crate::support::kill(i64::from(victim), Signal::SIGKILL);
    }
    let upgraded = asked.join().expect("no panic");
    if whom == "new" && !upgraded {
        // The old one goes on.
        assert_eq!(residentd.complete("a").worker_pid(), pid, "{after:?}");
        return;
    }
    residentd.wait();
    wait_until("both to have ended", || {
        (!runs(i64::from(old)) && !runs(i64::from(new))).then_some(())
    });
    assert!(runs(pid), "{whom} {after:?}: the worker lives");
    residentd.start_again(&[]);
    assert_eq!(
        residentd.complete("a").worker_pid(),
        pid,
        "{whom} {after:?}"
    );
    assert_eq!(residentd.model("a")["loads"], 0);
}

#[test]
fn whichever_of_the_two_is_killed_whenever_no_worker_is_lost_and_nobody_is_in_the_way() {
    for whom in ["old", "new"] {
        for after in [0, 20, 40, 60, 80, 100, 150, 250, 600] {
            kill_in_the_midst(whom, Duration::from_millis(after));
        }
    }
}

#[test]
fn what_waits_for_one_that_took_over_and_is_killed_is_told_to_come_again() {
    let (mut residentd, _) = start(&config(), &[]);
    let old = residentd.pid();
    let body = json!({"model": "slow", "prompt": "x"}).to_string();
    let path = "/v1/completions";
    let mut asked = http::send(residentd.address(), "POST", path, Some(&body)).expect("connected");
    wait_until("slow to be spawned", || residentd.worker_pid("slow"));
    let new = upgrade(&residentd);
    crate::support::kill(i64::from(new), Signal::SIGKILL);
    let mut raw = Vec::new();
    asked.read_to_end(&mut raw).expect("an answer");
    let answer = Answer::parse(&raw).expect("an answer");
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert_eq!(answer.json()["error"]["code"], "draining");
    assert!(answer.header("retry-after").is_some());
    residentd.wait();
    assert!(!runs(i64::from(old)), "nothing came here that is left");
}

#[test]
fn of_two_upgrades_at_once_one_is_made() {
    let (residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    let address = residentd.address().to_owned();
    let asked: Vec<_> = (0..3)
        .map(|_| {
            let address = address.clone();
            std::thread::spawn(move || {
                let answer = request(&address, "POST", "/api/v1/upgrade", None);
                answer.expect("an answer").status
            })
        })
        .collect();
    let mut answers: Vec<_> = asked
        .into_iter()
        .map(|a| a.join().expect("no panic"))
        .collect();
    answers.sort_unstable();
    assert_eq!(answers[0], 200, "{answers:?}");
    assert!(
        answers.iter().all(|status| [200, 409].contains(status)),
        "{answers:?}"
    );
    assert_eq!(residentd.complete("a").worker_pid(), pid);
}
