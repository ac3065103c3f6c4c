//! Changes the top level of a JSON object and nothing else: order, spelling of
//! names and numbers, and all that is nested stay as they were written. Only
//! white space between members is not kept.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::model::Filter;

/// The member that names the model.
const MODEL: &str = "model";
/// Let pass before an object by the scanner for the model, too.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The members of an object as they were written, doubled ones too.
#[derive(Debug)]
struct Members<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        from.deserialize_map(Reader)
    }
}

/// Returns an object's members; `None` when this is something else than an
/// object.
fn members(body: &[u8]) -> Result<Option<Members<'_>>, serde_json::Error> {
    let body = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
    if !body.trim_ascii_start().starts_with(b"{") {
        return Ok(None);
    }
    serde_json::from_slice(body).map(Some)
}

/// Returns a member's name; `None` when it is no text that anybody could mean.
fn name(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

/// Returns the body as the filter wants it; `None` when it is no object, so
/// that there is nothing to change.
///
/// # Errors
/// When it begins like an object and is none.
pub(super) fn rewrite(filter: &Filter, body: &[u8]) -> Result<Option<Vec<u8>>, serde_json::Error> {
    let Some(Members(members)) = members(body)? else {
        return Ok(None);
    };
    let model = filter.model.as_deref().map(serde_json::Value::from);
    let model = model.map(|model| model.to_string());
    let mut out = Object::with_room(body.len());
    let mut put: Vec<String> = Vec::new();
    for (raw, value) in members {
        let Some(name) = name(raw) else {
            out.member(raw.get(), value.get());
            continue;
        };
        if filter.strip.contains(&name) {
            continue;
        }
        let ours = match (filter.set.get(&name), &model) {
            (Some(value), _) => Some(value),
            (None, Some(model)) if name == MODEL => Some(model),
            (None, _) => None,
        };
        let Some(ours) = ours else {
            out.member(raw.get(), value.get());
            continue;
        };
        // Whichever of two the worker would take, it takes ours.
        if !put.contains(&name) {
            out.member(raw.get(), ours);
            put.push(name);
        }
    }
    for (name, value) in &filter.set {
        if !put.contains(name) {
            out.member(&serde_json::Value::from(name.as_str()).to_string(), value);
        }
    }
    Ok(Some(out.end()))
}

/// Returns whether the body is an object with `"stream": true`; of a doubled
/// one the last counts, as in most servers.
pub(super) fn asks_stream(body: &[u8]) -> bool {
    let Ok(Some(Members(members))) = members(body) else {
        return false;
    };
    let is_stream = |(raw, _): &&(&RawValue, &RawValue)| name(raw).as_deref() == Some("stream");
    let last = members.iter().rev().find(is_stream);
    last.is_some_and(|(_, value)| value.get() == "true")
}

/// An object that is written member by member.
#[derive(Debug)]
struct Object(Vec<u8>);

impl Object {
    fn with_room(room: usize) -> Self {
        let mut text = Vec::with_capacity(room);
        text.push(b'{');
        Self(text)
    }

    fn member(&mut self, name: &str, value: &str) {
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b':');
        self.0.extend_from_slice(value.as_bytes());
    }

    fn end(mut self) -> Vec<u8> {
        self.0.push(b'}');
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    fn filter(model: Option<&str>, set: &[(&str, Value)], strip: &[&str]) -> Filter {
        Filter {
            model: model.map(str::to_owned),
            set: set
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.to_string()))
                .collect(),
            strip: strip.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn rewritten(filter: &Filter, body: &str) -> String {
        let out = rewrite(filter, body.as_bytes()).expect("an object");
        String::from_utf8(out.expect("it is one")).expect("text")
    }

    #[test]
    fn members_keep_their_order_and_their_spelling() {
        let filter = filter(Some("org/x"), &[("temperature", json!(0.2))], &["top_k"]);
        for (body, expected) in [
            (
                r#" { "n" : 1.0e+02, "model":"m", "big": 12345678901234567890123, "x\u0041": [ 1, {"model":"m"} ] } "#,
                r#"{"n":1.0e+02,"model":"org/x","big":12345678901234567890123,"x\u0041":[ 1, {"model":"m"} ],"temperature":0.2}"#,
            ),
            (
                r#"{"temperature":1,"top_k":5,"a":"\ud800"}"#,
                r#"{"temperature":0.2,"a":"\ud800"}"#,
            ),
            (r#"{"top_k":5}"#, r#"{"temperature":0.2}"#),
            ("{}", r#"{"temperature":0.2}"#),
            ("\u{feff}{\"a\":1}", r#"{"a":1,"temperature":0.2}"#),
        ] {
            assert_eq!(rewritten(&filter, body), expected, "{body}");
        }
    }

    #[test]
    fn of_doubled_members_none_slips_through() {
        let filter = filter(Some("x"), &[("t", json!(0))], &["s"]);
        let body =
            r#"{"s":1,"model":"a","t":1,"s":2,"mo\u0064el":"b","\u0074":2,"\u0073":3,"k":1,"k":2}"#;
        let expected = r#"{"model":"x","t":0,"k":1,"k":2}"#;
        assert_eq!(rewritten(&filter, body), expected);
    }

    #[test]
    fn what_is_no_object_is_left_alone_and_what_is_broken_is_told() {
        let filter = filter(Some("x"), &[], &[]);
        for body in ["", "[1]", "a=b", "\"{}\"", "7"] {
            let out = rewrite(&filter, body.as_bytes()).expect("nothing is broken");
            assert_eq!(out, None, "{body}");
        }
        for body in ["{", "{\"a\":NaN}", "{} {}", "{\"a\":1,}", "{'a':1}"] {
            assert!(rewrite(&filter, body.as_bytes()).is_err(), "{body}");
        }
        assert!(rewrite(&filter, b"{\"a\":\"\xFF\"}").is_err());
    }

    #[test]
    fn a_million_brackets_cost_no_stack() {
        let (open, close) = ("[".repeat(1 << 20), "]".repeat(1 << 20));
        let body = format!(r#"{{"x":{open}{close},"stream":true}}"#);
        let strip = filter(None, &[], &["stream"]);
        assert!(asks_stream(body.as_bytes()));
        assert_eq!(
            rewritten(&strip, &body),
            format!(r#"{{"x":{open}{close}}}"#)
        );
    }

    #[test]
    fn a_stream_is_asked_for_at_the_top_level_only() {
        for (body, asks) in [
            (r#"{"stream":true}"#, true),
            (r#"{"stream": false, "stream" :true }"#, true),
            (r#"{"stream":true,"stream":false}"#, false),
            (r#"{"a":{"stream":true}}"#, false),
            (r#"{"stream":"true"}"#, false),
            (r#"{"stream":1}"#, false),
            (r#"[{"stream":true}]"#, false),
            (r#"{"stream":true"#, false),
        ] {
            assert_eq!(asks_stream(body.as_bytes()), asks, "{body}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((any::<String>(), inner), 0..4)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    /// Few names, so that they meet.
    fn member_name() -> impl Strategy<Value = String> {
        prop_oneof![
            8 => prop::sample::select(vec!["model", "a", "b", "", "é", "\"", "\n"]).prop_map(str::to_owned),
            1 => any::<String>(),
        ]
    }

    /// Writes a name as itself, or with every character escaped.
    fn spelt(name: &str, escaped: bool) -> String {
        if !escaped {
            return Value::from(name).to_string();
        }
        let units = name.encode_utf16();
        let units: Vec<_> = units.map(|unit| format!("\\u{unit:04x}")).collect();
        format!("\"{}\"", units.concat())
    }

    proptest! {
        #[test]
        fn it_says_what_parsing_changing_and_writing_would_say(
            members in prop::collection::vec((member_name(), any::<bool>(), value(), any::<bool>()), 0..8),
            model in prop::option::of(any::<String>()),
            set in prop::collection::btree_map(member_name(), value(), 0..4),
            strip in prop::collection::btree_set(member_name(), 0..4),
        ) {
            // What the check of the configuration lets pass.
            prop_assume!(set.keys().all(|name| !strip.contains(name)));
            // Reading may round the last digit, so the text is what counts.
            let set: BTreeMap<_, _> =
                set.into_iter().map(|(name, value)| (name, value.to_string())).collect();
            let twice = set.contains_key("model") || strip.contains("model");
            let model = model.filter(|_| !twice);
            let texts: Vec<_> = members
                .iter()
                .map(|(name, escaped, value, pretty)| {
                    let value = if *pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
                    (spelt(name, *escaped), value.expect("JSON"))
                })
                .collect();
            let pairs: Vec<_> = texts.iter().map(|(name, value)| format!("\t{name} : {value}\n")).collect();
            let body = format!(" {{{}}} ", pairs.join(","));

            let mut plain: Map<String, Value> = serde_json::from_str(&body).expect("JSON");
            plain.retain(|name, _| !strip.contains(name));
            if let (Some(model), Some(asked)) = (&model, plain.get_mut("model")) {
                *asked = Value::from(model.as_str());
            }
            let said = |text: &String| serde_json::from_str::<Value>(text).expect("JSON");
            plain.extend(set.iter().map(|(name, text)| (name.clone(), said(text))));

            let filter = Filter {
                model,
                set,
                strip,
            };
            let out = rewritten(&filter, &body);
            prop_assert_eq!(serde_json::from_str::<Value>(&out).expect("JSON"), Value::Object(plain));

            // What is not touched is there byte by byte, in its order.
            let touched = |name: &str| {
                filter.strip.contains(name) || filter.set.contains_key(name) || (name == "model" && filter.model.is_some())
            };
            let kept: Vec<_> = members.iter().zip(&texts).filter(|((name, ..), _)| !touched(name)).map(|(_, text)| text.clone()).collect();
            let Members(left) = super::members(out.as_bytes()).expect("JSON").expect("an object");
            let left: Vec<_> = left
                .iter()
                .filter(|(raw, _)| !touched(&name(raw).expect("a name")))
                .map(|(raw, value)| (raw.get().to_owned(), value.get().to_owned()))
                .collect();
            prop_assert_eq!(left, kept);
        }

        #[test]
        fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..60)) {
            let filter = filter(Some("x"), &[("a", json!(1))], &["b"]);
            let _ = rewrite(&filter, &body);
            let _ = rewrite(&filter, &[b"{", &body[..]].concat());
        }
    }
}
