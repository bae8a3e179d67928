//! The visibility gate: own transactions that others cannot see here yet, and what waits for them.
//!
//! In:   `synchronous_standby_names`, own transactions as they are decoded, snapshots      Out: up to where they may be sent, or answered
//! Holds: nothing; the queue is in [`Shared`], and is bounded by the sessions that wait, whatever is committed meanwhile
//! Invariants: 1. it is known what must wait before anything is decoded, in every life of the stages; 2. in order: what
//!                is visible waits for what was committed before it
//! On crash: [`begin`] asks anew which of what the journal holds are not visible
//! Not here: who sends (`crate::link`) and who answers (`crate::apply`)

use std::collections::VecDeque;

use anabranch_proto::{Lsn, Position};
use tokio_postgres::{Client, Statement};

use super::Error;
use crate::broken::{self, Rule};
use crate::pg::xid::{self, Snapshot};
use crate::shared::{Shared, UNSEEN_MAX, Unseen, Visibility, lock};

/// The gate is open: everything may be sent.
const OPEN: Position = Position {
    epoch: u32::MAX,
    lsn: Lsn(u64::MAX),
};

/// What must wait until a local transaction is visible (`docs/design.md` section 3).
fn wanted(synchronous_standby_names: &str) -> Visibility {
    if synchronous_standby_names.trim().is_empty() || broken::is(Rule::VisibilityGate) {
        Visibility::Prompt
    } else if names(synchronous_standby_names).iter().any(|name| is_ours(name)) {
        // Were it not sent, we could never acknowledge it.
        Visibility::BeforeDependents
    } else {
        Visibility::BeforeSending
    }
}

/// What the decoder's connection is called at the server (`crate::source`).
const OURS: &str = "anabranch:decode";

/// Would the server take the decoder for this standby? It goes by the name, whatever its case, and `*` is anybody.
fn is_ours(standby: &str) -> bool {
    standby == "*" || standby.eq_ignore_ascii_case(OURS)
}

/// What the setting lists, as the server reads it: words, and what is in double quotes. `FIRST`, `ANY` and numbers are among it and
/// name nobody.
fn names(setting: &str) -> Vec<String> {
    let is_between = |c: char| c.is_whitespace() || matches!(c, '(' | ')' | ',');
    let mut names = Vec::new();
    let mut chars = setting.chars().peekable();
    while let Some(first) = chars.next() {
        let mut name = String::new();
        if first == '"' {
            while let Some(c) = chars.next() {
                if c != '"' || chars.next_if_eq(&'"').is_some() {
                    name.push(c);
                } else {
                    break;
                }
            }
        } else if is_between(first) {
            continue;
        } else {
            name.push(first);
            while let Some(c) = chars.next_if(|&c| c != '"' && !is_between(c)) {
                name.push(c);
            }
        }
        names.push(name);
    }
    names
}

/// Before the journal is read and the slot decoded: what must wait, and which transactions had not ended, if any must. Under
/// [`Visibility::BeforeSending`] nothing may be sent until it is known to be visible.
///
/// # Errors
/// When a statement fails.
pub(super) async fn begin(sql: &Client, shared: &Shared) -> Result<Option<xid::Running>, Error> {
    let names = "SELECT current_setting('synchronous_standby_names')";
    let wanted = wanted(sql.query_one(names, &[]).await?.try_get(0)?);
    if wanted == Visibility::Prompt {
        return Ok(None);
    }
    say(wanted);
    if wanted == Visibility::BeforeSending {
        shared.sendable.send_replace(Position::ZERO);
    }
    shared.visibility.send_replace(wanted);
    Ok(Some(xid::Running::now(sql).await?))
}

/// The setting was read again.
pub(super) fn switch(shared: &Shared, synchronous_standby_names: &str) {
    let wanted = wanted(synchronous_standby_names);
    if wanted == *shared.visibility.borrow() {
        return;
    }
    say(wanted);
    shared.visibility.send_replace(wanted);
    shared
        .sendable
        .send_replace(if wanted == Visibility::BeforeSending {
            *shared.own.borrow()
        } else {
            OPEN
        });
    if wanted != Visibility::BeforeDependents {
        shared.held_by_waiting_commit.send_replace(false);
    }
    shared.found.notify_one();
}

