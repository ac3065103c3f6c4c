//! The access log: a line of JSON for each request that named a model, in a
//! file that is bounded. `residentd simulate --log` reads it.
//!
//! Lines are written by a thread of their own: a slow disk loses lines and
//! delays no request.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde::Serialize;
use tracing::warn;

/// Lines that wait for the disk at most; one more is dropped.
const QUEUE: usize = 4096;
/// How long an end waits for the disk.
const FLUSH: Duration = Duration::from_secs(2);

/// One request, as it is written down.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Line {
    /// When it came, in Unix seconds.
    pub(super) time: f64,
    /// For which model, by its own name.
    pub(super) model: String,
    /// Which life of the model answered; none when no worker did.
    pub(super) generation: Option<u64>,
    /// What it is called in its answer.
    pub(super) request_id: Option<String>,
    /// The trace that it belongs to.
    pub(super) trace_id: Option<String>,
    /// The status of the answer.
    pub(super) status: u16,
    /// The status of a call of gRPC.
    pub(super) grpc_status: Option<u16>,
    /// Why it was refused.
    pub(super) code: Option<&'static str>,
    /// From its arrival to its lease, in seconds.
    pub(super) wait_s: f64,
    /// How much of that it waited for the lease, if it asked for one.
    pub(super) queue_s: Option<f64>,
    /// The same, if its model was loaded meanwhile.
    pub(super) cold_s: Option<f64>,
    /// From its arrival to the first byte of the answer.
    pub(super) first_byte_s: Option<f64>,
    /// How long it was inside the worker, in seconds.
    pub(super) duration_s: f64,
    /// Bytes of its body.
    pub(super) request_bytes: u64,
    /// Bytes of the answer's body.
    pub(super) bytes: u64,
    /// The answer was a stream of events.
    pub(super) stream: bool,
    /// `whole`, `left` (the client), `broke` (the worker), `late` (cut by
    /// `request_timeout`), `refused`.
    pub(super) end: &'static str,
}

enum Message {
    Line(Box<Line>),
    /// Tells when all that was sent before is in the file.
    Flush(mpsc::Sender<()>),
}

/// Writes the access log. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AccessLog {
    sender: mpsc::SyncSender<Message>,
}

impl AccessLog {
    /// Opens a log that is moved to `PATH.1` when it is `most` bytes long, over
    /// the one that was there.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path, most: u64) -> io::Result<Self> {
        let mut file = Rotated::open(path, most)?;
        let (sender, messages) = mpsc::sync_channel(QUEUE);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_all(&mut file, &messages))?;
        Ok(Self { sender })
    }

    pub(super) fn write(&self, line: Line) {
        if self.sender.try_send(Message::Line(Box::new(line))).is_err() {
            warn!("the access log does not keep up; a line is dropped");
        }
    }

    /// Waits until everything is written, or a moment has passed. Blocks.
    pub fn flush(&self) {
        let (written, wait) = mpsc::channel();
        if self.sender.send(Message::Flush(written)).is_err() || wait.recv_timeout(FLUSH).is_err() {
            warn!("the access log was not written in time");
        }
    }
}

/// Ends when the last [`AccessLog`] is gone.
fn write_all(file: &mut Rotated, messages: &mpsc::Receiver<Message>) {
    while let Ok(first) = messages.recv() {
        for message in std::iter::once(first).chain(messages.try_iter()) {
            let done = match message {
                Message::Line(line) => file.write(&line),
                Message::Flush(written) => {
                    let done = file.out.flush();
                    // Whoever waited has waited long enough.
                    let _ = written.send(());
                    done
                }
            };
            if let Err(error) = done {
                warn!(%error, path = %file.path.display(), "writing the access log failed");
            }
        }
        if let Err(error) = file.out.flush() {
            warn!(%error, path = %file.path.display(), "writing the access log failed");
        }
    }
}

/// A file that is moved aside when it is full.
struct Rotated {
    path: PathBuf,
    most: u64,
    length: u64,
    out: BufWriter<File>,
}

impl Rotated {
    fn open(path: &Path, most: u64) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        Ok(Self {
            path: path.to_owned(),
            most,
            length: file.metadata()?.len(),
            out: BufWriter::new(file),
        })
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
        if self.length > 0 && self.length.saturating_add(length) > self.most {
            self.out.flush()?;
            let mut aside = self.path.clone().into_os_string();
            aside.push(".1");
            std::fs::rename(&self.path, aside)?;
            *self = Self::open(&self.path, self.most)?;
        }
        self.length += length;
        self.out.write_all(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(model: &str) -> Line {
        Line {
            time: 1_700_000_000.25,
            model: model.to_owned(),
            generation: Some(2),
            request_id: Some("1f".to_owned()),
            trace_id: None,
            status: 200,
            grpc_status: None,
            code: None,
            wait_s: 0.5,
            queue_s: Some(0.5),
            cold_s: None,
            first_byte_s: Some(0.75),
            duration_s: 1.5,
            request_bytes: 21,
            bytes: 42,
            stream: true,
            end: "whole",
        }
    }

    #[test]
    fn a_full_log_is_moved_aside_once_so_that_two_files_are_the_most() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("access.jsonl");
        let one = serde_json::to_vec(&line("m0")).expect("JSON").len() + 1;
        let two = u64::try_from(2 * one).expect("it fits");
        let log = AccessLog::open(&path, two).expect("it opens");
        for nth in 0..7 {
            log.write(line(&format!("m{nth}")));
        }
        log.flush();
        let read = |path: &Path| std::fs::read_to_string(path).expect("it is there");
        let (now, before) = (read(&path), read(&folder.path().join("access.jsonl.1")));
        assert_eq!(now.lines().count(), 1, "{now}");
        assert_eq!(before.lines().count(), 2, "{before}");
        assert!(now.contains("\"m6\"") && before.contains("\"m4\""));
        let names = std::fs::read_dir(folder.path()).expect("readable").count();
        assert_eq!(names, 2);
    }

    #[test]
    fn a_log_that_was_there_is_gone_on_with() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("access.jsonl");
        for model in ["a", "b"] {
            let log = AccessLog::open(&path, 1 << 20).expect("it opens");
            log.write(line(model));
            log.flush();
        }
        let text = std::fs::read_to_string(&path).expect("it is there");
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
