//! The record of decisions over HTTP: lists, filters, and the stream.

use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use http_body_util::BodyExt;
use residentd::control::{EvictReason, KEPT, Refusal, What};
use residentd::model::{Bytes, Domain};
use serde_json::{Value, json};

use super::world::{World, at, call, name, nobody_asks};

fn evict(world: &World, model: &str, generation: u64) {
    let reason = EvictReason::MakeRoom {
        for_model: name("voice"),
        domain: Domain::Host,
        need: Bytes::mib(80),
        room: Bytes::mib(40),
    };
    let what = What::Evict {
        reason,
        charge: [(Domain::Host, Bytes::mib(64))].into(),
        kill: false,
    };
    world
        .recorder
        .keep(at(10), (Some(name(model)), Some(generation)), what);
}

fn refuse(world: &World, model: &str) {
    let refusal = Refusal::QueueFull {
        model: name(model),
        queued: 4,
    };
    let what = What::Refuse {
        refusal,
        requests: 3,
    };
    world.recorder.keep(at(20), (Some(name(model)), None), what);
}

fn pins(world: &World, count: usize) {
    for _ in 0..count {
        let what = What::Pin { pinned: true };
        world
            .recorder
            .keep(at(30), (Some(name("gemma")), None), what);
    }
}

async fn list(world: &World, query: &str) -> Value {
    let answer = world.get(&format!("/api/v1/events{query}")).await;
    assert_eq!(answer.status, 200, "{query}: {}", answer.body);
    answer.json()["data"].clone()
}

fn ids(page: &Value) -> Vec<u64> {
    let events = page["events"].as_array().expect("a list");
    let ids = events.iter().map(|event| event["id"].as_u64());
    ids.map(|id| id.expect("a number")).collect()
}

/// A stream that is read event by event.
struct Reader {
    response: Response<Body>,
    unread: String,
}

impl Reader {
    async fn open(world: &World, query: &str, last: Option<&str>) -> Self {
        let mut request = call("GET", &format!("/api/v1/events?follow=true{query}"), "");
        if let Some(last) = last {
            let last = last.parse().expect("a header");
            request.headers_mut().insert("last-event-id", last);
        }
        let response = world.open(request).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            response,
            unread: String::new(),
        }
    }

    /// Returns the next event without the empty line; `None` at the end.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.unread.split_once("\n\n") {
                let event = event.to_owned();
                self.unread = rest.to_owned();
                return Some(event);
            }
            let frame = self.response.frame().await?.expect("it does not fail");
            let data = frame.into_data().expect("no trailers");
            self.unread += std::str::from_utf8(&data).expect("text");
        }
    }

    async fn next_id(&mut self) -> u64 {
        let event = self.next().await.expect("it goes on");
        let id = event.lines().find_map(|line| line.strip_prefix("id: "));
        let (run, id) = id.and_then(|id| id.split_once(':')).expect(&event);
        assert_eq!(run, "1700000000000");
        id.parse().expect("a number")
    }
}

#[tokio::test]
async fn an_event_has_its_reason_its_numbers_and_a_sentence() {
    let world = World::new(nobody_asks);
    evict(&world, "gemma", 3);
    refuse(&world, "voice");
    let page = list(&world, "").await;
    assert_eq!(
        page,
        json!({
            "events": [
                {
                    "id": 1,
                    "at": 1_700_000_010.0,
                    "kind": "evict",
                    "reason": "make_room",
                    "model": "gemma",
                    "generation": 3,
                    "message": "gemma is evicted, which gives back host 64.00 MiB: make room for voice: it needs 80.00 MiB on host, there was room for 40.00 MiB",
                    "for_model": "voice",
                    "domain": "host",
                    "need": 83_886_080,
                    "room": 41_943_040,
                    "charge": {"host": 67_108_864},
                    "kill": false,
                },
                {
                    "id": 2,
                    "at": 1_700_000_020.0,
                    "kind": "refuse",
                    "reason": "queue_full",
                    "model": "voice",
                    "message": "voice is refused (requests: 3): the queue of voice is full: 4 requests wait",
                    "queued": 4,
                    "requests": 3,
                },
            ],
            "next": "1700000000000:2",
            "missed": 0,
            "kept": KEPT,
        })
    );
}

