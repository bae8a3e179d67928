//! What becomes of packets between nodes that are machines of their own ([`anabranch_tests::network`]): nft decides where they enter the bridge.
//!
//! In:   what each line does ([`Mode`])        Out: elements of two maps, changed in one transaction
//! Invariants: 1. a packet belongs to one line and one direction, by its addresses and the port of the end that was dialled, which is no
//!        other node's: so any shape can be cut; 2. a fault of whole directions is elements (source . destination), for all their packets.
//!
//! The hook is `ingress` of the bridge's ports, family `netdev`, not `forward` of family `bridge`: what is refused is answered at once by a
//! reset, and `reject` in the latter is a kernel option that not every kernel has (`NFT_BRIDGE_REJECT`).
//!
//! Not here: why packets can be dropped at all, and running nft (`super::packets`); that this does what it says (`super::proof`)

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;

use anabranch_tests::proxy::Mode;

use super::packets;

/// What can become of a packet that does not go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// It is dropped.
    Silent,
    /// It is dropped, and whoever sent it gets a reset.
    Refused,
    /// It is dropped with so many chances of a hundred.
    Loses(u8),
}

impl Fate {
    /// The chain that does it.
    fn chain(self) -> String {
        match self {
            Self::Silent => "silent".to_owned(),
            Self::Refused => "refused".to_owned(),
            Self::Loses(percent) => format!("loses{percent}"),
        }
    }

    /// The chain's rules.
    fn rules(self) -> String {
        match self {
            Self::Silent => "counter name met drop".to_owned(),
            Self::Refused => "counter name met; meta l4proto tcp reject with tcp reset; drop".to_owned(),
            Self::Loses(percent) => format!("numgen random mod 100 < {percent} counter name met drop"),
        }
    }
}

/// What becomes of packets to who was dialled, and of those to who dialled.
fn fates(mode: Mode) -> Result<[Option<Fate>; 2], String> {
    Ok(match mode {
        Mode::Pass => [None; 2],
        Mode::Cut => [Some(Fate::Refused); 2],
        Mode::Stall => [Some(Fate::Silent); 2],
        Mode::StallRequests => [Some(Fate::Silent), None],
        Mode::StallAnswers => [None, Some(Fate::Silent)],
        Mode::Lossy(percent) => [Some(Fate::Loses(percent)); 2],
        Mode::Slow(_) => return Err(NOT_SLOW.to_owned()),
    })
}

/// Why packets are not late.
pub const NOT_SLOW: &str =
    "nft drops packets and holds none back, and there is no `tc netem` here: proxies can (`--network proxy`)";

/// The lines of a network.
pub struct Bridge {
    /// Where each node is dialled.
    ends: Vec<SocketAddrV4>,
    /// What lines do that do not just pass all, by who dials and who is dialled.
    modes: BTreeMap<(usize, usize), Mode>,
    /// Packets that had been met when the first of them was broken.
    met_before: u64,
}

impl Bridge {
    /// One whose lines all pass everything. Packets enter it by these interfaces.
    pub fn new<'a>(
        interfaces: impl Iterator<Item = &'a str>,
        ends: Vec<SocketAddrV4>,
    ) -> Result<Self, String> {
        packets::nft(&table(interfaces))?;
        Ok(Self {
            ends,
            modes: BTreeMap::new(),
            met_before: 0,
        })
    }

    /// Where a node is dialled.
    pub fn end(&self, node: usize) -> Option<SocketAddrV4> {
        self.ends.get(node).copied()
    }

    /// Sets these lines (who dials, who is dialled), all at once.
    pub fn set(&mut self, lines: &[(usize, usize, Mode)]) -> Result<(), String> {
        let mut modes = self.modes.clone();
        for &(from, to, mode) in lines.iter().filter(|(from, to, _)| from != to) {
            match mode {
                Mode::Pass => modes.remove(&(from, to)),
                mode => modes.insert((from, to), mode),
            };
        }
        if self.modes.is_empty() {
            self.met_before = met()?;
        }
        packets::nft(&script(&self.ends, &modes)?)?;
        self.modes = modes;
        Ok(())
    }

    /// Packets that did not go through since the first line that is broken now was broken.
    pub fn met(&self) -> Result<u64, String> {
        Ok(met()?.saturating_sub(self.met_before))
    }
}

