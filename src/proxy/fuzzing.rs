//! What `fuzz/` calls: the readers of bodies beside full parsers, which read all
//! of a body at once, and the reader of answers beside hyper's.
//!
//! Each function panics when a reader's answer depends on where a body is cut,
//! or is another than the parser's, or when too many bytes are looked at. Here
//! because the readers are nobody else's business; the feature `fuzzing` makes
//! this module public, and the tests below run the corpus that is kept in
//! `tests/fixtures/fuzz`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;

use bytes::Bytes;
use futures_util::{FutureExt, stream};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::filter::spliced;
pub use super::http1::fuzzing::answer;
use super::multipart::{Finder, Seen};
use super::rewrite;
use super::scan::{Scan, Scanner};
use crate::model::Filter;

/// Bodies up to this are cut in two at each place.
const CUT_EVERYWHERE: usize = 200;
/// The boundary of all forms here: short, so that it is hit.
const BOUNDARY: &str = "b-";

/// Returns a body in pieces, in many ways.
pub(super) fn ways(body: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    let sizes = [1, 2, 3, 7, 64].into_iter();
    let pieces = sizes.map(|size| body.chunks(size).collect());
    let cuts = 0..body.len().min(CUT_EVERYWHERE);
    pieces.chain(cuts.map(|at| vec![&body[..at], &body[at..]]))
}

/// Compares [`Scanner`] with serde_json.
///
/// # Panics
/// When they differ.
pub fn scan(body: &[u8]) {
    let scanned = |pieces: &[&[u8]]| {
        let mut scanner = Scanner::new();
        let mut seen = pieces.iter().map(|piece| scanner.feed(piece));
        let seen = seen.find(|seen| *seen != Scan::More);
        seen.unwrap_or_else(|| scanner.end())
    };
    let whole = scanned(&[body]);
    for pieces in ways(body) {
        assert_eq!(scanned(&pieces), whole, "in {pieces:?}");
    }
    if let Some(expected) = parsed(body) {
        assert_eq!(whole, expected);
    }
}

/// Returns what a full parser says of a body; `None` when it is no JSON.
fn parsed(body: &[u8]) -> Option<Scan> {
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    serde_json::from_slice::<&RawValue>(body).ok()?;
    let Ok(First(member)) = serde_json::from_slice(body) else {
        return Some(Scan::NotJson);
    };
    Some(match member.map(|raw| (raw.get(), text(raw))) {
        None => Scan::Absent,
        Some((raw, Some(name))) if raw.len() - 2 <= 1024 => Scan::Found(name),
        Some(_) => Scan::NotText,
    })
}

fn text(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

/// The first `model` of an object.
struct First<'a>(Option<&'a RawValue>);

impl<'de> Deserialize<'de> for First<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = First<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut first = None;
                while let Some(key) = map.next_key::<&RawValue>()? {
                    if first.is_none() && text(key).as_deref() == Some("model") {
                        first = Some(map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(First(first))
            }
        }
        from.deserialize_map(Reader)
    }
}

/// Compares [`Finder`] with a parser that has the whole form before it, and on
/// forms as clients write them with multer. The first byte says which.
///
/// # Panics
/// When they differ, or too many bytes are looked at.
pub fn form(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    if data.len() > 4 << 10 {
        return;
    }
    if kind % 2 == 0 {
        let body = written(data);
        assert_eq!(found(&body), by_multer(&body), "{}", body.escape_ascii());
    }
    let body = match kind % 2 {
        0 => &written(data),
        _ => data,
    };
    assert_eq!(found(body), split(body), "{}", body.escape_ascii());
}

