//! How a live worker is written down.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::{Bytes, Domain, LastUse, ModelName, WorkerId, WorkerRecord};

/// A [`WorkerRecord`] as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    model: String,
    generation: u64,
    pid: i32,
    start_time: u64,
    home: String,
    mark: String,
    stamp: Option<u64>,
    origin: String,
    upstream: String,
    port: Option<u16>,
    /// Not written before there were addresses for gRPC.
    #[serde(default)]
    grpc_upstream: Option<String>,
    #[serde(default)]
    grpc_port: Option<u16>,
    socket: Option<PathBuf>,
    /// Not written before workers could say that they are ready.
    #[serde(default)]
    notify: Option<PathBuf>,
    report: PathBuf,
    log_from: u64,
    gpus: Vec<String>,
    ready: bool,
    /// Not written before there were parks.
    #[serde(default)]
    parked: bool,
    /// Not written before the order of eviction outlived residentd.
    #[serde(default)]
    idle_since: Option<u64>,
    #[serde(default)]
    used: bool,
    peak: BTreeMap<String, u64>,
}

/// Why a text is no record of a worker.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("it is not what this version writes")]
    Json(#[from] serde_json::Error),
    #[error("{0:?} has no meaning")]
    Word(String),
}

/// Returns the text that is kept.
pub(super) fn write(record: &WorkerRecord) -> String {
    let peak = record.peak.iter();
    let written = Written {
        model: record.worker.model.to_string(),
        generation: record.worker.generation,
        pid: record.pid,
        start_time: record.start_time,
        home: record.home.clone(),
        mark: record.mark.clone(),
        stamp: record.stamp,
        origin: record.origin.clone(),
        upstream: record.upstream.to_string(),
        port: record.port,
        grpc_upstream: record.grpc_upstream.as_ref().map(ToString::to_string),
        grpc_port: record.grpc_port,
        socket: record.socket.clone(),
        notify: record.notify.clone(),
        report: record.report.clone(),
        log_from: record.log_from,
        gpus: record.gpus.clone(),
        ready: record.ready,
        parked: record.parked,
        idle_since: record.last_use.idle_since,
        used: record.last_use.used,
        peak: peak
            .map(|(domain, bytes)| (domain.to_string(), bytes.get()))
            .collect(),
    };
    // Only a path that is not UTF-8 cannot be written; its worker is then not
    // taken back.
    serde_json::to_string(&written).unwrap_or_default()
}

/// Reads what [`write()`] wrote.
pub(super) fn read(text: &str) -> Result<WorkerRecord, Unreadable> {
    let written: Written = serde_json::from_str(text)?;
    let word = |text: &str| Unreadable::Word(text.to_owned());
    let model = ModelName::new(&written.model).map_err(|_| word(&written.model))?;
    let upstream = |text: &str| text.parse().map_err(|_| word(text));
    let grpc_upstream = written.grpc_upstream.as_deref();
    let peak = written.peak.iter().map(|(domain, bytes)| {
        let domain: Domain = domain.parse().map_err(|_| word(domain))?;
        Ok((domain, Bytes(*bytes)))
    });
    Ok(WorkerRecord {
        worker: WorkerId {
            model,
            generation: written.generation,
        },
        pid: written.pid,
        start_time: written.start_time,
        home: written.home,
        mark: written.mark,
        stamp: written.stamp,
        origin: written.origin,
        upstream: upstream(&written.upstream)?,
        grpc_upstream: grpc_upstream.map(upstream).transpose()?,
        port: written.port,
        grpc_port: written.grpc_port,
        socket: written.socket,
        notify: written.notify,
        report: written.report,
        log_from: written.log_from,
        gpus: written.gpus,
        ready: written.ready,
        parked: written.parked,
        last_use: LastUse {
            idle_since: written.idle_since,
            used: written.used,
        },
        peak: peak.collect::<Result<_, Unreadable>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Upstream;

    #[test]
    fn what_is_written_is_read_again() {
        let record = WorkerRecord {
            worker: WorkerId {
                model: ModelName::new("a/b:c").expect("a good name"),
                generation: 7,
            },
            pid: 4711,
            start_time: 99,
            home: "boot 4026531836".into(),
            mark: "state 1 2 a/b:c#7".into(),
            stamp: Some(819_199),
            origin: "0123".into(),
            upstream: Upstream::Tcp(([127, 0, 0, 1], 20_000).into()),
            grpc_upstream: Some(Upstream::Tcp(([127, 0, 0, 1], 20_001).into())),
            port: Some(20_000),
            grpc_port: Some(20_001),
            socket: None,
            notify: None,
            report: "/state/reports/1-2".into(),
            log_from: 12,
            gpus: vec!["GPU-a".into()],
            ready: true,
            parked: true,
            last_use: LastUse {
                idle_since: Some(5_000_000),
                used: true,
            },
            peak: [(Domain::Host, Bytes(5)), (Domain::Gpu(1), Bytes(6))].into(),
        };
        assert_eq!(read(&write(&record)).expect("it is readable"), record);
        let unix = WorkerRecord {
            upstream: Upstream::Unix("/s/x.sock".into()),
            socket: Some("/s/x.sock".into()),
            notify: Some("/s/y.sock".into()),
            ..record
        };
        assert_eq!(read(&write(&unix)).expect("it is readable"), unix);
        let older = write(&unix)
            .replace(",\"parked\":true", "")
            .replace(",\"idle_since\":5000000,\"used\":true", "")
            .replace(",\"notify\":\"/s/y.sock\"", "");
        let older = read(&older).expect("it is readable");
        assert_eq!((older.parked, older.notify), (false, None));
        assert_eq!(older.last_use, LastUse::default());
        for bad in ["", "{}", "[1]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