/// Packets that did not go through so far.
fn met() -> Result<u64, String> {
    let said = packets::nft("list counter netdev jepsen met\n")?;
    let count = said
        .split_once("packets ")
        .and_then(|(_, after)| after.split_whitespace().next()?.parse().ok());
    count.ok_or_else(|| format!("nft counts nothing: {said}"))
}

/// No table, whether there is one or not: what is not there cannot be deleted.
const NO_TABLE: &str = "table netdev jepsen { }\ndelete table netdev jepsen\n";

/// The table, made anew, with nothing in its maps.
fn table<'a>(interfaces: impl Iterator<Item = &'a str>) -> String {
    let interfaces: Vec<&str> = interfaces.collect();
    let chain = |fate: Fate| format!("chain {} {{ {}; }}\n", fate.chain(), fate.rules());
    format!(
        "{NO_TABLE}table netdev jepsen {{\n\
         counter met {{ }}\n\
         map pairs {{ type ipv4_addr . ipv4_addr : verdict; }}\n\
         map lines {{ type ipv4_addr . ipv4_addr . inet_service : verdict; }}\n\
         {}{}\
         chain packets {{ type filter hook ingress devices = {{ {} }} priority 0; policy accept;\n\
         ip saddr . ip daddr vmap @pairs\n\
         ip saddr . ip daddr . tcp dport vmap @lines\n\
         ip saddr . ip daddr . tcp sport vmap @lines\n}}\n}}\n",
        chain(Fate::Silent),
        chain(Fate::Refused),
        interfaces.join(", ")
    )
}

