//! A node's WAL as the harness itself decodes it: a slot of its own with `test_decoding`, made before the load, read at
//! the end. The daemon under test has no part in it.

use anabranch_tests::Session;

use crate::Result;
use crate::client::node_of;
use crate::history::{Act, Commit, First, Step};
use crate::workload::Table;

/// The harness's slot.
pub const SLOT: &str = "jepsen";

/// Makes the slot. To be called before anything is replicated.
pub async fn begin(admin: &Session) -> Result<()> {
    let sql = format!("select pg_create_logical_replication_slot('{SLOT}', 'test_decoding')");
    admin
        .try_run(&sql)
        .await
        .map_err(|error| format!("making the slot: {error}").into())
}

/// Everything committed since [`begin`]. A transaction of another node counts as applied, whoever applied it.
pub async fn read(admin: &Session, node: u16, tables: &[Table]) -> Result<Vec<Commit>> {
    // Long rows stand twice in an update's text; what is looked for stands at the beginning of each. Lines of the log may be many.
    let sql = format!(
        "select (lsn - '0/0')::text, case when length(data) > 2000 then left(data, 200) || ' ' || \
         coalesce(substring(data from 'new-tuple:.{{0,200}}'), '') else data end, \
         case when data like 'COMMIT %' then (extract(epoch from substring(data from '\\(at (.*)\\)')::timestamptz) \
         * 1000000)::bigint end from pg_logical_slot_peek_changes('{SLOT}', null, null, 'include-timestamp', 'on', \
         'skip-empty-xacts', 'on') where data not like 'table anabranch.%' or data like 'table anabranch.progress:%' \
         or data like 'table anabranch.clock:%'"
    );
    admin
        .try_run("set timezone = 'UTC'; set datestyle = 'ISO'")
        .await
        .map_err(|error| error.to_string())?;
    let rows = admin
        .try_rows(&sql)
        .await
        .map_err(|error| format!("decoding: {error}"))?;
    let mut commits = Vec::new();
    let mut open = Commit::default();
    for row in rows {
        let [lsn, data, commit_us] = row.try_into().map_err(|_| "decoding: not three columns")?;
        let data = data.unwrap_or_default();
        if data.starts_with("BEGIN") {
            open = Commit {
                node,
                ..Commit::default()
            };
        } else if data.starts_with("COMMIT") {
            open.lsn = lsn.unwrap_or_default().parse()?;
            open.commit_us = commit_us.unwrap_or_default().parse()?;
            if open.first == First::User && open.witnesses.iter().any(|&txn| node_of(txn) != node) {
                open.first = First::Progress;
            }
            if open.first != First::Nothing {
                commits.push(std::mem::take(&mut open));
            }
        } else {
            change(&mut open, &data, tables)?;
        }
    }
    Ok(commits)
}

/// Takes one line of `test_decoding` in.
fn change(open: &mut Commit, data: &str, tables: &[Table]) -> Result<()> {
    let Some((table, rest)) = data.strip_prefix("table ").and_then(|rest| rest.split_once(": ")) else {
        return Ok(());
    };
    let (act, row) = rest.split_once(": ").unwrap_or((rest, ""));
    let row = row.rsplit_once("new-tuple:").map_or(row, |(_, new)| new);
    let mut first = |found: First| {
        if open.first == First::Nothing {
            open.first = found;
        }
    };
    match table {
        "anabranch.progress" => {
            first(First::Progress);
            let stamp = text(row, "stamp").trim_start_matches("\\x").to_owned();
            let lsn = parse_lsn(text(row, "lsn")).ok_or_else(|| format!("no LSN in {data}"))?;
            open.progress.push((text(row, "origin").parse()?, lsn, stamp));
        }
        "anabranch.clock" => {
            first(First::Clock);
            let node: u16 = text(row, "node_id").parse()?;
            let witness_us = text(row, "witness_us").parse()?;
            if node == open.node {
                open.clock_us = Some(witness_us);
            } else if node == 0 && act == "UPDATE" {
                // By this a node that was healed writes again what nobody had decoded (docs/design.md, healing).
                open.again_us = Some(witness_us);
            }
        }
        "public.witness" => {
            first(First::User);
            open.witnesses.push(text(row, "id").parse()?);
        }
        _ => {
            let Some(name) = table.strip_prefix("public.") else {
                return Ok(());
            };
            first(First::User);
            if let Some(table) = tables.iter().find(|known| known.name == name) {
                let act = if act == "DELETE" { Act::Delete } else { Act::Write };
                open.rows.push(Step {
                    act,
                    table: name.to_owned(),
                    key: text(row, table.key).parse()?,
                    value: text(row, table.value).parse().ok().filter(|_| act == Act::Write),
                    list: None,
                    last: None,
                });
            }
        }
    }
    Ok(())
}

