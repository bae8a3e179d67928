//! The generator: what a client does next. Fixed by the seed, the node and the client's number, and by nothing that
//! happens.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::history::{Act, Step};
use crate::workload::{Shape, Workload, tpcb};

/// One client in so many only looks on.
pub const LOOKS_ON: usize = 4;

/// The operations of one client.
pub struct Generator {
    random: StdRng,
    workload: Workload,
    tables: Vec<String>,
    keys: i64,
    /// Counts clients over all nodes, from 0.
    client: i64,
    made: i64,
}

impl Generator {
    /// A client's generator.
    pub fn new(workload: &Workload, keys: i64, seed: u64, client: usize) -> Self {
        let client = i64::try_from(client).unwrap_or(i64::MAX);
        Self {
            random: StdRng::seed_from_u64(
                seed.wrapping_mul(1_000_003) ^ client.unsigned_abs().wrapping_mul(7_919),
            ),
            workload: workload.clone(),
            tables: workload.table_names(),
            keys,
            client,
            made: 0,
        }
    }

    /// The next transaction of this client, to be known as `txn`. Values written are unique: `txn * 10` and the place.
    pub fn next(&mut self, txn: i64) -> Vec<Step> {
        self.made += 1;
        let one_in = self.workload.bulk_one_in;
        let is_large = one_in > 0 && self.random.random_range(0..one_in) == 0 && !self.looks_on();
        let mut steps = match self.workload.shape {
            _ if is_large => self.large(),
            Shape::Mixed => self.mixed(),
            Shape::Chain => self.chain(),
            Shape::Group => self.group(),
            Shape::Insert => self.insert(),
            Shape::Transfer => self.transfer(),
            Shape::Claim => self.claim(),
            Shape::Tpcb => self.tpcb(txn),
        };
        for (step, place) in steps.iter_mut().zip(0..) {
            if matches!(
                step.act,
                Act::Write | Act::WriteMany | Act::PutMany | Act::UndoneMany
            ) {
                step.value = Some(txn * 10 + place);
            }
        }
        steps
    }

    fn step(&self, act: Act, table: &str, key: i64) -> Step {
        Step {
            act,
            table: table.to_owned(),
            key,
            value: None,
            list: None,
            last: None,
        }
    }

    /// A large transaction: half of the rows at least, sometimes all; where writes add, an even number of them.
    fn large(&mut self) -> Vec<Step> {
        let table = self.tables[0].clone();
        let pairs = self.keys / 2;
        let (first, count) = match self.random.random_range(0..3) {
            0 => (0, pairs),
            _ => {
                let first = self.random.random_range(0..(pairs / 2).max(1));
                (first, self.random.random_range(pairs / 2..=pairs - first))
            }
        };
        let many = |generator: &Self, act| Step {
            last: Some((first + count) * 2 - 1),
            ..generator.step(act, &table, first * 2)
        };
        let mut steps = match self.random.random_range(0..4) {
            _ if self.workload.adds => vec![many(self, Act::WriteMany)],
            0 => vec![many(self, Act::WriteMany)],
            1 => vec![many(self, Act::DeleteMany), many(self, Act::PutMany)],
            2 => vec![many(self, Act::PutMany), many(self, Act::WriteMany)],
            _ => vec![many(self, Act::DeleteMany)],
        };
        if self.random.random_range(0..4) == 0 {
            let at = self.random.random_range(0..=steps.len());
            steps.insert(at, many(self, Act::UndoneMany));
        }
        if self.random.random_range(0..8) == 0 {
            steps.push(self.step(Act::GiveUp, &table, 0));
        }
        steps
    }

    /// `count` different rows, in order, so that transactions of one node rarely deadlock.
    fn some_rows(&mut self, count: usize) -> Vec<(String, i64)> {
        let mut rows = Vec::new();
        for _ in 0..count {
            let table = self.tables[self.random.random_range(0..self.tables.len())].clone();
            rows.push((table, self.random.random_range(0..self.keys)));
        }
        rows.sort();
        rows.dedup();
        rows
    }

    fn mixed(&mut self) -> Vec<Step> {
        let count = self.random.random_range(1..=4);
        let rows = self.some_rows(count);
        let reads_only = self.random.random_range(0..10) < 4 || self.looks_on();
        let mut steps = Vec::new();
        for (table, key) in rows {
            let deletes = self.workload.delete_one_in > 0
                && self.random.random_range(0..self.workload.delete_one_in) == 0;
            let act = match self.random.random_range(0..4) {
                _ if reads_only => Act::Read,
                0 => Act::Read,
                _ if deletes => Act::Delete,
                _ => Act::Write,
            };
            steps.push(self.step(act, &table, key));
        }
        steps
    }

    /// Every fourth client never waits for a COMMIT, so somebody looks while all others do.
    fn looks_on(&self) -> bool {
        usize::try_from(self.client).is_ok_and(|client| client % LOOKS_ON == LOOKS_ON - 1)
    }

