//! Deletes rows that lost their parents, or brings these back, where their table's policy is `foreign_keys = "delete_child"` or
//! `"restore_parent"`.
//!
//! In:   lines of the conflict log that are open, written by the applier        Out: ordinary local transactions
//! Invariants: 1. of all nodes only one mends a row: the one that wrote it (or, where the line names no version of the row,
//!        the one that deleted its parent); all have the same line, so they agree which; and of several that wrote children of one
//!        parent one alone brings it back ([`turn`]); 2. it is mended only once every
//!        member is known to have met both it and the removal of its parent, of the line and as they are by then ([`met`]): so each has
//!        a line, and in it the row; 3. and only
//!        while it has no parent, in one transaction with the note on its line; 4. that is a write of the node's own: it has
//!        a stamp, it travels, and what it meets is decided as ever. So the applier, which writes what others decided, never does it;
//!        5. each pass looks at all open lines: what cannot be mended holds up nothing behind it
//! On crash: the line is open or has its note; what is open is looked at after the start
//! Not here: finding the rows, and what their parents were (`crate::apply`)

mod met;
mod restore;
mod turn;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId, Vector};
use tokio::time::Instant;
use tokio_postgres::{Client, Row, Transaction};

use self::met::{Looked, Met, Seen, Tables};
use self::restore::Restored;
use self::turn::{Turn, Turns};
use crate::apply::foreign::{self, ForeignKey};
use crate::config::Config;
use crate::pg;
use crate::review::Error;
use crate::setup::conflict_log::{TO_DO, WRITER};
use crate::setup::sql::{ident, qualified};
use crate::shared::{Shared, lock};

/// Between two tries of what could not be done.
const AGAIN: Duration = Duration::from_secs(5);

/// Between two looks at what other members have met.
const SOON: Duration = Duration::from_secs(1);

/// After a pass that took long, at most.
const LATE: Duration = Duration::from_secs(60);

/// Lines that are read at once.
const SOME: i64 = 500;

const ALARM: &str = "orphans";

/// The parent's key, in the words of a line without the names of the child's columns: `)=(7) is not present in table public.orders.`
/// (Where columns are redacted it is not told: all such lines are taken for lines of one parent.)
const PARENT: &str = "coalesce(substr(error ->> 'detail', strpos(error ->> 'detail', ')=(')), '')";

/// As JSON, or as its text.
const PARENTS: &str = "CASE jsonb_typeof(error -> 'parents') WHEN 'string' THEN error ->> 'parents' WHEN 'null' THEN NULL \
    ELSE (error -> 'parents')::text END";

/// Where a pass begins: before all lines.
const START: (&str, &str) = ("-infinity", "00000000-0000-0000-0000-000000000000");

/// Whoever reviews a line, or works it off, has it alone.
const LOCK: &str = "SELECT FROM anabranch.conflict_history WHERE conflict_id = $1::text::uuid AND status = 'new' \
    AND note IS NULL FOR UPDATE";

/// The note of a row that is not deleted.
const KEPT: &str = "not deleted: the row has a parent, or is gone";

const NOTE: &str = "UPDATE anabranch.conflict_history SET note = $2 WHERE conflict_id = $1::text::uuid";

struct Line {
    id: String,
    schema: String,
    table: String,
    key: String,
    constraint: String,
    /// Who mends it.
    writer: NodeId,
    /// Origins of the row and of the removal of its parent, as far as they are known, and the places in their WAL.
    writes: Vec<(NodeId, Lsn)>,
    /// Is the parent to come back, or the row to go?
    restores: bool,
    /// Rows to be inserted for that, as JSON. Only the writer's own line has them.
    parents: Option<String>,
    /// Which parent it is: see [`PARENT`].
    parent: String,
    detected_at: String,
    /// The same, in seconds.
    detected: f64,
}

impl Line {
    /// The row: its table, and its key in that.
    fn row(&self) -> [&str; 3] {
        [&self.schema, &self.table, &self.key]
    }

    /// Is the row that of `later`, a line of this node's, which was found after this? It had its parent again in between then: this
    /// node wrote it since, which needs the parent, and rows are found when they lose theirs.
    fn is_before(&self, later: &Self) -> bool {
        self.detected < later.detected && self.row() == later.row()
    }

    /// Is the row that of `other`, which was found before this and has lost the same parent, or another one by the same key? Who wrote that
    /// line's version leaves the row to who wrote this one's.
    fn comes_after(&self, other: &Self) -> bool {
        other.is_before(self) && self.constraint == other.constraint
    }
}

