//! The nemesis: faults, when they happen, and how each is undone.
//!
//! In:   a seed, a name, a length        Out: a plan; faults, while it is carried out
//! Invariants: 1. the plan follows from seed, name, length and number of nodes alone; 2. whatever was begun is undone;
//!        3. what cannot be done here is told as `impossible` and never counts as survived
//! Not here: what follows from it (`crate::checker`)

mod bridge;
mod fault;
mod heal;
mod lines;
mod network;
pub mod packets;
mod proof;
mod scene;
mod toll;

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::workload::Workload;

pub use fault::{Fault, Part};
pub use lines::Lines;
pub use network::Network;
pub use proof::prove;
pub use scene::{Disks, RECOVERY, Scene, answers};
pub use toll::Toll;

/// Faults that happen together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// Since the last ones ended.
    pub after: Duration,
    /// Which: see [`Self::in_order`].
    pub faults: Vec<Fault>,
    /// How long they last.
    pub length: Duration,
}

impl Planned {
    /// Its faults in the order in which they begin; they end in the other. What makes all lines slow comes before what breaks some of them,
    /// or those would be mended by it; what needs a server's answer before what stops servers.
    pub fn in_order(&self) -> Vec<&Fault> {
        let mut faults: Vec<&Fault> = self.faults.iter().collect();
        faults.sort_by_key(|fault| match fault {
            Fault::Slow { .. } => 0,
            Fault::Lock(_) | Fault::Skew { .. } | Fault::Strobe { .. } if self.stops_a_server() => 1,
            _ => 2,
        });
        faults
    }

    fn stops_a_server(&self) -> bool {
        let stops = |fault: &Fault| matches!(fault, Fault::PauseServer(_) | Fault::PauseNode(_));
        self.faults.iter().any(stops)
    }
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
        purpose: "one node off, halves, a bridge, one direction, one deaf, all alone, flapping; reset and silent",
    },
    Nemesis {
        name: "kill",
        purpose: "kill -9 of daemons, whole servers, both, all",
    },
    Nemesis {
        name: "pause",
        purpose: "SIGSTOP of daemons, whole servers, both, single walsenders",
    },
    Nemesis {
        name: "clock",
        purpose: "clocks ahead, behind, strobing, years off (while they run)",
    },
    Nemesis {
        name: "slow",
        purpose: "late and narrow lines",
    },
    Nemesis {
        name: "lossy",
        purpose: "lines that lose packets, some or all, of a node or of all: by nft in a network namespace, else by the proxies as TCP would",
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
        name: "blackout",
        purpose: "servers, and whole machines, lose power, and with it what they did not sync",
    },
    Nemesis {
        name: "disk",
        purpose: "disks of servers and daemons, or both, full or hung",
    },
    Nemesis {
        name: "fsync",
        purpose: "fsync that fails or is slow, of servers and daemons",
    },
    Nemesis {
        name: "slot",
        purpose: "a slot dropped by hand: the node is lost and must say so",
    },
    Nemesis {
        name: "heal",
        purpose: "a slot dropped by hand, and the node healed while all write on",
    },
    Nemesis {
        name: "loss",
        purpose: "a node dies and never comes back: the others drop it and go on",
    },
    Nemesis {
        name: "move",
        purpose: "sessions go on at other nodes, with what they saw, while lines break",
    },
    Nemesis {
        name: "all",
        purpose: "partitions, kills, pauses, clocks, slowness and locks, two at once",
    },
];

/// Aimed at something: the short run of CI, and what some control is caught by. They are no part of `suite full`.
pub const AIMED: &[Nemesis] = &[
    Nemesis {
        name: "smoke",
        purpose: "partitions, kills and clocks in turn",
    },
    Nemesis {
        name: "apart",
        purpose: "all nodes alone, again and again",
    },
    Nemesis {
        name: "deaf",
        purpose: "a node takes nothing from another, and is told what that one takes",
    },
];

/// Is there a nemesis of this name?
pub fn exists(name: &str) -> bool {
    ALL.iter().chain(AIMED).any(|nemesis| nemesis.name == name)
}

/// Does the nemesis lose a slot and heal the node?
pub fn heals(name: &str) -> bool {
    name == "heal"
}

/// Is it better in a network namespace of its own?
pub fn wants_packets(name: &str) -> bool {
    name == "lossy"
}

/// Why a nemesis is not for a workload; what it cannot be survived by is no pair of `suite full`.
pub fn unfit(name: &str, workload: &Workload) -> Option<&'static str> {
    (heals(name) && workload.adds).then_some(
        "what is added to merged columns while no slot is there cannot be told from what others add: `anabranch heal` refuses, or          leaves it out by --leave-merged",
    )
}

/// Does the nemesis move clocks?
pub fn moves_clocks(name: &str) -> bool {
    matches!(name, "clock" | "all" | "smoke")
}

/// Do sessions move between nodes?
pub fn moves_sessions(name: &str) -> bool {
    name == "move"
}

/// Does the nemesis know of a standby?
pub fn wants_standby(name: &str) -> bool {
    name == "standby"
}

