//! Workloads: which tables there are, what clients do to them, and which checks the outcome must stand.
//!
//! Not here: choosing the next transaction (`crate::generator`), running it (`crate::client`)

use crate::checker::Check;

/// The shape of a workload's transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Reads of some rows, or reads and writes of some rows.
    Mixed,
    /// Reads another session's row, then writes the own one.
    Chain,
    /// Writes a whole group of rows, or reads it.
    Group,
    /// Inserts of rows never seen before.
    Insert,
    /// Takes from one row what it gives to another.
    Transfer,
}

/// A workload.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is after.
    pub purpose: &'static str,
    /// Shape of its transactions.
    pub shape: Shape,
    /// How many tables like `kv`.
    pub tables: usize,
    /// Keys of each table, unless the command line says otherwise.
    pub keys: i64,
    /// Do all rows exist before the load begins, and for ever?
    pub preloaded: bool,
    /// One write in this many is a DELETE; 0 for none.
    pub delete_one_in: u32,
    /// Bytes of a column that is stored out of line and not always written; 0 for none.
    pub body_bytes: usize,
    /// Does a write add [`amount`] to the row, by a policy under which all are added?
    pub adds: bool,
    /// Why it cannot run yet.
    pub needs: Option<&'static str>,
}

const PLAIN: Workload = Workload {
    name: "",
    purpose: "",
    shape: Shape::Mixed,
    tables: 1,
    keys: 16,
    preloaded: true,
    delete_one_in: 0,
    body_bytes: 0,
    adds: false,
    needs: None,
};

/// All workloads.
pub fn all() -> Vec<Workload> {
    let needing = |name, purpose, needs| Workload {
        name,
        purpose,
        needs: Some(needs),
        ..PLAIN
    };
    vec![
        Workload {
            name: "register",
            purpose: "read and write transactions over few rows: the later write wins, causality, sessions, atomicity",
            ..PLAIN
        },
        Workload {
            name: "set",
            purpose: "unique inserts: none is lost, none appears twice or from nowhere",
            shape: Shape::Insert,
            preloaded: false,
            ..PLAIN
        },
        Workload {
            name: "causal",
            purpose: "chains: a session reads another's write and then writes its own; never visible without it",
            shape: Shape::Chain,
            keys: 12,
            ..PLAIN
        },
        Workload {
            name: "atomic",
            purpose: "transactions over four rows at once: never half seen",
            shape: Shape::Group,
            ..PLAIN
        },
        Workload {
            name: "mix",
            purpose: "INSERT, UPDATE and DELETE of few keys",
            keys: 8,
            preloaded: false,
            delete_one_in: 3,
            ..PLAIN
        },
        Workload {
            name: "toast",
            purpose: "rows of 20 KB stored out of line, some updates leaving them as they are",
            keys: 12,
            body_bytes: 20_000,
            ..PLAIN
        },
        Workload {
            name: "tables",
            purpose: "transactions over forty tables",
            tables: 40,
            keys: 3,
            ..PLAIN
        },
        Workload {
            name: "counter",
            purpose: "increments at every node are all in the sum",
            keys: 8,
            adds: true,
            ..PLAIN
        },
        Workload {
            name: "bank",
            purpose: "transfers between few accounts: each is in both sums, so the total is preserved",
            shape: Shape::Transfer,
            keys: 8,
            adds: true,
            ..PLAIN
        },
        needing(
            "tpcb",
            "pgbench's TPC-B with its sums",
            "a generator of its own: `counter` and `bank` ask the same of delta columns",
        ),
        needing(
            "append",
            "lists that every transaction appends to, for Elle",
            "merging of jsonb columns, which the core does not have",
        ),
        needing(
            "unique",
            "rows that claim unique values",
            "a claim register for unique keys: chains over three writers may diverge today (docs/design.md, section 5)",
        ),
    ]
}

impl Workload {
    /// The workload of a name.
    pub fn named(name: &str) -> Option<Self> {
        all().into_iter().find(|workload| workload.name == name)
    }

    /// Names of its tables.
    pub fn table_names(&self) -> Vec<String> {
        if self.tables == 1 {
            vec!["kv".to_owned()]
        } else {
            (1..=self.tables).map(|number| format!("kv{number}")).collect()
        }
    }

    /// Its tables as SQL.
    pub fn schema(&self) -> String {
        let body = if self.body_bytes > 0 { ", body text" } else { "" };
        let mut sql = "create table witness (id bigint primary key, node int not null)".to_owned();
        for table in self.table_names() {
            sql.push_str(&format!(
                "; create table {table} (k bigint primary key, v bigint{body})"
            ));
            if self.body_bytes > 0 {
                // Out of line at once, and not compressed away.
                sql.push_str(&format!("; alter table {table} alter body set storage external"));
            }
        }
        sql
    }

    /// Rows that are there before the load, with values 1, 2, ...
    pub fn preload(&self, keys: i64) -> Vec<(String, i64, i64)> {
        if !self.preloaded {
            return Vec::new();
        }
        let rows = self
            .table_names()
            .into_iter()
            .flat_map(|table| (0..keys).map(move |key| (table.clone(), key)));
        rows.zip(1..)
            .map(|((table, key), value)| (table, key, value))
            .collect()
    }

    /// The SQL of one write of a row.
    pub fn write_sql(&self, table: &str, key: i64, value: i64) -> String {
        if self.body_bytes > 0 && value % 3 == 0 {
            let body = body(value, self.body_bytes);
            return format!("update {table} set v = {value}, body = {body} where k = {key}");
        }
        if self.adds {
            return format!("update {table} set v = v + ({}) where k = {key}", amount(value));
        }
        if self.preloaded {
            return format!("update {table} set v = {value} where k = {key}");
        }
        format!(
            "insert into {table} (k, v) values ({key}, {value}) on conflict (k) do update set v = excluded.v"
        )
    }

    /// The policy file that all nodes share, if it needs one.
    pub fn policy(&self) -> Option<&'static str> {
        self.adds
            .then_some("[[table]]\nname = \"public.kv\"\n[table.columns]\nv = \"delta\"\n")
    }

    /// The checks that its outcome must stand on this system. Stamps and the conflict log are Anabranch's.
    pub fn checks(&self, system: &str) -> Vec<Check> {
        let mut checks = vec![Check::Arrival, Check::Equal, Check::Durable];
        if self.adds {
            // What a row shows is a sum: no read tells whose write it saw.
            checks.push(Check::Sum);
            if system == "anabranch" {
                checks.extend([Check::Stamps, Check::Bounded, Check::Alive]);
            }
            return checks;
        }
        if system == "anabranch" {
            checks.extend([
                Check::Stamps,
                Check::FinalValue,
                Check::ConflictLog,
                Check::LogsEqual,
                Check::Bounded,
                Check::Alive,
            ]);
        }
        // Where rows come and go, what a read of nothing saw cannot be told.
        if self.preloaded {
            checks.extend([Check::Causal, Check::Atomic, Check::Session]);
        }
        if self.preloaded && system == "anabranch" {
            checks.push(Check::Visible);
        }
        checks
    }
}

/// What a write of this value adds where writes add: 1 to 1,000, and as much taken away by every other write of a transaction.
pub const fn amount(value: i64) -> i64 {
    let amount = value / 10 % 1_000 + 1;
    if value % 2 == 0 { amount } else { -amount }
}

/// SQL for a text of this many bytes that says by whom it was written and does not compress.
fn body(value: i64, bytes: usize) -> String {
    let times = bytes / 32 + 1;
    format!("(select string_agg(md5('{value}-' || i), '') from generate_series(1, {times}) i)")
}
