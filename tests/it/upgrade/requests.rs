//! Requests that wait while another residentd takes over, of a model whose
//! requests are changed, bounded and told to wait.

use serde_json::json;

use super::{start, upgrade};
use crate::support::http::send;
use crate::support::residentd::STUB;
use crate::support::{Answer, wait_until};

#[test]
fn what_waits_while_another_takes_over_is_changed_once_and_bounded_there() {
    // The time for an answer is shorter than the rest of the load, which counts
    // for neither of the two.
    let (residentd, _program) = start(
        &format!(
            "[memory]\nlimit = \"600MiB\"\nreserve = \"16MiB\"\n[models.slow]\ncommand = '{STUB} --port ${{PORT}} --name s --ready-after 3s'\nmemory = \"48MiB\"\nuse_model_name = \"org/real\"\nset_params = {{ max_tokens = 2 }}\nheartbeat = \"100ms\"\nrequest_timeout = \"900ms\"\n"
        ),
        &[],
    );
    let asked: Vec<_> = [true, false]
        .iter()
        .map(|stream| {
            let body = json!({"model": "slow", "prompt": "x", "stream": stream}).to_string();
            send(residentd.address(), "POST", "/v1/completions", Some(&body)).expect("connected")
        })
        .collect();
    wait_until("slow to be spawned", || residentd.worker_pid("slow"));
    upgrade(&residentd);
    for (mut stream, streams) in asked.into_iter().zip([true, false]) {
        let mut raw = Vec::new();
        // A connection that is cut shows in the answer.
        let _ = std::io::Read::read_to_end(&mut stream, &mut raw);
        let answer = Answer::parse(&raw).expect("an answer");
        let text = answer.text();
        assert!(answer.status == 200 && answer.complete, "{text}");
        assert!(text.contains("model=org/real"), "{text}");
        assert!(!text.contains("s2 "), "max_tokens was not set: {text}");
        assert_eq!(text.starts_with(": waiting\n\n"), streams, "{text}");
        assert_eq!(text.ends_with("data: [DONE]\n\n"), streams, "{text}");
    }
}
