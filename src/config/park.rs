//! `park = { … }`: how a worker gives memory back while it lives.

use std::sync::Arc;
use std::time::Duration;

use super::problem::{Complaint, Place, Problems};
use super::section::{Section, Setting};
use super::units::write_size;
use super::value::Value;
use crate::model::{Bytes, ParkCall, ParkSpec};

/// Longest that a park or an unpark may take unless the configuration says
/// otherwise: the slowest that engines were seen to need is a few seconds.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What the complaint about a table without calls advises.
const FIX: &str = r#"write { engine = "vllm" }, { engine = "sglang" } or { park = ["POST /sleep"], unpark = ["POST /wake_up"] }"#;

/// Engines whose calls are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    Vllm,
    Sglang,
}

/// What was written of parking.
#[derive(Clone, Debug)]
pub(super) struct RawPark {
    pub(super) engine: Option<Engine>,
    /// Absent when the model is not to be parked.
    pub(super) spec: Option<Arc<ParkSpec>>,
}

/// What an engine must be started with so that it can be parked.
struct Needs {
    flags: &'static [(&'static str, &'static str)],
    variable: Option<(&'static str, &'static str)>,
}

impl Engine {
    /// Returns the calls that park, and those that make ready again.
    fn calls(self) -> (Vec<ParkCall>, Vec<ParkCall>) {
        let post = |path: &str, body: Option<&str>| ParkCall {
            method: "POST".into(),
            path: path.into(),
            body: body.map(str::to_owned),
        };
        let (park, unpark) = match self {
            // Weights go to host RAM, the KV cache is dropped.
            Self::Vllm => (post("/sleep?level=1", None), post("/wake_up", None)),
            Self::Sglang => (
                post("/release_memory_occupation", Some("{}")),
                post("/resume_memory_occupation", Some("{}")),
            ),
        };
        (vec![park], vec![unpark])
    }

    const fn needs(self) -> Needs {
        match self {
            Self::Vllm => Needs {
                flags: &[("--enable-sleep-mode", "vLLM cannot sleep")],
                variable: Some(("VLLM_SERVER_DEV_MODE", "1")),
            },
            Self::Sglang => Needs {
                flags: &[
                    ("--enable-memory-saver", "SGLang cannot release its memory"),
                    (
                        "--enable-weights-cpu-backup",
                        "SGLang forgets its weights when it releases them",
                    ),
                ],
                variable: None,
            },
        }
    }
}

/// Reads the table: an engine, or calls of its own.
pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Option<Setting<RawPark>> {
    let place = section.place.clone();
    let engine = section.get("engine", engine, problems);
    let park = section.list("park", call, problems);
    let unpark = section.list("unpark", call, problems);
    let timeout = section.get("timeout", Value::duration_over_zero, problems);
    let memory = section.get("memory", Value::size, problems);
    let vram = section.get("vram", Value::size, problems);
    section.finish(&[], problems);
    if problems.mentions(&place.key) {
        return None;
    }
    let engine = engine.map(|engine| engine.value);
    let calls = match (engine, park, unpark) {
        (Some(engine), None, None) => engine.map(Engine::calls),
        (None, Some(park), Some(unpark)) => Some((park.value, unpark.value)),
        (Some(_), park, unpark) => {
            let place = park.or(unpark).map_or(place, |calls| calls.place);
            let what = "is written beside engine, which has calls of its own";
            problems.error(&place, what, "remove one of the two");
            return None;
        }
        (None, Some(_), None) => {
            problems.error(&place, "has park and no unpark", FIX);
            return None;
        }
        (None, None, _) => {
            problems.error(&place, "says not how to park", FIX);
            return None;
        }
    };
    let spec = |(park, unpark): (Vec<_>, Vec<_>)| ParkSpec {
        park,
        unpark,
        timeout: timeout.map_or(TIMEOUT, |timeout| timeout.value),
        memory: memory.map(|memory| memory.value),
        vram: vram.map(|vram| vram.value),
    };
    if let Some((park, unpark)) = &calls {
        let empty = [("park", park), ("unpark", unpark)]
            .into_iter()
            .find(|(_, calls)| calls.is_empty());
        if let Some((key, _)) = empty {
            problems.error(&place.below(key), "is empty", FIX);
            return None;
        }
    }
    let value = RawPark {
        engine: engine.flatten(),
        spec: calls.map(spec).map(Arc::new),
    };
    Some(Setting { value, place })
}

