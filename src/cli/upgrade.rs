//! `upgrade`: has the program file that lies there now take over.

use hyper::Method;
use serde::Deserialize;

use super::args::ClientArgs;
use super::client::{Answer, CallError, Client};
use super::show;

/// Upgrades, and says who has taken over.
pub(super) async fn upgrade(args: ClientArgs) -> anyhow::Result<()> {
    let client = Client::new(&args)?;
    let path = "/api/v1/upgrade";
    let answer = client.call(Method::POST, path, String::new()).await?;
    show(&answer, args.json, words)
}

#[derive(Deserialize)]
struct Data {
    message: String,
    pid: i32,
    workers: usize,
}

fn words(answer: &Answer) -> Result<String, CallError> {
    let Data {
        message,
        pid,
        workers,
    } = answer.data()?;
    let of = if workers == 1 { "worker" } else { "workers" };
    Ok(format!(
        "{message}: pid {pid}, with {workers} {of} that answer"
    ))
}
