//! Weights from noise, straight in the format they are stored in.
//!
//! Turning billions of numbers into half floats one by one would take longer
//! than writing them. Instead 64 random bits become four half floats at once: a
//! random sign and mantissa under a fixed exponent.

use std::io::{self, Write};

/// Weights in one block of `q8_0`, which share a scale.
const BLOCK: usize = 32;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WeightType {
    /// Four bytes a weight.
    F32,
    /// Two bytes a weight.
    F16,
    /// A block of 32 weights in 34 bytes.
    #[value(name = "q8_0")]
    Q8_0,
}

impl WeightType {
    /// Returns the number the format has for a tensor of this type.
    pub(super) fn type_id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 8,
        }
    }

    /// Returns the number the format has for a file mostly of this type.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
        }
    }

    /// Returns the length of a row.
    pub(super) fn row_bytes(self, columns: usize) -> u64 {
        let bytes = match self {
            Self::F32 => columns * 4,
            Self::F16 => columns * 2,
            Self::Q8_0 => columns / BLOCK * (BLOCK + 2),
        };
        u64::try_from(bytes).expect("a row fits 64 bits")
    }
}

/// One row of a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) columns: usize,
    /// Standard deviation of the noise, about.
    pub(super) scale: f32,
    pub(super) content: Content,
}

/// What a row holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Content {
    Ones,
    Noise,
    /// This first weight, then noise.
    NoiseAfter(f32),
    /// This first weight, then zeros.
    ZerosAfter(f32),
}

/// A stream of noise that depends on the signature.
#[derive(Clone, Debug)]
pub(super) struct Noise {
    state: u64,
    row: Vec<u8>,
}

impl Noise {
    pub(super) fn new(signature: &str) -> Self {
        let seed = signature.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self {
            state: seed | 1,
            row: Vec::new(),
        }
    }

    /// Writes one row.
    pub(super) fn write_row(
        &mut self,
        out: &mut impl Write,
        stored: WeightType,
        row: &Row,
    ) -> io::Result<()> {
        let bytes = usize::try_from(stored.row_bytes(row.columns)).expect("a row");
        let mut buffer = std::mem::take(&mut self.row);
        buffer.clear();
        buffer.resize(bytes, 0);
        match row.content {
            Content::Ones => {
                let (ones, _) = buffer.as_chunks_mut::<4>();
                ones.fill(1.0_f32.to_le_bytes());
            }
            Content::Noise | Content::NoiseAfter(_) => self.fill(&mut buffer, stored, row.scale),
            Content::ZerosAfter(_) => {}
        }
        if let Content::NoiseAfter(first) | Content::ZerosAfter(first) = row.content {
            set_first(&mut buffer, stored, first);
        }
        self.row = buffer;
        out.write_all(&self.row)
    }

    fn fill(&mut self, bytes: &mut [u8], stored: WeightType, scale: f32) {
        match stored {
            WeightType::F32 => {
                let exponent = u64::from(floor_exponent(scale).to_bits());
                let (kept, set) = (0x807f_ffff_807f_ffff, exponent << 32 | exponent);
                self.fill_words(bytes, kept, set);
            }
            WeightType::F16 => {
                let exponent = u64::from(half(floor_exponent(scale)));
                let set = exponent << 48 | exponent << 32 | exponent << 16 | exponent;
                self.fill_words(bytes, 0x83ff_83ff_83ff_83ff, set);
            }
            WeightType::Q8_0 => {
                // A byte from -128 to 127 deviates by 74.
                let step = half(scale / 74.0).to_le_bytes();
                for block in bytes.chunks_exact_mut(BLOCK + 2) {
                    block[..2].copy_from_slice(&step);
                    self.fill_words(&mut block[2..], u64::MAX, 0);
                }
            }
        }
    }

