//! What can be seen of requests from outside: their names, the access log, the
//! metrics.

mod calls;
mod counts;
mod lines;
mod names;
mod spans;

use std::path::Path;

use serde_json::Value;

use crate::support::{Residentd, wait_until};

/// Has the access log written.
const LOG: [(&str, &str); 1] = [("RESIDENTD_ACCESS_LOG", "true")];

/// Waits for so many lines of the access log.
fn lines(residentd: &Residentd, count: usize) -> Vec<Value> {
    wait_until(&format!("{count} lines in the access log"), || {
        let lines = read(&residentd.folder());
        assert!(lines.len() <= count, "{lines:?}");
        (lines.len() == count).then_some(lines)
    })
}

fn read(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("state/access.jsonl"));
    let text = text.expect("the log is there");
    // The last one may be on its way.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let line = |line: &str| serde_json::from_str(line).expect("a line of JSON");
    whole.lines().map(line).collect()
}

/// Returns the value of a series of the metrics, written as on the page.
fn series(residentd: &Residentd, id: &str) -> Option<f64> {
    let page = residentd.ask("GET", "/metrics", None).text();
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(id)?.strip_prefix(' '));
    line.map(|value| value.parse().expect("a number"))
}

/// Waits until a series has this value.
fn wait_for(residentd: &Residentd, id: &str, value: f64) {
    wait_until(&format!("{id} {value}"), || {
        (series(residentd, id) == Some(value)).then_some(())
    });
}
