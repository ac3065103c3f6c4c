//! One upgrade after another, and who watches over whom.

use super::*;

#[test]
fn of_three_the_one_in_the_middle_ends_and_the_parent_ends_as_the_last_does() {
    let (mut residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    let mut new: Vec<u32> = Vec::new();
    for _ in 0..3 {
        new.push(upgrade(&residentd));
        assert_eq!(residentd.complete("a").worker_pid(), pid);
    }
    for gone in &new[..2] {
        wait_until("the one in the middle to end", || {
            (!runs(i64::from(*gone))).then_some(())
        });
    }
    let last = new[2];
    let first = residentd.pid();
    wait_until("the last to be a child of the first", || {
        children(first).contains(&last).then_some(())
    });
    assert_eq!(residentd.complete("a").worker_pid(), pid);
    assert_eq!(residentd.complete("b").status, 200);
    // A signal to the first is one to the last.
    let more = format!("[models.d]\ncommand = '{STUB} --port ${{PORT}}'\nmemory = \"1MiB\"\n");
    residentd.configure(&(config() + &more));
    residentd.signal(Signal::SIGHUP);
    wait_until("the last to reload", || {
        let models = residentd.memory("models");
        (models["models"].as_array()?.len() == 5).then_some(())
    });
    residentd.signal(Signal::SIGTERM);
    assert_eq!(residentd.wait().code(), Some(0));
    assert!(!runs(i64::from(last)) && !runs(pid));
}

#[test]
fn a_parent_ends_with_the_one_that_was_killed_and_the_next_takes_the_workers_back() {
    let (mut residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    let new = upgrade(&residentd);
    residentd.wait_until_kept("a");
    residentd.taken_over_by(new);
    residentd.signal(Signal::SIGKILL);
    assert_eq!(
        residentd.wait().code(),
        Some(128 + 9),
        "as a shell tells it"
    );
    assert!(runs(pid));
    residentd.start_again(&[]);
    assert_eq!(residentd.complete("a").worker_pid(), pid);
}

#[test]
fn a_signal_has_another_take_over_and_a_stream_outlives_the_linger() {
    let (residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    // Longer than connections without a request are kept open.
    let stream = begin(&residentd, "a", 800);
    residentd.signal(Signal::SIGUSR2);
    wait_until("another to have taken over", || {
        (residentd.model("a")["loads"] == 0).then_some(())
    });
    let unload = residentd.ask("POST", "/api/v1/models/b/unload", None);
    assert_eq!(unload.status, 200, "{}", unload.text());
    let answer = finish(stream);
    assert_eq!((answer.status, answer.worker_pid()), (200, pid));
    assert!(answer.text().contains("[DONE]"), "it is whole");
}

#[test]
fn the_end_of_the_new_one_waits_for_a_stream_of_the_old_one() {
    let (mut residentd, _) = start(&config(), &[]);
    residentd.complete("a");
    let stream = begin(&residentd, "a", 200);
    upgrade(&residentd);
    residentd.signal(Signal::SIGTERM);
    let answer = finish(stream);
    assert!(
        answer.text().contains("[DONE]"),
        "within the grace: {}",
        answer.text()
    );
    assert_eq!(residentd.wait().code(), Some(0));
}

#[test]
fn an_end_right_after_two_upgrades_is_a_good_one_and_leaves_nothing() {
    let (mut residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    let new = [upgrade(&residentd), upgrade(&residentd)];
    residentd.signal(Signal::SIGTERM);
    assert_eq!(residentd.wait().code(), Some(0));
    assert!(!runs(pid) && !runs(i64::from(new[1])));
    wait_until("the one in the middle to end", || {
        (!runs(i64::from(new[0]))).then_some(())
    });
    let state = residentd.folder().join("state");
    assert!(!state.join("handover.sock").exists());
}

#[test]
fn the_first_of_three_ends_as_the_last_does_and_after_the_one_between_them() {
    let (mut residentd, _) = start(&config(), &[]);
    let pid = residentd.complete("a").worker_pid();
    let new = [upgrade(&residentd), upgrade(&residentd)];
    // Not through the first, which so is not told that an end is wanted.
    residentd.taken_over_by(new[1]);
    residentd.signal(Signal::SIGTERM);
    assert_eq!(residentd.wait().code(), Some(0));
    let left = new.map(|pid| runs(i64::from(pid)));
    assert_eq!((left, runs(pid)), ([false; 2], false));
}

/// An engine with one thread: while it answers it hears no probe.
const ENGINE: &str = r#"
import http.server, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def head(self, *more):
        self.send_response(200)
        self.send_header('x-stub-pid', str(os.getpid()))
        for name, value in more:
            self.send_header(name, value)
        self.end_headers()
    def do_GET(self):
        self.head(('content-length', '0'))
    def do_POST(self):
        self.rfile.read(int(self.headers['content-length']))
        self.head(('transfer-encoding', 'chunked'), ('content-type', 'text/event-stream'))
        for number in range(60):
            self.wfile.write(b'9\r\ndata: %d\n\n\r\n' % (number % 10))
            time.sleep(0.1)
        self.wfile.write(b'e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n')
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
"#;

#[test]
fn a_worker_that_hears_no_probe_while_it_streams_for_the_old_one_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = folder.path().join("engine.py");
    std::fs::write(&engine, ENGINE).expect("written");
    let config = format!(
        "[models.a]\ncommand = 'python3 {} ${{PORT}}'\nmemory = \"64MiB\"\nlive = {{ probe = \"500ms\", timeout = \"2s\", failures = 1 }}\n",
        engine.display()
    );
    let (residentd, _) = start(&config, &[]);
    let stream = begin(&residentd, "a", 0);
    upgrade(&residentd);
    let model = residentd.model("a");
    assert_eq!(
        (&model["phase"], &model["in_flight"]),
        (&json!("ready"), &json!(1))
    );
    let answer = finish(stream);
    assert!(
        answer.text().contains("[DONE]"),
        "it is whole: {}",
        answer.text()
    );
    wait_until("nobody to be inside", || {
        (residentd.model("a")["in_flight"] == 0).then_some(())
    });
    let after = residentd.complete("a");
    assert_eq!(after.worker_pid(), answer.worker_pid());
    assert_eq!(residentd.model("a")["loads"], 0);
}
