//! The keys of a model about its requests: how long one may take, what is
//! changed in its body, what a client hears while it waits.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value as Json;
use toml::de::{DeFloat, DeValue};

use super::context::given;
use super::problem::{Complaint, Problems};
use super::section::{Section, Setting};
use super::value::Value;
use crate::model::{Filter, RequestSpec};

/// How often a client hears something when the configuration only says that it
/// does: under the shortest that proxies and clients wait for a byte.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// More often would be noise.
const LEAST_HEARTBEAT: Duration = Duration::from_millis(100);

/// The keys, of which a source may say any part.
#[derive(Clone, Debug, Default)]
pub(super) struct RawRequests {
    timeout: Option<Setting<Duration>>,
    model: Option<Setting<String>>,
    set: Option<Setting<BTreeMap<String, String>>>,
    strip: Option<Setting<Vec<String>>>,
    heartbeat: Option<Setting<Duration>>,
}

impl RawRequests {
    /// Reads the keys out of the model's own table.
    pub(super) fn read(section: &mut Section<'_>, problems: &mut Problems) -> Self {
        let s = section;
        Self {
            timeout: s.get("request_timeout", Value::duration, problems),
            model: s.get("use_model_name", Value::filled_text, problems),
            set: s.table("set_params", problems).map(|table| {
                let place = table.place.clone();
                let members = table.each(as_json, problems).into_iter();
                let value = members.map(|(name, json)| (name, json.value)).collect();
                Setting { value, place }
            }),
            strip: s.list("strip_params", Value::text, problems),
            heartbeat: s.get("heartbeat", heartbeat, problems),
        }
    }

    /// Fills in from the weaker what this does not say, key by key; a table or
    /// list that is said stands for itself.
    pub(super) fn over(self, weaker: Self) -> Self {
        Self {
            timeout: self.timeout.or(weaker.timeout),
            model: self.model.or(weaker.model),
            set: self.set.or(weaker.set),
            strip: self.strip.or(weaker.strip),
            heartbeat: self.heartbeat.or(weaker.heartbeat),
        }
    }

    /// Tells members of which two things are said.
    pub(super) fn check(&self, problems: &mut Problems) {
        let strips = |name: &str| {
            let strip = self.strip.as_ref();
            strip.filter(|strip| strip.value.iter().any(|stripped| stripped == name))
        };
        for (name, place) in self.set.iter().flat_map(|set| {
            let names = set.value.keys();
            names.map(move |name| (name, set.place.below(name)))
        }) {
            if strips(name).is_some() {
                let what = "is in strip_params too";
                problems.error(&place, what, "remove it here or there");
            }
            if name == "model" && self.model.is_some() {
                let what = "is what use_model_name says";
                problems.error(&place, what, "remove one of the two");
            }
        }
        if let (Some(strip), Some(_)) = (strips("model"), &self.model) {
            let what = "takes \"model\" out, and use_model_name says what it is";
            problems.error(&strip.place, what, "remove one of the two");
        }
    }

    /// Returns what all sources together say.
    pub(super) fn given(self) -> RequestSpec {
        let over_zero = |time: Setting<Duration>| (!time.value.is_zero()).then_some(time.value);
        let strip = self.strip.map(|strip| strip.value).unwrap_or_default();
        RequestSpec {
            timeout: Some(given(self.timeout)).filter(|time: &Duration| !time.is_zero()),
            filter: Filter {
                model: self.model.map(|model| model.value),
                set: self.set.map(|set| set.value).unwrap_or_default(),
                strip: strip.into_iter().collect(),
            },
            heartbeat: self.heartbeat.and_then(over_zero),
        }
    }
}

/// Reads whether there are heartbeats, or how often; zero is never.
fn heartbeat(value: &Value<'_>) -> Result<Duration, Complaint> {
    let fix = r#"write true, false, or how often, e.g. "10s""#;
    let often = match value.flag() {
        Ok(true) => return Ok(HEARTBEAT),
        Ok(false) => return Ok(Duration::ZERO),
        Err(_) => value.duration().map_err(|_| value.is_not("how often", fix)),
    }?;
    if !often.is_zero() && often < LEAST_HEARTBEAT {
        return Err(value.is_not("100ms or more", fix));
    }
    Ok(often)
}

