//! The replication connection: frames in, commands and feedback out.
//!
//! In:   bytes of one server            Out: [`Frame`]s to `assemble`, rows of replication commands to anyone
//! Holds: one read buffer, grown to the largest message (PostgreSQL's limit: 1 GiB)
//! Invariants: 1. reading and feedback are cancel-safe: a dropped future loses no byte and sends none twice.
//!             2. feedback only grows, and never passes what the server has sent: a position beyond that
//!                would silently switch off synchronous commit.
//! On crash: the server notices and releases the slot
//! Not here: logging in (`handshake`), what the frames mean (`pgoutput`)

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{SystemTime, UNIX_EPOCH};

use anabranch_proto::Lsn;
use anabranch_proto::wire::{Malformed, Reader};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::time::timeout;
use tracing::info;

use super::error::{Error, ServerError};
use super::handshake::login;
use super::socket::{Stream, dial, host_timeout};
use crate::pg::{self, Dsn};

/// Room made for one read, bytes.
const READ_SIZE: usize = 256 * 1024;
/// Less room than this is not worth a read, bytes.
const READ_SIZE_MIN: usize = 32 * 1024;
/// No message of PostgreSQL is longer (`MaxAllocSize` and some framing), bytes.
const MESSAGE_LEN_MAX: usize = (1 << 30) + 1024;
/// Before the message in CopyData of WAL: a letter, two positions, a time; bytes.
const WAL_HEAD_LEN: usize = 25;
/// 2000-01-01, where PostgreSQL's clock starts, microseconds since the Unix epoch.
pub(super) const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
/// The newest pgoutput protocol that this daemon knows.
const PGOUTPUT_VERSION_MAX: u32 = 4;

/// Messages over a byte stream.
pub(super) struct Wire {
    stream: Box<dyn Stream>,
    read: BytesMut,
    write: BytesMut,
    /// Bytes were written that may still sit in TLS's buffer.
    unflushed: bool,
}

impl Wire {
    fn new(stream: Box<dyn Stream>) -> Self {
        Self {
            stream,
            read: BytesMut::new(),
            write: BytesMut::new(),
            unflushed: false,
        }
    }

    /// The next message if it is whole in memory: its tag and body.
    fn buffered(&mut self) -> Result<Option<(u8, Bytes)>, Error> {
        let Some((&[tag, a, b, c, d], _)) = self.read.split_first_chunk() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if !(4..=MESSAGE_LEN_MAX).contains(&len) {
            return Err(Error::Protocol(Malformed("a message of impossible length")));
        }
        if self.read.len() < len + 1 {
            // All of it in one buffer, so that values are slices.
            self.read.reserve(len + 1 - self.read.len());
            return Ok(None);
        }
        let mut message = self.read.split_to(len + 1).freeze();
        message.advance(5);
        Ok(Some((tag, message)))
    }

    /// Passes the next message if it is whole in memory and `is_passed`, which sees its tag and body, says so.
    fn pass_over(&mut self, is_passed: impl FnOnce(u8, &[u8]) -> bool) -> bool {
        let Some((&[tag, a, b, c, d], rest)) = self.read.split_first_chunk() else {
            return false;
        };
        let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let body = len.checked_sub(4).and_then(|len| rest.get(..len));
        let passed = body.is_some_and(|body| is_passed(tag, body));
        if passed {
            self.read.advance(len + 1);
        }
        passed
    }

    /// Sends what is to be sent, as far as the socket takes it. Ready when nothing is left.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.write.is_empty() {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.write))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.write.advance(sent);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if self.read.capacity() - self.read.len() < READ_SIZE_MIN {
            self.read.reserve(READ_SIZE);
        }
        // The future holds no state between polls: a new one each time is the same.
        match ready!(pin!(self.stream.read_buf(&mut self.read)).poll(cx)) {
            Ok(0) => Poll::Ready(Err(Error::Closed)),
            Ok(_) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(Error::Lost(error))),
        }
    }

    /// The next message.
    pub(super) async fn message(&mut self) -> Result<(u8, Bytes), Error> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(message);
            }
            poll_fn(|cx| self.poll_read(cx)).await?;
        }
    }

    /// Sends the message that `build` writes.
    pub(super) async fn send(
        &mut self,
        build: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> Result<(), Error> {
        build(&mut self.write).map_err(Error::Lost)?;
        poll_fn(|cx| self.poll_send(cx)).await.map_err(Error::Lost)
    }
}

