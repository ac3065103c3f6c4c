//! Spans, as a collector gets them.

use std::collections::BTreeSet;

use crate::proxy::rig::Played;
use crate::support::calls::{ask, named, with};
use crate::support::collector::{Collector, Span};
use crate::support::residentd::STUB;
use crate::support::wire::Wire;
use crate::support::{Residentd, now};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn start(collector: &Collector, more: &str) -> Residentd {
    Residentd::start(&format!(
        "[telemetry]\notlp_endpoint = \"{}\"\nservice_name = \"box-7\"\n{more}\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m --ready-after 100ms'\nmemory = \"32MiB\"\n",
        collector.endpoint()
    ))
}

fn roots(spans: &[Span]) -> Vec<&Span> {
    spans.iter().filter(|span| span.is_root()).collect()
}

/// The spans right below this one, in their order.
fn below<'a>(spans: &'a [Span], parent: &Span) -> Vec<&'a Span> {
    let is_below = |span: &&Span| span.parent == parent.id && span.trace == parent.trace;
    let mut found: Vec<_> = spans.iter().filter(is_below).collect();
    found.sort_by_key(|span| (span.begin, span.end));
    found
}

#[test]
fn a_request_is_a_span_with_one_for_each_step_of_its_walk() {
    let collector = Collector::start();
    let residentd = start(&collector, "");
    for _ in 0..2 {
        assert_eq!(residentd.complete("m").status, 200);
    }
    // What is not sent yet goes out at the end.
    assert!(residentd.stop().success());
    let spans = collector.wait_for_roots(2);
    let mut roots = roots(&spans);
    roots.sort_by_key(|span| span.begin);
    let steps = [
        "find model",
        "read body",
        "wait for worker",
        "connect",
        "first byte",
        "body",
    ];
    for root in &roots {
        assert_eq!(root.name, "POST /v1");
        assert_eq!((root.service.as_str(), root.parent.as_str()), ("box-7", ""));
        let told = |key: &str| root.attributes.get(key).map(String::as_str);
        assert_eq!(told("http.request.method"), Some("POST"));
        assert_eq!(told("http.response.status_code"), Some("200"));
        assert_eq!(told("gen_ai.request.model"), Some("m"));
        assert_eq!(told("url.path"), Some("/v1/completions"));
        assert_eq!(told("residentd.request_id").map(str::len), Some(32));
        assert_eq!(told("residentd.worker.generation"), Some("1"));
        assert!(!root.is_error, "{root:?}");
        let walk = below(&spans, root);
        let names: Vec<_> = walk.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, steps);
        // They follow each other without a gap, and are the whole of it.
        assert_eq!((walk[0].begin, walk[5].end), (root.begin, root.end));
        for pair in walk.windows(2) {
            assert_eq!(pair[0].end, pair[1].begin);
        }
    }
    assert_ne!(roots[0].trace, roots[1].trace);
    let loads = |root| {
        let wait = below(&spans, root)[2].clone();
        let loads: Vec<_> = below(&spans, &wait).into_iter().cloned().collect();
        (wait, loads)
    };
    let (wait, load) = loads(roots[0]);
    assert_eq!(load.len(), 1, "it waited for a load");
    assert_eq!(load[0].name, "load");
    assert!(load[0].end - load[0].begin > 80_000_000, "{load:?}");
    assert!(load[0].begin >= wait.begin && load[0].end <= wait.end);
    assert!(loads(roots[1]).1.is_empty(), "it was ready");
    let ids: BTreeSet<_> = spans.iter().map(|span| &span.id).collect();
    assert_eq!(ids.len(), spans.len());
}

