//! The stub worker itself: what other tests rest on.

mod rig;

use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use residentd::clock::Clock;
use serde_json::{Value, json};

use self::rig::{DEADLINE, Stub, ask, connect, receive, send, stats, status_kib};
use crate::support::wire::Wire;
use crate::support::{runs, wait_until};

#[test]
fn an_answer_names_the_worker_and_what_it_got() {
    let (stub, address) = Stub::ready(&[]);
    let body = json!({"model": "foo", "prompt": "hi", "x_chunks": 2});
    let reply = ask(&address, "POST /v1/completions", &body);
    assert_eq!((reply.status, reply.whole), (200, true));
    let (pid, length) = (stub.pid(), body.to_string().len());
    let expected = format!("red pid={pid} model=foo bytes={length} red0 red1 ");
    assert_eq!(reply.text(), expected);
    assert!(reply.head.contains(&format!("x-stub-pid: {pid}")));
    let chat = ask(&address, "POST /v1/chat/completions", &body).json();
    assert_eq!(chat["choices"][0]["message"]["content"], expected);
}

#[test]
fn a_stream_comes_in_events_at_its_pace_and_ends_with_done() {
    let (_stub, address) = Stub::ready(&[]);
    let clock = Clock::start();
    let body = json!({"stream": true, "x_chunks": 5, "x_pace_ms": 20});
    let reply = ask(&address, "POST /v1/chat/completions", &body);
    assert!(clock.now().since_start() >= Duration::from_millis(100));
    assert!(reply.head.contains("content-type: text/event-stream"));
    let events: Vec<&str> = reply.body.split_terminator("\n\n").collect();
    assert_eq!(events.len(), 6);
    assert_eq!(events[5], "data: [DONE]");
    let first: Value = serde_json::from_str(&events[0]["data: ".len()..]).expect("JSON");
    assert_eq!(first["object"], "chat.completion.chunk");
    assert!(reply.whole);
}

#[test]
fn a_broken_stream_ends_without_its_last_chunk_or_with_a_reset() {
    let (_stub, address) = Stub::ready(&[]);
    let mut body = json!({"stream": true, "x_chunks": 9, "x_break_after": 3});
    let closed = ask(&address, "POST /v1/completions", &body);
    assert_eq!(closed.body.matches("data: ").count(), 3);
    assert_eq!((closed.whole, closed.error), (false, None));

    body["x_reset"] = json!(true);
    let reset = ask(&address, "POST /v1/completions", &body);
    assert_eq!(reset.error, Some(std::io::ErrorKind::ConnectionReset));

    let plain = ask(
        &address,
        "POST /v1/completions?x_break_after=1",
        &json!({"x_chunks": 4}),
    );
    assert!(!plain.whole && !plain.body.is_empty());
    let dropped = ask(&address, "POST /v1/completions", &json!({"x_drop": true}));
    assert_eq!(dropped.head, "");
    let books = stats(&address);
    assert_eq!(
        (&books["served"], &books["cancelled"]),
        (&json!(4), &json!(0))
    );
}

#[test]
fn a_worker_can_kill_itself_in_mid_stream() {
    let (mut stub, address) = Stub::ready(&[]);
    let body = json!({"stream": true, "x_chunks": 9, "x_exit_after": 2});
    let reply = ask(&address, "POST /v1/completions", &body);
    assert_eq!(reply.body.matches("data: ").count(), 2);
    assert!(!reply.whole);
    assert_eq!(stub.exit().signal(), Some(9));
}

#[test]
fn a_client_that_leaves_a_stream_is_counted_as_cancelled() {
    let (_stub, address) = Stub::ready(&[]);
    for body in [
        json!({"stream": true, "x_chunks": 1_000_000, "x_pace_ms": 5}),
        json!({"x_delay_ms": 60_000}),
    ] {
        let before = stats(&address)["cancelled"].as_u64().expect("a number");
        let mut stream = connect(&address);
        send(&mut stream, "POST /v1/completions", &body.to_string());
        wait_until("the request is in flight", || {
            (stats(&address)["in_flight"] == 1).then_some(())
        });
        drop(stream);
        wait_until("the request is cancelled", || {
            (stats(&address)["cancelled"] == before + 1).then_some(())
        });
        assert_eq!(stats(&address)["in_flight"], 0);
    }
}

