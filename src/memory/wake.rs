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
use std::os::unix::fs::FileExt;
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

/// A file that becomes urgent when memory gets tight.
#[derive(Debug)]
struct Source {
    file: File,
    /// It stays urgent until it is read, and is so before the first read.
    read_to_rearm: bool,
}

impl Source {
    /// Makes the file wait for the next event. Returns whether it still can.
    fn rearm(&self) -> bool {
        // One read is enough: it makes the kernel show the whole file.
        !self.read_to_rearm || self.file.read_at(&mut [0; 64], 0).is_ok()
    }
}

/// Opens every source that is there.
fn sources(root: &Path, cgroup: Option<&Cgroup>) -> Vec<Source> {
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
        })
        .map(|file| Source {
            file,
            read_to_rearm: false,
        });
    let events = own
        .and_then(|own| File::open(own.join("memory.events")).ok())
        .map(|file| Source {
            file,
            read_to_rearm: true,
        });
    triggers.chain(events).collect()
}

fn trigger(path: &Path) -> io::Result<File> {
    let mut file = File::options().read(true).write(true).open(path)?;
    file.write_all(TRIGGER)?;
    Ok(file)
}

fn wait(stop: &OwnedFd, sources: &[Source], wake: impl Fn()) {
    // A source that fails is waited for no more.
    let mut working: Vec<&Source> = sources.iter().filter(|source| source.rearm()).collect();
    while !working.is_empty() {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        let priority = PollFlags::PRI;
        fds.extend(
            working
                .iter()
                .map(|source| PollFd::new(&source.file, priority)),
        );
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
        working.retain(|source| {
            let flags = happened.next().copied().unwrap_or(PollFlags::empty());
            if flags.contains(PollFlags::PRI) {
                events += 1;
                // Before the reading, so that none that follows is missed.
                return source.rearm();
            }
            // `memory.events` raises both at each event; alone, it is gone.
            !flags.contains(PollFlags::ERR)
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
    use std::fs;
    use std::path::PathBuf;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::super::cgroup;
    use super::*;

    #[test]
    fn a_machine_without_any_source_needs_no_thread() {
        let root = tempfile::tempdir().expect("a folder");
        let wake = Wake::start(root.path(), None, || {});
        assert!(wake.stop.is_none());
    }

    /// A thread that waits for one source.
    struct Waiting {
        wake: Wake,
        wakes: mpsc::Receiver<()>,
        thread: thread::JoinHandle<()>,
    }

    impl Waiting {
        fn on(source: Source) -> Self {
            let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
            let (woken, wakes) = mpsc::channel();
            let theirs = stop.try_clone().expect("a copy");
            let thread = thread::spawn(move || {
                wait(&theirs, &[source], move || {
                    let _ = woken.send(());
                });
            });
            let wake = Wake { stop: Some(stop) };
            Self {
                wake,
                wakes,
                thread,
            }
        }

        fn is_quiet(&self) -> bool {
            let quiet = Duration::from_millis(300);
            self.wakes.recv_timeout(quiet).is_err()
        }

        fn wakes(&self) {
            let woken = self.wakes.recv_timeout(Duration::from_secs(10));
            woken.expect("it wakes");
        }

        fn ends(self) {
            drop(self.wake);
            self.thread.join().expect("it ends");
        }
    }

    #[test]
    fn a_source_that_becomes_urgent_wakes_and_a_drop_ends_the_wait() {
        // Urgent data on a socket is the one thing a test can make urgent.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = listener.local_addr().expect("an address");
        let sender = std::net::TcpStream::connect(address).expect("a connection");
        let (receiver, _) = listener.accept().expect("a connection");
        let waiting = Waiting::on(Source {
            file: File::from(OwnedFd::from(receiver)),
            read_to_rearm: false,
        });
        assert!(waiting.is_quiet());
        rustix::net::send(&sender, b"!", rustix::net::SendFlags::OOB).expect("sent");
        waiting.wakes();
        waiting.ends();
    }

    /// A cgroup of version 2 without processes; taken away at the end.
    struct EmptyCgroup(PathBuf);

    impl EmptyCgroup {
        fn make(name: &str) -> io::Result<Self> {
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
            let point = mount.and_then(|line| line.split(' ').nth(4));
            let point = Path::new(point.ok_or(io::ErrorKind::NotFound)?);
            let folder = point.join(format!("residentd-test-{name}-{}", std::process::id()));
            fs::create_dir(&folder)?;
            Ok(Self(folder))
        }
    }

    impl Drop for EmptyCgroup {
        fn drop(&mut self) {
            let _ = fs::remove_dir(&self.0);
        }
    }

    #[test]
    fn an_event_of_a_cgroup_wakes_once_and_none_without_one() {
        // `memory.events` was urgent from the start and for ever, because
        // nobody read it. `cgroup.events` is told of in the same way and
        // needs no controller.
        let cgroup = match EmptyCgroup::make("wake") {
            Ok(cgroup) => cgroup,
            Err(error) => {
                println!("SKIPPED: no cgroup of version 2 can be made: {error}");
                return;
            }
        };
        let waiting = Waiting::on(Source {
            file: File::open(cgroup.0.join("cgroup.events")).expect("it is there"),
            read_to_rearm: true,
        });
        assert!(waiting.is_quiet(), "nothing happened yet");
        for frozen in ["1", "0"] {
            fs::write(cgroup.0.join("cgroup.freeze"), frozen).expect("it can be frozen");
            waiting.wakes();
            assert!(waiting.is_quiet(), "one event, one wake");
        }
        waiting.ends();
    }

    #[test]
    fn a_limit_that_is_met_wakes() {
        let cgroup = match EmptyCgroup::make("limit") {
            Ok(cgroup) => cgroup,
            Err(error) => {
                println!("SKIPPED: no cgroup of version 2 can be made: {error}");
                return;
            }
        };
        let Ok(file) = File::open(cgroup.0.join("memory.events")) else {
            println!("SKIPPED: version 2 has no memory controller here");
            return;
        };
        let waiting = Waiting::on(Source {
            file,
            read_to_rearm: true,
        });
        assert!(waiting.is_quiet(), "nothing happened yet");
        fs::write(cgroup.0.join("memory.max"), "8388608").expect("a limit can be set");
        let within = "echo $$ > \"$0\" && exec dd if=/dev/zero of=/dev/null bs=33554432 count=1";
        let dd = std::process::Command::new("sh")
            .args(["-c", within])
            .arg(cgroup.0.join("cgroup.procs"))
            .stderr(std::process::Stdio::null())
            .status()
            .expect("a shell runs");
        assert!(!dd.success(), "it does not fit");
        waiting.wakes();
        let events = fs::read_to_string(cgroup.0.join("memory.events")).expect("events");
        assert!(cgroup::number(&events, "max") > Some(0), "{events}");
        assert!(cgroup::number(&events, "oom_kill") > Some(0), "{events}");
        waiting.ends();
    }

    #[test]
    fn this_kernels_trigger_is_accepted_where_it_offers_one() {
        let path = Path::new("/proc/pressure/memory");
        if File::options().read(true).write(true).open(path).is_ok() {
            trigger(path).expect("a window of 2 s needs no rights");
        }
    }
}
