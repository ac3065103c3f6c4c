//! Answers in the shape of the OpenAI API: completions, chats, embeddings.
//!
//! The text of an answer tells who gave it and what it got:
//! `red pid=71 model=foo bytes=120 red0 red1 red2 `.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::checksum::Checksum;
use crate::knobs::Knobs;

/// Which of the two generating routes was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Completion,
    Chat,
}

/// What the text of an answer is made of.
#[derive(Clone, Debug)]
pub(crate) struct Voice {
    /// The worker's signature.
    pub(crate) name: String,
    /// The model the request named, or the signature.
    pub(crate) model: String,
    /// Length of the request's body.
    pub(crate) body_bytes: usize,
    pub(crate) shape: Shape,
    /// Which request this is, from 1.
    pub(crate) number: u64,
}

impl Voice {
    /// Returns one event: part `index` of a streamed answer, or the end.
    pub(crate) fn event(&self, index: u64, knobs: &Knobs) -> Bytes {
        if index == knobs.chunks {
            return Bytes::from_static(b"data: [DONE]\n\n");
        }
        let text = self.words(index, knobs.chunk_bytes);
        let last = index + 1 == knobs.chunks;
        let reason = if last { json!("length") } else { Value::Null };
        let choice = match self.shape {
            Shape::Completion => json!({"index": 0, "text": text, "finish_reason": reason}),
            Shape::Chat if index == 0 => json!({"index": 0, "finish_reason": reason,
                "delta": {"role": "assistant", "content": text}}),
            Shape::Chat => json!({"index": 0, "finish_reason": reason, "delta": {"content": text}}),
        };
        let object = match self.shape {
            Shape::Completion => "text_completion",
            Shape::Chat => "chat.completion.chunk",
        };
        Bytes::from(format!("data: {}\n\n", self.envelope(object, choice)))
    }

    /// Returns the whole answer as one JSON document.
    pub(crate) fn document(&self, knobs: &Knobs) -> Vec<u8> {
        let text: String = (0..knobs.chunks)
            .map(|index| self.words(index, knobs.chunk_bytes))
            .collect();
        let (object, choice) = match self.shape {
            Shape::Completion => (
                "text_completion",
                json!({"index": 0, "text": text, "finish_reason": "length"}),
            ),
            Shape::Chat => (
                "chat.completion",
                json!({"index": 0, "finish_reason": "length",
                    "message": {"role": "assistant", "content": text}}),
            ),
        };
        let mut answer = self.envelope(object, choice);
        let prompt = u64::try_from(self.body_bytes / 4).unwrap_or(u64::MAX);
        answer["usage"] = json!({"prompt_tokens": prompt, "completion_tokens": knobs.chunks,
            "total_tokens": prompt + knobs.chunks});
        answer.to_string().into_bytes()
    }

    fn envelope(&self, object: &str, choice: Value) -> Value {
        json!({
            "id": format!("stub-{}-{}", std::process::id(), self.number),
            "object": object,
            "created": 0,
            "model": self.model,
            "choices": [choice],
        })
    }

    /// Returns the text of part `index`, padded to `least` bytes.
    fn words(&self, index: u64, least: usize) -> String {
        let Self { name, model, .. } = self;
        let mut text = if index == 0 {
            let (pid, bytes) = (std::process::id(), self.body_bytes);
            format!("{name} pid={pid} model={model} bytes={bytes} {name}0 ")
        } else {
            format!("{name}{index} ")
        };
        text.extend(std::iter::repeat_n('.', least.saturating_sub(text.len())));
        text
    }
}

/// Returns the answer to an embeddings request: for each input a vector of unit
/// length that depends on nothing but its text.
pub(crate) fn embeddings(request: &Value, model: &str) -> Value {
    let inputs = match request.get("input") {
        Some(Value::Array(inputs)) if !inputs.iter().all(Value::is_number) => inputs.clone(),
        Some(one) => vec![one.clone()],
        None => Vec::new(),
    };
    let data: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(index, input)| {
            let text = input
                .as_str()
                .map_or_else(|| input.to_string(), str::to_owned);
            json!({"object": "embedding", "index": index, "embedding": vector(&text)})
        })
        .collect();
    let tokens = data.len();
    json!({"object": "list", "data": data, "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
}

fn vector(text: &str) -> Vec<f64> {
    let values: Vec<f64> = (0..8_u8)
        .map(|axis| {
            let checksum = Checksum::of(format!("{axis} {text}").as_bytes());
            let hash = u32::from_str_radix(&checksum[..8], 16).expect("hex digits");
            f64::from(hash) / f64::from(u32::MAX) - 0.5
        })
        .collect();
    let length = values.iter().map(|v| v * v).sum::<f64>().sqrt();
    values.iter().map(|v| v / length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn voice(shape: Shape) -> Voice {
        Voice {
            name: "red".into(),
            model: "foo".into(),
            body_bytes: 12,
            shape,
            number: 1,
        }
    }

    #[test]
    fn the_events_of_a_stream_say_what_the_document_says() {
        let knobs = Knobs::read(&json!({"x_chunks": 4, "x_chunk_bytes": 64}), None);
        let voice = voice(Shape::Chat);
        let streamed: String = (0..4)
            .map(|index| {
                let event = voice.event(index, &knobs);
                let json = event.strip_prefix(b"data: ").expect("an event");
                let event: Value = serde_json::from_slice(json).expect("JSON");
                let content = &event["choices"][0]["delta"]["content"];
                content.as_str().expect("text").to_owned()
            })
            .collect();
        let document: Value = serde_json::from_slice(&voice.document(&knobs)).expect("JSON");
        assert_eq!(document["choices"][0]["message"]["content"], streamed);
        assert!(streamed.starts_with(&format!("red pid={} model=foo", std::process::id())));
        assert!(streamed.len() >= 4 * 64);
        assert_eq!(voice.event(4, &knobs), "data: [DONE]\n\n");
    }

    #[test]
    fn an_embedding_depends_on_its_text_alone() {
        let answer = embeddings(&json!({"input": ["a", "b", "a"]}), "foo");
        let data = answer["data"].as_array().expect("a list");
        assert_eq!(data.len(), 3);
        assert_eq!(data[0]["embedding"], data[2]["embedding"]);
        assert_ne!(data[0]["embedding"], data[1]["embedding"]);
        let tokens = embeddings(&json!({"input": [1, 2, 3]}), "foo");
        assert_eq!(tokens["data"].as_array().map(Vec::len), Some(1));
    }
}
