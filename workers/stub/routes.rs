//! What each route answers.
//!
//! `/health`, `/stats`, `/env`, `/v1/models` and calls to sleep and to wake are
//! not counted as requests; everything else is, and obeys the knobs.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, UPGRADE};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde_json::{Value, json};

use crate::answer::{Answer, BrokenOff, Parts, ResetFlag, kill_self, whole};
use crate::checksum::Checksum;
use crate::knobs::Knobs;
use crate::openai::{Shape, Voice, embeddings, transcription};
use crate::orders::{self, Orders};
use crate::sleep::{self, Call};
use crate::state::{InFlight, Stub};
use crate::{anthropic, clock};

/// How much of a body `/echo` shows.
const SHOWN: usize = 256;
/// Where audio is sent to be written down.
const TRANSCRIPTIONS: &str = "/v1/audio/transcriptions";
/// Where Anthropic's clients ask how long a message is.
const COUNT_TOKENS: &str = "/v1/messages/count_tokens";

/// Answers one request. An error closes the connection without an answer.
pub(crate) async fn answer(
    stub: Arc<Stub>,
    request: Request<Incoming>,
    reset: ResetFlag,
) -> Result<Response<Answer>, BrokenOff> {
    let received_ns = clock::monotonic_ns();
    let mut response = route(&stub, request, reset).await?;
    let headers = response.headers_mut();
    headers.insert("x-stub-pid", HeaderValue::from(std::process::id()));
    headers.insert("x-stub-received-ns", HeaderValue::from(received_ns));
    if let Ok(name) = HeaderValue::from_str(&stub.args.name) {
        headers.insert("x-stub-name", name);
    }
    Ok(response)
}

async fn route(
    stub: &Arc<Stub>,
    request: Request<Incoming>,
    reset: ResetFlag,
) -> Result<Response<Answer>, BrokenOff> {
    match request.uri().path() {
        "/stats" => return Ok(document(StatusCode::OK, &stub.stats())),
        "/env" => return Ok(document(StatusCode::OK, &environment())),
        "/health" => stub.count_probe(),
        _ => {}
    }
    if !stub.is_ready() {
        return Ok(failure(StatusCode::SERVICE_UNAVAILABLE, "Loading model"));
    }
    if let Some(call) = Call::of(request.uri().path()).filter(|_| stub.args.sleep_mode) {
        return Ok(match sleep::obey(stub, call).await {
            Ok(done) => document(StatusCode::OK, &done),
            Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        });
    }
    let shape = Shape::of(request.uri().path());
    match request.uri().path() {
        "/health" => return Ok(document(StatusCode::OK, &json!({"status": "ok"}))),
        "/v1/models" => return Ok(document(StatusCode::OK, &models(&stub.args.name))),
        "/v1/embeddings" | "/echo" | "/sink" | "/upgrade" | TRANSCRIPTIONS | COUNT_TOKENS => {}
        path if path.starts_with("/v2/models/") || shape.is_some() => {}
        _ => return Ok(failure(StatusCode::NOT_FOUND, "no such route")),
    }
    sleep::crash_when_asked(stub);
    let mut in_flight = stub.begin();
    if is_over(stub.args.hang_after_requests, &in_flight) {
        std::future::pending::<Infallible>().await;
    }
    if let Some(shape) = shape {
        return complete(stub, request, shape, reset, in_flight).await;
    }
    let answer = match request.uri().path() {
        "/echo" => echo(request).await,
        "/sink" => sink(request).await,
        "/upgrade" => upgrade(&request),
        TRANSCRIPTIONS => transcribe(stub, request).await,
        COUNT_TOKENS => count_tokens(request).await,
        path if path.starts_with("/v2/models/") => infer(stub, request).await,
        _ => embed(stub, request).await,
    };
    in_flight.finish();
    Ok(answer)
}

fn is_over(most: Option<u64>, in_flight: &InFlight) -> bool {
    most.is_some_and(|most| in_flight.number() > most)
}

