//! Who may change state.

use std::net::SocketAddr;

use residentd::api::PeerAddr;
use residentd::control::{Command, LimitReport};
use residentd::model::Bytes;

use super::world::{World, call, local, nobody_asks};

const CHANGE: &str = "/api/v1/memory/limit?limit_gb=4";

fn agree(command: Command) {
    let Command::Limit { request, reply } = command else {
        panic!("not a limit: {command:?}");
    };
    let limit = request.limit.unwrap_or(Bytes::gib(1));
    let _ = reply.send(Ok(LimitReport {
        limit,
        effective: limit,
        usage: Bytes::ZERO,
    }));
}

#[tokio::test]
async fn a55_only_callers_on_this_machine_change_state_and_anyone_may_look() {
    let away = PeerAddr(Some(SocketAddr::from(([192, 168, 1, 20], 5000))));
    let world = World::new(nobody_asks);
    for peer in [Some(away), None] {
        let answer = world.send(call("POST", CHANGE, ""), peer).await;
        assert_eq!(answer.status, 403, "{peer:?}");
        assert_eq!(answer.json()["error"]["code"], "forbidden");
        let looked = world
            .send(call("GET", "/api/v1/memory/stats", ""), peer)
            .await;
        assert_eq!(looked.status, 200, "{peer:?}");
    }
    let world = World::new(agree);
    for peer in [local(), PeerAddr(None)] {
        let answer = world.send(call("POST", CHANGE, ""), Some(peer)).await;
        assert_eq!(answer.status, 200, "{peer:?}");
    }
}

#[tokio::test]
async fn a_page_of_another_origin_changes_nothing() {
    let world = World::new(nobody_asks);
    let mut request = call("POST", CHANGE, "");
    let origin = "http://evil.example".parse().expect("a header");
    request.headers_mut().insert("origin", origin);
    assert_eq!(world.send(request, Some(local())).await.status, 403);

    let world = World::new(agree);
    let mut request = call("POST", CHANGE, "");
    let origin = "http://localhost:8080".parse().expect("a header");
    request.headers_mut().insert("origin", origin);
    assert_eq!(world.send(request, Some(local())).await.status, 200);
}

#[tokio::test]
async fn nothing_changes_by_get() {
    let world = World::new(nobody_asks);
    for path in [
        CHANGE,
        "/api/v1/memory/cleanup",
        "/api/v1/models/gemma/unload",
    ] {
        let answer = world.send(call("GET", path, ""), Some(local())).await;
        assert_eq!(answer.status, 405, "{path}");
        assert_eq!(answer.header("allow"), "POST", "{path}");
    }
}
