//! `[telemetry]`.

use insta::assert_snapshot;
use residentd::config::diff;

use super::{MODEL, one};

#[test]
fn spans_go_nowhere_unless_an_address_is_given_by_file_or_variable() {
    let config = one(MODEL).config();
    assert_eq!(config.telemetry.otlp_endpoint, None);
    assert_eq!(config.telemetry.service_name, "residentd");
    assert!((config.telemetry.sample_ratio - 1.0).abs() < 1e-9);
    let file = "[telemetry]\notlp_endpoint = \"http://[::1]:4318/\"\nsample_ratio = 0\n";
    let config = one(&format!("{file}{MODEL}"))
        .variable("RESIDENTD_SERVICE_NAME", "box")
        .variable("RESIDENTD_SAMPLE_RATIO", "0.25")
        .config();
    let telemetry = &config.telemetry;
    assert_eq!(
        telemetry.otlp_endpoint.as_deref(),
        Some("http://[::1]:4318")
    );
    assert_eq!(telemetry.service_name, "box");
    assert!((telemetry.sample_ratio - 0.25).abs() < 1e-9);
}

#[test]
fn what_is_wrong_with_it_is_told_with_the_fix() {
    let file = "[telemetry]\notlp_endpoint = \"https://collector\"\nservice_name = \"\"\nsample_ratio = 1.5\nsampler = \"x\"\n";
    let setup =
        one(&format!("{file}{MODEL}")).variable("RESIDENTD_OTLP_ENDPOINT", "collector:4318");
    assert_snapshot!(setup.problems(), @r#"
    telemetry.otlp_endpoint: "https://collector" is not an address of http; name a collector on this machine or in this pod by http:// and have it encrypt (a.toml:2)
    telemetry.service_name: is empty; write something or remove it (a.toml:3)
    telemetry.sample_ratio: 1.5 is not a share; write a number from 0 to 1, e.g. 0.1 (a.toml:4)
    telemetry.sampler: unknown key; known here: otlp_endpoint, service_name, sample_ratio (a.toml:5)
    RESIDENTD_OTLP_ENDPOINT: "collector:4318" is not an address of http; write the base address of a collector, e.g. "http://127.0.0.1:4318" (from the environment)
    "#);
    for wrong in ["http://", "http://me:secret@x", "http://x/?a=1", "nan"] {
        let file = format!("[telemetry]\notlp_endpoint = {wrong:?}\n{MODEL}");
        assert!(one(&file).load().is_err(), "{wrong}");
    }
    for wrong in ["nan", "-0.1", "\"half\"", "true"] {
        let file = format!("[telemetry]\nsample_ratio = {wrong}\n{MODEL}");
        assert!(one(&file).load().is_err(), "{wrong}");
    }
}

#[test]
fn a_change_of_it_holds_from_the_next_start_on() {
    let before = one(MODEL).config();
    let file = format!("[telemetry]\notlp_endpoint = \"http://x:1\"\nsample_ratio = 0.5\n{MODEL}");
    let (after, difference) = diff::apply(&before, one(&file).config());
    let mut waits = difference.needs_restart;
    // Each has a folder of its own.
    waits.retain(|key| *key != "server.state_dir");
    assert_eq!(waits, ["telemetry.otlp_endpoint", "telemetry.sample_ratio"]);
    assert_eq!(after.telemetry, before.telemetry);
}
