//! One end of a pair of sockets is a worker.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderValue, TRAILER};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::super::upload::RequestBody;
use super::*;
use crate::model::Bytes as Size;

/// A connection, and the worker's end of it.
fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    (Connection::new(Stream::Unix(ours)), theirs)
}

fn request(connection: &mut Connection, pieces: &[Bytes], trailers: &[&'static str]) -> Upload {
    let mut room = connection.room();
    room.extend_from_slice(b"POST / HTTP/1.1\r\n");
    let (mut announced, mut sent) = (HeaderMap::new(), HeaderMap::new());
    for name in trailers {
        announced.append(TRAILER, HeaderValue::from_static(name));
    }
    sent.insert("x-sum", HeaderValue::from_static("1"));
    sent.insert("x-unsaid", HeaderValue::from_static("2"));
    sent.insert("content-length", HeaderValue::from_static("3"));
    let pieces = pieces.iter().cloned().collect::<VecDeque<_>>();
    let body = RequestBody::new(pieces, None, Size::mib(64), None);
    let body = body.with_trailers((!trailers.is_empty()).then_some(sent));
    Upload::new(room, &announced, body)
}

async fn heard(worker: &mut UnixStream, end: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    while !all.ends_with(end) {
        assert!(worker.read_buf(&mut all).await.expect("it is read") > 0);
    }
    all
}

async fn ask(mut connection: Connection, worker: &mut UnixStream, says: &str) -> Answer {
    let upload = request(&mut connection, &[Bytes::from_static(b"body")], &[]);
    let (asked, ()) = tokio::join!(connection.ask(upload, (false, false)), async {
        let all = heard(worker, b"body").await;
        assert_eq!(all, b"POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\nbody");
        worker
            .write_all(says.as_bytes())
            .await
            .expect("it is written");
    });
    answer_of(asked)
}

fn answer_of(asked: Result<Response<answer::Answer>, Failed>) -> Answer {
    let response = asked.expect("an answer");
    assert_eq!(response.status(), 200);
    match response.into_body() {
        answer::Answer::Http1(answer) => answer,
        other @ answer::Answer::Http2(..) => panic!("{other:?}"),
    }
}

async fn read(answer: &mut Answer) -> Result<Vec<u8>, WireError> {
    let mut all = Vec::new();
    while let Some(frame) = poll_fn(|cx| answer.poll_frame(cx)).await {
        let data = frame?.into_data();
        all.extend_from_slice(&data.unwrap_or_default());
    }
    Ok(all)
}

#[tokio::test]
async fn one_request_follows_the_other_until_the_worker_says_close() {
    let (mut connection, mut worker) = pair();
    for _ in 0..3 {
        assert_eq!(connection.standing(), Standing::Ready);
        let says = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes";
        let mut answer = ask(connection, &mut worker, says).await;
        assert_eq!(read(&mut answer).await.expect("an answer"), b"yes");
        connection = answer.take().expect("it serves another");
    }
    let says = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nyes";
    let mut answer = ask(connection, &mut worker, says).await;
    assert_eq!(read(&mut answer).await.expect("an answer"), b"yes");
    assert!(answer.take().is_none());
}

#[tokio::test]
async fn one_on_which_the_worker_said_more_or_ended_serves_no_other() {
    let says = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyesHTTP/1.1 200 OK\r\n\r\n";
    let (connection, mut worker) = pair();
    let mut answer = ask(connection, &mut worker, says).await;
    assert_eq!(read(&mut answer).await.expect("an answer"), b"yes");
    assert!(answer.take().is_none(), "more than the answer came");

    for says in ["HTTP/1.1 408 Late\r\n\r\n", ""] {
        let (mut connection, mut worker) = pair();
        worker
            .write_all(says.as_bytes())
            .await
            .expect("it is written");
        drop(worker);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(connection.standing(), Standing::Ended);
        let upload = request(&mut connection, &[], &[]);
        let failed = connection.ask(upload, (false, false)).await;
        let failed = failed.expect_err("nobody is there");
        assert!(matches!(failed, Failed::Unsent(_)), "{failed:?}");
    }
}

/// An answer that is whole before its request is.
async fn early() -> (Answer, UnixStream) {
    let (mut connection, mut worker) = pair();
    let body = Bytes::from(vec![b'x'; 4 << 20]);
    let upload = request(&mut connection, &[body], &[]);
    let says = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes";
    let (asked, written) = tokio::join!(
        connection.ask(upload, (false, false)),
        worker.write_all(says)
    );
    written.expect("it is written");
    let mut answer = answer_of(asked);
    assert_eq!(read(&mut answer).await.expect("an answer"), b"yes");
    (answer, worker)
}

#[tokio::test]
async fn a_body_is_written_to_its_end_after_an_answer_that_came_early() {
    let (mut answer, mut worker) = early().await;
    let mut connection = answer.take().expect("it is not done");
    assert_eq!(connection.standing(), Standing::Busy);
    let head = b"POST / HTTP/1.1\r\ncontent-length: 4194304\r\n\r\n";
    let mut all = vec![0; head.len() + (4 << 20)];
    worker.read_exact(&mut all).await.expect("all of it comes");
    assert!(all.starts_with(head) && all.ends_with(b"xxx"));
    while connection.standing() == Standing::Busy {
        tokio::task::yield_now().await;
    }
    assert_eq!(connection.standing(), Standing::Ready);
}

#[tokio::test]
async fn whoever_leaves_the_answer_ends_the_body_too() {
    let (answer, mut worker) = early().await;
    drop(answer);
    let mut all = Vec::new();
    let read = worker.read_to_end(&mut all).await;
    assert!(read.expect("it is read") < 4 << 20, "it never seems whole");
}

#[tokio::test]
async fn chunks_end_with_the_trailers_that_were_announced() {
    let large = Bytes::from(vec![b'x'; 5000]);
    for last in [Bytes::from_static(b"last"), large.clone()] {
        let (mut connection, mut worker) = pair();
        let pieces = [Bytes::from_static(b"one"), large.clone(), last.clone()];
        let upload = request(&mut connection, &pieces, &["X-Sum, content-length"]);
        let asked = tokio::join!(connection.ask(upload, (false, false)), async {
            let all = heard(&mut worker, b"\r\nx-sum: 1\r\n\r\n").await;
            worker.shutdown().await.expect("it closes");
            all
        });
        let all = String::from_utf8(asked.1).expect("text");
        let chunk = |bytes: &Bytes| {
            format!(
                "{:x}\r\n{}\r\n",
                bytes.len(),
                String::from_utf8_lossy(bytes)
            )
        };
        let chunks: String = pieces.iter().map(chunk).collect();
        assert_eq!(
            all,
            format!(
                "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n{chunks}0\r\nx-sum: 1\r\n\r\n"
            )
        );
        let failed = asked.0.expect_err("there is no answer");
        assert!(matches!(failed, Failed::Broke(_)), "{failed:?}");
    }
}

#[tokio::test]
async fn a_body_is_written_to_its_end_also_when_nobody_keeps_its_connection() {
    let (mut answer, mut worker) = early().await;
    drop(answer.take().expect("it is not done"));
    let mut all = Vec::new();
    worker.read_to_end(&mut all).await.expect("it is read");
    assert!(all.len() > 4 << 20 && all.ends_with(b"xxx"));
}

#[tokio::test]
async fn one_that_the_worker_had_closed_is_told_from_one_that_broke() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.expect("a port");
    let address = listener.local_addr().expect("it is bound");
    let stream = tokio::net::TcpStream::connect(address).await;
    let (worker, _) = listener.accept().await.expect("a connection");
    drop(worker);
    let connection = Connection::new(Stream::Tcp(stream.expect("a connection")));
    // As one that comes from another thread's runtime: nothing is known of it here.
    let mut connection = connection.moved_here().expect("it is ready");
    let upload = request(&mut connection, &[Bytes::from_static(b"body")], &[]);
    let failed = connection.ask(upload, (false, false)).await;
    let failed = failed.expect_err("nobody is there");
    assert!(matches!(failed, Failed::Unsent(_)), "{failed:?}");
}

