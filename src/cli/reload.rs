//! `reload`: has the configuration read anew and says what that changed.

use hyper::Method;
use serde::Deserialize;

use super::args::ReloadArgs;
use super::client::{Answer, CallError, Client, ConfigProblem};
use super::show;

/// Reloads, or says what a reload would change.
pub(super) async fn reload(args: ReloadArgs) -> anyhow::Result<()> {
    let path = match args.dry_run {
        true => "/api/v1/reload?dry_run=true",
        false => "/api/v1/reload",
    };
    let client = Client::new(&args.client)?;
    let answer = client.call(Method::POST, path, String::new()).await?;
    show(&answer, args.client.json, words)
}

#[derive(Deserialize)]
struct Data {
    message: String,
    added: Vec<String>,
    removed: Vec<String>,
    changed: Vec<Changed>,
    settings: Vec<String>,
    needs_restart: Vec<String>,
    warnings: Vec<ConfigProblem>,
}

#[derive(Deserialize)]
struct Changed {
    name: String,
    keys: Vec<String>,
    takes: String,
}

fn words(answer: &Answer) -> Result<String, CallError> {
    let data: Data = answer.data()?;
    let mut lines = vec![data.message];
    let names = [("added", &data.added), ("removed", &data.removed)];
    for (word, names) in names {
        lines.extend(names.iter().map(|name| format!("{word} {name}")));
    }
    for Changed { name, keys, takes } in &data.changed {
        let when = match takes.as_str() {
            "new_worker" => "its worker is replaced",
            "next_worker" => "with its next worker",
            _ => "at once",
        };
        lines.push(format!("changed {name}: {}; {when}", keys.join(", ")));
    }
    let keys = [
        ("changed, at once", &data.settings),
        ("needs a restart of residentd", &data.needs_restart),
    ];
    for (word, keys) in keys.iter().filter(|(_, keys)| !keys.is_empty()) {
        lines.push(format!("{word}: {}", keys.join(", ")));
    }
    lines.extend(data.warnings.into_iter().map(|warning| warning.message));
    Ok(lines.join("\n"))
}
