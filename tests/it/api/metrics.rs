//! The metrics page and the probes.

use std::collections::BTreeSet;

use super::world::{World, nobody_asks, snapshot};

async fn page() -> String {
    let answer = World::new(nobody_asks).get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .header("content-type")
            .starts_with("text/plain; version=0.0.4")
    );
    answer.body
}

#[tokio::test]
async fn the_page_holds_the_headline_series() {
    let page = page().await;
    for line in [
        "residentd_models{phase=\"ready\"} 2",
        "residentd_models{phase=\"draining\"} 0",
        "residentd_requests_running 1",
        "residentd_requests_waiting 2",
        "residentd_memory_limit_bytes{domain=\"host\"} 2013265920",
        "residentd_memory_headroom_bytes{domain=\"gpu:0\"} 18253611008",
        "residentd_memory_pressure_level{domain=\"host\"} 1",
        "residentd_device_memory_bytes{device=\"gpu:0\",uuid=\"GPU-5b2e\",kind=\"used\"} 7516192768",
        "residentd_requests_total{result=\"hit\"} 90",
        "residentd_requests_total{result=\"miss\"} 10",
        "residentd_evictions_total{reason=\"make_room\"} 2",
        "residentd_refusals_total{code=\"queue_full\"} 3",
        "residentd_loads_total 5",
        "residentd_load_failures_total{reason=\"exit_code\"} 3",
        "residentd_load_failures_total{reason=\"start_timeout\"} 1",
        "residentd_crashes_total 1",
        "residentd_unhealthy_total{reason=\"still\"} 1",
        "residentd_model_memory_bytes{model=\"gemma\",kind=\"anon\"} 1073741824",
        "residentd_model_memory_bytes{model=\"gemma\",kind=\"unreclaimable\"} 1140850688",
        "residentd_model_vram_bytes{model=\"gemma\",device=\"gpu:0\",source=\"nvml_pid\"} 6442450944",
        "residentd_model_requests_total{model=\"gemma\"} 104",
        "residentd_model_last_load_seconds{model=\"gemma\"} 2.5",
        "residentd_model_ready{model=\"voice\"} 0",
    ] {
        assert!(page.lines().any(|l| l == line), "no {line} in\n{page}");
    }
    assert!(page.contains("residentd_build_info{version=\""));
    assert!(
        !page.contains("residentd_model_vram_bytes{model=\"org/nano:e5\""),
        "unknown bytes are no series"
    );
}

#[tokio::test]
async fn each_family_is_described_once_and_before_its_series() {
    let page = page().await;
    let mut described = BTreeSet::new();
    let mut series = BTreeSet::new();
    let (mut current, mut is_histogram) = ("", false);
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help text");
            assert!(!help.is_empty() && described.insert(name), "{line}");
            current = name;
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(name, current);
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            is_histogram = kind == "histogram";
        } else {
            let (id, value) = line.rsplit_once(' ').expect("a value");
            let name = id.split('{').next().expect("a name");
            let part = ["_bucket", "_sum", "_count"].map(|end| name.strip_suffix(end));
            let name = match is_histogram {
                true => part.into_iter().flatten().next().expect("a part"),
                false => name,
            };
            assert_eq!(name, current, "{line}");
            assert!(value.parse::<f64>().is_ok() && series.insert(id), "{line}");
        }
    }
}

#[tokio::test]
async fn probes_follow_start_and_drain() {
    let mut view = snapshot();
    let world = World::of(view.clone(), nobody_asks);
    for path in ["/livez", "/readyz", "/startupz", "/health"] {
        assert_eq!(world.get(path).await.status, 200, "{path}");
    }
    view.draining = true;
    let world = World::of(view.clone(), nobody_asks);
    for (path, status) in [
        ("/livez", 200),
        ("/readyz", 503),
        ("/startupz", 200),
        ("/health", 503),
    ] {
        assert_eq!(world.get(path).await.status, status, "draining: {path}");
    }
    view.draining = false;
    view.memory.reading = std::sync::Arc::default();
    let world = World::of(view, nobody_asks);
    for (path, status) in [("/livez", 200), ("/readyz", 503), ("/startupz", 503)] {
        assert_eq!(world.get(path).await.status, status, "unmeasured: {path}");
    }
}

#[tokio::test]
async fn the_first_page_says_what_else_there_is() {
    let answer = World::new(nobody_asks).get("/").await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("/api/v1/memory/stats"));
}