/// Who the server is: `IDENTIFY_SYSTEM`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's system identifier, the same on its physical standbys.
    pub system_id: u64,
    /// The timeline, which grows on a promotion.
    pub timeline: u32,
    /// How far the WAL is flushed.
    pub written: Lsn,
    /// The database.
    pub database: String,
    /// `server_version`, such as `15.18 (Debian 15.18-0+deb12u1)`.
    pub version: String,
}

/// A slot that was just created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSlot {
    /// Every transaction that committed before this is not in the slot's stream, every later one is.
    pub consistent_point: Lsn,
    /// The exported snapshot, which shows exactly the transactions before `consistent_point`. It lives until
    /// the next command on the connection that created it.
    pub snapshot: Option<String>,
}

/// What to do about a snapshot when creating a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshot {
    /// Export it for other sessions.
    Export,
    /// None.
    Nothing,
}

/// A replication connection that takes commands.
pub struct Walsender {
    wire: Wire,
    version: String,
    major: u32,
}

/// One row of a command's answer; `None` is NULL.
type TextRow = Vec<Option<String>>;

impl Walsender {
    /// Connects and logs in as `anabranch:<purpose>`: to the one host there is, to the server that was chosen, or to the one of
    /// the hosts that takes writes.
    ///
    /// # Errors
    /// When there is none, or it does not let us in.
    pub async fn connect(dsn: &Dsn, purpose: &str) -> Result<Self, Error> {
        let dsn = pg::settled(dsn).await?;
        // Boxed: a login future is large and rare.
        let connected = timeout(host_timeout(&dsn), Box::pin(Self::connect_host(&dsn, purpose))).await;
        connected.unwrap_or_else(|_| {
            Err(Error::Reach {
                host: dsn.hosts(),
                source: io::ErrorKind::TimedOut.into(),
            })
        })
    }

    async fn connect_host(dsn: &Dsn, purpose: &str) -> Result<Self, Error> {
        let socket = dial(dsn).await?;
        let mut wire = Wire::new(socket.stream);
        let greeting = login(&mut wire, socket.end_point, dsn, purpose).await?;
        let major = pg::major(&greeting.version);
        if major < 14 {
            return Err(Error::TooOld {
                version: greeting.version,
            });
        }
        let mut walsender = Self {
            wire,
            version: greeting.version,
            major,
        };
        if major >= 17 {
            // Decoding is one transaction for the server, as long as it takes. (No option at connecting: see `pg`.)
            walsender.query("SET transaction_timeout = 0").await?;
        }
        if let Some(server) = dsn.server() {
            let row = walsender
                .query(pg::WHO)
                .await?
                .into_iter()
                .next()
                .unwrap_or_default();
            let text = |at: usize| row.get(at).and_then(Option::as_deref).unwrap_or_default();
            if pg::of_texts(text(0), text(1), text(2)).id != server {
                return Err(pg::Error::OtherServer { host: socket.host }.into());
            }
        }
        info!(
            host = socket.host,
            version = walsender.version,
            "replication connection open"
        );
        Ok(walsender)
    }

