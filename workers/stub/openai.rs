//! Answers in the shape of the OpenAI API: completions, chats, embeddings,
//! transcriptions; its responses, and Anthropic's messages, are beside it.
//!
//! The text of an answer tells who gave it and what it got:
//! `red pid=71 model=foo bytes=120 red0 red1 red2 `.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::checksum::Checksum;
use crate::knobs::Knobs;
use crate::{anthropic, responses};

/// Which of the generating routes was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Completion,
    Chat,
    /// OpenAI's `/v1/responses`.
    Response,
    /// Anthropic's `/v1/messages`.
    Message,
}

impl Shape {
    /// Returns the shape of answers to this path.
    pub(crate) fn of(path: &str) -> Option<Self> {
        match path {
            "/v1/completions" => Some(Self::Completion),
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/responses" => Some(Self::Response),
            "/v1/messages" => Some(Self::Message),
            _ => None,
        }
    }
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
    /// Returns what goes out at once: part `index` of a streamed answer, or the
    /// end.
    pub(crate) fn event(&self, index: u64, knobs: &Knobs) -> Bytes {
        match self.shape {
            Shape::Response => return responses::event(self, index, knobs).into(),
            Shape::Message => return anthropic::event(self, index, knobs).into(),
            Shape::Completion | Shape::Chat if index == knobs.chunks => {
                return Bytes::from_static(b"data: [DONE]\n\n");
            }
            Shape::Completion | Shape::Chat => {}
        }
        let text = self.words(index, knobs.chunk_bytes);
        let last = index + 1 == knobs.chunks;
        let reason = if last { json!("length") } else { Value::Null };
        let is_chat = self.shape == Shape::Chat;
        let choice = match (is_chat, index) {
            (false, _) => json!({"index": 0, "text": text, "finish_reason": reason}),
            (true, 0) => json!({"index": 0, "finish_reason": reason,
                "delta": {"role": "assistant", "content": text}}),
            (true, _) => json!({"index": 0, "finish_reason": reason, "delta": {"content": text}}),
        };
        let object = match is_chat {
            true => "chat.completion.chunk",
            false => "text_completion",
        };
        Bytes::from(format!("data: {}\n\n", self.envelope(object, choice)))
    }

    /// Returns the whole answer as one JSON document.
    pub(crate) fn document(&self, knobs: &Knobs) -> Vec<u8> {
        let text = self.text(knobs);
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
            Shape::Response => return responses::document(self, knobs).to_string().into_bytes(),
            Shape::Message => return anthropic::document(self, knobs).to_string().into_bytes(),
        };
        let mut answer = self.envelope(object, choice);
        let prompt = self.prompt_tokens();
        answer["usage"] = json!({"prompt_tokens": prompt, "completion_tokens": knobs.chunks,
            "total_tokens": prompt + knobs.chunks});
        answer.to_string().into_bytes()
    }

    /// Returns what this answer is called; `kind` tells whose names it looks like.
    pub(crate) fn id(&self, kind: &str) -> String {
        format!("{kind}-{}-{}", std::process::id(), self.number)
    }

    /// Returns a count of the request's tokens that its size makes likely.
    pub(crate) fn prompt_tokens(&self) -> u64 {
        u64::try_from(self.body_bytes / 4).unwrap_or(u64::MAX)
    }

    /// Returns all parts of the text together.
    pub(crate) fn text(&self, knobs: &Knobs) -> String {
        (0..knobs.chunks)
            .map(|index| self.words(index, knobs.chunk_bytes))
            .collect()
    }

    fn envelope(&self, object: &str, choice: Value) -> Value {
        json!({
            "id": self.id("stub"),
            "object": object,
            "created": 0,
            "model": self.model,
            "choices": [choice],
        })
    }

    /// Returns the text of part `index`, padded to `least` bytes.
    pub(crate) fn words(&self, index: u64, least: usize) -> String {
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
            let vector = vector(&text);
            // What OpenAI's own clients ask for when they are not told.
            let embedding = match request["encoding_format"] == "base64" {
                true => json!(base64(&floats(&vector))),
                false => json!(vector),
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    let tokens = data.len();
    json!({"object": "list", "data": data, "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
}

/// Returns the answer to an upload of audio: who got how much.
pub(crate) fn transcription(name: &str, checksum: &Checksum) -> Value {
    let (pid, bytes) = (std::process::id(), checksum.length());
    json!({"text": format!("{name} pid={pid} bytes={bytes} checksum={}", checksum.hex())})
}

/// Returns the numbers as 32-bit floats, the least byte first.
#[expect(
    clippy::cast_possible_truncation,
    reason = "OpenAI sends embeddings with this precision"
)]
fn floats(vector: &[f64]) -> Vec<u8> {
    let bytes = vector.iter().map(|value| (*value as f32).to_le_bytes());
    bytes.flatten().collect()
}

/// Writes bytes in base64 (RFC 4648), padded.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4_usize {
            let value = bits >> (18 - 6 * digit) & 63;
            text.push(match digit <= three.len() {
                true => char::from(DIGITS[usize::try_from(value).expect("six bits")]),
                false => '=',
            });
        }
    }
    text
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
        for (shape, in_event, in_document) in [
            (Shape::Completion, "/choices/0/text", "/choices/0/text"),
            (
                Shape::Chat,
                "/choices/0/delta/content",
                "/choices/0/message/content",
            ),
            (Shape::Response, "/delta", "/output/0/content/0/text"),
            (Shape::Message, "/delta/text", "/content/0/text"),
        ] {
            let voice = voice(shape);
            let stream: Vec<u8> = (0..=4)
                .flat_map(|index| voice.event(index, &knobs))
                .collect();
            let stream = String::from_utf8(stream).expect("text");
            let streamed: String = stream
                .lines()
                .filter_map(|line| line.strip_prefix("data: {"))
                .filter_map(|json| {
                    let event: Value = serde_json::from_str(&format!("{{{json}")).expect("JSON");
                    Some(event.pointer(in_event)?.as_str()?.to_owned())
                })
                .collect();
            let document = voice.document(&knobs);
            let document: Value = serde_json::from_slice(&document).expect("JSON");
            let said = document.pointer(in_document);
            assert_eq!(said, Some(&json!(streamed)), "{shape:?}");
            assert!(streamed.starts_with(&format!("red pid={} model=foo", std::process::id())));
            assert!(streamed.len() >= 4 * 64);
            let is_of_old = matches!(shape, Shape::Completion | Shape::Chat);
            assert_eq!(stream.ends_with("data: [DONE]\n\n"), is_of_old);
        }
    }

    #[test]
    fn base64_is_that_of_the_standard() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
        let request = json!({"input": "a", "encoding_format": "base64"});
        let answer = embeddings(&request, "foo");
        let text = answer["data"][0]["embedding"].as_str().expect("text");
        assert_eq!(text.len(), 44, "eight floats of four bytes");
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
