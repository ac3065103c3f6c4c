//! A collector of OpenTelemetry's: takes spans by OTLP over HTTP and decodes the
//! little of them that tests look at.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use residentd::grpc::{Value, first_field};

use super::wait_until;
use super::wire::Wire;

/// A span that came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) trace: String,
    pub(crate) id: String,
    /// Empty when it has none.
    pub(crate) parent: String,
    /// Texts, and numbers as texts.
    pub(crate) attributes: BTreeMap<String, String>,
    /// In ns since 1970.
    pub(crate) begin: u64,
    pub(crate) end: u64,
    pub(crate) is_error: bool,
    pub(crate) service: String,
}

/// Listens until the test ends.
pub(crate) struct Collector {
    address: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound").to_string();
        let spans = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&spans);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut wire = Wire::on(stream.expect("a connection"));
                let head = wire.head();
                assert_eq!(head.line, "POST /v1/traces HTTP/1.1");
                assert_eq!(head.get("content-type"), Some("application/x-protobuf"));
                let body = wire.body(&head);
                kept.lock().expect("no panic").extend(decode(&body));
                wire.put("HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n");
            }
        });
        Self { address, spans }
    }

    /// Returns the base address.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns what came so far.
    pub(crate) fn spans(&self) -> Vec<Span> {
        self.spans.lock().expect("no panic").clone()
    }

    /// Waits until so many whole requests came, and returns their spans.
    pub(crate) fn wait_for_roots(&self, count: usize) -> Vec<Span> {
        wait_until(&format!("spans of {count} requests"), || {
            let spans = self.spans();
            let roots = spans.iter().filter(|span| span.begin > 0 && span.is_root());
            (roots.count() == count).then_some(spans)
        })
    }
}

impl Span {
    /// Returns whether it is a request's, not a step's.
    pub(crate) fn is_root(&self) -> bool {
        self.attributes.contains_key("http.request.method")
    }
}

type Fields<'a> = Vec<(u64, &'a [u8], Raw<'a>)>;

#[derive(Clone, Copy)]
enum Raw<'a> {
    Bytes(&'a [u8]),
    Number(u64),
}

/// Reads the fields of a message. Fixed ones are read here: the reader under test
/// only skips them.
fn fields(mut rest: &[u8]) -> Fields<'_> {
    let mut all = Vec::new();
    while !rest.is_empty() {
        let (number, value, used) = first_field(rest).expect("protobuf").expect("whole");
        let raw = match value {
            Value::Bytes(bytes) => Raw::Bytes(bytes),
            Value::Number(number) => Raw::Number(number),
            Value::Fixed => {
                let mut fixed = [0; 8];
                let length = if rest[0] & 7 == 1 { 8 } else { 4 };
                fixed[..length].copy_from_slice(&rest[used - length..used]);
                Raw::Number(u64::from_le_bytes(fixed))
            }
        };
        all.push((number, &rest[..used], raw));
        rest = &rest[used..];
    }
    all
}

fn messages(bytes: &[u8], wanted: u64) -> Vec<&[u8]> {
    let of = |(number, _, raw)| match raw {
        Raw::Bytes(bytes) if number == wanted => Some(bytes),
        _ => None,
    };
    fields(bytes).into_iter().filter_map(of).collect()
}

/// An `ExportTraceServiceRequest`.
fn decode(body: &[u8]) -> Vec<Span> {
    let mut spans = Vec::new();
    for resource_spans in messages(body, 1) {
        let resource: BTreeMap<_, _> = messages(resource_spans, 1)
            .iter()
            .flat_map(|resource| messages(resource, 1))
            .map(attribute)
            .collect();
        let service = resource.get("service.name").cloned().unwrap_or_default();
        for scope in messages(resource_spans, 2) {
            for span in messages(scope, 2) {
                spans.push(span_of(span, &service));
            }
        }
    }
    spans
}

fn span_of(bytes: &[u8], service: &str) -> Span {
    let mut span = Span {
        service: service.to_owned(),
        ..Span::default()
    };
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    for (number, _, raw) in fields(bytes) {
        match (number, raw) {
            (1, Raw::Bytes(id)) => span.trace = hex(id),
            (2, Raw::Bytes(id)) => span.id = hex(id),
            (4, Raw::Bytes(id)) => span.parent = hex(id),
            (5, Raw::Bytes(name)) => span.name = text(name),
            (7, Raw::Number(time)) => span.begin = time,
            (8, Raw::Number(time)) => span.end = time,
            (9, Raw::Bytes(pair)) => span.attributes.extend([attribute(pair)]),
            (15, Raw::Bytes(status)) => {
                let error = |(number, _, raw): &(u64, _, Raw<'_>)| {
                    *number == 3 && matches!(raw, Raw::Number(2))
                };
                span.is_error = fields(status).iter().any(error);
            }
            _ => {}
        }
    }
    span
}

/// A `KeyValue`.
fn attribute(pair: &[u8]) -> (String, String) {
    let key = messages(pair, 1).first().map(|key| text(key));
    let value =
        messages(pair, 2)
            .first()
            .map_or(String::new(), |value| match fields(value).first() {
                Some((_, _, Raw::Bytes(bytes))) => text(bytes),
                Some((_, _, Raw::Number(number))) => number.to_string(),
                None => String::new(),
            });
    (key.expect("a key"), value)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}
