//! The nemesis: faults, when they happen, and how each is undone.
//!
//! In:   a seed, a name, a length        Out: a plan; faults, while it is carried out
//! Invariants: 1. the plan follows from seed, name, length and number of nodes alone; 2. whatever was begun is undone;
//!        3. what cannot be done here is told as `impossible` and never counts as survived
//! Not here: what follows from it (`crate::checker`)

use std::fmt;
use std::time::Duration;

use anabranch_tests::cluster::Cluster;
use anabranch_tests::process::{self, Signal};
use anabranch_tests::proxy::Mode;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc::UnboundedSender;

use crate::clock::Clock;
use crate::history::{Event, Fault as Told};

/// A fault. Nodes count from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Every line breaks and mends at random.
    Flap,
    /// Every line is late and narrow.
    Slow {
        /// Milliseconds a piece.
        ms: u16,
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
            Self::Flap => write!(f, "lines flap"),
            Self::Slow { ms } => write!(f, "lines slow by {ms} ms"),
            Self::KillDaemon(node) => write!(f, "kill -9 of the daemon of n{}", node + 1),
            Self::KillServer(node) => write!(f, "kill -9 of the server of n{}", node + 1),
            Self::KillNode(node) => write!(f, "kill -9 of server and daemon of n{}", node + 1),
            Self::KillAll => write!(f, "kill -9 of all servers and daemons"),
            Self::PauseDaemon(node) => write!(f, "daemon of n{} stopped", node + 1),
            Self::PauseServer(node) => write!(f, "server of n{} stopped", node + 1),
            Self::PauseWalsender(node) => write!(f, "walsender of n{} stopped", node + 1),
            Self::Skew { node, seconds } => write!(f, "clock of n{} off by {seconds} s", node + 1),
            Self::Strobe { node, seconds } => write!(f, "clock of n{} strobes by {seconds} s", node + 1),
            Self::Lock(node) => write!(f, "a table of n{} is locked", node + 1),
            Self::Roll => write!(f, "rolling restart"),
            Self::PowerLoss(node) => write!(f, "power loss of the daemon of n{}", node + 1),
            Self::StandbyAway => write!(f, "synchronous standby of n1 away"),
        }
    }
}

/// Faults that happen together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Since the last ones ended.
    pub after: Duration,
    /// They begin in this order and end in the other.
    pub faults: Vec<Fault>,
    /// How long they last.
    pub length: Duration,
}

/// A nemesis.
#[derive(Debug, Clone, Copy)]
pub struct Nemesis {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does.
    pub purpose: &'static str,
}

/// All of them.
pub const ALL: &[Nemesis] = &[
    Nemesis {
        name: "none",
        purpose: "nothing: what breaks under it breaks by itself",
    },
    Nemesis {
        name: "partition",
        purpose: "one node off, halves, a bridge, one direction, all alone, flapping; reset and silent",
    },
    Nemesis {
        name: "kill",
        purpose: "kill -9 of daemons, whole servers, both, all",
    },
    Nemesis {
        name: "pause",
        purpose: "SIGSTOP of daemons, whole servers, single walsenders",
    },
    Nemesis {
        name: "clock",
        purpose: "clocks ahead, behind, strobing, years off (libfaketime, while they run)",
    },
    Nemesis {
        name: "slow",
        purpose: "late and narrow lines",
    },
    Nemesis {
        name: "lock",
        purpose: "somebody sits on a lock",
    },
    Nemesis {
        name: "roll",
        purpose: "rolling restarts",
    },
    Nemesis {
        name: "standby",
        purpose: "a synchronous physical standby of n1 that goes away and comes back",
    },
    Nemesis {
        name: "power",
        purpose: "daemons lose power, and with it what they did not sync",
    },
    Nemesis {
        name: "all",
        purpose: "partitions, kills, pauses, clocks, slowness and locks, two at once",
    },
];

/// Does the nemesis move clocks?
pub fn moves_clocks(name: &str) -> bool {
    matches!(name, "clock" | "all" | "smoke")
}

/// Does the nemesis know of a standby?
pub fn wants_standby(name: &str) -> bool {
    name == "standby"
}

/// Does the nemesis need daemons' folders on disks of their own?
pub fn wants_disks(name: &str) -> bool {
    name == "power"
}

/// Why a nemesis cannot run on this machine; `None` when it can.
pub fn impossible(name: &str) -> Option<String> {
    let faketime = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
    if moves_clocks(name) && !std::path::Path::new(faketime).exists() {
        return Some(format!("{faketime} is not there; scripts/setup.sh installs it"));
    }
    if wants_disks(name) {
        return crate::power::impossible();
    }
    None
}

