//! Is it still there, and is it the same? Workers of a residentd that is no
//! more, before they are taken back.
//!
//! A record counts when the boot and the pid namespace are those of now, the
//! process with that pid started at that tick, it carries the worker's mark, and
//! the configuration would start the same today. Whether it answers is found
//! out by its task, as for any other worker. What is ours and does not count is
//! ended; what is not ours is left alone, whatever its pid.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tracing::{info, warn};

use super::command;
use crate::model::{ModelName, ModelSpec, WorkerRecord};
use crate::procfs::mark::{self, Mark};
use crate::procfs::{ProcessKey, ProcessStat};

/// A worker that was found and can be taken back.
#[derive(Debug)]
pub struct Adoptee {
    /// What was kept of it.
    pub record: WorkerRecord,
    /// What the configuration says of its model.
    pub spec: Arc<ModelSpec>,
    /// How long it has run.
    pub age: Duration,
    /// Whoever handed it over says that it answers: it is not asked, since it may
    /// be busy with what it was asked then.
    pub is_vouched_for: bool,
    pub(super) leader: OwnedFd,
    pub(super) parent: i32,
}

impl Adoptee {
    /// Returns the mark of its processes.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark::kept(&self.record.mark)
    }

    /// Returns its leader.
    #[must_use]
    pub fn leader(&self) -> ProcessKey {
        leader(&self.record)
    }
}

/// Why a worker is not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It ended meanwhile.
    #[error("it has ended")]
    Gone,
    /// Its record is of another boot or of another container.
    #[error("it ran before the machine or the container was started anew")]
    Elsewhere,
    /// Its pid belongs to somebody else.
    #[error("its pid was given to another program")]
    Stranger,
    /// Nothing but its pid says that it is ours.
    #[error("it carries no mark any more")]
    Unmarked,
    /// Its model is not configured.
    #[error("its model is not configured any more")]
    NotConfigured,
    /// Its model is configured otherwise.
    #[error("its command, environment, address or weight files were changed")]
    Changed,
    /// A later life of its model runs too.
    #[error("a later worker of its model runs")]
    Superseded,
    /// It serves nobody until it is made ready again, and how far it has come is
    /// not known.
    #[error("it was parked, or on its way there or back")]
    Parked,
    /// Nobody is to be taken back.
    #[error("workers are not to be taken back: adopt = false")]
    Unwanted,
}

/// What became of the workers that were written down.
#[derive(Debug, Default)]
pub struct Inspected {
    /// Those that can be taken back.
    pub adoptees: Vec<Adoptee>,
    /// Leaders of those that are ours and are to be ended.
    pub doomed: Vec<ProcessKey>,
}

/// Looks for the workers that were written down. `origin` tells what a worker of
/// a model would be started from now.
#[must_use]
pub fn inspect(
    records: &[WorkerRecord],
    models: &[Arc<ModelSpec>],
    origin: impl Fn(&ModelSpec) -> String,
) -> Inspected {
    let home = home();
    let models: BTreeMap<_, _> = models.iter().map(|spec| (&spec.name, spec)).collect();
    let mut newest: BTreeMap<&ModelName, u64> = BTreeMap::new();
    for record in records {
        let newest = newest.entry(&record.worker.model).or_default();
        *newest = record.worker.generation.max(*newest);
    }
    let mut inspected = Inspected::default();
    for record in records {
        let found = find(record, home).and_then(|found| {
            let spec = models.get(&record.worker.model);
            let spec = spec.ok_or(Unfit::NotConfigured)?;
            if newest.get(&record.worker.model) != Some(&record.worker.generation) {
                return Err(Unfit::Superseded);
            }
            if record.origin != origin(spec) {
                return Err(Unfit::Changed);
            }
            if record.parked {
                return Err(Unfit::Parked);
            }
            Ok((found, Arc::clone(spec)))
        });
        match found {
            Ok(((leader, stat), spec)) => inspected.adoptees.push(Adoptee {
                age: age(&stat),
                is_vouched_for: false,
                record: record.clone(),
                spec,
                leader,
                parent: stat.ppid,
            }),
            Err(why) => inspected.leave(record, why),
        }
    }
    inspected
}

impl Inspected {
    /// Ends everybody instead of taking them back.
    pub fn refuse_all(&mut self) {
        for adoptee in std::mem::take(&mut self.adoptees) {
            self.leave(&adoptee.record, Unfit::Unwanted);
        }
    }

    fn leave(&mut self, record: &WorkerRecord, why: Unfit) {
        let (worker, pid) = (&record.worker, record.pid);
        match why {
            Unfit::Gone | Unfit::Elsewhere | Unfit::Stranger => {
                info!(%worker, pid, %why, "worker is not there any more");
            }
            Unfit::Unmarked
            | Unfit::NotConfigured
            | Unfit::Changed
            | Unfit::Superseded
            | Unfit::Parked
            | Unfit::Unwanted => {
                warn!(%worker, pid, %why, "worker is not taken back and is ended");
                self.doomed.push(leader(record));
            }
        }
    }
}

fn leader(record: &WorkerRecord) -> ProcessKey {
    ProcessKey {
        pid: record.pid,
        start_time: record.start_time,
    }
}