/// Answers a completion or a chat, as the knobs say.
async fn complete(
    stub: &Stub,
    request: Request<Incoming>,
    shape: Shape,
    reset: ResetFlag,
    mut in_flight: InFlight,
) -> Result<Response<Answer>, BrokenOff> {
    let (head, body) = request.into_parts();
    let Ok((body, asked)) = read_json(body).await else {
        in_flight.finish();
        return Ok(failure(StatusCode::BAD_REQUEST, "the body is not JSON"));
    };
    orders::enter(&stub.args, asked["x_id"].as_u64());
    let orders = Orders::read(&stub.args);
    stub.memory.grow_to(orders.grow);
    if orders.hang {
        std::future::pending::<Infallible>().await;
    }
    let knobs = Knobs::read(&asked, head.uri.query());
    if knobs.exit_after == Some(0) {
        kill_self();
    }
    if !knobs.delay.is_zero() {
        tokio::time::sleep(knobs.delay).await;
    }
    compute(knobs.busy);
    if knobs.drop {
        in_flight.finish();
        return Err(BrokenOff);
    }
    if let Some(status) = knobs.status {
        in_flight.finish();
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if shape == Shape::Message {
            let error = anthropic::failure(status.as_u16(), "as asked");
            return Ok(document(status, &error));
        }
        return Ok(failure(status, "as asked"));
    }
    let voice = Voice {
        name: stub.args.name.clone(),
        model: asked["model"].as_str().unwrap_or(&stub.args.name).into(),
        body_bytes: body.len(),
        shape,
        number: in_flight.number(),
    };
    Ok(if knobs.stream {
        streamed(voice, knobs, reset, in_flight)
    } else {
        plain(&voice, knobs, reset, in_flight)
    })
}

/// Computes for so long. The worker has one thread: nobody is served meanwhile.
fn compute(time: Duration) {
    let started = tokio::time::Instant::now();
    let mut sum = 0_u64;
    while started.elapsed() < time {
        sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
    }
}

fn streamed(voice: Voice, knobs: Knobs, reset: ResetFlag, request: InFlight) -> Response<Answer> {
    let count = knobs.chunks + 1;
    let asked = knobs.clone();
    let part = move |index| voice.event(index, &asked);
    let body = Parts::body(part, count, None, knobs, reset, request);
    with_type("text/event-stream", body)
}

/// Gives a JSON document in as many parts as there are chunks.
fn plain(voice: &Voice, knobs: Knobs, reset: ResetFlag, request: InFlight) -> Response<Answer> {
    let mut left = Bytes::from(voice.document(&knobs));
    let length = u64::try_from(left.len()).expect("a length fits 64 bits");
    let count = knobs.chunks.min(length);
    let size = left.len() / usize::try_from(count).expect("no more than the length");
    let part = move |index| {
        let last = index + 1 == count;
        left.split_to(if last { left.len() } else { size })
    };
    let body = Parts::body(part, count, Some(length), knobs, reset, request);
    with_type("application/json", body)
}

/// Answers what arrived: line, headers, and the body's length and beginning.
async fn echo(request: Request<Incoming>) -> Response<Answer> {
    let (head, mut body) = request.into_parts();
    let mut shown = Vec::new();
    let Ok(read) = drain(&mut body, |data| {
        shown.extend_from_slice(&data[..data.len().min(SHOWN - shown.len())]);
    })
    .await
    else {
        return failure(StatusCode::BAD_REQUEST, "the body broke off");
    };
    document(
        StatusCode::OK,
        &json!({
            "method": head.method.as_str(),
            "path": head.uri.path(),
            "query": head.uri.query(),
            "version": format!("{:?}", head.version),
            "headers": pairs(&head.headers),
            "body_length": read.checksum.length(),
            "body_checksum": read.checksum.hex(),
            "body_start": String::from_utf8_lossy(&shown),
        }),
    )
}

/// Reads a body of any size without holding it.
async fn sink(request: Request<Incoming>) -> Response<Answer> {
    match drain(&mut request.into_body(), |_| {}).await {
        Ok(read) => document(
            StatusCode::OK,
            &json!({
                "length": read.checksum.length(),
                "checksum": read.checksum.hex(),
                "first_byte_monotonic_ns": read.first_ns,
                "last_byte_monotonic_ns": clock::monotonic_ns(),
            }),
        ),
        Err(_) => failure(StatusCode::BAD_REQUEST, "the body broke off"),
    }
}

