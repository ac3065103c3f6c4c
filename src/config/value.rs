//! One value as it was written, and what it can be read as.
//!
//! Values of files have a type; those of variables and flags are bare text.
//! Both go through the same readers, so a key means the same everywhere.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use toml::de::{DeInteger, DeValue};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::problem::Complaint;
use super::{Listen, LogFormat, Threshold, units};
use crate::model::{Bytes, EvictionPolicy, ModelName, Prefetch};

/// A value as it was written.
#[derive(Clone, Debug)]
pub(super) enum Value<'a> {
    /// Of a file.
    Toml(&'a DeValue<'a>),
    /// Of a variable or a flag.
    Bare(Cow<'a, str>),
    /// Of a variable in which a plain number means seconds.
    BareSeconds(Cow<'a, str>),
}

/// Characters of a wrong value that a message shows.
const SHOWN: usize = 60;

/// Bytes of a Unix socket's path: `sun_path` less its closing zero.
const SOCKET_PATH: usize = 107;

/// Real-time signals end here on Linux.
const LAST_SIGNAL: i128 = 64;

impl<'a> Value<'a> {
    /// Shows the value as a message names it.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Toml(DeValue::String(text)) => quoted(text),
            Self::Bare(text) | Self::BareSeconds(text) => quoted(text),
            Self::Toml(DeValue::Boolean(flag)) => flag.to_string(),
            Self::Toml(DeValue::Integer(number)) => number.to_string(),
            Self::Toml(DeValue::Float(number)) => number.to_string(),
            Self::Toml(DeValue::Datetime(_)) => "a date".to_owned(),
            Self::Toml(DeValue::Array(_)) => "a list".to_owned(),
            Self::Toml(DeValue::Table(_)) => "a table".to_owned(),
        }
    }

    /// Complains that the value is not `wanted`.
    pub(super) fn is_not(&self, wanted: &str, fix: impl Into<String>) -> Complaint {
        Complaint::new(format!("{} is not {wanted}", self.shown()), fix)
    }

    /// Returns the text, when the value is one.
    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Toml(DeValue::String(text)) => Some(text),
            Self::Bare(text) | Self::BareSeconds(text) => Some(text),
            Self::Toml(_) => None,
        }
    }

    /// Returns the whole number, when the value is one.
    pub(super) fn as_integer(&self) -> Option<i128> {
        match self {
            Self::Toml(DeValue::Integer(number)) => integer(number),
            Self::Bare(text) => text.trim().parse().ok(),
            Self::Toml(_) | Self::BareSeconds(_) => None,
        }
    }

    /// Reads a text without a NUL byte, which no program could be given.
    /// Returns the value as a number, of a fraction or not.
    pub(super) fn as_number(&self) -> Option<f64> {
        match self {
            Self::Toml(DeValue::Float(number)) => number.as_str().parse().ok(),
            Self::Toml(DeValue::Integer(number)) => number.as_str().parse().ok(),
            Self::Toml(_) => None,
            Self::Bare(text) | Self::BareSeconds(text) => text.trim().parse().ok(),
        }
    }

    pub(super) fn text(&self) -> Result<String, Complaint> {
        match self.as_text() {
            Some(text) if text.contains('\0') => {
                Err(Complaint::new("holds a NUL byte", "remove it"))
            }
            Some(text) => Ok(text.to_owned()),
            None => Err(self.is_not("a text", "write it in quotes")),
        }
    }

    pub(super) fn filled_text(&self) -> Result<String, Complaint> {
        let text = self.text()?;
        if text.trim().is_empty() {
            return Err(Complaint::new("is empty", "write something or remove it"));
        }
        Ok(text)
    }

    pub(super) fn path(&self) -> Result<PathBuf, Complaint> {
        self.filled_text().map(PathBuf::from)
    }

    pub(super) fn flag(&self) -> Result<bool, Complaint> {
        let bare = match self {
            Self::Toml(DeValue::Boolean(flag)) => return Ok(*flag),
            Self::Toml(_) => None,
            Self::Bare(text) | Self::BareSeconds(text) => Some(text.to_ascii_lowercase()),
        };
        match bare.as_deref() {
            Some("true") => Ok(true),
            Some("false") => Ok(false),
            _ => Err(self.is_not("true or false", "write true or false, without quotes")),
        }
    }

    pub(super) fn size(&self) -> Result<Bytes, Complaint> {
        let fix = r#"write a number of bytes or e.g. "8GiB""#;
        if let Some(text) = self.as_text() {
            return units::size(text);
        }
        let bytes = self.as_integer().and_then(|n| u64::try_from(n).ok());
        bytes.map(Bytes).ok_or_else(|| self.is_not("a size", fix))
    }

    pub(super) fn size_over_zero(&self) -> Result<Bytes, Complaint> {
        match self.size()? {
            Bytes::ZERO => Err(Complaint::new(
                "is zero",
                r#"write a size over zero, e.g. "8GiB", or remove it"#,
            )),
            bytes => Ok(bytes),
        }
    }

    pub(super) fn duration(&self) -> Result<Duration, Complaint> {
        match self {
            Self::BareSeconds(text) => {
                let is_plain = text.trim_end().ends_with(|c: char| c.is_ascii_digit());
                let unit = if is_plain { "s" } else { "" };
                units::duration(&format!("{text}{unit}"))
                    .map_err(|_| self.is_not("a number of seconds", "write e.g. 60"))
            }
            Self::Bare(text) => units::duration(text),
            Self::Toml(DeValue::String(text)) => units::duration(text),
            Self::Toml(_) => {
                Err(self.is_not("a duration", r#"write e.g. "90s" (units: ms s m h)"#))
            }
        }
    }

    pub(super) fn duration_over_zero(&self) -> Result<Duration, Complaint> {
        let duration = self.duration()?;
        if duration.is_zero() {
            return Err(Complaint::new("is zero", "write a time over zero"));
        }
        Ok(duration)
    }

    pub(super) fn threshold(&self) -> Result<Threshold, Complaint> {
        match self.as_text() {
            Some(text) => units::threshold(text),
            None => self.size().map(Threshold::Size).map_err(|mut complaint| {
                complaint.fix = r#"write e.g. "10%" or "1GiB""#.to_owned();
                complaint
            }),
        }
    }

    /// Reads a whole number from 1.
    pub(super) fn count(&self) -> Result<usize, Complaint> {
        let number = self.as_integer().and_then(|n| usize::try_from(n).ok());
        match number {
            Some(number) if number > 0 => Ok(number),
            _ => Err(self.is_not("a count", "write a whole number from 1")),
        }
    }

    /// Reads a bound on how many; none is written as 0.
    pub(super) fn bound(&self) -> Result<Option<NonZeroU32>, Complaint> {
        let number = self.as_integer().and_then(|n| u32::try_from(n).ok());
        let number = number.ok_or_else(|| {
            self.is_not("a count", "write a whole number from 1, or 0 for no bound")
        })?;
        Ok(NonZeroU32::new(number))
    }

    /// Reads a signal's name, with or without `SIG`, or its number.
    pub(super) fn signal(&self) -> Result<i32, Complaint> {
        let named = self.as_text().and_then(|text| {
            let upper = text.trim().to_ascii_uppercase();
            let name = upper.strip_prefix("SIG").unwrap_or(&upper);
            format!("SIG{name}").parse::<Signal>().ok()
        });
        let numbered = self
            .as_integer()
            .filter(|number| (1..=LAST_SIGNAL).contains(number))
            .and_then(|number| i32::try_from(number).ok());
        named
            .map(|signal| signal as i32)
            .or(numbered)
            .ok_or_else(|| self.is_not("a signal", r#"write e.g. "SIGTERM" or 15"#))
    }

    pub(super) fn model_name(&self) -> Result<ModelName, Complaint> {
        ModelName::new(&self.text()?).map_err(|_| self.is_not("a model's name", NAME_FIX))
    }

    pub(super) fn log_format(&self) -> Result<LogFormat, Complaint> {
        match self.as_text() {
            Some("text") => Ok(LogFormat::Text),
            Some("json") => Ok(LogFormat::Json),
            _ => Err(self.is_not("a log format", r#"write "text" or "json""#)),
        }
    }

    pub(super) fn eviction_policy(&self) -> Result<EvictionPolicy, Complaint> {
        let known = self.as_text().and_then(EvictionPolicy::from_name);
        known.ok_or_else(|| self.is_not("a policy", r#"write "lru" or "cost""#))
    }

    pub(super) fn prefetch(&self) -> Result<Prefetch, Complaint> {
        let known = self.as_text().and_then(Prefetch::from_name);
        known.ok_or_else(|| self.is_not("a way to prefetch", r#"write "waiting", "idle" or "off""#))
    }

    /// Reads a level, or a filter of levels by module.
    pub(super) fn log_level(&self) -> Result<String, Complaint> {
        let text = self.filled_text()?;
        // The filter takes a misspelt level for a module's name, so that every
        // line would be silenced.
        let is_known = |part: &str| {
            let part = part.trim();
            part.contains('=') || part.parse::<LevelFilter>().is_ok_and(|_| !is_number(part))
        };
        let is_filter = EnvFilter::try_new(&text).is_ok();
        if !is_filter || !text.split(',').all(is_known) {
            let fix =
                r#"write error, warn, info, debug, trace, or e.g. "info,residentd::worker=debug""#;
            return Err(self.is_not("a log level", fix));
        }
        Ok(text)
    }

    /// Reads an address and a port, or `unix:` and a path.
    pub(super) fn listen(&self) -> Result<Listen, Complaint> {
        let fix = r#"write e.g. "127.0.0.1:8080" or "unix:/run/residentd/http.sock""#;
        let text = self.filled_text()?;
        let text = text.trim();
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.len() {
                0 => Err(self.is_not("an address to listen on", fix)),
                length if length > SOCKET_PATH => Err(Complaint::new(
                    format!("the path of the socket is {length} bytes long"),
                    format!("write one of at most {SOCKET_PATH} bytes"),
                )),
                _ => Ok(Listen::Unix(PathBuf::from(path))),
            };
        }
        text.parse::<SocketAddr>()
            .map(Listen::Tcp)
            .map_err(|_| self.is_not("an address to listen on", fix))
    }

    /// Splits a program and its arguments: a list, or one text split as a
    /// shell would.
    pub(super) fn command(&self) -> Result<Vec<String>, Complaint> {
        let fix = r#"write a list, e.g. ["llama-server", "-m", "model.gguf"], or one text"#;
        let words = match self {
            Self::Toml(DeValue::Array(items)) => {
                let words = items.iter().map(|item| Value::Toml(item.get_ref()).text());
                words.collect::<Result<Vec<_>, _>>()?
            }
            _ => match self.as_text() {
                Some(_) => shlex::split(&self.text()?)
                    .ok_or_else(|| self.is_not("a command", "close its quotes, or write a list"))?,
                None => return Err(self.is_not("a command", fix)),
            },
        };
        match words.first() {
            None => Err(Complaint::new("is empty", fix)),
            Some(program) if program.trim().is_empty() => {
                Err(Complaint::new("names an empty program", fix))
            }
            Some(_) => Ok(words),
        }
    }

    /// Splits the value into items: those of a list, or of bare text at its
    /// commas. A single text is a list of one.
    pub(super) fn items(&self) -> Result<Vec<Value<'a>>, Complaint> {
        match self {
            Self::Toml(DeValue::Array(items)) => {
                Ok(items.iter().map(|i| Value::Toml(i.get_ref())).collect())
            }
            Self::Toml(text @ DeValue::String(_)) => Ok(vec![Value::Toml(text)]),
            Self::Bare(text) | Self::BareSeconds(text) => {
                let items = text
                    .split(',')
                    .map(|item| Cow::Owned(item.trim().to_owned()));
                Ok(items.map(Value::Bare).collect())
            }
            Self::Toml(_) => Err(self.is_not("a list", "write it in quotes, or a list of such")),
        }
    }
}

/// What every complaint about a model's name advises.
pub(super) const NAME_FIX: &str = "write 1 to 128 of letters, digits and ._-/:@+";

fn integer(number: &DeInteger<'_>) -> Option<i128> {
    i128::from_str_radix(number.as_str(), number.radix()).ok()
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit())
}

fn quoted(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{:?}…", &text[..at]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with<T>(toml: &str, read: impl FnOnce(Value<'_>) -> T) -> T {
        let value = DeValue::parse(toml).expect("the test's TOML is right");
        read(Value::Toml(value.get_ref()))
    }

    fn bare(text: &str) -> Value<'_> {
        Value::Bare(Cow::Borrowed(text))
    }

    #[test]
    fn a_signal_has_a_name_or_a_number() {
        for toml in [r#""SIGTERM""#, r#""term""#, "15", "0xF"] {
            assert_eq!(with(toml, |v| v.signal()), Ok(15), "{toml}");
        }
        for toml in [r#""SIGNOTHING""#, "0", "65", "-15", "true"] {
            assert!(with(toml, |v| v.signal()).is_err(), "{toml}");
        }
    }

    #[test]
    fn a_command_is_a_list_or_a_text_split_like_a_shell_would() {
        let split = with(r#"'server -m "my model.gguf" --port ${PORT}'"#, |v| {
            v.command()
        });
        assert_eq!(
            split,
            Ok(["server", "-m", "my model.gguf", "--port", "${PORT}"]
                .map(String::from)
                .to_vec())
        );
        let list = with(r#"["a b", ""]"#, |v| v.command());
        assert_eq!(list, Ok(vec!["a b".to_owned(), String::new()]));
        for toml in ["[]", r#""""#, r#"[" "]"#, r#"'a "b'"#, "[1]", "true"] {
            assert!(with(toml, |v| v.command()).is_err(), "{toml}");
        }
    }

    #[test]
    fn an_address_to_listen_on_is_numeric_or_a_socket() {
        let tcp = Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)));
        assert_eq!(bare("127.0.0.1:8080").listen(), Ok(tcp));
        let unix = Listen::Unix(PathBuf::from("/run/a.sock"));
        assert_eq!(bare("unix:/run/a.sock").listen(), Ok(unix));
        assert!(bare("[::1]:0").listen().is_ok());
        let long = format!("unix:/{}", "x".repeat(107));
        for text in ["localhost:80", ":80", "127.0.0.1", "unix:", "", &long] {
            assert!(bare(text).listen().is_err(), "{text}");
        }
    }

    #[test]
    fn bare_text_has_no_type_but_a_files_text_is_not_a_flag() {
        assert_eq!(bare("True").flag(), Ok(true));
        assert!(with(r#""true""#, |v| v.flag()).is_err());
        assert!(bare("1").flag().is_err());
    }

    #[test]
    fn a_plain_number_is_seconds_only_where_the_variable_says_so() {
        let seconds = |text: &'static str| Value::BareSeconds(Cow::Borrowed(text)).duration();
        assert_eq!(seconds("60"), Ok(Duration::from_mins(1)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(seconds("2m"), Ok(Duration::from_mins(2)));
        assert_eq!(
            seconds("soon").expect_err("no number").to_string(),
            r#""soon" is not a number of seconds; write e.g. 60"#
        );
        assert!(bare("60").duration().is_err());
    }

    #[test]
    fn a_long_wrong_value_is_cut_in_the_message() {
        let text = "ä".repeat(1000);
        assert!(bare(&text).shown().chars().count() < 70);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_reader_panic(text in r"\PC{0,40}") {
            let value = bare(&text);
            let _ = (value.signal(), value.listen(), value.command(), value.count());
            let _ = (value.flag(), value.threshold(), value.size(), value.duration());
            let _ = (value.model_name(), value.items().map(|items| items.len()));
        }
    }
}
