//! Finds the top-level `model` of a JSON object, piece by piece.
//!
//! Nothing is buffered but the key at hand and the value looked for; strings
//! are jumped over. It is no validator: what is wrong behind the model is the
//! worker's to say. Of a doubled key the first counts.

use memchr::memchr2;

/// A key or name longer than this, raw, is not the one looked for.
const LONGEST: usize = 1024;

/// What a scan says so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// The model's name.
    Found(String),
    /// Not yet: more of the body is needed.
    More,
    /// The object ended without it.
    Absent,
    /// It is there and is not a string.
    NotText,
    /// This is not a JSON object.
    NotJson,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the opening brace.
    Start,
    /// A key or the closing brace comes next.
    Key,
    /// Within a key.
    InKey,
    /// A colon comes next.
    Colon,
    /// A value comes next.
    Value,
    /// Within a string value.
    InText,
    /// Within a nested value, this deep.
    Nested(u32),
    /// Within a string of a nested value.
    NestedText(u32),
    /// Within a number or a word.
    Plain,
    /// A comma or the closing brace comes next.
    After,
}

/// The scanner. Fed with the pieces of a body in order.
#[derive(Debug)]
pub(super) struct Scanner {
    state: State,
    escaped: bool,
    raw: Vec<u8>,
    wanted: bool,
}

impl Scanner {
    pub(super) fn new() -> Self {
        Self {
            state: State::Start,
            escaped: false,
            raw: Vec::new(),
            wanted: false,
        }
    }

