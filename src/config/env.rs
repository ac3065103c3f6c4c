//! The only place that reads the process environment.
//!
//! It is collected once, into a map that is passed on, so a test can pass its
//! own. `.env` is read beside it and changes no process's environment.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::access::RawAuth;
use super::problem::{Origin, Place, Problems};
use super::raw::{RawConfig, RawMemory, RawServer};
use super::section::{Section, nearest};
use super::telemetry::RawTelemetry;
use super::value::Value;

/// Names and values.
pub type Environment = BTreeMap<String, String>;

/// Everything a configuration is made from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `--config`: files, or folders whose `*.toml` are read in name order.
    /// When empty: what `RESIDENTD_CONFIG` names, parted by `:`, else
    /// `residentd.toml` in the working directory.
    pub paths: Vec<PathBuf>,
    /// Flags that stand for keys of `[server]` and `[memory]`: the key's path,
    /// as in `server.listen`, and the text given. Texts of a repeated flag are
    /// a list.
    pub flags: Vec<(String, String)>,
    /// The process environment.
    pub environment: Environment,
    /// Where `.env` and relative paths begin.
    pub working_dir: PathBuf,
}

impl Sources {
    /// Takes environment and working directory of this process.
    ///
    /// # Errors
    /// When the working directory is gone or cannot be read.
    pub fn of_process(paths: Vec<PathBuf>, flags: Vec<(String, String)>) -> io::Result<Self> {
        // A value that is not UTF-8 is kept readable enough to be complained
        // about by name where it is used.
        let variables = std::env::vars_os().map(|(name, value)| {
            let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
            (text(name), text(value))
        });
        Ok(Self {
            paths,
            flags,
            environment: variables.collect(),
            working_dir: std::env::current_dir()?,
        })
    }
}

/// A variable that stands for a key.
struct Variable {
    name: &'static str,
    table: Table,
    key: &'static str,
    plain_is_seconds: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    Auth,
    Server,
    Telemetry,
    Memory,
}

impl Table {
    const fn name(self) -> &'static str {
        match self {
            Self::Auth => "auth",
            Self::Server => "server",
            Self::Telemetry => "telemetry",
            Self::Memory => "memory",
        }
    }
}

const fn variable(name: &'static str, table: Table, key: &'static str) -> Variable {
    Variable {
        name,
        table,
        key,
        plain_is_seconds: false,
    }
}

const VARIABLES: [Variable; 27] = [
    variable(
        "RESIDENTD_INFERENCE_TOKENS",
        Table::Auth,
        "inference_tokens",
    ),
    variable(
        "RESIDENTD_INFERENCE_TOKENS_FILE",
        Table::Auth,
        "inference_tokens_file",
    ),
    variable("RESIDENTD_ADMIN_TOKENS", Table::Auth, "admin_tokens"),
    variable(
        "RESIDENTD_ADMIN_TOKENS_FILE",
        Table::Auth,
        "admin_tokens_file",
    ),
    variable("RESIDENTD_LISTEN", Table::Server, "listen"),
    variable("RESIDENTD_STATE_DIR", Table::Server, "state_dir"),
    variable("RESIDENTD_SHUTDOWN_GRACE", Table::Server, "shutdown_grace"),
    variable("RESIDENTD_ADOPT", Table::Server, "adopt"),
    variable("RESIDENTD_LOG_FORMAT", Table::Server, "log_format"),
    variable("RESIDENTD_LOG_LEVEL", Table::Server, "log_level"),
    variable("RESIDENTD_MAX_BODY", Table::Server, "max_body"),
    variable("RESIDENTD_MODEL_PREFIX", Table::Server, "model_prefix"),
    variable("RESIDENTD_ACCESS_LOG", Table::Server, "access_log"),
    variable("RESIDENTD_WATCH_CONFIG", Table::Server, "watch_config"),
    variable("RESIDENTD_OTLP_ENDPOINT", Table::Telemetry, "otlp_endpoint"),
    variable("RESIDENTD_SERVICE_NAME", Table::Telemetry, "service_name"),
    variable("RESIDENTD_SAMPLE_RATIO", Table::Telemetry, "sample_ratio"),
    variable("RESIDENTD_LIMIT", Table::Memory, "limit"),
    variable("RESIDENTD_RESERVE", Table::Memory, "reserve"),
    variable("RESIDENTD_CHECK_INTERVAL", Table::Memory, "check_interval"),
    variable("RESIDENTD_AUTO_CLEANUP", Table::Memory, "auto_cleanup"),
    variable("RESIDENTD_POLICY", Table::Memory, "policy"),
    variable("RESIDENTD_PATIENCE", Table::Memory, "patience"),
    variable("RESIDENTD_PREFETCH", Table::Memory, "prefetch"),
    variable("MAX_MEMORY_USAGE", Table::Memory, "limit"),
    Variable {
        name: "MEMORY_CHECK_INTERVAL",
        table: Table::Memory,
        key: "check_interval",
        plain_is_seconds: true,
    },
    variable("AUTO_CLEANUP_ENABLED", Table::Memory, "auto_cleanup"),
];

