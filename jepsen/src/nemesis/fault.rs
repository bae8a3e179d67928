//! Faults, by name.
//!
//! Not here: when they happen (`super`), how they are done and undone (`super::scene`)

use std::fmt;

use serde::{Deserialize, Serialize};

/// A fault. Nodes count from 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// No connection between two groups; reset, or silent.
    Cut {
        /// One group.
        a: Vec<usize>,
        /// The other.
        b: Vec<usize>,
        /// Silent: nothing is refused, nothing arrives.
        silent: bool,
    },
    /// Nothing goes from one node to another; the other way all does.
    OneWay {
        /// From.
        from: usize,
        /// To.
        to: usize,
    },
    /// One node takes nothing from another, which takes what that one has and says so to it: the line that one dials is silent.
    Deaf {
        /// Who takes nothing.
        node: usize,
        /// From whom.
        to: usize,
    },
    /// Every line breaks and mends at random.
    Flap,
    /// Every line is late and narrow.
    Slow {
        /// Milliseconds a piece.
        ms: u16,
    },
    /// Packets are lost, and sent again.
    Lossy {
        /// Of the lines of this node; of all if none.
        node: Option<usize>,
        /// So many of a hundred; 100 is a line that drops all.
        percent: u8,
    },
    /// SIGKILL to a daemon.
    KillDaemon(usize),
    /// SIGKILL to a server, the postmaster and all backends at once.
    KillServer(usize),
    /// To both.
    KillNode(usize),
    /// To all daemons and servers.
    KillAll,
    /// SIGSTOP to a daemon.
    PauseDaemon(usize),
    /// SIGSTOP to a server, the postmaster and all backends.
    PauseServer(usize),
    /// SIGSTOP to the backend that sends the daemon its WAL.
    PauseWalsender(usize),
    /// To both, as a machine that stands still.
    PauseNode(usize),
    /// Wall clock of a node's server and daemon.
    Skew {
        /// Whose.
        node: usize,
        /// By so much, seconds.
        seconds: i64,
    },
    /// Wall clock of a node jumps to and fro.
    Strobe {
        /// Whose.
        node: usize,
        /// By so much, seconds.
        seconds: i64,
    },
    /// Somebody locks the workload's first table.
    Lock(usize),
    /// Daemons, then servers, are stopped and started in turn.
    Roll,
    /// A synchronous physical standby of the first node does not answer.
    StandbyAway,
    /// A daemon's machine loses power: what it did not sync is gone. Its server's disk is another.
    PowerLoss(usize),
    /// A server's machine loses power: what it did not sync is gone. Its daemon runs elsewhere, and goes on.
    ServerPowerLoss(usize),
    /// A machine with both loses power.
    MachinePowerLoss(usize),
    /// A disk is full to the last byte.
    FullDisk(usize, Part),
    /// A disk takes no writes: whoever writes waits.
    HungDisk(usize, Part),
    /// `fsync` and `fdatasync` answer EIO.
    FsyncFails(usize, Part),
    /// `fsync` and `fdatasync` take their time.
    FsyncSlow(usize, Part),
    /// Somebody drops the daemon's slot. The node cannot come back.
    DropSlot(usize),
    /// The node whose slot was dropped comes back with the rows that it has (`anabranch heal`).
    Heal(usize),
    /// Server and daemon die, and nobody starts them again.
    Lose(usize),
    /// A member that stays is told that this one is lost (`anabranch node drop`).
    Drop(usize),
}

/// Whose disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The server's data folder.
    Server,
    /// The daemon's folder.
    Daemon,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Server => "server",
            Self::Daemon => "daemon",
        })
    }
}

impl Fault {
    /// The node and part that may end by themselves while this lasts: a server that cannot write its WAL, and a daemon whose
    /// fsync failed, have to.
    pub fn excuses(&self) -> Option<(usize, Part)> {
        match self {
            Self::FullDisk(node, Part::Server)
            | Self::HungDisk(node, Part::Server)
            | Self::FsyncFails(node, Part::Server) => Some((*node, Part::Server)),
            Self::FsyncFails(node, Part::Daemon) => Some((*node, Part::Daemon)),
            Self::DropSlot(node) => Some((*node, Part::Daemon)),
            _ => None,
        }
    }

    /// The node and part that not only may end while this lasts, but has to, as soon as it has anything to sync: a daemon that goes on after
    /// an fsync that failed says of what it lost that it is durable.
    pub fn must_end(&self) -> Option<(usize, Part)> {
        match self {
            Self::FsyncFails(node, Part::Daemon) => Some((*node, Part::Daemon)),
            _ => None,
        }
    }

    /// Is it done to the lines between nodes?
    pub fn is_of_lines(&self) -> bool {
        matches!(
            self,
            Self::Cut { .. }
                | Self::OneWay { .. }
                | Self::Deaf { .. }
                | Self::Flap
                | Self::Slow { .. }
                | Self::Lossy { .. }
        )
    }

