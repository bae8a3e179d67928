//! TCP between two daemons that a test may cut, stall and mend. Needs no privileges.
//!
//! One proxy per direction of dialling: `a`'s configuration names the proxy as the address of `b`. Proxies
//! have a runtime of their own, so that a busy test does not slow them.

use std::net::SocketAddr;
use std::sync::OnceLock;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// What happens to connections and bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// All goes through.
    Pass,
    /// Open connections are reset, new ones closed at once: a host that answers, with nobody there.
    Cut,
    /// Connections stay open and nothing moves, as when packets are dropped. What was on its way arrives
    /// after mending, as TCP would send it again.
    Stall,
    /// As `Stall`, but only for bytes towards the daemon that was dialled.
    StallRequests,
    /// As `Stall`, but only for bytes towards the daemon that dialled.
    StallAnswers,
    /// Every piece of at most 64 KiB is held back for so many milliseconds, one after the other: late and narrow.
    Slow(u16),
    /// So many of a hundred pieces of 1400 bytes are lost and sent again, as TCP does: after 200 ms, and after twice as long each time that
    /// one is lost again, while all behind it waits.
    Lossy(u8),
}

/// What TCP waits at least before it sends again what was not acknowledged, milliseconds (Linux).
const RETRANSMIT_MS: u64 = 200;

/// After an error of the listener: too many open files, a connection that was gone again.
const ACCEPT_AGAIN: std::time::Duration = std::time::Duration::from_millis(20);

/// Bytes of a packet.
const PACKET: usize = 1_400;

/// How long TCP would take to get so many bytes through, milliseconds, beside what the line takes.
fn retransmissions_ms(percent: u8, bytes: usize) -> u64 {
    let lost = || rand::random_range(0..100) < percent;
    // Packets that are lost together are sent again together.
    let mut left = (0..bytes.div_ceil(PACKET)).filter(|_| lost()).count();
    let (mut waited_ms, mut wait_ms) = (0, RETRANSMIT_MS);
    while left > 0 && waited_ms < 60_000 {
        (waited_ms, wait_ms) = (waited_ms + wait_ms, wait_ms * 2);
        left = (0..left).filter(|_| lost()).count();
    }
    waited_ms
}

impl Mode {
    /// What a line that flaps goes through, in any order.
    pub const FLAPPING: [Self; 5] = [
        Self::Cut,
        Self::Stall,
        Self::StallRequests,
        Self::StallAnswers,
        Self::Pass,
    ];
}

/// What a line does, and how often it was cut: a connection of before a cut ends, however soon the line is mended.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Line {
    mode: Mode,
    cuts: u64,
}

/// A proxy to one address.
pub struct Proxy {
    address: SocketAddr,
    line: watch::Sender<Line>,
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("proxy")
            .enable_all()
            .build()
            .expect("start the proxies' runtime")
    })
}

impl Proxy {
    /// Listens on a port of its own and forwards to `target`.
    pub fn to(target: SocketAddr) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind a proxy");
        listener
            .set_nonblocking(true)
            .expect("make the listener non-blocking");
        let address = listener.local_addr().expect("a bound address");
        let (line, watched) = watch::channel(Line {
            mode: Mode::Pass,
            cuts: 0,
        });
        runtime().spawn(async move {
            let listener = TcpListener::from_std(listener).expect("adopt the listener");
            accept(listener, target, watched).await;
        });
        Self { address, line }
    }

    /// Where to dial it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what happens, for open connections too: what is sent after a cut does not get through, however late the proxy's thread is.
    pub fn set(&self, mode: Mode) {
        self.line.send_modify(|line| {
            line.mode = mode;
            line.cuts += u64::from(mode == Mode::Cut);
        });
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, mut line: watch::Receiver<Line>) {
    loop {
        tokio::select! {
            // The proxy was dropped: stop listening.
            gone = line.changed() => if gone.is_err() { return },
            accepted = listener.accept() => match accepted {
                Ok((dialled_by, _)) => {
                    let now = *line.borrow();
                    if now.mode != Mode::Cut {
                        tokio::spawn(forward(dialled_by, target, line.clone(), now.cuts));
                    }
                }
                // It passes: a line that ended here would be cut to the end of the test.
                Err(_) => tokio::time::sleep(ACCEPT_AGAIN).await,
            }
        }
    }
}

/// `cuts` is how often the line had been cut when the connection was taken.
async fn forward(dialled_by: TcpStream, target: SocketAddr, mut line: watch::Receiver<Line>, cuts: u64) {
    let dialled = tokio::select! {
        () = cut(line.clone(), cuts) => return reset(&dialled_by),
        connected = connect(target, &mut line) => match connected {
            Some(dialled) => dialled,
            None => return reset(&dialled_by),
        },
    };
    let _ = (dialled_by.set_nodelay(true), dialled.set_nodelay(true));
    let (mut from_dialler, mut to_dialler) = dialled_by.into_split();
    let (mut from_dialled, mut to_dialled) = dialled.into_split();
    let was_cut = tokio::select! {
        () = cut(line.clone(), cuts) => true,
        () = async {
            tokio::join!(
                pump(&mut from_dialler, &mut to_dialled, (&line, cuts), &[Mode::Stall, Mode::StallRequests]),
                pump(&mut from_dialled, &mut to_dialler, (&line, cuts), &[Mode::Stall, Mode::StallAnswers]),
            );
        } => false,
    };
    if was_cut {
        // A plain close would deliver a clean end of stream; a cut line gives none.
        reset(from_dialler.as_ref());
        reset(from_dialled.as_ref());
    }
}

async fn connect(target: SocketAddr, line: &mut watch::Receiver<Line>) -> Option<TcpStream> {
    line.wait_for(|line| line.mode != Mode::Stall).await.ok()?;
    TcpStream::connect(target).await.ok()
}

fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

/// Returns when the line is cut once more or the proxy is gone.
async fn cut(mut line: watch::Receiver<Line>, cuts: u64) {
    let _ = line.wait_for(|line| line.cuts != cuts).await;
}

async fn pump(
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    (line, cuts): (&watch::Receiver<Line>, u64),
    stalls: &[Mode],
) {
    let mut line = line.clone();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let now = *line.borrow();
        let slow = match now.mode {
            Mode::Slow(ms) => u64::from(ms),
            Mode::Lossy(percent) => retransmissions_ms(percent, read),
            _ => 0,
        };
        if slow > 0 {
            // A line that is mended waits no longer.
            let mended = line.wait_for(|&line| line != now);
            let _ = tokio::time::timeout(std::time::Duration::from_millis(slow), mended).await;
        }
        let cuts_now = match line.wait_for(|line| !stalls.contains(&line.mode)).await {
            Ok(line) => line.cuts,
            Err(_) => break,
        };
        if cuts_now != cuts {
            // It was cut before this was written: whoever waits for that resets the connection.
            return std::future::pending().await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
