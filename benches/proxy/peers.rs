//! What is measured: the worker itself, residentd, nginx, haproxy, and any other
//! proxy by its path; each started here, on loopback, and ended by pid when its
//! value is dropped, also by a panic.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cost::Processes;
use crate::load::{self, MODEL};
use crate::wire::{Waiting, get};

/// How long a target may take to listen and to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// By this in their command lines workers are told from who started them.
const WORKER: &str = " worker --port ";

/// A program that this bench started.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    /// Configuration, state and logs.
    folder: Option<tempfile::TempDir>,
}

impl Program {
    /// Ends it. Returns how it ended, unless it had to be killed.
    fn end(&mut self) -> Option<ExitStatus> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid fits"));
        // It may be gone already.
        let _ = kill(pid, Signal::SIGTERM);
        let ended = until(|| self.child.try_wait().transpose());
        if ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        ended.and_then(Result::ok)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

/// Something that answers the bench's requests.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) name: String,
    /// `host:port` for HTTP/1.1, and for h2c where the target takes it.
    pub(crate) address: String,
    /// Nothing of the worker itself.
    pub(crate) processes: Option<Processes>,
    program: Option<Program>,
}

impl Target {
    fn of(name: &str, address: String, program: Program, except: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            address,
            processes: Some(Processes {
                main: program.child.id(),
                except,
            }),
            program: Some(program),
        }
    }

    /// The worker, which another target started.
    pub(crate) fn direct(address: String) -> Self {
        Self {
            name: "direct".into(),
            address,
            processes: None,
            program: None,
        }
    }

    /// Ends it, which it has to do by itself and well.
    pub(crate) fn end(mut self) -> io::Result<()> {
        let ended = self.program.as_mut().and_then(Program::end);
        match ended.is_some_and(|status| status.success()) {
            true => Ok(()),
            false => Err(io::Error::other(format!("{} ended badly", self.name))),
        }
    }

    fn log(&self) -> String {
        let folder = self.program.as_ref().and_then(|p| p.folder.as_ref());
        let text = folder.and_then(|folder| fs::read_to_string(folder.path().join("log")).ok());
        text.unwrap_or_default()
    }
}

/// Threads that every proxy gets: as many as residentd takes for itself.
pub(crate) fn threads() -> usize {
    let cores = match is_pinned() {
        true => 1,
        false => std::thread::available_parallelism().map_or(2, usize::from),
    };
    cores.clamp(2, 4)
}

/// Lets a moment pass between two looks.
#[expect(
    clippy::disallowed_methods,
    reason = "the pause between two looks of a bounded wait"
)]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Asks again and again until there is an answer, or [`PATIENCE`] is over.
fn until<T>(mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let end = load::now() + u64::try_from(PATIENCE.as_nanos()).expect("it is short");
    loop {
        match done() {
            None if load::now() < end => pause(Duration::from_millis(5)),
            answer => return answer,
        }
    }
}

/// The host's last core while targets are started on the first one; else 0.
static LAST: AtomicUsize = AtomicUsize::new(0);

/// From now on targets are started on the first core, and this process and the
/// workers run on the others. Returns whether that can be had.
pub(crate) fn pin() -> bool {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let can = cores > 1 && move_itself(&format!("1-{}", cores - 1));
    LAST.store(if can { cores - 1 } else { 0 }, Ordering::Relaxed);
    can
}

/// Ends that.
pub(crate) fn unpin() {
    let last = LAST.swap(0, Ordering::Relaxed);
    move_itself(&format!("0-{last}"));
}

fn is_pinned() -> bool {
    LAST.load(Ordering::Relaxed) > 0
}

fn move_itself(cores: &str) -> bool {
    let mut command = Command::new("taskset");
    command.args(["-a", "-p", "-c", cores, &std::process::id().to_string()]);
    let moved = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    moved.is_ok_and(|status| status.success())
}

/// Returns the command of a target, which keeps its pid. Where `setpriv` is there
/// the kernel ends the target if this process is killed before it can.
fn command(program: &Path) -> Command {
    let pinned = ["taskset", "-c", "0"];
    let pinned = pinned.iter().filter(|_| is_pinned()).map(OsStr::new);
    let tied = ["setpriv", "--pdeathsig", "TERM"];
    let tied = tied.iter().filter(|_| can_be_tied()).map(OsStr::new);
    let mut words = tied.chain(pinned).chain([program.as_os_str()]);
    let mut command = Command::new(words.next().expect("the program at least"));
    command.args(words);
    command
}

fn can_be_tied() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "true"]);
        let tried = command.stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    })
}

