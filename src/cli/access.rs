//! How the client commands get in: the token that they send, and the encrypted
//! connection.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, Error as TlsError, RootCertStore};

use crate::model::Secret;

/// What is needed where residentd asks who calls, or is reached by https.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct AccessArgs {
    /// A token; others on this machine can read it here: rather set RESIDENTD_TOKEN, or use --token-file
    #[arg(
        long,
        value_name = "TOKEN",
        env = "RESIDENTD_TOKEN",
        hide_env_values = true
    )]
    token: Option<Text>,
    /// A file whose first line is a token
    #[arg(
        long,
        value_name = "PATH",
        env = "RESIDENTD_TOKEN_FILE",
        conflicts_with = "token"
    )]
    token_file: Option<PathBuf>,
    /// A file of certificates to trust at an https:// address; without it: those that the system trusts
    #[arg(long, value_name = "PATH", env = "RESIDENTD_CA")]
    ca: Option<PathBuf>,
}

/// A token that was not looked at yet; never shown.
#[derive(Clone)]
struct Text(String);

impl FromStr for Text {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Text(…)")
    }
}

/// Why nobody can be asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum AccessError {
    /// It could not be sent in a header.
    #[error("the token is empty or holds a space or another character that no token has")]
    Token,
    /// A file could not be read.
    #[error("read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that holds no certificate.
    #[error("read certificates from {path}")]
    Certificates {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls_pki_types::pem::Error,
    },
    /// There is nothing to trust.
    #[error("no certificates to trust were found: name a file with --ca")]
    NoRoots,
    /// The name cannot stand in a certificate.
    #[error("{0} is no name that a certificate could have")]
    Name(String, #[source] InvalidDnsNameError),
    /// Encryption cannot be set up.
    #[error("set up TLS")]
    Tls(#[from] TlsError),
}

impl AccessArgs {
    /// Returns the token to send, if one was given.
    pub(super) fn token(&self) -> Result<Option<Secret>, AccessError> {
        let text = match (&self.token, &self.token_file) {
            (Some(Text(text)), _) => text.clone(),
            (None, None) => return Ok(None),
            (None, Some(path)) => {
                let read = std::fs::read_to_string(path);
                let read = read.map_err(|source| AccessError::Read {
                    path: path.clone(),
                    source,
                })?;
                // A file of several, as the server reads it, may have remarks.
                let mut lines = read.lines().map(str::trim);
                let first = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
                first.unwrap_or_default().to_owned()
            }
        };
        Secret::new(&text).map(Some).ok_or(AccessError::Token)
    }

    /// Returns what encrypts connections.
    pub(super) fn tls(&self) -> Result<TlsConnector, AccessError> {
        let roots = match &self.ca {
            Some(path) => of_file(path)?,
            None => of_system(),
        };
        if roots.is_empty() {
            return Err(AccessError::NoRoots);
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions()?;
        let config = builder.with_root_certificates(roots).with_no_client_auth();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

fn of_file(path: &Path) -> Result<RootCertStore, AccessError> {
    let failed = |source| AccessError::Certificates {
        path: path.to_owned(),
        source,
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(failed)? {
        roots.add(certificate.map_err(failed)?)?;
    }
    Ok(roots)
}

fn of_system() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    // What cannot be read or understood is not trusted.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// Returns the name that the certificate at `authority`, a host and a port, has
/// to have.
pub(super) fn server_name(authority: &str) -> Result<ServerName<'static>, AccessError> {
    let host = authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned());
    name.map_err(|source| AccessError::Name(host.to_owned(), source))
}
