//! Refusals that pass by themselves say when to come back.

use serde_json::json;

use crate::support::http::send;
use crate::support::residentd::STUB;
use crate::support::{Answer, Residentd, wait_until};

fn says_when(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.json()["error"]["code"], code);
    let seconds = answer
        .header("retry-after")
        .and_then(|s| s.parse::<u64>().ok());
    assert!(seconds.is_some_and(|s| s > 0), "{code}: {seconds:?}");
}

/// Two models of which one fits.
fn tight() -> Residentd {
    let model = |name: &str, more: &str| {
        format!(
            "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} --anon 96MiB'\nmemory = \"112MiB\"\n{more}"
        )
    };
    Residentd::start(&format!(
        "[memory]\nlimit = \"150MiB\"\nreserve = \"16MiB\"\n{}{}",
        model("red", ""),
        model("blue", "queue_timeout = \"300ms\"\n")
    ))
}

#[test]
fn each_429_and_503_that_passes_by_itself_says_when_to_come_back() {
    let residentd = tight();
    let body =
        json!({"model": "red", "prompt": "x", "stream": true, "x_chunks": 5000, "x_pace_ms": 20})
            .to_string();
    assert_eq!(residentd.complete("red").status, 200);
    let stream =
        send(residentd.address(), "POST", "/v1/completions", Some(&body)).expect("a connection");
    wait_until("red to be busy", || {
        (residentd.model("red")["in_flight"] == 1).then_some(())
    });
    let answer = residentd.complete("blue");
    let code = answer.json()["error"]["code"].clone();
    assert!(code == "no_room" || code == "queue_timeout", "{code}");
    says_when(&answer, 503, code.as_str().expect("text"));

    residentd.signal(nix::sys::signal::Signal::SIGTERM);
    wait_until("the drain to begin", || {
        (residentd.ask("GET", "/readyz", None).status == 503).then_some(())
    });
    says_when(&residentd.complete("red"), 503, "draining");
    drop(stream);
}
