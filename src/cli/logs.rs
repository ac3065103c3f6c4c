//! `logs`: what a worker printed, and with `-f` what it goes on to print. The
//! server numbers the lines and streams them; here they are only passed on.

use super::args::LogsArgs;
use super::client::Client;
use super::models::model_path;
use super::output;

/// Prints the last lines, and follows until the server ends.
pub(super) async fn logs(args: LogsArgs) -> anyhow::Result<()> {
    let model = model_path(&args.model.model);
    let path = format!("{model}/logs?lines={}&follow={}", args.lines, args.follow);
    let client = Client::new(&args.model.client)?;
    let accept = if args.model.client.json {
        "application/json"
    } else {
        "text/plain"
    };
    let mut body = client.open(&path, accept).await?;
    let mut ended = true;
    while let Some(bytes) = client.next(&mut body).await? {
        output::write(&bytes)?;
        ended = bytes.ends_with(b"\n");
    }
    if !ended {
        output::write(b"\n")?;
    }
    Ok(())
}
