//! Orders to a worker that already runs, or that somebody else starts: words in
//! a file, laid over the flags for as long as they stand there.

use std::fs;
use std::io::Write;

use crate::args::Args;
use crate::size;

/// What the file of `--orders` says now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Orders {
    /// Crash at the start.
    pub(crate) crash: bool,
    /// Load for ever.
    pub(crate) never_ready: bool,
    /// Hang requests, and answer `/health` and `/stats`.
    pub(crate) hang: bool,
    /// Ignore SIGTERM.
    pub(crate) ignore_term: bool,
    /// Anonymous memory that requests are to have added together.
    pub(crate) grow: u64,
}

impl Orders {
    /// Reads the orders that hold for this process; there are none without a
    /// file.
    pub(crate) fn read(args: &Args) -> Self {
        let file = args.orders.as_ref();
        let text = file.and_then(|path| fs::read_to_string(path).ok());
        Self::parse(&text.unwrap_or_default(), std::process::id())
    }

    /// Reads words such as `pid=71 hang grow=64MiB`. With a pid they hold for
    /// that process only; a word that is not known is nobody's order.
    fn parse(text: &str, pid: u32) -> Self {
        let mut orders = Self::default();
        for word in text.split_whitespace() {
            match word.split_once('=') {
                Some(("pid", whose)) if whose.parse() != Ok(pid) => return Self::default(),
                Some(("grow", bytes)) => orders.grow = size::parse(bytes).unwrap_or(0),
                _ => match word {
                    "crash" => orders.crash = true,
                    "never-ready" => orders.never_ready = true,
                    "hang" => orders.hang = true,
                    "ignore-term" => orders.ignore_term = true,
                    _ => {}
                },
            }
        }
        orders
    }
}

/// Adds a line to the file of `--journal` for a request with this `x_id`, so
/// that whoever sent it can count how often it got to a worker, also to one
/// that died of it.
pub(crate) fn enter(args: &Args, id: Option<u64>) {
    let (Some(path), Some(id)) = (&args.journal, id) else {
        return;
    };
    let mut options = fs::File::options();
    let line = format!("{id} {} {}\n", std::process::id(), args.name);
    let written = options.append(true).create(true).open(path);
    if let Err(error) = written.and_then(|mut file| file.write_all(line.as_bytes())) {
        let _ = writeln!(std::io::stderr(), "stub-worker: journal: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_words_and_those_of_another_process_are_not_obeyed() {
        let orders = Orders::parse("pid=71 hang grow=2MiB\nwhatever", 71);
        let expected = Orders {
            hang: true,
            grow: 2 << 20,
            ..Orders::default()
        };
        assert_eq!(orders, expected);
        assert_eq!(Orders::parse("pid=71 hang crash", 72), Orders::default());
        assert!(Orders::parse("crash", 72).crash);
    }
}
