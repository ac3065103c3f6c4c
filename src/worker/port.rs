//! Ports of workers, and the holder sockets that keep them.
//!
//! A holder is bound and does not listen, with `SO_REUSEADDR` and
//! `SO_REUSEPORT`: the kernel then gives the number to nobody else, while a
//! worker that sets either option (as the common servers do) binds and serves
//! on it. One that sets neither cannot bind beside a holder, and is started a
//! second time without.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use socket2::{Domain, Socket, Type};

/// Gives out ports in turn, so that one that was just given back rests.
#[derive(Debug)]
pub(super) struct Ports {
    range: RangeInclusive<u16>,
    next: Mutex<u16>,
}

/// A port, and the socket that keeps it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) port: u16,
    holder: Option<Socket>,
}

impl Held {
    /// Lets the number go, for a worker that cannot bind beside a holder.
    pub(super) fn release(&mut self) {
        self.holder = None;
    }
}

impl Ports {
    pub(super) fn new(range: RangeInclusive<u16>) -> Self {
        // Two residentds on one machine begin at different places.
        let span = range.end() - range.start();
        let offset = u16::try_from(std::process::id() % u32::from(span.max(1))).unwrap_or(0);
        let next = Mutex::new(range.start() + offset);
        Self { range, next }
    }

    /// Takes back the port of a worker that an earlier residentd spawned. A holder
    /// cannot be bound beside one that listens, and need not: nobody else gets
    /// the number then.
    pub(super) fn rejoin(port: u16) -> Held {
        Held {
            port,
            holder: hold(port).ok(),
        }
    }

    /// Takes the next port that nobody has.
    pub(super) fn take(&self) -> io::Result<Held> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in self.range.clone() {
            let port = *next;
            *next = if port == *self.range.end() {
                *self.range.start()
            } else {
                port + 1
            };
            if let Ok(holder) = hold(port) {
                return Ok(Held {
                    port,
                    holder: Some(holder),
                });
            }
        }
        let text = format!(
            "no free port from {} to {}",
            self.range.start(),
            self.range.end()
        );
        Err(io::Error::new(io::ErrorKind::AddrInUse, text))
    }
}

fn hold(port: u16) -> io::Result<Socket> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // Bound without the options first: that fails when anybody, another
    // holder included, has the number.
    let alone = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    alone.bind(&address.into())?;
    drop(alone);
    let holder = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    holder.set_reuse_address(true)?;
    holder.set_reuse_port(true)?;
    holder.bind(&address.into())?;
    Ok(holder)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_held_port_is_given_to_nobody_else_and_to_a_worker_that_reuses() {
        let ports = Ports::new(23_000..=23_400);
        let held: Vec<_> = (0..20)
            .map(|_| ports.take().expect("a free port"))
            .collect();
        let distinct: BTreeSet<u16> = held.iter().map(|h| h.port).collect();
        assert_eq!(distinct.len(), 20);
        assert!(hold(held[0].port).is_err(), "a second holder is refused");
        // Rust's own listener sets SO_REUSEADDR, as most servers do.
        TcpListener::bind(("127.0.0.1", held[0].port)).expect("a worker binds beside its holder");
    }
}
