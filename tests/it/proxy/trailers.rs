//! What comes behind a body in HTTP/1.1; for gRPC see `calls`.

use super::rig::Played;

#[test]
fn a36_trailers_of_http1_pass_both_ways_where_they_are_announced_and_wanted() {
    let played = Played::start();
    let mut client = played.client();
    client.put("POST /v1/x?model=m HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\nte: trailers\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n");
    client.put("3\r\nabc\r\n0\r\nx-sum: 7\r\n\r\n");
    let mut worker = played.worker();
    let head = worker.head();
    assert_eq!(head.get("te"), Some("trailers"));
    assert_eq!(head.get("trailer"), Some("x-sum"));
    let sent = b"3\r\nabc\r\n0\r\nx-sum: 7\r\n\r\n";
    assert_eq!(worker.exactly(sent.len()), sent);

    worker.put("HTTP/1.1 200 OK\r\ntrailer: x-took\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-took: 1\r\nx-unsaid: 2\r\n\r\n");
    drop(worker);
    let head = client.head();
    assert_eq!(head.get("trailer"), Some("x-took"));
    let answer = b"3\r\nabc\r\n0\r\nx-took: 1\r\n\r\n";
    assert_eq!(
        client.exactly(answer.len()),
        answer,
        "what was not announced stays"
    );
}
