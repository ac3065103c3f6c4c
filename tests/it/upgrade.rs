//! Another residentd takes over while one runs: no connection is refused,
//! streams are finished, workers go on; and one that cannot changes nothing.

mod calls;
mod chain;
mod failing;
mod requests;
mod supervised;

use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::http::{self, Begun, finish};
use crate::support::residentd::{RESIDENTD, STUB, command};
use crate::support::{Answer, Residentd, pause, request, runs, wait_until};

/// Three models for which there is room, and one that takes a while to load.
fn config() -> String {
    let model = |name: &str, flags: &str| {
        format!(
            "[models.{name}]\ncommand = '{STUB} --port ${{PORT}} --name {name} {flags}'\nmemory = \"48MiB\"\n"
        )
    };
    let plain = ["a", "b", "c"].map(|name| model(name, "--anon 24MiB"));
    let slow = model("slow", "--ready-after 1500ms");
    let models = plain.concat() + &slow;
    format!("[memory]\nlimit = \"600MiB\"\nreserve = \"16MiB\"\n{models}")
}

/// A residentd of whose program there is a copy, so that another can take its
/// place.
fn start(config: &str, environment: &[(&str, &str)]) -> (Residentd, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("residentd");
    std::fs::copy(RESIDENTD, &program).expect("it can be copied");
    let file = crate::support::residentd::write_config(folder.path(), config);
    let given = command(&file, environment);
    let mut serve = std::process::Command::new(&program);
    serve
        .args(given.get_args())
        .envs(environment.iter().copied())
        .current_dir(folder.path());
    (Residentd::launch(folder, serve), program)
}

/// Puts a script in the place of the program.
fn replace(program: &PathBuf, script: &str) {
    // A program that runs cannot be written to, but its name can be given away.
    let new = program.with_extension("new");
    std::fs::write(&new, script).expect("written");
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).expect("ours");
    std::fs::rename(&new, program).expect("it has its place");
}

/// Returns the children of all threads of a process.
fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let lists = threads.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    let all = lists.collect::<String>();
    all.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// Has another take over and returns its pid.
fn upgrade(residentd: &Residentd) -> u32 {
    let answer = residentd.ask("POST", "/api/v1/upgrade", None);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let pid = answer.json()["data"]["pid"].as_u64();
    u32::try_from(pid.expect("a pid")).expect("a pid fits")
}

/// Begins a stream of so many events, 10 ms apart.
fn begin(residentd: &Residentd, model: &str, chunks: u32) -> Begun {
    http::begin(residentd.address(), model, chunks)
}

/// Asks a model again and again, each time on a connection of its own, and
/// returns how often it answered.
fn ask_on(model: &'static str, address: String, stop: Arc<AtomicBool>) -> JoinHandle<u32> {
    std::thread::spawn(move || {
        let body = json!({"model": model, "prompt": "x"}).to_string();
        let mut answered = 0;
        while !stop.load(Ordering::Relaxed) {
            let answer = request(&address, "POST", "/v1/completions", Some(&body));
            let answer = answer.expect("no connection is refused");
            assert_eq!(answer.status, 200, "{}", answer.text());
            answered += 1;
            pause(Duration::from_millis(2));
        }
        answered
    })
}

