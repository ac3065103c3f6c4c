//! Answers in the shape of Anthropic's API: messages, whole and in events, and
//! counts of tokens.

use serde_json::{Value, json};

use crate::knobs::Knobs;
use crate::openai::Voice;

/// Returns what goes out at once: part `index` with what stands before and
/// behind it. Part 0 begins the message, and one more than there are ends it.
pub(crate) fn event(voice: &Voice, index: u64, knobs: &Knobs) -> String {
    if index == knobs.chunks {
        return [
            json!({"type": "content_block_stop", "index": 0}),
            json!({"type": "message_delta", "usage": {"output_tokens": knobs.chunks},
                "delta": {"stop_reason": "max_tokens", "stop_sequence": null}}),
            json!({"type": "message_stop"}),
        ]
        .iter()
        .map(written)
        .collect();
    }
    let delta = json!({"type": "content_block_delta", "index": 0,
        "delta": {"type": "text_delta", "text": voice.words(index, knobs.chunk_bytes)}});
    if index > 0 {
        return written(&delta);
    }
    let mut message = envelope(voice, json!([]), 1);
    message["stop_reason"] = Value::Null;
    [
        json!({"type": "message_start", "message": message}),
        json!({"type": "content_block_start", "index": 0,
            "content_block": {"type": "text", "text": ""}}),
        json!({"type": "ping"}),
        delta,
    ]
    .iter()
    .map(written)
    .collect()
}

/// Returns the whole message.
pub(crate) fn document(voice: &Voice, knobs: &Knobs) -> Value {
    let content = json!([{"type": "text", "text": voice.text(knobs)}]);
    envelope(voice, content, knobs.chunks)
}

/// Returns the answer to a request to count its tokens.
pub(crate) fn count(body_bytes: usize) -> Value {
    json!({"input_tokens": body_bytes / 4})
}

/// Returns the body of an error.
pub(crate) fn failure(status: u16, message: &str) -> Value {
    let kind = match status {
        400 => "invalid_request_error",
        404 => "not_found_error",
        429 => "rate_limit_error",
        529 => "overloaded_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": message}})
}

fn envelope(voice: &Voice, content: Value, tokens: u64) -> Value {
    json!({"id": voice.id("msg"), "type": "message", "role": "assistant", "model": voice.model,
        "content": content, "stop_reason": "max_tokens", "stop_sequence": null,
        "usage": {"input_tokens": voice.prompt_tokens(), "output_tokens": tokens}})
}

/// Writes one event, named by its type as all of this API are.
pub(crate) fn written(event: &Value) -> String {
    let kind = event["type"].as_str().unwrap_or_default();
    format!("event: {kind}\ndata: {event}\n\n")
}
