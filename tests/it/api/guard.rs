//! Who may change state.

use std::net::SocketAddr;

use axum::http::{HeaderValue, Version};
use residentd::api::{PeerAddr, Standing};
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

#[tokio::test]
async fn a55_an_operators_token_is_good_from_anywhere_and_nothing_else_is() {
    let away = Some(PeerAddr(Some(SocketAddr::from(([192, 168, 1, 20], 5000)))));
    let with = |method, path, standing: Standing| {
        let mut request = call(method, path, "");
        request.extensions_mut().insert(standing);
        request
    };
    let world = World::new(agree);
    let admin = with("POST", CHANGE, Standing::Admin);
    assert_eq!(world.send(admin, away).await.status, 200);
    let world = World::new(nobody_asks);
    for (standing, status) in [
        (Standing::NotAsked, 403),
        (Standing::Unknown, 401),
        (Standing::Inference, 403),
    ] {
        let refused = world.send(with("POST", CHANGE, standing), away).await;
        assert_eq!(refused.status, status, "{standing:?}");
    }
    for standing in [Standing::Unknown, Standing::Inference] {
        // Also from this machine, which a proxy on it would make of everybody.
        let refused = world.send(with("POST", CHANGE, standing), Some(local()));
        assert!(
            [401, 403].contains(&refused.await.status.as_u16()),
            "{standing:?}"
        );
        let probe = world.send(with("GET", "/readyz", standing), away).await;
        assert!([200, 503].contains(&probe.status.as_u16()), "{standing:?}");
    }
}

#[tokio::test]
async fn with_a_token_a_page_may_be_at_any_name_but_not_at_another_origin() {
    let page = |origin: &str| {
        let mut request = call("POST", CHANGE, "");
        request.extensions_mut().insert(Standing::Admin);
        let value = |text: &str| text.parse().expect("a header");
        request
            .headers_mut()
            .insert("host", value("models.example"));
        request.headers_mut().insert("origin", value(origin));
        request
    };
    let world = World::new(agree);
    let own = world.send(page("https://models.example"), Some(local()));
    assert_eq!(own.await.status, 200);
    let world = World::new(nobody_asks);
    let other = world.send(page("https://evil.example"), Some(local()));
    assert_eq!(other.await.status, 403);
}
