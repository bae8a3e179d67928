//! The work: tables, what is in them before, and what is written to them while the receiver stands still.

use std::fmt;

use clap::ValueEnum;

use crate::results::Rounds;

/// How a row looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Shape {
    /// bigint key, two ints, 80 bytes of text.
    Narrow,
    /// uuid key, timestamptz, numeric, jsonb of 200 bytes, text.
    Wide,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Work {
    /// One row inserted a transaction.
    InsertOne,
    /// 500 rows inserted a transaction.
    #[value(name = "insert-500")]
    Insert500,
    /// One row updated a transaction, all over the table.
    UpdateOne,
    /// Every row of the table updated by one transaction.
    UpdateAll,
    /// One row updated a transaction, the same hundred rows again and again.
    UpdateHot,
    /// One row deleted a transaction.
    DeleteOne,
    /// pgbench's TPC-B: three updates and an insert a transaction, four clients.
    TpcB,
}

/// How much, before `--scale`.
const ONES: u64 = 200_000;
const ROWS: u64 = 1_000_000;
const HOT_ROWS: u64 = 100;
const TPC_B_CLIENTS: u64 = 4;

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Narrow => "narrow",
            Self::Wide => "wide",
        })
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InsertOne => "insert-one",
            Self::Insert500 => "insert-500",
            Self::UpdateOne => "update-one",
            Self::UpdateAll => "update-all",
            Self::UpdateHot => "update-hot",
            Self::DeleteOne => "delete-one",
            Self::TpcB => "tpc-b",
        })
    }
}

/// Work of one kind on one shape, at one scale.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    pub work: Work,
    pub shape: Shape,
    pub scale: f64,
}

/// What writing a job left behind.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    pub rows: u64,
    pub txns: u64,
}

/// How the writing is done.
pub enum Writer {
    /// SQL, one statement that commits on its way.
    Sql(String),
    /// pgbench with these arguments.
    PgBench(Vec<String>),
}

fn scaled(amount: u64, scale: f64) -> u64 {
    ((amount as f64 * scale) as u64).max(500)
}

impl Job {
    fn ones(&self) -> u64 {
        scaled(ONES, self.scale)
    }

    fn rows(&self) -> u64 {
        scaled(ROWS, self.scale)
    }

    /// The table written in one round (TPC-B writes to more). Inserts get a fresh one each, so nothing has to be emptied between.
    pub fn table(&self, round: usize) -> String {
        match self.work {
            Work::InsertOne => format!("{}_ins1_{round}", self.shape),
            Work::Insert500 => format!("{}_ins500_{round}", self.shape),
            Work::UpdateOne | Work::UpdateAll | Work::UpdateHot => format!("{}_upd", self.shape),
            Work::DeleteOne => format!("{}_del_{round}", self.shape),
            Work::TpcB => "pgbench_accounts".to_owned(),
        }
    }

    /// All tables that one round writes to.
    pub fn touched(&self, round: usize) -> Vec<String> {
        match self.work {
            Work::TpcB => TPC_B_NAMES.map(str::to_owned).to_vec(),
            _ => vec![self.table(round)],
        }
    }

    /// The tables of this job, to be created before anything replicates.
    pub fn tables(&self, rounds: &Rounds) -> Vec<(String, String)> {
        if self.work == Work::TpcB {
            return vec![("pgbench_accounts".to_owned(), TPC_B_TABLES.to_owned())];
        }
        let mut tables: Vec<String> = rounds.clone().map(|round| self.table(round)).collect();
        tables.dedup();
        tables
            .into_iter()
            .map(|table| {
                let columns = self.shape.columns();
                (table.clone(), format!("create table {table} ({columns})"))
            })
            .collect()
    }

    /// What fills the tables before the first round.
    pub fn fill(&self, rounds: &Rounds) -> Vec<(String, String)> {
        let values = self.shape.values("i");
        match self.work {
            Work::InsertOne | Work::Insert500 => Vec::new(),
            Work::UpdateOne | Work::UpdateAll | Work::UpdateHot => {
                let table = self.table(0);
                let sql = in_thousands(&table, &values, self.rows());
                vec![(table, sql)]
            }
            Work::DeleteOne => rounds
                .clone()
                .map(|round| {
                    let table = self.table(round);
                    let sql = in_thousands(&table, &values, self.ones());
                    (table, sql)
                })
                .collect(),
            Work::TpcB => vec![("pgbench_accounts".to_owned(), tpc_b_fill(self.tpc_b_scale()))],
        }
    }

    fn tpc_b_scale(&self) -> u64 {
        if self.scale >= 0.2 { 10 } else { 1 }
    }

