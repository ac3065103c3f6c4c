//! How an exchange ends: by a client that leaves, and by a worker that breaks.

use super::rig::Played;
use crate::support::wire::Wire;
use crate::support::{runs, wait_until};

/// A client and a worker in the middle of an answer whose head is `head`.
fn answering(played: &Played, head: &str) -> (Wire, Wire) {
    let mut client = played.client();
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    let mut worker = played.worker();
    let asked = worker.head();
    worker.body(&asked);
    worker.put(format!("HTTP/1.1 200 OK\r\n{head}\r\n"));
    assert_eq!(client.head().status(), 200);
    (client, worker)
}

/// A client and a worker that has its request and has not answered.
fn asked(played: &Played) -> (Wire, Wire) {
    let mut client = played.client();
    client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
    let mut worker = played.worker();
    let head = worker.head();
    worker.body(&head);
    played.wait_for_leases(1);
    (client, worker)
}

#[test]
fn a34_a_client_that_leaves_before_the_answer_is_heard_of_by_the_worker() {
    let played = Played::start();
    let (client, worker) = asked(&played);
    drop(client);
    assert_eq!(worker.rest(), (Vec::new(), None));
    played.wait_for_leases(0);
}

/// Whoever closes its side for sending cannot be told from one that has left: most
/// that leave send nothing else. The answer to a request that is under way is given
/// up, as other proxies do.
#[test]
fn a37_a_client_that_closes_its_side_for_sending_counts_as_gone() {
    let played = Played::start();
    let (mut client, worker) = asked(&played);
    client.finish();
    assert_eq!(worker.rest(), (Vec::new(), None));
    played.wait_for_leases(0);
    assert_eq!(client.rest(), (Vec::new(), None));
    // In the midst of a body it is one that broke off.
    let mut client = played.client();
    let head = "POST /upstream/m/x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n";
    client.put(head);
    client.put(vec![b'x'; 100_000]);
    let mut worker = played.worker();
    worker.head();
    client.finish();
    let (rest, _) = worker.rest();
    assert!(rest.len() <= 100_000, "{}", rest.len());
    played.wait_for_leases(0);
}

