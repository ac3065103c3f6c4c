//! What a build of residentd is trained with, so that the compiler knows what is often
//! run (`scripts/dist`): the traffic of the rows, and what no row has: bodies that are
//! changed on their way, forms, HTTP/2 of browsers, TLS, what operators ask for, and
//! models that take turns. Nothing is judged.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::load::{self, MODEL};
use crate::peers::{self, Target};
use crate::requests::{self, VISIT};
use crate::wire::{self, Connection, Waiting, get, request};
use crate::{admin, calls, streams, uploads};

/// Visits of each row; of streams twice as many, since most of what clients wait for
/// are events.
const VISITS: usize = 10;
/// Requests of each kind that no row has.
const TIMES: usize = 2000;
/// Models that take turns, and how often each is loaded.
const MODELS: usize = 4;
const TURNS: usize = 5;
/// A model whose bodies are changed, and memory for two models at once.
const CHANGED: &str = r#"
[memory]
limit = "80MiB"
[defaults]
use_model_name = "org/model"
set_params = { temperature = 0.2 }
strip_params = ["top_k"]
"#;
const CHAT: &str = r#"{"messages":[{"role":"system","content":"You are brief."},{"role":"user","content":"Say \"hello\" in two languages, and why \u00e9 is not e."}],"top_k":40,"stream":false,"max_tokens":64,"model":"bench"}"#;
const FORM: &str = "--form\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\ncontent-type: audio/wav\r\n\r\nRIFF....WAVEfmt ....\r\n--form\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nbench\r\n--form--\r\n";
const LISTS: [&str; 4] = [
    "/api/v1/memory/stats",
    "/api/v1/models",
    "/metrics",
    "/v1/models",
];

/// Sends all of it to residentds of this binary.
pub(crate) fn run(binary: &Path) -> io::Result<()> {
    plain(binary)?;
    changed(binary)?;
    encrypted(binary)?;
    let many = peers::residentd(binary, "", admin::MODELS, false);
    peers::whoami(&many.address, MODEL);
    admin::visit(&many)?;
    many.end()?;
    // What it had to count is written at its end.
    peers::nobody_runs(binary)
}

/// What the rows send.
fn plain(binary: &Path) -> io::Result<()> {
    let target = peers::residentd(binary, uploads::PREFIX, 1, false);
    peers::whoami(&target.address, MODEL);
    for _ in 0..VISITS {
        requests::closed(&target, 1, VISIT)?;
        requests::closed(&target, 64, VISIT)?;
        requests::open(&target)?;
        streams::visit(&target)?;
        streams::visit(&target)?;
        calls::visit(&target)?;
    }
    for ask in ["first", "last"] {
        uploads::visit(&target, ask)?;
    }
    browser(&target)?;
    target.end()
}

/// Small requests over HTTP/2 to a worker that speaks HTTP/1.1.
fn browser(target: &Target) -> io::Result<()> {
    crate::driver().block_on(async {
        let (mut sender, connection) = calls::open(&target.address).await?;
        let mut connections = JoinSet::new();
        connections.spawn(connection);
        for _ in 0..TIMES {
            let asked = Request::post(format!("http://{}/v1/completions", target.address))
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from_static(load::small())));
            let asked = asked.map_err(io::Error::other)?;
            let answer = sender.send_request(asked).await;
            let body = answer.map_err(io::Error::other)?.into_body().collect();
            let body = body.await.map_err(io::Error::other)?.to_bytes();
            if body != load::answer() {
                return Err(io::Error::other("other bytes came back over HTTP/2"));
            }
        }
        Ok(())
    })
}

/// Bodies that are changed, forms, lists, and models for which others have to go.
fn changed(binary: &Path) -> io::Result<()> {
    let target = peers::residentd(binary, CHANGED, MODELS, false);
    peers::whoami(&target.address, MODEL);
    let mut connection = Waiting::open(&target.address)?;
    let chat = post("/v1/chat/completions", "application/json", CHAT);
    let form = "multipart/form-data; boundary=form";
    let form = post("/v1/audio/transcriptions", form, FORM);
    for _ in 0..TIMES {
        connection.ask(&chat)?;
        connection.answer.is_small()?;
        connection.ask(&form)?;
        connection.answer.is_small()?;
    }
    for path in LISTS.iter().cycle().take(TIMES / 10) {
        connection.ask(&get(path))?;
    }
    for _ in 0..TURNS {
        for other in 1..MODELS {
            peers::whoami(&target.address, &format!("other-{other}"));
        }
    }
    target.end()
}

/// Returns a request to whose body, whatever it is when it comes, the worker gives
/// the small answer.
fn post(path: &str, kind: &str, body: &str) -> Vec<u8> {
    let mut text = wire::post((path, kind), "any", "", body.len());
    text.extend(body.as_bytes());
    text
}

/// Small requests and a stream over TLS.
fn encrypted(binary: &Path) -> io::Result<()> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]);
    let made = made.map_err(io::Error::other)?;
    let folder = tempfile::tempdir()?;
    let (cert, key) = (
        folder.path().join("cert.pem"),
        folder.path().join("key.pem"),
    );
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    let tls = format!("[tls]\ncert = {cert:?}\nkey = {key:?}\n");
    let target = peers::residentd(binary, &tls, 1, false);
    let mut roots = RootCertStore::empty();
    roots
        .add(made.cert.der().clone())
        .map_err(io::Error::other)?;
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    crate::driver().block_on(async {
        // Some shake hands and ask once.
        for _ in 0..TIMES / 100 {
            ask_over_tls(&connector, &target, 1).await?;
        }
        ask_over_tls(&connector, &target, TIMES).await
    })?;
    target.end()
}

async fn ask_over_tls(connector: &TlsConnector, target: &Target, times: usize) -> io::Result<()> {
    let stream = TcpStream::connect(&target.address).await?;
    stream.set_nodelay(true)?;
    let name = "localhost".try_into().map_err(io::Error::other)?;
    let mut connection = Connection::over(connector.connect(name, stream).await?);
    let small = request("", "", load::small());
    for _ in 0..times {
        connection.ask(&small).await?;
        connection.answer.is_small()?;
    }
    let events = format!("x-count: {}\r\nx-gap-ms: 0\r\n", times.min(500));
    connection
        .ask(&request("stream", &events, load::small()))
        .await
}