/// Tells of a park that could give nothing back: of a model on no GPU that says
/// nothing of host RAM, or of one that holds as much as before.
pub(super) fn check_use(
    (park, place): (&Setting<RawPark>, &Place),
    on_gpu: bool,
    vram: Option<&Setting<Bytes>>,
    problems: &mut Problems,
) {
    let Some(spec) = &park.value.spec else { return };
    if !on_gpu && spec.memory.is_none() {
        let what = "gives nothing back as far as is known, so the model is never parked: \
                    it runs on no GPU, and memory is not said here";
        let fix = "write memory: what a parked worker holds of host RAM";
        problems.warn(place, what, fix);
    }
    if let (Some(parked), Some(vram)) = (spec.vram, vram)
        && parked >= vram.value
    {
        let what = format!(
            "{} is no less than {} ({}): parking would give nothing back",
            write_size(parked),
            vram.place.key,
            write_size(vram.value)
        );
        let fix = "write what a parked worker still holds of each GPU, or remove it";
        problems.error(&place.below("vram"), what, fix);
    }
}

/// Tells what an engine is not started with, though it cannot be parked
/// without.
pub(super) fn check_engine(
    (engine, place): (Engine, &Place),
    command: &[String],
    has_variable: impl Fn(&str) -> bool,
    problems: &mut Problems,
) {
    let Needs { flags, variable } = engine.needs();
    for (flag, why) in flags {
        if !command.iter().any(|word| word.contains(flag)) {
            let what = format!("needs {flag} in command: without it {why}");
            problems.warn(place, what, format!("add {flag} to command"));
        }
    }
    if let Some((name, value)) = variable
        && !has_variable(name)
    {
        let what = format!("needs {name}={value} in env: without it the calls are not there");
        let fix = format!("write env = {{ {name} = \"{value}\" }}");
        problems.warn(place, what, fix);
    }
}

/// Reads the name of an engine; `none` switches off what all models have.
fn engine(value: &Value<'_>) -> Result<Option<Engine>, Complaint> {
    match value.as_text() {
        Some("vllm") => Ok(Some(Engine::Vllm)),
        Some("sglang") => Ok(Some(Engine::Sglang)),
        Some("none") => Ok(None),
        _ => Err(value.is_not(
            "an engine whose calls are known",
            r#"write "vllm", "sglang" or "none", or the calls as park and unpark"#,
        )),
    }
}

/// Reads `METHOD /path`, with JSON after it or without.
fn call(value: &Value<'_>) -> Result<ParkCall, Complaint> {
    let text = value.filled_text()?;
    let mut words = text.trim().splitn(3, ' ');
    let method = words.next().unwrap_or_default();
    let path = words.next().unwrap_or_default();
    let body = words.next().map(str::trim).filter(|body| !body.is_empty());
    let is_method = ["POST", "PUT", "GET", "DELETE", "PATCH"].contains(&method);
    let is_path = path.starts_with('/') && path.chars().all(|c| c.is_ascii_graphic());
    if !is_method || !is_path {
        let fix = r#"write e.g. "POST /sleep?level=1", or with a body "POST /release {}""#;
        return Err(value.is_not("a call", fix));
    }
    if let Some(body) = body
        && let Err(error) = serde_json::from_str::<serde_json::Value>(body)
    {
        let what = format!("the body of {method} {path} is not JSON: {error}");
        return Err(Complaint::new(
            what,
            "mend it, or write the call without it",
        ));
    }
    Ok(ParkCall {
        method: method.to_owned(),
        path: path.to_owned(),
        body: body.map(str::to_owned),
    })
}
