//! The threads that serve connections.
//!
//! A connection stays on one thread, with those that it has to workers. In a runtime
//! whose threads take work from each other a piece of a stream that wakes one of them
//! wakes a second one to look for more, which costs about as much as passing the piece
//! on; and what one thread allocates another gives back. The other runtime, in which
//! all else happens, has threads of its own, so no flood of requests keeps the
//! controller from its work. Calls of the API are answered in the lane that has their
//! connection: with all cores busy a turn of another thread is milliseconds away.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::Builder;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tracing::debug;

use crate::telemetry;

/// Begins to serve a connection, in the lane's thread.
type Job = Box<dyn FnOnce() + Send>;

/// All lanes. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Lanes(Arc<[Lane]>);

#[derive(Debug)]
struct Lane {
    jobs: UnboundedSender<Job>,
    /// Connections that it has.
    open: Arc<AtomicUsize>,
}

/// One connection of a lane's.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lanes {
    /// Starts so many. They end with the last handle to them.
    pub(super) fn start(count: usize) -> io::Result<Self> {
        (0..count)
            .map(|_| Lane::start())
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Has a connection served in the lane that has the fewest. `begin` is called
    /// there.
    pub(super) fn serve<F>(&self, begin: impl FnOnce() -> io::Result<F> + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let lanes = self.0.iter();
        let Some(lane) = lanes.min_by_key(|lane| lane.open.load(Ordering::Relaxed)) else {
            return;
        };
        lane.open.fetch_add(1, Ordering::Relaxed);
        let open = Open(Arc::clone(&lane.open));
        let job: Job = Box::new(move || match begin() {
            Ok(serving) => drop(telemetry::spawn_often("connection", async move {
                let _open = open;
                serving.await;
            })),
            Err(error) => debug!(%error, "a connection cannot be served"),
        });
        // Its thread is there as long as its handle is.
        if lane.jobs.send(job).is_err() {
            debug!("a connection came too late");
        }
    }
}

impl Lane {
    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        #[expect(
            clippy::disallowed_methods,
            reason = "as many wait as there are connections, which descriptors bound"
        )]
        let (jobs, mut todo) = unbounded_channel::<Job>();
        std::thread::Builder::new()
            .name("lane".into())
            .spawn(move || {
                runtime.block_on(async move {
                    while let Some(begin) = todo.recv().await {
                        begin();
                    }
                });
            })?;
        Ok(Self {
            jobs,
            open: Arc::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tokio::sync::{mpsc, oneshot};

    use super::*;

    #[tokio::test]
    async fn connections_are_shared_out_and_each_stays_on_its_thread() {
        let lanes = Lanes::start(2).expect("threads");
        let (seen, mut threads) = mpsc::channel(8);
        let mut ends = Vec::new();
        let begin = |ends: &mut Vec<oneshot::Sender<()>>| {
            let (end, ended) = oneshot::channel();
            let seen = seen.clone();
            lanes.serve(move || {
                Ok(async move {
                    let first = thread::current().id();
                    tokio::task::yield_now().await;
                    assert_eq!(thread::current().id(), first);
                    seen.try_send(first).expect("there is room");
                    let _ = ended.await;
                })
            });
            ends.push(end);
        };
        for _ in 0..4 {
            begin(&mut ends);
        }
        let mut counts = std::collections::HashMap::new();
        for _ in 0..4 {
            *counts
                .entry(threads.recv().await.expect("it began"))
                .or_insert(0) += 1;
        }
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [2, 2]);
        // Who ends makes room: the next one goes there.
        let counts = || lanes.0.iter().map(|lane| lane.open.load(Ordering::Relaxed));
        drop(ends.remove(0));
        while counts().sum::<usize>() != 3 {
            tokio::task::yield_now().await;
        }
        begin(&mut ends);
        assert_eq!(counts().collect::<Vec<_>>(), [2, 2]);
    }

    #[tokio::test]
    async fn one_that_cannot_be_served_leaves_no_trace() {
        let lanes = Lanes::start(1).expect("a thread");
        lanes.serve(|| Err::<std::future::Ready<()>, _>(io::ErrorKind::NotConnected.into()));
        while lanes.0[0].open.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
    }
}