    /// Runs one command and returns its rows, as text.
    ///
    /// # Errors
    /// What the server says, or a broken connection.
    pub async fn query(&mut self, command: &str) -> Result<Vec<TextRow>, Error> {
        self.wire.send(|out| frontend::query(command, out)).await?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            let (tag, body) = self.wire.message().await?;
            match tag {
                b'D' => rows.push(text_row(&body)?),
                b'E' => failed = Some(ServerError::parse(&body)),
                b'Z' => break,
                // Description, completion, notices, parameters.
                b'T' | b'C' | b'N' | b'S' | b'A' => {}
                tag => {
                    return Err(Error::Unexpected {
                        what: format!("message {:?}", char::from(tag)),
                    });
                }
            }
        }
        match failed {
            Some(source) => Err(Error::Server {
                during: "a replication command",
                source,
            }),
            None => Ok(rows),
        }
    }

    async fn scalar(&mut self, command: &str) -> Result<String, Error> {
        let rows = self.query(command).await?;
        rows.into_iter()
            .flatten()
            .flatten()
            .next()
            .ok_or(Error::Protocol(Malformed("no row in an answer")))
    }

    /// `IDENTIFY_SYSTEM`.
    ///
    /// # Errors
    /// What the server says, or a broken connection.
    pub async fn identify(&mut self) -> Result<Identity, Error> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let mut fields = rows.into_iter().flatten().map(Option::unwrap_or_default);
        let bad = || Error::Protocol(Malformed("an answer to IDENTIFY_SYSTEM that cannot be read"));
        let mut field = || fields.next().ok_or_else(bad);
        Ok(Identity {
            system_id: field()?.parse().map_err(|_| bad())?,
            timeline: field()?.parse().map_err(|_| bad())?,
            written: field()?.parse().map_err(|_| bad())?,
            database: field()?,
            version: self.version.clone(),
        })
    }

    /// Creates a logical slot for pgoutput. Waits for every transaction that is open now, prepared ones too.
    ///
    /// # Errors
    /// When the slot exists, the server's `wal_level` is too low, or it has no free slot.
    pub async fn create_slot(&mut self, slot: &str, snapshot: Snapshot) -> Result<NewSlot, Error> {
        self.create(slot, "", snapshot).await
    }

    /// Cuts the WAL at one place and exports a snapshot of everything before it. Both live as long as this
    /// connection, and as it runs no other command. Waits as [`Self::create_slot`] does.
    ///
    /// # Errors
    /// As [`Self::create_slot`].
    pub async fn cut(&mut self, slot: &str) -> Result<NewSlot, Error> {
        self.create(slot, "TEMPORARY ", Snapshot::Export).await
    }

    async fn create(&mut self, slot: &str, kind: &str, snapshot: Snapshot) -> Result<NewSlot, Error> {
        let option = match (snapshot, self.major) {
            (Snapshot::Export, 15..) => "(SNAPSHOT 'export')",
            // A standby may take it over.
            (Snapshot::Nothing, 17..) => "(SNAPSHOT 'nothing', FAILOVER)",
            (Snapshot::Nothing, 15..) => "(SNAPSHOT 'nothing')",
            (Snapshot::Export, _) => "EXPORT_SNAPSHOT",
            (Snapshot::Nothing, _) => "NOEXPORT_SNAPSHOT",
        };
        let command = format!(
            "CREATE_REPLICATION_SLOT {} {kind}LOGICAL pgoutput {option}",
            quoted(slot, '"')
        );
        let rows = match self.query(&command).await {
            Ok(rows) => rows,
            Err(Error::Server { source, .. }) if source.is("42710") => {
                return Err(Error::SlotExists {
                    slot: slot.to_owned(),
                });
            }
            Err(Error::Server { source, .. })
                if source.is("55000") && self.scalar("SHOW wal_level").await? != "logical" =>
            {
                return Err(Error::WalLevel(source));
            }
            Err(error) => return Err(error),
        };
        // slot_name, consistent_point, snapshot_name, output_plugin
        let mut fields = rows.into_iter().flatten().skip(1);
        let bad = Error::Protocol(Malformed(
            "an answer to CREATE_REPLICATION_SLOT that cannot be read",
        ));
        let Some(Some(Ok(consistent_point))) = fields.next().map(|field| field.map(|text| text.parse()))
        else {
            return Err(bad);
        };
        Ok(NewSlot {
            consistent_point,
            snapshot: fields.next().flatten(),
        })
    }

    /// Starts decoding the slot at `start`, or where it was last confirmed if that is later.
    ///
    /// # Errors
    /// When the slot is missing, in use, or unfit.
    pub(super) async fn start(
        mut self,
        slot: &str,
        publication: &str,
        start: Lsn,
    ) -> Result<Replication, Error> {
        // Without `streaming` all versions send the same; 14 has 2, 15 has 3, 16 has 4.
        let version = (self.major - 12).min(PGOUTPUT_VERSION_MAX);
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {start} (proto_version '{version}', publication_names {}, \
             binary 'true', messages 'true')",
            quoted(slot, '"'),
            quoted(&quoted(publication, '"'), '\''),
        );
        self.wire.send(|out| frontend::query(&command, out)).await?;
        loop {
            let (tag, body) = self.wire.message().await?;
            match tag {
                // CopyBothResponse
                b'W' => break,
                b'N' | b'S' => {}
                b'E' => return Err(start_error(ServerError::parse(&body), slot)),
                tag => {
                    return Err(Error::Unexpected {
                        what: format!("message {:?}", char::from(tag)),
                    });
                }
            }
        }
        Ok(Replication {
            wire: self.wire,
            publication: publication.to_owned(),
            received: Lsn::ZERO,
            sent_us: 0,
            told: Feedback::default(),
            to_tell: None,
        })
    }
}

