//! Verify: are the rows of all nodes equal? And repair: make them so.
//!
//! In:   what an operator asks of one daemon            Out: events, and at the end a [`Report`]
//! Holds: a conversation with each node while it runs; rows of a few blocks, and watched keys, in memory
//! Invariants: 1. a difference is reported only where it is proven by a common cut of the row (below); 2. what is not
//!        decided is said to be undecided, never left out; 3. verifying writes nothing; 4. no snapshot is held for
//!        longer than [`SNAPSHOT_MAX`] and one statement
//! On crash: nothing is left behind: a conversation's sessions and watched rows end with it
//! Not here: how the questions travel (`crate::link`), how rows are mended (`crate::apply::mend`)
//!
//! # The common cut
//!
//! Nodes under load never hold the same rows at one instant, so comparing snapshots finds what is in flight beside what
//! has drifted. Snapshots serve to find *candidates* only. Every row that has drifted, and does so all the time, is
//! one: its images differ whenever each is read. Then each candidate is decided by itself, with a cut of *its* writes:
//!
//! 1. Every node *watches* the row: from then on its resolver remembers whether it meets a version of it, local or remote,
//!    or a truncate of its table. Then it waits until everything committed before is decoded, and says the vector
//!    V(n) of all that it has met, applied and framed.
//! 2. Once all have answered, every node waits until it has applied the join U of these vectors, reads the row in one
//!    snapshot, waits until everything visible in it is decoded, and says whether its watch was touched.
//!
//! Let W(n) be the versions of the row that n has met. If no watch was touched, W(n) has not changed between the two
//! steps, and all nodes were between them at one time. Each version in W(n) was written at a member m, which met it
//! before n did. It was before m's step 1, or m's watch were touched; so it is in V(m), in U, and applied at
//! every node. So all W(n) are equal *as sets of versions*, and the image read at n is what n makes of that set: nothing
//! of it is still to be committed (U is applied), to be repaired (a finding counts as a touch), refused (quarantine is
//! read in the same snapshot) or invisible (the row's local writer is looked for in the snapshot). What a row becomes is a
//! function of its set of versions under every policy (`docs/design.md` section 5). Images that differ are therefore a
//! difference that no stream will mend: no false one. It needs no two nodes to be read at one instant and no
//! writer to wait; a row that is written meanwhile is looked at again. Images that are equal, whenever they were read, are
//! no difference that lasts. A row that never has a quiet moment within the operator's patience is *undecided*.
//!
//! A barrier through all streams was the alternative: it gives one vector, but no node's table stands at it for longer than
//! an instant unless its writers or its applier are stopped, and all rows would have to be read in that instant.
//!
//! # The hash
//!
//! Rows are put into 2^bits blocks by a hash of their key's text, which no collation, no physical order and no server version
//! changes; a block's hash is the xor of its rows' hashes. So the first pass is one sequential scan at each server, in pieces,
//! and only rows of blocks that differ are read, by a second scan. Columns are taken by name, generated ones left out.

pub mod blocks;
mod decided;
mod exact;
mod fill;
pub(crate) mod newest;
mod repair;
mod run;
mod seat;
mod shape;
pub(crate) mod table;
mod talk;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use run::run;
pub use seat::Seat;
pub use talk::Talk;

/// A scan goes on with another snapshot after this.
pub const SNAPSHOT_MAX: Duration = Duration::from_secs(60);

/// What is asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// Patterns such as `schema.table`, `schema.*`, or a table's name in any schema; empty: every replicated table.
    pub tables: Vec<String>,
    /// Rows that each node reads in a second at most; 0: as fast as it can.
    pub rate: u64,
    /// A table is left once so many different rows of it are found.
    pub rows_max: u32,
    /// How long rows are looked at again that are written all the time, seconds.
    pub patience_s: u32,
    /// Mend what differs.
    pub repair: Option<Repair>,
    /// Bring rows of tables that are being added to the nodes that lack them, before they are compared. `tables` names each
    /// exactly then.
    #[serde(default)]
    pub add: Option<Add>,
}

/// Tables are added with the rows of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Add {
    /// Its name.
    pub from: String,
    /// Only look whether the nodes are ready for it.
    pub dry_run: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tables: Vec::new(),
            rate: 100_000,
            rows_max: 1_000,
            patience_s: 30,
            repair: None,
            add: None,
        }
    }
}

/// What is right where nodes differ.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Repair {
    /// Name of the node whose rows are; none: what the newest write made of each row, where a journal still tells.
    pub from: Option<String>,
    /// Say what would be done.
    pub dry_run: bool,
    /// Mend only rows that this node lacks and all others have alike: those that were deleted there unheard of
    /// (`crate::heal`). What else differs is left.
    #[serde(default)]
    pub absent_at: Option<String>,
}