#[test]
fn another_takes_over_under_load_and_no_request_is_lost_and_no_model_loaded_again() {
    let (mut residentd, _) = start(&config(), &[]);
    let pids: Vec<_> = ["a", "b", "c"]
        .map(|name| residentd.complete(name).worker_pid())
        .into();
    let streams: Vec<_> = ["a", "b", "c"]
        .map(|name| begin(&residentd, name, 200))
        .into();
    let stop = Arc::new(AtomicBool::new(false));
    let address = residentd.address().to_owned();
    let clients: Vec<_> = ["a", "b", "c"]
        .map(|name| ask_on(name, address.clone(), Arc::clone(&stop)))
        .into();
    let waits = {
        let address = address.clone();
        std::thread::spawn(move || {
            let body = json!({"model": "slow", "prompt": "x"}).to_string();
            request(&address, "POST", "/v1/completions", Some(&body)).expect("an answer")
        })
    };
    let loading = wait_until("slow to be spawned", || residentd.worker_pid("slow"));
    let new = upgrade(&residentd);
    assert_ne!(new, residentd.pid());
    for name in ["a", "b", "c"] {
        let model = residentd.model(name);
        assert_eq!(model["phase"], "ready", "{model}");
    }
    let busy = residentd.model("a")["in_flight"]
        .as_u64()
        .expect("a number");
    assert!(
        busy >= 1,
        "the new one knows of the old one's stream: {busy}"
    );
    let waited = waits.join().expect("no panic");
    assert_eq!(waited.status, 200, "{}", waited.text());
    assert_eq!(waited.worker_pid(), loading, "loaded once");
    for stream in streams {
        let answer = finish(stream);
        assert_eq!(answer.status, 200);
        assert!(
            answer.text().contains("[DONE]"),
            "it is whole: {}",
            answer.text()
        );
    }
    pause(Duration::from_millis(200));
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let answered: u32 = client.join().expect("every request is answered");
        assert!(answered > 20, "{answered}");
    }
    wait_until("the streams to be over over there", || {
        (residentd.model("a")["in_flight"] == 0).then_some(())
    });
    for (name, pid) in ["a", "b", "c"].into_iter().zip(pids) {
        assert_eq!(
            residentd.complete(name).worker_pid(),
            pid,
            "{name} was kept"
        );
        assert_eq!(residentd.model(name)["loads"], 0, "not by the new one");
    }
    // The one that was started stays, as the parent, and ends as the new one does.
    let old = residentd.pid();
    assert!(runs(i64::from(old)) && runs(i64::from(new)));
    residentd.signal(Signal::SIGTERM);
    assert_eq!(residentd.wait().code(), Some(0));
    assert!(!runs(i64::from(new)));
    assert!(!runs(loading));
}

