//! Workloads: which tables there are, what clients do to them, and which checks the outcome must stand.
//!
//! Not here: choosing the next transaction (`crate::generator`), running it (`crate::client`)

pub mod tpcb;

use crate::checker::Check;
use crate::history::{Act, Step};

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
    /// Writes one row with a value that no other row may have, or deletes it.
    Claim,
    /// pgbench's TPC-B, or the sums of its tables.
    Tpcb,
}

/// A table of a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// The column of its primary key.
    pub key: &'static str,
    /// The column of the value.
    pub value: &'static str,
}

/// What is known of the sums of a workload's tables, whenever they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Books {
    /// Nothing.
    None,
    /// The sum of each table is always this.
    Constant(i64),
    /// The sums of all tables are always alike.
    Alike,
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
    /// Is what is written appended to a list in the row?
    pub appends: bool,
    /// Does a row claim [`claim`] of its value, which no other row may have?
    pub claims: bool,
    /// One transaction in this many is a large one, which writes many rows by few statements; 0 for none.
    pub bulk_one_in: u32,
    /// Bytes of a column by which a large transaction is large; 0 for none.
    pub pad_bytes: usize,
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
    appends: false,
    claims: false,
    bulk_one_in: 0,
    pad_bytes: 0,
};

/// All workloads.
pub fn all() -> Vec<Workload> {
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
        Workload {
            name: "tpcb",
            purpose: "pgbench's TPC-B: every transaction is in the sums of accounts, tellers, branches and history, which are alike in every snapshot",
            shape: Shape::Tpcb,
            tables: 4,
            keys: 200,
            adds: true,
            ..PLAIN
        },
        Workload {
            name: "append",
            purpose: "jsonb lists that transactions append to: whole, in causal order, no append gone without a line; for Elle",
            keys: 48,
            appends: true,
            ..PLAIN
        },
        Workload {
            name: "unique",
            purpose: "rows that claim unique values: one row has each, at all nodes the same, and who lost it is logged",
            shape: Shape::Claim,
            keys: 8,
            preloaded: false,
            delete_one_in: 4,
            claims: true,
            ..PLAIN
        },
        Workload {
            name: "bulk",
            purpose: "transactions of thousands of rows, several frames of the journal each, among small ones and each other",
            keys: 3_000,
            preloaded: false,
            delete_one_in: 4,
            bulk_one_in: 60,
            pad_bytes: 320,
            ..PLAIN
        },
        Workload {
            name: "bulk-bank",
            purpose: "transfers between thousands of accounts at once, among transfers between two: all are in the sums",
            shape: Shape::Transfer,
            keys: 2_000,
            adds: true,
            bulk_one_in: 120,
            pad_bytes: 320,
            ..PLAIN
        },
    ]
}

impl Workload {
    /// The workload of a name.
    pub fn named(name: &str) -> Option<Self> {
        all().into_iter().find(|workload| workload.name == name)
    }

    /// Its tables.
    pub fn all_tables(&self) -> Vec<Table> {
        if self.shape == Shape::Tpcb {
            return tpcb::tables();
        }
        let numbers = 1..=self.tables;
        let names = numbers.map(|number| match self.tables {
            1 => "kv".to_owned(),
            _ => format!("kv{number}"),
        });
        names
            .map(|name| Table {
                name,
                key: "k",
                value: "v",
            })
            .collect()
    }

    /// Names of its tables.
    pub fn table_names(&self) -> Vec<String> {
        self.all_tables().into_iter().map(|table| table.name).collect()
    }

    /// The columns of a table's key and value.
    fn columns(&self, table: &str) -> (&'static str, &'static str) {
        let found = self.all_tables().into_iter().find(|known| known.name == table);
        found.map_or(("k", "v"), |table| (table.key, table.value))
    }

    /// What is known of sums.
    pub fn books(&self, keys: i64) -> Books {
        match self.shape {
            // What one account gets another gives.
            Shape::Transfer => Books::Constant(self.preload(keys).iter().map(|(_, _, value)| value).sum()),
            Shape::Tpcb => Books::Alike,
            _ => Books::None,
        }
    }

