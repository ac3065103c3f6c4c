//! `[telemetry]`: where spans of requests are sent.

use hyper::Uri;

use super::context::given;
use super::problem::{Complaint, Problems};
use super::section::{Section, Setting};
use super::value::Value;

/// `[telemetry]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Telemetry {
    /// A collector's base address, without a slash at its end; absent: no spans are
    /// made.
    pub otlp_endpoint: Option<String>,
    /// What this residentd is called there.
    pub service_name: String,
    /// The share of requests that are traced, of those whose client does not say;
    /// 0 to 1.
    pub sample_ratio: f64,
}

/// `[telemetry]` as it was written.
#[derive(Clone, Debug, Default)]
pub(super) struct RawTelemetry {
    otlp_endpoint: Option<Setting<String>>,
    service_name: Option<Setting<String>>,
    sample_ratio: Option<Setting<f64>>,
}

impl RawTelemetry {
    pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let raw = Self {
            otlp_endpoint: section.get("otlp_endpoint", endpoint, problems),
            service_name: section.get("service_name", Value::filled_text, problems),
            sample_ratio: section.get("sample_ratio", ratio, problems),
        };
        section.finish(&[], problems);
        raw
    }

    pub(super) fn over(self, weaker: Self) -> Self {
        Self {
            otlp_endpoint: self.otlp_endpoint.or(weaker.otlp_endpoint),
            service_name: self.service_name.or(weaker.service_name),
            sample_ratio: self.sample_ratio.or(weaker.sample_ratio),
        }
    }

    pub(super) fn check(self) -> Telemetry {
        Telemetry {
            otlp_endpoint: self.otlp_endpoint.map(|endpoint| endpoint.value),
            service_name: given(self.service_name),
            sample_ratio: given(self.sample_ratio),
        }
    }
}

fn endpoint(value: &Value<'_>) -> Result<String, Complaint> {
    let fix = r#"write the base address of a collector, e.g. "http://127.0.0.1:4318""#;
    let text = value.filled_text()?;
    let uri: Uri = text
        .parse()
        .map_err(|_| value.is_not("an address of http", fix))?;
    match (uri.scheme_str(), uri.authority(), uri.query()) {
        (Some("http"), Some(authority), None) if !authority.as_str().contains('@') => {
            Ok(text.trim_end_matches('/').to_owned())
        }
        (Some("https"), ..) => {
            let fix =
                "name a collector on this machine or in this pod by http:// and have it encrypt";
            Err(value.is_not("an address of http", fix))
        }
        _ => Err(value.is_not("an address of http", fix)),
    }
}

fn ratio(value: &Value<'_>) -> Result<f64, Complaint> {
    let number = value
        .as_number()
        .filter(|number| (0.0..=1.0).contains(number));
    number.ok_or_else(|| value.is_not("a share", "write a number from 0 to 1, e.g. 0.1"))
}