/// The text of a column: `name[type]:value` or `name[type]:'value'`.
fn text<'a>(row: &'a str, name: &str) -> &'a str {
    let mut rest = row;
    while let Some(at) = rest.find(name) {
        let begins = at == 0 || rest[..at].ends_with(' ');
        let after = &rest[at + name.len()..];
        if begins
            && after.starts_with('[')
            && let Some((_, value)) = after.split_once("]:")
        {
            return match value.strip_prefix('\'') {
                Some(quoted) => quoted.split('\'').next().unwrap_or(""),
                None => value.split(' ').next().unwrap_or(""),
            };
        }
        rest = after;
    }
    ""
}

/// `16/B374D848` as a number.
pub fn parse_lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    Some(u64::from_str_radix(high, 16).ok()? << 32 | u64::from_str_radix(low, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(lines: &[&str]) -> Commit {
        let mut open = Commit {
            node: 1,
            ..Commit::default()
        };
        for line in lines {
            let kv = Table {
                name: "kv".to_owned(),
                key: "k",
                value: "v",
            };
            change(&mut open, line, &[kv]).unwrap();
        }
        open
    }

    #[test]
    fn an_applications_transaction_is_read() {
        let commit = commit(&[
            "table public.kv: UPDATE: old-key: k[bigint]:3 v[bigint]:7 new-tuple: k[bigint]:3 v[bigint]:71",
            "table public.kv: DELETE: k[bigint]:4 v[bigint]:9",
            "table public.kv: INSERT: k[bigint]:5 v[bigint]:null",
            "table public.witness: INSERT: id[bigint]:100000000001 node[integer]:1",
        ]);
        assert_eq!(commit.first, First::User);
        assert_eq!(commit.witnesses, [100_000_000_001]);
        let steps: Vec<String> = commit.rows.iter().map(ToString::to_string).collect();
        assert_eq!(steps, ["w(kv/3 = 71)", "d(kv/4)", "w(kv/5)"]);
    }

    #[test]
    fn an_apply_transaction_is_known_by_its_first_change() {
        let commit = commit(&[
            "table anabranch.progress: UPDATE: origin[integer]:2 epoch[bigint]:1 lsn[pg_lsn]:'0/19ABC8' stamp[bytea]:'\\x0102030405060708000a'",
            "table public.kv: UPDATE: k[bigint]:3 v[bigint]:7",
        ]);
        assert_eq!(commit.first, First::Progress);
        assert_eq!(
            commit.progress,
            [(2, 0x19_ABC8, "0102030405060708000a".to_owned())]
        );
    }

    #[test]
    fn rows_written_again_are_known_by_the_clock_of_no_node() {
        let again = commit(&[
            "table anabranch.clock: UPDATE: node_id[integer]:0 witness_us[bigint]:17 written_at[timestamp with time zone]:'2026-01-01 00:00:00+00'",
            "table public.kv: UPDATE: k[bigint]:3 v[bigint]:71",
            "table public.witness: UPDATE: id[bigint]:100000000007 node[integer]:1",
        ]);
        assert_eq!(
            (again.first, again.clock_us, again.again_us),
            (First::Clock, None, Some(17))
        );
        assert_eq!(again.witnesses, [100_000_000_007]);
    }

    #[test]
    fn a_clock_witness_is_read_and_other_tables_of_the_daemon_are_not() {
        let heartbeat = commit(&[
            "table anabranch.clock: UPDATE: node_id[integer]:1 witness_us[bigint]:17 written_at[timestamp with time zone]:'2026-01-01 00:00:00+00'",
        ]);
        assert_eq!((heartbeat.first, heartbeat.clock_us), (First::Clock, Some(17)));
        let fence = commit(&["table anabranch.fence: UPDATE: id[integer]:1 n[bigint]:2"]);
        assert_eq!(fence.first, First::Nothing);
    }
}
