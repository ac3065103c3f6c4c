//! How large each part of the network is, so that the file has a wanted size.

use super::format::padded;
use super::weights::{Content, WeightType};

/// Width of one attention head.
pub(super) const HEAD: usize = 64;

/// Query heads that share one key and value head.
const SHARED_BY: usize = 4;

/// The feed-forward width is a multiple of this: one block of `q8_0`.
const STEP: usize = 32;

/// Tokens before the first word: control, bytes, and characters of a prompt.
pub(super) const FIRST_WORD: usize = 3 + 256 + 95;

/// Fewest words the model can say; more fill a file up to its size.
const LEAST_WORDS: usize = 256;

/// Bytes of metadata besides the words, and of each word, about.
const METADATA: u64 = 12 << 10;
const WORD_METADATA: u64 = 24;

/// Widths and depths to choose from, in growing size.
const FRAMES: [(usize, usize); 11] = [
    (64, 1),
    (64, 2),
    (128, 4),
    (256, 4),
    (256, 8),
    (512, 8),
    (1024, 8),
    (1024, 16),
    (2048, 16),
    (2048, 32),
    (4096, 32),
];

/// A frame is left for a larger one when its feed-forward part would be more
/// than this many times as wide as itself.
const WIDEST: usize = 6;

/// The rail's value: this times the root of the width. Each layer adds noise of
/// about 1.25 to the stream's mean square, so the last norm makes 0.7 roots of
/// it after two layers, 0.4 after 16 and 0.3 after 32 (estimates).
const RAIL: f32 = 2.0;

/// Output weight on the rail. The narrowest network that is deep enough to
/// matter (width 256, 8 layers) so puts words about 80 ahead of all else.
const VOTE: f32 = 5.0;

/// The sizes of one network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) width: usize,
    pub(super) layers: usize,
    pub(super) feed_forward: usize,
    pub(super) words: usize,
    stored: WeightType,
}

/// One tensor to write.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) columns: usize,
    pub(super) rows: usize,
    pub(super) stored: WeightType,
    /// Standard deviation of its noise, about.
    pub(super) scale: f32,
    role: Role,
}

/// What is arranged in a tensor besides noise.
#[derive(Clone, Copy, Debug)]
enum Role {
    /// All ones.
    Norm,
    /// Each row begins with the rail's value.
    Embedding(f32),
    /// Noise only.
    Inner,
    /// Writes to the residual stream: the rail's row is zero.
    Residual,
    /// Each row begins with a vote, and only words have noise.
    Output,
}

impl Shape {
    /// Returns the shape whose file is nearest to `size` bytes, or the bytes of
    /// the smallest one there is.
    pub(super) fn for_size(size: u64, stored: WeightType) -> Result<Self, u64> {
        let mut chosen = None;
        for (width, layers) in FRAMES {
            let least = Self {
                width,
                layers,
                feed_forward: STEP,
                words: LEAST_WORDS,
                stored,
            };
            if least.bytes() > size {
                return chosen.ok_or(least.bytes());
            }
            let shape = least.widened(size);
            chosen = Some(shape);
            if shape.feed_forward <= WIDEST * width {
                break;
            }
        }
        Ok(chosen.expect("there is a frame"))
    }

    /// Returns this shape with the widest feed-forward part that fits, and with
    /// as many more words as fill the rest.
    fn widened(self, size: u64) -> Self {
        let wider = Self {
            feed_forward: self.feed_forward + STEP,
            ..self
        };
        let per_step = wider.bytes() - self.bytes();
        let steps = count((size - self.bytes()) / per_step);
        let wide = Self {
            feed_forward: self.feed_forward + STEP * steps,
            ..self
        };
        let per_word = 2 * self.stored.row_bytes(self.width) + WORD_METADATA;
        Self {
            words: wide.words + count((size - wide.bytes()) / per_word),
            ..wide
        }
    }

    pub(super) fn heads(&self) -> usize {
        self.width / HEAD
    }

    pub(super) fn kv_heads(&self) -> usize {
        (self.heads() / SHARED_BY).max(1)
    }

    /// Returns the size of the file, about.
    fn bytes(&self) -> u64 {
        let tensors = self.tensors();
        let words = u64::try_from(self.words).expect("fits 64 bits");
        let data: u64 = tensors.iter().map(|t| padded(t.bytes())).sum();
        METADATA + words * WORD_METADATA + data
    }

    /// Returns all tensors in the order of the file.
    pub(super) fn tensors(&self) -> Vec<Tensor> {
        let (width, wide) = (self.width, self.feed_forward);
        let vocabulary = FIRST_WORD + self.words;
        let kv = self.kv_heads() * HEAD;
        let rail = RAIL * root(width);
        let mut all = vec![
            self.tensor("token_embd", width, vocabulary, Role::Embedding(rail)),
            self.tensor("output", width, vocabulary, Role::Output),
            self.tensor("output_norm", width, 1, Role::Norm),
        ];
        for layer in 0..self.layers {
            let mut add = |part: &str, columns, rows, role| {
                all.push(self.tensor(&format!("blk.{layer}.{part}"), columns, rows, role));
            };
            add("attn_norm", width, 1, Role::Norm);
            add("attn_q", width, width, Role::Inner);
            add("attn_k", width, kv, Role::Inner);
            add("attn_v", width, kv, Role::Inner);
            add("attn_output", width, width, Role::Residual);
            add("ffn_norm", width, 1, Role::Norm);
            add("ffn_gate", width, wide, Role::Inner);
            add("ffn_up", width, wide, Role::Inner);
            add("ffn_down", wide, width, Role::Residual);
        }
        all
    }

    fn tensor(&self, name: &str, columns: usize, rows: usize, role: Role) -> Tensor {
        Tensor {
            name: format!("{name}.weight"),
            columns,
            rows,
            stored: match role {
                Role::Norm => WeightType::F32,
                Role::Embedding(_) | Role::Inner | Role::Residual | Role::Output => self.stored,
            },
            scale: match role {
                Role::Embedding(_) | Role::Norm => 1.0,
                Role::Inner | Role::Residual | Role::Output => 1.0 / root(columns),
            },
            role,
        }
    }
}

impl Tensor {
    /// Returns its dimensions as the file has them; a norm has only one.
    pub(super) fn dims(&self) -> Vec<u64> {
        let dim = |n: usize| u64::try_from(n).expect("a dimension fits 64 bits");
        match self.role {
            Role::Norm => vec![dim(self.columns)],
            Role::Embedding(_) | Role::Inner | Role::Residual | Role::Output => {
                vec![dim(self.columns), dim(self.rows)]
            }
        }
    }

    /// Returns the length of its data.
    pub(super) fn bytes(&self) -> u64 {
        self.stored.row_bytes(self.columns) * u64::try_from(self.rows).expect("fits 64 bits")
    }

    /// Returns what row `row` holds.
    pub(super) fn content(&self, row: usize) -> Content {
        match self.role {
            Role::Norm => Content::Ones,
            Role::Embedding(rail) => Content::NoiseAfter(rail),
            Role::Residual if row == 0 => Content::ZerosAfter(0.0),
            Role::Inner | Role::Residual => Content::Noise,
            Role::Output if row < FIRST_WORD => Content::ZerosAfter(-VOTE),
            Role::Output => Content::NoiseAfter(VOTE),
        }
    }
}

fn count(n: u64) -> usize {
    usize::try_from(n).expect("a 64-bit machine")
}

#[expect(clippy::cast_precision_loss, reason = "the scale of noise")]
fn root(n: usize) -> f32 {
    (n as f32).sqrt()
}
