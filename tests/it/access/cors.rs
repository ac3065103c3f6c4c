//! Pages of other origins.

use super::{BOSS, bearer, call, with};
use crate::support::Residentd;

const CHAT: &str = "https://chat.example";

#[test]
fn a_page_is_answered_when_its_origin_is_configured_and_only_then() {
    let config = format!("cors_origins = [\"{CHAT}\"]\n[auth]\nadmin_tokens = [\"{BOSS}\"]");
    let residentd = Residentd::start(&with(&config));
    let ask = |origin: &str, line: &str, more: &[(&str, &str)]| {
        let headers = [&[("origin", origin)], more].concat();
        call(residentd.address(), line, &headers, "")
    };
    let preflight = [
        ("access-control-request-method", "POST"),
        (
            "access-control-request-headers",
            "authorization, content-type",
        ),
    ];
    for path in ["/v1/chat/completions", "/api/v1/models/m/load"] {
        let line = format!("OPTIONS {path}");
        let allowed = ask(CHAT, &line, &preflight);
        assert_eq!(allowed.status, 204, "{path}");
        let of = |name| allowed.header(name);
        assert_eq!(of("access-control-allow-origin"), Some(CHAT));
        let wanted = Some("authorization, content-type");
        assert_eq!(of("access-control-allow-headers"), wanted);
        assert!(of("access-control-allow-methods").is_some_and(|all| all.contains("POST")));
        assert_eq!(of("access-control-allow-credentials"), None);
        assert_eq!(of("vary"), Some("origin"));
        for other in ["https://evil.example", "http://chat.example", "null"] {
            let refused = ask(other, &line, &preflight);
            assert_eq!(refused.status, 403, "{other}");
            assert_eq!(refused.header("access-control-allow-origin"), None);
            assert_eq!(refused.header("access-control-allow-methods"), None);
        }
    }
    // An answer may be read by that page, also one that refuses.
    for (line, status) in [("GET /v1/models", 200), ("GET /api/v1/events", 401)] {
        let answer = ask(CHAT, line, &[]);
        assert_eq!(answer.status, status, "{line}");
        assert_eq!(answer.header("access-control-allow-origin"), Some(CHAT));
        let other = ask("https://evil.example", line, &[]);
        assert_eq!(other.header("access-control-allow-origin"), None);
    }
    // With a token it may act; another page may not, even with one.
    let token = bearer(BOSS);
    let act = |origin| {
        let with_token = [("authorization", &*token), ("sec-fetch-site", "cross-site")];
        ask(origin, "POST /api/v1/models/m/unload", &with_token).status
    };
    assert_eq!(act(CHAT), 200);
    assert_eq!(act("https://evil.example"), 403);
}

#[test]
fn without_origins_no_page_of_another_may_read_and_none_may_change() {
    let residentd = Residentd::start(&with("cors_origins = []"));
    let own = format!("http://{}", residentd.address());
    let page = |origin: &str, line| {
        let host = [("origin", origin), ("host", residentd.address())];
        // The first Host is that of the call helper, so ask by hand.
        let mut wire = crate::support::wire::Wire::to(residentd.address());
        let lines: String = host.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
        wire.put(format!(
            "{line} HTTP/1.1\r\n{lines}content-length: 0\r\n\r\n"
        ));
        wire.answer().0
    };
    let read = page(CHAT, "GET /v1/models");
    assert_eq!(read.get("access-control-allow-origin"), None);
    assert_eq!(page(CHAT, "POST /api/v1/models/m/unload").status(), 403);
    assert_eq!(page(&own, "POST /api/v1/models/m/unload").status(), 200);
}
