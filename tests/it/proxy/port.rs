//! A worker's port after its end: whoever listens there then is no worker.

use std::io::Write;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use super::rig::one;
use crate::support::{Residentd, kill, now, request, wait_until};

const ROUNDS: usize = 30;
/// How long the stranger listens, and clients ask.
const TIME: Duration = Duration::from_millis(100);

/// Kills the worker, takes its port, and answers everybody.
fn kill_and_steal(pid: i64, port: u16) {
    kill(pid, Signal::SIGKILL);
    let start = now();
    let listener = loop {
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(listener) => break listener,
            // The next worker may be quicker on it.
            Err(_) if start.elapsed() > TIME => return,
            Err(_) => std::thread::yield_now(),
        }
    };
    listener.set_nonblocking(true).expect("a socket option");
    while start.elapsed() < TIME {
        if let Ok((mut stream, _)) = listener.accept() {
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nstolen";
            // Whoever connected may have left.
            let _ = stream.write_all(answer.as_bytes());
        }
        std::thread::yield_now();
    }
}

/// Returns the port that the worker was told.
fn port(residentd: &Residentd) -> u16 {
    let environment = residentd.ask("GET", "/upstream/m/env", None).json();
    let words = environment["args"].as_array().expect("a list").clone();
    let at = words.iter().position(|word| word == "--port");
    let port = words[at.expect("it has a port") + 1].as_str();
    port.and_then(|port| port.parse().ok()).expect("a number")
}

#[test]
fn whoever_listens_on_the_port_of_a_dead_worker_answers_nobody() {
    // Chaos found it: until the end of a worker was noticed its port was trusted.
    let residentd = one("");
    let address = residentd.address();
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let mut killed = None;
    for round in 0..ROUNDS {
        let pid = wait_until("the next worker", || {
            // It forgives the last round, too.
            let loaded = residentd.ask("POST", "/api/v1/models/m/load", None);
            assert_eq!(loaded.status, 200, "{}", loaded.text());
            residentd.worker_pid("m").filter(|pid| killed != Some(*pid))
        });
        killed = Some(pid);
        let port = port(&residentd);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let answer = request(address, "POST", "/v1/completions", Some(&body));
                        let answer = answer.expect("residentd answers");
                        assert_ne!(answer.text(), "stolen", "in round {round}");
                    }
                });
            }
            kill_and_steal(pid, port);
            over.store(true, Ordering::Relaxed);
        });
    }
}