#[tokio::test]
async fn events_are_picked_by_model_kind_and_place_and_limited() {
    let world = World::new(nobody_asks);
    evict(&world, "gemma", 1);
    refuse(&world, "voice");
    evict(&world, "voice", 2);
    pins(&world, 2);
    for (query, expected) in [
        ("", vec![1, 2, 3, 4, 5]),
        ("?limit=2", vec![4, 5]),
        ("?since=1&limit=2", vec![2, 3]),
        ("?since=1700000000000:3", vec![4, 5]),
        ("?since=5", vec![]),
        ("?model=voice", vec![2, 3]),
        ("?model=gpt-4o-mini&kind=evict", vec![1]),
        ("?kind=evict,refuse", vec![1, 2, 3]),
        ("?kind=limit", vec![]),
        // Of another run of residentd: everything here is new to the reader.
        ("?since=1600000000000:3&limit=1", vec![1]),
    ] {
        assert_eq!(ids(&list(&world, query).await), expected, "{query}");
    }
    for (bad, status) in [
        ("kind=evicts", 400),
        ("since=then", 400),
        ("limit=1001", 400),
        ("limit=all", 400),
        ("follow=perhaps", 400),
        ("frobnicate=1", 400),
        ("model=nobody", 404),
    ] {
        let answer = world.get(&format!("/api/v1/events?{bad}")).await;
        assert_eq!(answer.status, status, "{bad}: {}", answer.body);
    }
    let answer = world.get("/api/v1/events?kind=evicts").await;
    let message = answer.json()["detail"].clone();
    let message = message.as_str().expect("a text");
    assert!(
        message.contains("spawn, ready, prefetch, wait, evict"),
        "{message}"
    );
}

#[tokio::test]
async fn only_the_newest_are_kept_and_a_list_says_what_is_not() {
    let world = World::new(nobody_asks);
    pins(&world, KEPT + 300);
    let page = list(&world, "?since=100&limit=1000").await;
    assert_eq!(ids(&page).len(), KEPT);
    assert_eq!(
        (&page["missed"], &page["events"][0]["id"]),
        (&json!(200), &json!(301))
    );
    assert_eq!(page["next"], "1700000000000:1300");
    assert_eq!(
        ids(&list(&world, "?since=1700000000000:1300").await),
        [0_u64; 0]
    );
}

#[tokio::test(start_paused = true)]
async fn a_follower_gets_what_there_is_then_what_comes_and_a_sign_of_life() {
    let world = World::new(nobody_asks);
    evict(&world, "gemma", 1);
    let mut reader = Reader::open(&world, "", None).await;
    assert_eq!(reader.next().await.as_deref(), Some("retry: 1000"));
    assert_eq!(reader.next_id().await, 1);
    let before = tokio::time::Instant::now();
    assert_eq!(reader.next().await.as_deref(), Some(": still here"));
    assert_eq!(before.elapsed(), Duration::from_secs(15));
    refuse(&world, "voice");
    let event = reader.next().await.expect("it goes on");
    let data = event.split_once("data: ").expect("data").1;
    let data: Value = serde_json::from_str(data).expect("JSON");
    assert_eq!(
        (&data["kind"], &data["requests"]),
        (&json!("refuse"), &json!(3))
    );
    assert_eq!(
        event.lines().count(),
        2,
        "an id and a line of data: {event}"
    );
    drop(world);
    assert_eq!(reader.next().await, None, "the controller has ended");
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_goes_on_where_it_was() {
    let world = World::new(nobody_asks);
    pins(&world, 3);
    let mut reader = Reader::open(&world, "&since=2", Some("1700000000000:1")).await;
    assert_eq!(reader.next().await.as_deref(), Some("retry: 1000"));
    assert_eq!(
        (reader.next_id().await, reader.next_id().await),
        (2, 3),
        "where the browser was counts more than the address"
    );
    let mut other_run = Reader::open(&world, "", Some("1600000000000:2")).await;
    other_run.next().await;
    assert_eq!(other_run.next_id().await, 1);
    let mut filtered = Reader::open(&world, "&kind=evict", Some("1700000000000:1")).await;
    filtered.next().await;
    evict(&world, "gemma", 1);
    assert_eq!(filtered.next_id().await, 4);
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_holds_nobody_up_and_is_told_what_it_missed() {
    let world = World::new(nobody_asks);
    pins(&world, 1);
    let mut reader = Reader::open(&world, "", None).await;
    reader.next().await;
    assert_eq!(reader.next_id().await, 1);
    // Nobody reads meanwhile; every one of these returns at once.
    pins(&world, 5 * KEPT);
    let missed = reader.next().await.expect("it goes on");
    assert_eq!(missed, "event: missed\ndata: {\"missed\":4000}");
    for expected in 4002..=5001 {
        assert_eq!(reader.next_id().await, expected);
    }
    pins(&world, 1);
    assert_eq!(reader.next_id().await, 5002);
}