/// Waits until nobody runs this program.
pub(crate) fn nobody_runs(program: &Path) -> io::Result<()> {
    let program = program.canonicalize()?;
    let runs = |process: &fs::DirEntry| {
        let runs = fs::read_link(process.path().join("exe"));
        runs.is_ok_and(|runs| runs == program)
    };
    let ended = until(|| {
        let mut processes = fs::read_dir("/proc").ok()?.flatten();
        (!processes.any(|process| runs(&process))).then_some(())
    });
    ended.ok_or_else(|| io::Error::other(format!("{} runs still", program.display())))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    listener.local_addr().expect("it is bound").port()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn itself() -> PathBuf {
    std::env::current_exe().expect("this program has a path")
}

/// Starts a program whose log goes to `folder`.
fn start(mut command: Command, folder: Option<tempfile::TempDir>) -> Program {
    let log = folder.as_ref().map(|folder| folder.path().join("log"));
    let log = log.map_or_else(Stdio::null, |path| {
        let file = fs::File::create(path).expect("a log file");
        file.into()
    });
    command.stdin(Stdio::null()).stderr(log);
    let child = command.spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    Program { child, folder }
}

/// Starts this residentd, with its defaults but for lines of `server`, and models
/// that are all the same but for their names; the first is [`MODEL`].
pub(crate) fn residentd(binary: &Path, server: &str, models: usize, loaded: bool) -> Target {
    let folder = folder();
    let state = folder.path().join("state");
    let mut config =
        format!("[server]\nlisten = \"127.0.0.1:0\"\nstate_dir = {state:?}\n{server}\n");
    for number in 0..models {
        let name = match number {
            0 => MODEL.to_owned(),
            number => format!("other-{number}"),
        };
        let program = itself();
        let cores = match is_pinned() {
            true => format!(
                "\"taskset\", \"-c\", \"1-{}\", ",
                LAST.load(Ordering::Relaxed)
            ),
            false => String::new(),
        };
        let model = format!(
            "[models.{name}]\ncommand = [{cores}{program:?}, \"worker\", \"--port\", \"${{PORT}}\"]\nmemory = \"32MiB\"\npreload = {loaded}\n"
        );
        config.push_str(&model);
    }
    let file = folder.path().join("residentd.toml");
    fs::write(&file, config).expect("it can be written");
    let mut command = command(binary);
    command.args(["serve", "--config"]).arg(&file);
    command.current_dir(folder.path()).stdout(Stdio::piped());
    let mut program = start(command, Some(folder));
    let output = program.child.stdout.take().expect("it is piped");
    let mut lines = BufReader::new(output).lines().map_while(Result::ok);
    let address = lines.find_map(|line| {
        let (_, address) = line.split_once("residentd is listening on http")?;
        let address = address.split_once("://")?.1;
        Some(address.to_owned())
    });
    let target = Target::of("residentd", String::new(), program, WORKER);
    let Some(address) = address else {
        panic!("residentd did not start: {}", target.log());
    };
    let target = Target { address, ..target };
    if loaded {
        for number in 1..models {
            whoami(&target.address, &format!("other-{number}"));
        }
    }
    target
}

/// Returns the address of a model's worker, which is loaded if it was not.
pub(crate) fn whoami(residentd: &str, model: &str) -> String {
    let mut connection = Waiting::open(residentd).expect("it listens");
    let asked = connection.ask(&get(&format!("/upstream/{model}/whoami")));
    asked.unwrap_or_else(|error| panic!("the worker of {model} is not reached: {error}"));
    let text = String::from_utf8_lossy(&connection.answer.body).into_owned();
    let port = text.split(' ').nth(1).expect("its pid and its port");
    format!("127.0.0.1:{port}")
}

/// Starts a worker of its own.
pub(crate) fn worker() -> Target {
    let port = free_port();
    let mut command = command(&itself());
    command.args(["worker", "--port", &port.to_string()]);
    let address = format!("127.0.0.1:{port}");
    listening("direct", address, start(command, None))
}

/// Starts the bare proxy of this program.
pub(crate) fn bare(upstream: &str) -> Target {
    let (command, address) = by_convention(&itself().display().to_string(), "bare", upstream);
    listening("bare-hyper", address, start(command, None))
}

/// Starts another proxy: a path, which gets `--listen ADDR --upstream ADDR`, or a
/// command in which `{listen}` and `{upstream}` stand where these go.
pub(crate) fn other(peer: &str, upstream: &str) -> Target {
    let (command, address) = match peer.contains("{listen}") {
        true => by_template(peer, upstream),
        false => by_convention(peer, "", upstream),
    };
    let program = start(command, Some(folder()));
    listening(&name(peer), address, program)
}

/// Returns what another proxy is called: its file's name.
pub(crate) fn name(peer: &str) -> String {
    let path = peer.split(' ').next().map(Path::new);
    let name = path
        .and_then(Path::file_name)
        .and_then(|name| name.to_str());
    name.unwrap_or("peer").to_owned()
}

fn by_template(template: &str, upstream: &str) -> (Command, String) {
    let listen = format!("127.0.0.1:{}", free_port());
    let words = shlex::split(template).expect("its quotes are closed");
    let filled = |word: &String| {
        let word = word.replace("{listen}", &listen);
        word.replace("{upstream}", upstream)
    };
    let mut command = command(Path::new(&words[0]));
    command.args(words[1..].iter().map(filled));
    command.stdout(Stdio::null());
    (command, listen)
}

fn by_convention(program: &str, first: &str, upstream: &str) -> (Command, String) {
    let template = format!("{program:?} {first} --listen {{listen}} --upstream {{upstream}}");
    by_template(&template, upstream)
}

fn listening(name: &str, address: String, program: Program) -> Target {
    let target = Target::of(name, address, program, WORKER);
    let listens = until(|| TcpStream::connect(&target.address).ok());
    assert!(
        listens.is_some(),
        "{name} does not listen on {}: {}",
        target.address,
        target.log()
    );
    target
}

/// Where Debian's packages are unpacked by `scripts/setup-peers`.
fn fetched() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/peers")
}

