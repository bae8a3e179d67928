//! What a large transaction has lost, or has beaten, in the chunks that are written: kept for the log, which is written at its end, and for
//! another try, to which the resolver does not tell again what it has beaten.
//!
//! In:   losses of chunks, in order      Out: losses for lines; numbers of those that have none
//! Holds: as many losses as the log takes lines now, and those that always have theirs; rows of them up to [`ROWS_BYTES`], others are
//!        read back from the journal
//! Invariants: what is not kept is counted, and counted once: what is met again in another try is not carried into it
//! On crash: met again
//! Not here: how many lines the log takes, writing them (`super::super::ledger`)

use std::collections::HashSet;

use super::super::loss::{Counts, Loser, Loss};

/// Bytes of rows, about, that are kept in memory for lines.
const ROWS_BYTES: usize = 32 << 20;

#[derive(Default)]
pub(super) struct Carried {
    losses: Vec<Loss>,
    /// Those that another try meets again.
    met_again: Vec<Loss>,
    /// How many of both need not have a line.
    spare: usize,
    /// Bytes of their rows, about.
    bytes: usize,
    /// More of those than this get none.
    lines_max: usize,
    /// What has no line: what is not met again, and what is.
    counted: Counts,
    counted_again: Counts,
}

impl Carried {
    /// No more than so many lines can be written at the end of this try.
    pub(super) const fn set_lines(&mut self, lines_max: usize) {
        self.lines_max = lines_max;
    }

    /// Takes what a transaction without chunks has lost, in place of all: as much as is in memory anyway.
    pub(super) fn replace(&mut self, losses: Vec<Loss>) {
        *self = Self {
            losses,
            lines_max: self.lines_max,
            ..Self::default()
        };
    }

    /// Takes losses of a large transaction; `is_met_again` tells of one that another try meets again if it is one of the
    /// transaction's own writes that lost.
    pub(super) fn add(&mut self, losses: Vec<Loss>, is_met_again: impl Fn(&Loss) -> bool) {
        for mut loss in losses {
            let again = loss.loser == Loser::Remote && is_met_again(&loss);
            if !loss.is_whole() {
                if self.spare >= self.lines_max {
                    let counts = if again {
                        &mut self.counted_again
                    } else {
                        &mut self.counted
                    };
                    counts.add(&loss);
                    continue;
                }
                self.spare += 1;
            }
            if self.bytes >= ROWS_BYTES {
                loss.shed_rows();
            }
            loss.detach();
            self.bytes += loss.bytes();
            let kept = if again {
                &mut self.met_again
            } else {
                &mut self.losses
            };
            kept.push(loss);
        }
    }

    /// Gives what another try does not meet again, or not for certain: once.
    pub(super) fn begin_again(&mut self) -> Vec<Loss> {
        self.met_again.clear();
        self.counted_again = Counts::default();
        (self.spare, self.bytes) = (0, 0);
        let mut known = HashSet::new();
        let mut losses = std::mem::take(&mut self.losses);
        losses.retain(|loss| {
            loss.is_whole() || known.insert((loss.key.clone(), loss.losing().map(|of| of.stamp)))
        });
        losses
    }

    pub(super) fn losses(&self) -> impl Iterator<Item = &Loss> {
        self.losses.iter().chain(&self.met_again)
    }