/// Leaves HTTP when asked to; from then on the connection echoes.
fn upgrade(request: &Request<Incoming>) -> Response<Answer> {
    let Some(protocol) = request.headers().get(UPGRADE).cloned() else {
        return failure(
            StatusCode::UPGRADE_REQUIRED,
            "name a protocol to upgrade to",
        );
    };
    let mut response = Response::new(whole(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
    response
}

/// Answers as a model of the Open Inference Protocol whose outputs are its
/// inputs, and what it is.
async fn infer(stub: &Stub, request: Request<Incoming>) -> Response<Answer> {
    let name = &stub.args.name;
    if request.method() == Method::GET {
        let about = json!({"name": name, "versions": ["1"], "platform": "stub",
            "inputs": [], "outputs": []});
        return document(StatusCode::OK, &about);
    }
    let Ok((_, asked)) = read_json(request.into_body()).await else {
        return failure(StatusCode::BAD_REQUEST, "the body is not JSON");
    };
    let answer = json!({"model_name": name, "id": asked["id"], "outputs": asked["inputs"]});
    document(StatusCode::OK, &answer)
}

async fn embed(stub: &Stub, request: Request<Incoming>) -> Response<Answer> {
    let Ok((_, asked)) = read_json(request.into_body()).await else {
        return failure(StatusCode::BAD_REQUEST, "the body is not JSON");
    };
    let model = asked["model"].as_str().unwrap_or(&stub.args.name);
    document(StatusCode::OK, &embeddings(&asked, model))
}

/// Reads a form of any size without holding it.
async fn transcribe(stub: &Stub, request: Request<Incoming>) -> Response<Answer> {
    match drain(&mut request.into_body(), |_| {}).await {
        Ok(read) => document(
            StatusCode::OK,
            &transcription(&stub.args.name, &read.checksum),
        ),
        Err(_) => failure(StatusCode::BAD_REQUEST, "the body broke off"),
    }
}

async fn count_tokens(request: Request<Incoming>) -> Response<Answer> {
    match read_json(request.into_body()).await {
        Ok((body, _)) => document(StatusCode::OK, &anthropic::count(body.len())),
        Err(NoJson) => failure(StatusCode::BAD_REQUEST, "the body is not JSON"),
    }
}

/// What is known of a body that was read to its end.
#[derive(Debug, Default)]
struct Drained {
    checksum: Checksum,
    first_ns: Option<u64>,
}

async fn drain(body: &mut Incoming, mut each: impl FnMut(&[u8])) -> Result<Drained, hyper::Error> {
    let mut drained = Drained::default();
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame?.data_ref() {
            drained.first_ns.get_or_insert_with(clock::monotonic_ns);
            drained.checksum.update(data);
            each(data);
        }
    }
    Ok(drained)
}

/// Why a body is no JSON; nobody asks for more.
struct NoJson;

async fn read_json(body: Incoming) -> Result<(Bytes, Value), NoJson> {
    let bytes = body.collect().await.map_err(|_| NoJson)?.to_bytes();
    let value = serde_json::from_slice(&bytes).map_err(|_| NoJson)?;
    Ok((bytes, value))
}

fn models(name: &str) -> Value {
    json!({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "stub"}]})
}

/// Returns how this process was started.
fn environment() -> Value {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    let variables: serde_json::Map<String, Value> = std::env::vars_os()
        .map(|(name, value)| (text(name), Value::String(text(value))))
        .collect();
    let arguments: Vec<String> = std::env::args_os().map(text).collect();
    let directory = std::env::current_dir().unwrap_or_default();
    json!({"env": variables, "args": arguments, "cwd": directory})
}

fn pairs(headers: &HeaderMap) -> Vec<[String; 2]> {
    headers
        .iter()
        .map(|(name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes());
            [name.as_str().to_owned(), value.into_owned()]
        })
        .collect()
}

fn failure(status: StatusCode, message: &str) -> Response<Answer> {
    let error = json!({"error": {"message": message, "code": status.as_u16(), "type": "stub"}});
    document(status, &error)
}

fn document(status: StatusCode, value: &Value) -> Response<Answer> {
    let mut response = with_type("application/json", whole(value.to_string()));
    *response.status_mut() = status;
    response
}

fn with_type(content_type: &'static str, body: Answer) -> Response<Answer> {
    let mut response = Response::new(body);
    let value = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, value);
    response
}
