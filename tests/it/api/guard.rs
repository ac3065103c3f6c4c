//! Who may change state.

use std::net::SocketAddr;

use axum::http::{HeaderValue, Version};
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
async fn a55_the_repository_is_changed_from_this_machine_only_and_listed_by_anyone() {
    let away = PeerAddr(Some(SocketAddr::from(([192, 168, 1, 20], 5000))));
    let world = World::new(nobody_asks);
    for wish in ["load", "unload"] {
        let path = format!("/v2/repository/models/a/{wish}");
        let answer = world.send(call("POST", &path, ""), Some(away)).await;
        assert_eq!(answer.status, 403, "{wish}");
        assert!(
            answer.json()["error"].is_string(),
            "in the protocol's shape"
        );
    }
    for method in ["RepositoryModelLoad", "RepositoryModelUnload", "ServerLive"] {
        let path = format!("/inference.GRPCInferenceService/{method}");
        let mut request = call("POST", &path, "");
        *request.version_mut() = Version::HTTP_2;
        let kind = HeaderValue::from_static("application/grpc");
        request.headers_mut().insert("content-type", kind);
        let answer = world.send(request, Some(away)).await;
        assert_eq!(answer.status, 200, "{method}");
        // The one that may is told that it sent no message.
        let expected = if method == "ServerLive" { "3" } else { "7" };
        assert_eq!(answer.header("grpc-status"), expected, "{method}");
    }
    let index = call("POST", "/v2/repository/index", "");
    let answer = world.send(index, Some(away)).await;
    assert_eq!(answer.status, 200, "reading is open");
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