#[test]
fn one_connection_carries_many_requests() {
    let (_stub, address) = Stub::ready(&[]);
    let mut stream = connect(&address);
    for _ in 0..3 {
        send(&mut stream, "POST /v1/completions", "{}");
        assert_eq!(receive(&mut stream).status, 200);
    }
    let books = stats(&address);
    assert_eq!(
        (&books["requests"], &books["connections"]),
        (&json!(3), &json!(2))
    );
}

#[test]
fn an_early_listener_answers_503_until_it_is_ready() {
    let loading = Stub::spawn(&["--never-ready"]);
    let address = loading.line("red: listening on ");
    let health = ask(&address, "GET /health", &Value::Null);
    assert_eq!(health.status, 503);
    assert_eq!(health.json()["error"]["message"], "Loading model");
    let refused = ask(&address, "POST /v1/completions", &json!({}));
    assert_eq!(refused.status, 503);
    let books = stats(&address);
    assert_eq!(
        (&books["probes"], &books["requests"]),
        (&json!(1), &json!(0))
    );

    let clock = Clock::start();
    let (_ready, address) = Stub::ready(&["--ready-after", "100ms"]);
    assert!(clock.now().since_start() >= Duration::from_millis(100));
    assert_eq!(ask(&address, "GET /health", &Value::Null).status, 200);
}

#[test]
fn a_late_listener_refuses_until_it_is_ready_and_stamps_the_moment() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name| directory.path().join(name).display().to_string();
    let (early, socket, stamp) = (path("early"), path("socket"), path("stamp"));
    let late = ["--listen=late", "--spam-lines=1", "--socket"];
    let loading = Stub::spawn(&[&late[..], &[&early, "--never-ready"]].concat());
    loading.line("red: line 0 ");
    assert!(UnixStream::connect(&early).is_err());

    let stub = Stub::spawn(&[&late[..], &[&socket, "--ready-stamp", &stamp]].concat());
    stub.line("red: ready on unix:");
    let mut stream = UnixStream::connect(&socket).expect("it listens now");
    send(&mut stream, "GET /stats", "");
    let books = receive(&mut stream).json();
    let text = wait_until("a stamp", || std::fs::read_to_string(&stamp).ok());
    let stamp: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(stamp["monotonic_ns"], books["ready_monotonic_ns"]);
    assert!(stamp["unix_ns"].as_u64() > Some(1_700_000_000_000_000_000));
}

#[test]
fn memory_of_each_kind_is_resident_within_two_per_cent() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(24 << 20).expect("room");
    let path = file.path().to_str().expect("UTF-8");
    let (bare, _) = Stub::ready(&[]);
    let sizes = ["--anon=48MiB", "--shm=16MiB", "--map", path];
    let (stub, address) = Stub::ready(&[&sizes[..], &["--grow=1MiB"]].concat());
    let more = |field| {
        let (with, without) = (status_kib(stub.pid(), field), status_kib(bare.pid(), field));
        with.saturating_sub(without)
    };
    let near = |kib: u64, mib: u64| kib.abs_diff(mib << 10) * 50 <= mib << 10;
    assert!(near(more("RssAnon"), 48), "{}", more("RssAnon"));
    assert!(near(more("RssShmem") + more("RssFile"), 16 + 24));
    for _ in 0..8 {
        ask(&address, "POST /v1/completions", &json!({}));
    }
    assert!(near(more("RssAnon"), 56), "{}", more("RssAnon"));
    assert_eq!(stats(&address)["grown_bytes"], 8 << 20);
}

