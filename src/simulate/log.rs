//! residentd's own access log as a trace.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::input::InputError;
use super::workload::Demand;
use crate::clock::Timestamp;
use crate::model::ModelName;

/// What is read of a line; it has more.
#[derive(Deserialize)]
struct Line {
    time: f64,
    model: String,
    duration_s: f64,
}

/// Reads access logs, each a line of JSON a request. Time begins with the
/// earliest request. A last line that was not written whole is left out.
///
/// # Errors
/// What is wrong with a file, and where.
pub fn read<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Vec<Demand>, InputError> {
    let mut found = Vec::new();
    for path in paths {
        read_one(path, &mut found)?;
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    let begin = found.first().map_or(0.0, |first| first.0);
    let demands = found.into_iter().map(|(time, model, duration)| Demand {
        // Both are seconds that were checked.
        at: Timestamp::from_start(Duration::from_secs_f64((time - begin).clamp(0.0, LONGEST))),
        model,
        duration,
    });
    Ok(demands.collect())
}

/// In seconds; no log is longer.
const LONGEST: f64 = 1e10;

fn read_one(path: &Path, found: &mut Vec<(f64, ModelName, Duration)>) -> Result<(), InputError> {
    let open = |source| InputError::Open {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(open)?;
    let before = found.len();
    let mut unread: Option<InputError> = None;
    for (index, line) in (1..).zip(BufReader::new(file).lines()) {
        let line = line.map_err(open)?;
        if let Some(error) = unread.take() {
            return Err(error);
        }
        match parse(&line) {
            Some(demand) => found.push(demand),
            None => {
                unread = Some(InputError::Line {
                    path: path.to_owned(),
                    line: index,
                    text: line.chars().take(80).collect(),
                });
            }
        }
    }
    if found.len() == before {
        return Err(unread.unwrap_or_else(|| InputError::NoRequests {
            path: path.to_owned(),
        }));
    }
    Ok(())
}

fn parse(line: &str) -> Option<(f64, ModelName, Duration)> {
    let line: Line = serde_json::from_str(line).ok()?;
    let model = ModelName::new(&line.model).ok()?;
    let duration = Duration::try_from_secs_f64(line.duration_s).ok()?;
    line.time
        .is_finite()
        .then_some((line.time, model, duration))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> Result<Vec<Demand>, InputError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("access.jsonl");
        std::fs::write(&path, text).expect("it can be written");
        read([path.as_path()])
    }

    const LINE: &str = r#"{"time":1700000002.5,"model":"a","status":200,"duration_s":1.5}"#;

    #[test]
    fn time_begins_with_the_earliest_request() {
        let earlier = LINE.replace("02.5", "00.5").replace("\"a\"", "\"b\"");
        let all = written(&format!("{LINE}\n{earlier}\n")).expect("a good log");
        let times: Vec<_> = all.iter().map(|d| (d.model.as_str(), d.at)).collect();
        let at = Timestamp::from_millis;
        assert_eq!(times, [("b", at(0)), ("a", at(2000))]);
        assert_eq!(all[1].duration, Duration::from_millis(1500));
    }

    #[test]
    fn a_torn_last_line_is_left_out_and_any_other_is_told() {
        assert_eq!(written(&format!("{LINE}\n{{\"ti")).expect("read").len(), 1);
        let error = written(&format!("{{\"ti\n{LINE}\n")).expect_err("a bad line");
        assert!(error.to_string().contains("access.jsonl:1: "), "{error}");
        let error = written("").expect_err("nothing");
        assert!(error.to_string().contains("server.access_log"), "{error}");
    }
}
