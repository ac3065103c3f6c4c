//! The least that hyper needs to pass HTTP/2 on: its server on one side, its
//! client with one connection for each of the client's on the other, on as many
//! threads as residentd has. What residentd costs more is residentd, less what its training
//! (`scripts/dist`) brings it: this has none.
//!
//! This same program, started as `proxy bare --listen ADDR --upstream ADDR`.

use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::worker::LIFE;

/// Passes on from `listen` to `upstream` to the end of its life.
pub(crate) fn run(listen: &str, upstream: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(crate::peers::threads())
        .enable_all()
        .build()
        .expect("a runtime");
    // At the end of its life it just ends.
    let _ = runtime.block_on(async { tokio::time::timeout(LIFE, serve(listen, upstream)).await });
}

async fn serve(listen: &str, upstream: &str) {
    let listener = TcpListener::bind(listen).await.expect("it is free");
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).expect("it can be set");
        let upstream = upstream.to_owned();
        connections.spawn(async move { pass(stream, &upstream).await });
        while connections.try_join_next().is_some() {}
    }
}

async fn pass(client: TcpStream, upstream: &str) {
    let stream = TcpStream::connect(upstream).await;
    let stream = stream.expect("the worker listens");
    stream.set_nodelay(true).expect("it can be set");
    let io = TokioIo::new(stream);
    let (sender, connection) = http2::handshake::<_, _, Incoming>(TokioExecutor::new(), io)
        .await
        .expect("the worker speaks HTTP/2");
    let mut towards = JoinSet::new();
    towards.spawn(connection);
    let service = service_fn(move |request: Request<Incoming>| {
        let mut sender = sender.clone();
        async move {
            let answer: Result<Response<Incoming>, _> = sender.send_request(request).await;
            answer
        }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    // An error is a client that left.
    let _ = builder
        .serve_connection(TokioIo::new(client), service)
        .await;
}
