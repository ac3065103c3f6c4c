//! `simulate` against an independent simulation, and as a user runs it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use residentd::model::{Bytes, EvictionPolicy};
use residentd::simulate::{self, Figures, Memory, Mode, Rules, Workload};
use serde::Deserialize;

/// Largest difference between two simulations' loads, in hundredths.
const TOLERANCE_PERCENT: u64 = 2;

#[derive(Deserialize)]
struct Expected {
    serial: Vec<SerialRow>,
    timed: Vec<TimedRow>,
}

#[derive(Deserialize)]
struct SerialRow {
    limit_gib: u64,
    policy: String,
    loads: u64,
    load_seconds: f64,
    offline_load_seconds: f64,
}

#[derive(Deserialize)]
struct TimedRow {
    limit_gib: u64,
    policy: String,
    patience: String,
    variant: String,
    loads: u64,
    wait_mean_s: f64,
}

pub(crate) fn traces() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces")
}

fn expected() -> Expected {
    let text = std::fs::read_to_string(traces().join("expected.toml")).expect("it is there");
    toml::from_str(&text).expect("it has these rows")
}

fn workload() -> Workload {
    let models = simulate::read_models(&traces().join("servegen-24m-48h-models.csv"));
    let demands = simulate::read_trace(&traces().join("servegen-24m-48h.csv"));
    Workload::new(
        models.expect("a good table"),
        demands.expect("a good trace"),
    )
    .expect("every model is in the table")
}

fn play(workload: &Workload, mode: Mode, rules: Rules, limit_gib: u64) -> Figures {
    simulate::run(workload, Memory::Gpu, mode, rules, Bytes::gib(limit_gib))
}

fn rules(policy: &str, patience: &str) -> Rules {
    Rules {
        eviction: EvictionPolicy::from_name(policy).expect("a policy"),
        patience: match patience {
            "none" => None,
            "5s" => Some(Duration::from_secs(5)),
            other => panic!("no such patience: {other}"),
        },
    }
}

/// The same where busy workers are drained, which the two do by other rules: see
/// `expected.toml`.
const TOLERANCE_DRAINS_PERCENT: u64 = 3;

/// Few loads may differ by as many as this: ties are broken otherwise.
const TOLERANCE_LOADS: u64 = 4;

fn agrees(ours: u64, theirs: u64, percent: u64) -> bool {
    let difference = ours.abs_diff(theirs);
    difference * 100 <= theirs * percent || difference <= TOLERANCE_LOADS
}

#[test]
fn a21_serial_loads_agree_with_an_independent_simulation_within_2_percent() {
    let workload = workload();
    let mut compared = 0;
    for row in expected().serial {
        let rules = rules(&row.policy, "none");
        let ours = play(&workload, Mode::Serial, rules, row.limit_gib);
        let what = format!("{} at {} GiB", row.policy, row.limit_gib);
        assert!(
            agrees(ours.loads, row.loads, TOLERANCE_PERCENT),
            "{what}: {} loads, {} expected",
            ours.loads,
            row.loads
        );
        let off = (ours.load_seconds / row.load_seconds - 1.0).abs();
        assert!(off < 0.02, "{what}: {} s of loads", ours.load_seconds);
        let plan = ours.offline.load_seconds;
        let off = (plan / row.offline_load_seconds - 1.0).abs();
        assert!(off < 0.001, "{what}: the offline plan needs {plan} s");
        compared += 1;
    }
    assert!(compared >= 13, "only {compared} rows were compared");
}

#[test]
fn a21_timed_loads_agree_with_an_independent_simulation() {
    let workload = workload();
    let mut compared = 0;
    for row in expected().timed {
        let rules = rules(&row.policy, &row.patience);
        let ours = play(&workload, Mode::Timed, rules, row.limit_gib);
        let what = format!("{} at {} GiB, {}", row.policy, row.limit_gib, row.variant);
        let percent = match rules.patience {
            Some(_) => TOLERANCE_DRAINS_PERCENT,
            None => TOLERANCE_PERCENT,
        };
        assert!(
            agrees(ours.loads, row.loads, percent),
            "{what}: {} loads, {} expected",
            ours.loads,
            row.loads
        );
        if rules.patience.is_some() {
            // Whom each drains is not the same: see `expected.toml`.
            compared += 1;
            continue;
        }
        let off = (ours.waits.mean - row.wait_mean_s).abs();
        assert!(
            off < 0.04 || off / row.wait_mean_s < 0.1,
            "{what}: a mean wait of {} s, {} s expected",
            ours.waits.mean,
            row.wait_mean_s
        );
        compared += 1;
    }
    assert!(compared >= 11, "only {compared} rows were compared");
}