/// What happens when.
pub fn plan(name: &str, nodes: usize, seed: u64, length: Duration) -> Vec<Planned> {
    let mut random = StdRng::seed_from_u64(seed ^ 0x6e65_6d65_7369_7321);
    let mut plan = Vec::new();
    let mut spent = Duration::ZERO;
    if name == "none" || nodes < 2 {
        return plan;
    }
    loop {
        let after = Duration::from_millis(random.random_range(500..2_500));
        let lasts = Duration::from_millis(random.random_range(1_500..6_000));
        let faults = choose(name, nodes, &mut random, plan.len());
        spent += after + lasts;
        // The last one leaves some quiet before the end.
        if spent > length {
            break;
        }
        plan.push(Planned {
            after,
            faults,
            length: lasts,
        });
    }
    plan
}

fn choose(name: &str, nodes: usize, random: &mut StdRng, number: usize) -> Vec<Fault> {
    let kind = match name {
        "all" => {
            let kinds = ["partition", "kill", "pause", "clock", "slow", "lock"];
            let two: Vec<&str> = kinds.choose_multiple(random, 2).copied().collect();
            let mut faults: Vec<Fault> = two.iter().map(|kind| one(kind, nodes, random)).collect();
            // A stopped process cannot be killed and started again under its own feet.
            if two.contains(&"kill") && two.contains(&"pause") {
                faults.truncate(1);
            }
            return faults;
        }
        // The short run of CI: every kind, in turn.
        "smoke" => ["partition", "kill", "clock"][number % 3],
        name => name,
    };
    vec![one(kind, nodes, random)]
}

fn one(kind: &str, nodes: usize, random: &mut StdRng) -> Fault {
    let node = random.random_range(0..nodes);
    let other = (node + random.random_range(1..nodes)) % nodes;
    let others: Vec<usize> = (0..nodes).filter(|&one| one != node).collect();
    let silent = random.random_range(0..2) == 0;
    match kind {
        "partition" => match random.random_range(0..6) {
            0 => Fault::OneWay {
                from: node,
                to: other,
            },
            1 => Fault::Flap,
            2 => Fault::Cut {
                a: (0..nodes).collect(),
                b: (0..nodes).collect(),
                silent,
            },
            // Two that do not reach each other: the others are the bridge.
            3 => Fault::Cut {
                a: vec![node],
                b: vec![other],
                silent,
            },
            4 => {
                let half = nodes.div_ceil(2);
                Fault::Cut {
                    a: (0..half).collect(),
                    b: (half..nodes).collect(),
                    silent,
                }
            }
            _ => Fault::Cut {
                a: vec![node],
                b: others,
                silent,
            },
        },
        "kill" => match random.random_range(0..7) {
            0 | 1 => Fault::KillDaemon(node),
            2 | 3 => Fault::KillServer(node),
            4 | 5 => Fault::KillNode(node),
            _ => Fault::KillAll,
        },
        "pause" => match random.random_range(0..3) {
            0 => Fault::PauseDaemon(node),
            1 => Fault::PauseServer(node),
            _ => Fault::PauseWalsender(node),
        },
        "clock" => {
            let seconds = *[1, -1, 7, -7, 40, -40, 300, -300, 86_400 * 900, -86_400 * 900]
                .choose(random)
                .unwrap_or(&1);
            if random.random_range(0..4) == 0 {
                Fault::Strobe {
                    node,
                    seconds: seconds.clamp(-300, 300),
                }
            } else {
                Fault::Skew { node, seconds }
            }
        }
        "slow" => Fault::Slow {
            ms: random.random_range(5..400),
        },
        "lock" => Fault::Lock(node),
        "standby" => Fault::StandbyAway,
        "power" => Fault::PowerLoss(node),
        _ => Fault::Roll,
    }
}

/// What a nemesis works on.
pub struct Scene<'a> {
    /// The cluster.
    pub cluster: &'a mut Cluster,
    /// A standby of the first node.
    pub standby: Option<&'a mut anabranch_tests::Postgres>,
    /// Disks of the daemons, in order of the nodes; none if the nemesis needs none.
    pub disks: Vec<crate::power::Disk>,
    /// A table of the workload.
    pub table: String,
    /// Do daemons belong to it?
    pub daemons: bool,
    /// The run's clock.
    pub clock: Clock,
    /// Where faults are told.
    pub sink: UnboundedSender<Event>,
    /// Locks that are held: sessions in a transaction.
    pub held: Vec<anabranch_tests::Session>,
}

