//! Beneath a service manager: it opens the sockets, hears what happens, and is
//! told which process is the service.

use std::os::unix::net::UnixDatagram;

use super::*;

/// Where `NOTIFY_SOCKET` leads to.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify.sock");
        let socket = UnixDatagram::bind(&path).expect("bound");
        let patience = Some(Duration::from_secs(20));
        socket.set_read_timeout(patience).expect("set");
        Self {
            socket,
            path,
            _folder: folder,
        }
    }

    /// Returns the next thing that is said, watchdog aside.
    fn hear(&self) -> String {
        loop {
            let mut text = [0; 4096];
            let read = self.socket.recv(&mut text).expect("something is said");
            let text = String::from_utf8_lossy(&text[..read]).into_owned();
            if text.trim() != "WATCHDOG=1" {
                return text;
            }
        }
    }
}

#[test]
fn a_service_manager_hears_of_the_start_of_reloads_of_another_main_process_and_of_the_end() {
    let manager = Manager::new();
    let path = manager.path.display().to_string();
    let (mut residentd, _) = start(&config(), &[("NOTIFY_SOCKET", &path)]);
    let ready = manager.hear();
    assert!(
        ready.contains("READY=1") && ready.contains("STATUS=serving"),
        "{ready}"
    );
    residentd.signal(Signal::SIGHUP);
    let reloading = manager.hear();
    assert!(reloading.contains("RELOADING=1"), "{reloading}");
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    assert!(manager.hear().contains("READY=1"));
    let pid = residentd.complete("a").worker_pid();
    let stream = begin(&residentd, "a", 100);
    let new = upgrade(&residentd);
    assert_eq!(manager.hear().trim(), format!("MAINPID={new}"));
    assert!(manager.hear().contains("READY=1"), "said by the new one");
    assert!(finish(stream).text().contains("[DONE]"));
    assert_eq!(
        residentd.wait().code(),
        Some(0),
        "the manager knows the new one"
    );
    assert!(runs(i64::from(new)));
    assert_eq!(residentd.complete("a").worker_pid(), pid);
    crate::support::kill(i64::from(new), Signal::SIGTERM);
    assert!(manager.hear().contains("STOPPING=1"));
    wait_until("the new one to end", || {
        (!runs(i64::from(new))).then_some(())
    });
    assert!(!runs(pid));
}

#[test]
fn a_new_one_that_is_killed_is_no_zombie_while_the_old_one_has_a_stream() {
    let manager = Manager::new();
    let path = manager.path.display().to_string();
    let (residentd, _) = start(&config(), &[("NOTIFY_SOCKET", &path)]);
    residentd.complete("a");
    let stream = begin(&residentd, "a", 300);
    let new = upgrade(&residentd);
    crate::support::kill(i64::from(new), Signal::SIGKILL);
    wait_until("it to be reaped", || {
        (!std::path::Path::new(&format!("/proc/{new}")).exists()).then_some(())
    });
    assert!(runs(i64::from(residentd.pid())), "it has a stream");
    assert!(
        finish(stream).text().contains("[DONE]"),
        "which is finished"
    );
}

#[test]
fn a_watchdog_is_fed_while_the_controller_answers_and_workers_hear_nothing_of_it() {
    let manager = Manager::new();
    let path = manager.path.display().to_string();
    let environment = [("NOTIFY_SOCKET", path.as_str()), ("WATCHDOG_USEC", "90000")];
    let config = "[models.m]\ncommand = '/bin/sh -c \"env > env.txt; exec sleep 60\"'\nupstream = \"http://127.0.0.1:9\"\nready = { log = \"x\" }\nmemory = \"1MiB\"\n";
    let (residentd, _) = start(config, &environment);
    let mut fed = 0;
    while fed < 5 {
        let mut text = [0; 4096];
        let read = manager.socket.recv(&mut text).expect("it is fed");
        fed +=
            u32::from(&text[..read] == b"WATCHDOG=1" || text[..read].starts_with(b"WATCHDOG=1\n"));
    }
    let address = residentd.address().to_owned();
    let load = std::thread::spawn(move || {
        // It never is ready; the end of the test ends it.
        let _ = request(&address, "POST", "/api/v1/models/m/load", None);
    });
    let file = residentd.folder().join("env.txt");
    let seen = wait_until("the worker's environment", || {
        let text = std::fs::read_to_string(&file).ok()?;
        (!text.is_empty()).then_some(text)
    });
    for name in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"] {
        assert!(!seen.contains(name), "{seen}");
    }
    drop(residentd);
    load.join().expect("no panic");
}

#[test]
fn sockets_of_the_service_manager_are_listened_on_also_after_an_upgrade() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = crate::support::residentd::write_config(folder.path(), &config());
    let unix = folder.path().join("passed.sock");
    // What systemd does: opens, listens, passes from descriptor 3 on.
    let script = format!(
        "import os, socket, sys\n\
         tcp = socket.socket(); tcp.bind(('127.0.0.1', 0)); tcp.listen(64)\n\
         unix = socket.socket(socket.AF_UNIX); unix.bind({unix:?}); unix.listen(64)\n\
         a, b = os.dup(tcp.fileno()), os.dup(unix.fileno())\n\
         os.dup2(a, 3); os.dup2(b, 4)\n\
         os.environ.update(LISTEN_FDS='2', LISTEN_PID=str(os.getpid()))\n\
         os.execv({RESIDENTD:?}, [{RESIDENTD:?}, 'serve', '--config', {file:?}])\n"
    );
    let mut serve = std::process::Command::new("python3");
    serve.args(["-c", &script]).current_dir(folder.path());
    let residentd = Residentd::launch(folder, serve);
    let pid = residentd.complete("a").worker_pid();
    let over_unix = || {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(&unix).expect("it listens");
        let get = "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(get.as_bytes()).expect("sent");
        let mut raw = Vec::new();
        stream.read_to_end(&mut raw).expect("an answer");
        Answer::parse(&raw).expect("an answer").status
    };
    assert_eq!(over_unix(), 200);
    upgrade(&residentd);
    assert_eq!(residentd.complete("a").worker_pid(), pid);
    assert_eq!(over_unix(), 200);
    drop(residentd);
    assert!(!unix.exists() || std::os::unix::net::UnixStream::connect(&unix).is_err());
}
