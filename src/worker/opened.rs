//! A connection to a worker that a probe has opened, for the first request.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::{TcpStream, UnixStream};

/// A connection on which nothing is under way.
#[derive(Debug)]
pub enum Stream {
    /// To a TCP address, without delay.
    Tcp(TcpStream),
    /// To a Unix socket.
    Unix(UnixStream),
}

/// At most one such connection, for whoever takes it first.
#[derive(Clone, Default)]
pub struct Opened(Arc<Mutex<Option<Stream>>>);

impl Opened {
    /// Keeps a connection.
    #[must_use]
    pub fn new(stream: Option<Stream>) -> Self {
        Self(Arc::new(Mutex::new(stream)))
    }

    /// Takes the connection, if it is still there.
    #[must_use]
    pub fn take(&self) -> Option<Stream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Closes it unless somebody took it.
    pub fn close(&self) {
        drop(self.take());
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opened")
    }
}