/// Returns how many bytes a worker's socket takes at once while nobody reads.
fn taken_at_once() -> usize {
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).expect("a socket option");
    let large = vec![0; 8 << 20];
    let parts = [&large[..100], &large].map(std::io::IoSlice::new);
    std::io::Write::write_vectored(&mut &ours, &parts).expect("some is taken")
}

#[tokio::test]
async fn a_worker_may_take_a_chunk_in_any_two_pieces() {
    let head = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n";
    let taken = taken_at_once();
    for short in 0..4 {
        let (mut connection, mut worker) = pair();
        let line = format!("{taken:x}\r\n").len();
        let size = taken - head.len() - line - short;
        let pieces = [Bytes::from(vec![b'x'; size])];
        let upload = request(&mut connection, &pieces, &["x-sum"]);
        let (asked, all) = tokio::join!(connection.ask(upload, (false, false)), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let all = heard(&mut worker, b"\r\n0\r\nx-sum: 1\r\n\r\n").await;
            let says = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            worker.write_all(says).await.expect("it is written");
            all.len()
        });
        assert!(answer_of(asked).is_end());
        let whole = head.len() + line + size + "\r\n0\r\nx-sum: 1\r\n\r\n".len();
        assert_eq!(all, whole, "{short} bytes before the end of what is taken");
    }
}