/// What is left of the open lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Nothing,
    /// It has been another one's turn for longer than that should take.
    Long,
    /// Some member is not known to have met all of it, or it is another one's turn.
    Waiting,
    /// It could not be done.
    Refused,
}

/// What a pass says of rows that are not mended: of one, and how many they are.
#[derive(Debug, Default)]
struct Said {
    text: Option<String>,
    count: usize,
}

impl Said {
    fn add(&mut self, text: impl FnOnce() -> String) {
        self.text.get_or_insert_with(text);
        self.count += 1;
    }

    /// Raises the alarm, which goes to the log when it says something new; or clears it.
    fn tell(self, shared: &Shared) {
        let Some(text) = self.text else {
            shared.alarms.clear(ALARM);
            return;
        };
        let text = match self.count.saturating_sub(1) {
            0 => text,
            more => format!("{text} (and {more} more rows are not mended)"),
        };
        shared.alarms.raise(ALARM, text);
    }
}

/// Have all members applied these places? They do not say their timelines, and those of an earlier one may be the higher ones: so that counts
/// only once everybody is known to have applied something of each node's last timeline, which is in `reached`.
fn are_met(places: &[(NodeId, Lsn)], stable: &Vector, reached: &Vector) -> bool {
    places.iter().all(|(node, lsn)| {
        let known = stable.get(*node);
        known.epoch >= reached.get(*node).epoch && known.lsn >= *lsn
    })
}

/// Works lines off until the task is ended: those that are there, and those that come.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    let mut client: Option<Client> = None;
    let (mut turns, mut seen) = (Turns::default(), Seen::new());
    loop {
        let begun = Instant::now();
        let pause = match pass(&config, &shared, &mut client, (&mut turns, &mut seen)).await {
            Ok(Left::Nothing) => {
                (turns, seen) = (Turns::default(), Seen::new());
                shared.orphans.notified().await;
                continue;
            }
            Ok(Left::Waiting) => SOON,
            Ok(Left::Long | Left::Refused) => AGAIN,
            Err(error) => {
                tracing::warn!(%error, "mending rows without their parents, trying again");
                client = None;
                AGAIN
            }
        };
        // Where there are very many it is not looking at them all the time.
        let rest = begun.elapsed().min(LATE);
        tokio::time::sleep(pause.max(rest)).await;
    }
}

