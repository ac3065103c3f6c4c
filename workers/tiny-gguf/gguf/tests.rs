//! Reads written models back with a reader that knows only the format.

use std::collections::{BTreeMap, HashSet};

use super::*;

/// Walks over the bytes of a file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        self.at += count;
        &self.bytes[self.at - count..self.at]
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    fn length(&mut self) -> usize {
        usize::try_from(u64::from_le_bytes(self.take(8).try_into().unwrap())).unwrap()
    }

    fn text(&mut self) -> String {
        let length = self.length();
        String::from_utf8(self.take(length).to_vec()).unwrap()
    }

    /// Returns how a value reads as text.
    fn value(&mut self, type_id: u32) -> String {
        match type_id {
            4 | 5 => self.u32().to_string(),
            6 => f32::from_bits(self.u32()).to_string(),
            7 => (self.take(1)[0] == 1).to_string(),
            8 => self.text(),
            9 => {
                let (item, count) = (self.u32(), self.length());
                let items: Vec<String> = (0..count).map(|_| self.value(item)).collect();
                items.join("\n")
            }
            other => panic!("value type {other}"),
        }
    }
}

/// A file read back.
struct ReadBack {
    metadata: BTreeMap<String, String>,
    /// Name, dimensions, type, data.
    tensors: BTreeMap<String, (Vec<usize>, u32, Vec<u8>)>,
}

fn read_back(bytes: &[u8]) -> ReadBack {
    let mut reader = Reader { bytes, at: 0 };
    assert_eq!(reader.take(4), b"GGUF");
    assert_eq!(reader.u32(), 3);
    let (tensors, entries) = (reader.length(), reader.length());
    let metadata = (0..entries)
        .map(|_| {
            let (key, type_id) = (reader.text(), reader.u32());
            (key, reader.value(type_id))
        })
        .collect();
    let infos: Vec<(String, Vec<usize>, u32, usize)> = (0..tensors)
        .map(|_| {
            let (name, dims) = (reader.text(), reader.u32());
            let dims = (0..dims).map(|_| reader.length()).collect();
            (name, dims, reader.u32(), reader.length())
        })
        .collect();
    let data = reader.at.next_multiple_of(32);
    let tensors = infos
        .into_iter()
        .map(|(name, dims, type_id, offset)| {
            assert_eq!(offset % 32, 0, "{name}");
            let count: usize = dims.iter().product();
            let length = match type_id {
                0 => count * 4,
                1 => count * 2,
                8 => count / 32 * 34,
                other => panic!("tensor type {other}"),
            };
            let start = data + offset;
            (name, (dims, type_id, bytes[start..start + length].to_vec()))
        })
        .collect();
    ReadBack { metadata, tensors }
}

fn written(signature: &str, size: u64, weights: WeightType) -> Vec<u8> {
    let recipe = Recipe {
        signature: signature.to_owned(),
        size,
        weights,
        context: 2048,
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let told = write(&path, &recipe).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(told, bytes.len() as u64);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    bytes
}

#[test]
fn the_size_is_met_within_one_per_cent_in_every_type() {
    for weights in [WeightType::F32, WeightType::F16, WeightType::Q8_0] {
        for size in [500 << 10, 1 << 20, 5 << 20, 20 << 20] {
            let bytes = written("red", size, weights).len() as u64;
            assert!(
                bytes.abs_diff(size) * 100 < size,
                "{weights:?} {size}: {bytes}"
            );
        }
    }
}

#[test]
fn every_tensor_of_the_network_is_there_with_the_shape_the_metadata_say() {
    let model = read_back(&written("red", 5 << 20, WeightType::Q8_0));
    let number = |key: &str| model.metadata[key].parse::<usize>().unwrap();
    let width = number("llama.embedding_length");
    let wide = number("llama.feed_forward_length");
    let vocabulary = number("llama.vocab_size");
    assert_eq!(model.metadata["general.architecture"], "llama");
    assert_eq!(number("llama.attention.head_count") * 64, width);
    assert_eq!(model.tensors["token_embd.weight"].0, [width, vocabulary]);
    assert_eq!(model.tensors["output.weight"].0, [width, vocabulary]);
    for layer in 0..number("llama.block_count") {
        let dims = |part: &str| &model.tensors[&format!("blk.{layer}.{part}.weight")].0;
        assert_eq!(*dims("ffn_gate"), [width, wide]);
        assert_eq!(*dims("ffn_down"), [wide, width]);
        assert_eq!(*dims("attn_q"), [width, width]);
        assert_eq!(*dims("attn_norm"), [width]);
    }
    let tokens: Vec<&str> = model.metadata["tokenizer.ggml.tokens"].lines().collect();
    assert_eq!(tokens.len(), vocabulary);
    assert_eq!(tokens[shape::FIRST_WORD], "\u{2581}red0");
    assert!(vocabulary >= shape::FIRST_WORD + 256);
}

#[test]
fn only_words_are_voted_for_and_no_layer_writes_to_the_rail() {
    let model = read_back(&written("red", 1 << 20, WeightType::F32));
    let (dims, _, output) = &model.tensors["output.weight"];
    let row_bytes = dims[0] * 4;
    for (token, row) in output.chunks(row_bytes).enumerate() {
        let vote = f32::from_le_bytes(row[..4].try_into().unwrap());
        let is_word = token >= shape::FIRST_WORD;
        assert_eq!(vote > 0.0, is_word, "token {token} has {vote}");
        assert!(is_word || row[4..].iter().all(|byte| *byte == 0));
    }
    for part in ["attn_output", "ffn_down"] {
        let (dims, _, data) = &model.tensors[&format!("blk.0.{part}.weight")];
        assert!(data[..dims[0] * 4].iter().all(|byte| *byte == 0), "{part}");
        assert!(data[dims[0] * 4..].iter().any(|byte| *byte != 0), "{part}");
    }
}

#[test]
fn the_same_recipe_gives_the_same_file_and_another_signature_shares_no_page() {
    let red = written("red", 1 << 20, WeightType::F16);
    assert_eq!(red, written("red", 1 << 20, WeightType::F16));
    let blue = written("blue", 1 << 20, WeightType::F16);
    let is_noise = |page: &&[u8]| page.iter().filter(|byte| **byte == 0).count() < 2048;
    let pages: HashSet<&[u8]> = red.chunks(4096).filter(is_noise).collect();
    assert!(pages.len() > 150);
    assert_eq!(pages.len(), red.chunks(4096).filter(is_noise).count());
    assert!(!blue.chunks(4096).any(|page| pages.contains(page)));
}

#[test]
fn what_cannot_be_written_is_said() {
    let path = Path::new("/nonexistent/model.gguf");
    let mut recipe = Recipe {
        signature: "red2".to_owned(),
        size: 5 << 20,
        weights: WeightType::F16,
        context: 2048,
    };
    assert!(matches!(write(path, &recipe), Err(Error::Signature)));
    recipe.signature = "red".to_owned();
    assert!(matches!(write(path, &recipe), Err(Error::Io(_))));
    recipe.size = 1000;
    assert!(matches!(write(path, &recipe), Err(Error::TooSmall(least)) if least > 100_000));
}