/// Names the configuration files when `--config` does not.
pub(super) const CONFIG_VARIABLE: &str = "RESIDENTD_CONFIG";

/// Variables of the client commands, which are not read here.
const CLIENT_VARIABLES: [&str; 5] = [
    "RESIDENTD_SERVER",
    "RESIDENTD_TOKEN",
    "RESIDENTD_TOKEN_FILE",
    "RESIDENTD_CA",
    "RESIDENTD_JSON",
];

/// Reads what the variables say of keys. Other variables are none of our
/// business, unless one is likely a slip of ours.
pub(super) fn read(
    environment: &Environment,
    origin: &Origin,
    problems: &mut Problems,
) -> RawConfig {
    warn_of_slips(environment, origin, problems);
    let server = of_variables(environment, Table::Server, origin, problems);
    let memory = of_variables(environment, Table::Memory, origin, problems);
    let auth = of_variables(environment, Table::Auth, origin, problems);
    let telemetry = of_variables(environment, Table::Telemetry, origin, problems);
    RawConfig {
        auth: RawAuth::read(auth, problems),
        telemetry: RawTelemetry::read(telemetry, problems),
        server: RawServer::read(server, problems),
        memory: RawMemory::read(memory, problems),
        ..RawConfig::default()
    }
}

/// Returns the files of tokens that variables name.
pub(super) fn token_files(environment: &Environment) -> impl Iterator<Item = PathBuf> {
    let of_file = |v: &&Variable| v.table == Table::Auth && v.key.ends_with("_file");
    let named = VARIABLES.iter().filter(of_file);
    named.filter_map(|v| environment.get(v.name).map(PathBuf::from))
}

/// Reads what the flags say of keys.
pub(super) fn read_flags(sources: &Sources, problems: &mut Problems) -> RawConfig {
    let server = of_flags(&sources.flags, Table::Server);
    let memory = of_flags(&sources.flags, Table::Memory);
    for (path, _) in &sources.flags {
        let table = path.split('.').next().unwrap_or_default();
        if ![Table::Server, Table::Memory]
            .iter()
            .any(|t| t.name() == table)
        {
            let place = Place {
                key: path.clone(),
                origin: Origin::CommandLine,
            };
            problems.error(&place, "has no flag", "write it to a configuration file");
        }
    }
    RawConfig {
        server: RawServer::read(server, problems),
        memory: RawMemory::read(memory, problems),
        ..RawConfig::default()
    }
}