#[test]
fn a_clients_trace_is_gone_on_with_and_the_worker_is_told_its_place() {
    let collector = Collector::start();
    let played = Played::traced(&collector.endpoint(), "");
    let ask = |headers: &str| {
        let mut client = played.client();
        client.ask("POST /v1/x", headers, "{\"model\":\"m\"}");
        let mut worker = played.worker();
        let head = worker.head();
        worker.body(&head);
        worker.put("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok");
        assert_eq!(client.answer().0.status(), 200);
        head
    };
    let valid = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1\r\n");
    let joined = ask(&valid);
    let unwanted = ask(&valid.replace("-01\r", "-00\r"));
    let stray = ask("traceparent: 00-evil-01\r\ntracestate: a=1\r\n");
    let spans = collector.wait_for_roots(2);
    let roots = roots(&spans);
    let in_trace = |root: &&&Span| root.trace == TRACE;
    let ours = roots.iter().find(in_trace).expect("its trace goes on");
    assert_eq!(ours.parent, PARENT);
    let place = format!("00-{TRACE}-{}-01", ours.id);
    assert_eq!(joined.all("traceparent"), [place]);
    assert_eq!(joined.get("tracestate"), Some("a=1"));
    // Who does not want to be recorded is not, and is passed as it came.
    let as_it_came = format!("00-{TRACE}-{PARENT}-00");
    assert_eq!(unwanted.all("traceparent"), [as_it_came]);
    assert_eq!(unwanted.get("tracestate"), Some("a=1"));
    // What is no place in a trace begins a new one, of which nobody said more.
    let new = roots
        .iter()
        .find(|root| !in_trace(root))
        .expect("a new one");
    assert_eq!(new.parent, "");
    assert_eq!(
        stray.all("traceparent"),
        [format!("00-{}-{}-01", new.trace, new.id)]
    );
    assert_eq!(stray.get("tracestate"), None);
}

#[test]
fn refusals_and_failed_calls_are_spans_that_say_so() {
    let collector = Collector::start();
    let residentd = start(&collector, "");
    let mut client = Wire::to(residentd.address());
    client.ask("POST /v1/x", "", "{\"model\":\"other\"}");
    assert_eq!(client.answer().0.status(), 404);
    with(residentd.address(), |client| async move {
        let metadata = [("x-stub-status", "13")];
        let done = ask(&client, "ModelInfer", &metadata, named("m").frame()).await;
        assert_eq!(done.status(), "13");
    });
    let spans = collector.wait_for_roots(2);
    let roots = roots(&spans);
    let of = |name: &str| *roots.iter().find(|root| root.name == name).expect("a span");
    let (unknown, call) = (of("POST /v1"), of("POST gRPC"));
    assert_eq!(unknown.attributes["http.response.status_code"], "404");
    assert_eq!(unknown.attributes["residentd.end"], "refused");
    assert!(!unknown.is_error, "a client's mistake is none of a server");
    assert!(!unknown.attributes.contains_key("gen_ai.request.model"));
    assert_eq!(call.attributes["rpc.grpc.status_code"], "13");
    assert_eq!(call.attributes["error.type"], "500");
    assert!(call.is_error);
}

#[test]
fn of_a_ratio_of_zero_nothing_is_sent_but_for_clients_that_want_it() {
    let collector = Collector::start();
    let residentd = start(&collector, "sample_ratio = 0");
    let mut client = Wire::to(residentd.address());
    let traced = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\n");
    for headers in ["", "", &traced, ""] {
        client.ask("POST /v1/completions", headers, "{\"model\":\"m\"}");
        assert_eq!(client.answer().0.status(), 200);
    }
    assert!(residentd.stop().success());
    let spans = collector.wait_for_roots(1);
    assert!(spans.iter().all(|span| span.trace == TRACE), "{spans:?}");
}

#[test]
fn a_collector_that_is_gone_holds_up_neither_requests_nor_the_end() {
    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("it is bound")
    };
    let residentd = Residentd::start(&format!(
        "[telemetry]\notlp_endpoint = \"http://{gone}\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m'\nmemory = \"32MiB\"\n"
    ));
    for _ in 0..20 {
        assert_eq!(residentd.complete("m").status, 200);
    }
    let start = now();
    assert!(residentd.stop().success());
    assert!(start.elapsed() < std::time::Duration::from_secs(10));
}
