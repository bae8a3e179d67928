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

/// A proxy to one address.
pub struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
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
        let (mode, watched) = watch::channel(Mode::Pass);
        runtime().spawn(async move {
            let listener = TcpListener::from_std(listener).expect("adopt the listener");
            accept(listener, target, watched).await;
        });
        Self { address, mode }
    }

    /// Where to dial it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what happens, for open connections too.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    loop {
        tokio::select! {
            // The proxy was dropped: stop listening.
            gone = mode.changed() => if gone.is_err() { return },
            accepted = listener.accept() => {
                let Ok((dialled_by, _)) = accepted else { return };
                if *mode.borrow() != Mode::Cut {
                    tokio::spawn(forward(dialled_by, target, mode.clone()));
                }
            }
        }
    }
}

async fn forward(dialled_by: TcpStream, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    let dialled = tokio::select! {
        () = cut(mode.clone()) => return reset(&dialled_by),
        connected = connect(target, &mut mode) => match connected {
            Some(dialled) => dialled,
            None => return reset(&dialled_by),
        },
    };
    let _ = (dialled_by.set_nodelay(true), dialled.set_nodelay(true));
    let (mut from_dialler, mut to_dialler) = dialled_by.into_split();
    let (mut from_dialled, mut to_dialled) = dialled.into_split();
    let was_cut = tokio::select! {
        () = cut(mode.clone()) => true,
        pumped = async {
            tokio::try_join!(
                pump(&mut from_dialler, &mut to_dialled, &mode, &[Mode::Stall, Mode::StallRequests]),
                pump(&mut from_dialled, &mut to_dialler, &mode, &[Mode::Stall, Mode::StallAnswers]),
            )
        } => pumped.is_err(),
    };
    if was_cut {
        // A plain close would deliver a clean end of stream; a cut line gives none.
        reset(from_dialler.as_ref());
        reset(from_dialled.as_ref());
    }
}

async fn connect(target: SocketAddr, mode: &mut watch::Receiver<Mode>) -> Option<TcpStream> {
    mode.wait_for(|&mode| mode != Mode::Stall).await.ok()?;
    TcpStream::connect(target).await.ok()
}

fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

/// Returns when the line is cut or the proxy is gone.
async fn cut(mut mode: watch::Receiver<Mode>) {
    let _ = mode.wait_for(|&mode| mode == Mode::Cut).await;
}

/// The line was cut while bytes were on their way.
struct WasCut;

async fn pump(
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    mode: &watch::Receiver<Mode>,
    stalls: &[Mode],
) -> Result<(), WasCut> {
    let mut mode = mode.clone();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let now = *mode.borrow();
        let slow = match now {
            Mode::Slow(ms) => u64::from(ms),
            Mode::Lossy(percent) => retransmissions_ms(percent, read),
            _ => 0,
        };
        if slow > 0 {
            // A line that is mended waits no longer.
            let mended = mode.wait_for(|&mode| mode != now);
            let _ = tokio::time::timeout(std::time::Duration::from_millis(slow), mended).await;
        }
        let now = mode.wait_for(|mode| !stalls.contains(mode)).await.map(|now| *now);
        match now {
            // Whoever has cut the line writes at once, and these may be the bytes of that: nobody gets them, also if the connection has
            // not been reset yet.
            Ok(Mode::Cut) => return Err(WasCut),
            Ok(_) => {}
            Err(_) => break,
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
    Ok(())
}
