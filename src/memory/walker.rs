//! Looks into single processes on a thread of its own.
//!
//! `maps`, `smaps` and `smaps_rollup` need the lock of the process' address
//! space and may take seconds for a large one. The sampler must not wait for
//! that, so it hands over a list and collects the outcome in a later pass.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::maps::{self, Inode, PageWalk};
use crate::clock::{Clock, Timestamp};
use crate::model::Bytes;
use crate::procfs::{ProcessKey, ProcessStat};

/// What to look at in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Which inodes it maps.
    Maps,
    /// What it shares of each: a walk of its page tables.
    Smaps,
    /// The sums of that only.
    Rollup,
}

/// What was seen.
#[derive(Clone, Debug)]
pub(super) struct Find {
    pub(super) process: ProcessKey,
    pub(super) at: Timestamp,
    pub(super) took: Duration,
    pub(super) seen: Seen,
}

/// See [`Find`].
#[derive(Clone, Debug)]
pub(super) enum Seen {
    Maps(BTreeMap<Inode, Bytes>),
    Walk(PageWalk),
    /// The process is gone or does not let us look.
    Nothing,
}

/// The thread, from outside. Ends when this is dropped, after the process it
/// is looking at.
#[derive(Debug)]
pub(super) struct Walker {
    orders: Option<SyncSender<Vec<(ProcessKey, Look)>>>,
    desk: Arc<Mutex<Desk>>,
}

#[derive(Debug, Default)]
struct Desk {
    busy: bool,
    finds: Vec<Find>,
}

impl Walker {
    /// Starts the thread; `done` is called there after each list.
    pub(super) fn start(clock: Clock, done: impl Fn() + Send + 'static) -> Self {
        // One list at a time: the next is made from what the last one found.
        let (orders, incoming) = mpsc::sync_channel(1);
        let desk = Arc::new(Mutex::new(Desk::default()));
        let thread = thread::Builder::new().name("memory-walker".into()).spawn({
            let desk = Arc::clone(&desk);
            move || run(clock, &incoming, &desk, done)
        });
        if let Err(error) = &thread {
            tracing::error!(%error, "shared pages are not looked for: no thread");
        }
        Self {
            orders: thread.is_ok().then_some(orders),
            desk,
        }
    }

    /// Takes what was found since the last call.
    pub(super) fn collect(&self) -> Vec<Find> {
        std::mem::take(&mut lock(&self.desk).finds)
    }

    /// Returns whether a list can be handed over.
    pub(super) fn is_idle(&self) -> bool {
        self.orders.is_some() && !lock(&self.desk).busy
    }

    /// Hands over a list; drops it when the last one is not done.
    pub(super) fn look(&self, list: Vec<(ProcessKey, Look)>) {
        let Some(orders) = &self.orders else {
            return;
        };
        let mut desk = lock(&self.desk);
        if !list.is_empty() && !desk.busy {
            desk.busy = orders.try_send(list).is_ok();
        }
    }
}

fn run(
    clock: Clock,
    orders: &Receiver<Vec<(ProcessKey, Look)>>,
    desk: &Mutex<Desk>,
    done: impl Fn(),
) {
    while let Ok(list) = orders.recv() {
        for (process, look) in list {
            let at = clock.now();
            let seen = look_at(process, look).unwrap_or(Seen::Nothing);
            let took = clock.now().since(at);
            lock(desk).finds.push(Find {
                process,
                at,
                took,
                seen,
            });
        }
        lock(desk).busy = false;
        done();
    }
}

fn look_at(process: ProcessKey, look: Look) -> io::Result<Seen> {
    let pid = process.pid;
    if ProcessStat::read(pid).is_none_or(|stat| stat.key != process) {
        return Ok(Seen::Nothing);
    }
    let open = |name: &str| {
        let file = File::open(format!("/proc/{pid}/{name}"))?;
        io::Result::Ok(BufReader::with_capacity(1 << 16, file))
    };
    Ok(match look {
        Look::Maps => Seen::Maps(maps::read_maps(open("maps")?)?),
        Look::Smaps => Seen::Walk(maps::read_smaps(open("smaps")?)?),
        Look::Rollup => Seen::Walk(maps::read_rollup(open("smaps_rollup")?)?),
    })
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> ProcessKey {
        let pid = i32::try_from(std::process::id()).expect("a pid fits");
        ProcessStat::read(pid).expect("this process runs").key
    }

    #[test]
    fn every_look_at_this_process_finds_it() {
        let (done, finished) = mpsc::channel();
        let walker = Walker::start(Clock::start(), move || {
            let _ = done.send(());
        });
        let list = [Look::Maps, Look::Smaps, Look::Rollup].map(|look| (me(), look));
        walker.look(list.to_vec());
        finished
            .recv_timeout(Duration::from_secs(20))
            .expect("the list is done");
        let finds = walker.collect();
        assert!(matches!(&finds[0].seen, Seen::Maps(inodes) if !inodes.is_empty()));
        for find in &finds[1..] {
            let Seen::Walk(walk) = &find.seen else {
                panic!("no walk: {find:?}");
            };
            assert!(walk.pss > Bytes::ZERO && walk.anon.rss > Bytes::ZERO);
        }
        assert!(walker.is_idle());
    }

    #[test]
    fn another_process_under_the_same_pid_is_not_looked_at() {
        let mut stranger = me();
        stranger.start_time += 1;
        let seen = look_at(stranger, Look::Maps).expect("no error");
        assert!(matches!(seen, Seen::Nothing));
    }
}
