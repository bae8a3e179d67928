//! Every bound and interval of the links, in one place.

use std::time::Duration;

/// The oldest version of the protocol of `link.proto` that this program speaks.
pub const PROTOCOL_OLDEST: u32 = 1;
/// The newest one. Two programs speak the newest that both know, so one that raises this goes on speaking to those that are not
/// upgraded yet, until it raises [`PROTOCOL_OLDEST`], too.
pub const PROTOCOL_NEWEST: u32 = 1;

/// A frame unpacks to at most this, bytes.
pub const FRAME_RAW_BYTES_MAX: u32 = crate::journal::RAW_LEN_MAX;
/// A frame's packed payload is at most this, bytes: LZ4 makes incompressible input a little longer.
pub const FRAME_PAYLOAD_BYTES_MAX: u64 = FRAME_RAW_BYTES_MAX as u64 + (8 << 20);
/// A server's message is at most this, bytes: one largest frame and its surroundings.
pub const RESPONSE_BYTES_MAX: usize = FRAME_RAW_BYTES_MAX as usize + (16 << 20);
/// A client's message is at most this, bytes: vectors of the largest cluster. A stranger cannot make us hold more.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;
/// A message is sent once it holds this many bytes of payload.
pub(super) const BATCH_BYTES: usize = 256 << 10;
/// A frame that would make a message larger than this goes into the next one, bytes.
pub(super) const BATCH_BYTES_MAX: usize = 1 << 20;
/// What a frame counts in a batch and against the credit beside its payload, bytes.
pub(super) const FRAME_OVERHEAD_BYTES: usize = 64;
/// Most bytes of payload that a server sends beyond what the client says it has consumed.
pub const CREDIT_BYTES: u64 = 4 << 20;
/// The client reports what it consumed at least every so many bytes.
pub(super) const CONSUMED_STEP_BYTES: u64 = 512 << 10;

/// HTTP/2 window of one stream, bytes. Above the credit, so that the credit is what bounds.
pub(super) const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// HTTP/2 window of one connection, bytes.
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// HTTP/2 pings on an idle connection.
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// A connection whose ping is not answered in this time is closed.
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to connect to one address, and to get through TLS.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time from the request to the peer's welcome, and for the peer to say its hello.
pub(super) const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A stream without any message for this long is torn down.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The server sends something at least this often, the client pings this often.
pub(super) const PULSE: Duration = Duration::from_secs(1);
/// How often a client looks after what it wants and what it has to report.
pub(super) const CLIENT_TICK: Duration = Duration::from_millis(200);
/// Shortest time between two reports of positions that changed, where a commit at the peer waits for them.
pub(super) const REPORT_INTERVAL_MIN: Duration = Duration::from_millis(2);
/// The same where none does: each wakes the peer.
pub(super) const REPORT_INTERVAL: Duration = Duration::from_millis(50);
/// First and longest delay before connecting again, before jitter.
pub(super) const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// See [`BACKOFF_MIN`].
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A refused peer tries again this often.
pub(super) const REFUSED_RETRY: Duration = Duration::from_secs(5);
/// An origin that a peer cannot serve is asked for again after this.
pub(super) const UNAVAILABLE_RETRY: Duration = Duration::from_secs(5);
/// A direct link that is down this long makes other peers relay its origin.
pub const RELAY_AFTER: Duration = Duration::from_millis(1500);
/// So does one that is open and over which nothing has come for this long: three pulses. TCP says nothing of packets that are dropped.
pub const RELAY_AFTER_SILENCE: Duration = Duration::from_secs(3);
/// Time for streams to end by themselves at shutdown.
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// Most events kept for a daemon that does not read them; room is left for the fatal ones.
pub(super) const EVENTS_MAX: usize = 256;
/// Room in the event queue that only fatal events may use.
pub(super) const EVENTS_RESERVED: usize = 16;
/// Most streams on one connection.
pub(super) const CONNECTION_STREAMS_MAX: u32 = 16;
/// Most connections on the port, strangers included.
pub(super) const CONNECTIONS_MAX: usize = 512;
