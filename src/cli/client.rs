//! Talks to a running residentd over TCP or a Unix socket.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use std::{fmt, io};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use super::access::{self, AccessError};
use super::args::ClientArgs;
use crate::telemetry;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where residentd listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// `http://HOST:PORT`, kept as `HOST:PORT`.
    Tcp(String),
    /// `https://HOST:PORT`, likewise.
    Tls(String),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl FromStr for Server {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "a server is http://HOST:PORT, https://HOST:PORT or unix:PATH";
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(EXPECTED)
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let plain = text.strip_prefix("http://");
        let encrypted = text.strip_prefix("https://");
        let authority = plain.or(encrypted).ok_or(EXPECTED)?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let authority: hyper::http::uri::Authority = authority.parse().map_err(|_| EXPECTED)?;
        if authority.host().is_empty() || authority.as_str().contains('@') {
            return Err(EXPECTED);
        }
        let or = |port: u16| match authority.port() {
            Some(_) => authority.to_string(),
            None => format!("{authority}:{port}"),
        };
        Ok(match plain {
            Some(_) => Self::Tcp(or(80)),
            None => Self::Tls(or(443)),
        })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(authority) => write!(f, "http://{authority}"),
            Self::Tls(authority) => write!(f, "https://{authority}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nobody listens there.
    #[error(
        "no residentd answers at {server}: start it with `residentd serve`, or name it with --server"
    )]
    NoAnswer {
        /// Where.
        server: Server,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("{server} broke off before its answer was whole")]
    Broken {
        /// Where.
        server: Server,
        /// Why.
        source: hyper::Error,
    },
    /// What answers does not speak this API.
    #[error("what answers at {server} is not residentd: status {status} without its envelope")]
    Stranger {
        /// Where.
        server: Server,
        /// What it answered.
        status: StatusCode,
    },
    /// residentd refused.
    #[error("{}", refused(message, last_lines, problems))]
    Refused {
        /// Its reason.
        message: String,
        /// What the worker printed last, where that explains it.
        last_lines: Vec<String>,
        /// Everything that is wrong with the configuration, where that is why.
        problems: Vec<ConfigProblem>,
        /// The whole answer.
        body: String,
    },
}

impl CallError {
    /// Returns whether a configuration with errors is why.
    pub(super) fn is_wrong_config(&self) -> bool {
        matches!(self, Self::Refused { problems, .. } if !problems.is_empty())
    }
}

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct ConfigProblem {
    /// What it is and how to mend it.
    pub(super) message: String,
}

fn refused(message: &str, last_lines: &[String], problems: &[ConfigProblem]) -> String {
    let mut text = message.to_owned();
    for problem in problems {
        text.push_str("\n  ");
        text.push_str(&problem.message);
    }
    if !last_lines.is_empty() {
        text.push_str("\nits last lines were:");
    }
    for line in last_lines {
        text.push_str("\n  ");
        text.push_str(line);
    }
    text
}

/// An answer that was a success, whole.
#[derive(Debug)]
pub(super) struct Answer {
    server: Server,
    status: StatusCode,
    /// The body as it came.
    pub(super) body: String,
}

impl Answer {
    /// Returns what is under `data`.
    pub(super) fn data<T: DeserializeOwned>(&self) -> Result<T, CallError> {
        let parsed: Result<Envelope<T>, _> = serde_json::from_str(&self.body);
        parsed
            .map(|envelope| envelope.data)
            .map_err(|_| CallError::Stranger {
                server: self.server.clone(),
                status: self.status,
            })
    }
}

#[derive(Deserialize)]
struct Envelope<T> {
    data: T,
}

#[derive(Deserialize)]
struct Failure {
    error: FailureParts,
}

#[derive(Deserialize)]
struct FailureParts {
    message: String,
    #[serde(default)]
    last_lines: Vec<String>,
    #[serde(default)]
    problems: Vec<ConfigProblem>,
}

/// One residentd, asked one thing at a time, each on a connection of its own.
#[derive(Debug)]
pub(super) struct Client {
    server: Server,
    token: Option<HeaderValue>,
    way: Way,
}

/// How the server is reached.
enum Way {
    Tcp(String),
    Tls(String, ServerName<'static>, TlsConnector),
    Unix(PathBuf),
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp(_) => "Tcp",
            Self::Tls(..) => "Tls",
            Self::Unix(_) => "Unix",
        })
    }
}