    /// Its tables as SQL.
    pub fn schema(&self) -> String {
        let more = match self {
            _ if self.body_bytes > 0 => ", body text",
            _ if self.appends => ", list jsonb not null default '[]'",
            _ if self.claims => ", claim bigint not null unique",
            _ if self.pad_bytes > 0 => ", pad text",
            _ => "",
        };
        let mut sql = "create table witness (id bigint primary key, node int not null)".to_owned();
        if self.shape == Shape::Tpcb {
            return sql + tpcb::SCHEMA;
        }
        for table in self.table_names() {
            sql.push_str(&format!(
                "; create table {table} (k bigint primary key, v bigint{more})"
            ));
            if self.body_bytes > 0 {
                // Out of line at once, and not compressed away.
                sql.push_str(&format!("; alter table {table} alter body set storage external"));
            }
        }
        sql
    }

    /// Rows that are there before the load, with values 1, 2, ..., or balances of 0.
    pub fn preload(&self, keys: i64) -> Vec<(String, i64, i64)> {
        if self.shape == Shape::Tpcb {
            return tpcb::preload(keys);
        }
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

    /// The SQL that puts in a row that is there before the load.
    pub fn preload_sql(&self, table: &str, key: i64, value: i64) -> String {
        if self.shape == Shape::Tpcb {
            return tpcb::preload_sql(table, key);
        }
        if self.appends {
            return format!("insert into {table} (k, v, list) values ({key}, {value}, '[{value}]')");
        }
        if self.pad_bytes > 0 {
            let pad = self.pad(&key.to_string(), value);
            return format!("insert into {table} (k, v, pad) values ({key}, {value}, {pad})");
        }
        format!("insert into {table} (k, v) values ({key}, {value})")
    }

    /// SQL for a text that tells of which row and which write it is, and makes the row as wide as it has to be.
    fn pad(&self, key: &str, value: i64) -> String {
        format!("repeat(md5({key} || '-{value}'), {})", self.pad_bytes / 32)
    }

    /// The SQL of a step over many rows.
    pub fn many_sql(&self, step: &Step) -> String {
        let (table, first) = (&step.table, step.key);
        let (last, value) = (step.last.unwrap_or(first), step.value.unwrap_or_default());
        let pad = self.pad("k", value);
        match step.act {
            Act::DeleteMany => format!("delete from {table} where k between {first} and {last}"),
            Act::PutMany => format!(
                "insert into {table} (k, v, pad) select k, {value}, {pad} from generate_series({first}, {last}) k \
                 on conflict (k) do update set v = excluded.v, pad = excluded.pad"
            ),
            _ if self.adds => {
                let (even, odd) = (amount_of(0, value), amount_of(1, value));
                format!(
                    "update {table} set v = v + case k % 2 when 0 then {even} else {odd} end \
                     where k between {first} and {last}"
                )
            }
            _ => format!("update {table} set v = {value}, pad = {pad} where k between {first} and {last}"),
        }
    }

    /// The SQL that reads a row: its value, and its list where there is one.
    pub fn read_sql(&self, table: &str, key: i64) -> String {
        let list = if self.appends { ", list::text" } else { "" };
        let (of_key, of_value) = self.columns(table);
        format!("select {of_value}{list} from {table} where {of_key} = {key}")
    }

    /// The SQL that reads the sum of a table.
    pub fn total_sql(&self, table: &str) -> String {
        let (_, of_value) = self.columns(table);
        format!("select coalesce(sum({of_value}), 0)::bigint from {table}")
    }

    /// What a step adds to each row where writes add.
    pub fn added(&self, step: &Step) -> Vec<(String, i64, i64)> {
        let Some(value) = step.value else {
            return Vec::new();
        };
        let of = |key, amount| (step.table.clone(), key, amount);
        match (step.act, step.last) {
            (Act::Write, _) if self.shape == Shape::Tpcb => vec![of(step.key, tpcb::delta(value))],
            (Act::Write, _) => vec![of(step.key, amount(value))],
            // As much is taken from every other of many.
            (Act::WriteMany, Some(last)) => (step.key..=last)
                .map(|key| of(key, amount_of(key, value)))
                .collect(),
            _ => Vec::new(),
        }
    }

    /// What else is read of rows at the end: a column that is a JSON array of numbers.
    pub fn more_sql(&self) -> &'static str {
        match self {
            _ if self.appends => ", list::text",
            _ if self.claims => ", json_build_array(claim)::text",
            _ => "",
        }
    }