/// Looks at all that is open once, and works off what may be.
async fn pass(
    config: &Config,
    shared: &Shared,
    client: &mut Option<Client>,
    (turns, seen): (&mut Turns, &mut Seen),
) -> Result<Left, Error> {
    let session = match client.take().filter(|client| !client.is_closed()) {
        Some(session) => client.insert(session),
        None => client.insert(connect(config).await?),
    };
    let (mut left, mut said) = (Left::Nothing, Said::default());
    // Parents that this pass has found to be left to another member.
    let mut left_to: HashMap<String, NodeId> = HashMap::new();
    let mut after = (START.0.to_owned(), START.1.to_owned());
    loop {
        let lines = own_lines(session, shared, &after).await?;
        let Some(last) = lines.last() else { break };
        after = (last.detected_at.clone(), last.id.clone());
        let stable = lock(&shared.stability).stable();
        let mut reached = shared.applied.borrow().clone();
        reached.raise(shared.node, *shared.own.borrow());
        let (met, unmet): (Vec<&Line>, Vec<&Line>) = lines
            .iter()
            .partition(|line| are_met(&line.writes, &stable, &reached));
        if !unmet.is_empty() {
            left = left.max(Left::Waiting);
        }
        if met.is_empty() {
            continue;
        }
        let keys = foreign::load(session).await?;
        let live = lock(&shared.members).live();
        let rivals = rivals(session, shared.node, &live, &met).await?;
        let restoring = met.iter().copied().filter(|line| line.restores);
        let of_rows: BTreeSet<[&str; 3]> = restoring
            .chain(rivals.values().flatten())
            .map(Line::row)
            .collect();
        let again = again(session, shared.node, &live, &of_rows).await?;
        // Of such a row not all of the lines count: see [`Line::is_before`] and [`Line::comes_after`].
        let rows = rivals.values().flatten().chain(&again);
        let rows: HashSet<[&str; 3]> = rows
            .filter(|line| line.writer != shared.node)
            .map(Line::row)
            .collect();
        let mut tables = Tables::new();
        for line in met {
            let is_alone = !rows.contains(&line.row());
            let known = left_to.get(&line.parent).copied();
            let known = known.filter(|_| line.restores && is_alone);
            let turn = Turn {
                turns: &mut *turns,
                rivals: rivals.get(&line.parent).map_or(&[], Vec::as_slice),
                again: &again,
                stable: &stable,
                reached: &reached,
                own: shared.node,
                live: &live,
            };
            let by_all = Met {
                shared,
                stable: &stable,
                reached: &reached,
                live: &live,
                tables: &mut tables,
                seen: &mut *seen,
            };
            let mended = match known {
                Some(node) => Ok(Mended::LeftTo(node)),
                None => mend(session, line, &keys, turn, by_all).await,
            };
            let why = match mended {
                Ok(Mended::Done) => {
                    seen.remove(&line.id);
                    continue;
                }
                Ok(Mended::NotMet) => {
                    left = left.max(Left::Waiting);
                    continue;
                }
                Ok(Mended::LeftTo(node)) => {
                    // Where it is not told which parent it is, the next line may have another one; and it may be this row's writer alone.
                    if !line.parent.is_empty() && is_alone {
                        left_to.insert(line.parent.clone(), node);
                    }
                    if !turns.is_long(&line.id) {
                        left = left.max(Left::Waiting);
                        continue;
                    }
                    left = left.max(Left::Long);
                    let name = lock(&shared.members).name(node);
                    let what = if is_alone {
                        "another row of that parent"
                    } else {
                        "it or another row of that parent"
                    };
                    format!("waits for node {name}, which wrote {what}, to bring it back")
                }
                Err(error) if session.is_closed() => return Err(error),
                // Of this row alone, such as a trigger's or a lock's: the others are not held up.
                Err(error) => {
                    left = Left::Refused;
                    match line.restores {
                        true => format!("cannot have it back yet: {error}"),
                        false => format!("cannot be deleted yet: {error}"),
                    }
                }
            };
            said.add(|| {
                let (table, key) = (qualified(&line.schema, &line.table), &line.key);
                let what = if line.restores {
                    "whose parent is gone"
                } else {
                    "which lost its parent"
                };
                format!("row {key} of {table}, {what}, {why}")
            });
        }
    }
    said.tell(shared);
    Ok(left)
}

/// A session that waits for nobody for long.
async fn connect(config: &Config) -> Result<Client, Error> {
    let client = pg::connect(&config.postgres, "orphans").await?.0;
    let settings = "SET lock_timeout = '2s'; SET synchronous_commit = local";
    client.batch_execute(settings).await?;
    client.batch_execute(pg::AS_A_USER).await?;
    Ok(client)
}

/// The statement that reads open lines, with one condition more.
fn select(condition: &str) -> String {
    format!(
        "SELECT conflict_id::text, schema_name, table_name, key::text, constraint_name, \
         local_origin, (local_lsn - '0/0')::int8, remote_origin, (remote_lsn - '0/0')::int8, \
         conflict_resolution = 'restore_parent', {PARENTS}, {PARENT}, detected_at::text, {WRITER}, \
         extract(epoch FROM detected_at)::float8 \
         FROM anabranch.conflict_history WHERE {TO_DO} AND {condition}"
    )
}

/// Open lines of rows that this node is to mend, behind a place.
async fn own_lines(session: &Client, shared: &Shared, after: &(String, String)) -> Result<Vec<Line>, Error> {
    let sql = select(&format!(
        "{WRITER} = $1 AND (detected_at, conflict_id) > ($2::text::timestamptz, $3::text::uuid) \
         ORDER BY detected_at, conflict_id LIMIT $4"
    ));
    let node = i32::from(shared.node.0);
    let rows = session.query(&sql, &[&node, &after.0, &after.1, &SOME]).await?;
    rows.iter().map(read).collect()
}