    fn chain(&mut self) -> Vec<Step> {
        let own = self.client % self.keys;
        let other = self.random.random_range(0..self.keys);
        let table = self.tables[0].clone();
        let mut steps = vec![self.step(Act::Read, &table, other)];
        if self.random.random_range(0..3) == 0 || self.looks_on() {
            for _ in 0..2 {
                let more = self.random.random_range(0..self.keys);
                if steps.iter().all(|step| step.key != more) {
                    steps.push(self.step(Act::Read, &table, more));
                }
            }
        } else {
            steps.push(self.step(Act::Write, &table, own));
        }
        steps
    }

    fn group(&mut self) -> Vec<Step> {
        let table = self.tables[0].clone();
        let group = self.random.random_range(0..(self.keys / 4).max(1));
        let act = if self.random.random_range(0..2) == 0 {
            Act::Write
        } else {
            Act::Read
        };
        (group * 4..(group * 4 + 4).min(self.keys))
            .map(|key| self.step(act, &table, key))
            .collect()
    }

    /// The sums of all tables, in one snapshot.
    fn totals(&self) -> Vec<Step> {
        self.tables
            .iter()
            .map(|table| self.step(Act::Total, table, 0))
            .collect()
    }

    /// pgbench's transaction, in its order.
    fn tpcb(&mut self, txn: i64) -> Vec<Step> {
        let account = self.random.random_range(1..=self.keys.max(1));
        let branch = self.random.random_range(1..=tpcb::BRANCHES);
        let teller = self.random.random_range(1..=tpcb::TELLERS);
        if self.random.random_range(0..8) == 0 || self.looks_on() {
            return self.totals();
        }
        vec![
            self.step(Act::Write, tpcb::ACCOUNTS, account),
            self.step(Act::Read, tpcb::ACCOUNTS, account),
            self.step(Act::Write, tpcb::OF_TELLERS, teller),
            self.step(Act::Write, tpcb::OF_BRANCHES, branch),
            Step {
                list: Some(vec![teller, branch, account]),
                ..self.step(Act::Write, tpcb::HISTORY, txn)
            },
        ]
    }

    fn transfer(&mut self) -> Vec<Step> {
        if self.random.random_range(0..8) == 0 || self.looks_on() {
            return self.totals();
        }
        let table = self.tables[0].clone();
        let from = self.random.random_range(0..self.keys);
        let to = (from + self.random.random_range(1..self.keys.max(2))) % self.keys.max(2);
        // In order, so that transactions of one node rarely deadlock.
        let rows = [from.min(to), from.max(to)];
        rows.map(|key| self.step(Act::Write, &table, key)).into()
    }

    /// One row: a claim that another row of this node holds is refused, and the transaction with it.
    fn claim(&mut self) -> Vec<Step> {
        let table = self.tables[0].clone();
        let deletes = self.random.random_range(0..self.workload.delete_one_in.max(1)) == 0;
        let act = match deletes {
            _ if self.looks_on() => Act::Read,
            true => Act::Delete,
            false => Act::Write,
        };
        let key = self.random.random_range(0..self.keys);
        vec![self.step(act, &table, key)]
    }

    fn insert(&mut self) -> Vec<Step> {
        let table = self.tables[0].clone();
        let count = self.random.random_range(1..=3);
        let first = (self.client * 10_000_000 + self.made) * 10;
        (0..count)
            .map(|at| self.step(Act::Write, &table, first + at))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_fixes_every_operation() {
        for workload in crate::workload::all() {
            let operations = |seed| {
                // Not the fourth, who only looks on.
                let mut generator = Generator::new(&workload, workload.keys, seed, 2);
                (0..200).map(|txn| generator.next(txn)).collect::<Vec<_>>()
            };
            assert_eq!(operations(1), operations(1), "{}", workload.name);
            if workload.shape != Shape::Insert {
                assert_ne!(operations(1), operations(2), "{}", workload.name);
            }
        }
    }

    #[test]
    fn no_value_is_written_twice_and_no_row_is_read_or_written_twice_in_a_transaction() {
        for workload in crate::workload::all() {
            let mut values = std::collections::BTreeSet::new();
            let mut generator = Generator::new(&workload, workload.keys, 9, 0);
            for txn in 0..500 {
                let steps = generator.next(txn);
                assert!(!steps.is_empty());
                let rows: std::collections::BTreeSet<_> = // A chain may read the row that it then writes.
                    steps.iter().map(|step| (&step.table, step.key, step.act == Act::Read)).collect();
                if steps.iter().any(|step| step.last.is_some()) {
                    continue;
                }
                assert_eq!(rows.len(), steps.len(), "{}", workload.name);
                for step in &steps {
                    assert!(
                        step.act != Act::Write || values.insert(step.value),
                        "{}",
                        workload.name
                    );
                }
            }
        }
    }
}
