//! Sleep as engines have it: memory is given back and taken again while the
//! process lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::{future, io};

use clap::ValueEnum;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::answer::kill_self;
use crate::state::Stub;
use crate::vram;

/// How a call to sleep or to wake goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fault {
    /// Not at all.
    None,
    /// It is answered as if all were well, and no memory moves.
    Nothing,
    /// It is answered with 500.
    Fails,
    /// It is never answered.
    Hangs,
}

/// Whether the worker sleeps, and how often it did.
#[derive(Debug, Default)]
pub(crate) struct Sleep {
    asleep: AtomicBool,
    sleeps: AtomicU64,
    wakes: AtomicU64,
}

/// What a path asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Sleep,
    Wake,
    Ask,
}

impl Call {
    /// Returns what this path asks for, by the names of vLLM and of `SGLang`.
    pub(crate) fn of(path: &str) -> Option<Self> {
        match path {
            "/sleep" | "/release_memory_occupation" => Some(Self::Sleep),
            "/wake_up" | "/resume_memory_occupation" => Some(Self::Wake),
            "/is_sleeping" => Some(Self::Ask),
            _ => None,
        }
    }
}

impl Sleep {
    pub(crate) fn is_asleep(&self) -> bool {
        self.asleep.load(Ordering::Acquire)
    }

    /// Returns the books, for `GET /stats`.
    pub(crate) fn stats(&self) -> Value {
        json!({
            "asleep": self.is_asleep(),
            "sleeps": self.sleeps.load(Ordering::Relaxed),
            "wakes": self.wakes.load(Ordering::Relaxed),
        })
    }
}

/// Dies as engines did when they were asked something while they slept.
pub(crate) fn crash_when_asked(stub: &Stub) {
    if stub.sleep.is_asleep() {
        kill_self();
    }
}

/// Does what a call asks for.
///
/// # Errors
/// When it is to fail, or when memory cannot be claimed.
pub(crate) async fn obey(stub: &Arc<Stub>, call: Call) -> io::Result<Value> {
    let (fault, count, asleep) = match call {
        Call::Sleep => (stub.args.sleep_fault, &stub.sleep.sleeps, true),
        Call::Wake => (stub.args.wake_fault, &stub.sleep.wakes, false),
        Call::Ask => return Ok(json!({"is_sleeping": stub.sleep.is_asleep()})),
    };
    count.fetch_add(1, Ordering::Relaxed);
    sleep(stub.args.sleep_time).await;
    match fault {
        Fault::Nothing => {
            stub.sleep.asleep.store(asleep, Ordering::Release);
            return Ok(json!({}));
        }
        Fault::Fails => return Err(io::Error::other("as asked")),
        Fault::Hangs => future::pending().await,
        Fault::None => {}
    }
    if asleep {
        // Before the memory goes, so that nobody is served without it.
        stub.sleep.asleep.store(true, Ordering::Release);
    }
    let moving = Arc::clone(stub);
    let moved = tokio::task::spawn_blocking(move || {
        let args = &moving.args;
        let (anon, vram) = match asleep {
            true => (args.sleep_anon, args.sleep_vram),
            false => (args.anon, args.vram),
        };
        moving.memory.replace(anon);
        vram::claim(args, vram)
    });
    moved.await.map_err(io::Error::other)??;
    stub.sleep.asleep.store(asleep, Ordering::Release);
    Ok(json!({}))
}