/// Open lines of members before this one, of rows that had the same parents as these lines': by parent, and in their order.
async fn rivals(
    session: &Client,
    own: NodeId,
    live: &BTreeSet<NodeId>,
    lines: &[&Line],
) -> Result<HashMap<String, Vec<Line>>, Error> {
    let restoring = lines.iter().filter(|line| line.restores);
    let parents: Vec<&str> = restoring.map(|line| line.parent.as_str()).collect();
    let mut out: HashMap<String, Vec<Line>> = HashMap::new();
    if parents.is_empty() {
        return Ok(out);
    }
    let sql = select(&format!(
        "conflict_resolution = 'restore_parent' AND {WRITER} < $1 AND {PARENT} = ANY ($2::text[]) \
         ORDER BY {WRITER}, conflict_id"
    ));
    for row in session.query(&sql, &[&i32::from(own.0), &parents]).await? {
        let line = read(&row)?;
        // What a dropped one wrote is all here.
        if live.contains(&line.writer) {
            out.entry(line.parent.clone()).or_default().push(line);
        }
    }
    Ok(out)
}

/// Open lines of these rows, of this node and of other members, by which parents come back.
async fn again(
    session: &Client,
    own: NodeId,
    live: &BTreeSet<NodeId>,
    rows: &BTreeSet<[&str; 3]>,
) -> Result<Vec<Line>, Error> {
    let mut out = Vec::new();
    if rows.is_empty() {
        return Ok(out);
    }
    let part = |at: usize| {
        rows.iter()
            .filter_map(|row| row.get(at).copied())
            .collect::<Vec<&str>>()
    };
    let sql = select(
        "conflict_resolution = 'restore_parent' AND (schema_name, table_name, key::text) IN \
         (SELECT * FROM unnest($1::text[], $2::text[], $3::text[]))",
    );
    for row in session.query(&sql, &[&part(0), &part(1), &part(2)]).await? {
        let line = read(&row)?;
        if line.writer == own || live.contains(&line.writer) {
            out.push(line);
        }
    }
    Ok(out)
}

fn read(row: &Row) -> Result<Line, Error> {
    let node = |at: usize| -> Result<Option<NodeId>, Error> {
        let id: Option<i32> = row.try_get(at)?;
        Ok(id.and_then(|id| u16::try_from(id).ok()).map(NodeId))
    };
    let mut writes = Vec::new();
    for at in [5, 7] {
        let lsn: Option<i64> = row.try_get(at + 1)?;
        if let (Some(origin), Some(lsn)) = (node(at)?, lsn.and_then(|lsn| u64::try_from(lsn).ok())) {
            writes.push((origin, Lsn(lsn)));
        }
    }
    Ok(Line {
        writes,
        id: row.try_get(0)?,
        schema: row.try_get(1)?,
        table: row.try_get(2)?,
        key: row.try_get(3)?,
        constraint: row.try_get::<_, Option<String>>(4)?.unwrap_or_default(),
        writer: node(13)?.unwrap_or(NodeId(0)),
        restores: row.try_get(9)?,
        parents: row.try_get(10)?,
        parent: row.try_get(11)?,
        detected_at: row.try_get(12)?,
        detected: row.try_get(14)?,
    })
}

/// The foreign key that a line is about, if it is there still.
fn key_of<'k>(line: &Line, keys: &'k [ForeignKey]) -> Option<&'k ForeignKey> {
    let is_child = |key: &&ForeignKey| {
        let mut children = key.children.iter();
        children.any(|(schema, table)| (schema, table) == (&line.schema, &line.table))
    };
    let mut named = keys.iter().filter(|key| key.name == line.constraint);
    named.find(is_child)
}

/// What became of a line that may be worked off.
enum Mended {
    /// It is done with.
    Done,
    /// Its row is left to this member.
    LeftTo(NodeId),
    /// Its row is another version by now, or has lost its parent once more, and not all are known to have met that.
    NotMet,
}

/// Mends a line's row.
async fn mend(
    session: &mut Client,
    line: &Line,
    keys: &[ForeignKey],
    turn: Turn<'_>,
    mut by_all: Met<'_>,
) -> Result<Mended, Error> {
    let transaction = session.transaction().await?;
    if transaction.query_opt(LOCK, &[&line.id]).await?.is_none() {
        // Somebody has reviewed it meanwhile.
        return Ok(Mended::Done);
    }
    let note = match key_of(line, keys) {
        None if line.restores => "not restored: the foreign key is not there any more",
        None => "not deleted: the foreign key is not there any more",
        Some(key) => match Box::pin(by_all.look(&transaction, line, key)).await? {
            Looked::Unmet => return Ok(Mended::NotMet),
            Looked::Kept if line.restores => restore::KEPT,
            Looked::Kept => KEPT,
            Looked::Met if line.restores => {
                match restore::restore(&transaction, line, key, keys, turn).await? {
                    Restored::Noted(note) => note,
                    Restored::LeftTo(node) => return Ok(Mended::LeftTo(node)),
                }
            }
            Looked::Met => delete(&transaction, line, key).await?,
        },
    };
    transaction.execute(NOTE, &[&line.id, &note]).await?;
    transaction.commit().await?;
    tracing::info!(
        id = line.id,
        constraint = line.constraint,
        "a row that lost its parent: {note}"
    );
    Ok(Mended::Done)
}