/// Returns what [`Finder`] says, however the form is cut.
fn found(body: &[u8]) -> Option<Vec<u8>> {
    let seen = |pieces: &[&[u8]]| {
        let mut finder = Finder::new(BOUNDARY);
        let mut seen = pieces.iter().map(|piece| finder.feed(piece));
        let seen = seen.find(|seen| *seen != Seen::More);
        let (work, again) = finder.work();
        let most = 3 * (body.len() + 2) + pieces.len() * again;
        assert!(work <= most, "{work} of {most}");
        let Some(Seen::Found(name)) = seen else {
            return None;
        };
        let place = finder.place();
        let text = body[place.clone()].to_vec();
        assert_eq!(name, String::from_utf8_lossy(&text));
        let pieces: VecDeque<_> = pieces
            .iter()
            .map(|piece| Bytes::copy_from_slice(piece))
            .collect();
        let changed = spliced(pieces, &place, &Bytes::from_static(b"new"));
        let expected = [&body[..place.start], b"new", &body[place.end..]].concat();
        assert_eq!(Vec::from_iter(changed).concat(), expected);
        Some(text)
    };
    let whole = seen(&[body]);
    for pieces in ways(body) {
        assert_eq!(seen(&pieces), whole, "in {pieces:?}");
    }
    whole
}

/// Finds the field in a whole form: between its delimiters are its parts.
fn split(body: &[u8]) -> Option<Vec<u8>> {
    let mark = format!("\r\n--{BOUNDARY}");
    let body = [b"\r\n", body].concat();
    let mut begun: Option<usize> = None;
    for at in 0..body.len() {
        let Some(behind) = body[at..].strip_prefix(mark.as_bytes()) else {
            continue;
        };
        let is_last = behind.starts_with(b"--");
        let padding = behind.iter().take(16);
        let padding = padding.take_while(|byte| b" \t".contains(byte)).count();
        if !is_last && !behind[padding..].starts_with(b"\r\n") {
            continue;
        }
        if let Some(text) = begun.and_then(|start| content(&body[start..at])) {
            return Some(text);
        }
        if is_last {
            return None;
        }
        begun = Some(at + mark.len() + padding);
    }
    None
}

/// Returns the content of a part whose name is the one looked for.
fn content(part: &[u8]) -> Option<Vec<u8>> {
    // The end of the blank line may be the delimiter's.
    let part = [part, b"\r\n"].concat();
    let blank = part.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&part[..blank]).into_owned();
    let is_ours = head.lines().any(|line| {
        let (name, value) = line.split_once(':').unwrap_or_default();
        name.trim().eq_ignore_ascii_case("content-disposition") && is_named(value)
    });
    let end = part.len() - 2;
    is_ours.then(|| part[(blank + 4).min(end)..end].to_vec())
}

/// Whether a header's first parameter `name` is the one looked for: all of it is
/// taken apart, character by character.
fn is_named(value: &str) -> bool {
    let (mut parameters, mut quoted, mut escaped) = (vec![String::new()], false, false);
    for character in value.chars() {
        let last = parameters.last_mut().expect("there is one");
        let begins = last
            .split_once('=')
            .is_some_and(|(_, v)| v.trim().is_empty());
        match character {
            '"' if quoted && !escaped => quoted = false,
            '"' if !quoted && begins => quoted = true,
            ';' if !quoted => {
                parameters.push(String::new());
                continue;
            }
            _ => {}
        }
        last.push(character);
        escaped = quoted && character == '\\' && !escaped;
    }
    let mut pairs = parameters.iter().filter_map(|text| text.split_once('='));
    let named = pairs.find(|(name, _)| name.trim().eq_ignore_ascii_case("name"));
    named.is_some_and(|(_, value)| {
        let value = value.trim();
        value == "model" || value.split('"').nth(1) == Some("model") && value.starts_with('"')
    })
}