fn say(visibility: Visibility) {
    match visibility {
        Visibility::Prompt => tracing::info!("no standby is synchronous"),
        Visibility::BeforeSending => {
            tracing::info!("a standby is synchronous: transactions are sent once they are visible here");
        }
        Visibility::BeforeDependents => {
            tracing::info!("commits may wait for the peers to apply them: what answers them waits here, too");
        }
    }
}

/// Who looks what is visible by now, where that is wanted more often than a horizon tells it.
pub(super) struct Gate {
    now: Statement,
}

impl Gate {
    /// `sql`: the session to ask, always the same.
    ///
    /// # Errors
    /// When the statement cannot be prepared.
    pub(super) async fn open(sql: &Client) -> Result<Self, Error> {
        Ok(Self {
            now: sql.prepare(xid::NOW).await?,
        })
    }

    /// Asks what is visible, if anything waits, and lets go what waited for that.
    ///
    /// # Errors
    /// When the query fails.
    pub(super) async fn look(&self, sql: &Client, shared: &Shared) -> Result<(), Error> {
        if nothing_waits(shared) {
            return Ok(());
        }
        let row = sql.query_one(&self.now, &[]).await?;
        if let Some(snapshot) = Snapshot::parse(row.try_get(0)?) {
            let_go(shared, &snapshot);
        }
        Ok(())
    }
}

/// Lets go what waited for own transactions that `snapshot` shows, in order. However many wait, the server is asked for nothing but that.
pub(super) fn let_go(shared: &Shared, snapshot: &Snapshot) {
    if !nothing_waits(shared) {
        let_go_decoded(shared, snapshot);
    }
}

/// The same at a start, while own transactions that the journal has are decoded again: that none waits does not say that all
/// are visible.
pub(super) fn let_go_decoded(shared: &Shared, snapshot: &Snapshot) {
    let last = {
        let mut unseen = lock(&shared.unseen);
        let seen = unseen.iter().take_while(|txn| snapshot.shows(txn.xid)).count();
        let last = unseen.drain(..seen).next_back();
        // Behind a commit that waits for a standby others go on that do not wait for it.
        if unseen.len() >= UNSEEN_MAX {
            keep_hidden(&mut unseen, snapshot);
        }
        last
    };
    let Some(last) = last else { return };
    open_up_to(shared, last.through);
    if *shared.visibility.borrow() == Visibility::BeforeDependents {
        shared.found.notify_one();
    }
}

/// Of transactions of which the first is not visible keeps those alone that `snapshot` does not show. Each of these has a
/// session that waits with it, so they are few.
fn keep_hidden(unseen: &mut VecDeque<Unseen>, snapshot: &Snapshot) {
    let mut hidden: VecDeque<Unseen> = VecDeque::new();
    for txn in unseen.drain(..) {
        match hidden.back_mut() {
            Some(before) if snapshot.shows(txn.xid) => before.through = txn.through,
            _ => hidden.push_back(txn),
        }
    }
    *unseen = hidden;
}

/// Are all own transactions known to be visible? Then all that the journal has may be sent.
fn nothing_waits(shared: &Shared) -> bool {
    // In this order: a transaction is in `unseen` before `own` has reached it.
    let own = *shared.own.borrow();
    let nothing = lock(&shared.unseen).is_empty();
    if nothing {
        open_up_to(shared, own);
    }
    nothing
}

