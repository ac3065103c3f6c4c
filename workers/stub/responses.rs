//! Answers in the shape of OpenAI's `/v1/responses`, whole and in events.

use serde_json::{Value, json};

use crate::anthropic::written;
use crate::knobs::Knobs;
use crate::openai::Voice;

/// Events before the first part.
const OPENING: u64 = 4;

/// Returns what goes out at once: part `index` with what stands before and
/// behind it. Part 0 begins the response, and one more than there are ends it.
pub(crate) fn event(voice: &Voice, index: u64, knobs: &Knobs) -> String {
    let item = voice.id("msg");
    let empty = json!({"type": "output_text", "text": "", "annotations": []});
    if index == knobs.chunks {
        let whole = document(voice, knobs);
        let output = &whole["output"][0];
        let part = &output["content"][0];
        return numbered(
            OPENING + index,
            vec![
                json!({"type": "response.output_text.done", "item_id": item, "output_index": 0,
                    "content_index": 0, "text": part["text"], "logprobs": []}),
                json!({"type": "response.content_part.done", "item_id": item, "output_index": 0,
                    "content_index": 0, "part": part}),
                json!({"type": "response.output_item.done", "output_index": 0, "item": output}),
                json!({"type": "response.completed", "response": whole}),
            ],
        );
    }
    let delta = json!({"type": "response.output_text.delta", "item_id": item, "output_index": 0,
        "content_index": 0, "delta": voice.words(index, knobs.chunk_bytes), "logprobs": []});
    if index > 0 {
        return numbered(OPENING + index, vec![delta]);
    }
    let begun = envelope(voice, "in_progress", json!([]), Value::Null);
    let unsaid = json!({"type": "message", "id": item, "status": "in_progress",
        "role": "assistant", "content": []});
    numbered(
        0,
        vec![
            json!({"type": "response.created", "response": begun}),
            json!({"type": "response.in_progress", "response": begun}),
            json!({"type": "response.output_item.added", "output_index": 0, "item": unsaid}),
            json!({"type": "response.content_part.added", "item_id": item, "output_index": 0,
                "content_index": 0, "part": empty}),
            delta,
        ],
    )
}

/// Returns the whole response.
pub(crate) fn document(voice: &Voice, knobs: &Knobs) -> Value {
    let content = json!([{"type": "output_text", "text": voice.text(knobs), "annotations": []}]);
    let message = json!({"type": "message", "id": voice.id("msg"), "status": "completed",
        "role": "assistant", "content": content});
    let (prompt, said) = (voice.prompt_tokens(), knobs.chunks);
    let usage = json!({"input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": said, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + said});
    envelope(voice, "completed", json!([message]), usage)
}

fn envelope(voice: &Voice, status: &str, output: Value, usage: Value) -> Value {
    json!({"id": voice.id("resp"), "object": "response", "created_at": 0, "status": status,
        "error": null, "incomplete_details": null, "instructions": null, "metadata": {},
        "max_output_tokens": null, "model": voice.model, "output": output,
        "parallel_tool_calls": true, "previous_response_id": null, "temperature": 1.0,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": 1.0,
        "truncation": "disabled", "usage": usage})
}

/// Writes events with their numbers in the stream, from `first` on.
fn numbered(first: u64, events: Vec<Value>) -> String {
    let numbers = first..;
    events
        .into_iter()
        .zip(numbers)
        .map(|(mut event, number)| {
            event["sequence_number"] = json!(number);
            written(&event)
        })
        .collect()
}
