//! A real residentd: the binary, a config, a state folder and a port of its
//! own. It and all its workers are gone when the test ends, also by a panic.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use serde_json::{Value, json};

use super::{Answer, PATIENCE, now, pause, processes_whose, request, wait_until};

/// The binary under test.
pub(crate) const RESIDENTD: &str = env!("CARGO_BIN_EXE_residentd");
/// The scriptable worker.
pub(crate) const STUB: &str = env!("CARGO_BIN_EXE_stub-worker");

/// A residentd that runs.
#[derive(Debug)]
pub(crate) struct Residentd {
    /// What was started; after an upgrade, the parent of what serves.
    child: Child,
    /// The pid of what serves.
    main: u32,
    address: String,
    folder: tempfile::TempDir,
}

impl Residentd {
    /// Starts residentd with these lines of configuration; the listener, the
    /// state folder and the log level are set here.
    pub(crate) fn start(config: &str) -> Self {
        Self::start_with(config, &[])
    }

    /// As [`Residentd::start`], with environment variables.
    pub(crate) fn start_with(config: &str, environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let file = write_config(folder.path(), config);
        let mut command = command(&file, environment);
        command.current_dir(folder.path());
        Self::launch(folder, command)
    }

    /// Runs `command`, which serves, with its log in `folder`.
    pub(crate) fn launch(folder: tempfile::TempDir, command: Command) -> Self {
        let (child, address) = serve(command, folder.path());
        Self {
            main: child.id(),
            child,
            address,
            folder,
        }
    }

    /// Ends it by this signal and starts another with the same state.
    pub(crate) fn restart_after(&mut self, signal: nix::sys::signal::Signal) {
        self.signal(signal);
        self.wait();
        self.start_again(&[]);
    }

    /// Starts another with the same state and these arguments, when it has
    /// ended.
    pub(crate) fn start_again(&mut self, arguments: &[&str]) {
        let file = self.folder.path().join("residentd.toml");
        let mut command = command(&file, &[]);
        command.current_dir(self.folder.path()).args(arguments);
        self.launch_again(command)
            .unwrap_or_else(|why| panic!("{why}"));
    }

    /// Starts another by `command`, when it has ended; why not, if it ends at once.
    pub(crate) fn launch_again(&mut self, command: Command) -> Result<(), String> {
        (self.child, self.address) = try_serve(command, self.folder.path())?;
        self.main = self.child.id();
        Ok(())
    }

    /// Writes other lines of configuration for the next start.
    pub(crate) fn configure(&self, config: &str) {
        write_config(self.folder.path(), config);
    }

    /// Returns `host:port`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Returns its own pid.
    pub(crate) fn pid(&self) -> u32 {
        self.main
    }

    /// Notes that another one has taken over, which the one that was started waits
    /// for.
    pub(crate) fn taken_over_by(&mut self, pid: u32) {
        self.main = pid;
    }