/// Writes a form as clients do, its parts chosen by the data.
fn written(data: &[u8]) -> Vec<u8> {
    const NAMES: [&str; 6] = ["model", "file", "models", "prompt", "Model", "x-model"];
    const FILES: [&str; 4] = [
        "",
        "; filename=\"a.wav\"",
        "; filename=\"model\"",
        "; filename=\"a;b=c\"",
    ];
    const MORE: [&str; 4] = [
        "",
        "Content-Type: text/plain\r\n",
        "X: model\r\n",
        "content-length: 3\r\n",
    ];
    let mut body = Vec::new();
    for part in data
        .split(|byte| *byte == 0xFF)
        .filter(|part| part.len() > 1)
    {
        let (choice, content) = (usize::from(part[0]), &part[1..]);
        let disposition = ["Content-Disposition", "content-disposition"][choice / 96 % 2];
        let (name, file) = (NAMES[choice % 6], FILES[choice / 6 % 4]);
        let more = MORE[choice / 24 % 4];
        let head = format!(
            "--{BOUNDARY}\r\n{more}{disposition}: form-data; name=\"{name}\"{file}\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        // What has the boundary in it would be another form.
        if !content
            .windows(BOUNDARY.len())
            .any(|two| two == BOUNDARY.as_bytes())
        {
            body.extend_from_slice(content);
        }
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

fn by_multer(body: &[u8]) -> Option<Vec<u8>> {
    let whole = stream::iter([Ok::<_, Infallible>(Bytes::copy_from_slice(body))]);
    let mut form = multer::Multipart::new(whole, BOUNDARY);
    let reading = async {
        while let Some(field) = form.next_field().await.expect("a form") {
            let is_ours = field.name() == Some("model");
            let content = field.bytes().await.expect("a field");
            if is_ours {
                return Some(content.to_vec());
            }
        }
        None
    };
    reading.now_or_never().expect("all of it is there")
}

/// Compares the rewriting of JSON with parsing, changing and writing it. The
/// first byte says what is changed.
///
/// # Panics
/// When they differ.
pub fn rewritten(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else {
        return;
    };
    let filter = filter(*choice);
    let full: Option<Map<String, Value>> = {
        let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
        serde_json::from_slice(body).ok()
    };
    let out = match rewrite::rewrite(&filter, body) {
        Ok(Some(out)) => out,
        Ok(None) | Err(_) => {
            assert_eq!(full, None, "an object is left alone");
            return;
        }
    };
    let again = rewrite::rewrite(&filter, &out).expect("JSON");
    assert_eq!(again.as_ref(), Some(&out), "twice is once");
    // What the parser cannot hold, such as 1e999, passes as it is.
    let Some(mut full) = full else { return };
    let asks_stream = full.get("stream") == Some(&json!(true));
    assert_eq!(rewrite::asks_stream(body), asks_stream);
    full.retain(|name, _| !filter.strip.contains(name));
    if let (Some(model), Some(named)) = (&filter.model, full.get_mut("model")) {
        *named = json!(model);
        assert_eq!(parsed(&out), Some(Scan::Found(model.clone())));
    }
    for (name, text) in &filter.set {
        full.insert(name.clone(), serde_json::from_str(text).expect("JSON"));
    }
    let out: Value = serde_json::from_slice(&out).expect("JSON");
    assert_eq!(out, Value::Object(full));
}

fn filter(choice: u8) -> Filter {
    let has = |bit: u8| choice & (1 << bit) != 0;
    let pick = |pairs: &[(u8, &str)]| {
        let picked = pairs.iter().filter(|(bit, _)| has(*bit));
        picked
            .map(|(_, name)| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    let set = pick(&[(1, "a"), (2, "é\"\n"), (3, "stream")]);
    Filter {
        model: has(0).then(|| "org/\"x\"".to_owned()),
        set: set
            .into_iter()
            .map(|name| (name, r#"{"b": [1.50, "\u00e9"]}"#.to_owned()))
            .collect(),
        strip: pick(&[(4, "s"), (5, ""), (6, "top_k")])
            .into_iter()
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Runs each file of the corpus, and its beginnings.
    fn corpus(folder: &str, run: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/fuzz")
            .join(folder);
        let mut files = 0;
        for file in std::fs::read_dir(folder).expect("the corpus is there") {
            let path = file.expect("the folder is readable").path();
            let data = std::fs::read(&path).expect("the file is readable");
            // Of long ones some beginnings tell as much as all.
            for end in (0..data.len()).step_by(1 + data.len() / 100) {
                run(&data[..end]);
            }
            run(&data);
            files += 1;
        }
        assert!(files >= 10, "{files} files are no corpus");
    }

    #[test]
    fn the_scanner_and_a_full_parser_say_the_same_of_the_corpus() {
        corpus("scan", scan);
    }

    #[test]
    fn the_finder_and_full_parsers_say_the_same_of_the_corpus() {
        corpus("form", form);
    }

    #[test]
    fn answers_are_read_as_hyper_reads_them() {
        corpus("answer", answer);
    }

    #[test]
    fn rewriting_and_parsing_say_the_same_of_the_corpus() {
        corpus("rewritten", rewritten);
    }
}
