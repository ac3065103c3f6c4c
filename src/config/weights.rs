//! Which files hold a model's weights, and how large they are together: the
//! first guess at what a load will need. Looks at names and sizes only, never
//! into a file.

use std::fs;
use std::path::{Path, PathBuf};

use crate::model::Bytes;

/// Endings of files that commands name beside their weights. One that the worker
/// writes would tell each life from the last, and none would be taken back.
const NOT_WEIGHTS: [&str; 26] = [
    "py", "sh", "js", "mjs", "rb", "pl", "lua", "json", "yaml", "yml", "toml", "ini", "cfg",
    "conf", "txt", "jinja", "log", "md", "out", "err", "pid", "jsonl", "csv", "db", "sqlite",
    "pem",
];

/// Digits of a shard's number, as in `model-00001-of-00005.gguf`.
const SHARD_DIGITS: usize = 5;

/// Returns the weight files that a command's arguments name, in order and
/// each once: files that exist (also as `--model=FILE`), with all shards of a
/// sharded one, and the `*.safetensors` of folders. Relative ones begin at
/// `base`.
#[must_use]
pub fn find(arguments: &[String], base: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for argument in arguments {
        let found = named(argument, base).or_else(|| {
            let (_, value) = argument.split_once('=')?;
            named(value, base)
        });
        for file in found.unwrap_or_default() {
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    files
}

/// Returns what one path stands for: a file, all shards of it, or the
/// `*.safetensors` of a folder. Empty when there is none.
#[must_use]
pub fn resolve(path: &Path) -> Vec<PathBuf> {
    if path.is_dir() {
        return safetensors_within(path);
    }
    if !path.is_file() {
        return Vec::new();
    }
    let shards = shards_of(path);
    if shards.is_empty() {
        return vec![path.to_path_buf()];
    }
    shards
}

/// Returns the sum of the files' sizes; a file that is gone counts nothing.
#[must_use]
pub fn total(files: &[PathBuf]) -> Bytes {
    let size = |file: &PathBuf| fs::metadata(file).map_or(0, |meta| meta.len());
    files.iter().map(|file| Bytes(size(file))).sum()
}

fn named(argument: &str, base: &Path) -> Option<Vec<PathBuf>> {
    let path = base.join(argument);
    let is_option = argument.is_empty() || argument.starts_with('-');
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    let is_other = extension.is_some_and(|e| NOT_WEIGHTS.iter().any(|other| e == *other));
    if is_option || is_other {
        return None;
    }
    let files = resolve(&path);
    (!files.is_empty()).then_some(files)
}

fn safetensors_within(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// Returns the shards beside a file that exist, itself among them; empty when
/// its name is not a shard's.
fn shards_of(path: &Path) -> Vec<PathBuf> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let Some((stem, count, extension)) = split_shard(name) else {
        return Vec::new();
    };
    let shard = |number| {
        path.with_file_name(format!(
            "{stem}-{number:0SHARD_DIGITS$}-of-{count:0SHARD_DIGITS$}.{extension}"
        ))
    };
    (1..=count).map(shard).filter(|p| p.is_file()).collect()
}

/// Splits `model-00002-of-00005.gguf` into `model`, 5 and `gguf`.
fn split_shard(name: &str) -> Option<(&str, u32, &str)> {
    let (name, extension) = name.rsplit_once('.')?;
    let (name, count) = name.rsplit_once("-of-")?;
    let (stem, number) = name.rsplit_once('-')?;
    let is_number =
        |text: &str| text.len() == SHARD_DIGITS && text.bytes().all(|b| b.is_ascii_digit());
    if !is_number(number) || !is_number(count) {
        return None;
    }
    Some((stem, count.parse().ok()?, extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(files: &[(&str, usize)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, size) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("below the folder")).expect("created");
            fs::write(path, vec![0; *size]).expect("written");
        }
        folder
    }

    fn names(files: &[PathBuf], folder: &Path) -> Vec<String> {
        let below = |file: &PathBuf| file.strip_prefix(folder).expect("below").to_path_buf();
        let text = |path: PathBuf| path.display().to_string();
        files.iter().map(|file| text(below(file))).collect()
    }

    fn found_in(folder: &Path, arguments: &[&str]) -> Vec<String> {
        let arguments: Vec<_> = arguments.iter().map(|a| (*a).to_owned()).collect();
        names(&find(&arguments, folder), folder)
    }

    #[test]
    fn files_among_the_arguments_are_weights_but_scripts_and_options_are_not() {
        let folder = folder_with(&[
            ("a.gguf", 1),
            ("mmproj.gguf", 1),
            ("serve.py", 1),
            ("voice.onnx", 1),
            ("voice.onnx.json", 1),
            ("-m", 1),
        ]);
        assert_eq!(
            found_in(
                folder.path(),
                &["serve.py", "-m", "a.gguf", "--mmproj=mmproj.gguf", "a.gguf"]
            ),
            ["a.gguf", "mmproj.gguf"]
        );
        assert_eq!(
            found_in(
                folder.path(),
                &[
                    "voice.onnx",
                    "--config",
                    "voice.onnx.json",
                    "",
                    "gone.gguf",
                    "="
                ]
            ),
            ["voice.onnx"]
        );
    }

    #[test]
    fn an_absolute_path_needs_no_base() {
        let folder = folder_with(&[("a.gguf", 1)]);
        let absolute = folder.path().join("a.gguf");
        let argument = format!("--model={}", absolute.display());
        assert_eq!(find(&[argument], Path::new("/nowhere")), [absolute]);
    }

    #[test]
    fn one_shard_stands_for_all_that_exist() {
        let folder = folder_with(&[
            ("m-00001-of-00003.gguf", 1),
            ("m-00002-of-00003.gguf", 2),
            ("m-00003-of-00003.gguf", 4),
            ("m-00001-of-00002.gguf", 8),
            ("m.gguf", 16),
        ]);
        let first = folder.path().join("m-00001-of-00003.gguf");
        let all = resolve(&first);
        assert_eq!(all.len(), 3);
        assert_eq!(total(&all), Bytes(7));
        fs::remove_file(folder.path().join("m-00002-of-00003.gguf")).expect("removed");
        assert_eq!(total(&resolve(&first)), Bytes(5));
        assert_eq!(total(&all), Bytes(5), "a file that is gone counts nothing");
    }

    #[test]
    fn a_folder_stands_for_its_safetensors() {
        let folder = folder_with(&[
            ("hf/model-00002-of-00002.safetensors", 2),
            ("hf/model-00001-of-00002.safetensors", 3),
            ("hf/config.json", 100),
            ("empty/readme", 1),
        ]);
        let files = found_in(folder.path(), &["vllm", "serve", "hf", "--tokenizer", "hf"]);
        assert_eq!(
            files,
            [
                "hf/model-00001-of-00002.safetensors",
                "hf/model-00002-of-00002.safetensors"
            ]
        );
        assert!(found_in(folder.path(), &["empty"]).is_empty());
    }

    #[test]
    fn only_five_digits_of_five_make_a_shard() {
        assert_eq!(
            split_shard("a-b-00001-of-00005.gguf"),
            Some(("a-b", 5, "gguf"))
        );
        for name in ["a-1-of-5.gguf", "a.gguf", "a-00001-of-0000x.gguf", "-of-."] {
            assert_eq!(split_shard(name), None, "{name}");
        }
    }
}