fn of_variables<'a>(
    environment: &'a Environment,
    table: Table,
    origin: &Origin,
    problems: &mut Problems,
) -> Section<'a> {
    let mut entries: BTreeMap<String, (Value<'a>, Place)> = BTreeMap::new();
    for variable in VARIABLES.iter().filter(|v| v.table == table) {
        let Some(text) = environment.get(variable.name) else {
            continue;
        };
        let place = Place {
            key: variable.name.to_owned(),
            origin: origin.clone(),
        };
        let text = Cow::Borrowed(text.as_str());
        let value = if variable.plain_is_seconds {
            Value::BareSeconds(text)
        } else {
            Value::Bare(text)
        };
        if let Some((_, other)) = entries.get(variable.key) {
            let what = format!("means the same as {}, which is set too", other.key);
            problems.error(&place, what, "unset one");
        }
        entries.insert(variable.key.to_owned(), (value, place));
    }
    Section::of(entries)
}

fn of_flags(flags: &[(String, String)], table: Table) -> Section<'_> {
    let mut texts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (path, text) in flags {
        match path.split_once('.') {
            Some((name, key)) if name == table.name() => texts.entry(key).or_default().push(text),
            _ => {}
        }
    }
    let entries = texts.into_iter().map(|(key, texts)| {
        let place = Place {
            key: format!("--{}", key.replace('_', "-")),
            origin: Origin::CommandLine,
        };
        let value = Value::Bare(Cow::Owned(texts.join(",")));
        (key.to_owned(), (value, place))
    });
    Section::of(entries.collect())
}

fn warn_of_slips(environment: &Environment, origin: &Origin, problems: &mut Problems) {
    let ours = || {
        let named = VARIABLES.iter().map(|v| v.name);
        named.chain([CONFIG_VARIABLE]).chain(CLIENT_VARIABLES)
    };
    for name in environment.keys() {
        let is_foreign = !name.starts_with("RESIDENTD_") || ours().any(|known| known == name);
        if is_foreign {
            continue;
        }
        // Only the part behind the prefix is compared: the prefix would let
        // any short name pass for any other.
        let rest = |name: &'static str| name.strip_prefix("RESIDENTD_");
        let slip = &name["RESIDENTD_".len()..];
        if let Some(known) = nearest(slip, ours().filter_map(rest)) {
            let place = Place {
                key: name.clone(),
                origin: origin.clone(),
            };
            let fix = format!("did you mean RESIDENTD_{known}?");
            problems.warn(&place, "is not a variable of residentd", fix);
        }
    }
}

/// Reads `.env` in the working directory; an absent file is an empty one. Of
/// a name written twice the last counts, as in a shell.
pub(super) fn read_dotenv(working_dir: &Path, problems: &mut Problems) -> Environment {
    // The key names the file, so the origin need not.
    let place = |key: String| Place {
        key,
        origin: Origin::File {
            index: usize::MAX,
            name: Arc::from(".env"),
            line: 0,
        },
    };
    let text = match std::fs::read_to_string(working_dir.join(".env")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Environment::new(),
        Err(error) => {
            let what = format!("cannot be read: {error}");
            problems.error(&place(".env".to_owned()), what, "mend or remove it");
            return Environment::new();
        }
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let mut environment = Environment::new();
    for item in dotenvy::from_read_iter(text.as_bytes()) {
        match item {
            Ok((name, value)) => {
                environment.insert(name, value);
            }
            Err(error) => {
                // The line itself may hold a secret, so only its number is shown.
                let key = match line_of(text, &error) {
                    Some(line) => format!(".env:{line}"),
                    None => ".env".to_owned(),
                };
                problems.error(&place(key), "is not NAME=value", "quote the value");
            }
        }
    }
    environment
}

/// Finds the line an error is about: the library tells its text or its end,
/// which may occur elsewhere too.
fn line_of(text: &str, error: &dotenvy::Error) -> Option<usize> {
    let dotenvy::Error::LineParse(line, _) = error else {
        return None;
    };
    let mut found = text.match_indices(line.trim_end());
    let (at, _) = found.next()?;
    found
        .next()
        .is_none()
        .then(|| text[..at].matches('\n').count() + 1)
}
