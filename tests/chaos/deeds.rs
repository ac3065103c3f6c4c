//! Does what is planned, when it is due, and undoes it when its time is over.
//! Before each blow it is written down what may come of it.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::plan::{Deed, LATE, PARENT, Step, Word};
use crate::processes::{Process, marked};
use crate::site::{Blow, Site};
use crate::support::pause;
use crate::town::{Shape, Town, put};
use crate::{restart, thief};

/// How long the death of a worker may show: it is noticed at once, and who was
/// inside is tried again in the next.
const SHOWS: Duration = Duration::from_secs(5);
/// How long a stopped or hanging worker may show: until somebody asks it, and
/// then it is found within four seconds or so.
pub(crate) const FOUND: Duration = Duration::from_secs(20);
/// How long a start that hangs, or a drain, may show after its cause has gone.
const STARTS: Duration = Duration::from_secs(10);
/// Longest a request is inside that keeps a worker over a limit from going.
const DRAINS: Duration = Duration::from_secs(30);

/// What is to be undone.
#[derive(Clone, Debug)]
enum Undo {
    Continue(Process),
    Orders(&'static str),
    FreeDisk,
    FreeFiles,
    AddBack(&'static str, Word),
    Unpin(&'static str),
    Config(Word),
}

/// Does the deeds of one run.
#[derive(Debug)]
pub(crate) struct Doer<'a> {
    pub(crate) site: &'a Site,
    pub(crate) town: &'a mut Town,
    shape: Shape,
    undo: Vec<(Duration, Undo)>,
    count: u64,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl<'a> Doer<'a> {
    pub(crate) fn new(site: &'a Site, town: &'a mut Town) -> Self {
        Self {
            site,
            town,
            shape: Shape::default(),
            undo: Vec::new(),
            count: 0,
            threads: Vec::new(),
        }
    }

    /// Does all of it, until the run is over.
    pub(crate) fn work(&mut self, steps: &[Step], length: Duration) {
        let mut steps = steps.iter().peekable();
        while self.site.time() < length && !self.site.is_over() {
            let time = self.site.time();
            self.undo_until(time);
            match steps.next_if(|step| step.at <= time) {
                Some(step) => self.act(step.deed),
                None => pause(Duration::from_millis(5)),
            }
        }
        self.site
            .note("the deeds are over; what was done is undone");
        self.undo_until(Duration::MAX);
        for thread in self.threads.drain(..) {
            // Its panic is a fault of the harness, and told by the test.
            thread.join().expect("a thief ends");
        }
    }

    fn undo_until(&mut self, time: Duration) {
        let (due, later): (Vec<_>, Vec<_>) = self.undo.drain(..).partition(|(at, _)| *at <= time);
        self.undo = later;
        for (_, undo) in due {
            self.site.note(format!("undo {undo:?}"));
            self.undo_one(undo);
        }
    }

    fn undo_one(&mut self, undo: Undo) {
        match undo {
            Undo::Continue(process) => signal(&process, Signal::SIGCONT),
            Undo::Orders(model) => self.town.order(model, ""),
            Undo::FreeDisk | Undo::FreeFiles => self.free_disk(),
            Undo::AddBack(model, word) => {
                self.shape.without.retain(|name| *name != model);
                self.reload(word);
                self.site.strike(Some(model), Blow::Changed, STARTS);
            }
            Undo::Unpin(model) => self.operate(model, "unpin"),
            Undo::Config(word) => self.reload(word),
        }
    }

    fn later(&mut self, after: Duration, undo: Undo) {
        self.undo.push((self.site.time() + after, undo));
    }

    fn act(&mut self, deed: Deed) {
        self.count += 1;
        self.site.note(deed.to_string());
        let name = format!("{deed:?}");
        let end = name.find(['(', ' ']).unwrap_or(name.len());
        self.site.count(format!("deed {}", &name[..end]));
        match deed {
            Deed::KillWorker(_)
            | Deed::KillChild
            | Deed::StopWorker(..)
            | Deed::HangWorker(_)
            | Deed::SlowDeath(_)
            | Deed::Grow(_)
            | Deed::Exhaust(_) => self.hit_worker(deed),
            Deed::CrashStarts(model, time) => self.spoil_starts(model, "crash", time),
            Deed::HangStarts(model, time) => self.spoil_starts(model, "never-ready", time),
            Deed::StealPort(time) => self.steal_port(time),
            Deed::InheritPort(model, time) => self.inherit_port(model, time),
            Deed::SetClock(seconds) => self.town.set_clock(seconds),
            Deed::FillDisk(time) => self.spoil_disk(time, true),
            Deed::NoNewFiles(time) => self.spoil_disk(time, false),
            Deed::ReloadInvalid(word) => self.reload_invalid(word),
            Deed::ReloadChanged(model, word) => {
                self.site.strike(Some(model), Blow::Changed, STARTS);
                *self.shape.changes.entry(model).or_default() += 1;
                self.reload(word);
            }
            Deed::ReloadWithout(model, time, word) => {
                self.site.strike(Some(model), Blow::Changed, time + STARTS);
                self.shape.without.push(model);
                self.reload(word);
                self.later(time, Undo::AddBack(model, word));
            }
            Deed::Limit(mebibytes) => self.limit(mebibytes),
            Deed::Load(model) => self.operate(model, "load"),
            Deed::Unload(model) => self.operate(model, "unload"),
            Deed::Restart(model) => self.operate(model, "restart"),
            Deed::Pin(model, time) => {
                self.site.strike(None, Blow::Pinned, time + SHOWS);
                self.operate(model, "pin");
                // One is pinned by the configuration, and stays so.
                if model != "gold" {
                    self.later(time, Undo::Unpin(model));
                }
            }
            Deed::Cleanup => {
                let body = Some("{\"all\": true, \"timeout_seconds\": 1}");
                self.expect("POST", "/api/v1/memory/cleanup", body, &[200]);
            }
            Deed::KillResidentd(down) => restart::kill(self, down),
            Deed::EndResidentd => restart::end(self),
            Deed::UpgradeResidentd => restart::upgrade(self),
            Deed::PauseResidentd(time) => self.pause_residentd(time),
        }
    }

    fn hit_worker(&mut self, deed: Deed) {
        let (Deed::KillWorker(model)
        | Deed::StopWorker(model, _)
        | Deed::HangWorker(model)
        | Deed::SlowDeath(model)
        | Deed::Grow(model)
        | Deed::Exhaust(model)) = deed
        else {
            self.kill_child();
            return;
        };
        let Some(worker) = self.worker(model) else {
            self.site.note("it has no worker");
            return;
        };
        let blow = match deed {
            Deed::Grow(_) | Deed::Exhaust(_) => Blow::Memory,
            _ => Blow::Worker,
        };
        // What takes memory may hit anybody.
        let whose = (blow == Blow::Worker).then_some(model);
        let shows = match deed {
            Deed::KillWorker(_) | Deed::SlowDeath(_) => SHOWS,
            _ => FOUND,
        };
        self.site.strike(whose, blow, shows);
        let order = |words: &str| {
            let words = format!("pid={} {words}", worker.pid);
            self.town.order(model, &words);
        };
        match deed {
            Deed::KillWorker(_) => signal(&worker, Signal::SIGKILL),
            Deed::StopWorker(_, time) => {
                signal(&worker, Signal::SIGSTOP);
                if let Some(time) = time {
                    self.later(time, Undo::Continue(worker));
                }
            }
            Deed::HangWorker(_) => order("hang"),
            Deed::SlowDeath(_) => {
                order("ignore-term");
                self.operate(model, "unload");
            }
            Deed::Grow(_) => {
                self.site.strike(None, Blow::Limit, DRAINS);
                order("grow=150MiB");
            }
            _ => {
                self.site.strike(None, Blow::Limit, DRAINS);
                // Without a bound of its own it would take it from everybody.
                order(if self.town.cgroup.is_some() {
                    "grow=2GiB"
                } else {
                    "grow=300MiB"
                });
            }
        }
    }

    fn kill_child(&self) {
        let child = format!("{PARENT}-child");
        let found = self.processes().into_iter().find(|p| p.serves(&child));
        if let Some(child) = found {
            signal(&child, Signal::SIGKILL);
        }
    }

    /// Has the model's worker die, and no other come up for so long.
    fn spoil_starts(&mut self, model: &'static str, order: &str, time: Duration) {
        self.site.strike(Some(model), Blow::Start, time + STARTS);
        self.site.strike(Some(model), Blow::Worker, SHOWS);
        self.town.order(model, order);
        self.later(time, Undo::Orders(model));
        if let Some(worker) = self.worker(model) {
            signal(&worker, Signal::SIGKILL);
        }
    }

    fn steal_port(&mut self, time: Duration) {
        self.site.strike(Some(LATE), Blow::Start, time + STARTS);
        self.site.strike(Some(LATE), Blow::Worker, SHOWS);
        let residentd = i64::from(self.town.residentd.pid());
        self.threads.push(thief::steal(LATE, residentd, time));
        if let Some(worker) = self.worker(LATE) {
            signal(&worker, Signal::SIGKILL);
        }
        self.operate(LATE, "load");
    }

    fn inherit_port(&mut self, model: &'static str, time: Duration) {
        let worker = self.worker(model);
        let Some((worker, port)) = worker.and_then(|w| Some((w.clone(), w.port()?))) else {
            self.site.note("it has no worker on a port");
            return;
        };
        self.site.strike(Some(model), Blow::Worker, SHOWS);
        signal(&worker, Signal::SIGKILL);
        self.threads.push(thief::inherit(port, time));
    }

    fn spoil_disk(&mut self, time: Duration, bytes: bool) {
        let Some(disk) = &self.town.disk else {
            self.site.note("there is no small disk");
            return;
        };
        self.site.strike_until_healed(Blow::Disk);
        if bytes {
            disk.fill();
            self.later(time, Undo::FreeDisk);
        } else {
            // A socket is a file.
            self.site.strike(Some("pipe"), Blow::Start, time + STARTS);
            disk.allow_files(false);
            self.later(time, Undo::FreeFiles);
        }
    }

    /// Has the disk be as it was.
    pub(crate) fn free_disk(&mut self) {
        if let Some(disk) = &self.town.disk {
            disk.free();
            disk.allow_files(true);
        }
        // What could not be written is tried again every five seconds.
        self.site.heal(Blow::Disk, Duration::from_secs(7));
    }

    fn reload_invalid(&mut self, word: Word) {
        let text = "[memory]\nlimit = \"much\"\n[models.red]\ncomand = \"x\"\n";
        put(&self.site.folder, text);
        if word == Word::Api {
            let answer = self.expect("POST", "/api/v1/reload", None, &[422]);
            let problems = answer["error"]["problems"].as_array().map_or(0, Vec::len);
            if problems < 2 && answer.is_object() {
                self.site
                    .fault(format!("not all problems are told: {answer}"));
            }
        } else {
            self.hangup(word);
        }
        self.later(Duration::from_millis(1200), Undo::Config(word));
    }

    /// Writes the configuration as it is meant to be now.
    pub(crate) fn mend_config(&mut self) {
        self.undo
            .retain(|(_, undo)| !matches!(undo, Undo::Config(_)));
        self.town.configure(&self.shape);
    }

    /// Has residentd take up the configuration as it is meant to be now.
    fn reload(&mut self, word: Word) {
        self.mend_config();
        match word {
            Word::Api => drop(self.expect("POST", "/api/v1/reload", None, &[200])),
            Word::Hangup | Word::Watch => self.hangup(word),
        }
    }

    fn hangup(&self, word: Word) {
        if word == Word::Hangup {
            self.town.residentd.signal(Signal::SIGHUP);
        }
    }

    fn limit(&self, mebibytes: u64) {
        self.site.strike(None, Blow::Limit, DRAINS);
        let mebibytes = u32::try_from(mebibytes).expect("a small number");
        let limit = f64::from(mebibytes) / 1024.0;
        let path = format!("/api/v1/memory/limit?limit_gb={limit}");
        self.expect("POST", &path, None, &[200]);
    }

    /// Has an operator wish something of the model, and not wait for it.
    fn operate(&self, model: &'static str, wish: &str) {
        if wish == "unload" || wish == "restart" {
            self.site.strike(Some(model), Blow::Unloaded, STARTS);
        }
        let path = format!("/api/v1/models/{model}/{wish}?wait=false");
        // A load may be refused at once, and a model may just be gone.
        let statuses = [200, 202, 404, 429, 502, 503, 504];
        self.expect("POST", &path, None, &statuses);
    }

    /// Asks the API, which is there and answers with one of these.
    pub(crate) fn expect(
        &self,
        method: &str,
        path: &str,
        body: Option<&str>,
        statuses: &[u16],
    ) -> serde_json::Value {
        match self.site.ask(method, path, body) {
            Some((status, answer)) => {
                if !statuses.contains(&status) {
                    self.site
                        .fault(format!("{method} {path}: {status} {answer}"));
                }
                answer
            }
            None => {
                self.site.fault(format!("{method} {path}: no answer"));
                serde_json::Value::Null
            }
        }
    }

    fn pause_residentd(&self, time: Duration) {
        self.site.strike(None, Blow::Paused, time);
        self.town.residentd.signal(Signal::SIGSTOP);
        pause(time);
        self.town.residentd.signal(Signal::SIGCONT);
    }

    /// Returns the process that serves the model; of one in a shell now and
    /// then the shell.
    fn worker(&self, model: &str) -> Option<Process> {
        let all = self.processes();
        let server = all.iter().find(|process| process.serves(model))?;
        let shell = all.iter().find(|process| process.pid == server.parent);
        let shell =
            shell.filter(|process| process.arguments[0] == "sh" && self.count.is_multiple_of(2));
        Some(shell.unwrap_or(server).clone())
    }

    pub(crate) fn processes(&self) -> Vec<Process> {
        marked(&self.site.folder.display().to_string())
    }
}

/// Sends a signal to a process of the run, when it is still that one.
pub(crate) fn signal(process: &Process, signal: Signal) {
    if process.runs() {
        let pid = Pid::from_raw(i32::try_from(process.pid).expect("a pid fits"));
        // It may have ended in between.
        let _ = kill(pid, signal);
    }
}
