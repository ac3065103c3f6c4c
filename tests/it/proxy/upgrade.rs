//! Connections that leave HTTP, as a websocket does.

use super::rig::Played;
use crate::support::wire::Wire;

const ASK: &str = "GET /upstream/m/ws?x=1 HTTP/1.1\r\nhost: x\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: a2V5\r\n\r\n";
const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: eHk=\r\n\r\n";

/// Both ends of a connection that has switched.
fn switched(played: &Played) -> (Wire, Wire) {
    let mut client = played.client();
    client.put(ASK);
    let mut worker = played.worker();
    let head = worker.head();
    assert_eq!(head.line, "GET /ws?x=1 HTTP/1.1");
    assert_eq!(head.get("upgrade"), Some("websocket"));
    assert_eq!(head.get("connection"), Some("upgrade"));
    assert_eq!(head.get("sec-websocket-key"), Some("a2V5"));
    // The first bytes may come together with the head.
    worker.put(format!("{SWITCH}hello"));
    let head = client.head();
    assert_eq!(head.status(), 101);
    assert_eq!(head.get("upgrade"), Some("websocket"));
    assert_eq!(head.get("sec-websocket-accept"), Some("eHk="));
    assert_eq!(client.exactly(5), b"hello");
    (client, worker)
}

#[test]
fn after_an_upgrade_bytes_pass_both_ways_and_the_lease_is_held() {
    let played = Played::start();
    let (mut client, mut worker) = switched(&played);
    played.wait_for_leases(1);
    for number in 0..200_u32 {
        let (up, down) = (number.to_be_bytes(), number.to_le_bytes());
        client.put(up);
        assert_eq!(worker.exactly(4), up);
        worker.put(down);
        assert_eq!(client.exactly(4), down);
    }
    let block: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_be_bytes()[3]).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| client.put(&block));
        assert!(worker.exactly(block.len()) == block);
    });
    played.wait_for_leases(1);
}

#[test]
fn an_upgraded_connection_ends_when_either_side_closes() {
    let played = Played::start();
    for client_first in [true, false] {
        let (client, worker) = switched(&played);
        let (leaves, stays) = if client_first {
            (client, worker)
        } else {
            (worker, client)
        };
        drop(leaves);
        assert_eq!(stays.rest().0, b"");
        played.wait_for_leases(0);
    }
}

#[test]
fn a_side_that_does_not_hear_of_the_end_is_left_in_time() {
    let played = Played::start();
    for client_first in [true, false] {
        let (client, worker) = switched(&played);
        let (mut leaves, mut stays) = if client_first {
            (client, worker)
        } else {
            (worker, client)
        };
        // What was said before the end arrives, and what is said just after.
        leaves.put("bye");
        leaves.finish();
        assert_eq!(stays.exactly(3), b"bye");
        stays.put("and you");
        assert_eq!(leaves.exactly(7), b"and you");
        // `stays` never closes.
        played.wait_for_leases(0);
    }
}

#[test]
fn a_worker_that_does_not_switch_answers_as_ever() {
    let played = Played::start();
    let mut client = played.client();
    client.put(ASK);
    let mut worker = played.worker();
    worker.head();
    worker.put("HTTP/1.1 426 Upgrade Required\r\ncontent-length: 2\r\n\r\nno");
    let (head, text) = client.answer();
    assert_eq!((head.status(), &*text), (426, "no"));
    played.wait_for_leases(0);
}

#[test]
fn an_upgraded_connection_ends_with_its_worker() {
    let played = Played::start();
    let (client, worker) = switched(&played);
    drop(worker);
    assert_eq!(client.rest().0, b"");
    played.wait_for_leases(0);
}
