//! `ready = { … }`: how a worker shows that it can answer.

use regex::Regex;

use super::problem::{Complaint, Problems};
use super::section::{Section, Setting};
use super::value::Value;
use crate::model::ReadyCheck;

/// Reads the table; exactly one of `http`, `tcp`, `log` and `notify` must be there.
pub(super) fn read(
    mut section: Section<'_>,
    problems: &mut Problems,
) -> Option<Setting<ReadyCheck>> {
    let place = section.place.clone();
    let http = section.get("http", probe_path, problems);
    let status = section.get("status", probe_status, problems);
    let tcp = section.get("tcp", only_true, problems);
    let log = section.get("log", pattern, problems);
    let notify = section.get("notify", only_true, problems);
    section.finish(&[], problems);
    if problems.mentions(&place.key) {
        return None;
    }
    if let (Some(status), None) = (&status, &http) {
        problems.error(
            &status.place,
            "has no meaning without http",
            r#"write ready = { http = "/health", status = 200 }"#,
        );
        return None;
    }
    let value = match (http, tcp, log, notify) {
        (Some(path), None, None, None) => ReadyCheck::Http {
            path: path.value,
            status: status.map(|status| status.value),
        },
        (None, Some(_), None, None) => ReadyCheck::Tcp,
        (None, None, Some(pattern), None) => ReadyCheck::Log(pattern.value),
        (None, None, None, Some(_)) => ReadyCheck::Notify,
        _ => {
            problems.error(
                &place,
                "needs exactly one of http, tcp, log and notify",
                r#"write { http = "/health" }, { tcp = true }, { log = "regex" } or { notify = true }"#,
            );
            return None;
        }
    };
    Some(Setting { value, place })
}

fn probe_path(value: &Value<'_>) -> Result<String, Complaint> {
    let path = value.text()?;
    let good = path.starts_with('/') && path.chars().all(|c| c.is_ascii_graphic());
    if !good {
        return Err(value.is_not("a path to ask for", r#"write one such as "/health""#));
    }
    Ok(path)
}

fn probe_status(value: &Value<'_>) -> Result<u16, Complaint> {
    let status = value.count().ok().and_then(|n| u16::try_from(n).ok());
    match status {
        Some(status) if (200..=599).contains(&status) => Ok(status),
        _ => Err(value.is_not("a status", "write a number from 200 to 599")),
    }
}

fn only_true(value: &Value<'_>) -> Result<(), Complaint> {
    match value.flag()? {
        true => Ok(()),
        false => Err(Complaint::new("is false", "write true, or remove it")),
    }
}

fn pattern(value: &Value<'_>) -> Result<Regex, Complaint> {
    let text = value.filled_text()?;
    Regex::new(&text).map_err(|error| {
        // The library draws a picture over several lines; its last line says
        // what is wrong.
        let drawn = error.to_string();
        let why = drawn.lines().last().unwrap_or_default();
        let why = why.trim().trim_start_matches("error: ");
        value.is_not("a regular expression", format!("mend it: {why}"))
    })
}