impl Scene<'_> {
    /// Carries a plan out, then waits until `until` on the run's clock.
    pub async fn carry_out(&mut self, plan: &[Planned], seed: u64, until: Duration) {
        let mut random = StdRng::seed_from_u64(seed ^ 0x666c_6170);
        for planned in plan {
            let left = until.saturating_sub(self.elapsed());
            if left < planned.after {
                break;
            }
            tokio::time::sleep(planned.after).await;
            for fault in &planned.faults {
                match self.begin(fault).await {
                    Ok(()) => self.tell(fault, "start", String::new()),
                    Err(why) => self.tell(fault, "impossible", why),
                }
            }
            let ends = tokio::time::Instant::now() + planned.length;
            while tokio::time::Instant::now() < ends {
                tokio::time::sleep(Duration::from_millis(random.random_range(100..500))).await;
                for fault in &planned.faults {
                    self.stir(fault, &mut random);
                }
            }
            for fault in planned.faults.iter().rev() {
                self.undo(fault).await;
                self.tell(fault, "stop", String::new());
            }
        }
        tokio::time::sleep(until.saturating_sub(self.elapsed())).await;
    }

    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.clock.now_us().unsigned_abs())
    }

    fn tell(&self, fault: &Fault, phase: &str, detail: String) {
        let told = Told {
            at_us: self.clock.now_us(),
            name: fault.to_string(),
            phase: phase.to_owned(),
            detail,
        };
        let _ = self.sink.send(Event::Fault(told));
    }

    async fn begin(&mut self, fault: &Fault) -> Result<(), String> {
        match fault {
            Fault::Cut { a, b, silent } => {
                let mode = if *silent { Mode::Stall } else { Mode::Cut };
                self.cluster.set_lines(a, b, mode);
            }
            Fault::OneWay { from, to } => {
                self.cluster.line(*from, *to).set(Mode::StallRequests);
                self.cluster.line(*to, *from).set(Mode::StallAnswers);
            }
            Fault::Slow { ms } => {
                let all = self.cluster.all();
                self.cluster.set_lines(&all, &all, Mode::Slow(*ms));
            }
            Fault::KillDaemon(node) => self.need_daemon()?.nodes[*node].daemon.kill(),
            Fault::KillServer(node) => self.cluster.nodes[*node].server.kill(),
            Fault::KillNode(node) => self.kill(&[*node]),
            Fault::KillAll => {
                let all = self.cluster.all();
                self.kill(&all);
            }
            Fault::PauseDaemon(node) => {
                let pid = self.need_daemon()?.nodes[*node].daemon.pid();
                process::signal(pid.ok_or("the daemon does not run")?, Signal::STOP);
            }
            Fault::PauseServer(node) => self.cluster.nodes[*node].server.freeze(true),
            Fault::PauseWalsender(node) => self.walsender(*node).await?,
            Fault::Skew { node, seconds } => self.set_clock(*node, *seconds),
            Fault::Lock(node) => self.lock(*node).await?,
            Fault::Roll => self.roll().await,
            Fault::StandbyAway => match &mut self.standby {
                Some(standby) => standby.freeze(true),
                None => return Err("there is no standby".to_owned()),
            },
            Fault::PowerLoss(node) => {
                self.need_daemon()?.nodes[*node].daemon.kill();
                let disk = self
                    .disks
                    .get_mut(*node)
                    .ok_or("the daemon has no disk of its own")?;
                disk.lose_power().map_err(|error| error.to_string())?;
            }
            Fault::Flap | Fault::Strobe { .. } => {}
        }
        Ok(())
    }

    fn need_daemon(&mut self) -> Result<&mut Cluster, String> {
        if self.daemons {
            Ok(self.cluster)
        } else {
            Err("this system has no daemon".to_owned())
        }
    }

    /// Faults that move while they last.
    fn stir(&mut self, fault: &Fault, random: &mut StdRng) {
        match fault {
            Fault::Flap => {
                let nodes = self.cluster.nodes.len();
                let (from, to) = (random.random_range(0..nodes), random.random_range(0..nodes));
                let modes = [
                    Mode::Cut,
                    Mode::Stall,
                    Mode::StallRequests,
                    Mode::StallAnswers,
                    Mode::Pass,
                ];
                if from != to {
                    self.cluster
                        .line(from, to)
                        .set(*modes.choose(random).unwrap_or(&Mode::Pass));
                }
            }
            Fault::Strobe { node, seconds } => {
                let seconds = if random.random_range(0..2) == 0 {
                    0
                } else {
                    *seconds
                };
                self.set_clock(*node, seconds);
            }
            _ => {}
        }
    }

    async fn undo(&mut self, fault: &Fault) {
        match fault {
            Fault::Cut { .. } | Fault::OneWay { .. } | Fault::Flap | Fault::Slow { .. } => {
                self.cluster.heal()
            }
            Fault::KillDaemon(_)
            | Fault::KillServer(_)
            | Fault::KillNode(_)
            | Fault::KillAll
            | Fault::PowerLoss(_) => self.revive().await,
            Fault::PauseDaemon(node) => {
                if let Some(pid) = self.cluster.nodes[*node].daemon.pid() {
                    process::signal(pid, Signal::CONT);
                }
            }
            Fault::PauseServer(node) | Fault::PauseWalsender(node) => {
                self.cluster.nodes[*node].server.freeze(false)
            }
            Fault::Skew { node, .. } | Fault::Strobe { node, .. } => self.set_clock(*node, 0),
            Fault::Lock(_) => self.held.clear(),
            Fault::Roll => {}
            Fault::StandbyAway => {
                if let Some(standby) = &mut self.standby {
                    standby.freeze(false);
                }
            }
        }
    }

    fn kill(&mut self, nodes: &[usize]) {
        for &node in nodes {
            if self.daemons {
                self.cluster.nodes[node].daemon.kill();
            }
            self.cluster.nodes[node].server.kill();
        }
    }

    /// Starts whatever was killed.
    async fn revive(&mut self) {
        for node in &mut self.cluster.nodes {
            if !node.server.runs() {
                node.server.start().await;
            }
            if self.daemons && !node.daemon.started() {
                node.daemon.start();
            }
        }
    }

    async fn roll(&mut self) {
        for at in self.cluster.all() {
            let node = &mut self.cluster.nodes[at];
            if self.daemons && node.daemon.runs() {
                node.daemon.stop();
            }
            node.server.stop();
            node.server.start().await;
            if self.daemons {
                node.daemon.start();
            }
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    }

    fn set_clock(&mut self, node: usize, seconds: i64) {
        self.cluster.nodes[node]
            .server
            .set_clock_now(&format!("{seconds:+}"));
    }

    async fn walsender(&mut self, node: usize) -> Result<(), String> {
        let admin = self.cluster.nodes[node]
            .server
            .try_session("postgres", "postgres")
            .await
            .map_err(|error| error.to_string())?;
        let sql = "select pid from pg_stat_replication limit 1";
        let rows = admin.try_rows(sql).await.map_err(|error| error.to_string())?;
        let pid = rows
            .into_iter()
            .flatten()
            .flatten()
            .next()
            .ok_or("there is no walsender")?;
        process::signal(pid.parse().map_err(|_| "no pid")?, Signal::STOP);
        Ok(())
    }

    async fn lock(&mut self, node: usize) -> Result<(), String> {
        let session = self.cluster.nodes[node]
            .server
            .try_session("app", anabranch_tests::postgres::DATABASE)
            .await
            .map_err(|error| error.to_string())?;
        let sql = format!("begin; lock table {} in exclusive mode", self.table);
        let locking = tokio::time::timeout(Duration::from_secs(5), session.try_run(&sql));
        match locking.await {
            Ok(Ok(())) => self.held.push(session),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("the lock was not granted within 5 s".to_owned()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_fixes_the_plan_and_every_nemesis_but_none_has_one() {
        for nemesis in ALL {
            let plan_of = |seed| plan(nemesis.name, 3, seed, Duration::from_secs(60));
            assert_eq!(plan_of(1), plan_of(1), "{}", nemesis.name);
            assert_eq!(plan_of(1).is_empty(), nemesis.name == "none", "{}", nemesis.name);
        }
        assert_ne!(
            plan("all", 3, 1, Duration::from_secs(60)),
            plan("all", 3, 2, Duration::from_secs(60))
        );
    }

    #[test]
    fn a_plan_ends_before_the_load_does() {
        let length = Duration::from_secs(30);
        let spent: Duration = plan("all", 3, 5, length)
            .iter()
            .map(|planned| planned.after + planned.length)
            .sum();
        assert!(spent <= length);
    }
}
