//! How far own transactions go into a journal that is full (`docs/design.md`, section 4).
//!
//! In:   is it full, what is held and applied of the others, their reports        Out: the LSN up to which own transactions go in
//! Holds: what was held and applied when it was last moved
//! Invariants: 1. while nothing can come of it, that is while a member is away or applies nothing, it stays; 2. nodes never wait
//!        for each other in a circle: of those whose streams wait, the one that was let on longest ago hears from all others what
//!        they wrote after that, and is let on
//! On crash: begins anew, with everything that the server has by then
//! Not here: waiting (`crate::capture`), what may leave the journal (`trim`)

use std::sync::atomic::Ordering;

use anabranch_proto::{NodeId, Position, Vector};

use crate::journal::Journal;
use crate::link::{Links, Reported};
use crate::shared::{Shared, lock};

/// A member whose report is no further behind has kept up, bytes of WAL.
const NEAR_BYTES: u64 = 4 << 20;

/// What is here of the others' streams.
#[derive(Debug, Clone, Default)]
struct Here {
    /// In the journal, or on its way into it.
    held: Vector,
    applied: Vector,
    /// The applier waits for the decoder, which waits with the own transactions, or for a commit that waits for their frames.
    waits_for_own: bool,
}

/// Moves [`Shared::own_until`].
#[derive(Debug, Default)]
pub(super) struct OwnLimit {
    moved: Option<Here>,
    /// The database knows of members what the decoder has not met yet.
    has_news: bool,
}

impl OwnLimit {
    /// Looks whether own transactions up to `lsn`, where the WAL ends, may go into the journal.
    pub(super) fn look(&mut self, shared: &Shared, journal: &Journal, links: &Links, lsn: u64) {
        let here = Here {
            held: journal.appended_vector(),
            applied: shared.applied.borrow().clone(),
            waits_for_own: shared.decoder_wanted.load(Ordering::Relaxed) > *shared.decoded.borrow()
                || *shared.held_by_waiting_commit.borrow(),
        };
        let may = match &self.moved {
            Some(before) if journal.full().is_some() && !std::mem::take(&mut self.has_news) => {
                // What members say of it to each other is all that counts then.
                let is_dropping = !lock(&shared.members).dropping().is_empty();
                is_dropping || is_of_use(shared, links, before, &here)
            }
            _ => true,
        };
        if may {
            // Before it is sent: what others write once they have heard of that is news.
            self.moved = Some(here);
            shared.own_until.send_replace(lsn);
        }
    }

    /// Facts about members are met in the stream alone: they must get there.
    pub(super) const fn note_news(&mut self) {
        self.has_news = true;
    }
}

fn is_of_use(shared: &Shared, links: &Links, before: &Here, here: &Here) -> bool {
    let own = *shared.own.borrow();
    let live = lock(&shared.members).live();
    let links = links.status();
    live.into_iter().filter(|&node| node != shared.node).all(|node| {
        let link = links.iter().find(|link| link.id == node);
        let report = link
            .filter(|link| link.inbound.connected || link.outbound.connected)
            .map(|link| &link.reported);
        keeps_up((shared.node, own), node, report, (before, here))
    })
}

