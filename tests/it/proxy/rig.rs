//! A worker that the test itself plays, byte by byte, and stub workers where
//! that is not needed.

use std::net::TcpListener;

use serde_json::json;

use crate::support::residentd::STUB;
use crate::support::wire::Wire;
use crate::support::{Residentd, wait_until};

/// One stub worker behind residentd, as model `m`; `server` are keys of the
/// table `[server]`.
pub(crate) fn one(server: &str) -> Residentd {
    Residentd::start(&format!(
        "{server}\n[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --port ${{PORT}} --name m'\nmemory = \"32MiB\"\n"
    ))
}

/// A residentd whose one model `m` is asked at a socket of the test.
pub(crate) struct Played {
    pub(crate) residentd: Residentd,
    listener: TcpListener,
}

impl Played {
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// As [`Played::start`], with these keys of the model.
    pub(crate) fn with(keys: &str) -> Self {
        Self::build(keys, &[])
    }

    /// As [`Played::start`], with these environment variables.
    pub(crate) fn logged(environment: &[(&str, &str)]) -> Self {
        Self::build("", environment)
    }

    /// As [`Played::with`], with spans sent to this collector.
    pub(crate) fn traced(endpoint: &str, keys: &str) -> Self {
        Self::build(keys, &[("RESIDENTD_OTLP_ENDPOINT", endpoint)])
    }

    fn build(keys: &str, environment: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket option");
        let address = listener.local_addr().expect("it is bound");
        let config = config(&address.to_string(), keys);
        let residentd = Residentd::start_with(&config, environment);
        Self {
            residentd,
            listener,
        }
    }
    /// Returns where the worker listens.
    pub(crate) fn worker_address(&self) -> String {
        self.listener.local_addr().expect("it is bound").to_string()
    }

    /// Has other keys of the model take effect.
    pub(crate) fn reload(&self, keys: &str) {
        self.residentd
            .configure(&config(&self.worker_address(), keys));
        let answer = self.residentd.ask("POST", "/api/v1/reload", None);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// Connects to residentd as a client.
    pub(crate) fn client(&self) -> Wire {
        Wire::to(self.residentd.address())
    }

    /// Waits for the next connection to the worker.
    pub(crate) fn worker(&self) -> Wire {
        wait_until("a connection to the worker", || self.try_worker())
    }

    /// Returns both ends of a connection that has left HTTP for a websocket.
    pub(crate) fn out_of_http(&self) -> (Wire, Wire) {
        let mut client = self.client();
        client.put("GET /upstream/m/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
        let mut worker = self.worker();
        worker.head();
        worker.put(
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        );
        assert_eq!(client.head().status(), 101);
        (client, worker)
    }

    /// Returns a connection to the worker if one waits.
    pub(crate) fn try_worker(&self) -> Option<Wire> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).expect("a socket option");
        Some(Wire::on(stream))
    }

    /// Waits until this many requests are with the worker.
    pub(crate) fn wait_for_leases(&self, count: u64) {
        wait_until(&format!("{count} requests in flight"), || {
            (self.residentd.model("m")["in_flight"] == json!(count)).then_some(())
        });
    }
}

fn config(address: &str, keys: &str) -> String {
    // Whoever connects to the worker brings a request.
    let live = match keys.contains("live = ") {
        true => "",
        false => "live = { probe = \"0s\" }",
    };
    format!(
        "[memory]\nlimit = \"400MiB\"\nreserve = \"16MiB\"\n[models.m]\ncommand = '{STUB} --name m'\nupstream = \"http://{address}\"\nready = {{ log = \"ready on\" }}\nmemory = \"32MiB\"\n{live}\n{keys}\n"
    )
}