/// What makes the lines of these modes, and no others, break: one transaction.
fn script(ends: &[SocketAddrV4], modes: &BTreeMap<(usize, usize), Mode>) -> Result<String, String> {
    let (mut pairs, mut lines, mut used) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (from, source) in ends.iter().enumerate() {
        for (to, destination) in ends.iter().enumerate().filter(|(to, _)| *to != from) {
            let of = |dials: usize, dialled: usize| {
                fates(modes.get(&(dials, dialled)).copied().unwrap_or(Mode::Pass))
            };
            let ([requests, _], [_, answers]) = (of(from, to)?, of(to, from)?);
            used.extend([requests, answers].into_iter().flatten());
            let pair = format!("{} . {}", source.ip(), destination.ip());
            let element = |port: Option<u16>, fate: Fate| match port {
                None => format!("{pair} : goto {}", fate.chain()),
                Some(port) => format!("{pair} . {port} : goto {}", fate.chain()),
            };
            if requests == answers {
                pairs.extend(requests.map(|fate| element(None, fate)));
            } else {
                lines.extend(requests.map(|fate| element(Some(destination.port()), fate)));
                lines.extend(answers.map(|fate| element(Some(source.port()), fate)));
            }
        }
    }
    let mut script = "flush map netdev jepsen pairs\nflush map netdev jepsen lines\n".to_owned();
    for fate in used.into_iter().filter(|fate| matches!(fate, Fate::Loses(_))) {
        let (chain, rules) = (fate.chain(), fate.rules());
        script.push_str(&format!(
            "add chain netdev jepsen {chain}\nflush chain netdev jepsen {chain}\nadd rule netdev jepsen {chain} {rules}\n"
        ));
    }
    for (map, elements) in [("pairs", pairs), ("lines", lines)] {
        if !elements.is_empty() {
            script.push_str(&format!(
                "add element netdev jepsen {map} {{ {} }}\n",
                elements.join(", ")
            ));
        }
    }
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The elements that lines of these modes make, by map, between three nodes that are dialled at ports 7001 to 7003.
    fn elements(lines: &[(usize, usize, Mode)]) -> Vec<String> {
        let end = |node: u8| SocketAddrV4::new([10, 77, 0, node].into(), 7_000 + u16::from(node));
        let modes = lines.iter().map(|&(from, to, mode)| ((from, to), mode)).collect();
        let script = script(&[end(1), end(2), end(3)], &modes).unwrap();
        assert!(script.starts_with("flush map netdev jepsen pairs\nflush map netdev jepsen lines\n"));
        let added = script
            .lines()
            .filter_map(|line| line.strip_prefix("add element netdev jepsen "));
        let of_map = |line: &str| {
            let (map, elements) = line.split_once(" { ").unwrap();
            let elements = elements.strip_suffix(" }").unwrap().split(", ");
            let short = elements.map(|element| element.replace("10.77.0.", "").replace(" : goto", ""));
            short
                .map(|element| format!("{map}: {element}"))
                .collect::<Vec<_>>()
        };
        added.flat_map(of_map).collect()
    }

    fn between(a: usize, b: usize, mode: Mode) -> [(usize, usize, Mode); 2] {
        [(a, b, mode), (b, a, mode)]
    }

    #[test]
    fn a_cut_is_both_directions_of_a_pair_whoever_dialled() {
        assert_eq!(elements(&[]), [""; 0]);
        assert_eq!(
            elements(&between(0, 1, Mode::Stall)),
            ["pairs: 1 . 2 silent", "pairs: 2 . 1 silent"]
        );
        let all: Vec<_> = [(0, 1), (0, 2), (1, 2)]
            .into_iter()
            .flat_map(|(a, b)| between(a, b, Mode::Cut))
            .collect();
        assert_eq!(elements(&all).len(), 6);
        assert!(
            elements(&all)
                .iter()
                .all(|element| element.starts_with("pairs") && element.ends_with("refused"))
        );
    }

    #[test]
    fn one_direction_is_one_element() {
        let one_way = [(0, 2, Mode::StallRequests), (2, 0, Mode::StallAnswers)];
        assert_eq!(elements(&one_way), ["pairs: 1 . 3 silent"]);
    }

    #[test]
    fn a_line_is_known_by_the_port_of_who_was_dialled() {
        assert_eq!(
            elements(&[(1, 0, Mode::Stall)]),
            ["lines: 1 . 2 . 7001 silent", "lines: 2 . 1 . 7001 silent"]
        );
        assert_eq!(
            elements(&[(1, 0, Mode::StallRequests)]),
            ["lines: 2 . 1 . 7001 silent"]
        );
        assert_eq!(
            elements(&[(1, 0, Mode::StallAnswers)]),
            ["lines: 1 . 2 . 7001 silent"]
        );
        // What differs between the lines of a pair is no matter of the pair.
        assert_eq!(
            elements(&[(1, 0, Mode::Stall), (0, 1, Mode::Cut)]),
            [
                "lines: 1 . 2 . 7002 refused",
                "lines: 1 . 2 . 7001 silent",
                "lines: 2 . 1 . 7001 silent",
                "lines: 2 . 1 . 7002 refused"
            ]
        );
    }

    #[test]
    fn what_loses_packets_has_a_chain_of_its_own_and_nothing_is_late() {
        assert_eq!(
            elements(&between(1, 2, Mode::Lossy(10))),
            ["pairs: 2 . 3 loses10", "pairs: 3 . 2 loses10"]
        );
        let end = SocketAddrV4::new([10, 77, 0, 1].into(), 7_001);
        let script = |mode: Mode| script(&[end, end], &BTreeMap::from([((0, 1), mode)]));
        assert!(
            script(Mode::Lossy(10))
                .unwrap()
                .contains("add rule netdev jepsen loses10 numgen random mod 100 < 10")
        );
        assert_eq!(script(Mode::Slow(5)).unwrap_err(), NOT_SLOW);
    }
}
