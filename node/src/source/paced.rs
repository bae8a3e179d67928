//! A local socket that is read with few wake-ups.
//!
//! A walsender sends every message by itself. Woken by each, the reader costs both sides more than the messages
//! do: half of the daemon's time and a third of the walsender's, as profiles showed. So while messages come thick
//! and fast a thread of its own sleeps a moment between reads, waiting for nothing, and takes what has gathered; the
//! runtime does not watch the socket meanwhile, since its poll would be woken by each message whether or not anybody waits
//! for it. The socket holds little, so it is read often; the task, whose waking wakes workers of the runtime as well, is given what several
//! reads have found. While messages come alone the runtime watches, and the task reads for itself: handing over costs a wake-up, too.
//!
//! In:   bytes of a Unix socket        Out: the same, in larger pieces
//! Holds: four pieces, and what is gathered for the next: nothing of that waits longer than the pause until the next read, or 4.2 ms in all
//! Invariants: no byte is lost or reordered: the thread and the task never read at one time; a lone message is not held back, but for
//!        four pauses behind a crowd
//! On crash: nothing to lose
//! Not here: TCP, where the kernel gathers and TLS must be undone first (`socket`)

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::mpsc;

/// Most bytes of one piece, and of one read by the task.
const PIECE_LEN_MAX: usize = 128 * 1024;
const DIRECT_LEN_MAX: usize = 16 * 1024;
/// Pieces that wait for the task.
const PIECES_MAX: usize = 4;
/// This many reads that find this much, in bytes, within [`WINDOW`] begin the pacing: one transaction alone takes three reads, and
/// three thousand small ones a second do not get there. A higher rate than that which ends it ([`BUSY_BYTES`]), or a stream would go to and fro.
const CROWD_READS: u32 = 8;
const CROWD_BYTES: usize = 2 * 1_024;
const WINDOW: Duration = Duration::from_millis(2);
/// Time between two reads while paced: the first, the least and the most. That is a little more than frames are apart where commits come thick
/// (`crate::capture`): what a read finds then goes at once, and neither a frame waits for its time nor a read for the next frame.
const PAUSE: Duration = Duration::from_micros(500);
const PAUSE_MIN: Duration = Duration::from_micros(200);
const PAUSE_MAX: Duration = Duration::from_micros(4_200);
/// Pauses of the reads that are given to the task together come to this at most, unless it is one read.
const GIVE_EVERY: Duration = PAUSE_MAX;
/// What a paced read should find, in bytes of the socket's buffer ([`held`]), of which there are 208 KiB as Linux has it: the server must not
/// find it full. That is 130 messages of a row each, which have 80 or 300 bytes, and fewer of longer ones.
const AIM_HELD: usize = 120 * 1_024;
const AIM_HALF: usize = AIM_HELD / 2;
/// What a message takes of the buffer beside its data, and what stands behind the data in the block that it has.
const BUFFER_HEAD: usize = 256;
const BUFFER_TAIL: usize = 320;
/// The least block.
const BUFFER_BLOCK_MIN: usize = 704;
/// A read that finds less than this after [`PAUSE`] found little; after another pause as much more or less.
const BUSY_BYTES: usize = 400;
/// So many reads in a row that found little end the pacing. One is no sign: where processes share a core, the server may
/// just have waited for it.
const LITTLE_READS: u32 = 4;

/// What the thread says.
enum Piece {
    Read(Bytes),
    Failed(io::Error),
    /// It reads no more, until it is told to.
    Ended(Messages),
}

/// Who reads.
enum Reader {
    /// The task, when the runtime says that there is something.
    Task(AsyncFd<UnixStream>),
    /// The thread. The descriptor waits here, unwatched.
    Thread(UnixStream),
    /// Nobody: the socket could not be watched, or has ended.
    Nobody,
}

/// The socket.
pub(super) struct Paced {
    reader: Reader,
    crowd: Crowd,
    /// Where in the stream of messages the task stands.
    messages: Messages,
    buffer: Vec<u8>,
    /// Tells the thread to read.
    go: std::sync::mpsc::Sender<Messages>,
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    /// For writing only.
    socket: AsyncFd<UnixStream>,
}