/// Finds the process of a record and makes sure that it is the one.
fn find(record: &WorkerRecord, home: &str) -> Result<(OwnedFd, ProcessStat), Unfit> {
    if record.home != home {
        return Err(Unfit::Elsewhere);
    }
    // Opened first, compared then: the number cannot be given away between.
    let pid = Pid::from_raw(record.pid).ok_or(Unfit::Gone)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| Unfit::Gone)?;
    let stat = ProcessStat::read(record.pid).ok_or(Unfit::Gone)?;
    if stat.key != leader(record) {
        return Err(Unfit::Stranger);
    }
    if stat.is_zombie() {
        return Err(Unfit::Gone);
    }
    match Mark::read(record.pid) {
        Some(mark) if mark.as_str() == record.mark => {}
        Some(_) => return Err(Unfit::Stranger),
        // Whoever renames itself wipes its environment; the stamp stays.
        None => {
            let stamped = record
                .stamp
                .is_some_and(|stamp| mark::is_stamped(record.pid, stamp));
            if !stamped {
                return Err(Unfit::Unmarked);
            }
        }
    }
    Ok((pidfd, stat))
}

/// Returns where pids mean what they mean here: the boot, `proc_sys_kernel(5)`,
/// and the pid namespace, `namespaces(7)`. Neither changes while we run.
pub(super) fn home() -> &'static str {
    static HOME: OnceLock<String> = OnceLock::new();
    HOME.get_or_init(|| {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        format!("{} {}", boot.trim(), namespace.display())
    })
}

fn age(stat: &ProcessStat) -> Duration {
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let up = u64::try_from(up.tv_sec).unwrap_or(0);
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_secs(up.saturating_sub(stat.key.start_time / ticks))
}

/// Returns a text that changes with what a worker of this model is started from:
/// `files`, which tells its command and weight files apart, and what templates
/// come to.
#[must_use]
pub fn origin(spec: &ModelSpec, files: &str) -> String {
    command::origin(spec, files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LastUse, Upstream, WorkerId};
    use crate::procfs::mark::VARIABLE;

    const MARK: &str = "a-state 1 2 m#3";

    fn spec(command: &str) -> Arc<ModelSpec> {
        let name = ModelName::new("m").expect("a good name");
        Arc::new(ModelSpec::plain(name, vec![command.into()]))
    }

    fn record(pid: i32) -> WorkerRecord {
        let stat = ProcessStat::read(pid).expect("it runs");
        WorkerRecord {
            worker: WorkerId {
                model: ModelName::new("m").expect("a good name"),
                generation: 3,
            },
            pid,
            start_time: stat.key.start_time,
            home: home().to_owned(),
            mark: MARK.into(),
            stamp: None,
            origin: origin(&spec("sleep"), ""),
            upstream: Upstream::Unix("/nowhere".into()),
            grpc_upstream: None,
            port: None,
            grpc_port: None,
            socket: None,
            notify: None,
            report: "/nowhere".into(),
            log_from: 0,
            gpus: Vec::new(),
            ready: true,
            parked: false,
            last_use: LastUse::default(),
            peak: BTreeMap::new(),
        }
    }

    /// What becomes of a record: taken back, ended, or left alone.
    fn fate(record: &WorkerRecord, models: &[Arc<ModelSpec>]) -> &'static str {
        let inspected = inspect(std::slice::from_ref(record), models, |spec| {
            origin(spec, "")
        });
        match (inspected.adoptees.len(), inspected.doomed.len()) {
            (1, 0) => "taken back",
            (0, 1) => "ended",
            (0, 0) => "left alone",
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_the_very_same_worker_is_taken_back_and_no_stranger_is_ended() {
        let sleep = |mark: Option<&str>| {
            let mut command = std::process::Command::new("sleep");
            command.arg("60").env_remove(VARIABLE);
            command.envs(mark.map(|mark| (VARIABLE, mark)));
            command.spawn().expect("sleep can be spawned")
        };
        let mut children = [sleep(Some(MARK)), sleep(Some("other 1 2 m#3")), sleep(None)];
        // In the middle of an exec the environment is not there yet.
        while children[..2].iter().any(|child| {
            let pid = i32::try_from(child.id()).expect("a pid fits");
            Mark::read(pid).is_none()
        }) {
            std::thread::yield_now();
        }
        let records: Vec<_> = children
            .iter()
            .map(|child| record(i32::try_from(child.id()).expect("a pid fits")))
            .collect();
        let same = [spec("sleep")];
        let ours = &records[0];
        let mut fates = vec![
            fate(ours, &same),
            fate(ours, &[spec("other")]),
            fate(ours, &[]),
        ];
        let reused = WorkerRecord {
            start_time: ours.start_time + 1,
            ..ours.clone()
        };
        let before = WorkerRecord {
            home: "another boot".into(),
            ..ours.clone()
        };
        let parked = WorkerRecord {
            parked: true,
            ..ours.clone()
        };
        let others = [&parked, &reused, &before, &records[1], &records[2]];
        fates.extend(others.map(|record| fate(record, &same)));
        for child in &mut children {
            child.kill().expect("it runs");
            child.wait().expect("it is our child");
        }
        fates.push(fate(ours, &same));
        let told = [
            "taken back",
            "ended",
            "ended",
            "ended",
            "left alone",
            "left alone",
            "left alone",
            "ended",
            "left alone",
        ];
        assert_eq!(fates, told);
    }
}