#[test]
fn a_connection_that_was_open_before_is_answered_by_the_new_one_and_then_closed() {
    use std::io::Write;
    let (residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    let connect = || TcpStream::connect(residentd.address()).expect("a connection");
    let (mut inference, mut api) = (connect(), connect());
    let body = json!({"model": "a", "prompt": "x"}).to_string();
    let post = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let get = "GET /api/v1/memory/models HTTP/1.1\r\nhost: localhost\r\n\r\n";
    // Both have been used, and so are held open.
    for (connection, text) in [(&mut inference, post.as_str()), (&mut api, get)] {
        connection.write_all(text.as_bytes()).expect("sent");
        assert_eq!(read_one(connection).status, 200);
    }
    let new = upgrade(&residentd);
    inference.write_all(post.as_bytes()).expect("sent");
    let answer = finish((inference, Vec::new()));
    assert_eq!((answer.status, answer.worker_pid()), (200, pid));
    assert_eq!(answer.header("connection"), Some("close"));
    api.write_all(get.as_bytes()).expect("sent");
    let answer = finish((api, Vec::new()));
    assert_eq!(answer.status, 200);
    let models = answer.json()["data"]["models"].clone();
    assert_eq!(models[0]["name"], "a");
    assert_eq!(models[0]["loads"], 0, "it was the old one that loaded it");
    assert!(runs(i64::from(new)));
    // The old one stays as the parent, and keeps nothing open to the new one.
    assert!(
        connections_between(&residentd) > 0,
        "it passed a request on"
    );
    wait_until("the last connection between the two to end", || {
        (connections_between(&residentd) == 0).then_some(())
    });
    assert!(runs(i64::from(residentd.pid())));
}

/// Returns how many connections a residentd has from the one before it.
fn connections_between(residentd: &Residentd) -> usize {
    let state = residentd.folder().join("state/handover.");
    let state = state.display().to_string();
    let all = std::fs::read_to_string("/proc/net/unix").expect("Linux has it");
    // The sixth field is 03 when it is connected.
    let connected = |line: &&str| line.split_whitespace().nth(5) == Some("03");
    let ours = all.lines().filter(|line| line.contains(&state));
    ours.filter(connected).count()
}

#[test]
fn what_an_operator_set_until_the_next_restart_outlives_an_upgrade() {
    let (residentd, _) = start(&config(), &[]);
    residentd.complete("a");
    let pin = residentd.ask("POST", "/api/v1/models/a/pin", None);
    assert_eq!(pin.status, 200, "{}", pin.text());
    let limit = residentd.ask("POST", "/api/v1/memory/limit?limit_gb=0.25", None);
    assert_eq!(limit.status, 200, "{}", limit.text());
    upgrade(&residentd);
    upgrade(&residentd);
    assert_eq!(residentd.model("a")["pinned"], true);
    let stats = residentd.memory("stats");
    assert_eq!(stats["memory_limit"], 256 << 20, "{stats}");
    assert_eq!(stats["limit_source"], "api");
}

#[test]
fn who_was_used_when_outlives_an_upgrade() {
    let (residentd, _) = start(&config(), &[]);
    let used = || {
        let used = |name| residentd.model(name)["last_used"].as_f64();
        ["a", "b", "c"].map(|name| used(name).expect("a time"))
    };
    residentd.complete("b");
    pause(Duration::from_millis(50));
    residentd.complete("a");
    let before = used();
    assert!(before[0] > before[1] && before[2] == 0.0, "{before:?}");
    upgrade(&residentd);
    let after = used();
    for (before, after) in before.iter().zip(after) {
        assert!((before - after).abs() < 0.03, "{before} {after}");
    }
}

#[test]
fn an_operators_load_that_waits_is_answered_by_the_new_one() {
    let (residentd, _) = start(&config(), &[]);
    let address = residentd.address().to_owned();
    let load = std::thread::spawn(move || {
        request(&address, "POST", "/api/v1/models/slow/load", None).expect("an answer")
    });
    let loading = wait_until("slow to be spawned", || residentd.worker_pid("slow"));
    upgrade(&residentd);
    let answer = load.join().expect("no panic");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let model = residentd.model("slow");
    assert_eq!(
        (&model["phase"], &model["pid"]),
        (&json!("ready"), &json!(loading))
    );
}

/// An engine that leaves HTTP when asked to, and then sends back what it gets.
const ECHO: &str = r#"
import socket, sys, threading
def serve(connection):
    asked = b''
    while b'\r\n\r\n' not in asked:
        piece = connection.recv(4096)
        if not piece:
            return
        asked += piece
    if b'websocket' not in asked:
        connection.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n')
        return connection.close()
    connection.sendall(b'HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n')
    while piece := connection.recv(4096):
        connection.sendall(piece)
    connection.close()
server = socket.create_server(('127.0.0.1', int(sys.argv[1])))
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;

#[test]
fn what_has_left_http_goes_on_in_the_old_one() {
    use std::io::Write;
    let folder = tempfile::tempdir().expect("a folder");
    let engine = folder.path().join("echo.py");
    std::fs::write(&engine, ECHO).expect("written");
    let engine = engine.display();
    let (residentd, _) = start(
        &format!("[models.a]\ncommand = 'python3 {engine} ${{PORT}}'\nmemory = \"64MiB\"\n"),
        &[],
    );
    let mut socket = TcpStream::connect(residentd.address()).expect("a connection");
    let ask = "GET /upstream/a/ws HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: a2V5\r\n\r\n";
    socket.write_all(ask.as_bytes()).expect("sent");
    let mut head = vec![0; 4096];
    let read = socket.read(&mut head).expect("an answer");
    let head = String::from_utf8_lossy(&head[..read]);
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    upgrade(&residentd);
    pause(Duration::from_millis(50));
    assert_eq!(
        residentd.model("a")["in_flight"],
        1,
        "the new one knows of it"
    );
    socket.write_all(b"ping after").expect("sent");
    let mut echo = [0; 10];
    socket.read_exact(&mut echo).expect("it comes back");
    assert_eq!(&echo, b"ping after");
    drop(socket);
    wait_until("nobody to be inside", || {
        (residentd.model("a")["in_flight"] == 0).then_some(())
    });
}

/// Reads one answer on a connection that stays open.
fn read_one(connection: &mut TcpStream) -> Answer {
    let mut raw = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let read = connection.read(&mut piece).expect("it is open");
        assert_ne!(read, 0, "closed after {:?}", String::from_utf8_lossy(&raw));
        raw.extend_from_slice(&piece[..read]);
        if let Some(answer) = Answer::parse(&raw).filter(|answer| answer.complete) {
            return answer;
        }
    }
}