    /// The SQL of one write of a row; answers as [`Self::read_sql`] does where rows hold lists. `keys` is how many there are.
    pub fn write_sql(&self, step: &Step, keys: i64) -> String {
        let (table, key, value) = (&step.table, step.key, step.value.unwrap_or_default());
        if self.shape == Shape::Tpcb {
            return tpcb::write_sql(step);
        }
        if self.appends {
            return format!(
                "update {table} set v = {value}, list = list || '{value}'::jsonb where k = {key} returning v, list::text"
            );
        }
        if self.claims {
            return format!(
                "insert into {table} (k, v, claim) values ({key}, {value}, {}) \
                 on conflict (k) do update set v = excluded.v, claim = excluded.claim",
                claim(value, keys)
            );
        }
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
        if self.shape == Shape::Tpcb {
            return Some(tpcb::POLICY);
        }
        self.adds
            .then_some("[[table]]\nname = \"public.kv\"\n[table.columns]\nv = \"delta\"\n")
    }

    /// The checks that its outcome must stand on this system. Stamps and the conflict log are Anabranch's.
    pub fn checks(&self, system: &str) -> Vec<Check> {
        let mut checks = vec![Check::Arrival, Check::Equal, Check::Durable];
        if self.adds {
            // What a row shows is a sum: no read tells whose write it saw.
            checks.push(Check::Sum);
            if self.books(self.keys) != Books::None {
                checks.push(Check::Total);
            }
            if system == "anabranch" {
                checks.extend([Check::Stamps, Check::Order, Check::Bounded, Check::Alive]);
            }
            return checks;
        }
        if system == "anabranch" {
            checks.extend([
                Check::Stamps,
                Check::Order,
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
        if !self.preloaded && self.shape != Shape::Insert {
            // Of those that found a row it can be told whose it was, and what the same session had seen of it before.
            checks.extend([Check::ThinAir, Check::Session]);
        }
        if self.appends {
            checks.push(Check::Append);
        }
        if self.claims {
            // The last version of a row may have lost its unique value, and the row is gone: that is asked there.
            checks.retain(|check| *check != Check::FinalValue);
            checks.push(Check::Unique);
        }
        checks
    }
}

/// What a write of this value adds where writes add: 1 to 1,000, and as much taken away by every other write of a transaction.
pub const fn amount(value: i64) -> i64 {
    let amount = value / 10 % 1_000 + 1;
    if value % 2 == 0 { amount } else { -amount }
}

/// What a step over many rows adds to the one of this key: what the even ones get the odd ones give.
pub const fn amount_of(key: i64, value: i64) -> i64 {
    if key % 2 == 0 {
        amount(value)
    } else {
        -amount(value)
    }
}

/// What a write of this value claims where rows claim: one of four times as many as there are rows.
pub fn claim(value: i64, keys: i64) -> i64 {
    // Values of one client follow each other: they are scattered.
    let scattered = (value / 10).unsigned_abs().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    i64::try_from(scattered).unwrap_or(0) % (keys.max(1) * 4)
}

/// SQL for a text of this many bytes that says by whom it was written and does not compress.
fn body(value: i64, bytes: usize) -> String {
    let times = bytes / 32 + 1;
    format!("(select string_agg(md5('{value}-' || i), '') from generate_series(1, {times}) i)")
}
