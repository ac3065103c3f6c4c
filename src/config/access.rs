//! `[auth]`, `[admin]` and `[tls]`: who may call, and where and how.
//!
//! No message of this module shows what a value is: it may be a token.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{Error as TlsError, ServerConfig};

use super::context::Context;
use super::files::unreadable;
use super::problem::{Complaint, Place, Problems};
use super::section::{Section, Setting};
use super::value::Value;
use super::{Listen, check};
use crate::model::{Fingerprint, Secret};

/// `[auth]`: the tokens that are asked for. None of a kind means that it is not
/// asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Auth {
    /// Those that may use models.
    pub inference: Vec<Secret>,
    /// Those that may use models and the API.
    pub admin: Vec<Secret>,
}

/// `[tls]`: a certificate and its key, which fit.
#[derive(Clone)]
pub struct Tls {
    /// The certificate and those that vouch for it, as PEM; absolute.
    pub cert: PathBuf,
    /// Its key, as PEM; absolute.
    pub key: PathBuf,
    /// Changes with the certificate, and so with the key.
    print: String,
    /// What connections are taken with.
    pub server: Arc<ServerConfig>,
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        (&self.cert, &self.key, &self.print) == (&other.cert, &other.key, &other.print)
    }
}

/// Shows no part of the key.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cert,
            key,
            print,
            server: _,
        } = self;
        let mut shown = f.debug_struct("Tls");
        let shown = shown.field("cert", cert).field("key", key);
        shown.field("print", print).finish_non_exhaustive()
    }
}

/// `[auth]` as it was written.
#[derive(Clone, Debug, Default)]
pub(super) struct RawAuth {
    inference_tokens: Option<Setting<Vec<Secret>>>,
    inference_tokens_file: Option<Setting<PathBuf>>,
    admin_tokens: Option<Setting<Vec<Secret>>>,
    admin_tokens_file: Option<Setting<PathBuf>>,
}

impl RawAuth {
    pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let s = &mut section;
        let raw = Self {
            inference_tokens: s.get("inference_tokens", tokens, problems),
            inference_tokens_file: s.get("inference_tokens_file", Value::path, problems),
            admin_tokens: s.get("admin_tokens", tokens, problems),
            admin_tokens_file: s.get("admin_tokens_file", Value::path, problems),
        };
        section.finish(&[], problems);
        raw
    }

    pub(super) fn over(self, weaker: Self) -> Self {
        Self {
            inference_tokens: self.inference_tokens.or(weaker.inference_tokens),
            inference_tokens_file: self.inference_tokens_file.or(weaker.inference_tokens_file),
            admin_tokens: self.admin_tokens.or(weaker.admin_tokens),
            admin_tokens_file: self.admin_tokens_file.or(weaker.admin_tokens_file),
        }
    }

    /// Returns the files that tokens are read from.
    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let files = [&self.inference_tokens_file, &self.admin_tokens_file];
        files.into_iter().flatten().map(|file| &file.value)
    }

    /// Reads the files. One that is there and holds nothing is a problem, as it
    /// would let everybody in.
    pub(super) fn check(self, context: &Context<'_>, problems: &mut Problems) -> Auth {
        let mut all = |given: Option<Setting<Vec<Secret>>>, file: Option<Setting<PathBuf>>| {
            let mut tokens = given.map(|given| given.value).unwrap_or_default();
            if let Some(Setting { value, place }) = file {
                match tokens_of(&context.working_dir.join(value)) {
                    Ok(more) => tokens.extend(more),
                    Err(complaint) => problems.complain(&place, complaint),
                }
            }
            tokens
        };
        Auth {
            inference: all(self.inference_tokens, self.inference_tokens_file),
            admin: all(self.admin_tokens, self.admin_tokens_file),
        }
    }
}

const TOKEN_FIX: &str =
    "write a list of texts, each of visible ASCII characters without a space, or remove it";

fn tokens(value: &Value<'_>) -> Result<Vec<Secret>, Complaint> {
    let wrong = || Complaint::new("is not a list of tokens", TOKEN_FIX);
    let items = value.items().map_err(|_| wrong())?;
    let tokens = items.iter().map(|item| Secret::new(item.as_text()?));
    let tokens: Vec<Secret> = tokens.collect::<Option<_>>().ok_or_else(wrong)?;
    match tokens.is_empty() {
        true => Err(Complaint::new("is empty", TOKEN_FIX)),
        false => Ok(tokens),
    }
}

/// Reads one token from each line that is neither empty nor begins with `#`.
fn tokens_of(path: &Path) -> Result<Vec<Secret>, Complaint> {
    let text = std::fs::read_to_string(path).map_err(|error| unread(path, &error))?;
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let what = || format!("line {} of {} is not a token", number + 1, path.display());
        let token = Secret::new(line)
            .ok_or_else(|| Complaint::new(what(), "write visible ASCII characters, no space"))?;
        found.push(token);
    }
    match found.is_empty() {
        true => {
            let what = format!("{} holds no token", path.display());
            Err(Complaint::new(what, "write one a line"))
        }
        false => Ok(found),
    }
}

fn unread(path: &Path, error: &io::Error) -> Complaint {
    let what = format!("{} {}", path.display(), unreadable(error));
    Complaint::new(what, "name a file that residentd may read")
}

/// `[admin]` as it was written.
#[derive(Clone, Debug, Default)]
pub(super) struct RawAdmin {
    listen: Option<Setting<Vec<Listen>>>,
}

