//! The calls that make a worker give memory back, and take it again.
//!
//! They go to the worker's own address, one after the other, each on a
//! connection of its own. Whether they did what they should is not asked here:
//! memory is measured.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Request, Response, StatusCode, http};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Residence;
use super::opened::Stream;
use crate::model::{ModelSpec, ParkCall, Upstream};
use crate::telemetry;

/// Bytes of a refusal that are shown.
const SHOWN: usize = 300;

/// Why a worker was not parked, or not made ready again.
#[derive(Debug, thiserror::Error)]
pub(super) enum ParkError {
    #[error("its configuration has no park")]
    NoCalls,
    #[error("{call}: reach the worker")]
    Connect { call: ParkCall, source: io::Error },
    #[error("{call}: make the request")]
    Request { call: ParkCall, source: http::Error },
    #[error("{call}: read the answer")]
    Answer {
        call: ParkCall,
        source: hyper::Error,
    },
    #[error("{call} answered {status}: {text}")]
    Status {
        call: ParkCall,
        status: StatusCode,
        text: String,
    },
    #[error("{call} was not answered: all calls together may take {} s", allowed.as_secs_f64())]
    Late { call: ParkCall, allowed: Duration },
}

/// Makes the calls that bring a worker there, in their order, until one fails
/// or their time is over.
pub(super) async fn move_to(
    residence: Residence,
    spec: &ModelSpec,
    upstream: &Upstream,
) -> Result<(), ParkError> {
    let park = spec.park.as_deref().ok_or(ParkError::NoCalls)?;
    let calls = match residence {
        Residence::Parked => &park.park,
        Residence::Ready => &park.unpark,
    };
    let over = tokio::time::sleep(park.timeout);
    tokio::pin!(over);
    for call in calls {
        tokio::select! {
            made = make(call, upstream) => made?,
            () = &mut over => {
                let (call, allowed) = (call.clone(), park.timeout);
                return Err(ParkError::Late { call, allowed });
            }
        }
    }
    Ok(())
}

async fn make(call: &ParkCall, upstream: &Upstream) -> Result<(), ParkError> {
    let failed = |source| ParkError::Connect {
        call: call.clone(),
        source,
    };
    let host = upstream.host();
    match Stream::connect(upstream).await.map_err(failed)? {
        Stream::Tcp(stream) => exchange(call, stream, &host).await,
        Stream::Unix(stream) => exchange(call, stream, &host).await,
    }
}

async fn exchange<S>(call: &ParkCall, stream: S, host: &str) -> Result<(), ParkError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let request = request(call, host).map_err(|source| ParkError::Request {
        call: call.clone(),
        source,
    })?;
    let failed = |source| ParkError::Answer {
        call: call.clone(),
        source,
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    // It ends with its one request, or when that is given up: what goes wrong
    // with it is told by the answer.
    telemetry::spawn("park call", async move {
        let _ = connection.await;
    });
    let answer = sender.send_request(request).await.map_err(failed)?;
    let status = answer.status();
    let text = beginning(answer).await.map_err(failed)?;
    match status.is_success() {
        true => Ok(()),
        false => Err(ParkError::Status {
            call: call.clone(),
            status,
            text,
        }),
    }
}

fn request(call: &ParkCall, host: &str) -> Result<Request<Full<Bytes>>, http::Error> {
    let mut request = Request::builder()
        .method(call.method.as_str())
        .uri(call.path.as_str())
        .header(HOST, host)
        .header(USER_AGENT, "residentd")
        .header(CONNECTION, "close");
    if call.body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let body = call.body.clone().unwrap_or_default();
    request.body(Full::from(body))
}

/// Reads an answer to its end and returns how it begins.
async fn beginning(answer: Response<Incoming>) -> Result<String, hyper::Error> {
    let mut body = answer.into_body();
    let mut shown = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame?.data_ref() {
            let room = SHOWN - shown.len();
            shown.extend_from_slice(&data[..data.len().min(room)]);
        }
    }
    Ok(String::from_utf8_lossy(&shown).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixListener};

    use super::*;
    use crate::model::{ModelName, ParkSpec};

    fn spec(calls: &[(&str, Option<&str>)]) -> ModelSpec {
        let call = |(path, body): &(&str, Option<&str>)| ParkCall {
            method: "POST".into(),
            path: (*path).into(),
            body: body.map(str::to_owned),
        };
        let calls: Vec<_> = calls.iter().map(call).collect();
        let park = ParkSpec {
            park: calls.clone(),
            unpark: calls,
            timeout: Duration::from_secs(5),
            memory: None,
            vram: None,
        };
        let name = ModelName::new("m").expect("a good name");
        ModelSpec {
            park: Some(Arc::new(park)),
            ..ModelSpec::plain(name, vec!["worker".into()])
        }
    }

    /// Answers one connection and returns what it was asked.
    async fn answer<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, head: &str) -> String {
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") && !asked.ends_with(b"}") {
            assert_ne!(stream.read_buf(&mut asked).await.expect("it reads"), 0);
        }
        let text = format!("HTTP/1.1 {head}\r\ncontent-length: 4\r\n\r\nhush");
        stream.write_all(text.as_bytes()).await.expect("it writes");
        String::from_utf8(asked).expect("it is text")
    }

    #[tokio::test]
    async fn calls_go_out_in_their_order_until_one_fails() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let upstream = Upstream::Tcp(listener.local_addr().expect("an address"));
        let served = async {
            let mut asked = Vec::new();
            for head in ["200 OK", "503 Busy"] {
                let (stream, _) = listener.accept().await.expect("a connection");
                asked.push(answer(stream, head).await);
            }
            asked
        };
        let spec = spec(&[("/a?level=1", None), ("/b", Some("{}")), ("/c", None)]);
        let moved = move_to(Residence::Parked, &spec, &upstream);
        let (asked, moved) = tokio::join!(served, moved);
        assert!(asked[0].starts_with("POST /a?level=1 HTTP/1.1\r\n"));
        assert!(asked[0].contains(&format!("\r\nhost: {}\r\n", upstream.host())));
        assert!(asked[1].starts_with("POST /b HTTP/1.1\r\n"));
        assert!(asked[1].contains("application/json") && asked[1].ends_with("{}"));
        let said = moved.expect_err("the second call failed").to_string();
        assert_eq!(said, "POST /b answered 503 Service Unavailable: hush");
    }

    #[tokio::test]
    async fn a_unix_socket_is_called_too() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("worker.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        let served = async {
            let (stream, _) = listener.accept().await.expect("a connection");
            answer(stream, "204 Done").await
        };
        let (spec, upstream) = (spec(&[("/wake_up", None)]), Upstream::Unix(path));
        let moved = move_to(Residence::Ready, &spec, &upstream);
        let (asked, moved) = tokio::join!(served, moved);
        assert!(asked.starts_with("POST /wake_up HTTP/1.1\r\n"));
        moved.expect("it was answered");
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_does_not_answer_is_given_up_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let upstream = Upstream::Tcp(listener.local_addr().expect("an address"));
        let spec = spec(&[("/sleep", None)]);
        let said = move_to(Residence::Parked, &spec, &upstream)
            .await
            .expect_err("nobody answers");
        let expected = "POST /sleep was not answered: all calls together may take 5 s";
        assert_eq!(said.to_string(), expected);
    }
}
