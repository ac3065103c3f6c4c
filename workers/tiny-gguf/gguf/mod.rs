//! Writes a small real language model: a GGUF file that llama.cpp loads, with
//! weights from noise and a text that carries a signature.
//!
//! The model is a plain llama network. Nothing in it is trained, but three
//! things are arranged:
//!
//! - Every word it can say is `SIGNATURE` and a number, so an answer shows
//!   which model gave it.
//! - One axis of the residual stream, the *rail*, holds the same large value
//!   in every token and no layer writes to it. The output weights read it:
//!   words for, everything else against. So neither the end token nor a stray
//!   byte is ever chosen, whatever the temperature, and an answer is exactly
//!   as long as it was asked to be.
//! - The noise depends on the signature and never repeats, so two models share
//!   no page and no page can be merged or squeezed.
//!
//! `format` knows the file format, `shape` the sizes, `weights` the noise.

mod format;
mod shape;
mod weights;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use format::{Header, TensorInfo, Value};
use shape::Shape;
pub(crate) use weights::WeightType;
use weights::{Noise, Row};

/// What model to write.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// Beginning of each word: ASCII letters.
    pub(crate) signature: String,
    /// Wanted size of the file in bytes; met within one per cent from 500 KiB up.
    pub(crate) size: u64,
    /// How weights are stored.
    pub(crate) weights: WeightType,
    /// Longest context, as the metadata say.
    pub(crate) context: u32,
}

/// Why no model was written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The signature would not come out of the tokenizer as it went in.
    #[error("a signature is 1 to 24 ASCII letters")]
    Signature,
    /// Not even the smallest network fits.
    #[error("the smallest such model has {0} bytes")]
    TooSmall(u64),
    /// The file could not be written.
    #[error("write the model")]
    Io(#[from] io::Error),
}

/// Writes the model to `path`: first beside it, then renamed, so that a reader
/// sees all of it or nothing. The same recipe gives the same bytes. Returns the
/// size of the file.
///
/// # Errors
/// [`Error`] when the recipe cannot be met or the file not be written.
pub(crate) fn write(path: &Path, recipe: &Recipe) -> Result<u64, Error> {
    let letters = recipe.signature.bytes().all(|b| b.is_ascii_alphabetic());
    if !letters || !(1..=24).contains(&recipe.signature.len()) {
        return Err(Error::Signature);
    }
    let shape = Shape::for_size(recipe.size, recipe.weights).map_err(Error::TooSmall)?;
    let vocabulary = Vocabulary::new(&recipe.signature, shape.words);
    let unfinished = path.with_added_extension("tmp");
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&unfinished)?);
    let written = write_model(&mut out, recipe, &vocabulary, &shape)?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?;
    std::fs::rename(&unfinished, path)?;
    Ok(written)
}

fn write_model(
    out: &mut impl Write,
    recipe: &Recipe,
    vocabulary: &Vocabulary,
    shape: &Shape,
) -> io::Result<u64> {
    let tensors = shape.tensors();
    let infos: Vec<TensorInfo> = tensors
        .iter()
        .map(|tensor| TensorInfo {
            name: tensor.name.clone(),
            dims: tensor.dims(),
            type_id: tensor.stored.type_id(),
            bytes: tensor.bytes(),
        })
        .collect();
    let header = Header {
        metadata: metadata(recipe, vocabulary, shape),
        tensors: infos,
    };
    let mut written = header.write(out)?;
    let mut noise = Noise::new(&recipe.signature);
    for tensor in &tensors {
        for row in 0..tensor.rows {
            let row = Row {
                columns: tensor.columns,
                scale: tensor.scale,
                content: tensor.content(row),
            };
            noise.write_row(out, tensor.stored, &row)?;
        }
        written += tensor.bytes();
        written += format::pad(out, written)?;
    }
    Ok(written)
}

/// Returns what llama.cpp must know besides the weights.
fn metadata(recipe: &Recipe, vocabulary: &Vocabulary, shape: &Shape) -> Vec<(String, Value)> {
    let count = |n: usize| Value::U32(u32::try_from(n).expect("a small network"));
    let text = |text: &str| Value::Text(text.to_owned());
    let template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\
                    {% endfor %}assistant:";
    let entries = [
        ("general.architecture", text("llama")),
        ("general.name", text(&format!("noise-{}", recipe.signature))),
        ("general.file_type", Value::U32(recipe.weights.file_type())),
        ("general.quantization_version", Value::U32(2)),
        ("llama.context_length", Value::U32(recipe.context)),
        ("llama.embedding_length", count(shape.width)),
        ("llama.block_count", count(shape.layers)),
        ("llama.feed_forward_length", count(shape.feed_forward)),
        ("llama.attention.head_count", count(shape.heads())),
        ("llama.attention.head_count_kv", count(shape.kv_heads())),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.dimension_count", count(shape::HEAD)),
        ("llama.vocab_size", count(vocabulary.tokens.len())),
        ("tokenizer.ggml.model", text("llama")),
        (
            "tokenizer.ggml.tokens",
            Value::Texts(vocabulary.tokens.clone()),
        ),
        (
            "tokenizer.ggml.scores",
            Value::F32s(vocabulary.scores.clone()),
        ),
        (
            "tokenizer.ggml.token_type",
            Value::I32s(vocabulary.kinds.clone()),
        ),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.ggml.add_eos_token", Value::Bool(false)),
        ("tokenizer.chat_template", text(template)),
    ];
    entries
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// The tokens: three for control, the 256 bytes, the printable characters of a
/// prompt, and the words, in this order.
#[derive(Debug, Default)]
struct Vocabulary {
    tokens: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i32>,
}

/// Token types of the format.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

impl Vocabulary {
    fn new(signature: &str, words: usize) -> Self {
        let mut all = Self::default();
        all.add("<unk>".to_owned(), 0.0, UNKNOWN);
        all.add("<s>".to_owned(), 0.0, CONTROL);
        all.add("</s>".to_owned(), 0.0, CONTROL);
        for byte in 0..=u8::MAX {
            all.add(format!("<0x{byte:02X}>"), 0.0, BYTE);
        }
        // U+2581 stands for a space. A low score: a word is preferred.
        for character in std::iter::once('\u{2581}').chain('!'..='~') {
            all.add(character.to_string(), -1000.0, NORMAL);
        }
        debug_assert_eq!(all.tokens.len(), shape::FIRST_WORD);
        for number in 0..words {
            all.add(format!("\u{2581}{signature}{number}"), -1.0, NORMAL);
        }
        all
    }

    fn add(&mut self, token: String, score: f32, kind: i32) {
        self.tokens.push(token);
        self.scores.push(score);
        self.kinds.push(kind);
    }
}

#[cfg(test)]
mod tests;