/// What happens while it runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// These will be compared. Where tables are added: the nodes are ready, and it goes on once this node publishes them.
    Started {
        /// Their names.
        nodes: Vec<String>,
        /// `schema.table`.
        tables: Vec<String>,
    },
    /// A step of a table begins.
    Step {
        /// `schema.table`.
        table: String,
        /// For people.
        what: String,
        /// Rows that all nodes together will read, about; 0 where nothing is scanned.
        rows: u64,
    },
    /// So many more rows were read.
    Read {
        /// Of this table.
        table: String,
        /// At this node.
        node: String,
        /// Since the last event of the kind.
        rows: u64,
    },
    /// Not getting on.
    Waiting {
        /// For whom, and what is known of it, for people.
        on: Vec<String>,
    },
    /// So many more rows were brought, or are not to be.
    Brought {
        /// Of this table.
        table: String,
        /// Since the last event of the kind.
        rows: u64,
    },
    /// The end.
    Report(Report),
}

/// What is to be said of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All rows are equal, those in quarantine apart.
    Equal,
    /// Something differs.
    Different,
    /// Nothing that differs was found, but not everything could be compared.
    Unknown,
}

/// The result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// In one word.
    pub verdict: Verdict,
    /// Nodes that were compared.
    pub nodes: Vec<String>,
    /// Why not everything could be compared.
    pub problems: Vec<String>,
    /// Those of `problems` that are members that do not answer: nothing was begun without them.
    #[serde(default)]
    pub absent: Vec<String>,
    /// Each table.
    pub tables: Vec<TableReport>,
}

/// The result for one table.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TableReport {
    /// `schema.table`.
    pub table: String,
    /// Rows at each node, each in its own snapshot.
    pub rows: BTreeMap<String, u64>,
    /// Rows that were brought to each node, where the table was added.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub brought: BTreeMap<String, u64>,
    /// Blocks that were compared, and those of them that differed at first, changes in flight included.
    pub blocks: u64,
    /// See `blocks`.
    pub blocks_read: u64,
    /// What differs of the table itself: it is missing somewhere, or has other columns.
    pub shape: Vec<String>,
    /// Columns that have another type, length or precision somewhere. The rows that are there may be equal all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<String>,
    /// Rows that differ.
    pub differences: Vec<Difference>,
    /// Rows that differ because a node has them in quarantine.
    pub quarantined: Vec<Difference>,
    /// Keys of rows that were written all the time, as JSON.
    pub undecided: Vec<serde_json::Value>,
    /// There is more that differs: the limit of rows was reached.
    pub more: bool,
}

/// A row that differs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Difference {
    /// Its key, as JSON; a number with more digits than a double holds is a string of them.
    pub key: serde_json::Value,
    /// For each node a number, equal where the images are; none where there is no row.
    pub images: BTreeMap<String, Option<u32>>,
    /// Columns whose values differ among the nodes that have the row.
    pub columns: Vec<String>,
    /// What a repair did, or would do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub actions: Vec<Action>,
    /// Hash of the row that a repair wrote, or would write; none where that is no row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<i64>,
    /// It was mended: the row is equal everywhere now.
    #[serde(default)]
    pub mended: bool,
}

/// One write of a repair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// Where.
    pub node: String,
    /// `insert`, `update` or `delete`.
    pub what: String,
    /// Why it was not done; none where it was, or would be.
    pub refused: Option<String>,
}

impl Report {
    /// Draws the verdict from the rest.
    fn judge(&mut self) {
        let differs = |table: &TableReport| {
            !(table.shape.is_empty() && table.types.is_empty())
                || table.differences.iter().any(|difference| !difference.mended)
        };
        let open = |table: &TableReport| table.more || !table.undecided.is_empty();
        self.verdict = if self.tables.iter().any(differs) {
            Verdict::Different
        } else if !self.problems.is_empty() || self.tables.iter().any(open) {
            Verdict::Unknown
        } else {
            Verdict::Equal
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(problems: &[&str], table: TableReport) -> Verdict {
        let mut report = Report {
            verdict: Verdict::Equal,
            nodes: Vec::new(),
            problems: problems.iter().map(|&text| text.to_owned()).collect(),
            absent: Vec::new(),
            tables: vec![TableReport::default(), table],
        };
        report.judge();
        report.verdict
    }

    #[test]
    fn what_differs_outweighs_what_is_not_known_and_only_the_rest_is_equal() {
        let differs = |mended| TableReport {
            differences: vec![Difference {
                mended,
                ..Difference::default()
            }],
            ..TableReport::default()
        };
        assert_eq!(judged(&[], TableReport::default()), Verdict::Equal);
        assert_eq!(judged(&["n2 is away"], TableReport::default()), Verdict::Unknown);
        assert_eq!(judged(&["n2 is away"], differs(false)), Verdict::Different);
        assert_eq!(judged(&[], differs(true)), Verdict::Equal);
        let undecided = TableReport {
            undecided: vec![serde_json::json!({"id": 1})],
            ..TableReport::default()
        };
        assert_eq!(judged(&[], undecided), Verdict::Unknown);
        let quarantined = TableReport {
            quarantined: vec![Difference::default()],
            ..TableReport::default()
        };
        assert_eq!(judged(&[], quarantined), Verdict::Equal);
        let of_types = TableReport {
            types: vec!["column n is int4 here and text there".to_owned()],
            ..TableReport::default()
        };
        assert_eq!(judged(&[], of_types), Verdict::Different);
    }
}