/// Returns the path of an installed or fetched program.
fn find(name: &str) -> Option<PathBuf> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a bench looks for its peers on the PATH"
    )]
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').map(PathBuf::from);
    let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let folders = folders.chain(more).chain([fetched().join("usr/sbin")]);
    let mut files = folders.map(|folder| folder.join(name));
    files.find(|file| file.is_file())
}

/// Returns the command of a peer, with the libraries that were fetched with it.
fn peer(name: &str) -> Option<Command> {
    let mut command = command(&find(name)?);
    let libraries = fetched().join("usr/lib/x86_64-linux-gnu");
    let arm = fetched().join("usr/lib/aarch64-linux-gnu");
    let both = format!("{}:{}", libraries.display(), arm.display());
    command.env("LD_LIBRARY_PATH", both).stdout(Stdio::null());
    Some(command)
}

/// Returns what a peer says of its version.
pub(crate) fn version(name: &str) -> Option<String> {
    let output = peer(name)?.arg("-v").stdout(Stdio::piped()).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    Some(text.lines().next()?.trim().to_owned())
}

/// Starts nginx with what its documentation says is fast for this: kept
/// connections to the worker, nothing buffered, no log of requests.
pub(crate) fn nginx(upstream: &str) -> Option<Target> {
    let mut command = peer("nginx")?;
    let (folder, port) = (folder(), free_port());
    let user = match nix::unistd::geteuid().is_root() {
        true => "user root;",
        false => "",
    };
    let config = format!(
        "{user}
daemon off;
worker_processes {threads};
worker_rlimit_nofile 16384;
pid nginx.pid;
error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_max_body_size 0;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    upstream worker {{ server {upstream}; keepalive 256; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} reuseport;
        location / {{
            proxy_pass http://worker;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_buffering off;
            proxy_request_buffering off;
        }}
    }}
}}
",
        threads = threads()
    );
    let file = folder.path().join("nginx.conf");
    fs::write(&file, config).expect("it can be written");
    command.arg("-p").arg(folder.path()).arg("-c").arg(&file);
    command.args(["-e", "stderr"]);
    let program = start(command, Some(folder));
    Some(listening("nginx", format!("127.0.0.1:{port}"), program))
}

/// Starts haproxy the same way.
pub(crate) fn haproxy(upstream: &str) -> Option<Target> {
    let mut command = peer("haproxy")?;
    let (folder, port) = (folder(), free_port());
    let config = format!(
        "global
    maxconn 8192
    nbthread {threads}
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
    option http-no-delay
frontend clients
    bind 127.0.0.1:{port}
    default_backend workers
backend workers
    server worker {upstream}
",
        threads = threads()
    );
    let file = folder.path().join("haproxy.cfg");
    fs::write(&file, config).expect("it can be written");
    command.args(["-db", "-f"]).arg(&file);
    let program = start(command, Some(folder));
    Some(listening("haproxy", format!("127.0.0.1:{port}"), program))
}