impl Paced {
    /// Takes a connected socket over.
    pub(super) fn new(stream: tokio::net::UnixStream) -> io::Result<Self> {
        let socket = stream.into_std()?;
        // For the thread; all else says MSG_DONTWAIT.
        socket.set_nonblocking(false)?;
        let (for_task, for_thread) = (socket.try_clone()?, socket.try_clone()?);
        let (to, pieces) = mpsc::channel(PIECES_MAX);
        let (go, told) = std::sync::mpsc::channel();
        thread::Builder::new()
            .name("walsender".to_owned())
            .spawn(move || {
                let mut buffer = Vec::new();
                while let Ok(messages) = told.recv()
                    && read(&for_thread, &mut buffer, messages, &to).is_some()
                {}
            })?;
        Ok(Self {
            reader: Reader::Task(watch(for_task, Interest::READABLE)?),
            crowd: Crowd::default(),
            messages: Messages::default(),
            buffer: vec![0; DIRECT_LEN_MAX],
            go,
            pieces,
            current: Bytes::new(),
            socket: watch(socket, Interest::WRITABLE)?,
        })
    }

    /// Reads what there is, if the runtime says that there is something.
    fn poll_direct(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Reader::Task(socket) = &self.reader else {
            return Poll::Ready(Ok(()));
        };
        let len = loop {
            let mut ready = ready!(socket.poll_read_ready(cx))?;
            let room = self.buffer.len().min(out.remaining());
            let room = self.buffer.get_mut(..room).unwrap_or_default();
            let wanted = room.len();
            let read = ready.try_io(|socket| {
                let (len, _) = recv(socket.get_ref(), &mut *room, RecvFlags::DONTWAIT)?;
                Ok(len)
            });
            let Ok(read) = read else { continue };
            let len = read?;
            if 0 < len && len < wanted {
                // All that there was: the next message is told.
                ready.clear_ready();
            }
            break len;
        };
        let bytes = self.buffer.get(..len).unwrap_or_default();
        self.messages.pass(bytes);
        out.put_slice(bytes);
        if len > 0 && self.crowd.meets(len, Instant::now()) {
            self.hand_over();
        }
        Poll::Ready(Ok(()))
    }

    /// Lets the thread read from now on.
    fn hand_over(&mut self) {
        if let Reader::Task(socket) = std::mem::replace(&mut self.reader, Reader::Nobody) {
            self.reader = Reader::Thread(socket.into_inner());
            // It is there as long as this is.
            let _ = self.go.send(std::mem::take(&mut self.messages));
        }
    }

    /// The thread reads no more: watches again.
    fn take_back(&mut self, messages: Messages) -> io::Result<()> {
        self.messages = messages;
        if let Reader::Thread(socket) = std::mem::replace(&mut self.reader, Reader::Nobody) {
            self.reader = Reader::Task(watch(socket, Interest::READABLE)?);
        }
        Ok(())
    }
}

/// Has the runtime watch a socket. What is there already is told at once.
// Deprecated for types whose descriptor may change under it. This one's does not.
#[allow(deprecated)]
fn watch(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    AsyncFd::with_interest(socket, interest)
}

impl Drop for Paced {
    fn drop(&mut self) {
        // Wakes the thread, which ends.
        let _ = self.socket.get_ref().shutdown(Shutdown::Both);
    }
}

