//! What a configuration says of GPUs: which a model runs on, and how much of
//! each workers may have.

use std::collections::BTreeMap;

use super::problem::{Complaint, Problems};
use super::section::{Section, Setting};
use super::value::Value;
use crate::model::{Bytes, DeviceRef, GpuRequest};

/// What every complaint about `gpus` advises.
const FIX: &str =
    r#"write "none", "any", a count such as 1, or a list such as [0, 1] or ["GPU-1f2e…"]"#;

/// Reads `"none"`, `"any"` (one, whichever fits best), a count, or a list of
/// indexes and UUIDs.
pub(super) fn read(value: &Value<'_>) -> Result<GpuRequest, Complaint> {
    match value.as_text() {
        Some("none") => return Ok(GpuRequest::None),
        Some("any") => return Ok(GpuRequest::Count(1)),
        Some(_) => return Err(value.is_not("a choice of GPUs", FIX)),
        None => {}
    }
    if let Some(count) = value.as_integer() {
        return match u32::try_from(count) {
            Ok(0) => Ok(GpuRequest::None),
            Ok(count) => Ok(GpuRequest::Count(count)),
            Err(_) => Err(value.is_not("a count of GPUs", FIX)),
        };
    }
    let items = value
        .items()
        .map_err(|_| value.is_not("a choice of GPUs", FIX))?;
    let mut list = Vec::with_capacity(items.len());
    for item in &items {
        let device = device(item)?;
        if list.contains(&device) {
            return Err(Complaint::new(
                format!("names {device} twice"),
                "remove one",
            ));
        }
        list.push(device);
    }
    match list.is_empty() {
        true => Err(Complaint::new("is an empty list", FIX)),
        false => Ok(GpuRequest::These(list)),
    }
}

fn device(value: &Value<'_>) -> Result<DeviceRef, Complaint> {
    let index = value.as_integer().and_then(|n| u32::try_from(n).ok());
    let named = || value.as_text().and_then(name);
    index
        .map(DeviceRef::Index)
        .or_else(named)
        .ok_or_else(|| value.is_not("a GPU", "write its index, as 0, or its UUID"))
}

/// Reads `0`, `gpu:0` or a UUID.
fn name(text: &str) -> Option<DeviceRef> {
    let text = text.trim();
    let index = text.strip_prefix("gpu:").unwrap_or(text);
    if let Ok(index) = index.parse() {
        return Some(DeviceRef::Index(index));
    }
    // Long enough that it cannot be a slip of another word.
    let is_uuid = text.contains('-') && text.len() >= 8;
    is_uuid.then(|| DeviceRef::Uuid(text.into()))
}

/// Reads `[gpus.N]`, each with its limit.
pub(super) fn read_limits(
    section: Section<'_>,
    problems: &mut Problems,
) -> BTreeMap<DeviceRef, Setting<Bytes>> {
    let mut limits = BTreeMap::new();
    for (key, mut section) in section.tables(problems) {
        let place = section.place.clone();
        let limit = section.get("limit", Value::size_over_zero, problems);
        section.finish(&[], problems);
        match (name(&key), limit) {
            (Some(device), Some(limit)) => {
                limits.insert(device, limit);
            }
            (Some(_), None) => {}
            (None, _) => problems.error(
                &place,
                format!("{key:?} is not a GPU"),
                "write its index, as [gpus.0], or its UUID in quotes",
            ),
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use toml::de::DeValue;

    use super::*;

    fn read_toml(toml: &str) -> Result<GpuRequest, String> {
        let value = DeValue::parse(toml).expect("the test's TOML is right");
        read(&Value::Toml(value.get_ref())).map_err(|complaint| complaint.to_string())
    }

    #[test]
    fn a_choice_is_a_word_a_count_or_a_list() {
        assert_eq!(read_toml(r#""none""#), Ok(GpuRequest::None));
        assert_eq!(read_toml("0"), Ok(GpuRequest::None));
        assert_eq!(read_toml(r#""any""#), Ok(GpuRequest::Count(1)));
        assert_eq!(read_toml("2"), Ok(GpuRequest::Count(2)));
        assert_eq!(
            read_toml(r#"[1, "gpu:3", "GPU-1f2e3d4c"]"#),
            Ok(GpuRequest::These(vec![
                DeviceRef::Index(1),
                DeviceRef::Index(3),
                DeviceRef::Uuid("GPU-1f2e3d4c".into())
            ]))
        );
    }

    #[test]
    fn a_wrong_choice_is_told_with_the_fix() {
        for toml in ["-1", "1.5", "true", "[]", "[0, 0]", r#"["x"]"#, r#""all""#] {
            let complaint = read_toml(toml).expect_err(toml);
            assert!(complaint.contains(';'), "{complaint}");
        }
        assert_eq!(
            read_toml("[0, 0]").expect_err("twice"),
            "names gpu:0 twice; remove one"
        );
    }
}
