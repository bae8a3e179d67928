//! A network in which each node is a machine: a namespace of its own with one address, joined by a veth pair to a bridge.
//!
//! The bridge is in the network namespace that this process is in, which should be one that was made for it: then nobody else's network is
//! touched, and all of it vanishes with the process. Whoever may make a namespace may make all this in it, root or not.
//! A namespace lives as long as its holder, a process that does nothing else, so what runs in it may be killed and started again.
//!
//! Not here: what becomes of packets on their way (`jepsen/src/nemesis/bridge.rs`)

use std::fs::File;
use std::io::{BufRead, BufReader, Error, Result, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{mortal, spawn};

/// What all veth pairs end at.
const BRIDGE: &str = "nodes";

/// One node's place.
#[derive(Clone, Debug)]
pub struct Seat {
    /// Its namespace.
    namespace: PathBuf,
    /// Its only address beside loopback.
    address: Ipv4Addr,
    /// The bridge's end of its veth pair.
    interface: String,
}

impl Seat {
    /// The node's address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The interface by which its packets enter the bridge.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// A program that will run here. It takes the place of the one that brings it here: their process is one.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace.display()));
        command.arg(program);
        command
    }

    /// Does something here, in a thread of its own. A socket stays where it was made.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn inside<T: Send>(&self, doing: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = File::open(&self.namespace)?;
        let here = || -> Result<T> {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(doing())
        };
        std::thread::scope(|scope| {
            let done = scope.spawn(here).join();
            done.unwrap_or_else(|_| Err(Error::other("what was done in a namespace panicked")))
        })
    }
}

/// The seats, the bridge between them, and who holds the namespaces. There is one at a time. It ends when it is dropped.
pub struct Network {
    seats: Vec<Seat>,
    holders: Vec<Child>,
}

impl Network {
    /// One for so many nodes. Everybody reaches everybody.
    ///
    /// # Errors
    /// When this process may not, or `unshare`, `nsenter` or `ip` is not here.
    pub fn start(nodes: usize) -> Result<Self> {
        // What was made is removed, also where not all of it could be.
        let mut network = Self {
            seats: Vec::new(),
            holders: Vec::new(),
        };
        ip(
            None,
            &[
                &format!("link add {BRIDGE} type bridge"),
                &format!("link set {BRIDGE} up"),
            ],
        )?;
        for number in 1..=nodes {
            network.add(u8::try_from(number).map_err(Error::other)?)?;
        }
        Ok(network)
    }

    fn add(&mut self, number: u8) -> Result<()> {
        let mut command = mortal(Path::new("unshare"), "KILL", false);
        command.args(["--net", "sh", "-c", "echo made && exec sleep infinity"]);
        command.stdout(Stdio::piped());
        let mut holder = spawn(command)?;
        let (pid, said) = (holder.id(), holder.stdout.take());
        self.holders.push(holder);
        let mut line = String::new();
        if let Some(said) = said {
            BufReader::new(said).read_line(&mut line)?;
        }
        if line.is_empty() {
            return Err(Error::other("`unshare --net` made no namespace"));
        }
        let seat = Seat {
            namespace: PathBuf::from(format!("/proc/{pid}/ns/net")),
            address: Ipv4Addr::new(10, 77, 0, number),
            interface: format!("n{number}"),
        };
        let Seat {
            address, interface, ..
        } = &seat;
        let pair = format!("link add {interface} type veth peer name eth0 netns {pid}");
        let joined = format!("link set {interface} master {BRIDGE} up");
        ip(None, &[&pair, &joined])?;
        let addressed = format!("addr add {address}/24 dev eth0");
        ip(Some(&seat), &["link set lo up", &addressed, "link set eth0 up"])?;
        self.seats.push(seat);
        Ok(())
    }

    /// The nodes' places, in their order.
    pub fn seats(&self) -> &[Seat] {
        &self.seats
    }
}

/// Has `ip` do it, here or at a seat.
fn ip(seat: Option<&Seat>, lines: &[&str]) -> Result<()> {
    let program = Path::new("ip");
    let mut command = seat.map_or_else(|| Command::new(program), |seat| seat.command(program));
    let mut ip = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut to) = ip.stdin.take() {
        to.write_all((lines.join("\n") + "\n").as_bytes())?;
    }
    let output = ip.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::other(format!(
        "ip: {}",
        said.lines().next().unwrap_or_default()
    )))
}

impl Drop for Network {
    fn drop(&mut self) {
        // One by one: what is not there keeps nothing else. Both ends of a pair go together, and at once, where those of a namespace that
        // ends go some time later.
        for seat in &self.seats {
            let _ = ip(None, &[&format!("link del {}", seat.interface)]);
        }
        let _ = ip(None, &[&format!("link del {BRIDGE}")]);
        for holder in &mut self.holders {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}