/// Reads paced until messages come alone again; `None` when there is nothing more to read, or nobody who wants it.
fn read(
    socket: &UnixStream,
    buffer: &mut Vec<u8>,
    mut messages: Messages,
    to: &mpsc::Sender<Piece>,
) -> Option<()> {
    buffer.resize(PIECE_LEN_MAX, 0);
    let mut pace = Pace::new(PAUSE);
    // What the task is not given yet, bytes, and the pauses in which it came.
    let (mut gathered, mut took) = (0, pace.last);
    // A read at once would find what came since the last one only, and take that for the end of the crowd.
    thread::sleep(pace.last);
    loop {
        // Nothing that is here waits for what is not.
        let flags = match gathered {
            0 => RecvFlags::empty(),
            _ => RecvFlags::DONTWAIT,
        };
        match recv(socket, buffer.get_mut(gathered..).unwrap_or_default(), flags) {
            // The end: the receiver sees the channel closed.
            Ok((0, _)) => {
                give(buffer, &mut gathered, to)?;
                return None;
            }
            Ok((len, _)) => {
                let end = gathered + len;
                let count = messages.pass(buffer.get(gathered..end).unwrap_or_default());
                gathered = end;
                let pause = pace.after(len, count);
                let is_due = pause.is_none_or(|pause| took + pause > GIVE_EVERY);
                // What found little came alone. And there must be room for more.
                if is_due || pace.little > 0 || gathered > PIECE_LEN_MAX / 2 {
                    give(buffer, &mut gathered, to)?;
                    took = Duration::ZERO;
                }
                let Some(pause) = pause else {
                    return to.blocking_send(Piece::Ended(messages)).ok();
                };
                thread::sleep(pause);
                took += pause;
            }
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) => {
                give(buffer, &mut gathered, to)?;
                took = Duration::ZERO;
            }
            Err(error) => {
                give(buffer, &mut gathered, to)?;
                let _ = to.blocking_send(Piece::Failed(error.into()));
                return None;
            }
        }
    }
}

/// Gives the task what was gathered, if anything was; `None` when nobody wants it.
fn give(buffer: &[u8], gathered: &mut usize, to: &mpsc::Sender<Piece>) -> Option<()> {
    let piece = buffer.get(..std::mem::take(gathered)).unwrap_or_default();
    if piece.is_empty() {
        return Some(());
    }
    to.blocking_send(Piece::Read(Bytes::copy_from_slice(piece))).ok()
}

/// Counts messages as they pass: each is sent by itself, and takes its own part of the socket's buffer. Whatever passes, it counts something.
#[derive(Default)]
struct Messages {
    /// Bytes of the current message that are still to come.
    left: usize,
    /// What came of a head: a letter, then the length of all but that.
    head: [u8; 5],
    head_len: usize,
}

impl Messages {
    /// How many begin in the next bytes.
    fn pass(&mut self, mut bytes: &[u8]) -> usize {
        let mut count = 0;
        loop {
            let skipped = self.left.min(bytes.len());
            self.left -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            if bytes.is_empty() {
                return count;
            }
            count += usize::from(self.head_len == 0);
            let room = self.head.get_mut(self.head_len..).unwrap_or_default();
            let taken = room.len().min(bytes.len());
            for (slot, byte) in room.iter_mut().zip(bytes) {
                *slot = *byte;
            }
            bytes = bytes.get(taken..).unwrap_or_default();
            self.head_len += taken;
            if self.head_len == self.head.len() {
                let [_, a, b, c, d] = self.head;
                let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
                (self.left, self.head_len) = (len.saturating_sub(4), 0);
            }
        }
    }
}

/// How much of a socket's buffer a read of `len` bytes has found taken, bytes.
fn held(len: usize, messages: usize) -> usize {
    let messages = messages.max(1);
    let block = match len / messages + BUFFER_TAIL {
        ..=BUFFER_BLOCK_MIN => BUFFER_BLOCK_MIN,
        block => block.next_power_of_two(),
    };
    (BUFFER_HEAD + block).saturating_mul(messages)
}

/// Notices that messages come thick and fast.
struct Crowd {
    since: Instant,
    reads: u32,
    bytes: usize,
}

impl Default for Crowd {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            reads: 0,
            bytes: 0,
        }
    }
}