impl Client {
    /// Names whom to ask, and reads what is needed for that; nothing is sent yet.
    pub(super) fn new(args: &ClientArgs) -> Result<Self, AccessError> {
        let token = args.access.token()?.map(|token| {
            let value = format!("Bearer {}", token.reveal());
            let value = HeaderValue::try_from(value);
            let mut value = value.expect("a token is visible ASCII");
            value.set_sensitive(true);
            value
        });
        let way = match &args.server {
            Server::Tcp(authority) => Way::Tcp(authority.clone()),
            Server::Tls(authority) => {
                let name = access::server_name(authority)?;
                Way::Tls(authority.clone(), name, args.access.tls()?)
            }
            Server::Unix(path) => Way::Unix(path.clone()),
        };
        Ok(Self {
            server: args.server.clone(),
            token,
            way,
        })
    }

    /// Asks and reads the whole answer.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<Answer, CallError> {
        let response = self.send(method, path, body, "application/json").await?;
        let status = response.status();
        let body = self.whole(response.into_body()).await?;
        Ok(Answer {
            server: self.server.clone(),
            status,
            body,
        })
    }

    /// Asks for something long, to be read as it comes with [`Client::next`].
    pub(super) async fn open(&self, path: &str, accept: &str) -> Result<Incoming, CallError> {
        let response = self.send(Method::GET, path, String::new(), accept).await?;
        Ok(response.into_body())
    }

    /// Returns the next bytes of a body; `None` at its end.
    pub(super) async fn next(&self, body: &mut Incoming) -> Result<Option<Bytes>, CallError> {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|source| self.broken(source))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: String,
        accept: &str,
    ) -> Result<Response<Incoming>, CallError> {
        let host = match &self.server {
            Server::Tcp(authority) | Server::Tls(authority) => authority.as_str(),
            Server::Unix(_) => "localhost",
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, host)
            .header(ACCEPT, accept)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("paths are built from checked names and numbers");
        if let Some(token) = &self.token {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        let response = match &self.way {
            Way::Tcp(authority) => {
                let stream = self.connected(TcpStream::connect(authority)).await?;
                self.exchange(stream, request).await?
            }
            Way::Tls(authority, name, tls) => {
                let encrypted = async {
                    let stream = TcpStream::connect(authority).await?;
                    tls.connect(name.clone(), stream).await
                };
                let stream = self.connected(encrypted).await?;
                self.exchange(stream, request).await?
            }
            Way::Unix(path) => {
                let stream = self.connected(UnixStream::connect(path)).await?;
                self.exchange(stream, request).await?
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.refusal(response).await)
    }

    async fn connected<S>(
        &self,
        connecting: impl Future<Output = io::Result<S>>,
    ) -> Result<S, CallError> {
        let in_time = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await;
        in_time
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|source| CallError::NoAnswer {
                server: self.server.clone(),
                source,
            })
    }

    async fn exchange<S>(
        &self,
        stream: S,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, CallError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let broken = |source| self.broken(source);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        // It ends with the last body read from it; what breaks is seen there.
        telemetry::spawn("connection", connection);
        sender.send_request(request).await.map_err(broken)
    }

    async fn refusal(&self, response: Response<Incoming>) -> CallError {
        let status = response.status();
        let body = match self.whole(response.into_body()).await {
            Ok(body) => body,
            Err(error) => return error,
        };
        match serde_json::from_str::<Failure>(&body) {
            Ok(failure) => CallError::Refused {
                message: failure.error.message,
                last_lines: failure.error.last_lines,
                problems: failure.error.problems,
                body,
            },
            Err(_) => CallError::Stranger {
                server: self.server.clone(),
                status,
            },
        }
    }

    async fn whole(&self, body: Incoming) -> Result<String, CallError> {
        let bytes = body.collect().await.map_err(|source| self.broken(source))?;
        Ok(String::from_utf8_lossy(&bytes.to_bytes()).into_owned())
    }

    fn broken(&self, source: hyper::Error) -> CallError {
        CallError::Broken {
            server: self.server.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_an_http_address_or_a_unix_socket() {
        let server = |text: &str| text.parse::<Server>().map(|server| server.to_string());
        for (text, shown) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("http://box.lan:9911/", "http://box.lan:9911"),
            ("http://box.lan", "http://box.lan:80"),
            ("https://box.lan", "https://box.lan:443"),
            ("http://[::1]:8080", "http://[::1]:8080"),
            (
                "unix:/run/residentd/http.sock",
                "unix:/run/residentd/http.sock",
            ),
        ] {
            assert_eq!(server(text), Ok(shown.to_owned()), "{text}");
        }
        for bad in [
            "",
            "unix:",
            "http://",
            "https://",
            "ftp://box.lan",
            "127.0.0.1:8080",
            "http://box.lan/api",
            "http://me@box.lan",
        ] {
            assert!(server(bad).is_err(), "{bad}");
        }
    }
}
