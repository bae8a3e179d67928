//! DDL of two nodes that changed one thing, neither having seen the other, and ran at both: who ran which of them last differs between the
//! nodes, and so does what is left of the two.
//!
//! In:   a statement of another node that is about to run, and has run      Out: statements that it changed something of; an alarm
//! Invariants: 1. what goes wrong here stops no statement; 2. no statement is told of another that changed other objects
//! Not here: statements that cannot be run (`parked`)
//!
//! What a statement has made is known without reading its text: a row of the catalogs says who wrote it (its xmin), and so does the
//! statement's own row in `anabranch.ddl`, which its transaction has written as well, here or when it was applied. So before a
//! statement runs, these rows of every statement that it could not have seen are read; behind it they are read again. What is gone then, or
//! has other contents, it has changed. What only counts or notes what else there is (`pg_class.relnatts`, `relhastriggers`) is left out: two
//! columns that are added to one table are no conflict, nor two keys that refer to it. A statement that changes nothing, as its `IF NOT EXISTS` finds
//! what another has made, leaves at each node what that made itself: of a relation or column its text says so, and the other text does not say the same.
//!
//! A statement may wait for a lock of a local transaction that says DDL itself. What that had made is read once it has ended and this one has run, by
//! another session: to that the catalogs are still as it left them.
//!
//! Not noticed: a statement whose row in `anabranch.ddl` was written by another transaction than itself (it came with a copy, or was done by
//! hand), or within a savepoint (its rows were applied one by one, as some were refused); and what it made, where something else has written
//! that again since; what `IF NOT EXISTS` finds of other kinds; and one that had seen something behind the
//! other's place and not its commit, which is later by as much as that transaction lasted, where the daemon was started since and the journal has it no more.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::NodeId;
use tokio_postgres::{Client, Row};

use super::ddl::{Ddl, Other};
use super::failure::Failure;
use super::fence::Fence;
use super::retyped::said;
use crate::names::Names;
use crate::pg;
use crate::shared::{Lasting, lock};

/// A catalog: its name; what tells one thing from another in it, over a change; what is compared; the object, as `pg_describe_object` wants
/// it. The row is `t`.
type Kind = (&'static str, &'static str, &'static str, &'static str);

