//! Takes connections from the port, at most so many, and gives up those that say nothing.
//!
//! In:   a bound listener                Out: connections for tonic
//! Holds: a permit per open connection
//! Invariants: 1. at most [`CONNECTIONS_MAX`] connections are open; 2. one that sends no byte within
//!             [`HELLO_TIMEOUT`] fails, so whoever only connects cannot keep peers out.
//! Not here: TLS and HTTP/2 (tonic has its own timeouts for them), hellos (`server.rs`).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::limits::{CONNECTIONS_MAX, HELLO_TIMEOUT};

/// Pause after the system refused to accept, for lack of descriptors most likely.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A connection from the port.
pub(super) struct Connection {
    stream: TcpStream,
    /// Until the first byte has come.
    first_byte: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

/// The connections that come in, without end: what fails to accept is tried again.
pub(super) fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<Connection>> {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    stream::unfold((listener, room), async |(listener, room)| {
        let permit = Arc::clone(&room).acquire_owned().await.ok()?;
        let (stream, from) = accept(&listener).await;
        tracing::trace!(%from, "a connection came in");
        // Without it small messages wait for the acknowledgement of the ones before. It fails only on dead sockets.
        let _ = stream.set_nodelay(true);
        let first_byte = Some(Box::pin(tokio::time::sleep(HELLO_TIMEOUT)));
        Some((
            Ok(Connection {
                stream,
                first_byte,
                _permit: permit,
            }),
            (listener, room),
        ))
    })
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of a peer, trying again");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.first_byte = None;
        }
        if let (Poll::Pending, Some(deadline)) = (&read, self.first_byte.as_mut())
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_given_up_and_one_that_spoke_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut incoming = Box::pin(connections(listener));
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut one = incoming.next().await.unwrap().unwrap();
        let mut spoke = TcpStream::connect(address).await.unwrap();
        let mut two = incoming.next().await.unwrap().unwrap();
        spoke.write_all(b"x").await.unwrap();
        assert_eq!(two.read_u8().await.unwrap(), b'x');
        assert!(two.first_byte.is_none());
        assert_eq!(one.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