    /// Those that are not among [`Self::losses`].
    pub(super) fn counts(&self) -> Counts {
        let mut all = self.counted.clone();
        all.join(&self.counted_again);
        all
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anabranch_conflict::{ConflictType, Kind, Resolution, Version};
    use anabranch_proto::row::{Cell, RowImage};
    use anabranch_proto::schema::TableDesc;
    use anabranch_proto::stamp::NTP64;
    use anabranch_proto::{NodeId, Position, Stamp};
    use bytes::Bytes;

    use super::super::super::loss::{KeyFrom, Refusal, Tuple};
    use super::*;
    use crate::index::{RowKey, TableId};

    fn version(node: u16, time: u64) -> Version {
        Version {
            stamp: Stamp {
                time: NTP64(time),
                node: NodeId(node),
            },
            position: Position::new(1, time),
            kind: Kind::Put,
        }
    }

    /// A row of so many bytes that lost, of this node's or another's.
    fn loss(at: u32, loser: Loser, bytes: usize) -> Loss {
        let table = Arc::new(TableDesc {
            schema: "s".to_owned(),
            name: "t".to_owned(),
            columns: Vec::new(),
            key: Vec::new(),
            identity_full: false,
        });
        let row = RowImage::build([Cell::Binary(&vec![7; bytes])].into_iter());
        Loss {
            table: Arc::clone(&table),
            key: RowKey::from_canonical(TableId(1), &at.to_be_bytes()),
            key_from: KeyFrom::Row(row.clone()),
            kind: ConflictType::UpdateOriginDiffers,
            resolution: Resolution::ApplyRemote,
            loser,
            local: Some(version(1, 5)),
            remote: Some(version(2, 9)),
            local_tuple: Tuple::Json("{}".to_owned()),
            remote_tuple: Tuple::Image(table, row),
            refusal: None,
            is_decoded: false,
            lost_columns: None,
            reason: None,
        }
    }

    #[test]
    fn more_than_the_log_takes_is_counted_and_what_must_have_a_line_is_kept() {
        let mut carried = Carried::default();
        carried.set_lines(10);
        for some in 0..5 {
            let losses = |loser| (0..10).map(move |at| loss(some * 20 + at, loser, 10));
            let both = losses(Loser::Local).chain(losses(Loser::Remote));
            carried.add(both.collect(), |_| true);
        }
        let mut refused = loss(1_000, Loser::Remote, 10);
        refused.refusal = Some(Refusal::claimed("k"));
        carried.add(vec![refused], |_| false);
        assert_eq!(carried.losses().count(), 11);
        assert_eq!(carried.counts().total(), 90);
        // In another try what it loses to is met again; what it has beaten is not.
        let kept = carried.begin_again();
        assert_eq!(kept.len(), 11);
        assert_eq!(carried.counts().total(), 40);
        carried.add(kept, |_| true);
        carried.add((0..50).map(|at| loss(at, Loser::Remote, 10)).collect(), |_| true);
        assert_eq!(carried.losses().count(), 11);
        assert_eq!(carried.counts().total(), 90);
        // What may be met again or not is kept, once.
        let mut unsure = Carried::default();
        unsure.set_lines(100);
        for _ in 0..3 {
            let kept = unsure.begin_again();
            unsure.add(kept, |_| false);
            unsure.add((0..10).map(|at| loss(at, Loser::Remote, 10)).collect(), |_| false);
        }
        assert_eq!(unsure.begin_again().len(), 10);
    }

    #[test]
    fn a_row_that_is_kept_does_not_keep_the_frame_that_it_came_in() {
        let frame = Bytes::from(vec![0_u8; 1 << 20]);
        let slice = frame.slice(..2);
        let row = RowImage::parse(slice, 0).unwrap();
        assert_eq!(row.as_bytes().as_ptr(), frame.as_ptr());
        let mut lost = loss(1, Loser::Remote, 10);
        lost.key_from = KeyFrom::Row(row.clone());
        lost.remote_tuple = Tuple::Image(Arc::clone(&lost.table), row);
        let mut carried = Carried::default();
        carried.set_lines(10);
        carried.add(vec![lost], |_| true);
        assert!(frame.is_unique(), "nobody else has a part of it");
        assert_eq!(carried.losses().count(), 1);
    }

    #[test]
    fn rows_past_a_bound_are_read_back_from_the_journal() {
        let mut carried = Carried::default();
        carried.set_lines(usize::MAX);
        carried.add(
            (0..100).map(|at| loss(at, Loser::Local, 1 << 20)).collect(),
            |_| true,
        );
        let in_memory = |loss: &&Loss| matches!(loss.remote_tuple, Tuple::Image(..));
        let in_memory = carried.losses().filter(in_memory).count();
        assert!((10..40).contains(&in_memory), "{in_memory}");
        let last = carried.losses().last().unwrap();
        assert!(matches!(last.remote_tuple, Tuple::Journal(of) if of == version(2, 9)));
        assert!(matches!(last.local_tuple, Tuple::Journal(of) if of == version(1, 5)));
        assert!(matches!(last.key_from, KeyFrom::Canonical));
        assert_eq!(carried.counts().total(), 0);
    }
}