const KINDS: [Kind; 28] = [
    // What other objects there are, where the rows are, and what Anabranch sees to by itself.
    (
        "pg_class",
        "oid",
        "to_jsonb(t) - '{relnatts,relhastriggers,relhassubclass,relhasindex,relhasrules,relchecks,relpages,reltuples,relallvisible,\
         relallfrozen,relfilenode,reltoastrelid,relfrozenxid,relminmxid,relrewrite,relreplident}'::text[]",
        "'pg_class'::regclass, oid, 0",
    ),
    (
        "pg_attribute",
        "attrelid || ' ' || attnum",
        "to_jsonb(t) - '{attcacheoff,attmissingval,atthasmissing}'::text[]",
        "'pg_class'::regclass, attrelid, attnum",
    ),
    (
        "pg_attrdef",
        "adrelid || ' ' || adnum",
        "adbin",
        "'pg_class'::regclass, adrelid, adnum",
    ),
    // Where one more comes in between is another order at each node.
    (
        "pg_enum",
        "enumtypid",
        "(SELECT string_agg(m.enumlabel, ', ' ORDER BY m.enumsortorder) FROM pg_enum m WHERE m.enumtypid = t.enumtypid)",
        "'pg_type'::regclass, enumtypid, 0",
    ),
    (
        "pg_rewrite",
        "ev_class || ' ' || rulename",
        "to_jsonb(t) - 'oid'",
        "'pg_class'::regclass, ev_class, 0",
    ),
    (
        "pg_constraint",
        "conrelid || ' ' || contypid || ' ' || conname",
        "to_jsonb(t) - '{oid,conindid,conparentid}'::text[]",
        "'pg_constraint'::regclass, oid, 0",
    ),
    (
        "pg_trigger",
        "tgrelid || ' ' || tgname",
        "to_jsonb(t) - '{oid,tgconstraint,tgconstrindid,tgparentid}'::text[]",
        "'pg_trigger'::regclass, oid, 0",
    ),
    (
        "pg_index",
        "indexrelid",
        "to_jsonb(t) - 'indcheckxmin'",
        "'pg_class'::regclass, indexrelid, 0",
    ),
    (
        "pg_sequence",
        "seqrelid",
        "to_jsonb(t)",
        "'pg_class'::regclass, seqrelid, 0",
    ),
    (
        "pg_partitioned_table",
        "partrelid",
        "to_jsonb(t) - 'partdefid'",
        "'pg_class'::regclass, partrelid, 0",
    ),
    (
        "pg_inherits",
        "inhrelid || ' ' || inhparent",
        "to_jsonb(t)",
        "'pg_class'::regclass, inhrelid, 0",
    ),
    (
        "pg_description",
        "objoid || ' ' || classoid || ' ' || objsubid",
        "description",
        "classoid, objoid, objsubid",
    ),
    (
        "pg_aggregate",
        "aggfnoid::oid",
        "to_jsonb(t)",
        "'pg_proc'::regclass, aggfnoid, 0",
    ),
    (
        "pg_range",
        "rngtypid",
        "to_jsonb(t)",
        "'pg_type'::regclass, rngtypid, 0",
    ),
    ("pg_proc", "oid", "to_jsonb(t)", "'pg_proc'::regclass, oid, 0"),
    ("pg_type", "oid", "to_jsonb(t)", "'pg_type'::regclass, oid, 0"),
    ("pg_policy", "oid", "to_jsonb(t)", "'pg_policy'::regclass, oid, 0"),
    (
        "pg_namespace",
        "oid",
        "to_jsonb(t)",
        "'pg_namespace'::regclass, oid, 0",
    ),
    (
        "pg_statistic_ext",
        "oid",
        "to_jsonb(t)",
        "'pg_statistic_ext'::regclass, oid, 0",
    ),
    (
        "pg_operator",
        "oid",
        "to_jsonb(t)",
        "'pg_operator'::regclass, oid, 0",
    ),
    (
        "pg_opclass",
        "oid",
        "to_jsonb(t)",
        "'pg_opclass'::regclass, oid, 0",
    ),
    (
        "pg_opfamily",
        "oid",
        "to_jsonb(t)",
        "'pg_opfamily'::regclass, oid, 0",
    ),
    (
        "pg_collation",
        "oid",
        "to_jsonb(t)",
        "'pg_collation'::regclass, oid, 0",
    ),
    (
        "pg_conversion",
        "oid",
        "to_jsonb(t)",
        "'pg_conversion'::regclass, oid, 0",
    ),
    ("pg_cast", "oid", "to_jsonb(t)", "'pg_cast'::regclass, oid, 0"),
    (
        "pg_ts_config",
        "oid",
        "to_jsonb(t)",
        "'pg_ts_config'::regclass, oid, 0",
    ),
    (
        "pg_ts_dict",
        "oid",
        "to_jsonb(t)",
        "'pg_ts_dict'::regclass, oid, 0",
    ),
    (
        "pg_default_acl",
        "oid",
        "to_jsonb(t)",
        "'pg_default_acl'::regclass, oid, 0",
    ),
];

/// Statements that are shown at once.
const SHOWN_MAX: usize = 5;
/// So much of a statement.
const COMMAND_MAX: usize = 200;

/// Schema and relation, of a column that as well: by what a statement names it.
fn named(catalog: &str) -> &'static str {
    match catalog {
        "pg_class" => {
            "(SELECT ARRAY[n.nspname, t.relname]::text[] FROM pg_catalog.pg_namespace n WHERE n.oid = t.relnamespace)"
        }
        "pg_attribute" => {
            "(SELECT ARRAY[n.nspname, c.relname, t.attname]::text[] FROM pg_catalog.pg_class c \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = t.attrelid)"
        }
        _ => "NULL::text[]",
    }
}

