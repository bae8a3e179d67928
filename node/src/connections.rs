//! Connections of browsers and of what scrapes metrics: only so many, and none of which waits for ever, so that nobody takes the files that
//! the daemon needs.
//!
//! In:   connections            Out: the same, each with a place and a time by which it must have gone on
//! Holds: a place for each that is open
//! Invariants: 1. at most [`CONNECTIONS_MAX`] are open; further ones wait in the system's queue; 2. one that does not send its
//!        request, or does not take the answer, is ended
//! Not here: encryption of the page (`crate::web`)

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// So many connections at once. A browser opens six.
const CONNECTIONS_MAX: usize = 64;
/// From one answer to the next: the request, what is done for it, and each piece that is taken of the answer. All logs are read for a
/// minute at most.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// A listener that gives a place to each connection.
pub(crate) struct Bounded<L> {
    listener: L,
    places: Arc<Semaphore>,
}

impl<L> Bounded<L> {
    pub(crate) fn new(listener: L) -> Self {
        Self {
            listener,
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }
}

impl<L: Listener> Listener for Bounded<L> {
    type Io = Placed<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
            // Nobody closes it.
            return std::future::pending().await;
        };
        let (stream, from) = self.listener.accept().await;
        (Placed::new(stream, place, ANSWER_MAX), from)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that has a place.
pub(crate) struct Placed<S> {
    stream: S,
    most: Duration,
    until: Pin<Box<Sleep>>,
    /// Something was sent since something was received.
    answered: bool,
    _place: OwnedSemaphorePermit,
}

impl<S> Placed<S> {
    fn new(stream: S, place: OwnedSemaphorePermit, most: Duration) -> Self {
        Self {
            stream,
            most,
            until: Box::pin(tokio::time::sleep(most)),
            answered: false,
            _place: place,
        }
    }

    /// What is inside.
    pub(crate) const fn get_ref(&self) -> &S {
        &self.stream
    }

    fn renew(&mut self) {
        let until = Instant::now() + self.most;
        self.until.as_mut().reset(until);
    }

    /// What waits ends once its time is over.
    fn timely<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match done {
            Poll::Pending => self
                .until
                .as_mut()
                .poll(cx)
                .map(|()| Err(io::ErrorKind::TimedOut.into())),
            done => done,
        }
    }

    fn sent(&mut self, cx: &mut Context<'_>, sent: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(sent, Poll::Ready(Ok(_))) {
            self.answered = true;
            self.renew();
        }
        self.timely(cx, sent)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Placed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        // The next request; what comes of it later gets no more time.
        if read.is_ready() && this.answered {
            this.answered = false;
            this.renew();
        }
        this.timely(cx, read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Placed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let sent = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.sent(cx, sent)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let sent = Pin::new(&mut this.stream).poll_write_vectored(cx, slices);
        this.sent(cx, sent)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.timely(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let shut = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.timely(cx, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    const MOST: Duration = Duration::from_millis(200);

    fn placed(places: &Arc<Semaphore>, most: Duration) -> (Placed<DuplexStream>, DuplexStream) {
        let (here, there) = tokio::io::duplex(8);
        let place = Arc::clone(places).try_acquire_owned().unwrap();
        (Placed::new(here, place, most), there)
    }

    #[tokio::test]
    async fn a_request_that_never_ends_is_ended_and_gives_its_place_back() {
        let places = Arc::new(Semaphore::new(1));
        let (mut here, mut there) = placed(&places, MOST);
        let began = Instant::now();
        let reading = tokio::spawn(async move {
            let mut all = Vec::new();
            here.read_to_end(&mut all).await.unwrap_err().kind()
        });
        // A byte now and then is no request.
        while !reading.is_finished() {
            let _ = there.write_all(b"x").await;
            tokio::time::sleep(MOST / 10).await;
            assert!(began.elapsed() < MOST * 300, "it goes on for ever");
        }
        assert_eq!(reading.await.unwrap(), io::ErrorKind::TimedOut);
        assert_eq!(places.available_permits(), 1);
    }

    #[tokio::test]
    async fn each_request_has_its_time_and_an_answer_that_nobody_takes_ends() {
        let places = Arc::new(Semaphore::new(1));
        // Longer than a busy machine lets a request of a moment lie.
        let most = MOST * 10;
        let (mut here, mut there) = placed(&places, most);
        let began = Instant::now();
        while began.elapsed() < most * 2 {
            there.write_all(b"ask").await.unwrap();
            let mut got = [0; 3];
            here.read_exact(&mut got).await.unwrap();
            tokio::time::sleep(MOST / 4).await;
            here.write_all(b"say").await.unwrap();
            there.read_exact(&mut got).await.unwrap();
        }
        let kind = here.write_all(&[0; 100]).await.unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::TimedOut);
    }
}
