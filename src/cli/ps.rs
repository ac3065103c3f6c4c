//! `ps`: a table of all models, with what their workers really use.

use std::collections::BTreeMap;

use hyper::Method;
use serde::Deserialize;

use super::args::ClientArgs;
use super::client::Client;
use super::output;
use crate::clock::Clock;
use crate::model::Bytes;

/// Prints the table and the totals below it.
pub(super) async fn ps(args: ClientArgs) -> anyhow::Result<()> {
    let client = Client::new(&args)?;
    let path = "/api/v1/models";
    let models = client.call(Method::GET, path, String::new()).await?;
    if args.json {
        output::write_text(&models.body)?;
        return Ok(());
    }
    let path = "/api/v1/memory/stats";
    let stats = client.call(Method::GET, path, String::new()).await?;
    let models: Models = models.data()?;
    let clock = Clock::start();
    let now = clock.unix(clock.now());
    let totals: Totals = stats.data()?;
    output::write_text(&page(&models.models, &totals, now))?;
    Ok(())
}

#[derive(Debug, Deserialize)]
struct Models {
    models: Vec<Model>,
}

#[derive(Debug, Deserialize)]
struct Model {
    name: String,
    phase: String,
    pid: Option<i32>,
    pinned: bool,
    in_flight: u32,
    queued: u64,
    memory: Option<Memory>,
    vram: Vec<Vram>,
    expected: ExpectedNeed,
    last_used: f64,
    last_error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Memory {
    rss: u64,
    anon: u64,
    file: u64,
}

#[derive(Debug, Deserialize)]
struct Vram {
    bytes: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct ExpectedNeed {
    bytes: BTreeMap<String, u64>,
}

#[derive(Debug, Deserialize)]
struct Totals {
    total_memory_usage: u64,
    memory_limit: u64,
    usage_ratio: f64,
    headroom: u64,
    pressure_level: String,
}

/// Returns the whole page. `now` is Unix seconds.
fn page(models: &[Model], totals: &Totals, now: f64) -> String {
    let with_vram = models.iter().any(|model| !model.vram.is_empty());
    let mut header: Vec<String> = [
        "MODEL",
        "PHASE",
        "PID",
        "RSS",
        "ANON",
        "FILE",
        "EXPECTED",
        "IN-FLIGHT",
        "QUEUED",
        "LAST-USED",
    ]
    .map(str::to_owned)
    .into();
    if with_vram {
        header.insert(VRAM_COLUMN, "VRAM".to_owned());
    }
    let mut rows = vec![header];
    rows.extend(models.iter().map(|model| {
        let mut row = model.row(now);
        if with_vram {
            row.insert(VRAM_COLUMN, model.vram());
        }
        row
    }));
    let mut lines = vec![output::table(&rows, WORDS), totals.line()];
    let failing = models.iter().filter(|model| model.is_failing());
    lines.extend(failing.filter_map(|model| {
        let error = model.last_error.as_deref()?;
        Some(format!("{} failed: {error}", model.name))
    }));
    lines.join("\n")
}

/// VRAM stands behind the parts of host RAM.
const VRAM_COLUMN: usize = 6;
/// MODEL and PHASE are words; all that follow are numbers.
const WORDS: usize = 2;

impl Model {
    fn row(&self, now: f64) -> Vec<String> {
        let part = |of: fn(&Memory) -> u64| {
            let memory = self.memory.as_ref();
            memory.map_or_else(dash, |memory| Bytes(of(memory)).to_string())
        };
        let phase = if self.pinned {
            format!("{} (pinned)", self.phase)
        } else {
            self.phase.clone()
        };
        let expected = self.expected.bytes.get("host");
        vec![
            self.name.clone(),
            phase,
            self.pid.map_or_else(dash, |pid| pid.to_string()),
            part(|memory| memory.rss),
            part(|memory| memory.anon),
            part(|memory| memory.file),
            expected.map_or_else(|| "?".to_owned(), |need| Bytes(*need).to_string()),
            self.in_flight.to_string(),
            self.queued.to_string(),
            self.last_used(now),
        ]
    }

    /// Returns the sum over the devices; unknown when one of them is.
    fn vram(&self) -> String {
        if self.vram.is_empty() {
            return dash();
        }
        let known: Option<Bytes> = self.vram.iter().map(|vram| vram.bytes.map(Bytes)).sum();
        known.map_or_else(|| "?".to_owned(), |sum| sum.to_string())
    }