fn start_error(source: ServerError, slot: &str) -> Error {
    let slot = slot.to_owned();
    match source.code.as_str() {
        "42704" => Error::SlotMissing { slot },
        "55006" => Error::SlotInUse { slot, source },
        _ => Error::Server {
            during: "the start of decoding",
            source,
        },
    }
}

fn quoted(text: &str, quote: char) -> String {
    let doubled = text.replace(quote, &format!("{quote}{quote}"));
    format!("{quote}{doubled}{quote}")
}

fn text_row(body: &[u8]) -> Result<TextRow, Malformed> {
    let mut from = Reader::new(body);
    let count = from.u16()?;
    let mut row = Vec::with_capacity(usize::from(count).min(64));
    for _ in 0..count {
        row.push(match usize::try_from(from.i32()?) {
            Ok(len) => Some(String::from_utf8_lossy(from.take(len)?).into_owned()),
            Err(_) => None,
        });
    }
    from.done()?;
    Ok(row)
}

/// Positions reported to the server; they mean what `pg_stat_replication` calls them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Feedback {
    /// Received.
    pub write: Lsn,
    /// Durable here: the slot's `confirmed_flush_lsn`, from which a restart begins.
    pub flush: Lsn,
    /// Applied where it has to be.
    pub apply: Lsn,
}

/// Should the other side answer at once?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyWanted {
    /// Yes.
    Yes,
    /// No.
    No,
}

/// What comes inside CopyData.
#[derive(Debug)]
pub(super) enum Frame {
    /// One pgoutput message.
    Wal(Bytes),
    /// A keepalive.
    Keepalive { wal_end: Lsn, reply: ReplyWanted },
}

/// A connection that decodes.
pub(super) struct Replication {
    wire: Wire,
    publication: String,
    received: Lsn,
    /// When the server sent the last message, by its clock, microseconds since the Unix epoch; 0 before the first.
    sent_us: i64,
    /// The feedback given last, sent or about to be.
    told: Feedback,
    /// `told` is still to be put on the wire.
    to_tell: Option<ReplyWanted>,
}

impl Replication {
    /// The highest position the server has told us.
    pub(super) const fn received(&self) -> Lsn {
        self.received
    }

    /// See [`super::Source::sent_us`].
    pub(super) const fn sent_us(&self) -> i64 {
        self.sent_us
    }