impl RawAdmin {
    pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let listen = section.list("listen", Value::listen, problems);
        section.finish(&[], problems);
        Self { listen }
    }

    pub(super) fn over(self, weaker: Self) -> Self {
        Self {
            listen: self.listen.or(weaker.listen),
        }
    }

    /// Returns the operators' own addresses, none of which is in `others` too.
    pub(super) fn check(
        self,
        others: &[Listen],
        context: &Context<'_>,
        problems: &mut Problems,
    ) -> Vec<Listen> {
        let Some(Setting { mut value, place }) = self.listen else {
            return Vec::new();
        };
        check::check_listen(&value, &place, problems);
        check::make_absolute(&mut value, context);
        for address in &value {
            if !check::is_any(address) && others.contains(address) {
                let what = format!("names {address}, as server.listen does");
                let fix = "give operators an address of their own, or remove [admin]";
                problems.error(&place, what, fix);
            }
        }
        value
    }
}

/// `[tls]` as it was written.
#[derive(Clone, Debug, Default)]
pub(super) struct RawTls {
    cert: Option<Setting<PathBuf>>,
    key: Option<Setting<PathBuf>>,
}

impl RawTls {
    pub(super) fn read(mut section: Section<'_>, problems: &mut Problems) -> Self {
        let raw = Self {
            cert: section.get("cert", Value::path, problems),
            key: section.get("key", Value::path, problems),
        };
        section.finish(&[], problems);
        raw
    }

    pub(super) fn over(self, weaker: Self) -> Self {
        Self {
            cert: self.cert.or(weaker.cert),
            key: self.key.or(weaker.key),
        }
    }

    /// Returns the files of certificate and key.
    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let files = [&self.cert, &self.key];
        files.into_iter().flatten().map(|file| &file.value)
    }

    /// Reads both files and sees that they fit.
    pub(super) fn check(self, context: &Context<'_>, problems: &mut Problems) -> Option<Tls> {
        let (cert, key) = match (self.cert, self.key) {
            (Some(cert), Some(key)) => (cert, key),
            (None, None) => return None,
            (Some(alone), None) => return without(&alone.place, "key", problems),
            (None, Some(alone)) => return without(&alone.place, "cert", problems),
        };
        let paths = [&cert.value, &key.value].map(|path| context.working_dir.join(path));
        let [cert_file, key_file] = paths;
        let chain =
            certificates(&cert_file).map_err(|complaint| problems.complain(&cert.place, complaint));
        let secret =
            private_key(&key_file).map_err(|complaint| problems.complain(&key.place, complaint));
        let (Ok(chain), Ok(secret)) = (chain, secret) else {
            return None;
        };
        let mut print = Fingerprint::default();
        chain.iter().for_each(|each| print.feed(each));
        match server(chain, secret) {
            Ok(server) => Some(Tls {
                cert: cert_file,
                key: key_file,
                print: print.to_string(),
                server: Arc::new(server),
            }),
            Err(error) => {
                problems.complain(&key.place, misfit(&error, &cert_file, &key_file));
                None
            }
        }
    }
}

fn without(place: &Place, key: &str, problems: &mut Problems) -> Option<Tls> {
    let what = format!("is given without tls.{key}");
    problems.error(place, what, format!("add tls.{key}, or remove [tls]"));
    None
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Complaint> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match read {
        Ok(chain) if Vec::is_empty(&chain) => Err(no_pem(path, "certificate")),
        Ok(chain) => Ok(chain),
        Err(error) => Err(not_pem(path, "certificate", &error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Complaint> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| not_pem(path, "private key", &error))
}

fn not_pem(path: &Path, what: &str, error: &pem::Error) -> Complaint {
    match error {
        pem::Error::Io(error) => unread(path, error),
        // What else it may say could show a part of the file.
        _ => no_pem(path, what),
    }
}

fn no_pem(path: &Path, what: &str) -> Complaint {
    let what = format!("{} holds no {what} as PEM", path.display());
    Complaint::new(what, "it begins with a line -----BEGIN …-----")
}

fn server(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn misfit(error: &TlsError, cert: &Path, key: &Path) -> Complaint {
    let (cert, key) = (cert.display(), key.display());
    match error {
        TlsError::InconsistentKeys(_) => Complaint::new(
            format!("{key} is not the key of the certificate in {cert}"),
            "name a pair that belongs together, the server's own certificate first",
        ),
        error => Complaint::new(
            format!("{cert} and {key} cannot be used: {error}"),
            "name another pair",
        ),
    }
}

/// Reads an origin of web pages as browsers name it, or `*` for any.
pub(super) fn origin(value: &Value<'_>) -> Result<String, Complaint> {
    let fix = r#"write e.g. "https://chat.example" or "http://localhost:3000", without a path"#;
    let text = value.filled_text()?;
    let is_origin = text.split_once("://").is_some_and(|(scheme, rest)| {
        let of_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        let of_host = |c: char| c.is_ascii_graphic() && !"/?#@*\\,\"".contains(c);
        !scheme.is_empty()
            && scheme.chars().all(of_scheme)
            && !rest.is_empty()
            && rest.chars().all(of_host)
    });
    match is_origin || text == "*" {
        true => Ok(text.to_ascii_lowercase()),
        false => Err(value.is_not("the origin of a web page", fix)),
    }
}
