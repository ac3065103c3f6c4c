//! Strangers on the ports of workers: whoever is answered by one is answered
//! wrongly, and its answer says so.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::processes::children;
use crate::support::{now, pause};

/// What a stranger answers to everything.
const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 8\r\nconnection: close\r\n\r\n\"stolen\"";
/// How long a port that was just left is tried for.
const TRIES: Duration = Duration::from_millis(500);

/// Listens on the port of the next worker of `model` before it does, which
/// residentd, its parent, has chosen; and goes on for so long.
pub(crate) fn steal(model: &'static str, residentd: i64, time: Duration) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let start = now();
        while start.elapsed() < time {
            let workers = children(residentd).into_iter();
            let mut ports = workers.filter(|w| w.serves(model)).filter_map(|w| w.port());
            if let Some(stolen) = ports.find_map(|port| listen(port, true).ok()) {
                serve(&stolen, time.saturating_sub(start.elapsed()));
                return;
            }
            pause(Duration::from_millis(5));
        }
    })
}

/// Listens on a port that a worker has just left, as soon as any other program
/// could.
pub(crate) fn inherit(port: u16, time: Duration) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let start = now();
        while start.elapsed() < TRIES {
            if let Ok(inherited) = listen(port, false) {
                serve(&inherited, time);
                return;
            }
            pause(Duration::from_millis(1));
        }
    })
}

/// Listens on this port; `beside` whoever of the same user is bound there and
/// does not listen, who allowed for that.
fn listen(port: u16, beside: bool) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // As most servers do: with that alone nobody listens beside another.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(beside)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    socket.listen(64)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn serve(listener: &TcpListener, time: Duration) {
    let start = now();
    while start.elapsed() < time {
        match listener.accept() {
            Ok((stream, _)) => answer(stream),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                pause(Duration::from_millis(5));
            }
            Err(_) => return,
        }
    }
}

fn answer(mut stream: TcpStream) {
    // Whoever asked may have left.
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(Duration::from_millis(50)));
    let mut asked = [0; 4096];
    let _ = stream.read(&mut asked);
    let _ = stream.write_all(ANSWER.as_bytes());
}