    /// The next frame if it is whole in memory.
    pub(super) fn buffered(&mut self) -> Result<Option<Frame>, Error> {
        while let Some((tag, body)) = self.wire.buffered()? {
            match tag {
                b'd' => return self.copy_data(body).map(Some),
                b'E' => return Err(self.stream_error(ServerError::parse(&body))),
                // CopyDone, and what follows it.
                b'c' | b'C' | b'Z' => return Err(Error::Closed),
                b'N' => self.notice(ServerError::parse(&body))?,
                b'S' | b'A' => {}
                tag => {
                    return Err(Error::Unexpected {
                        what: format!("message {:?}", char::from(tag)),
                    });
                }
            }
        }
        Ok(None)
    }

    /// Passes rows at the head of what is in memory, as long as they are of tables that `is_passed`: most of what comes back of own
    /// writes, so it is not even made a frame.
    pub(super) fn pass_over_rows(&mut self, is_passed: impl Fn(u32) -> bool) {
        let (received, sent_us) = (&mut self.received, &mut self.sent_us);
        while self.wire.pass_over(|tag, body| {
            let Some((end, clock, row)) = (tag == b'd').then(|| row_of(body)).flatten() else {
                return false;
            };
            let passed = is_passed(row);
            if passed {
                *sent_us = clock.saturating_add(POSTGRES_EPOCH_US);
                *received = end.max(*received);
            }
            passed
        }) {}
    }

    /// Reads more, and sends feedback that is waiting. Cancel-safe.
    pub(super) async fn fill(&mut self) -> Result<(), Error> {
        poll_fn(|cx| {
            // Pending is fine: the socket wakes us for either direction.
            if let Poll::Ready(Err(error)) = self.poll_tell(cx) {
                return Poll::Ready(Err(Error::Lost(error)));
            }
            self.wire.poll_read(cx)
        })
        .await
    }

    /// Reports positions; of several reports that could not be sent yet the last one goes. Cancel-safe.
    pub(super) async fn feedback(&mut self, wanted: Feedback, reply: ReplyWanted) -> Result<(), Error> {
        self.queue_feedback(wanted, reply);
        poll_fn(|cx| self.poll_tell(cx)).await.map_err(Error::Lost)
    }

    fn queue_feedback(&mut self, wanted: Feedback, reply: ReplyWanted) {
        self.told = bounded(self.told, wanted, self.received);
        if self.to_tell != Some(ReplyWanted::Yes) {
            self.to_tell = Some(reply);
        }
    }

    fn poll_tell(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.wire.poll_send(cx))?;
            match self.to_tell.take() {
                Some(reply) => put_feedback(&mut self.wire.write, self.told, reply),
                None => return Poll::Ready(Ok(())),
            }
        }
    }

    fn copy_data(&mut self, mut body: Bytes) -> Result<Frame, Error> {
        let mut from = Reader::new(&body);
        match from.u8()? {
            b'w' => {
                let (_start, end, clock) = (from.u64()?, from.u64()?, from.i64()?);
                self.sent_us = clock.saturating_add(POSTGRES_EPOCH_US);
                self.received = self.received.max(Lsn(end));
                // One a row: no second handle on the buffer, which would count it up and down. What was read above is there.
                body.advance(WAL_HEAD_LEN);
                Ok(Frame::Wal(body))
            }
            b'k' => {
                let (end, _clock, reply) = (Lsn(from.u64()?), from.u64()?, from.u8()?);
                from.done()?;
                self.received = self.received.max(end);
                let reply = if reply == 0 {
                    ReplyWanted::No
                } else {
                    ReplyWanted::Yes
                };
                if reply == ReplyWanted::Yes {
                    // Answered at once with what is known, so that a busy consumer does not look dead.
                    self.queue_feedback(self.told, ReplyWanted::No);
                }
                Ok(Frame::Keepalive { wal_end: end, reply })
            }
            kind => Err(Error::Unexpected {
                what: format!("frame {:?}", char::from(kind)),
            }),
        }
    }

    /// What a server says beside the stream. From PostgreSQL 18 on one that does not find the publication decodes nothing, says so
    /// here, and goes on: everything behind that would be missing, so it is an error as it is with those before.
    fn notice(&self, notice: ServerError) -> Result<(), Error> {
        // "skipped loading publication ...", in whatever language.
        if notice.is("55000") && notice.message.contains(&self.publication) {
            return Err(Error::PublicationMissing {
                publication: self.publication.clone(),
                source: notice,
            });
        }
        info!(%notice, "the server says while decoding");
        Ok(())
    }

    fn stream_error(&self, source: ServerError) -> Error {
        match source.code.as_str() {
            "42704" if source.message.contains(&self.publication) => Error::PublicationMissing {
                publication: self.publication.clone(),
                source,
            },
            // "no binary output function available for type ..."
            "42883" => Error::NoBinaryOutput(source),
            _ => Error::Server {
                during: "decoding",
                source,
            },
        }
    }
}