/// Reads a value as the JSON that a request would hold.
fn as_json(value: &Value<'_>) -> Result<String, Complaint> {
    let json = match value {
        Value::Toml(value) => to_json(value),
        // Without a type there is only text.
        Value::Bare(text) | Value::BareSeconds(text) => Ok(Json::from(text.as_ref())),
    };
    json.map(|json| json.to_string())
}

fn to_json(value: &DeValue<'_>) -> Result<Json, Complaint> {
    let none = |what: &str| {
        let what = format!("holds {what}, which JSON has no word for");
        Complaint::new(
            what,
            "write a text, a number, true, false, a list or a table",
        )
    };
    Ok(match value {
        DeValue::String(text) => Json::from(text.as_ref()),
        DeValue::Boolean(flag) => Json::from(*flag),
        DeValue::Integer(_) => {
            let number = Value::Toml(value).as_integer();
            let signed = number.and_then(|number| i64::try_from(number).ok());
            let unsigned = number.and_then(|number| u64::try_from(number).ok());
            match (signed, unsigned) {
                (Some(number), _) => Json::from(number),
                (None, Some(number)) => Json::from(number),
                (None, None) => return Err(none("a number that is too large")),
            }
        }
        DeValue::Float(number) => float(number).ok_or_else(|| none("no finite number"))?,
        DeValue::Datetime(_) => return Err(none("a date")),
        DeValue::Array(items) => {
            let items = items.iter().map(|item| to_json(item.get_ref()));
            Json::Array(items.collect::<Result<_, _>>()?)
        }
        DeValue::Table(table) => {
            let members = table
                .iter()
                .map(|(name, value)| Ok((name.get_ref().to_string(), to_json(value.get_ref())?)));
            Json::Object(members.collect::<Result<_, Complaint>>()?)
        }
    })
}

/// Returns a finite number; JSON has no other.
fn float(number: &DeFloat<'_>) -> Option<Json> {
    let number = number.as_str().parse().ok()?;
    serde_json::Number::from_f64(number).map(Json::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(toml: &str, read: impl FnOnce(&Value<'_>) -> T) -> T {
        let value = DeValue::parse(toml).expect("the test's TOML is right");
        read(&Value::Toml(value.get_ref()))
    }

    #[test]
    fn a_value_of_the_file_becomes_the_json_that_says_the_same() {
        for (toml, json) in [
            ("\"a\\\"b\"", "\"a\\\"b\""),
            ("true", "true"),
            ("-7", "-7"),
            ("0xFF", "255"),
            ("1_000", "1000"),
            ("0.2", "0.2"),
            ("1.0", "1.0"),
            ("5e-1", "0.5"),
            ("[1, 'x', [false]]", "[1,\"x\",[false]]"),
            ("{ b = 1, a = { c = [] } }", "{\"a\":{\"c\":[]},\"b\":1}"),
        ] {
            assert_eq!(with(toml, as_json).as_deref(), Ok(json), "{toml}");
        }
        for toml in ["nan", "-inf", "1979-05-27", "[1, { x = inf }]"] {
            assert!(with(toml, as_json).is_err(), "{toml}");
        }
    }

    #[test]
    fn a_heartbeat_is_a_flag_or_how_often() {
        assert_eq!(with("true", heartbeat), Ok(HEARTBEAT));
        assert_eq!(with("false", heartbeat), Ok(Duration::ZERO));
        assert_eq!(with("'0s'", heartbeat), Ok(Duration::ZERO));
        assert_eq!(with("'200ms'", heartbeat), Ok(Duration::from_millis(200)));
        for toml in ["'1ms'", "'often'", "5", "'true'"] {
            assert!(with(toml, heartbeat).is_err(), "{toml}");
        }
    }
}
