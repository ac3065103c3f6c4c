//! What wakes the sampler before its time: the kernel says that memory is
//! getting tight.
//!
//! | source | says |
//! | --- | --- |
//! | trigger on `/proc/pressure/memory` | tasks of the machine wait for memory |
//! | trigger on `memory.pressure` of our cgroup (version 2) | ours do |
//! | `memory.events` of our cgroup (version 2) | the limit was met, or somebody was ended |
//!
//! Neither ends anybody: a cold load of mapped weights raises the first two as
//! well. They bring the next reading forward. What is not there, or not allowed,
//! is left out. See the kernel's `psi.rst` and `cgroup-v2.rst`; without
//! `CAP_SYS_RESOURCE` only windows of a multiple of 2 s are accepted.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;

use super::cgroup::Cgroup;

/// Waiting for 150 ms of 2 s.
const TRIGGER: &[u8] = b"some 150000 2000000\0";
/// Events come in bursts; one reading for each of these is enough.
const REST: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// The thread that waits, from outside. Ends when this is dropped.
#[derive(Debug)]
pub(super) struct Wake {
    stop: Option<OwnedFd>,
}

impl Wake {
    /// Waits for what there is below `root`, and calls `wake` each time.
    pub(super) fn start(
        root: &Path,
        cgroup: Option<&Cgroup>,
        wake: impl Fn() + Send + 'static,
    ) -> Self {
        let sources = sources(root, cgroup);
        if sources.is_empty() {
            return Self { stop: None };
        }
        let started = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .and_then(|stop| {
                let theirs = stop.try_clone()?;
                thread::Builder::new()
                    .name("memory-wake".into())
                    .spawn(move || wait(&theirs, &sources, wake))?;
                Ok(stop)
            });
        Self {
            stop: started
                .inspect_err(|error| tracing::debug!(%error, "no thread to wait for pressure"))
                .ok(),
        }
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        if let Some(stop) = &self.stop {
            // The thread has ended by itself if this fails.
            let _ = rustix::io::write(stop, &1_u64.to_ne_bytes());
        }
    }
}

/// Opens every source that is there.
fn sources(root: &Path, cgroup: Option<&Cgroup>) -> Vec<File> {
    let own = cgroup.map(Cgroup::own);
    let pressure = [Some(root.join("proc")), own.clone()];
    let names = ["pressure/memory", "memory.pressure"];
    let triggers = pressure
        .into_iter()
        .zip(names)
        .filter_map(|(folder, name)| {
            let path = folder?.join(name);
            trigger(&path)
                .inspect_err(|error| tracing::debug!(path = %path.display(), %error, "no trigger"))
                .ok()
        });
    let events = own.and_then(|own| File::open(own.join("memory.events")).ok());
    triggers.chain(events).collect()
}

fn trigger(path: &Path) -> io::Result<File> {
    let mut file = File::options().read(true).write(true).open(path)?;
    file.write_all(TRIGGER)?;
    Ok(file)
}

fn wait(stop: &OwnedFd, sources: &[File], wake: impl Fn()) {
    // A source that fails is waited for no more.
    let mut working: Vec<&File> = sources.iter().collect();
    while !working.is_empty() {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        let priority = PollFlags::PRI;
        fds.extend(working.iter().map(|file| PollFd::new(*file, priority)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        let happened: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        if !happened[0].is_empty() {
            return;
        }
        let mut happened = happened[1..].iter();
        let mut events = 0;
        working.retain(|_| {
            let flags = happened.next().copied().unwrap_or(PollFlags::empty());
            events += usize::from(flags.contains(PollFlags::PRI));
            // `memory.events` raises both at each event; alone, it is gone.
            !flags.contains(PollFlags::ERR) || flags.contains(PollFlags::PRI)
        });
        if events > 0 {
            wake();
            let mut stopping = [PollFd::new(stop, PollFlags::IN)];
            if poll(&mut stopping, Some(&REST)).is_ok_and(|ready| ready > 0) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_machine_without_any_source_needs_no_thread() {
        let root = tempfile::tempdir().expect("a folder");
        let wake = Wake::start(root.path(), None, || {});
        assert!(wake.stop.is_none());
    }

    #[test]
    fn a_source_that_becomes_urgent_wakes_and_a_drop_ends_the_wait() {
        // Urgent data on a socket is the one thing a test can make urgent.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = listener.local_addr().expect("an address");
        let sender = std::net::TcpStream::connect(address).expect("a connection");
        let (receiver, _) = listener.accept().expect("a connection");
        let source = File::from(OwnedFd::from(receiver));
        let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        let (woken, wakes) = mpsc::channel();
        let thread = thread::spawn({
            let stop = stop.try_clone().expect("a copy");
            move || {
                wait(&stop, &[source], move || {
                    let _ = woken.send(());
                });
            }
        });
        assert!(wakes.recv_timeout(Duration::from_millis(50)).is_err());
        rustix::net::send(&sender, b"!", rustix::net::SendFlags::OOB).expect("sent");
        wakes
            .recv_timeout(Duration::from_secs(10))
            .expect("it wakes");
        drop(Wake { stop: Some(stop) });
        thread.join().expect("it ends");
    }

    #[test]
    fn this_kernels_trigger_is_accepted_where_it_offers_one() {
        let path = Path::new("/proc/pressure/memory");
        if File::options().read(true).write(true).open(path).is_ok() {
            trigger(path).expect("a window of 2 s needs no rights");
        }
    }
}
