//! Encrypted connections.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::{exchange, with};
use crate::support::residentd::{RESIDENTD, write_config};
use crate::support::{PATIENCE, Residentd, wait_until};

type Encrypted = StreamOwned<ClientConnection, TcpStream>;

/// A certificate for this machine and its key, in files.
struct Pair {
    folder: tempfile::TempDir,
}

impl Pair {
    fn new() -> Self {
        let pair = Self {
            folder: tempfile::tempdir().expect("a folder"),
        };
        pair.renew();
        pair
    }

    fn cert(&self) -> PathBuf {
        self.folder.path().join("server.crt")
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("server.key")
    }

    /// Writes another pair. Returns its certificate, as PEM.
    fn renew(&self) -> String {
        let (cert, key) = made();
        std::fs::write(self.cert(), &cert).expect("written");
        std::fs::write(self.key(), key).expect("written");
        cert
    }

    fn config(&self) -> String {
        format!("[tls]\ncert = {:?}\nkey = {:?}\n", self.cert(), self.key())
    }
}

/// Makes a certificate and its key, as PEM.
fn made() -> (String, String) {
    let names = ["localhost", "127.0.0.1"].map(str::to_owned);
    let made = rcgen::generate_simple_self_signed(names).expect("good names");
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// Connects, trusting this certificate only.
fn connect(address: &str, cert: &Path, protocols: &[&str]) -> std::io::Result<Encrypted> {
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_file_iter(cert).expect("a file") {
        roots.add(cert.expect("a certificate")).expect("a good one");
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring knows them")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
    let name = ServerName::try_from("localhost").expect("a name");
    let client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = StreamOwned::new(client, stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

#[test]
fn tcp_is_encrypted_and_unix_sockets_stay_as_they_are() {
    let pair = Pair::new();
    let residentd = Residentd::start(&with(&pair.config()));
    let address = residentd.address();
    let stream = connect(address, &pair.cert(), &["http/1.1"]).expect("it is encrypted");
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
    let echo = exchange(stream, "POST /upstream/m/echo", &[], "x");
    assert_eq!(echo.status, 200, "{}", echo.text());
    let text = echo.text().replace(' ', "");
    assert!(text.contains(r#""x-forwarded-proto","https""#), "{text}");
    let stream = connect(address, &pair.cert(), &["h2", "http/1.1"]).expect("likewise");
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"h2"[..]));
    // Whoever does not encrypt gets no answer, and no token of his is read.
    let mut plain = crate::support::wire::Wire::to(address);
    plain.put("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n");
    let answer = String::from_utf8_lossy(&plain.rest().0).into_owned();
    assert!(!answer.contains("HTTP/1.1"), "{answer:?}");

    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("s");
    let file = write_config(folder.path(), &with(&pair.config()));
    let mut serve = crate::support::residentd::command(&file, &[]);
    serve
        .arg("--listen")
        .arg(format!("unix:{}", socket.display()));
    serve
        .arg("--listen")
        .arg("127.0.0.1:0")
        .current_dir(folder.path());
    let _both = Residentd::launch(folder, serve);
    let stream = std::os::unix::net::UnixStream::connect(&socket).expect("it listens");
    assert_eq!(exchange(stream, "GET /livez", &[], "").status, 200);
}

#[test]
fn the_command_speaks_https() {
    let pair = Pair::new();
    let residentd = Residentd::start(&with(&pair.config()));
    let ps = |arguments: &[&str]| {
        let server = format!("https://{}", residentd.address());
        let mut command = std::process::Command::new(RESIDENTD);
        command.args(["ps", "--server", &server]).args(arguments);
        command.output().expect("it runs")
    };
    let cert = pair.cert().display().to_string();
    let trusted = ps(&["--ca", &cert]);
    assert!(trusted.status.success(), "{trusted:?}");
    let other = Pair::new();
    let cert = other.cert().display().to_string();
    let ended = ps(&["--ca", &cert]);
    let told = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(
        !ended.status.success() && told.contains("certificate"),
        "{told}"
    );
}

#[test]
fn another_pair_is_taken_up_and_no_connection_is_dropped() {
    let pair = Pair::new();
    let residentd = Residentd::start(&with(&pair.config()));
    let address = residentd.address();
    let old = pair.folder.path().join("old.crt");
    std::fs::copy(pair.cert(), &old).expect("copied");
    let open = connect(address, &old, &[]).expect("encrypted");
    pair.renew();
    wait_until("the new pair to be used", || {
        connect(address, &pair.cert(), &[]).ok()
    });
    assert!(connect(address, &old, &[]).is_err());
    // What was open goes on with what it began with.
    assert_eq!(exchange(open, "GET /livez", &[], "").status, 200);

    // A key of another certificate changes nothing.
    std::fs::write(pair.key(), made().1).expect("written");
    wait_until("it to be refused", || {
        residentd
            .log()
            .contains("is not the key of the certificate")
            .then_some(())
    });
    let stream = connect(address, &pair.cert(), &[]).expect("as before");
    let reload = exchange(stream, "POST /api/v1/reload", &[], "");
    assert_eq!(reload.status, 422, "{}", reload.text());
    assert!(reload.text().contains("tls.key"), "{}", reload.text());
    assert!(!reload.text().contains("PRIVATE"), "{}", reload.text());
}

#[test]
fn an_encrypted_address_survives_an_upgrade() {
    let pair = Pair::new();
    let residentd = Residentd::start(&with(&pair.config()));
    let ask = |line: &str| {
        let stream = connect(residentd.address(), &pair.cert(), &[]).expect("encrypted");
        exchange(stream, line, &[], "")
    };
    let upgraded = ask("POST /api/v1/upgrade");
    assert_eq!(upgraded.status, 200, "{}", upgraded.text());
    for _ in 0..20 {
        assert_eq!(ask("GET /livez").status, 200);
    }
}

#[test]
fn a_pair_that_does_not_fit_is_told_before_anything_starts() {
    let pair = Pair::new();
    let check = |config: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        let file = write_config(folder.path(), &with(config));
        let mut command = std::process::Command::new(RESIDENTD);
        command.arg("check").arg("--config").arg(file);
        let ended = command.output().expect("it runs");
        let told = String::from_utf8_lossy(&ended.stderr).into_owned();
        (ended.status.code(), told)
    };
    assert_eq!(check(&pair.config()).0, Some(0));
    let cert = format!("[tls]\ncert = {:?}\n", pair.cert());
    let (code, told) = check(&cert);
    assert_eq!(code, Some(2));
    assert!(
        told.contains("tls.cert: is given without tls.key"),
        "{told}"
    );
    let (_, told) = check(&format!("{cert}key = \"none.key\"\n"));
    assert!(
        told.contains("tls.key: ") && told.contains("no such file"),
        "{told}"
    );
    let (_, told) = check(&format!("{cert}key = {:?}\n", pair.cert()));
    assert!(told.contains("holds no private key as PEM"), "{told}");
    std::fs::write(pair.key(), made().1).expect("written");
    let (code, told) = check(&pair.config());
    assert_eq!(code, Some(2));
    assert!(told.contains("is not the key of the certificate"), "{told}");
}
