//! The GGUF container, version 3, little-endian:
//!
//! ```text
//! "GGUF" · u32 version · u64 tensors · u64 entries
//! entry:  key · u32 type · value             (a text: u64 length, bytes)
//! tensor: name · u32 n · n × u64 dimension · u32 type · u64 offset
//! padding to 32, then the tensors, each padded to 32
//! ```

use std::io::{self, Write};

const ALIGNMENT: u64 = 32;

/// One value of the metadata, with as many types as are needed here.
#[derive(Clone, Debug)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo {
    pub(super) name: String,
    /// Columns first: the fastest-running dimension.
    pub(super) dims: Vec<u64>,
    pub(super) type_id: u32,
    pub(super) bytes: u64,
}

/// Everything before the tensors' data.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) metadata: Vec<(String, Value)>,
    pub(super) tensors: Vec<TensorInfo>,
}

impl Header {
    /// Writes the header and its padding. Returns its length.
    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<u64> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(length(self.tensors.len()));
        bytes.extend(length(self.metadata.len()));
        for (key, value) in &self.metadata {
            put_text(&mut bytes, key);
            put_value(&mut bytes, value);
        }
        let mut offset = 0_u64;
        for tensor in &self.tensors {
            put_text(&mut bytes, &tensor.name);
            let dims = u32::try_from(tensor.dims.len()).expect("four at most");
            bytes.extend(dims.to_le_bytes());
            for dim in &tensor.dims {
                bytes.extend(dim.to_le_bytes());
            }
            bytes.extend(tensor.type_id.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            offset += padded(tensor.bytes);
        }
        out.write_all(&bytes)?;
        let written = u64::try_from(bytes.len()).expect("a length fits 64 bits");
        Ok(written + pad(out, written)?)
    }
}

/// Writes zeros from `position` to the next aligned one. Returns how many.
pub(super) fn pad(out: &mut impl Write, position: u64) -> io::Result<u64> {
    let missing = padded(position) - position;
    for _ in 0..missing {
        out.write_all(&[0])?;
    }
    Ok(missing)
}

/// Returns `bytes` rounded up to the alignment.
pub(super) fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT)
}

fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    let type_id: u32 = match value {
        Value::U32(_) => 4,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::Text(_) => 8,
        Value::Texts(_) | Value::F32s(_) | Value::I32s(_) => 9,
    };
    bytes.extend(type_id.to_le_bytes());
    match value {
        Value::U32(number) => bytes.extend(number.to_le_bytes()),
        Value::F32(number) => bytes.extend(number.to_le_bytes()),
        Value::Bool(truth) => bytes.push(u8::from(*truth)),
        Value::Text(text) => put_text(bytes, text),
        Value::Texts(texts) => {
            put_array_head(bytes, 8, texts.len());
            texts.iter().for_each(|text| put_text(bytes, text));
        }
        Value::F32s(numbers) => {
            put_array_head(bytes, 6, numbers.len());
            bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Value::I32s(numbers) => {
            put_array_head(bytes, 5, numbers.len());
            bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
    }
}

fn put_array_head(bytes: &mut Vec<u8>, type_id: u32, count: usize) {
    bytes.extend(type_id.to_le_bytes());
    bytes.extend(length(count));
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend(length(text.len()));
    bytes.extend(text.as_bytes());
}

fn length(count: usize) -> [u8; 8] {
    u64::try_from(count)
        .expect("a length fits 64 bits")
        .to_le_bytes()
}