#[test]
fn no_serial_run_beats_the_offline_plan() {
    let workload = workload();
    for limit in simulate::steps(Bytes::gib(60), Bytes::gib(200), Some(Bytes::gib(20))) {
        let figures = simulate::run(
            &workload,
            Memory::Gpu,
            Mode::Serial,
            rules("lru", "none"),
            limit,
        );
        assert!(figures.gap() >= 1.0, "{limit}: {figures:?}");
        assert_eq!(figures.refused, 0, "{limit}: every model fits");
        assert!(figures.loads >= figures.offline.loads, "{limit}");
    }
}

#[test]
fn with_room_for_all_each_model_is_loaded_once() {
    let workload = workload();
    let figures = play(&workload, Mode::Timed, rules("lru", "5s"), 367);
    assert_eq!(figures.loads, 24);
    assert_eq!(figures.offline.loads, 24);
    assert_eq!(figures.requests, 95_928);
    assert_eq!(figures.refused, 0);
}

/// Runs the command with a small world in a folder of its own.
fn run(line: &str) -> (i32, String, String, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).expect("it can be written");
    };
    write(
        "trace.csv",
        "timestamp_ms,model_id,duration_ms\n0,a,500\n10000,b,500\n20000,a,500\n",
    );
    write(
        "models.csv",
        "model_id,size_mib,load_cold_ms\na,1024,2000\nb,2048,3000\n",
    );
    write("gap.csv", "timestamp_ms,model_id,duration_ms\n0,a,soon\n");
    write("other.csv", "timestamp_ms,model_id,duration_ms\n0,c,1\n");
    let output = Command::new(env!("CARGO_BIN_EXE_residentd"))
        .arg("simulate")
        .args(line.split_whitespace())
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .output()
        .expect("residentd runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let code = output.status.code().expect("an exit code");
    (code, text(output.stdout), text(output.stderr), folder)
}

#[test]
fn the_page_has_a_table_a_chart_and_the_answer() {
    let line = "--trace trace.csv --models models.csv --limit 2GiB --limit 3GiB --more 1GiB";
    let (code, page, errors, _) = run(line);
    assert_eq!((code, errors.as_str()), (0, ""));
    insta::assert_snapshot!(page);
}

#[test]
fn json_has_the_documented_shape() {
    let line = "--trace trace.csv --models models.csv --limit 2GiB --serial --json";
    let (code, page, _, _) = run(line);
    assert_eq!(code, 0);
    let value: serde_json::Value = serde_json::from_str(&page).expect("JSON");
    insta::assert_snapshot!(serde_json::to_string_pretty(&value).expect("JSON"));
}

#[test]
fn a_plot_is_an_svg_that_names_every_limit() {
    let line = "--trace trace.csv --models models.csv --sweep limit=2GiB..4GiB/1GiB --plot p.svg";
    let (code, _, errors, folder) = run(line);
    assert_eq!((code, errors.as_str()), (0, ""));
    let svg = std::fs::read_to_string(folder.path().join("p.svg")).expect("it was drawn");
    assert!(
        svg.starts_with("<svg") && svg.ends_with("</svg>\n"),
        "{svg}"
    );
    for limit in ["2 GiB", "3 GiB", "4 GiB"] {
        assert!(svg.contains(limit), "{limit} in {svg}");
    }
}

#[test]
fn mistakes_name_the_file_the_line_and_the_fix() {
    let wrong = [
        ("--trace gap.csv --models models.csv", 1),
        ("--trace other.csv --models models.csv", 1),
        ("--trace models.csv --models models.csv", 1),
        ("--trace none.csv --models models.csv", 1),
        ("--trace trace.csv", 2),
        ("--trace trace.csv --models models.csv --policy most", 2),
        ("--trace trace.csv --models models.csv --policy mru", 2),
        (
            "--trace trace.csv --models models.csv --sweep limit=4GiB..2GiB",
            2,
        ),
        ("--trace trace.csv --models models.csv --sweep 2GiB", 2),
    ];
    let mut told = String::new();
    for (line, wanted) in wrong {
        let (code, _, errors, _) = run(line);
        assert_eq!(code, wanted, "{line}: {errors}");
        let first = errors.lines().next().unwrap_or_default();
        told.extend([line, "\n  ", first, "\n"]);
    }
    insta::assert_snapshot!(told);
}