    /// Fills `bytes`, a multiple of eight, with random bits where `kept` has
    /// ones, and with `set`.
    fn fill_words(&mut self, bytes: &mut [u8], kept: u64, set: u64) {
        let (words, _) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = (self.next() & kept | set).to_le_bytes();
        }
    }

    /// Returns 64 random bits: xorshift64*.
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Sets a row's first weight. In `q8_0` the first block takes its scale from
/// it, so that the weight is exact and the noise beside it gets smaller steps.
fn set_first(bytes: &mut [u8], stored: WeightType, first: f32) {
    match stored {
        WeightType::F32 => bytes[..4].copy_from_slice(&first.to_le_bytes()),
        WeightType::F16 => bytes[..2].copy_from_slice(&half(first).to_le_bytes()),
        WeightType::Q8_0 => {
            let old = half_to_single(u16::from_le_bytes([bytes[0], bytes[1]]));
            let step = first.abs() / 127.0;
            bytes[..2].copy_from_slice(&half(step).to_le_bytes());
            for byte in &mut bytes[3..BLOCK + 2] {
                *byte = rescaled(*byte, old, step);
            }
            bytes[2] = if first < 0.0 { 0x81 } else { 0x7f };
        }
    }
}

/// Returns the byte that stands for the same weight with another step.
fn rescaled(byte: u8, old: f32, step: f32) -> u8 {
    if step == 0.0 {
        return 0;
    }
    let weight = f32::from(byte.cast_signed()) * old / step;
    #[expect(clippy::cast_possible_truncation, reason = "a float saturates")]
    let rounded = weight.round() as i8;
    rounded.cast_unsigned()
}

/// Returns the power of two nearest below `scale` such that a random mantissa
/// above it deviates by about `scale`.
fn floor_exponent(scale: f32) -> f32 {
    // A mantissa spread over [1, 2) has a root mean square of 1.53.
    f32::from_bits((scale / 1.08).to_bits() & 0x7f80_0000)
}

/// Returns a single as the bits of a half, cut off; too small becomes zero.
fn half(single: f32) -> u16 {
    let bits = single.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let exponent = (bits >> 23) & 0xff;
    // The exponents' biases are 127 and 15.
    let magnitude = if exponent <= 112 {
        0
    } else {
        (exponent - 112) << 10 | (bits >> 13) & 0x03ff
    };
    u16::try_from(sign | magnitude.min(0x7bff)).expect("16 bits")
}

fn half_to_single(half: u16) -> f32 {
    let bits = u32::from(half);
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    if magnitude < 0x0400 {
        return f32::from_bits(sign);
    }
    f32::from_bits(sign | ((magnitude << 13) + (112 << 23)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_and_back_is_the_same() {
        for single in [0.0, 1.0, -2.5, 0.125, 90.5, -0.000_061_035_156] {
            assert_eq!(half_to_single(half(single)), single);
        }
        assert_eq!(half(1.0), 0x3c00);
        assert_eq!(half(1e9), 0x7bff);
        assert_eq!(half(1e-9), 0);
    }

    #[test]
    fn noise_has_about_the_scale_it_should_have() {
        for scale in [0.03, 0.125, 1.0_f32] {
            let mut bytes = vec![0; 40_000];
            Noise::new("red").fill(&mut bytes, WeightType::F16, scale);
            let (halves, _) = bytes.as_chunks::<2>();
            let squares = halves
                .iter()
                .map(|half| half_to_single(u16::from_le_bytes(*half)).powi(2));
            let deviation = (squares.sum::<f32>() / 20_000.0).sqrt();
            assert!(
                (0.6..1.6).contains(&(deviation / scale)),
                "{deviation} {scale}"
            );
        }
    }

    #[test]
    fn the_first_weight_of_a_row_is_what_was_asked_in_every_type() {
        let row = Row {
            columns: 64,
            scale: 1.0,
            content: Content::NoiseAfter(16.0),
        };
        let written = |stored| {
            let mut out = Vec::new();
            Noise::new("red").write_row(&mut out, stored, &row).unwrap();
            out
        };
        assert_eq!(written(WeightType::F32)[..4], 16.0_f32.to_le_bytes());
        assert_eq!(written(WeightType::F16)[..2], half(16.0).to_le_bytes());
        let quantised = written(WeightType::Q8_0);
        let step = half_to_single(u16::from_le_bytes([quantised[0], quantised[1]]));
        assert!((step * f32::from(quantised[2]) - 16.0).abs() < 0.1);
        assert!(quantised[3..34].iter().all(|b| b.cast_signed().abs() < 20));
    }
}
