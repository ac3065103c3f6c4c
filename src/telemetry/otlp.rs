//! Where spans go: to a collector, by OTLP over HTTP, in batches, from a thread
//! of the library's own. A collector that is slow or gone costs spans.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use opentelemetry::trace::TracerProvider;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tracing::{debug, warn};

/// Where collectors take spans.
const PATH: &str = "/v1/traces";
/// The longest that one batch may take.
const LIMIT: Duration = Duration::from_secs(10);
/// A collector's answer is read up to this many bytes.
const ANSWER: usize = 64 << 10;
/// The longest that the last batch is waited for at an end.
const LAST: Duration = Duration::from_secs(2);

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
#[error("set up the export of spans")]
pub struct TracesError(#[from] ExporterBuildError);

/// Makes spans and sends them. Cheap to clone.
#[derive(Clone)]
pub struct Traces {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces").finish_non_exhaustive()
    }
}

impl Traces {
    /// Begins to send spans to the collector at this base address, as those of
    /// `service`: of a share of the requests, where their client has not decided.
    /// To be called in a runtime, which carries the requests to the collector.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub fn start(endpoint: &str, service: &str, ratio: f64) -> Result<Self, TracesError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Client(Handle::current()))
            .with_endpoint(format!("{endpoint}{PATH}"))
            .with_timeout(LIMIT)
            .build()?;
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio)));
        let resource = Resource::builder().with_service_name(service.to_owned());
        let provider = SdkTracerProvider::builder()
            .with_sampler(sampler)
            .with_resource(resource.build())
            .with_batch_exporter(exporter)
            .build();
        Ok(Self {
            tracer: provider.tracer("residentd"),
            provider,
        })
    }

    /// Returns what makes spans.
    #[must_use]
    pub fn tracer(&self) -> &SdkTracer {
        &self.tracer
    }

    /// Sends what is not sent yet, and nothing after that; waits a moment for it.
    /// Blocks.
    pub fn finish(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST) {
            warn!(%error, "the last spans were not sent");
        }
    }
}

/// Carries batches by connections of the runtime.
#[derive(Debug)]
struct Client(Handle);

type Sent<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

impl HttpClient for Client {
    // What `async_trait` makes of an asynchronous function.
    fn send_bytes<'a, 'b>(&'a self, request: Request<Bytes>) -> Sent<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        // The thread that waits for it has no runtime of its own, for timers neither.
        let sent = async move { tokio::time::timeout(LIMIT, post(request)).await };
        let sent = self.0.spawn(sent);
        Box::pin(async move {
            let sent = sent.await??;
            if let Err(error) = &sent {
                debug!(%error, "a batch of spans was not taken");
            }
            sent
        })
    }
}

async fn post(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut head, body) = request.into_parts();
    let authority = head.uri.authority().ok_or("the address has no host")?;
    let host = authority.host().trim_matches(['[', ']']).to_owned();
    let port = authority.port_u16().unwrap_or(80);
    head.headers.insert(HOST, authority.as_str().parse()?);
    let target = head.uri.path_and_query().map_or("/", |both| both.as_str());
    head.uri = Uri::try_from(target)?;
    let stream = TcpStream::connect((host, port)).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::from_parts(head, Full::new(body));
    let answered = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, ANSWER).collect().await?.to_bytes();
        drop(sender);
        Ok(Response::from_parts(head, body))
    };
    tokio::pin!(answered, connection);
    tokio::select! {
        biased;
        answered = &mut answered => answered,
        ended = &mut connection => {
            ended?;
            // What was read before the end is there.
            answered.await
        }
    }
}