/// What these transactions have written into the catalogs.
fn written_by(xids: &BTreeSet<u32>) -> String {
    let xids: Vec<String> = xids.iter().map(u32::to_string).collect();
    let xids = xids.join(",");
    let of_one = |(catalog, key, state, object): &Kind| {
        format!(
            "SELECT '{catalog} ' || ({key}), ({state})::text, t.xmin::text, pg_describe_object({object}), {} \
             FROM pg_catalog.{catalog} t WHERE t.xmin = ANY ('{{{xids}}}'::xid[])",
            named(catalog)
        )
    };
    KINDS.iter().map(of_one).collect::<Vec<_>>().join(" UNION ALL ")
}

/// The same things as they are now.
fn now_sql() -> String {
    let of_one = |(catalog, key, state, _): &Kind| {
        format!(
            "SELECT '{catalog} ' || ({key}), ({state})::text FROM pg_catalog.{catalog} t WHERE '{catalog} ' || ({key}) = ANY ($1)"
        )
    };
    KINDS.iter().map(of_one).collect::<Vec<_>>().join(" UNION ALL ")
}

/// Something that a statement has made.
struct Made {
    state: Option<String>,
    xid: u32,
    object: String,
    /// See [`named`].
    named: Option<Vec<String>>,
}

/// What statements that this one could not have seen have made, as it was before.
pub(super) struct Before {
    /// The transactions of all of them that had ended by then.
    known: BTreeSet<u32>,
    others: Vec<Other>,
    /// By its key; a type's values are one thing, to which several may have added.
    made: Vec<(String, Made)>,
}

/// Two statements that changed one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Apart {
    later: (NodeId, String),
    earlier: (NodeId, String),
    objects: BTreeSet<String>,
}

