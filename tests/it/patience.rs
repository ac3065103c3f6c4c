//! Traffic that overlaps without pause, and who waits behind it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::support::http::{Answer, request, send};
use crate::support::residentd::STUB;
use crate::support::{Residentd, now, pause, settle, wait_until};

/// Room for one of two models, and a second of patience.
fn one_of_two() -> Residentd {
    let model = |name: &str| {
        format!(
            "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} --anon 64MiB'\nmemory = \"80MiB\"\n"
        )
    };
    Residentd::start(&format!(
        "[memory]\nlimit = \"120MiB\"\nreserve = \"16MiB\"\npatience = \"1s\"\n{}{}",
        model("a"),
        model("b")
    ))
}

fn slow(residentd: &Residentd, model: &str, millis: u64) -> Answer {
    let body = json!({"model": model, "prompt": "x", "x_delay_ms": millis}).to_string();
    residentd.ask("POST", "/v1/completions", Some(&body))
}

#[test]
fn a33_four_clients_that_overlap_without_pause_starve_nobody_and_lose_nothing() {
    let residentd = one_of_two();
    residentd.complete("a");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|nth| {
                let (residentd, over) = (&residentd, &over);
                scope.spawn(move || {
                    let mut answers = 0;
                    pause(Duration::from_millis(100 * nth));
                    while !over.load(Ordering::Relaxed) {
                        let answer = slow(residentd, "a", 400);
                        assert_eq!(answer.status, 200, "{}", answer.text());
                        answers += 1;
                    }
                    answers
                })
            })
            .collect();
        pause(Duration::from_secs(1));
        let mut waits = Vec::new();
        for _ in 0..3 {
            let asked = now();
            let answer = residentd.complete("b");
            waits.push(asked.elapsed());
            assert_eq!(answer.status, 200, "{}", answer.text());
            let before = residentd.model("a")["access_count"].clone();
            wait_until("the others to be served again", || {
                (residentd.model("a")["access_count"] != before).then_some(())
            });
        }
        over.store(true, Ordering::Relaxed);
        for client in clients {
            assert!(client.join().expect("no panic") > 1);
        }
        // Patience, the longest request, and a load on a machine that runs other
        // tests beside this one.
        let bound = Duration::from_millis(1000 + 400 + 1500);
        assert!(waits.iter().all(|wait| *wait < bound), "{waits:?}");
        assert!(
            waits
                .iter()
                .any(|wait| *wait >= Duration::from_millis(1000)),
            "the first victim was not idle: {waits:?}"
        );
    });
    assert_eq!(residentd.eviction("a"), "make_room");
}

#[test]
fn a33_a_drain_ends_when_the_client_it_was_for_has_left() {
    let residentd = one_of_two();
    let worker = residentd.complete("a").worker_pid();
    std::thread::scope(|scope| {
        let long = scope.spawn(|| slow(&residentd, "a", 4000));
        wait_until("the request to be inside", || {
            (residentd.model("a")["in_flight"] == 1).then_some(())
        });
        let body = json!({"model": "b", "prompt": "x"}).to_string();
        let waiting = send(residentd.address(), "POST", "/v1/completions", Some(&body));
        residentd.wait_for_phase("a", "draining");
        // It queues behind the drain, and is served as soon as that is off.
        let late = scope.spawn(|| residentd.complete("a"));
        wait_until("a request to queue", || {
            (residentd.model("a")["queued"] == 1).then_some(())
        });
        drop(waiting);
        let late = late.join().expect("no panic");
        assert_eq!((late.status, late.worker_pid()), (200, worker));
        assert_eq!(
            residentd.model("a")["in_flight"],
            1,
            "the long one is inside"
        );
        let long = long.join().expect("no panic");
        assert_eq!((long.status, long.worker_pid()), (200, worker));
    });
    assert_eq!(residentd.model("b")["loads"], 0);
}

#[test]
fn a33_unloading_a_deaf_worker_leaves_another_models_latency_alone_within_5_ms() {
    let residentd = Residentd::start(&format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n\
         [models.quick]\ncommand = '{STUB} --port ${{PORT}}'\nmemory = \"32MiB\"\n\
         [models.deaf]\ncommand = '{STUB} --port ${{PORT}} --ignore-term'\nmemory = \"32MiB\"\nstop_timeout = \"2s\"\n"
    ));
    residentd.complete("quick");
    // The 99th percentile of so many requests, in milliseconds.
    let p99 = || {
        let mut took: Vec<f64> = (0..200)
            .map(|_| {
                let asked = now();
                assert_eq!(residentd.complete("quick").status, 200);
                asked.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        took.sort_by(f64::total_cmp);
        took[198]
    };
    let added = (0..3).map(|_| {
        residentd.complete("deaf");
        let before = p99();
        let during = std::thread::scope(|scope| {
            let address = residentd.address();
            let path = "/api/v1/models/deaf/unload";
            let unload = scope.spawn(move || request(address, "POST", path, None));
            residentd.wait_for_phase("deaf", "stopping");
            let during = p99();
            assert_eq!(residentd.model("deaf")["phase"], "stopping", "it is deaf");
            assert!(unload.join().expect("no panic").is_ok());
            during
        });
        (during - before).max(0.0)
    });
    settle(
        "A33",
        "added to the 99th percentile while a deaf worker ends",
        5.0,
        added.collect(),
    );
}