impl Crowd {
    /// A read found `len` bytes: was that one too many?
    fn meets(&mut self, len: usize, now: Instant) -> bool {
        if now.duration_since(self.since) >= WINDOW {
            (self.since, self.reads, self.bytes) = (now, 0, 0);
        }
        self.reads += 1;
        self.bytes += len;
        self.reads >= CROWD_READS && self.bytes >= CROWD_BYTES
    }
}

/// The last pause, and how many reads in a row found little.
struct Pace {
    last: Duration,
    little: u32,
}

impl Pace {
    const fn new(last: Duration) -> Self {
        Self { last, little: 0 }
    }

    /// The pause after a read of `len` bytes, in which so many messages began; `None` when they come alone again.
    fn after(&mut self, len: usize, messages: usize) -> Option<Duration> {
        if (len as u128) < BUSY_BYTES as u128 * self.last.as_micros() / PAUSE.as_micros() {
            self.little += 1;
            return (self.little < LITTLE_READS).then_some(self.last);
        }
        self.little = 0;
        self.last = match held(len, messages) {
            0..AIM_HALF => (self.last * 3 / 2).min(PAUSE_MAX),
            AIM_HALF..=AIM_HELD => self.last,
            _ => (self.last / 2).max(PAUSE_MIN),
        };
        Some(self.last)
    }
}

impl AsyncRead for Paced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            match self.reader {
                Reader::Task(_) => return self.poll_direct(cx, out),
                Reader::Nobody => return Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                Reader::Thread(_) => match ready!(self.pieces.poll_recv(cx)) {
                    Some(Piece::Read(piece)) => self.current = piece,
                    Some(Piece::Failed(error)) => return Poll::Ready(Err(error)),
                    Some(Piece::Ended(messages)) => self.take_back(messages)?,
                    None => return Poll::Ready(Ok(())),
                },
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