    /// What is written, by whom.
    pub fn writer(&self, round: usize) -> Writer {
        let table = self.table(round);
        let (ones, rows) = (self.ones(), self.rows());
        let values = self.shape.values("i");
        let change = self.shape.change();
        // A prime far from the others: every row is met before one is met twice.
        let spread = self.shape.key(&format!("1 + (i * 7919::bigint) % {rows}"));
        let hot = self.shape.key(&format!("1 + i % {HOT_ROWS}"));
        let key = self.shape.key("i");
        let each = |statement: String| {
            Writer::Sql(format!(
                "do $$ begin for i in 1::bigint..{ones} loop {statement}; commit; end loop; end $$"
            ))
        };
        match self.work {
            Work::InsertOne => each(format!("insert into {table} select {values}")),
            Work::UpdateOne => each(format!("update {table} set {change} where id = {spread}")),
            Work::UpdateHot => each(format!("update {table} set {change} where id = {hot}")),
            Work::DeleteOne => each(format!("delete from {table} where id = {key}")),
            Work::Insert500 => Writer::Sql(format!(
                "do $$ begin for b in 0..{} loop insert into {table} select {values} from \
                 generate_series(b::bigint * 500 + 1, b::bigint * 500 + 500) i; commit; end loop; end $$",
                rows / 500 - 1
            )),
            Work::UpdateAll => Writer::Sql(format!("update {table} set {change}")),
            Work::TpcB => Writer::PgBench(
                [
                    "--no-vacuum",
                    &format!("--scale={}", self.tpc_b_scale()),
                    &format!("--client={TPC_B_CLIENTS}"),
                    "--jobs=2",
                    "--protocol=prepared",
                    &format!("--transactions={}", self.tpc_b_txns() / TPC_B_CLIENTS),
                ]
                .map(str::to_owned)
                .to_vec(),
            ),
        }
    }

    fn tpc_b_txns(&self) -> u64 {
        scaled(ONES / 2, self.scale) / TPC_B_CLIENTS * TPC_B_CLIENTS
    }

    /// How many rows [`Self::fill`] puts into each source for one round.
    pub fn filled(&self) -> u64 {
        match self.work {
            Work::InsertOne | Work::Insert500 => 0,
            Work::UpdateOne | Work::UpdateAll | Work::UpdateHot => self.rows(),
            Work::DeleteOne => self.ones(),
            Work::TpcB => self.tpc_b_scale() * 100_000,
        }
    }

    /// How many rows and transactions one round writes.
    pub fn written(&self) -> Written {
        let (ones, rows) = (self.ones(), self.rows());
        match self.work {
            Work::InsertOne | Work::UpdateOne | Work::UpdateHot | Work::DeleteOne => Written {
                rows: ones,
                txns: ones,
            },
            Work::Insert500 => Written {
                rows: rows / 500 * 500,
                txns: rows / 500,
            },
            Work::UpdateAll => Written { rows, txns: 1 },
            Work::TpcB => Written {
                rows: self.tpc_b_txns() * 4,
                txns: self.tpc_b_txns(),
            },
        }
    }
}

impl Shape {
    fn columns(self) -> &'static str {
        match self {
            Self::Narrow => "id bigint primary key, a int not null, b int not null, pad text not null",
            Self::Wide => {
                "id uuid primary key, at timestamptz not null, amount numeric not null, doc jsonb not null, \
                 note text"
            }
        }
    }

    fn key(self, number: &str) -> String {
        match self {
            Self::Narrow => format!("({number})"),
            Self::Wide => format!("md5(({number})::text)::uuid"),
        }
    }

    fn values(self, number: &str) -> String {
        match self {
            Self::Narrow => format!("{number}, {number} % 1000, 0, rpad({number}::text, 80, 'abcdefgh')"),
            Self::Wide => format!(
                "md5({number}::text)::uuid, '2026-01-01'::timestamptz + {number} * interval '1 second', \
                 {number} / 100.0, jsonb_build_object('order', {number}, 'customer', md5({number}::text), \
                 'lines', jsonb_build_array(1, 2, 3), 'comment', repeat(md5(({number} + 1)::text), 3)), \
                 'note ' || {number}"
            ),
        }
    }

    fn change(self) -> &'static str {
        match self {
            Self::Narrow => "a = a + 1, b = b + 1",
            Self::Wide => "amount = amount + 1, at = at + interval '1 minute'",
        }
    }
}

fn in_thousands(table: &str, values: &str, rows: u64) -> String {
    format!(
        "do $$ begin for b in 0..{} loop insert into {table} select {values} from generate_series(b::bigint * 1000 \
         + 1, least(b::bigint * 1000 + 1000, {rows})) i; commit; end loop; end $$",
        (rows - 1) / 1000
    )
}

/// The tables of [`TPC_B_TABLES`].
pub const TPC_B_NAMES: [&str; 4] = [
    "pgbench_accounts",
    "pgbench_branches",
    "pgbench_tellers",
    "pgbench_history",
];

/// As pgbench makes them, but with keys for all: the history too, or nobody could replicate its deletes.
pub const TPC_B_TABLES: &str = "create table pgbench_accounts (aid int primary key, bid int, abalance int, filler char(84)); \
    create table pgbench_branches (bid int primary key, bbalance int, filler char(88)); \
    create table pgbench_tellers (tid int primary key, bid int, tbalance int, filler char(84)); \
    create table pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22), \
        id bigint generated by default as identity primary key)";

/// What fills them.
pub fn tpc_b_fill(scale: u64) -> String {
    format!(
        "do $$ begin \
         insert into pgbench_branches select i, 0, '' from generate_series(1, {scale}) i; \
         insert into pgbench_tellers select i, (i - 1) / 10 + 1, 0, '' from generate_series(1, {scale} * 10) i; \
         commit; \
         for b in 0..{scale} * 100 - 1 loop insert into pgbench_accounts select i, (i - 1) / 100000 + 1, 0, '' \
         from generate_series(b * 1000 + 1, b * 1000 + 1000) i; commit; end loop; end $$"
    )
}
