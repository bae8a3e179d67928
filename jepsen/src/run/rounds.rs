//! How often all that was known has become stable: what time is at rest. A journal lets go what lies some such rounds back
//! (docs/design.md, section 6), however long each of them takes a busy machine.
//!
//! In:   what the daemons say of themselves, again and again        Out: a count
//! Not here: asking them (`super::quiet`)

use std::collections::BTreeMap;

use anabranch_proto::Position;
use serde_json::Value;

/// Node id -> position.
type Positions = BTreeMap<u16, Position>;

/// How far one node is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Reached {
    /// What is applied there.
    applied: Positions,
    /// What it knows to be applied everywhere.
    stable: Positions,
}

impl Reached {
    /// As its daemon's status says; nothing, where there is none.
    pub(super) fn of(status: &Value) -> Self {
        let of = |name: &str| -> Positions {
            serde_json::from_value(status["positions"][name].clone()).unwrap_or_default()
        };
        Self {
            applied: of("applied"),
            stable: of("stable"),
        }
    }

    fn holds_stable(&self, all: &Positions) -> bool {
        let is_stable = |(node, position): (&u16, &Position)| {
            self.stable.get(node).is_some_and(|stable| stable >= position)
        };
        all.iter().all(is_stable)
    }
}

/// The count.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// All that was applied anywhere when the present one began.
    begun_with: Option<Positions>,
    count: u64,
}

impl Rounds {
    /// Takes how far all nodes are now. One of which nothing is known holds the round up.
    pub(super) fn look<'a>(&mut self, all: impl Iterator<Item = &'a Reached> + Clone) {
        if let Some(before) = &self.begun_with {
            if !all.clone().all(|node| node.holds_stable(before)) {
                return;
            }
            self.count += 1;
        }
        let mut now = Positions::new();
        for (&node, &position) in all.flat_map(|node| &node.applied) {
            let farthest = now.entry(node).or_insert(position);
            *farthest = position.max(*farthest);
        }
        self.begun_with = (!now.is_empty()).then_some(now);
    }

    /// So many were over by the last look.
    pub(super) fn count(&self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reached(applied: u64, stable: u64) -> Reached {
        let of = |lsn: u64| json!({"1": {"epoch": 1, "lsn": format!("0/{lsn:X}")}});
        Reached::of(&json!({"positions": {"applied": of(applied), "stable": of(stable)}}))
    }

    #[test]
    fn a_round_is_over_once_all_that_was_applied_at_its_start_is_stable_everywhere() {
        let mut rounds = Rounds::default();
        let mut look = |all: [Reached; 2]| {
            rounds.look(all.iter());
            rounds.count()
        };
        let silent = || Reached::of(&Value::Null);
        assert_eq!(look([silent(), silent()]), 0);
        assert_eq!(look([reached(5, 1), reached(3, 1)]), 0);
        assert_eq!(look([reached(9, 5), reached(9, 4)]), 0);
        assert_eq!(look([reached(9, 6), reached(9, 5)]), 1);
        assert_eq!(look([reached(20, 8), reached(20, 9)]), 1);
        assert_eq!(look([reached(20, 9), silent()]), 1);
        assert_eq!(look([reached(20, 9), reached(20, 9)]), 2);
    }
}