    /// Takes the next piece.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Scan {
        let mut rest = piece;
        while !rest.is_empty() {
            let step = match self.state {
                State::InKey | State::InText | State::NestedText(_) => self.text(rest),
                State::Nested(depth) => self.nested(rest, depth),
                State::Start
                | State::Key
                | State::Colon
                | State::Value
                | State::Plain
                | State::After => self.plain(rest[0]),
            };
            match step {
                Ok(used) => rest = &rest[used..],
                Err(end) => return end,
            }
        }
        Scan::More
    }

    /// Says what the end of the body means.
    pub(super) fn end(&self) -> Scan {
        Scan::NotJson
    }

    fn plain(&mut self, byte: u8) -> Result<usize, Scan> {
        if byte.is_ascii_whitespace() {
            if self.state == State::Plain {
                self.state = State::After;
            }
            return Ok(1);
        }
        self.state = match (self.state, byte) {
            (State::Start, b'{') => State::Key,
            // A byte order mark before the object is let pass.
            (State::Start, 0xEF | 0xBB | 0xBF) => State::Start,
            (State::Key, b'"') => {
                self.raw.clear();
                State::InKey
            }
            (State::Key | State::After | State::Plain, b'}') => return Err(Scan::Absent),
            (State::Colon, b':') => State::Value,
            (State::Value, b'"') => {
                self.raw.clear();
                State::InText
            }
            (State::Value, _) if self.wanted => return Err(Scan::NotText),
            (State::Value, b'{' | b'[') => State::Nested(1),
            (State::Value, b'}' | b']' | b',' | b':') => return Err(Scan::NotJson),
            (State::Value, _) => State::Plain,
            (State::After | State::Plain, b',') => State::Key,
            (State::Plain, _) => State::Plain,
            _ => return Err(Scan::NotJson),
        };
        Ok(1)
    }

    /// Jumps to the end of a string, or as far as the piece goes.
    fn text(&mut self, rest: &[u8]) -> Result<usize, Scan> {
        if self.escaped {
            self.escaped = false;
            self.keep(&rest[..1]);
            return Ok(1);
        }
        let Some(at) = memchr2(b'"', b'\\', rest) else {
            self.keep(rest);
            return Ok(rest.len());
        };
        self.keep(&rest[..at]);
        if rest[at] == b'\\' {
            self.escaped = true;
            self.keep(b"\\");
            return Ok(at + 1);
        }
        match self.state {
            State::InKey => {
                self.wanted = self.raw == b"model"
                    || self.raw.contains(&b'\\') && self.decoded().as_deref() == Some("model");
                self.state = State::Colon;
            }
            State::NestedText(depth) => self.state = State::Nested(depth),
            _ if self.wanted => return Err(self.decoded().map_or(Scan::NotText, Scan::Found)),
            _ => self.state = State::After,
        }
        Ok(at + 1)
    }

    fn nested(&mut self, rest: &[u8], depth: u32) -> Result<usize, Scan> {
        for (at, byte) in rest.iter().enumerate() {
            match byte {
                b'"' => {
                    self.state = State::NestedText(depth);
                    return Ok(at + 1);
                }
                b'{' | b'[' => {
                    self.state = State::Nested(depth.saturating_add(1));
                    return Ok(at + 1);
                }
                b'}' | b']' => {
                    self.state = if depth == 1 {
                        State::After
                    } else {
                        State::Nested(depth - 1)
                    };
                    return Ok(at + 1);
                }
                _ => {}
            }
        }
        Ok(rest.len())
    }

    /// Keeps the raw text of a key, or of the value looked for.
    fn keep(&mut self, bytes: &[u8]) {
        let needed = match self.state {
            State::InKey => true,
            State::InText => self.wanted,
            _ => false,
        };
        if needed && self.raw.len() <= LONGEST {
            self.raw
                .extend_from_slice(&bytes[..bytes.len().min(LONGEST + 1)]);
        }
    }

    /// The text kept, escapes undone; `None` when it is too long or broken.
    fn decoded(&self) -> Option<String> {
        if self.raw.len() > LONGEST {
            return None;
        }
        if !self.raw.iter().any(|byte| *byte == b'\\' || *byte < b' ') {
            return String::from_utf8(self.raw.clone()).ok();
        }
        let mut quoted = Vec::with_capacity(self.raw.len() + 2);
        quoted.push(b'"');
        quoted.extend_from_slice(&self.raw);
        quoted.push(b'"');
        serde_json::from_slice(&quoted).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scan(body: &str, piece: usize) -> Scan {
        let mut scanner = Scanner::new();
        for part in body.as_bytes().chunks(piece.max(1)) {
            match scanner.feed(part) {
                Scan::More => {}
                done => return done,
            }
        }
        scanner.end()
    }

    #[test]
    fn the_model_is_found_wherever_it_stands() {
        let found = |name: &str| Scan::Found(name.to_owned());
        for (body, expected) in [
            (r#"{"model":"m","x":1}"#, found("m")),
            (
                r#" { "x" : [1,{"model":"no"}], "y":"a\"}", "model" : "m" } "#,
                found("m"),
            ),
            (r#"{"mo\u0064el":"a\/b"}"#, found("a/b")),
            (r#"{"model":"first","model":"second"}"#, found("first")),
            (r#"{"n":-1.5e3,"t":true,"z":null,"model":"m"}"#, found("m")),
            (r#"{"messages":[{"model":"no"}]}"#, Scan::Absent),
            ("{}", Scan::Absent),
            (r#"{"model":7}"#, Scan::NotText),
            (r#"{"model":null}"#, Scan::NotText),
            ("[1]", Scan::NotJson),
            ("hello", Scan::NotJson),
            ("", Scan::NotJson),
            (r#"{"model": "#, Scan::NotJson),
        ] {
            for piece in 1..=body.len().max(1) {
                assert_eq!(scan(body, piece), expected, "{body} in pieces of {piece}");
            }
            for cut in 0..body.len() {
                let mut scanner = Scanner::new();
                let first = scanner.feed(&body.as_bytes()[..cut]);
                let seen = match first {
                    Scan::More => scanner.feed(&body.as_bytes()[cut..]),
                    done => done,
                };
                let seen = match seen {
                    Scan::More => scanner.end(),
                    done => done,
                };
                assert_eq!(seen, expected, "{body} cut at {cut}");
            }
        }
    }

    #[test]
    fn a_body_that_ends_before_its_model_is_whole_is_not_json() {
        let body = br#" {"x": [1, {"y": "\"}"}], "model": "m\u0065""#;
        for end in 0..body.len() - 1 {
            let mut scanner = Scanner::new();
            assert_eq!(scanner.feed(&body[..end]), Scan::More, "cut at {end}");
            assert_eq!(scanner.end(), Scan::NotJson, "cut at {end}");
        }
        assert_eq!(Scanner::new().feed(body), Scan::Found("me".into()));
    }

    #[test]
    fn a_million_brackets_cost_neither_stack_nor_memory() {
        let (open, close) = ("[".repeat(1 << 20), "]".repeat(1 << 20));
        let body = format!(r#"{{"x":{open}{close},"model":"m"}}"#);
        assert_eq!(scan(&body, 4096), Scan::Found("m".into()));
        let mut scanner = Scanner::new();
        assert_eq!(
            scanner.feed(format!(r#"{{"x":{open}"#).as_bytes()),
            Scan::More
        );
        assert_eq!(scanner.raw, b"x");
        assert_eq!(scanner.end(), Scan::NotJson);
    }

    #[test]
    fn keys_and_names_too_long_to_be_meant_are_not_kept() {
        let long = "x".repeat(1 << 20);
        let body = format!(r#"{{"{long}":"{long}","model":"m"}}"#);
        for piece in [1, 1000, body.len()] {
            let mut scanner = Scanner::new();
            let mut seen = Scan::More;
            let mut parts = body.as_bytes().chunks(piece);
            while seen == Scan::More {
                seen = scanner.feed(parts.next().expect("the model is in it"));
                assert!(scanner.raw.len() <= 2 * (LONGEST + 1));
            }
            assert_eq!(seen, Scan::Found("m".into()), "in pieces of {piece}");
        }
        assert_eq!(scan(&format!(r#"{{"model":"{long}"}}"#), 7), Scan::NotText);
        assert_eq!(scan(r#"{"model":"\ud800"}"#, 7), Scan::NotText);
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        use serde_json::{Map, Value};
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f32>().prop_map(|f| Value::from(f64::from(f))),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            let key = prop_oneof![Just("model".to_owned()), any::<String>()];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((key, inner), 0..6)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_full_parser(value in json(), piece in 1..40_usize, pretty in any::<bool>()) {
            let body = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let expected = match &value {
                serde_json::Value::Object(object) => match object.get("model") {
                    Some(serde_json::Value::String(name)) if name.len() < 200 => Scan::Found(name.clone()),
                    Some(serde_json::Value::String(_)) => return Ok(()),
                    Some(_) => Scan::NotText,
                    None => Scan::Absent,
                },
                _ => Scan::NotJson,
            };
            prop_assert_eq!(scan(&body.expect("it is JSON"), piece), expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), piece in 1..40_usize) {
            let mut scanner = Scanner::new();
            for part in bytes.chunks(piece) {
                scanner.feed(part);
            }
        }
    }
}