#[test]
fn a34_a_client_that_leaves_in_the_middle_of_an_answer_is_heard_of_by_the_worker() {
    let played = Played::start();
    for head in ["content-length: 100\r\n", "transfer-encoding: chunked\r\n"] {
        let (mut client, mut worker) = answering(&played, head);
        if head.starts_with("content") {
            worker.put("abc");
            assert_eq!(client.exactly(3), b"abc");
        } else {
            worker.put_chunk("abc");
            assert_eq!(client.chunk().expect("a chunk"), b"abc");
        }
        played.wait_for_leases(1);
        drop(client);
        // Nothing is sent any more: the silence does not hide it.
        let (rest, _) = worker.rest();
        assert_eq!(rest, b"");
        played.wait_for_leases(0);
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_of_its_body_does_not_seem_to_have_ended_it() {
    let played = Played::start();
    for framing in ["content-length: 1000000", "transfer-encoding: chunked"] {
        let mut client = played.client();
        client.put(format!(
            "POST /upstream/m/x HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n"
        ));
        if framing.starts_with("content") {
            client.put(vec![b'x'; 100_000]);
        } else {
            client.put_chunk(vec![b'x'; 100_000]);
        }
        let mut worker = played.worker();
        worker.head();
        played.wait_for_leases(1);
        drop(client);
        let (rest, _) = worker.rest();
        assert!(rest.len() < 200_000);
        assert!(!rest.ends_with(b"0\r\n\r\n"), "{framing}: it looks whole");
        played.wait_for_leases(0);
        assert!(
            played.try_worker().is_none(),
            "half a body is not sent again"
        );
    }
}

#[test]
fn a31_an_answer_that_breaks_off_never_looks_complete() {
    let played = Played::start();
    for reset in [false, true] {
        let (client, mut worker) = answering(&played, "content-length: 100\r\n");
        worker.put("half of it");
        wait_for_bytes(&client);
        end(worker, reset);
        let (rest, _) = client.rest();
        assert_eq!(rest, b"half of it");

        let (client, mut worker) = answering(&played, "transfer-encoding: chunked\r\n");
        worker.put_chunk("half of it");
        wait_for_bytes(&client);
        end(worker, reset);
        let (rest, _) = client.rest();
        assert_eq!(rest, b"A\r\nhalf of it\r\n", "no last chunk");
    }
}

#[test]
fn a31_a_stream_that_breaks_off_between_two_events_says_so_and_is_cut() {
    let played = Played::start();
    let head = "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n";
    let (mut client, mut worker) = answering(&played, head);
    worker.put_chunk("data: 1\n\n");
    assert_eq!(client.chunk().expect("an event"), b"data: 1\n\n");
    drop(worker);
    client.error_event("worker_failed");
}

#[test]
fn a31_a_stream_that_breaks_off_within_an_event_is_cut_there() {
    let played = Played::start();
    let chunked = "content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n";
    let (mut client, mut worker) = answering(&played, chunked);
    worker.put_chunk("data: 1\n\ndata: {\"ha");
    assert!(client.chunk().is_some());
    drop(worker);
    // An error event here would end the half one, and it would pass for whole.
    assert_eq!(client.rest().0, b"");

    // Within a length that was promised, words of ours would fill it up.
    let sized = "content-type: text/event-stream\r\ncontent-length: 60\r\n";
    let (client, mut worker) = answering(&played, sized);
    worker.put("data: 1\n\n");
    wait_for_bytes(&client);
    drop(worker);
    assert_eq!(client.rest().0, b"data: 1\n\n");

    let packed = format!("{chunked}content-encoding: gzip\r\n");
    let (mut client, mut worker) = answering(&played, &packed);
    worker.put_chunk("\u{1f}packed\n\n");
    assert!(client.chunk().is_some());
    drop(worker);
    assert_eq!(client.rest().0, b"");
}

#[test]
fn a31_a_worker_that_is_killed_in_the_middle_of_an_answer_is_not_asked_again() {
    let residentd = super::rig::one("");
    for knobs in ["stream=true&x_chunks=50", "x_chunks=50"] {
        let path = format!("/upstream/m/v1/completions?{knobs}&x_pace_ms=2&x_exit_after=5");
        let answer = residentd.ask("POST", &path, Some("{}"));
        assert_eq!(answer.status, 200);
        assert!(!answer.complete, "{}", answer.text());
        wait_until("the crash to be seen", || {
            (residentd.model("m")["loaded"] == false).then_some(())
        });
    }
    assert_eq!(residentd.model("m")["loads"], 2);
}

#[test]
fn a_worker_killed_before_its_head_is_replaced_and_the_request_asked_once_more() {
    let residentd = super::rig::one("");
    let path = "/upstream/m/v1/completions?x_exit_after=0";
    let answer = residentd.ask("POST", path, Some("{}"));
    // The second one dies of the same request, and there is no third.
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert_eq!(residentd.model("m")["loads"], 2);
    wait_until("the second crash to be seen", || {
        (residentd.model("m")["loaded"] == false).then_some(())
    });
}

#[test]
fn an_upload_just_after_its_worker_was_killed_goes_to_the_next_one() {
    let residentd = super::rig::one("");
    let first = residentd.complete("m").worker_pid();
    let mut client = Wire::to(residentd.address());
    let pid = nix::unistd::Pid::from_raw(i32::try_from(first).expect("a pid fits"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it lives");
    // Gone, but perhaps not yet seen to be.
    wait_until("the worker to end", || (!runs(first)).then_some(()));
    client.ask("POST /upstream/m/sink", "", vec![b'x'; 1 << 20]);
    let (head, text) = client.answer();
    // Nobody had taken a byte of it when the connection was refused.
    assert_eq!(head.status(), 200, "{text}");
    assert_ne!(head.get("x-stub-pid"), Some(&*first.to_string()));
}

#[test]
fn a_head_that_makes_no_sense_is_a_502() {
    let played = Played::start();
    for nonsense in [
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        "hello\r\n\r\n",
    ] {
        let mut client = played.client();
        client.ask("POST /v1/x", "", "{\"model\":\"m\"}");
        std::thread::scope(|scope| {
            let asked = scope.spawn(move || client.answer());
            while !asked.is_finished() {
                if let Some(mut worker) = played.try_worker() {
                    worker.head();
                    worker.put(nonsense);
                }
                crate::support::pause(std::time::Duration::from_millis(1));
            }
            let (head, text) = asked.join().expect("no panic");
            assert_eq!(head.status(), 502, "{text}");
        });
        played.wait_for_leases(0);
    }
}

fn end(worker: Wire, reset: bool) {
    if reset {
        worker.reset();
    } else {
        drop(worker);
    }
}

/// Waits until bytes of the body are there, so that a reset that follows does
/// not overtake them.
fn wait_for_bytes(client: &Wire) {
    let mut one = [0];
    let seen = client.stream().peek(&mut one).expect("it is open");
    assert_eq!(seen, 1);
}
