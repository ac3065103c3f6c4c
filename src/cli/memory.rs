//! `cleanup` and `limit`.

use hyper::Method;
use serde::{Deserialize, Serialize};

use super::args::{CleanupArgs, LimitArgs};
use super::client::{Answer, CallError, Client};
use super::show;
use crate::model::Bytes;

/// Unloads idle models and tells what came back.
pub(super) async fn cleanup(args: CleanupArgs) -> anyhow::Result<()> {
    let names: Vec<_> = args.models.iter().map(|name| name.as_str()).collect();
    let wish = CleanupBody {
        target_bytes: args.target.map(Bytes::get),
        models: (!names.is_empty()).then_some(names),
        all: args.all,
        force: args.force,
        dry_run: args.dry_run,
    };
    let body = serde_json::to_string(&wish)?;
    let client = Client::new(&args.client)?;
    let path = "/api/v1/memory/cleanup";
    let answer = client.call(Method::POST, path, body).await?;
    show(&answer, args.client.json, cleaned)
}

#[derive(Serialize)]
struct CleanupBody<'a> {
    target_bytes: Option<u64>,
    models: Option<Vec<&'a str>>,
    all: bool,
    force: bool,
    dry_run: bool,
}

#[derive(Deserialize)]
struct Cleaned {
    message: String,
    skipped: Vec<SkippedModel>,
    shortfall_bytes: u64,
}

#[derive(Deserialize)]
struct SkippedModel {
    name: String,
    why: String,
}

fn cleaned(answer: &Answer) -> Result<String, CallError> {
    answer.data().map(|data: Cleaned| data.text())
}

impl Cleaned {
    fn text(&self) -> String {
        let skipped = self.skipped.iter();
        let mut lines = vec![self.message.clone()];
        lines.extend(skipped.map(|model| format!("{} stays: {}", model.name, model.why)));
        if self.shortfall_bytes > 0 {
            lines.push(format!("{} are missing", Bytes(self.shortfall_bytes)));
        }
        lines.join("\n")
    }
}

/// Sets or shows the limit.
pub(super) async fn limit(args: LimitArgs) -> anyhow::Result<()> {
    let path = limit_path(&args);
    let client = Client::new(&args.client)?;
    let answer = client.call(Method::POST, &path, String::new()).await?;
    show(&answer, args.client.json, limited)
}

fn limit_path(args: &LimitArgs) -> String {
    let mut params = Vec::new();
    if let Some(size) = args.size {
        // A power of two divides without a rest, and `{}` writes every digit.
        let gb = size.as_f64() / Bytes::gib(1).as_f64();
        params.push(format!("limit_gb={gb}"));
    }
    if let Some(device) = &args.device {
        let encoded =
            percent_encoding::utf8_percent_encode(device, percent_encoding::NON_ALPHANUMERIC);
        params.push(format!("device={encoded}"));
    }
    if args.persist {
        params.push("persist=true".to_owned());
    }
    let query = params.join("&");
    let mark = if query.is_empty() { "" } else { "?" };
    format!("/api/v1/memory/limit{mark}{query}")
}

fn limited(answer: &Answer) -> Result<String, CallError> {
    #[derive(Deserialize)]
    struct Data {
        current_usage: u64,
        memory_limit: u64,
    }
    let data: Data = answer.data()?;
    let (limit, usage) = (Bytes(data.memory_limit), Bytes(data.current_usage));
    Ok(format!("limit {limit}; usage {usage}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::access::AccessArgs;
    use crate::cli::args::ClientArgs;
    use crate::cli::client::Server;

    fn args(size: Option<Bytes>, device: Option<&str>, persist: bool) -> LimitArgs {
        LimitArgs {
            size,
            device: device.map(str::to_owned),
            persist,
            client: ClientArgs {
                server: Server::Tcp("127.0.0.1:1".to_owned()),
                access: AccessArgs::default(),
                json: false,
            },
        }
    }

    #[test]
    fn a_limit_is_sent_to_the_byte() {
        let path = |size, device, persist| limit_path(&args(size, device, persist));
        assert_eq!(path(None, None, false), "/api/v1/memory/limit");
        assert_eq!(
            path(Some(Bytes::mib(1536)), Some("gpu:0"), true),
            "/api/v1/memory/limit?limit_gb=1.5&device=gpu%3A0&persist=true"
        );
        let odd = Bytes(8_589_934_593);
        let sent = path(Some(odd), None, false);
        let (_, gb) = sent.split_once('=').expect("a value");
        let gb: f64 = gb.parse().expect("a number");
        assert!((gb * Bytes::gib(1).as_f64() - odd.as_f64()).abs() < f64::EPSILON);
    }

    #[test]
    fn a_cleanup_tells_what_stays_and_what_is_missing() {
        let cleaned = Cleaned {
            message: "nothing to unload".to_owned(),
            skipped: vec![SkippedModel {
                name: "gemma".to_owned(),
                why: "busy".to_owned(),
            }],
            shortfall_bytes: 1 << 30,
        };
        assert_eq!(
            cleaned.text(),
            "nothing to unload\ngemma stays: busy\n1.00 GiB are missing"
        );
    }
}