#[test]
fn children_are_in_the_group_and_a_daemon_is_in_a_session_of_its_own() {
    let (mut stub, address) = Stub::ready(&["--child", "--daemon-child", "--child-anon=8MiB"]);
    let books = stats(&address);
    let pid = |index: usize| {
        let pid = books["children"][index].as_i64().expect("a pid");
        i32::try_from(pid).expect("a pid")
    };
    let (child, daemon) = (pid(0), pid(1));
    stub.others = vec![daemon];
    let session = |pid| nix::unistd::getsid(Some(Pid::from_raw(pid))).expect("a session");
    let group = |pid| nix::unistd::getpgid(Some(Pid::from_raw(pid))).expect("a group");
    assert_eq!(group(child).as_raw(), stub.pid());
    assert_ne!(session(daemon), session(stub.pid()));
    wait_until("the children hold their memory", || {
        [child, daemon]
            .iter()
            .all(|pid| status_kib(*pid, "RssAnon") >= 8 << 10)
            .then_some(())
    });
    let parent = std::fs::read_to_string(format!("/proc/{daemon}/status")).expect("alive");
    assert!(!parent.contains(&format!("PPid:\t{}\n", stub.pid())));
    stub.signal(Signal::SIGTERM);
    assert_eq!(stub.exit().code(), Some(0));
    assert!(runs(child.into()) && runs(daemon.into()));
}

#[test]
fn terminate_ends_it_at_once_or_late_or_never() {
    let (mut quick, _) = Stub::ready(&[]);
    quick.signal(Signal::SIGTERM);
    assert_eq!(quick.exit().code(), Some(0));

    let (mut slow, _) = Stub::ready(&["--slow-exit=200ms"]);
    let clock = Clock::start();
    slow.signal(Signal::SIGTERM);
    assert_eq!(slow.exit().code(), Some(0));
    assert!(clock.now().since_start() >= Duration::from_millis(200));

    let (mut deaf, address) = Stub::ready(&["--ignore-term"]);
    deaf.signal(Signal::SIGTERM);
    deaf.line("red: terminate ignored");
    assert_eq!(ask(&address, "GET /health", &Value::Null).status, 200);
    deaf.signal(Signal::SIGKILL);
    assert_eq!(deaf.exit().signal(), Some(9));
}

#[test]
fn a_worker_that_finishes_its_requests_ends_with_the_last_client() {
    let (mut stub, address) = Stub::ready(&["--finish-requests"]);
    let mut stream = connect(&address);
    let body = json!({"stream": true, "x_chunks": 1_000_000, "x_pace_ms": 5});
    send(&mut stream, "POST /v1/completions", &body.to_string());
    wait_until("the request is in flight", || {
        (stats(&address)["in_flight"] == 1).then_some(())
    });
    stub.signal(Signal::SIGTERM);
    wait_until("the listener is closed", || {
        TcpStream::connect(&address).is_err().then_some(())
    });
    assert!(runs(stub.pid().into()));
    drop(stream);
    assert_eq!(stub.exit().code(), Some(0));
}

#[test]
fn it_crashes_exits_and_hangs_as_told() {
    let mut crashing = Stub::spawn(&["--crash-on-start", "--exit-code=7"]);
    assert_eq!(crashing.exit().code(), Some(7));
    let mut said = String::new();
    let errors = crashing.child.stderr.as_mut().expect("a pipe");
    errors.read_to_string(&mut said).expect("UTF-8");
    assert!(said.contains("out of cheese"));

    let mut leaving = Stub::spawn(&["--never-ready", "--exit-after=100ms", "--exit-code=3"]);
    assert_eq!(leaving.exit().code(), Some(3));

    let (mut mortal, address) = Stub::ready(&["--die-after-requests=2", "--exit-code=4"]);
    for _ in 0..2 {
        assert!(ask(&address, "POST /v1/completions", &json!({})).whole);
    }
    assert_eq!(mortal.exit().code(), Some(4));

    let (_hanging, address) = Stub::ready(&["--hang-after-requests=1"]);
    assert!(ask(&address, "POST /v1/completions", &json!({})).whole);
    let mut stream = connect(&address);
    send(&mut stream, "POST /v1/completions", "{}");
    wait_until("the request hangs", || {
        (stats(&address)["in_flight"] == 1).then_some(())
    });
    assert_eq!(ask(&address, "GET /health", &Value::Null).status, 200);
}