    /// Returns a number of bytes out of `/proc/<pid>/status` of residentd
    /// itself, such as `VmRSS` or `VmHWM`.
    pub(crate) fn status_bytes(&self, field: &str) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.main)).expect("residentd runs");
        let line = status.lines().find(|line| line.starts_with(field));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kib.expect("a known field of kilobytes") << 10
    }

    /// Returns the folder of config, state and log.
    pub(crate) fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// Returns what residentd logged so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Sends a request and reads the whole answer.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        request(&self.address, method, path, body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}\n{}", self.log()))
    }

    /// Asks the model for a completion through the OpenAI API.
    pub(crate) fn complete(&self, model: &str) -> Answer {
        let body = json!({"model": model, "prompt": "hello"}).to_string();
        self.ask("POST", "/v1/completions", Some(&body))
    }

    /// Returns the data of a memory endpoint.
    pub(crate) fn memory(&self, endpoint: &str) -> Value {
        let answer = self.ask("GET", &format!("/api/v1/memory/{endpoint}"), None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["data"].clone()
    }

    /// Returns what `/api/v1/memory/models` says of one model.
    pub(crate) fn model(&self, name: &str) -> Value {
        let all = self.memory("models");
        let list = all["models"].as_array().expect("a list of models");
        list.iter()
            .find(|m| m["name"] == name)
            .unwrap_or_else(|| panic!("no model {name} in {all}"))
            .clone()
    }

    /// Returns the pid of the model's worker.
    pub(crate) fn worker_pid(&self, name: &str) -> Option<i64> {
        self.model(name)["pid"].as_i64()
    }

    /// Waits until an eviction of the model is told and returns why it was: its
    /// process is gone a moment earlier.
    pub(crate) fn eviction(&self, name: &str) -> Value {
        wait_until(&format!("an eviction of {name} to be told"), || {
            let reason = self.model(name)["last_eviction"]["reason"].clone();
            (!reason.is_null()).then_some(reason)
        })
    }

    /// Waits until the model is in this phase.
    pub(crate) fn wait_for_phase(&self, name: &str, phase: &str) -> Value {
        wait_until(&format!("{name} to be {phase}"), || {
            let model = self.model(name);
            (model["phase"] == phase).then_some(model)
        })
    }

    /// Waits until what is known of the model's worker is on the disk.
    pub(crate) fn wait_until_kept(&self, name: &str) {
        // A commit takes milliseconds; it is seen in the file's time of change.
        let file = self.folder().join("state/residentd.redb");
        let mut last = None;
        wait_until(&format!("the record of {name} to be written"), || {
            let changed = std::fs::metadata(&file).and_then(|m| m.modified()).ok();
            let rests = last == changed;
            last = changed;
            pause(std::time::Duration::from_millis(30));
            rests.then_some(())
        });
    }

    /// Sends a signal to residentd itself.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.main).expect("a pid fits"));
        nix::sys::signal::kill(pid, signal).expect("residentd runs");
    }

    /// Ends it by SIGTERM and returns how it ended.
    pub(crate) fn stop(mut self) -> ExitStatus {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.wait()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_until("residentd to end", || {
            self.child.try_wait().expect("it is our child")
        })
    }
}

/// Writes the configuration, its listener, state folder and log level first.
pub(crate) fn write_config(folder: &Path, config: &str) -> PathBuf {
    let file = folder.join("residentd.toml");
    let state = folder.join("state");
    let head = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\nlog_level = \"debug\"\n"
    );
    std::fs::write(&file, head + config).expect("the config can be written");
    file
}

/// Returns the command that serves this file.
pub(crate) fn command(file: &Path, environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(RESIDENTD);
    command
        .args(["serve", "--config"])
        .arg(file)
        .envs(environment.iter().copied());
    command
}

/// Starts the binary, its log in `folder`, and returns it with the address it
/// listens on.
fn serve(command: Command, folder: &Path) -> (Child, String) {
    try_serve(command, folder).unwrap_or_else(|why| panic!("{why}"))
}

/// As [`serve`], or says why it did not start, with its log.
fn try_serve(mut command: Command, folder: &Path) -> Result<(Child, String), String> {
    let log = std::fs::File::options()
        .append(true)
        .create(true)
        .open(folder.join("log"))
        .expect("a log file");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .expect("residentd can be spawned");
    let mut lines = BufReader::new(child.stdout.take().expect("its output is piped")).lines();
    let address = lines.find_map(|line| {
        let line = line.ok()?;
        let address = line.strip_prefix("residentd is listening on ")?;
        let bare = address
            .strip_prefix("http://")
            .or_else(|| address.strip_prefix("https://"));
        bare.map(str::to_owned)
    });
    let Some(address) = address else {
        let status = child.wait();
        let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
        return Err(format!("residentd did not start ({status:?}):\n{log}"));
    };
    Ok((child, address))
}

impl Drop for Residentd {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // What was started passes it on, if it is not what serves.
            self.main = self.child.id();
            self.signal(nix::sys::signal::Signal::SIGTERM);
            let start = now();
            while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < PATIENCE {
                pause(std::time::Duration::from_millis(5));
            }
            // Either is gone already or is gone now.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        #[expect(
            clippy::print_stdout,
            reason = "a failed test shows what residentd logged"
        )]
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(30_000);
            println!(
                "--- end of residentd's log ---\n{}",
                log.get(from..).unwrap_or(&log)
            );
        }
        // Whatever the test did, no worker of its own may outlive it: each is told where
        // it may report to.
        let mark = self.folder.path().display().to_string();
        for pid in ["cmdline", "environ"]
            .iter()
            .flat_map(|file| processes_whose(file, &mark))
        {
            if let Ok(pid) = i32::try_from(pid) {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}