/// Own transactions up to `position` are visible. (Where the gate does not keep them from being sent, it is open wider.)
fn open_up_to(shared: &Shared, position: Position) {
    shared.sendable.send_if_modified(|sendable| {
        let higher = position > *sendable;
        *sendable = position.max(*sendable);
        higher
    });
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use anabranch_conflict::policy::Policies;
    use anabranch_proto::NodeId;

    use super::*;
    use crate::index::RowIndex;
    use crate::membership::Membership;
    use crate::resolve::Resolver;

    /// Nothing may be sent yet.
    fn shared(dir: &tempfile::TempDir) -> Shared {
        let node = NodeId(1);
        let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
        let resolver = Resolver::new(node, index, Policies::default());
        let shared = Shared::new(node, resolver, Membership::default(), &Arc::default());
        shared.visibility.send_replace(Visibility::BeforeSending);
        shared.sendable.send_replace(Position::ZERO);
        shared
    }

    fn at(lsn: u64) -> Position {
        Position::new(1, lsn)
    }

    fn decode(shared: &Shared, lsn: u64, xid: u32) {
        shared.note_decoded(Unseen {
            position: at(lsn),
            rows_at: at(lsn),
            xid,
            through: at(lsn),
        });
    }

    #[test]
    fn what_is_visible_behind_what_waits_takes_no_memory_and_is_sent_in_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(&dir);
        let most = u32::try_from(UNSEEN_MAX).unwrap();
        let last = u64::from(most);
        for xid in 1..=most {
            decode(&shared, xid.into(), xid);
        }
        let none = HashSet::new();
        let after = |end: u64, running: &str| {
            let snapshot = Snapshot::parse(&format!("1:{end}:{running}")).unwrap();
            let_go(&shared, &snapshot);
            (*shared.sendable.borrow(), shared.unseen_up_to(at(end), &none))
        };
        assert_eq!(after(last + 1, "1,7"), (Position::ZERO, vec![1, 7]));
        assert_eq!(shared.last_decoded(), at(last));
        decode(&shared, last + 1, most + 1);
        shared.decoded.send_replace(last + 1);
        // What is visible behind the first is sent with it, and not what is behind the one that still waits.
        assert_eq!(after(last + 1, "7"), (at(6), vec![7, most + 1]));
        assert!(shared.is_visible(at(6)) && !shared.is_visible(at(7)));
        assert_eq!(after(last + 1, ""), (at(last), vec![most + 1]));
        assert_eq!(after(last + 2, ""), (at(last + 1), vec![]));
    }

    #[test]
    fn at_a_start_nothing_is_let_go_that_is_not_decoded_again() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(&dir);
        // In the journal, from before.
        shared.own.send_replace(at(50));
        let after = |snapshot: &str| {
            let_go_decoded(&shared, &Snapshot::parse(snapshot).unwrap());
            (*shared.sendable.borrow(), lock(&shared.unseen).len())
        };
        assert_eq!(after("101:104:101"), (Position::ZERO, 0));
        decode(&shared, 10, 100);
        decode(&shared, 20, 101);
        assert_eq!(after("101:104:101"), (at(10), 1));
        assert_eq!(after("104:104:"), (at(20), 0));
    }

    #[test]
    fn what_is_visible_waits_for_what_was_committed_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(&dir);
        for (lsn, xid) in [(10, 100), (20, 102), (30, 101), (40, 103)] {
            decode(&shared, lsn, xid);
        }
        shared.own.send_replace(at(50));
        let after = |snapshot: &str| {
            let_go(&shared, &Snapshot::parse(snapshot).unwrap());
            (*shared.sendable.borrow(), lock(&shared.unseen).len())
        };
        assert_eq!(after("100:104:100"), (Position::ZERO, 4));
        // 103 has ended, and 102 has not.
        assert_eq!(after("102:104:102"), (at(10), 3));
        assert_eq!(after("103:103:"), (at(30), 1));
        assert_eq!(after("104:104:"), (at(40), 0));
        // None waits: all that is in the journal may be sent.
        assert_eq!(after("104:104:"), (at(50), 0));
    }

    #[test]
    fn what_waits_depends_on_who_is_waited_for() {
        assert_eq!(wanted(" "), Visibility::Prompt);
        for others in [
            "standby",
            "ANY 1 (standby, \"an, other\")",
            // On a machine of this name; and what no server takes for the decoder.
            "anabranch1",
            "\"*, standby\"",
            "\"say \"\"anabranch:decode\"\"\"",
        ] {
            assert_eq!(wanted(others), Visibility::BeforeSending, "{others}");
        }
        for ours in [
            "FIRST 2 (\"anabranch:decode\", standby)",
            "\"Anabranch:Decode\"",
            "*",
            "ANY 1(standby,*)",
            "2 (\"*\")",
        ] {
            assert_eq!(wanted(ours), Visibility::BeforeDependents, "{ours}");
        }
    }
}