    /// Does no line between so many nodes work while this lasts?
    pub fn cuts_all(&self, nodes: usize) -> bool {
        match self {
            Self::Cut { a, b, .. } => {
                let cut = |from: usize, to: usize| {
                    (a.contains(&from) && b.contains(&to)) || (b.contains(&from) && a.contains(&to))
                };
                (0..nodes).all(|from| (0..nodes).all(|to| from == to || cut(from, to)))
            }
            // Of two each line has one direction that is silent.
            Self::OneWay { .. } => nodes < 3,
            _ => false,
        }
    }

    /// What kind of it this is among so many nodes, whichever they are: to count what was tried.
    pub fn variant(&self, nodes: usize) -> String {
        let text = match self {
            Self::Cut { a, b, silent } => {
                let how = if *silent { "silent" } else { "cut" };
                let shape = match a.len().min(b.len()) {
                    _ if self.cuts_all(nodes) => "all alone",
                    _ if a.len() + b.len() < nodes => "a bridge",
                    1 => "one off",
                    _ => "halves",
                };
                return format!("lines {how}: {shape}");
            }
            Self::Slow { .. } => return "lines slow".to_owned(),
            other => other.to_string(),
        };
        let is_node = |word: &str| {
            word.strip_prefix('n')
                .is_some_and(|number| number.parse::<usize>().is_ok())
        };
        let words = text
            .split(' ')
            .map(|word| if is_node(word) { "a node" } else { word });
        words.collect::<Vec<_>>().join(" ")
    }

    /// The node that is lost for good by this.
    pub fn loses(&self) -> Option<usize> {
        match self {
            Self::DropSlot(node) | Self::Lose(node) => Some(*node),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |nodes: &[usize]| {
            let names: Vec<String> = nodes.iter().map(|node| format!("n{}", node + 1)).collect();
            names.join(" ")
        };
        match self {
            Self::Cut { a, b, silent } => {
                let how = if *silent { "silent" } else { "cut" };
                write!(f, "{how} between {} and {}", names(a), names(b))
            }
            Self::OneWay { from, to } => write!(f, "nothing from n{} to n{}", from + 1, to + 1),
            Self::Deaf { node, to } => write!(f, "n{} deaf to n{}", node + 1, to + 1),
            Self::Flap => write!(f, "lines flap"),
            Self::Slow { ms } => write!(f, "lines slow by {ms} ms"),
            Self::Lossy { node: None, percent } => write!(f, "all lines lose {percent}% of packets"),
            Self::Lossy {
                node: Some(node),
                percent,
            } => write!(f, "lines of n{} lose {percent}% of packets", node + 1),
            Self::KillDaemon(node) => write!(f, "kill -9 of the daemon of n{}", node + 1),
            Self::KillServer(node) => write!(f, "kill -9 of the server of n{}", node + 1),
            Self::KillNode(node) => write!(f, "kill -9 of server and daemon of n{}", node + 1),
            Self::KillAll => write!(f, "kill -9 of all servers and daemons"),
            Self::PauseDaemon(node) => write!(f, "daemon of n{} stopped", node + 1),
            Self::PauseServer(node) => write!(f, "server of n{} stopped", node + 1),
            Self::PauseWalsender(node) => write!(f, "walsender of n{} stopped", node + 1),
            Self::PauseNode(node) => write!(f, "server and daemon of n{} stopped", node + 1),
            Self::Skew { node, seconds } => write!(f, "clock of n{} off by {seconds} s", node + 1),
            Self::Strobe { node, seconds } => write!(f, "clock of n{} strobes by {seconds} s", node + 1),
            Self::Lock(node) => write!(f, "a table of n{} is locked", node + 1),
            Self::Roll => write!(f, "rolling restart"),
            Self::PowerLoss(node) => write!(f, "power loss of the daemon of n{}", node + 1),
            Self::ServerPowerLoss(node) => write!(f, "power loss of the server of n{}", node + 1),
            Self::MachinePowerLoss(node) => write!(f, "power loss of server and daemon of n{}", node + 1),
            Self::StandbyAway => write!(f, "synchronous standby of n1 away"),
            Self::FullDisk(node, part) => write!(f, "disk of the {part} of n{} full", node + 1),
            Self::HungDisk(node, part) => write!(f, "disk of the {part} of n{} hangs", node + 1),
            Self::FsyncFails(node, part) => write!(f, "fsync fails for the {part} of n{}", node + 1),
            Self::FsyncSlow(node, part) => write!(f, "fsync is slow for the {part} of n{}", node + 1),
            Self::DropSlot(node) => write!(f, "slot of n{} dropped by hand", node + 1),
            Self::Heal(node) => write!(f, "n{} healed", node + 1),
            Self::Lose(node) => write!(f, "n{} lost for good", node + 1),
            Self::Drop(node) => write!(f, "n{} dropped by the others", node + 1),
        }
    }
}
