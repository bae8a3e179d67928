//! pgbench's TPC-B: its four tables, its transaction, its sums.
//!
//! As `pgbench -i` and its `tpcb-like` script have it, but for `pgbench_history`, which gets a key of its own (the transaction's id): what is
//! replicated has one. Balances are `delta` columns, so that every transaction counts at every node.
//!
//! Not here: whether the sums are right (`crate::checker::sum`, `crate::checker::total`)

use super::Table;
use crate::history::Step;

/// Branches, of ten tellers each.
pub const BRANCHES: i64 = 2;

/// Tellers.
pub const TELLERS: i64 = 10 * BRANCHES;

/// The accounts.
pub const ACCOUNTS: &str = "pgbench_accounts";
/// The tellers.
pub const OF_TELLERS: &str = "pgbench_tellers";
/// The branches.
pub const OF_BRANCHES: &str = "pgbench_branches";
/// One row a transaction.
pub const HISTORY: &str = "pgbench_history";

/// Its tables, accounts first.
pub fn tables() -> Vec<Table> {
    let of = |name: &str, key, value| Table {
        name: name.to_owned(),
        key,
        value,
    };
    vec![
        of(ACCOUNTS, "aid", "abalance"),
        of(OF_TELLERS, "tid", "tbalance"),
        of(OF_BRANCHES, "bid", "bbalance"),
        of(HISTORY, "id", "delta"),
    ]
}

/// Its tables as SQL.
pub const SCHEMA: &str = "; create table pgbench_branches (bid int primary key, bbalance int, filler char(88))\
    ; create table pgbench_tellers (tid int primary key, bid int, tbalance int, filler char(84))\
    ; create table pgbench_accounts (aid int primary key, bid int, abalance int, filler char(84))\
    ; create table pgbench_history (id bigint primary key, tid int, bid int, aid int, delta int, mtime timestamp, filler char(22))";

/// The policy file.
pub const POLICY: &str = "[[table]]\nname = \"public.pgbench_accounts\"\n[table.columns]\nabalance = \"delta\"\n\
    [[table]]\nname = \"public.pgbench_tellers\"\n[table.columns]\ntbalance = \"delta\"\n\
    [[table]]\nname = \"public.pgbench_branches\"\n[table.columns]\nbbalance = \"delta\"\n";

/// Rows that are there before the load; all balances are 0.
pub fn preload(accounts: i64) -> Vec<(String, i64, i64)> {
    let of = |table: &str, count| {
        (1..=count)
            .map(|key| (table.to_owned(), key, 0))
            .collect::<Vec<_>>()
    };
    [
        of(OF_BRANCHES, BRANCHES),
        of(OF_TELLERS, TELLERS),
        of(ACCOUNTS, accounts),
    ]
    .concat()
}

/// The SQL that puts in such a row.
pub fn preload_sql(table: &str, key: i64) -> String {
    let branch = (key - 1) % BRANCHES + 1;
    match table {
        OF_BRANCHES => format!("insert into {table} (bid, bbalance) values ({key}, 0)"),
        OF_TELLERS => format!("insert into {table} (tid, bid, tbalance) values ({key}, {branch}, 0)"),
        _ => format!("insert into {table} (aid, bid, abalance, filler) values ({key}, {branch}, 0, '')"),
    }
}

/// What the transaction of this value adds to everything, as pgbench draws it: -5000 to 5000.
pub fn delta(value: i64) -> i64 {
    let scattered = (value / 10).unsigned_abs().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    i64::try_from(scattered).unwrap_or(0) % 10_001 - 5_000
}

/// The SQL of one write. The list of a step of `pgbench_history` is (teller, branch, account).
pub fn write_sql(step: &Step) -> String {
    let (table, key) = (step.table.as_str(), step.key);
    let delta = delta(step.value.unwrap_or_default());
    match table {
        ACCOUNTS => format!("update {table} set abalance = abalance + ({delta}) where aid = {key}"),
        OF_TELLERS => format!("update {table} set tbalance = tbalance + ({delta}) where tid = {key}"),
        OF_BRANCHES => format!("update {table} set bbalance = bbalance + ({delta}) where bid = {key}"),
        _ => {
            let numbers: Vec<String> = step.list.iter().flatten().map(ToString::to_string).collect();
            format!(
                "insert into {table} (id, tid, bid, aid, delta, mtime) values ({key}, {}, {delta}, current_timestamp)",
                numbers.join(", ")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_transaction_adds_is_the_same_for_all_its_steps_and_of_both_signs() {
        let of = |txn: i64| {
            let deltas: Vec<i64> = (0..6).map(|place| delta(txn * 10 + place)).collect();
            assert!(deltas.iter().all(|one| *one == deltas[0] && one.abs() <= 5_000));
            deltas[0]
        };
        let all: Vec<i64> = (100_000_000_000..100_000_000_200).map(of).collect();
        assert!(all.iter().any(|one| *one > 0) && all.iter().any(|one| *one < 0));
    }
}