/// Does the nemesis need daemons' folders on disks of their own?
pub fn wants_disks(name: &str) -> bool {
    matches!(name, "power" | "blackout" | "disk")
}

/// Does the nemesis need servers' data folders on disks of their own?
pub fn wants_server_disks(name: &str) -> bool {
    matches!(name, "blackout" | "disk")
}

/// Does the nemesis reach into fsync?
pub fn wants_shim(name: &str) -> bool {
    name == "fsync"
}

/// Why a nemesis cannot run on this machine; `None` when it can.
pub fn impossible(name: &str) -> Option<String> {
    if wants_disks(name) {
        return anabranch_tests::disk::impossible();
    }
    if wants_shim(name) || moves_clocks(name) {
        return anabranch_tests::preload::impossible();
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
    if matches!(name, "slot" | "loss") {
        // Once, in the middle: there is no way back.
        let node = random.random_range(0..nodes);
        let (lost, then) = match name {
            "slot" => (Fault::DropSlot(node), None),
            _ => (Fault::Lose(node), Some(Fault::Drop(node))),
        };
        plan.push(Planned {
            after: length / 3,
            faults: vec![lost],
            length: length / 3,
        });
        plan.extend(then.map(|then| Planned {
            after: Duration::ZERO,
            faults: vec![then],
            length: Duration::from_millis(500),
        }));
        return plan;
    }
    if heals(name) {
        // The daemon has written down a horizon by then; two rounds in a long run, of two nodes.
        let node = random.random_range(0..nodes);
        for round in 0..=usize::from(length > Duration::from_secs(40)) {
            let node = (node + round) % nodes;
            let gap = Duration::from_millis(random.random_range(1_500..4_000));
            let one = |after, fault, length| Planned {
                after,
                faults: vec![fault],
                length,
            };
            plan.push(one(Duration::from_secs(4), Fault::DropSlot(node), gap));
            plan.push(one(Duration::ZERO, Fault::Heal(node), Duration::from_millis(500)));
        }
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
            // Where no line is left nothing can be slow.
            if faults.iter().any(|fault| fault.cuts_all(nodes)) {
                faults.retain(|fault| !matches!(fault, Fault::Slow { .. }));
            }
            return faults;
        }
        // The short run of CI: every kind, in turn.
        "smoke" => ["partition", "kill", "skew"][number % 3],
        "move" => "partition",
        // Server and daemon on one disk.
        "disk" if random.random_range(0..5) == 0 => {
            let node = random.random_range(0..nodes);
            return vec![
                Fault::FullDisk(node, Part::Server),
                Fault::FullDisk(node, Part::Daemon),
            ];
        }
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
        "apart" => Fault::Cut {
            a: (0..nodes).collect(),
            b: (0..nodes).collect(),
            silent,
        },
        "deaf" => Fault::Deaf { node, to: other },
        "partition" => match random.random_range(0..7) {
            0 => Fault::OneWay {
                from: node,
                to: other,
            },
            6 => Fault::Deaf { node, to: other },
            1 => Fault::Flap,
            2 => Fault::Cut {
                a: (0..nodes).collect(),
                b: (0..nodes).collect(),
                silent,
            },
            // Two halves that do not reach each other, and one that reaches both: the bridge.
            3 => {
                let rest: Vec<usize> = others.iter().copied().filter(|&one| one != other).collect();
                let (with_node, with_other) = match rest.split_last() {
                    Some((_, halves)) => halves.split_at(halves.len() / 2),
                    None => (&[][..], &[][..]),
                };
                Fault::Cut {
                    a: [&[node][..], with_node].concat(),
                    b: [&[other][..], with_other].concat(),
                    silent,
                }
            }
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
        "pause" => match random.random_range(0..4) {
            0 => Fault::PauseDaemon(node),
            1 => Fault::PauseServer(node),
            2 => Fault::PauseNode(node),
            _ => Fault::PauseWalsender(node),
        },
        "clock" | "skew" => {
            // PostgreSQL's own timers go by the wall clock: a lock wait that begins before the clock is set back may
            // last that much longer than `lock_timeout` and `deadlock_timeout`. A skew is shorter than a run's patience.
            let all = [
                1,
                -1,
                7,
                -7,
                20,
                -20,
                40,
                -40,
                300,
                -300,
                86_400 * 900,
                -86_400 * 900,
            ];
            let among = if kind == "skew" { all.get(..6) } else { None };
            let seconds = *among.unwrap_or(&all[..]).choose(random).unwrap_or(&1);
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
        "lossy" => Fault::Lossy {
            node: (random.random_range(0..3) == 0).then_some(node),
            percent: *[2, 10, 30, 100].choose(random).unwrap_or(&10),
        },
        "lock" => Fault::Lock(node),
        "standby" => Fault::StandbyAway,
        "power" => Fault::PowerLoss(node),
        "blackout" => match random.random_range(0..2) {
            0 => Fault::ServerPowerLoss(node),
            _ => Fault::MachinePowerLoss(node),
        },
        "disk" => match random.random_range(0..4) {
            0 => Fault::FullDisk(node, Part::Server),
            1 => Fault::FullDisk(node, Part::Daemon),
            2 => Fault::HungDisk(node, Part::Server),
            _ => Fault::HungDisk(node, Part::Daemon),
        },
        "fsync" => match random.random_range(0..4) {
            0 => Fault::FsyncFails(node, Part::Server),
            1 => Fault::FsyncFails(node, Part::Daemon),
            2 => Fault::FsyncSlow(node, Part::Server),
            _ => Fault::FsyncSlow(node, Part::Daemon),
        },
        _ => Fault::Roll,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_seed_fixes_the_plan_and_every_nemesis_but_none_has_one() {
        for nemesis in ALL.iter().chain(AIMED) {
            let plan_of = |seed| plan(nemesis.name, 3, seed, Duration::from_secs(60));
            assert_eq!(plan_of(1), plan_of(1), "{}", nemesis.name);
            assert_eq!(plan_of(1).is_empty(), nemesis.name == "none", "{}", nemesis.name);
        }
        assert_ne!(
            plan("all", 3, 1, Duration::from_secs(60)),
            plan("all", 3, 2, Duration::from_secs(60))
        );
    }

    /// Lines that a fault breaks, by who dials whom.
    fn broken_lines(fault: &Fault) -> BTreeSet<(usize, usize)> {
        let mut lines = BTreeSet::new();
        let mut both = |a: usize, b: usize| {
            lines.extend([(a, b), (b, a)].into_iter().filter(|(from, to)| from != to));
        };
        match fault {
            Fault::Cut { a, b, .. } => a.iter().for_each(|&a| b.iter().for_each(|&b| both(a, b))),
            Fault::OneWay { from, to } => both(*from, *to),
            Fault::Deaf { node, to } => {
                lines.insert((*node, *to));
            }
            _ => {}
        }
        lines
    }

    #[test]
    fn slowness_mends_no_line_that_another_fault_broke_and_has_lines_to_make_slow() {
        let mut together = 0;
        for (seed, nodes) in (1..80).flat_map(|seed| (2..6).map(move |nodes| (seed, nodes))) {
            for planned in plan("all", nodes, seed, Duration::from_secs(60)) {
                let faults = planned.in_order();
                assert_eq!(faults.len(), planned.faults.len());
                let Some(slow) = faults
                    .iter()
                    .position(|fault| matches!(fault, Fault::Slow { .. }))
                else {
                    continue;
                };
                let broken: BTreeSet<_> = faults.iter().flat_map(|fault| broken_lines(fault)).collect();
                together += usize::from(!broken.is_empty());
                assert_eq!(slow, 0, "{faults:?}");
                assert!(broken.len() < nodes * (nodes - 1), "{nodes} nodes: {faults:?}");
            }
        }
        assert!(together > 20, "{together}");
    }

    #[test]
    fn what_asks_a_server_begins_before_what_stops_it() {
        let planned = Planned {
            after: Duration::ZERO,
            faults: vec![Fault::PauseServer(1), Fault::Lock(1)],
            length: Duration::from_secs(1),
        };
        assert_eq!(planned.in_order(), [&Fault::Lock(1), &Fault::PauseServer(1)]);
        let skew = Fault::Skew { node: 1, seconds: 7 };
        let planned = Planned {
            faults: vec![Fault::PauseNode(1), skew.clone()],
            ..planned
        };
        assert_eq!(planned.in_order(), [&skew, &Fault::PauseNode(1)]);
    }

    #[test]
    fn a_bridge_is_two_groups_and_one_that_reaches_both() {
        let mut bridges = 0;
        for seed in 1..200 {
            for planned in plan("partition", 5, seed, Duration::from_secs(60)) {
                for fault in planned.faults {
                    let Fault::Cut { a, b, .. } = &fault else { continue };
                    let (left, right) = (
                        a.iter().collect::<BTreeSet<_>>(),
                        b.iter().collect::<BTreeSet<_>>(),
                    );
                    if a.len() + b.len() == 4 {
                        assert_eq!((left.len(), right.len()), (2, 2), "{fault}");
                        assert!(left.is_disjoint(&right), "{fault}");
                        bridges += 1;
                    }
                }
            }
        }
        assert!(bridges > 20, "{bridges}");
    }

    #[test]
    fn a_disk_that_cannot_be_changed_for_its_copy_is_still_there() {
        use anabranch_tests::disk;
        if disk::impossible().is_some() {
            return;
        }
        let dir = anabranch_tests::postgres::open_dir("jepsen-disk-");
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("file"), "x").unwrap();
        let mut disk = disk::Disk::under(&folder, &dir.path().join("images"), 16).unwrap();
        disk.lose_power().unwrap();
        assert!(disk.is_mounted() && folder.join("file").exists());
        // The copy is put into a folder of that name, which is no file system.
        std::fs::create_dir(dir.path().join("images/disk2")).unwrap();
        disk.lose_power().unwrap_err();
        assert!(disk.is_mounted() && folder.join("file").exists());
        disk.try_empty().unwrap();
        disk.freeze(false).unwrap();
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
