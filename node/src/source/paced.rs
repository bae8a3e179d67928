//! A local socket read by a thread of its own, paced.
//!
//! A walsender sends every message by itself. Woken by each, the reader costs both sides more than the messages
//! do: half of the daemon's time and a third of the walsender's, as profiles showed. So while messages come thick
//! and fast the thread sleeps a moment between reads, waiting for nothing, and takes what has gathered. The
//! runtime's own poll would be woken by each message whether or not anybody waits for it.
//!
//! In:   bytes of a Unix socket        Out: the same, in larger pieces
//! Holds: four pieces
//! Invariants: no byte is lost or reordered; a lone message is never held back
//! On crash: nothing to lose
//! Not here: TCP, where the kernel gathers and TLS must be undone first (`socket`)

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rustix::net::{SendFlags, send};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::mpsc;

/// Most bytes of one piece.
const PIECE_LEN_MAX: usize = 128 * 1024;
/// Pieces that wait for the task.
const PIECES_MAX: usize = 4;
/// This many reads within [`WINDOW`] begin the pacing: one transaction alone takes three.
const BUSY_READS: u32 = 8;
const WINDOW: Duration = Duration::from_millis(1);
/// Time between two reads while paced, after a small read and after a large one. A socket's buffer holds some 250
/// small messages: the server must not find it full.
const PAUSE: Duration = Duration::from_micros(500);
const SHORT_PAUSE: Duration = Duration::from_micros(200);
/// A paced read that finds less than this ends the pacing.
const BUSY_BYTES: usize = 1_024;
/// A read of so much is a large one.
const LARGE_BYTES: usize = 8 * 1_024;

/// The socket.
pub(super) struct Paced {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
    /// For writing only.
    socket: AsyncFd<UnixStream>,
}

impl Paced {
    /// Takes a connected socket over.
    pub(super) fn new(stream: tokio::net::UnixStream) -> io::Result<Self> {
        let socket = stream.into_std()?;
        socket.set_nonblocking(false)?;
        let reader = socket.try_clone()?;
        let (to, pieces) = mpsc::channel(PIECES_MAX);
        thread::Builder::new()
            .name("walsender".to_owned())
            .spawn(move || read(reader, &to))?;
        // Deprecated for types whose descriptor may change under it. This one's does not.
        #[allow(deprecated)]
        let socket = AsyncFd::with_interest(socket, Interest::WRITABLE)?;
        Ok(Self {
            pieces,
            current: Bytes::new(),
            socket,
        })
    }
}

impl Drop for Paced {
    fn drop(&mut self) {
        // Wakes the thread, which ends.
        let _ = self.socket.get_ref().shutdown(Shutdown::Both);
    }
}

fn read(mut socket: UnixStream, to: &mpsc::Sender<io::Result<Bytes>>) {
    let mut buffer = BytesMut::new();
    let mut pace = Pace::default();
    loop {
        buffer.resize(PIECE_LEN_MAX, 0);
        let piece = match socket.read(&mut buffer) {
            // The end: the receiver sees the channel closed.
            Ok(0) => return,
            Ok(len) => Ok(Bytes::copy_from_slice(buffer.get(..len).unwrap_or_default())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
        let len = piece.as_ref().map_or(0, Bytes::len);
        let failed = piece.is_err();
        if to.blocking_send(piece).is_err() || failed {
            return;
        }
        if pace.is_busy(len, Instant::now()) {
            thread::sleep(if len < LARGE_BYTES { PAUSE } else { SHORT_PAUSE });
        }
    }
}

/// Decides whether to sleep before the next read.
struct Pace {
    since: Instant,
    reads: u32,
    busy: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            reads: 0,
            busy: false,
        }
    }
}

impl Pace {
    fn is_busy(&mut self, len: usize, now: Instant) -> bool {
        if self.busy {
            self.busy = len >= BUSY_BYTES;
            (self.since, self.reads) = (now, 0);
            return self.busy;
        }
        self.reads += 1;
        if now.duration_since(self.since) >= WINDOW {
            (self.since, self.reads) = (now, 1);
        }
        self.busy = self.reads >= BUSY_READS;
        self.busy
    }
}

impl AsyncRead for Paced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.current.is_empty() {
            match ready!(self.pieces.poll_recv(cx)) {
                Some(Ok(piece)) => self.current = piece,
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Ok(())),
            }
        }
        let len = self.current.len().min(out.remaining());
        out.put_slice(&self.current.split_to(len));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Paced {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.socket.poll_write_ready(cx))?;
            // The socket itself blocks, for the reader.
            let sent = ready.try_io(|socket| {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                Ok(send(socket.get_ref(), bytes, flags)?)
            });
            if let Ok(sent) = sent {
                return Poll::Ready(sent);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.get_ref().shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn what_is_sent_in_crumbs_arrives_whole_and_in_order() {
        let (here, there) = tokio::net::UnixStream::pair().unwrap();
        let mut paced = Paced::new(here).unwrap();
        let writer = tokio::spawn(async move {
            let mut there = there;
            for at in 0..50_000u32 {
                there.write_all(&at.to_be_bytes()).await.unwrap();
            }
            let mut answer = [0; 4];
            there.read_exact(&mut answer).await.unwrap();
            answer
        });
        for at in 0..50_000u32 {
            assert_eq!(paced.read_u32().await.unwrap(), at);
        }
        paced.write_all(b"done").await.unwrap();
        assert_eq!(&writer.await.unwrap(), b"done");
        assert_eq!(paced.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[test]
    fn only_a_crowd_of_small_reads_is_paced() {
        let mut pace = Pace::default();
        let mut now = Instant::now();
        // One transaction: three reads, then nothing for a while.
        for _ in 0..100 {
            for _ in 0..3 {
                now += Duration::from_micros(20);
                assert!(!pace.is_busy(100, now));
            }
            now += Duration::from_millis(5);
        }
        for _ in 0..BUSY_READS {
            now += Duration::from_micros(10);
            pace.is_busy(100, now);
        }
        assert!(pace.is_busy(BUSY_BYTES, now));
        assert!(!pace.is_busy(BUSY_BYTES - 1, now));
    }
}