#[test]
fn echo_and_sink_tell_what_arrived() {
    let (_stub, address) = Stub::ready(&[]);
    let reply = ask(&address, "PUT /echo/not?a=1", &json!("x"));
    assert_eq!(reply.status, 404);
    let echo = ask(&address, "PUT /echo?a=1", &json!("hello")).json();
    assert_eq!(
        (&echo["method"], &echo["query"]),
        (&json!("PUT"), &json!("a=1"))
    );
    assert_eq!(echo["body_start"], "\"hello\"");
    assert_eq!(echo["headers"][0], json!(["host", "stub"]));

    let (one, other) = ("x".repeat(3 << 20), "y".repeat(3 << 20));
    let sum = |text: &String| ask(&address, "POST /sink", &json!(text)).json();
    let (first, second) = (sum(&one), sum(&other));
    assert_eq!(first["length"], (3 << 20) + 2);
    assert_eq!(first["checksum"], sum(&one)["checksum"]);
    assert_ne!(first["checksum"], second["checksum"]);
    let status = ask(&address, "POST /v1/completions", &json!({"x_status": 429}));
    assert_eq!(status.status, 429);
    assert_eq!(
        ask(&address, "POST /v1/completions", &json!({})).status,
        200
    );
}

#[test]
fn it_prints_the_lines_and_bears_the_name_it_is_told_to() {
    let stub = Stub::spawn(&["--spam-lines=1000", "--spam-width=120"]);
    stub.line("red: line 0 ");
    let last = stub.line("red: line 999 ");
    assert_eq!(last.len() + "red: line 999 ".len(), 120);
    let (named, _) = Stub::ready(&["--comm=a) S 1 (b"]);
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", named.pid()));
    assert_eq!(comm.expect("alive"), "a) S 1 (b\n");
    let silent = Stub::spawn(&["--silent", "--exit-after=50ms"]);
    assert!(silent.lines.recv_timeout(DEADLINE).is_err());
}

#[test]
fn an_upgraded_connection_sends_back_what_comes() {
    let (_stub, address) = Stub::ready(&[]);
    let mut wire = Wire::to(&address);
    wire.put("GET /upgrade HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n");
    let head = wire.head();
    assert_eq!((head.status(), head.get("upgrade")), (101, Some("echo")));
    for said in ["hello", "\0\r\n\r\n"] {
        wire.put(said);
        assert_eq!(wire.exactly(said.len()), said.as_bytes());
    }
}

#[test]
fn a_stub_that_sleeps_gives_memory_back_and_takes_it_again() {
    let (stub, address) = Stub::ready(&["--anon=96MiB", "--sleep-mode", "--sleep-anon=16MiB"]);
    let held = || status_kib(stub.pid(), "RssAnon") >> 10;
    let awake = held();
    assert!(awake >= 96, "{awake} MiB");
    assert_eq!(ask(&address, "POST /sleep?level=1", &json!({})).status, 200);
    let asleep = held();
    assert!((16..40).contains(&asleep), "{asleep} MiB");
    assert_eq!(
        ask(&address, "GET /is_sleeping", &json!({})).json()["is_sleeping"],
        true
    );
    assert_eq!(ask(&address, "GET /health", &json!({})).status, 200);
    assert_eq!(
        ask(&address, "POST /resume_memory_occupation", &json!({})).status,
        200
    );
    assert!(held() >= 96);
    let reply = ask(&address, "POST /v1/completions", &json!({"prompt": "hi"}));
    assert_eq!(reply.status, 200);
}

#[test]
fn a_stub_that_is_asked_while_it_sleeps_dies() {
    let (mut stub, address) = Stub::ready(&["--sleep-mode"]);
    assert_eq!(ask(&address, "POST /sleep", &json!({})).status, 200);
    let reply = ask(&address, "POST /v1/completions", &json!({"prompt": "hi"}));
    assert!(!reply.whole);
    let status = stub.child.wait().expect("it is our child");
    assert_eq!(status.signal(), Some(9));
}

#[test]
fn without_sleep_mode_a_stub_has_no_such_routes() {
    let (_stub, address) = Stub::ready(&[]);
    assert_eq!(ask(&address, "POST /sleep", &json!({})).status, 404);
}