    fn last_used(&self, now: f64) -> String {
        if self.in_flight > 0 {
            "now".to_owned()
        } else if self.last_used <= 0.0 {
            "never".to_owned()
        } else {
            ago(now - self.last_used)
        }
    }

    fn is_failing(&self) -> bool {
        self.phase == "backoff" || self.phase == "failed"
    }
}

impl Totals {
    fn line(&self) -> String {
        format!(
            "usage {} of {} ({:.0} %), headroom {}, pressure {}",
            Bytes(self.total_memory_usage),
            Bytes(self.memory_limit),
            self.usage_ratio * 100.0,
            Bytes(self.headroom),
            self.pressure_level,
        )
    }
}

fn dash() -> String {
    "-".to_owned()
}

/// Returns seconds as `12s ago`, `3m ago`, `2h ago` or `5d ago`.
fn ago(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    let (count, unit) = if seconds < 60.0 {
        (seconds, 's')
    } else if seconds < 3600.0 {
        (seconds / 60.0, 'm')
    } else if seconds < 86400.0 {
        (seconds / 3600.0, 'h')
    } else {
        (seconds / 86400.0, 'd')
    };
    format!("{:.0}{unit} ago", count.floor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str) -> Model {
        Model {
            name: name.to_owned(),
            phase: "stopped".to_owned(),
            pid: None,
            pinned: false,
            in_flight: 0,
            queued: 0,
            memory: None,
            vram: Vec::new(),
            expected: ExpectedNeed {
                bytes: BTreeMap::new(),
            },
            last_used: 0.0,
            last_error: None,
        }
    }

    fn ready() -> Model {
        Model {
            phase: "ready".to_owned(),
            pid: Some(4242),
            pinned: true,
            memory: Some(Memory {
                rss: 1_610_612_736,
                anon: 1_073_741_824,
                file: 536_870_912,
            }),
            expected: ExpectedNeed {
                bytes: BTreeMap::from([("host".to_owned(), 2_147_483_648)]),
            },
            last_used: 940.0,
            ..model("gemma")
        }
    }

    fn totals() -> Totals {
        Totals {
            total_memory_usage: 1_610_612_736,
            memory_limit: 2_147_483_648,
            usage_ratio: 0.75,
            headroom: 5_368_709_120,
            pressure_level: "none".to_owned(),
        }
    }

    #[test]
    fn the_page_is_an_aligned_table_with_totals_and_failures() {
        let busy = Model {
            phase: "ready".to_owned(),
            in_flight: 2,
            queued: 11,
            ..model("org/nano:e5")
        };
        let broken = Model {
            phase: "backoff".to_owned(),
            last_error: Some("exit code 1".to_owned()),
            ..model("broken")
        };
        let expected = "\
MODEL        PHASE            PID       RSS      ANON        FILE  EXPECTED  IN-FLIGHT  QUEUED  LAST-USED
gemma        ready (pinned)  4242  1.50 GiB  1.00 GiB  512.00 MiB  2.00 GiB          0       0     1m ago
org/nano:e5  ready              -         -         -           -         ?          2      11        now
broken       backoff            -         -         -           -         ?          0       0      never

usage 1.50 GiB of 2.00 GiB (75 %), headroom 5.00 GiB, pressure none
broken failed: exit code 1";
        assert_eq!(page(&[ready(), busy, broken], &totals(), 1000.0), expected);
    }

    #[test]
    fn vram_has_a_column_where_there_is_a_gpu_and_unknown_is_not_zero() {
        let vram = |bytes: &[Option<u64>]| Model {
            vram: bytes.iter().map(|&bytes| Vram { bytes }).collect(),
            ..model("m")
        };
        let known = vram(&[Some(1 << 30), Some(1 << 30)]);
        let unknown = vram(&[Some(1 << 30), None]);
        let page = page(&[known, unknown, model("m")], &totals(), 0.0);
        let end = page.find("VRAM").expect("a column") + "VRAM".len();
        let cell = |line: &str| line[..end].rsplit("  ").next().map(str::to_owned);
        let column: Vec<_> = page.lines().take(4).filter_map(cell).collect();
        assert_eq!(column, ["VRAM", "2.00 GiB", "?", "-"], "{page}");
    }

    #[test]
    fn times_are_told_in_the_largest_unit_that_fits() {
        for (seconds, text) in [
            (-3.0, "0s ago"),
            (59.9, "59s ago"),
            (60.0, "1m ago"),
            (7200.0, "2h ago"),
            (200_000.0, "2d ago"),
        ] {
            assert_eq!(ago(seconds), text);
        }
    }
}