/// Is it of use to `node` that own transactions go on? `report`: what it says of itself where there is a link to it.
fn keeps_up(
    (own_node, own): (NodeId, Position),
    node: NodeId,
    report: Option<&Reported>,
    (before, here): (&Here, &Here),
) -> bool {
    match report {
        Some(report) if !report.is_full => {
            let applied = report.applied.get(own_node);
            applied >= own
                || applied.epoch == own.epoch && own.lsn.0.saturating_sub(applied.lsn.0) <= NEAR_BYTES
        }
        // Its own stream may wait for something of ours, so its silence about what it has applied says nothing.
        _ => {
            let is_news = |now: &Vector, before: &Vector| now.get(node) > before.get(node);
            is_news(&here.held, &before.held)
                && (is_news(&here.applied, &before.applied) || here.waits_for_own)
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const OWN: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);

    fn here(held: u64, applied: u64, waits_for_own: bool) -> Here {
        let of = |lsn| [(OTHER, Position::new(1, lsn))].into_iter().collect();
        Here {
            held: of(held),
            applied: of(applied),
            waits_for_own,
        }
    }

    fn report(applied: Position, is_full: bool) -> Reported {
        Reported {
            applied: [(OWN, applied)].into_iter().collect(),
            is_full,
            ..Reported::default()
        }
    }

    #[test]
    fn a_member_with_room_is_waited_for_until_it_has_applied_what_it_was_sent() {
        let own = Position::new(2, 100 << 20);
        let (before, here) = (here(5, 5, false), here(9, 9, true));
        let keeps_up = |applied, is_full| {
            let report = report(applied, is_full);
            keeps_up((OWN, own), OTHER, Some(&report), (&before, &here))
        };
        assert!(keeps_up(own, false));
        assert!(keeps_up(Position::new(2, 97 << 20), false));
        assert!(!keeps_up(Position::new(2, 90 << 20), false));
        assert!(!keeps_up(Position::new(1, 99 << 20), false));
        assert!(keeps_up(Position::new(1, 0), true));
    }

    #[test]
    fn of_one_that_is_full_or_out_of_reach_something_new_must_have_come_and_been_applied() {
        let own = Position::new(1, 100 << 20);
        let full = report(Position::new(1, 0), true);
        for link in [None, Some(&full)] {
            let keeps_up = |now: Here| keeps_up((OWN, own), OTHER, link, (&here(5, 5, false), &now));
            assert!(!keeps_up(here(5, 5, false)));
            assert!(!keeps_up(here(5, 5, true)));
            assert!(!keeps_up(here(9, 5, false)));
            assert!(keeps_up(here(9, 6, false)));
            assert!(keeps_up(here(9, 5, true)));
        }
    }

    /// LSN of one entry of a [`Model`]'s WAL; nothing short of all is near.
    const STEP: u64 = 2 * NEAR_BYTES;

    enum Entry {
        Own,
        Echo(NodeId, Position),
    }

    /// One node whose journal is full from the start, or never.
    struct Model {
        wal: Vec<Entry>,
        decoded: usize,
        framed: u64,
        until: u64,
        again: bool,
        is_full: bool,
        /// How often its applier needs the decoder.
        conflicts: f64,
        here: Here,
        moved: Here,
        echoed: Vector,
        fence: Option<usize>,
        wanted: usize,
        reports: Vec<Reported>,
    }

    impl Model {
        fn new(nodes: usize, is_full: bool, conflicts: f64) -> Self {
            Self {
                wal: (0..40).map(|_| Entry::Own).collect(),
                decoded: 0,
                framed: 0,
                until: 0,
                again: true,
                is_full,
                conflicts,
                here: Here::default(),
                moved: Here::default(),
                echoed: Vector::new(),
                fence: None,
                wanted: 0,
                reports: vec![Reported::default(); nodes],
            }
        }

        fn decode(&mut self) {
            match self.wal.get(self.decoded) {
                Some(Entry::Own) if self.is_full && self.framed >= self.until && !self.again => return,
                Some(Entry::Own) => {
                    self.framed = (self.decoded as u64 + 1) * STEP;
                    self.again = false;
                }
                Some(&Entry::Echo(node, position)) => self.echoed.raise(node, position),
                None => return,
            }
            self.decoded += 1;
        }

        /// Applies something of `node`, perhaps only once the decoder has passed what is there now.
        fn apply(&mut self, node: NodeId, rng: &mut StdRng) {
            let (held, applied) = (self.here.held.get(node), self.here.applied.get(node));
            if held == applied {
                return;
            }
            match self.fence {
                None if rng.random_bool(self.conflicts) => {
                    self.fence = Some(self.wal.len());
                    self.wanted = self.wal.len();
                    return;
                }
                Some(at) if self.decoded < at => {
                    // It gives up now and then, and begins again with what is there then.
                    if rng.random_bool(0.02) {
                        self.fence = None;
                    }
                    return;
                }
                _ => self.fence = None,
            }
            let next = Position::new(1, held.lsn.0.min(applied.lsn.0 + STEP * rng.random_range(1..20)));
            self.here.applied.raise(node, next);
            self.wal.push(Entry::Echo(node, next));
        }
    }

    /// Do all get what all had written, whoever is full, whoever has a link to whom? `tells_full`: peers hear that a journal is
    /// full; `tells_waiting`: it counts that the applier waits for the decoder.
    fn all_goes_on(seed: u64, tells_full: bool, tells_waiting: bool) -> bool {
        let mut rng = StdRng::seed_from_u64(seed);
        let count = rng.random_range(2..5);
        let id = |at: usize| NodeId(at as u16 + 1);
        let mut nodes: Vec<Model> = (0..count)
            .map(|_| {
                Model::new(
                    count,
                    rng.random_bool(0.8),
                    if rng.random_bool(0.5) { 1.0 } else { 0.3 },
                )
            })
            .collect();
        let has_link: Vec<bool> = (0..count * count).map(|_| rng.random_bool(0.8)).collect();
        for _ in 0..100_000 {
            let at = rng.random_range(0..count);
            let other = (at + rng.random_range(1..count)) % count;
            let framed = Position::new(1, nodes[other].framed);
            let report = Reported {
                applied: nodes[other].echoed.clone(),
                is_full: tells_full && nodes[other].is_full,
                ..Reported::default()
            };
            let node = &mut nodes[at];
            match rng.random_range(0..20) {
                0 => node.wal.push(Entry::Own),
                1..10 => node.decode(),
                10 | 11 => node.here.held.raise(id(other), framed),
                12..17 => node.apply(id(other), &mut rng),
                17 | 18 => node.reports[other] = report,
                _ => {
                    node.here.waits_for_own = tells_waiting && node.wanted > node.decoded;
                    let own = (id(at), Position::new(1, node.framed));
                    let mut others = (0..count).filter(|&other| other != at);
                    let may = others.all(|other| {
                        let report = has_link[at * count + other].then(|| &node.reports[other]);
                        keeps_up(own, id(other), report, (&node.moved, &node.here))
                    });
                    if may {
                        node.moved = node.here.clone();
                        node.until = node.wal.len() as u64 * STEP;
                        node.again = true;
                    }
                }
            }
            let all = Position::new(1, 40 * STEP);
            let has_all = |at: usize| {
                let mut others = (0..count).filter(|&other| other != at);
                others.all(|other| nodes[at].echoed.covers(id(other), all))
            };
            if (0..count).all(has_all) {
                return true;
            }
        }
        false
    }

    #[test]
    fn nodes_that_are_full_never_wait_for_each_other_for_ever() {
        for seed in 0..100 {
            assert!(all_goes_on(seed, true, true), "seed {seed}");
        }
    }

    #[test]
    fn they_would_if_they_did_not_say_that_they_are_full_or_that_they_wait() {
        assert!((0..100).any(|seed| !all_goes_on(seed, false, true)));
        assert!((0..100).any(|seed| !all_goes_on(seed, true, false)));
    }
}