/// Deletes the row while it has no parent. Gives the note for its line.
async fn delete(transaction: &Transaction<'_>, line: &Line, key: &ForeignKey) -> Result<&'static str, Error> {
    let Some(orphan) = orphan(transaction, line, key).await? else {
        return Ok("not deleted: the row's key is redacted in the log");
    };
    transaction.batch_execute(pg::AS_USERS).await?;
    let sql = format!(
        "DELETE FROM ONLY {} AS t WHERE {orphan}",
        qualified(&line.schema, &line.table)
    );
    Ok(match transaction.execute(&sql, &[&line.key]).await? {
        0 => KEPT,
        _ => "deleted here",
    })
}

/// Columns of a table with their types, as `jsonb_to_record` is told of them.
const COLUMNS: &str = "SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum) \
    FROM pg_attribute AS a WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped \
    AND a.attname::text = ANY ($2::text[])";

/// `t` is the line's row, whose key is parameter 1, and has no parent. None: nobody knows which row it is.
async fn orphan(
    transaction: &Transaction<'_>,
    line: &Line,
    key: &ForeignKey,
) -> Result<Option<String>, Error> {
    let columns: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&line.key)?;
    if columns.is_empty() {
        return Ok(None);
    }
    let names = |alias: &str| {
        let each = columns.keys().map(|name| format!("{alias}.{}", ident(name)));
        each.collect::<Vec<_>>().join(", ")
    };
    let table = qualified(&line.schema, &line.table);
    let named: Vec<&String> = columns.keys().collect();
    let typed = transaction.query_one(COLUMNS, &[&table, &named]).await?;
    let Some(typed) = typed.try_get::<_, Option<String>>(0)? else {
        let text = format!("table {table} has no column of the row's key any more");
        return Err(Error::Refused(text));
    };
    // Not as a row of the table: a domain may refuse NULL for the other columns.
    Ok(Some(format!(
        "({}) OPERATOR(pg_catalog.=) (SELECT {} FROM pg_catalog.jsonb_to_record($1::text::jsonb) AS k ({typed})) \
         AND {} AND NOT EXISTS (SELECT {})",
        names("t"),
        names("k"),
        key.refers("t"),
        key.parent_of("t")
    )))
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Position;

    use super::*;

    #[test]
    fn a_place_is_met_once_all_have_applied_it_on_its_nodes_last_timeline() {
        let node = NodeId(1);
        let at = |epoch: u32, lsn: u64| {
            let mut vector = Vector::new();
            vector.raise(node, Position::new(epoch, lsn));
            vector
        };
        let met = |lsn, stable: &Vector, reached: &Vector| are_met(&[(node, Lsn(lsn))], stable, reached);
        assert!(met(100, &at(1, 100), &at(1, 500)) && !met(101, &at(1, 100), &at(1, 500)));
        // Of a server that was promoted: its places begin below those of the one before.
        assert!(!met(100, &at(1, 500), &at(2, 100)));
        assert!(met(100, &at(2, 100), &at(2, 100)));
        assert!(are_met(&[], &Vector::new(), &at(1, 1)));
    }

    fn line(key: &str, constraint: &str, detected: f64) -> Line {
        Line {
            id: String::new(),
            schema: "public".to_owned(),
            table: "child".to_owned(),
            key: key.to_owned(),
            constraint: constraint.to_owned(),
            writer: NodeId(1),
            writes: Vec::new(),
            restores: true,
            parents: None,
            parent: String::new(),
            detected_at: String::new(),
            detected,
        }
    }

    #[test]
    fn a_row_is_left_to_a_later_line_of_it_and_of_the_same_foreign_key() {
        let (first, second) = (line("{}", "a", 1.0), line("{}", "a", 2.0));
        assert!(second.comes_after(&first) && !first.comes_after(&second) && !first.comes_after(&first));
        // Its other parent may be gone for the one and not for the other.
        assert!(!line("{}", "b", 2.0).comes_after(&first));
        assert!(!line("{\"id\": 1}", "a", 2.0).comes_after(&first));
    }
}