    #[tokio::test]
    async fn what_was_read_does_not_wait_for_what_does_not_come() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let (to, mut pieces) = mpsc::channel(PIECES_MAX);
        let sent: Vec<u8> = (0..50).flat_map(message).collect();
        io::Write::write_all(&mut there, &sent).unwrap();
        let reader = thread::spawn(move || read(&here, &mut Vec::new(), Messages::default(), &to).is_some());
        let Some(Piece::Read(piece)) = pieces.recv().await else {
            panic!("nothing was read")
        };
        assert_eq!(piece, sent);
        drop(there);
        assert!(pieces.recv().await.is_none());
        assert!(!reader.join().unwrap());
    }

    /// As long as a small row's.
    fn message(at: u32) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&at.to_be_bytes());
        bytes
    }

    #[tokio::test]
    async fn lone_messages_and_crowds_in_turn_arrive_whole_and_in_order() {
        let (here, mut there) = tokio::net::UnixStream::pair().unwrap();
        let mut paced = Paced::new(here).unwrap();
        let writer = tokio::spawn(async move {
            for round in 0..20u32 {
                for at in 0..300 {
                    there.write_all(&message(round * 300 + at)).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            there
        });
        let (mut by_thread, mut read) = (0, message(0));
        for at in 0..6_000 {
            paced.read_exact(&mut read).await.unwrap();
            assert_eq!(read, message(at));
            by_thread += u32::from(matches!(paced.reader, Reader::Thread(_)));
        }
        assert!(0 < by_thread, "no crowd was noticed");
        let mut there = writer.await.unwrap();
        for at in 0..20u32 {
            tokio::time::sleep(Duration::from_millis(3)).await;
            there.write_all(&at.to_be_bytes()).await.unwrap();
            assert_eq!(paced.read_u32().await.unwrap(), at);
        }
        assert!(matches!(paced.reader, Reader::Task(_)));
        drop(there);
        assert_eq!(paced.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[test]
    fn only_a_crowd_of_reads_is_paced() {
        let mut crowd = Crowd::default();
        let mut now = Instant::now();
        // Three thousand transactions a second, of three reads each.
        for _ in 0..1_000 {
            for len in [46, 130, 60] {
                now += Duration::from_micros(20);
                assert!(!crowd.meets(len, now));
            }
            now += Duration::from_micros(273);
        }
        let mut busy = (1..).map(|at| crowd.meets(500, now + Duration::from_micros(at * 10)));
        assert!(busy.by_ref().take(2 * CROWD_READS as usize).any(|busy| busy));
    }

    #[test]
    fn a_read_that_found_little_does_not_end_a_crowd_and_a_row_of_them_does() {
        let mut pace = Pace::new(PAUSE);
        for _ in 0..3 {
            for _ in 1..LITTLE_READS {
                assert!(pace.after(BUSY_BYTES - 1, 1).is_some());
            }
            assert!(pace.after(10 * BUSY_BYTES, 100).is_some());
        }
        for _ in 1..LITTLE_READS {
            assert!(pace.after(0, 0).is_some());
        }
        assert!(pace.after(BUSY_BYTES - 1, 1).is_none());
    }

    #[test]
    fn messages_are_counted_wherever_reads_cut_them_and_anything_else_does_no_harm() {
        let lens = [0usize, 1, 3, 200, 0, 7, 10_000];
        let mut stream = Vec::new();
        for len in lens {
            stream.push(b'd');
            stream.extend_from_slice(&u32::try_from(len + 4).unwrap().to_be_bytes());
            stream.resize(stream.len() + len, 0);
        }
        for cut in 1..300 {
            let mut messages = Messages::default();
            let counts = stream.chunks(cut).map(|piece| messages.pass(piece));
            assert_eq!(counts.sum::<usize>(), lens.len(), "{cut}");
            assert_eq!((messages.left, messages.head_len), (0, 0), "{cut}");
        }
        let mut messages = Messages::default();
        for byte in [0, 1, 255] {
            assert!(messages.pass(&[byte; 1_000]) <= 1_000);
        }
        // A buffer of 212,992 bytes holds some 220 short messages, and one that is longer than it.
        assert_eq!(212_992 / held(80, 1), 221);
        assert_eq!(held(300 * 100, 100), 100 * held(80, 1));
        assert!(held(3_000, 1) > held(300, 1) && held(1 << 20, 0) > 1 << 20);
    }

    /// Bytes that a stream of so many a second leaves in a pause.
    fn left(rate: u128, pause: Duration) -> usize {
        usize::try_from(rate * pause.as_micros() / 1_000_000).unwrap()
    }

    /// Those of a transaction of one row have so many bytes on average.
    const SHORT: usize = 82;

    #[test]
    fn pauses_become_as_long_as_a_stream_needs_for_the_aim() {
        // Bytes a second, of messages of so many bytes each, and what the pauses come to.
        let micros = Duration::from_micros;
        for (rate, message, least, most) in [
            (1_000_000, SHORT, PAUSE_MAX, PAUSE_MAX),
            (3_000_000, SHORT, micros(2_000), micros(3_000)),
            (10_000_000, SHORT, micros(500), micros(1_100)),
            // Rows of a large transaction: as many messages, and not as many bytes.
            (18_000_000, 150, micros(500), micros(1_100)),
            (100_000_000, SHORT, PAUSE_MIN, PAUSE_MIN),
            (1_000_000_000, 1 << 20, PAUSE_MIN, PAUSE_MIN),
        ] {
            let mut pace = Pace::new(PAUSE);
            let mut pause = PAUSE;
            for _ in 0..50 {
                let len = left(rate, pause);
                pause = pace.after(len, len / message).unwrap();
            }
            assert!(least <= pause && pause <= most, "{rate} B/s: {pause:?}");
        }
    }

    #[test]
    fn what_is_too_slow_to_be_paced_is_so_whatever_the_pause_was() {
        for pause in [PAUSE, PAUSE_MAX] {
            let mut pace = Pace::new(pause);
            // 3,000 small transactions a second.
            let len = left(710_000, pause);
            let ended = (0..LITTLE_READS).map(|_| pace.after(len, len / SHORT));
            let ended = ended.last().flatten();
            assert!(ended.is_none(), "{pause:?}");
        }
    }
}