/// If CopyData holds a row that was inserted, updated or deleted: the end of WAL, the server's clock, and the row's table.
fn row_of(body: &[u8]) -> Option<(Lsn, i64, u32)> {
    let mut from = Reader::new(body);
    if from.u8() != Ok(b'w') {
        return None;
    }
    let (_start, end, clock) = (from.u64().ok()?, from.u64().ok()?, from.i64().ok()?);
    let is_row = matches!(from.u8(), Ok(b'I' | b'U' | b'D'));
    let table = from.u32().ok()?;
    is_row.then_some((Lsn(end), clock, table))
}

/// The next feedback: nothing goes back, nothing passes `received`, and what is flushed is also written.
fn bounded(told: Feedback, wanted: Feedback, received: Lsn) -> Feedback {
    let next = |told: Lsn, wanted: Lsn| told.max(wanted.min(received));
    let flush = next(told.flush, wanted.flush);
    Feedback {
        write: next(told.write, wanted.write).max(flush),
        flush,
        apply: next(told.apply, wanted.apply),
    }
}

/// Standby status update in CopyData.
fn put_feedback(out: &mut BytesMut, feedback: Feedback, reply: ReplyWanted) {
    out.put_u8(b'd');
    out.put_u32(38);
    out.put_u8(b'r');
    for lsn in [feedback.write, feedback.flush, feedback.apply] {
        out.put_u64(lsn.0);
    }
    // Only shown to people (`pg_stat_replication.reply_time`).
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    out.put_i64(i64::try_from(unix.as_micros()).unwrap_or(i64::MAX) - POSTGRES_EPOCH_US);
    out.put_u8(u8::from(reply == ReplyWanted::Yes));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    fn replication(stream: DuplexStream) -> Replication {
        Replication {
            wire: Wire::new(Box::new(stream)),
            publication: "p".to_owned(),
            received: Lsn::ZERO,
            sent_us: 0,
            told: Feedback::default(),
            to_tell: None,
        }
    }

    #[tokio::test]
    async fn a_server_that_skips_the_publication_ends_the_stream_and_other_notices_do_not() {
        let notice = |code: &str, text: &str| {
            let body = format!("SWARNING\0C{code}\0M{text}\0\0");
            message(b'N', body.as_bytes())
        };
        let (mut server, client) = duplex(1 << 16);
        let mut replication = replication(client);
        let told = [
            notice("01000", "publication \"p\" is pretty"),
            notice("55000", "something else"),
            keepalive(7, 0),
            notice("55000", "skipped loading publication \"p\""),
            keepalive(9, 0),
        ];
        server.write_all(&told.concat()).await.unwrap();
        replication.fill().await.unwrap();
        assert!(
            matches!(replication.buffered(), Ok(Some(Frame::Keepalive { wal_end, .. })) if wal_end == Lsn(7))
        );
        let error = replication.buffered().unwrap_err();
        assert!(matches!(&error, Error::PublicationMissing { publication, .. } if publication == "p"));
        assert!(error.is_for_good() && !error.is_transient());
        assert_eq!(replication.received(), Lsn(7));
    }

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    fn wal(end: u64, payload: &[u8]) -> Vec<u8> {
        let mut body = vec![b'w'];
        body.extend_from_slice(&end.to_be_bytes());
        body.extend_from_slice(&end.to_be_bytes());
        body.extend_from_slice(&[0; 8]);
        body.extend_from_slice(payload);
        message(b'd', &body)
    }

    fn keepalive(end: u64, reply: u8) -> Vec<u8> {
        let mut body = vec![b'k'];
        body.extend_from_slice(&end.to_be_bytes());
        body.extend_from_slice(&[0; 8]);
        body.push(reply);
        message(b'd', &body)
    }

    /// Write, flush, apply and reply flag of each status update in `bytes`.
    fn updates(bytes: &[u8]) -> Vec<(u64, u64, u64, u8)> {
        assert_eq!(bytes.len() % 39, 0, "{bytes:?}");
        let lsn = |chunk: &[u8], at: usize| u64::from_be_bytes(chunk[at..at + 8].try_into().unwrap());
        let parse = |chunk: &[u8]| {
            assert_eq!(&chunk[..6], b"d\0\0\0\x26r");
            (lsn(chunk, 6), lsn(chunk, 14), lsn(chunk, 22), chunk[38])
        };
        bytes.chunks(39).map(parse).collect()
    }

    #[tokio::test]
    async fn frames_are_cut_wherever_reads_fall() {
        let (mut server, client) = duplex(7);
        let mut replication = replication(client);
        let bytes = [
            wal(10, b"abc"),
            keepalive(20, 0),
            message(b'N', b"\0"),
            wal(15, b""),
        ]
        .concat();
        let writer = tokio::spawn(async move {
            server.write_all(&bytes).await.unwrap();
            server
        });
        let mut seen = Vec::new();
        while seen.len() < 3 {
            match replication.buffered().unwrap() {
                Some(frame) => seen.push(format!("{frame:?} {}", replication.received())),
                None => replication.fill().await.unwrap(),
            }
        }
        assert_eq!(
            seen,
            [
                "Wal(b\"abc\") 0/A",
                "Keepalive { wal_end: 0/14, reply: No } 0/14",
                "Wal(b\"\") 0/14"
            ]
        );
        drop(writer.await.unwrap());
        assert!(matches!(replication.fill().await, Err(Error::Closed)));
    }

    #[test]
    fn only_whole_rows_of_the_tables_named_are_passed_over() {
        let row =
            |end: u64, tag: u8, table: u32| wal(end, &[&[tag][..], &table.to_be_bytes(), b"N..."].concat());
        let mut replication = replication(duplex(1).1);
        let cut = row(70, b'I', 7);
        let stream = [
            row(10, b'I', 7),
            row(20, b'U', 7),
            row(30, b'D', 7),
            row(40, b'I', 8),
            row(50, b'D', 7),
            wal(60, b"C.........................."),
            cut[..cut.len() - 1].to_vec(),
        ];
        replication.wire.read.extend_from_slice(&stream.concat());
        let next = |replication: &mut Replication| {
            replication.pass_over_rows(|table| table == 7);
            match replication.buffered().unwrap() {
                Some(Frame::Wal(wal)) => Some((wal[0], replication.received().0)),
                frame => {
                    assert!(frame.is_none(), "{frame:?}");
                    None
                }
            }
        };
        assert_eq!(next(&mut replication), Some((b'I', 40)));
        assert_eq!(next(&mut replication), Some((b'C', 60)));
        assert_eq!(next(&mut replication), None);
        replication.wire.read.extend_from_slice(&cut[cut.len() - 1..]);
        replication.pass_over_rows(|table| table == 7);
        assert_eq!(replication.received(), Lsn(70));
        assert!(replication.wire.read.is_empty());
    }

    #[tokio::test]
    async fn of_reports_that_cannot_be_sent_the_last_goes() {
        let (mut server, client) = duplex(39);
        let mut replication = replication(client);
        replication.received = Lsn(1_000);
        for at in 1..=50 {
            let position = Feedback {
                write: Lsn(at),
                flush: Lsn(at),
                apply: Lsn(at),
            };
            let sent = replication.feedback(position, ReplyWanted::No);
            let _ = timeout(std::time::Duration::ZERO, sent).await;
        }
        let mut bytes = vec![0; 39];
        server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(updates(&bytes), [(1, 1, 1, 0)]);
        // The next was on its way when the pipe was full; all others were overtaken.
        let (_, second) = tokio::join!(
            async {
                replication
                    .feedback(Feedback::default(), ReplyWanted::Yes)
                    .await
                    .unwrap();
                drop(replication);
            },
            async {
                let mut bytes = Vec::new();
                server.read_to_end(&mut bytes).await.unwrap();
                bytes
            }
        );
        assert_eq!(updates(&second), [(2, 2, 2, 0), (50, 50, 50, 1)]);
    }

    #[tokio::test]
    async fn a_question_of_the_server_is_answered_while_reading() {
        let (mut server, client) = duplex(1_024);
        let mut replication = replication(client);
        server.write_all(&keepalive(70, 1)).await.unwrap();
        replication.fill().await.unwrap();
        let frame = replication.buffered().unwrap();
        assert!(
            matches!(
                frame,
                Some(Frame::Keepalive {
                    reply: ReplyWanted::Yes,
                    ..
                })
            ),
            "{frame:?}"
        );
        server.write_all(&keepalive(71, 0)).await.unwrap();
        replication.fill().await.unwrap();
        drop(replication);
        let mut bytes = Vec::new();
        server.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(updates(&bytes), [(0, 0, 0, 0)]);
    }

    proptest! {
        #[test]
        fn feedback_only_grows_within_what_was_received(
            steps in proptest::collection::vec((0u64..9, 0u64..9, 0u64..9, 0u64..9), 1..20)
        ) {
            let (mut told, mut received) = (Feedback::default(), Lsn::ZERO);
            for (write, flush, apply, more) in steps {
                received = received.max(Lsn(more));
                let wanted = Feedback { write: Lsn(write), flush: Lsn(flush), apply: Lsn(apply) };
                let next = bounded(told, wanted, received);
                prop_assert!(next.write >= told.write && next.flush >= told.flush && next.apply >= told.apply);
                prop_assert!(next.write <= received && next.flush <= next.write && next.apply <= received);
                prop_assert!(next.flush >= wanted.flush.min(received) && next.apply >= wanted.apply.min(received));
                told = next;
            }
        }

        #[test]
        fn any_bytes_of_a_server_give_frames_or_an_error(bytes: Vec<u8>, tag in "[dEcNZx]", kind: u8) {
            for bytes in [bytes.clone(), message(tag.as_bytes()[0], &[&[kind], &bytes[..]].concat())] {
                let mut replication = replication(duplex(1).1);
                replication.wire.read.extend_from_slice(&bytes);
                while let Ok(Some(_)) = replication.buffered() {}
            }
            let _ = text_row(&bytes);
            let _ = ServerError::parse(&bytes);
        }
    }

    #[test]
    fn an_error_response_reads_as_the_server_meant_it() {
        let error = ServerError::parse(b"SERROR\0C42704\0Mno slot\0Dreally\0Hmake one\0\0");
        assert_eq!(
            error.to_string(),
            "no slot (SQLSTATE 42704); really; hint: make one"
        );
    }

    #[test]
    fn names_are_quoted_for_the_replication_grammar() {
        assert_eq!(quoted("a\"b", '"'), "\"a\"\"b\"");
        assert_eq!(quoted(&quoted("o'x", '"'), '\''), "'\"o''x\"'");
    }
}