/// Asks something that may fail and stops nothing then.
async fn guarded<T>(
    client: &Client,
    asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<Option<T>, Failure> {
    let found = pg::attempt(client, asked).await?.map_err(Failure::from);
    Ok(found.inspect_err(warn).ok())
}

fn xids(others: &[Other]) -> BTreeSet<u32> {
    others.iter().map(|other| other.xid).collect()
}

/// The same statements, run at both, come to the same, and so do those that follow them in one transaction.
fn without_same(mut others: Vec<Other>) -> Vec<Other> {
    let same: BTreeSet<u32> = others
        .iter()
        .filter(|other| other.is_same)
        .map(|other| other.xid)
        .collect();
    others.retain(|other| !same.contains(&other.xid));
    others
}

/// Rows of [`written_by`].
fn made_of(rows: &[Row]) -> Result<Vec<(String, Made)>, tokio_postgres::Error> {
    let mut made = Vec::new();
    for row in rows {
        let (key, xid): (String, String) = (row.try_get(0)?, row.try_get(2)?);
        let object: Option<String> = row.try_get(3)?;
        let object = object.unwrap_or_else(|| key.clone());
        // Comes and goes with its table.
        if object.contains(" pg_toast.") {
            continue;
        }
        let thing = Made {
            state: row.try_get(1)?,
            xid: xid.parse().unwrap_or(0),
            object,
            named: row.try_get(4)?,
        };
        made.push((key, thing));
    }
    Ok(made)
}

fn warn(error: &Failure) {
    tracing::warn!(error = %error, "what DDL of other nodes has changed cannot be asked");
}

/// Looks before a statement runs.
pub(super) async fn before(client: &Client, ddl: &Ddl, lasting: &Lasting) -> Result<Option<Before>, Failure> {
    let asked = async {
        let others = ddl.others(client, lasting).await?;
        let known = xids(&others);
        let others = without_same(others);
        let made = if others.is_empty() {
            Vec::new()
        } else {
            made_of(&client.query(&written_by(&xids(&others)), &[]).await?)?
        };
        Ok::<_, tokio_postgres::Error>(Before { known, others, made })
    };
    guarded(client, asked).await
}

impl Before {
    /// Looks behind it.
    pub(super) async fn after(
        mut self,
        (client, fence): (&Client, &Fence),
        ddl: &Ddl,
        lasting: &Lasting,
    ) -> Result<Vec<Apart>, Failure> {
        self.add_waited_for((client, fence), ddl, lasting).await?;
        if self.made.is_empty() {
            return Ok(Vec::new());
        }
        let asked = async {
            let keys: Vec<&str> = self.made.iter().map(|(key, _)| key.as_str()).collect();
            let mut now = BTreeMap::new();
            for row in client.query(&now_sql(), &[&keys]).await? {
                now.insert(row.try_get::<_, String>(0)?, row.try_get::<_, Option<String>>(1)?);
            }
            Ok::<_, tokio_postgres::Error>(now)
        };
        let Some(now) = guarded(client, asked).await? else {
            return Ok(Vec::new());
        };
        Ok(self.changed(&now, ddl))
    }

    /// Adds what statements have made that ended while this one waited for a lock.
    async fn add_waited_for(
        &mut self,
        (client, fence): (&Client, &Fence),
        ddl: &Ddl,
        lasting: &Lasting,
    ) -> Result<(), Failure> {
        let Some(mut others) = guarded(client, ddl.others(client, lasting)).await? else {
            return Ok(());
        };
        others.retain(|other| !self.known.contains(&other.xid));
        let others = without_same(others);
        if others.is_empty() {
            return Ok(());
        }
        let rows = fence.query(&written_by(&xids(&others))).await;
        match rows.and_then(|rows| made_of(&rows)) {
            Ok(made) => {
                self.made.extend(made);
                self.others.extend(others);
            }
            // That session has no transaction that could be lost; what has ended it is met by who needs it next.
            Err(error) => warn(&Failure::from(error)),
        }
        Ok(())
    }

    /// `now`: what there is of all that was made, by its key.
    fn changed(self, now: &BTreeMap<String, Option<String>>, ddl: &Ddl) -> Vec<Apart> {
        let Self { others, made, .. } = self;
        let wanted = said::unless_there(&ddl.command);
        // What the other one said in the same words is the same.
        let says = |xid: u32, statement: &String| {
            let mut of_it = others.iter().filter(|other| other.xid == xid);
            of_it.any(|other| said::statements(&other.command).contains(statement))
        };
        let mut objects: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
        for (key, made) in made {
            let named = made.named.as_deref().unwrap_or_default();
            if now.get(&key) != Some(&made.state) {
                objects.entry(made.xid).or_default().insert(made.object);
            } else if wanted
                .iter()
                .any(|wanted| wanted.is(named) && !says(made.xid, &wanted.statement))
            {
                let object = format!("{}, which its IF NOT EXISTS found", made.object);
                objects.entry(made.xid).or_default().insert(object);
            }
        }
        let pair = |other: Other| {
            let objects = objects.get(&other.xid)?.clone();
            Some(Apart {
                later: (ddl.origin, ddl.command.clone()),
                earlier: (other.node, other.command),
                objects,
            })
        };
        others.into_iter().filter_map(pair).collect()
    }
}

/// A statement on one line, cut short.
fn short(command: &str) -> String {
    let line: String = command.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(COMMAND_MAX).collect()
}

impl Apart {
    fn text(&self, names: &Names) -> String {
        let mut objects: Vec<&str> = self.objects.iter().map(String::as_str).collect();
        let more = if objects.len() > SHOWN_MAX { ", ..." } else { "" };
        objects.truncate(SHOWN_MAX);
        format!(
            "`{}` of node {} and then `{}` of node {} ({}{more})",
            short(&self.earlier.1),
            names.with_id(self.earlier.0.0),
            short(&self.later.1),
            names.with_id(self.later.0.0),
            objects.join(", "),
        )
    }
}

/// After the commit of the transaction in which they were found.
pub(super) fn tell(found: &[Apart], names: &Names, lasting: &Lasting) {
    let mut all = lock(&lasting.ddl_apart);
    for apart in found {
        let text = apart.text(names);
        all.retain(|known| *known != text);
        all.push(text);
    }
    let excess = all.len().saturating_sub(SHOWN_MAX);
    all.drain(..excess);
    let text = format!(
        "two nodes changed one thing, neither having seen the other, and both statements ran: here {}. At another node they may have run in the \
         other order, so nodes may differ in it. Compare the schemas (`pg_dump --schema-only` at each node), and say the statement that is to \
         hold once more (`anabranch ddl`), which runs last at every node then; see docs/errors/ddl-is-stuck.md",
        all.join("; ")
    );
    lasting.alarms.raise("ddl_conflict", text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other(node: u16, command: &str, xid: u32) -> Other {
        Other {
            node: NodeId(node),
            command: command.to_owned(),
            is_same: false,
            xid,
        }
    }

    fn made(key: &str, state: &str, xid: u32) -> (String, Made) {
        let thing = Made {
            state: Some(state.to_owned()),
            xid,
            object: format!("the {key}"),
            named: None,
        };
        (key.to_owned(), thing)
    }

    #[test]
    fn only_who_made_what_was_changed_is_told() {
        let before = Before {
            known: BTreeSet::new(),
            others: vec![other(1, "one", 7), other(1, "two", 8), other(3, "three", 9)],
            made: vec![
                made("a", "1", 7),
                made("b", "1", 8),
                made("c", "1", 9),
                made("d", "1", 9),
            ],
        };
        let ddl = Ddl::example(NodeId(2), "late");
        // One has other contents, one is gone.
        let now = [("a", "1"), ("b", "2"), ("d", "1")];
        let now = now.map(|(key, state)| (key.to_owned(), Some(state.to_owned())));
        let found = before.changed(&now.into(), &ddl);
        let told: Vec<(&str, Vec<&str>)> = found
            .iter()
            .map(|apart| {
                let objects = apart.objects.iter().map(String::as_str).collect();
                (apart.earlier.1.as_str(), objects)
            })
            .collect();
        assert_eq!(told, [("two", vec!["the b"]), ("three", vec!["the c"])]);
    }

    #[test]
    fn what_if_not_exists_finds_of_another_is_told_unless_that_said_the_same() {
        let found = |command: &str, theirs: &str| {
            let (key, thing) = made("a", "1", 7);
            let named = ["public", "item", "v"].map(str::to_owned).to_vec();
            let named = Some(named);
            let before = Before {
                known: BTreeSet::new(),
                others: vec![other(1, theirs, 7)],
                made: vec![(key, Made { named, ..thing })],
            };
            let now = [("a".to_owned(), Some("1".to_owned()))];
            let ddl = Ddl::example(NodeId(2), command);
            let all = before.changed(&now.into(), &ddl);
            all.into_iter()
                .flat_map(|apart| apart.objects)
                .collect::<Vec<_>>()
        };
        let ours = "alter table item add column if not exists v int default 1";
        let theirs = "alter table item add column if not exists v int default 2";
        assert_eq!(found(ours, theirs), ["the a, which its IF NOT EXISTS found"]);
        assert_eq!(found(ours, &format!("create table x (); {ours}")), [""; 0]);
        assert_eq!(
            found("alter table item add column if not exists w int", theirs),
            [""; 0]
        );
        assert_eq!(
            found("alter table other add column if not exists v int", theirs),
            [""; 0]
        );
    }

    #[test]
    fn the_alarm_names_both_and_a_pair_once() {
        let lasting = Lasting::default();
        let apart = |later: &str| Apart {
            later: (NodeId(2), later.to_owned()),
            earlier: (
                NodeId(1),
                "ALTER  TABLE item\n ALTER v SET DEFAULT 'a'".to_owned(),
            ),
            objects: ["column v of table item".to_owned()].into(),
        };
        for later in ["x", "x", "y"] {
            tell(&[apart(later)], &Names::default(), &lasting);
        }
        let alarms = lasting.alarms.list();
        let (name, _, text) = &alarms[0];
        assert_eq!(name, "ddl_conflict");
        let first = "`ALTER TABLE item ALTER v SET DEFAULT 'a'` of node 1 and then `x` of node 2 (column v of table item); ";
        assert_eq!(text.matches(first).count(), 1, "{text}");
        assert!(text.contains("and then `y` of node 2"), "{text}");
        for excess in 0..9 {
            tell(&[apart(&excess.to_string())], &Names::default(), &lasting);
        }
        assert_eq!(lock(&lasting.ddl_apart).len(), SHOWN_MAX);
    }
}
