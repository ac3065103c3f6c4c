//! Connections to a worker; and one that a probe has opened, for the first
//! request.

use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, io};

use tokio::net::{TcpStream, UnixStream};

use crate::model::Upstream;

/// A connection on which nothing is under way.
#[derive(Debug)]
pub enum Stream {
    /// To a TCP address, without delay.
    Tcp(TcpStream),
    /// To a Unix socket.
    Unix(UnixStream),
}

impl Stream {
    /// Opens a connection.
    ///
    /// # Errors
    /// When the worker does not accept one.
    pub async fn connect(upstream: &Upstream) -> io::Result<Self> {
        Ok(match upstream {
            Upstream::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Self::Tcp(stream)
            }
            Upstream::Unix(path) => Self::Unix(UnixStream::connect(path).await?),
        })
    }

    /// Moves it to the runtime of this thread, which waits for what comes.
    ///
    /// # Errors
    /// When the runtime cannot wait for it.
    pub fn moved_here(self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(TcpStream::from_std(stream.into_std()?)?),
            Self::Unix(stream) => Self::Unix(UnixStream::from_std(stream.into_std()?)?),
        })
    }
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
