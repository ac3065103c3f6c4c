//! A scriptable worker for tests, benches and demonstrations.
//!
//! A real process with knobs: how long it loads, what memory it touches, which
//! children it starts, how it answers, hangs, breaks off and dies. It owns
//! nothing of the manager's code, so a fault there cannot hide here. One
//! thread runs everything but the touching of memory.

mod answer;
mod anthropic;
mod args;
mod checksum;
mod clock;
mod family;
mod knobs;
mod memory;
mod openai;
mod orders;
mod responses;
mod routes;
mod rpc;
mod serve;
#[path = "../size.rs"]
mod size;
mod sleep;
mod state;
mod vram;

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until};

use crate::args::{Args, Listen};
use crate::orders::Orders;
use crate::serve::Listener;
use crate::state::{LAST_WORDS, Stub};

fn main() -> ExitCode {
    let started = Instant::now();
    let args = Args::parse();
    let ended = if args.crash_on_start || Orders::read(&args).crash {
        crash(&args)
    } else if args.daemonize {
        family::daemonize(&args).map(|()| 0)
    } else {
        run(args, started)
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(io::stderr(), "stub-worker: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what an engine might say with its last breath. Returns the exit code.
fn crash(args: &Args) -> io::Result<u8> {
    let mut stderr = io::stderr().lock();
    writeln!(stderr, "{}: loading model", args.name)?;
    writeln!(stderr, "{}: failed to allocate buffer", args.name)?;
    writeln!(stderr, "error: out of cheese")?;
    Ok(args.exit_code)
}

/// Runs the worker to its end. Returns the exit code.
fn run(args: Args, started: Instant) -> io::Result<u8> {
    if let Some(comm) = &args.comm {
        std::fs::write("/proc/self/comm", comm)?;
    }
    let children = family::start(&args)?;
    let stub = Arc::new(Stub::new(args, children));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let mut term = signal(SignalKind::terminate())?;
        tokio::select! {
            code = terminated(&stub, &mut term) => Ok(code),
            () = timed_out(&stub, started) => Ok(stub.args.exit_code),
            () = used_up(&stub) => Ok(stub.args.exit_code),
            Err(error) = work(&stub, started) => Err(error),
        }
    });
    // A loader that still touches memory is not waited for.
    runtime.shutdown_background();
    ended
}

/// Loads and serves; returns only on failure.
async fn work(stub: &Arc<Stub>, started: Instant) -> io::Result<()> {
    let calls = serve::serve_calls(stub);
    let work = work_on(stub, started);
    tokio::select! {
        ended = work => ended,
        ended = calls => ended,
    }
}

async fn work_on(stub: &Arc<Stub>, started: Instant) -> io::Result<()> {
    if stub.args.idle {
        load(stub, started).await?;
    } else if stub.args.listen == Listen::Early {
        let listener = listen(stub).await?;
        let address = listener.address();
        let loading = async {
            load(stub, started).await?;
            announce(stub, &address);
            Ok(())
        };
        tokio::select! {
            Err(error) = loading => return Err(error),
            () = serve::serve(stub, listener) => {}
        }
    } else {
        load(stub, started).await?;
        let listener = listen(stub).await?;
        announce(stub, &listener.address());
        serve::serve(stub, listener).await;
    }
    std::future::pending().await
}

async fn listen(stub: &Stub) -> io::Result<Listener> {
    let listener = Listener::bind(&stub.args).await?;
    say(stub, &format!("listening on {}", listener.address()));
    Ok(listener)
}

/// Takes the memory, prints the noise and lets the loading time pass.
async fn load(stub: &Arc<Stub>, started: Instant) -> io::Result<()> {
    let args = &stub.args;
    let has_memory = args.anon > 0 || args.shm > 0 || args.map.is_some();
    let has_vram = args.vram_dir.is_some() || args.report.is_some();
    if has_memory || has_vram || args.spam_lines > 0 {
        let stub = Arc::clone(stub);
        let loading = tokio::task::spawn_blocking(move || take_memory(&stub));
        loading.await.map_err(io::Error::other)??;
    }
    if args.never_ready || Orders::read(args).never_ready {
        std::future::pending::<()>().await;
    }
    sleep_until(started + args.ready_after).await;
    Ok(())
}

fn take_memory(stub: &Stub) -> io::Result<()> {
    let args = &stub.args;
    for number in 0..args.spam_lines {
        let line = format!("line {number} ");
        let filler = args
            .spam_width
            .saturating_sub(line.len() + args.name.len() + 2);
        say(stub, &(line + &"x".repeat(filler)));
    }
    vram::take(args)?;
    stub.memory.take(args.anon, args.anon_pause);
    memory::share(args.shm)?;
    args.map.as_deref().map_or(Ok(()), memory::map_file)
}

/// Makes the worker ready and tells of it.
fn announce(stub: &Stub, address: &str) {
    let (monotonic_ns, unix_ns) = (clock::monotonic_ns(), clock::unix_ns());
    stub.set_ready(monotonic_ns);
    if stub.args.ready_line {
        say(stub, &format!("ready on {address}"));
    }
    if let Some(socket) = stub
        .args
        .notify_socket
        .as_ref()
        .filter(|_| stub.args.notify)
    {
        notify(socket);
    }
    if let Some(path) = stub.args.ready_stamp.clone() {
        let stamp = json!({"monotonic_ns": monotonic_ns, "unix_ns": unix_ns}).to_string();
        // A disk is slow; the first answer does not wait for it.
        std::thread::spawn(move || write_stamp(&path, &stamp));
    }
}

fn notify(socket: &std::path::Path) {
    let told = UnixDatagram::unbound().and_then(|from| from.send_to(b"READY=1\n", socket));
    if let Err(error) = told {
        let _ = writeln!(io::stderr(), "stub-worker: notify: {error}");
    }
}

/// Writes the stamp so that a reader sees all of it or nothing.
fn write_stamp(path: &std::path::Path, stamp: &str) {
    if let Err(error) = vram::write_whole(path, stamp) {
        let _ = writeln!(io::stderr(), "stub-worker: ready stamp: {error}");
    }
}

fn say(stub: &Stub, text: &str) {
    if !stub.args.silent {
        // Nobody may be reading; the worker does not mind.
        let _ = writeln!(io::stdout(), "{}: {text}", stub.args.name);
    }
}

/// Waits for the SIGTERM that ends the worker. Returns the exit code.
async fn terminated(stub: &Stub, term: &mut Signal) -> u8 {
    term.recv().await;
    if stub.args.ignore_term || Orders::read(&stub.args).ignore_term {
        loop {
            say(stub, "terminate ignored");
            term.recv().await;
        }
    }
    say(stub, "terminating");
    sleep(stub.args.slow_exit).await;
    if !stub.args.finish_requests {
        return 0;
    }
    stub.closing.cancel();
    let mut ended = stub.request_ended.subscribe();
    tokio::select! {
        _ = ended.wait_for(|()| stub.in_flight() == 0) => sleep(LAST_WORDS).await,
        _ = term.recv() => return 1,
    }
    0
}

async fn timed_out(stub: &Stub, started: Instant) {
    match stub.args.exit_after {
        Some(after) => sleep_until(started + after).await,
        None => std::future::pending().await,
    }
}

/// Waits until as many requests were answered as the worker survives.
async fn used_up(stub: &Stub) {
    stub.answered(stub.args.die_after_requests).await;
}
